"""One function per figure: an artefact -> a matplotlib Figure.

Needs the extra `report`; matplotlib is imported when a figure is drawn.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from welore.allocation.plan import Allocation, Plan
from welore.allocation.spectra import Spectra
from welore.errors import WeLoreError
from welore.linalg.spectrum import gaussian_null, normalise
from welore.reporting import style
from welore.reporting.formatting import perplexity_text
from welore.reporting.module_types import group_by_type, module_positions, summarise
from welore.reporting.tables import DENSE, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NULL = "Gaussian null: noise of the same shape"


def normalised_spectra(spectra: Spectra, plan: Plan | None = None, *, title: str = "") -> "Figure":
    """Normalised singular values, one panel per module type, one line per matrix; the null is dashed. WeLore, figure 4.

    plan: its threshold is drawn if it is a `welore` plan (levels of other strategies are no normalised values).
    WeLoreError if the plan was made for another model.
    """
    if plan is not None:
        plan.model.check(spectra.model, "plan")
    positions = module_positions(spectra.values)
    types = group_by_type(spectra.values)
    columns = min(4, len(types))
    rows = math.ceil(len(types) / columns)
    fig = style.new_figure(max(5.0, 2.1 * columns + 1.2), 2.0 * rows + 1.2, title)
    panels = list(fig.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    colours = _depth_colours(fig, panels, [p.layer for p in positions.values() if p.layer is not None])
    for (module_type, names), ax in zip(types.items(), panels, strict=False):
        for name in names:
            _draw_spectrum(ax, normalise(spectra.values[name]), color=colours(positions[name].layer), linewidth=0.7)
        for m, n in sorted({spectra.shapes[name] for name in names}):
            _draw_spectrum(ax, gaussian_null(m, n), color=style.BLACK, linestyle="--", linewidth=1.3, label=NULL)
        if plan is not None and plan.strategy == "welore":
            ax.axhline(plan.threshold, color=style.VERMILION, linewidth=1.3, label=f"threshold {plan.threshold:.3f}")
        ax.set_title(style.plain(module_type), fontsize=9)
    panels[0].set(xlim=(0, 1), ylim=(0, 1.02))
    for i, ax in enumerate(panels):
        ax.set_visible(i < len(types))
        lowest = i + columns >= len(types)  # of its column: the panel below may be one of the hidden
        ax.tick_params(labelbottom=lowest, labelsize=7)
        ax.set_xlabel("index / full rank" if lowest else "", fontsize=8)
        ax.set_ylabel("normalised value" if i % columns == 0 else "", fontsize=8)
    style.legend(fig, panels[0])
    return fig


def reduction_heatmap(plan: Plan, *, title: str = "") -> "Figure":
    """Reduction ratio p / k of every matrix, module type x layer; N-LRCs, which stay dense, are hatched.

    The experts of a layer share a cell, with their mean; it is hatched if all of them stay dense.
    A `welore` plan gets a last column: the share that its threshold takes from a Gaussian matrix of the same shape.
    Where MLP neurons were pruned, a row below shows their share of the MLP; where experts were, their share of a layer.
    """
    types = summarise(plan)
    row = {t.module_type: i for i, t in enumerate(types)}
    positions = module_positions(a.name for a in plan.allocations)
    layers = sorted({p.layer for p in positions.values()}, key=lambda layer: math.inf if layer is None else layer)
    ratio = np.full((len(types), len(layers)), np.nan)
    cells = {name: (row[p.module_type], layers.index(p.layer)) for name, p in positions.items()}
    inside: dict[tuple[int, int], list[Allocation]] = {}
    for a in plan.allocations:
        inside.setdefault(cells[a.name], []).append(a)
    for cell, experts in inside.items():
        ratio[cell] = np.mean([a.reduction_ratio for a in experts])
    names = [style.plain(t.module_type) for t in types]
    for words, left, others in (("neurons out", plan.neurons, 0.0), ("experts out", plan.experts, math.nan)):
        pruned: dict[int | None, list[float]] = {}
        for module, position in module_positions(left).items():
            pruned.setdefault(position.layer, []).append(left[module].pruned / left[module].width)
        if left:
            names.append(words)
            ratio = np.vstack([ratio, [np.mean(pruned.get(layer, others)) for layer in layers]])

    width = min(16.0, 3.2 + max(0.24 * len(layers), 3.0))
    fig = style.new_figure(width, max(2.8, 1.6 + 0.34 * len(names)), title)
    ax = fig.subplots()
    ax.set_facecolor(style.PALE)  # shows where a model has no such matrix
    mesh = _cells(ax, np.arange(len(layers) + 1.0), ratio)
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, len(layers)) if len(layers) / s <= 30)
    shown = enumerate("none" if layer is None else str(layer) for layer in layers)
    ticks = {i + 0.5: text for i, text in shown if text == "none" or i % step == 0}
    if any(t.null is not None for t in types):
        _draw_null(ax, len(layers), [t.null for t in types])
        ticks[len(layers) + 1.5] = "Gaussian\nnull"
    style.hatch(ax, [cell for cell, experts in inside.items() if not any(a.factored for a in experts)])
    ax.set_xticks(list(ticks), labels=list(ticks.values()), fontsize=7)
    ax.set_yticks(np.arange(len(names)) + 0.5, labels=names, fontsize=8)
    ax.invert_yaxis()
    ax.tick_params(length=0)
    ax.set_xlabel("layer", fontsize=9)
    style.colour_bar(fig, mesh, ax, "reduction ratio", ticks=[0, 0.25, 0.5, 0.75, 1])
    _heat_legend(fig, holes=bool(np.isnan(ratio).any()), columns=3 if width > 9 else 1)
    return fig


def parameters_by_module(plan: Plan, *, title: str = "") -> "Figure":
    """Parameters before and after by module type, in millions, with their ratio on top."""
    types = summarise(plan)
    x = np.arange(len(types))
    fig = style.new_figure(max(5.0, 1.5 + 0.85 * len(types)), 3.4, title)
    ax = fig.subplots()
    dense = [t.dense_parameters / 1e6 for t in types]
    stored = [t.stored_parameters / 1e6 for t in types]
    ax.bar(x - 0.2, dense, 0.38, color=style.GREY, label="dense")
    ax.bar(x + 0.2, stored, 0.38, color=style.BLUE, label="compressed")
    for i, t in enumerate(types):
        text = f"{100 * t.parameter_ratio:.0f} %"
        ax.annotate(text, (i, max(dense[i], stored[i])), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    ax.set_xticks(x, labels=[style.plain(t.module_type) for t in types])
    if len(types) > 8:
        ax.tick_params(axis="x", rotation=90)
    ax.margins(y=0.12)
    style.finish_axes(ax, y="parameters, millions")
    style.legend(fig, ax)
    return fig


def perplexities(texts: Mapping[str, Sequence[Result]], *, title: str = "") -> "Figure":
    """Perplexities (tables.results) on a log axis, one panel per text; the dense models are dotted lines.

    Points, because bars would need a zero. A perplexity that is not finite is written at the right edge; WeLoreError
    if none is finite.
    """
    results = [result for group in texts.values() for result in group]
    finite = [r.perplexity for r in results if r.perplexity is not None]
    if not finite:
        raise WeLoreError("no result has a finite perplexity: there is nothing to draw")
    low, high = min(finite), max(finite)
    span = max(high / low, 2.0)
    heights = [0.7 + 0.42 * len(group) for group in texts.values()]
    fig = style.new_figure(9.0, 0.9 + sum(heights), title)
    panels = fig.subplots(len(texts), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    # The limits come first: automatic ones overflow on the perplexity of a broken model.
    panels[0].set_xlim(low / span**0.06, min(high * span**0.16, 1e307))
    panels[0].set_xscale("log")
    strategies = sorted({r.strategy for r in results}, key=lambda s: (s != DENSE, s))
    looks = {s: style.STYLES[i % len(style.STYLES)] for i, s in enumerate(strategies)}
    for (caption, group), ax in zip(texts.items(), panels, strict=True):
        ax.set_title(style.plain(caption), fontsize=9, loc="left")
        _draw_perplexities(ax, group, looks)
    panels[-1].set_xlabel("perplexity (log scale, lower is better)", fontsize=9)
    style.log_ticks(panels[-1].xaxis)
    style.legend(fig, *fig.axes)
    return fig


def _draw_spectrum(ax: "Axes", s: NDArray[np.float64], **line: Any) -> None:
    """One normalised spectrum (k,) over the share of the full rank, at a few dozen points to keep the page small."""
    k = len(s)
    ends = np.geomspace(1, max(k, 2), 16) - 1  # spectra bend at their ends
    points = np.concatenate([ends, k - 1 - ends, np.linspace(0, k - 1, 24)])
    i = np.unique(np.clip(points.round().astype(int), 0, k - 1))
    # The middle of each value's step, so that the curve crosses the threshold at the share above it.
    ax.plot((i + 0.5) / k, s[i], marker="." if k == 1 else None, **line)


def _depth_colours(fig: "Figure", panels: Sequence["Axes"], layers: Sequence[int]) -> Callable[[int | None], Any]:
    """Layer -> colour, and its colour bar; matrices outside the blocks are blue."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.ticker import MaxNLocator

    # Without the palest tenth, which is invisible on paper.
    shades = ListedColormap(colormaps["viridis"](np.linspace(0, 0.9, 256)))
    low, high = min(layers, default=0), max(layers, default=0)
    if high > low:
        bar = style.colour_bar(fig, ScalarMappable(Normalize(low, high), shades), panels, "layer", aspect=30)
        bar.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    return lambda layer: style.BLUE if layer is None else shades((layer - low) / max(high - low, 1))


