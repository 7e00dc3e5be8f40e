"""7 - The figures of the study: one function each, from a trace (and, for several seeds, from records).

Needs the extra `report`. Where an axis is training time its cells are checkpoints, all equally wide: they lie dense in
the beginning, where most happens, and the labels tell their steps. Heat maps are pixels in SVG, too: as thousands of
cells they would make a page of many megabytes.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from welore.emergence.claims import (
    RANK_AXIS,
    SETTLED,
    SUBSPACE,
    after_warm_up,
    corrected,
    noise_stable_rank,
    overlap_with_last,
    rank_correlation,
    run_of,
)
from welore.emergence.trace import COSINE, Array, Trace
from welore.errors import WeLoreError
from welore.records import Record
from welore.reporting import figures
from welore.reporting.module_types import module_positions
from welore.reporting.style import BLACK, GREY, HATCH, PALE, STYLES, hatch, legend, log_ticks, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KIND_STYLES = dict(zip(KINDS, (*STYLES, ("#E69F00", "X")), strict=True))
TICKS = 6
BELOW: dict[str, Any] = {"loc": "outside lower center", "ncols": 3, "fontsize": 8, "frameon": False}
SMALLEST = 1e-12  # beside the largest value of a heat map; below it is nothing but rounding


# --- the paper's -------------------------------------------------------------------------------------------------


def gradient_cosines(trace: Trace, *, title: str = "") -> "Figure":
    """Cosine of one batch's gradients at two checkpoints; q and k of the first block, down and up of a middle one.

    WeLore, figure 2, first row.
    """
    shown = _shown(trace)
    tables = [trace.matrices[name].same[COSINE] for name in shown]
    fig, panels = _panels(shown, title, 3.1)
    low = min(0.0, *(float(table.min()) for table in tables))
    for ax, table in zip(panels, tables, strict=True):
        mesh = ax.pcolormesh(table, cmap="viridis", vmin=low, vmax=1, rasterized=True)
        ax.set_aspect("equal")
        _step_ticks(ax.xaxis, trace)
        _step_ticks(ax.yaxis, trace)
        ax.set_xlabel("step", fontsize=8)
    panels[0].set_ylabel("step", fontsize=8)
    _bar(fig, mesh, panels, "cosine")
    return fig


def gradient_values(trace: Trace, *, title: str = "") -> "Figure":
    """Singular values of the gradients over training, the largest hundred. WeLore, figure 2, second row."""
    shown = _shown(trace)
    tables = [trace.matrices[name].gradient for name in shown]
    return _courses(trace, shown, tables, "index of the gradient's singular value", title)


def weight_values(trace: Trace, *, title: str = "") -> "Figure":
    """Singular values of the weights over training. WeLore, figure 3."""
    shown = _shown(trace)
    tables = [trace.matrices[name].weight for name in shown]
    return _courses(trace, shown, tables, "index of the weight's singular value", title)


def spectra(trace: Trace, *, title: str = "") -> "Figure":
    """Normalised singular values at the last checkpoint, with the threshold of ERR 50 %. WeLore, figure 4."""
    return figures.normalised_spectra(trace.spectra(), trace.plans[-1], title=title)


def reduction(trace: Trace, *, title: str = "") -> "Figure":
    """Reduction ratio of every matrix at the last checkpoint."""
    return figures.reduction_heatmap(trace.plans[-1], title=title)


# --- ours --------------------------------------------------------------------------------------------------------


def partition(trace: Trace, *, title: str = "") -> "Figure":
    """Share of the singular values below the ERR-50 threshold, every matrix over training; N-LRCs hatched."""
    positions = module_positions(trace.matrices)
    names = sorted(trace.matrices, key=lambda name: (_kind_order(positions[name].module_type), positions[name].layer))
    ratio = np.array([[_by_name(plan)[name].reduction_ratio for plan in trace.plans] for name in names])
    lrc = np.array([[_by_name(plan)[name].factored for plan in trace.plans] for name in names])
    fig = new_figure(8.0, max(3.0, 1.6 + 0.13 * len(names)), title)
    ax = fig.subplots()
    mesh = ax.pcolormesh(ratio, cmap="YlGnBu", vmin=0, vmax=1, rasterized=True)
    hatch(ax, zip(*np.nonzero(~lrc), strict=True))
    kinds = [positions[name].module_type for name in names]
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    ax.hlines(first[1:], 0, len(trace.steps), color="white", linewidth=2.5, zorder=1.5)
    middles = [(a + b) / 2 for a, b in zip(first, [*first[1:], len(kinds)], strict=True)]
    ax.set_yticks(middles, labels=list(dict.fromkeys(kinds)), fontsize=8)
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.set_ylabel("module; blocks from first to last", fontsize=9)
    ax.set_xlabel("step", fontsize=9)
    _step_ticks(ax.xaxis, trace)
    _bar(fig, mesh, [ax], "share below the threshold of ERR 50 %")
    from matplotlib.patches import Patch

    fig.legend(
        handles=[Patch(facecolor="white", edgecolor=HATCH, hatch="/////", label="N-LRC, the others are LRCs")],
        **BELOW,
    )
    return fig


def settled(trace: Trace, *, title: str = "") -> "Figure":
    """How far a gradient's 16 leading directions are already those of the end, by module kind.

    Thick: of two batches, over their noise ceiling. Thin: of one and the same batch, as the paper would see it. Dotted:
    the noise ceiling itself. All corrected for chance, means over the blocks.
    """
    kinds = _kinds(trace)
    fig = new_figure(9.0, 4.6, title)
    panels = list(fig.subplots(2, 4, sharex=True, sharey=True).flat)
    steps = np.arange(len(trace.steps)) + 0.5
    for ax, (kind, names) in zip(panels, kinds.items(), strict=False):
        found = [trace.matrices[name] for name in names]
        colour = KIND_STYLES.get(kind, (BLACK, "o"))[0]
        true = np.mean([overlap_with_last(matrix) for matrix in found], 0)
        same = np.mean([corrected(matrix, matrix.same, SUBSPACE)[:, -1] for matrix in found], 0)
        ceiling = np.mean([np.diag(corrected(matrix, matrix.other, SUBSPACE)) for matrix in found], 0)
        ax.plot(steps, np.clip(true, 0, 1.25), color=colour, linewidth=2, label="two batches, over the noise ceiling")
        ax.plot(steps, same, color=colour, linewidth=0.8, label="one batch")
        ax.plot(steps, ceiling, color=BLACK, linewidth=1, linestyle=":", label="noise ceiling")
        ax.axhline(SETTLED, color=GREY, linewidth=0.8)
        ax.set_title(kind, fontsize=9)
        ax.set(ylim=(-0.05, 1.28), xlim=(0, len(steps)))
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
        _step_ticks(ax.xaxis, trace, 4)
    for ax in panels[len(kinds) :]:
        ax.set_visible(False)
    panels[3].tick_params(labelbottom=True)
    for ax in panels[3:7]:
        ax.set_xlabel("step", fontsize=8)
    for ax in panels[::4]:
        ax.set_ylabel("overlap with the end", fontsize=8)
    handles = [_line_of(BLACK, "two batches, over the noise ceiling", width=2), _line_of(BLACK, "one batch", width=0.8)]
    handles.append(_line_of(BLACK, "noise ceiling: two batches at one step", style=":"))
    fig.legend(handles=handles, **BELOW)
    return fig


def course(trace: Trace, *, title: str = "") -> "Figure":
    """Held-out loss, and the stable rank of the gradients by module kind beside that of noise, over training."""
    fig = new_figure(9.0, 3.4, title)
    loss, rank = fig.subplots(1, 2)
    loss.plot(trace.steps, trace.held_out_loss, color=BLACK, marker="o", markersize=3, linewidth=1.2)
    loss.set_xlabel("step", fontsize=9)
    loss.set_ylabel("held-out loss", fontsize=9)
    x = np.arange(len(trace.steps)) + 0.5
    for kind, names in _kinds(trace).items():
        colour, marker = KIND_STYLES.get(kind, (BLACK, "o"))
        values = np.median([trace.matrices[name].stable_rank for name in names], 0)
        rank.plot(x, values, color=colour, marker=marker, markersize=3, linewidth=1, label=kind)
    warm = int(np.argmax(after_warm_up(trace)))
    rank.axvline(warm + 0.5, color=GREY, linewidth=0.8, linestyle="--", label="end of warm-up")
    smallest = min((m.shape for m in trace.matrices.values()), key=lambda shape: noise_stable_rank(*shape))
    rank.axhline(noise_stable_rank(*smallest), color=BLACK, linewidth=1, linestyle=":", label="noise, square matrix")
    rank.set_xlabel("step", fontsize=9)
    rank.set_ylabel("stable rank of the gradient", fontsize=9)
    rank.set(yscale="log", ylim=(0.9, None))
    log_ticks(rank.yaxis)
    _step_ticks(rank.xaxis, trace)
    for ax in (loss, rank):
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    legend(fig, rank)
    return fig


FIGURES: dict[str, tuple[Callable[..., "Figure"], str]] = {
    "course": (course, "What the model learned, and how many directions its gradients have."),
    "gradient-cosines": (
        gradient_cosines,
        "As Figure 2 of the paper, first row: cosines of one batch's gradients.",
    ),
    "gradient-values": (gradient_values, "As Figure 2 of the paper, second row: singular values of the gradients."),
    "weight-values": (weight_values, "As Figure 3 of the paper: singular values of the weights."),
    "spectra": (spectra, "As Figure 4 of the paper: normalised spectra at the end, and the threshold of ERR 50 %."),
    "reduction": (reduction, "Reduction ratio of every matrix at the end."),
    "partition": (partition, "Which matrices are LRCs, from the first step to the last."),
    "settled": (settled, "When the directions of a gradient become those of the end."),
}


def settling(records: Sequence[Record], *, title: str = "") -> "Figure":
    """Settling step and stable rank of the gradient against the reduction ratio, every matrix of every run.

    records: of kind "pretrain", others are passed over. In the corner the rank correlation of every run, with its 95 %
    interval.
    """
    runs = [record for record in records if record.kind == "pretrain"]
    if not runs:
        raise WeLoreError("there is no record of a pre-training to draw: make one with `welore pretrain`")
    fig = new_figure(9.0, 4.2, title)
    for ax, (name, what) in zip(fig.subplots(1, 2), RANK_AXIS.items(), strict=True):
        lines = []
        for nth, record in enumerate(runs):
            rows = record.numbers["matrices"]
            x, y = (np.array([row[key] for row in rows]) for key in ("reduction_ratio", name))
            value, low, high = rank_correlation(x, y)
            lines.append(f"{run_of(record)}: {value:+.2f} [{low:+.2f}, {high:+.2f}]")
            for kind in dict.fromkeys(row["kind"] for row in rows):
                colour, marker = KIND_STYLES.get(kind, (BLACK, "o"))
                mine = np.array([row["kind"] == kind for row in rows])
                style: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": "none", "markersize": 5}
                ax.plot(x[mine], y[mine], **style, alpha=0.75, label=None if nth else kind)
        ax.set_title(plain("rank correlation  " + "\n".join(lines)), fontsize=8, loc="left")
        ax.set_xlabel("reduction ratio at the end", fontsize=9)
        ax.set_ylabel(what, fontsize=9)
        ax.tick_params(labelsize=8)
        ax.grid(color=PALE)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    legend(fig, fig.axes[0])
    return fig


# --- pieces ------------------------------------------------------------------------------------------------------


def _shown(trace: Trace) -> list[str]:
    """The matrices of the paper's panels: q and k of the first block, down and up of the block just past the middle."""
    positions = module_positions(trace.matrices)
    layers = sorted({p.layer for p in positions.values() if p.layer is not None})
    deep = layers[min(len(layers) - 1, round(7 / 12 * len(layers)))]
    wanted = [(layers[0], "q_proj"), (layers[0], "k_proj"), (deep, "down_proj"), (deep, "up_proj")]
    named = {(p.layer, p.module_type.rpartition(".")[2]): name for name, p in positions.items()}
    return [named[key] for key in wanted]


