"""7 - One function per figure: an artefact -> a matplotlib Figure.

Needs the extra `report`; matplotlib is imported when a figure is drawn. Colours are safe for the colour-blind and
fall or rise evenly in grey, so that they survive a printer.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from welore.errors import WeLoreError
from welore.plan import Allocation, Plan
from welore.spectra import Spectra, gaussian_null, normalise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INSTALL = "figures and reports need matplotlib and jinja2: pip install 'welore[report]'"
# Okabe and Ito's colours; a marker of its own for each, for printers without colour
STYLES = (("#000000", "D"), ("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "v"), ("#56B4E9", "P"))
BLACK, BLUE, VERMILION = (STYLES[i][0] for i in range(3))
GREY, PALE, HATCH = "#A0A0A0", "#E4E4E4", "#404040"
DENSE = "dense"
NULL = "Gaussian null: noise of the same shape"
N_LRC = "n-lrc"  # names the hatched cells in the drawing


@dataclass(frozen=True)
class Place:
    """Where a matrix sits: its kind is its name without the layer; layer None: outside the blocks."""

    kind: str
    layer: int | None


@dataclass(frozen=True)
class KindSummary:
    """One module kind in a plan: means over its matrices; null is the Gaussian share (`welore` plans only)."""

    kind: str
    matrices: int
    lrcs: int
    reduction_ratio: float
    null: float | None
    dense_parameters: int
    stored_parameters: int

    @property
    def parameter_ratio(self) -> float:
        """Stored over dense parameters."""
        return self.stored_parameters / self.dense_parameters


@dataclass(frozen=True)
class Result:
    """One line of the results: a model on a text. strategy: "dense" for a model without low-rank layers.

    perplexity: None when it is not finite. ratio: to the dense model on the same text, None without one.
    """

    name: str
    strategy: str
    rank_reduction: float
    parameter_ratio: float
    bytes: int
    perplexity: float | None
    ratio: float | None = None

    @property
    def size(self) -> str:
        """ERR, parameter ratio and bytes, which are always told together."""
        err, ratio = percent(self.rank_reduction), percent(self.parameter_ratio)
        return f"ERR {err}, parameters {ratio}, {megabytes(self.bytes)}"


def places(names: Iterable[str]) -> dict[str, Place]:
    """Name -> place. A kind is shortened to the fewest last components that tell it from all other kinds."""
    parted = {name: _without_layer(name) for name in names}
    kinds = {kind for kind, _ in parted.values()}
    short = {kind: _shortest(kind, kinds) for kind in kinds}
    return {name: Place(short[kind], layer) for name, (kind, layer) in parted.items()}


def summarise(plan: Plan) -> list[KindSummary]:
    """One line per module kind, in the model's order."""
    place = places(a.name for a in plan.allocations)
    members: dict[str, list[Allocation]] = {}
    for a in plan.allocations:
        members.setdefault(place[a.name].kind, []).append(a)
    return [
        KindSummary(
            kind=kind,
            matrices=len(group),
            lrcs=sum(a.factored for a in group),
            reduction_ratio=float(np.mean([a.reduction_ratio for a in group])),
            null=_null_share(group, plan.threshold) if plan.strategy == "welore" else None,
            dense_parameters=sum(map(plan.came_with, group)),
            stored_parameters=sum(a.stored_parameters for a in group),
        )
        for kind, group in members.items()
    ]


# --- the figures -----------------------------------------------------------------------------------------------