def _cells(ax: "Axes", edges: NDArray[np.float64], values: NDArray[np.float64]) -> Any:
    rows = np.arange(len(values) + 1)
    return ax.pcolormesh(edges, rows, values, cmap="YlGnBu", vmin=0, vmax=1, edgecolors="white", linewidth=0.4)


def _draw_null(ax: "Axes", layers: int, shares: Sequence[float | None]) -> None:
    values = np.array([share or 0.0 for share in shares])
    ax.axvspan(layers, layers + 0.5, color="white", linewidth=0)
    _cells(ax, np.array([layers + 0.5, layers + 2.5]), values[:, None])
    for i, value in enumerate(values):
        colour = "white" if value > 0.55 else style.BLACK
        ax.text(layers + 1.5, i + 0.5, f"{100 * value:.0f} %", ha="center", va="center", fontsize=7, color=colour)


def _heat_legend(fig: "Figure", *, holes: bool, columns: int) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor="white", edgecolor=style.HATCH, hatch="/////", label="N-LRC: stays dense, nothing is removed"),
        Patch(facecolor="white", edgecolor=style.HATCH, label="LRC: stored as two factors of lower rank"),
        Patch(facecolor=style.PALE, label="no such matrix"),
    ]
    style.legend(fig, handles=handles if holes else handles[:2], columns=columns)


def _draw_perplexities(ax: "Axes", group: Sequence[Result], looks: Mapping[str, tuple[str, str]]) -> None:
    for y, r in enumerate(group):
        colour, marker = looks[r.strategy]
        text = perplexity_text(r.perplexity)
        if r.perplexity is None:
            ax.text(1, y, text, transform=ax.get_yaxis_transform(), ha="right", va="center", fontsize=8)
            continue
        ax.plot([r.perplexity], [y], color=colour, marker=marker, linestyle="none", label=style.plain(r.strategy))
        ax.annotate(text, (r.perplexity, y), (7, 0), textcoords="offset points", va="center", fontsize=8)
        if r.strategy == DENSE:
            ax.axvline(r.perplexity, color=colour, linestyle=":", linewidth=1)
    names = [r.name if len(r.name) <= 50 else f"{r.name[:49]}…" for r in group]
    labels = [style.plain(f"{name}\n{r.strategy}: {r.size}") for name, r in zip(names, group, strict=True)]
    ax.set_yticks(range(len(group)), labels=labels, fontsize=8)
    ax.set_ylim(len(group) - 0.4, -0.6)
    ax.grid(axis="y", color=style.PALE)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