def _kinds(trace: Trace) -> dict[str, list[str]]:
    positions = module_positions(trace.matrices)
    found: dict[str, list[str]] = {}
    for name in sorted(trace.matrices, key=lambda name: _kind_order(positions[name].module_type)):
        found.setdefault(positions[name].module_type, []).append(name)
    return found


def _kind_order(kind: str) -> int:
    return KINDS.index(kind) if kind in KINDS else len(KINDS)


def _by_name(plan: Any) -> dict[str, Any]:
    return {allocation.name: allocation for allocation in plan.allocations}


def _panels(shown: Sequence[str], title: str, height: float) -> tuple["Figure", list["Axes"]]:
    fig = new_figure(11.0, height, title)
    panels = list(fig.subplots(1, len(shown), sharey=True))
    for ax, name in zip(panels, shown, strict=True):
        ax.set_title(name.removeprefix("model.").replace("self_attn.", "").replace("mlp.", ""), fontsize=9)
        ax.tick_params(labelsize=7)
    return fig, panels


def _courses(trace: Trace, shown: Sequence[str], tables: Sequence[Array], what: str, title: str) -> "Figure":
    """Heat maps: index across, training downwards, colour the value on a log scale that all panels share."""
    from matplotlib.colors import LogNorm

    fig, panels = _panels(shown, title, 3.1)
    largest = max(float(table.max()) for table in tables)
    smallest = max(min(float(table[table > 0].min()) for table in tables), SMALLEST * largest)
    lowest = max(smallest, largest * 1e-4)
    norm = LogNorm(lowest, largest)
    for ax, table in zip(panels, tables, strict=True):
        mesh = ax.pcolormesh(np.maximum(table, lowest), cmap="viridis", norm=norm, rasterized=True)
        _step_ticks(ax.yaxis, trace)
    panels[0].set_ylabel("step", fontsize=8)
    panels[0].invert_yaxis()
    fig.supxlabel(what, fontsize=8)
    _bar(fig, mesh, panels, "singular value (log scale)")
    return fig


def _step_ticks(axis: Any, trace: Trace, count: int = TICKS) -> None:
    at: NDArray[np.int64] = np.unique(np.linspace(0, len(trace.steps) - 1, count).round().astype(int))
    axis.set_ticks(at + 0.5, labels=[f"{int(trace.steps[i]):,}" for i in at])


def _bar(fig: "Figure", mesh: Any, panels: Sequence["Axes"], what: str) -> None:
    bar = fig.colorbar(mesh, ax=panels, pad=0.02, aspect=25)
    bar.set_label(what, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _line_of(colour: str, label: str, *, width: float = 1.4, style: Any = "-") -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, linewidth=width, linestyle=style, label=label)