def normalised_spectra(spectra: Spectra, plan: Plan | None = None, *, title: str = "") -> "Figure":
    """Normalised singular values, one panel per module kind, one line per matrix. WeLore, figure 4.

    Dashed: the Gaussian null of the same shape. plan: its threshold is drawn if it is a `welore` plan (the levels
    of other strategies are not normalised values). WeLoreError if the plan was made for another model.
    """
    if plan is not None:
        plan.model.check(spectra.model, "plan")
    place = places(spectra.values)
    kinds = list(dict.fromkeys(p.kind for p in place.values()))
    columns = min(4, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    fig = new_figure(max(5.0, 2.1 * columns + 1.2), 2.0 * rows + 1.2, title)
    panels = list(fig.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    colours = _depth_colours(fig, panels, [p.layer for p in place.values() if p.layer is not None])
    for kind, ax in zip(kinds, panels, strict=False):
        names = [name for name, p in place.items() if p.kind == kind]
        for name in names:
            _draw_spectrum(ax, normalise(spectra.values[name]), color=colours(place[name].layer), linewidth=0.7)
        for m, n in sorted({spectra.shapes[name] for name in names}):
            _draw_spectrum(ax, gaussian_null(m, n), color=BLACK, linestyle="--", linewidth=1.3, label=NULL)
        if plan is not None and plan.strategy == "welore":
            ax.axhline(plan.threshold, color=VERMILION, linewidth=1.3, label=f"threshold {plan.threshold:.3f}")
        ax.set_title(plain(kind), fontsize=9)
    panels[0].set(xlim=(0, 1), ylim=(0, 1.02))
    _label_outer(panels, len(kinds), columns)
    legend(fig, panels[0])
    return fig


def reduction_heatmap(plan: Plan, *, title: str = "") -> "Figure":
    """Reduction ratio p / k of every matrix, module kind x layer; N-LRCs are hatched, as they stay dense.

    A `welore` plan gets a last column: what its threshold takes from a Gaussian matrix of the same shape. Where neurons
    were taken out before the cut, a last row shows their share of the MLP.
    """
    kinds = summarise(plan)
    row = {k.kind: i for i, k in enumerate(kinds)}
    place = places(a.name for a in plan.allocations)
    layers = sorted({p.layer for p in place.values()}, key=lambda layer: math.inf if layer is None else layer)
    ratio = np.full((len(kinds), len(layers)), np.nan)
    cells = {a.name: (row[place[a.name].kind], layers.index(place[a.name].layer)) for a in plan.allocations}
    for a in plan.allocations:
        ratio[cells[a.name]] = a.reduction_ratio
    gone = {_without_layer(name)[1]: 1 - len(n.kept) / n.width for name, n in plan.neurons.items()}
    names = [plain(k.kind) for k in kinds]
    if gone:
        names.append("neurons out")
        ratio = np.vstack([ratio, [gone.get(layer, 0.0) for layer in layers]])

    width = min(16.0, 3.2 + max(0.24 * len(layers), 3.0))
    fig = new_figure(width, max(2.8, 1.6 + 0.34 * len(names)), title)
    ax = fig.subplots()
    ax.set_facecolor(PALE)  # shows where a model has no such matrix
    mesh = _cells(ax, np.arange(len(layers) + 1.0), ratio)
    ticks = _layer_ticks(layers)
    if any(k.null is not None for k in kinds):
        _draw_null(ax, len(layers), [k.null for k in kinds])
        ticks[len(layers) + 1.5] = "Gaussian\nnull"
    hatch(ax, [cells[a.name] for a in plan.allocations if not a.factored])
    ax.set_xticks(list(ticks), labels=list(ticks.values()), fontsize=7)
    ax.set_yticks(np.arange(len(names)) + 0.5, labels=names, fontsize=8)
    ax.invert_yaxis()
    ax.tick_params(length=0)
    ax.set_xlabel("layer", fontsize=9)
    bar = fig.colorbar(mesh, ax=ax, ticks=[0, 0.25, 0.5, 0.75, 1], pad=0.02)
    bar.set_label("reduction ratio", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    _heat_legend(fig, holes=bool(np.isnan(ratio).any()), columns=3 if width > 9 else 1)
    return fig


def parameters_by_module(plan: Plan, *, title: str = "") -> "Figure":
    """Parameters before and after by module kind, in millions, with their ratio on top."""
    kinds = summarise(plan)
    x = np.arange(len(kinds))
    fig = new_figure(max(5.0, 1.5 + 0.85 * len(kinds)), 3.4, title)
    ax = fig.subplots()
    dense = [k.dense_parameters / 1e6 for k in kinds]
    stored = [k.stored_parameters / 1e6 for k in kinds]
    ax.bar(x - 0.2, dense, 0.38, color=GREY, label="dense")
    ax.bar(x + 0.2, stored, 0.38, color=BLUE, label="compressed")
    for i, k in enumerate(kinds):
        text = f"{100 * k.parameter_ratio:.0f} %"
        ax.annotate(text, (i, max(dense[i], stored[i])), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    ax.set_xticks(x, labels=[plain(k.kind) for k in kinds], fontsize=8)
    if len(kinds) > 8:
        ax.tick_params(axis="x", rotation=90)
    ax.tick_params(axis="y", labelsize=8)
    ax.margins(y=0.12)
    ax.set_ylabel("parameters, millions", fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    legend(fig, ax)
    return fig


def perplexities(texts: Mapping[str, Sequence[Result]], *, title: str = "") -> "Figure":
    """Perplexities on a log axis, one panel per text (caption -> results); dotted: the dense models.

    Points, not bars: a log axis has no zero for a bar to start from. A perplexity that is not finite is written
    at the right edge. Raises WeLoreError when there is no finite one at all.
    """
    results = [result for group in texts.values() for result in group]
    finite = [r.perplexity for r in results if r.perplexity is not None]
    if not finite:
        raise WeLoreError("no result has a finite perplexity: there is nothing to draw")
    low, high = min(finite), max(finite)
    span = max(high / low, 2.0)
    heights = [0.7 + 0.42 * len(group) for group in texts.values()]
    fig = new_figure(9.0, 0.9 + sum(heights), title)
    panels = fig.subplots(len(texts), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    # the limits come first: the automatic ones overflow on the perplexity of a broken model
    panels[0].set_xlim(low / span**0.06, min(high * span**0.16, 1e307))
    panels[0].set_xscale("log")
    strategies = sorted({r.strategy for r in results}, key=lambda s: (s != DENSE, s))
    style = {s: STYLES[i % len(STYLES)] for i, s in enumerate(strategies)}
    for (caption, group), ax in zip(texts.items(), panels, strict=True):
        ax.set_title(plain(caption), fontsize=9, loc="left")
        _draw_perplexities(ax, group, style)
    panels[-1].set_xlabel("perplexity (log scale, lower is better)", fontsize=9)
    log_ticks(panels[-1].xaxis)
    legend(fig, *fig.axes)
    return fig


# --- how numbers are written, here and in tables ---------------------------------------------------------------


def percent(fraction: float) -> str:
    """A fraction 0..1 as per cent."""
    return f"{100 * fraction:.1f} %"


def megabytes(size: float) -> str:
    """Bytes as MB = 1e6 bytes."""
    return f"{size / 1e6:,.1f} MB"


def perplexity_text(value: float | None) -> str:
    """Four figures where they mean something, a power of ten where only the order does."""
    if value is None:
        return "not finite"
    if value >= 1e6:
        return f"{value:.2g}".replace("e+0", "e").replace("e+", "e")
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


# --- pieces ----------------------------------------------------------------------------------------------------


def _without_layer(name: str) -> tuple[str, int | None]:
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if at is None:
        return name, None
    return ".".join(parts[:at] + parts[at + 1 :]), int(parts[at])


def _shortest(kind: str, kinds: Iterable[str]) -> str:
    parts = kind.split(".")
    others = [f".{other}" for other in kinds if other != kind]
    # an ending that starts with an expert's number tells a reader nothing
    endings = (".".join(parts[-n:]) for n in range(1, len(parts)) if not parts[-n].isdecimal())
    return next((end for end in endings if not any(o.endswith(f".{end}") for o in others)), kind)


def _null_share(group: Sequence[Allocation], threshold: float) -> float:
    return float(np.mean([(gaussian_null(*a.shape) < threshold).mean() for a in group]))


def new_figure(width: float, height: float, title: str) -> "Figure":
    """An empty figure, inches; WeLoreError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise WeLoreError(INSTALL) from error
    # letters are not equally wide in SVG and PNG: without a margin one of the two is cut at the edge
    fig = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.07))
    if title:
        fig.suptitle(plain(title), fontsize=10)
    return fig


def plain(text: str) -> str:
    """Text of a user's, for a label."""
    # a dollar sign in a user's label must not start a formula
    return text.replace("$", r"\$")


def _draw_spectrum(ax: "Axes", s: NDArray[np.float64], **style: Any) -> None:
    """One normalised spectrum (k,) over the share of the full rank; at a few dozen points, for a small page.

    Spectra bend at their ends: the points lie dense there and sparse between.
    """
    k = len(s)
    ends = np.geomspace(1, max(k, 2), 16) - 1
    some = np.concatenate([ends, k - 1 - ends, np.linspace(0, k - 1, 24)])
    i = np.unique(np.clip(some.round().astype(int), 0, k - 1))
    # the middle of each value's step, so that the curve crosses the threshold at the share that is kept
    ax.plot((i + 0.5) / k, s[i], marker="." if k == 1 else None, **style)


def _depth_colours(fig: "Figure", panels: Sequence["Axes"], layers: Sequence[int]) -> Callable[[int | None], Any]:
    """Layer -> colour, with its colour bar; matrices outside the blocks are blue."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.ticker import MaxNLocator

    # without the palest tenth, which paper swallows
    shades = ListedColormap(colormaps["viridis"](np.linspace(0, 0.9, 256)))
    low, high = min(layers, default=0), max(layers, default=0)
    if high > low:
        bar = fig.colorbar(ScalarMappable(Normalize(low, high), shades), ax=panels, pad=0.02, aspect=30)
        bar.set_label("layer", fontsize=9)
        bar.ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        bar.ax.tick_params(labelsize=8)
    return lambda layer: BLUE if layer is None else shades((layer - low) / max(high - low, 1))


def _label_outer(panels: Sequence["Axes"], used: int, columns: int) -> None:
    for i, ax in enumerate(panels):
        ax.set_visible(i < used)
        lowest = i + columns >= used  # of its column: the panel below may be one of the hidden
        ax.tick_params(labelbottom=lowest, labelsize=7)
        ax.set_xlabel("index / full rank" if lowest else "", fontsize=8)
        ax.set_ylabel("normalised value" if i % columns == 0 else "", fontsize=8)


def _cells(ax: "Axes", edges: NDArray[np.float64], values: NDArray[np.float64]) -> Any:
    rows = np.arange(len(values) + 1)
    return ax.pcolormesh(edges, rows, values, cmap="YlGnBu", vmin=0, vmax=1, edgecolors="white", linewidth=0.4)


def _draw_null(ax: "Axes", layers: int, shares: Sequence[float | None]) -> None:
    values = np.array([share or 0.0 for share in shares])
    ax.axvspan(layers, layers + 0.5, color="white", linewidth=0)
    _cells(ax, np.array([layers + 0.5, layers + 2.5]), values[:, None])
    for i, value in enumerate(values):
        colour = "white" if value > 0.55 else BLACK
        ax.text(layers + 1.5, i + 0.5, f"{100 * value:.0f} %", ha="center", va="center", fontsize=7, color=colour)


def hatch(ax: "Axes", cells: Iterable[tuple[int, int]]) -> None:
    """Hatch the unit cells (row, column) of a heat map."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    patches = [Rectangle((column, row), 1, 1) for row, column in cells]
    ax.add_collection(
        PatchCollection(patches, hatch="/////", facecolor="none", edgecolor=HATCH, linewidth=0, gid=N_LRC)
    )


def _heat_legend(fig: "Figure", *, holes: bool, columns: int) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor="white", edgecolor=HATCH, hatch="/////", label="N-LRC: stays dense, nothing is removed"),
        Patch(facecolor="white", edgecolor=HATCH, label="LRC: factored to the ranks that are left"),
        Patch(facecolor=PALE, label="no such matrix"),
    ]
    shown = handles if holes else handles[:2]
    fig.legend(handles=shown, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _layer_ticks(layers: Sequence[int | None]) -> dict[float, str]:
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, len(layers)) if len(layers) / s <= 30)
    shown = {i + 0.5: str(layer) for i, layer in enumerate(layers) if layer is not None and i % step == 0}
    return shown | {i + 0.5: "none" for i, layer in enumerate(layers) if layer is None}


def _draw_perplexities(ax: "Axes", group: Sequence[Result], style: Mapping[str, tuple[str, str]]) -> None:
    for y, r in enumerate(group):
        colour, marker = style[r.strategy]
        text = perplexity_text(r.perplexity)
        if r.perplexity is None:
            ax.text(1, y, text, transform=ax.get_yaxis_transform(), ha="right", va="center", fontsize=8)
            continue
        ax.plot([r.perplexity], [y], color=colour, marker=marker, linestyle="none", label=r.strategy)
        ax.annotate(text, (r.perplexity, y), (7, 0), textcoords="offset points", va="center", fontsize=8)
        if r.strategy == DENSE:
            ax.axvline(r.perplexity, color=colour, linestyle=":", linewidth=1)
    names = [r.name if len(r.name) <= 50 else f"{r.name[:49]}…" for r in group]
    labels = [plain(f"{name}\n{r.strategy}: {r.size}") for name, r in zip(names, group, strict=True)]
    ax.set_yticks(range(len(group)), labels=labels, fontsize=8)
    ax.set_ylim(len(group) - 0.4, -0.6)
    ax.grid(axis="y", color=PALE)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def log_ticks(axis: "Axis") -> None:
    """Ticks in plain numbers on a logarithmic axis whose limits are known: a few, however wide or narrow it is."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    locator: Locator = MaxNLocator(5, steps=[1, 2, 5, 10])
    if math.log10(high) - math.log10(low) > 1:  # not matplotlib's LogLocator, which overflows where models are broken
        first, last = math.floor(math.log10(low)), math.floor(math.log10(high))
        factors = (1, 2, 5) if last - first < 3 else (1,)
        decades = range(first, last + 1, 1 + (last - first) // 10)
        ticks = [factor * 10.0**decade for decade in decades for factor in factors]
        locator = FixedLocator([tick for tick in ticks if low <= tick <= high])
    axis.set_major_locator(locator)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: perplexity_text(value)))
    axis.set_tick_params(labelsize=8)


def legend(fig: "Figure", *axes: "Axes") -> None:
    """One legend below the figure for all axes, every label once."""
    pairs = [pair for ax in axes for pair in zip(*ax.get_legend_handles_labels(), strict=True)]
    distinct = {label: handle for handle, label in pairs}
    fig.legend(list(distinct.values()), list(distinct), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
