"""The figures of the study: from a trace, or for several seeds from their records.

Needs the extra `report`. An axis of training time shows checkpoints at equal distances: they are dense in the
beginning, where most happens, and the labels are their steps. Heat maps are pixels even in SVG: thousands of cells
would make a page of many megabytes.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from welore.emergence.claims import (
    RANK_AXIS,
    SETTLED,
    SUBSPACE,
    after_warm_up,
    corrected,
    interval_text,
    noise_stable_rank,
    overlap_with_last,
    rank_correlation,
    run_name,
)
from welore.emergence.trace import COSINE, Array, Matrix, Trace
from welore.errors import WeLoreError
from welore.records import Record
from welore.reporting import figures, style
from welore.reporting.module_types import group_by_type, module_positions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TYPES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TYPE_STYLES = dict(zip(TYPES, (*style.STYLES, ("#E69F00", "X")), strict=True))
OTHER_STYLE = (style.BLACK, "o")
SMALLEST = 1e-4  # of the largest value of a heat map; smaller values have the same colour


def gradient_cosines(trace: Trace, *, title: str = "") -> "Figure":
    """Cosine of one batch's gradients at two checkpoints; q and k of the first block, down and up of a middle one.

    WeLore, figure 2, first row.
    """
    from matplotlib.colors import Normalize

    names = _papers_panels(trace)
    tables = [trace.matrices[name].same[COSINE] for name in names]
    low = min(0.0, *(float(table.min()) for table in tables))
    fig, panels = _heat_maps(trace, names, tables, Normalize(low, 1), "cosine", title)
    for ax in panels:
        ax.set_aspect("equal")
        _step_ticks(ax.xaxis, trace)
        ax.set_xlabel("step", fontsize=8)
    return fig


def singular_values(trace: Trace, values: Callable[[Matrix], Array], label: str, *, title: str = "") -> "Figure":
    """Heat maps of singular values: index across, training downwards, one logarithmic colour scale for all panels."""
    from matplotlib.colors import LogNorm

    names = _papers_panels(trace)
    tables = [values(trace.matrices[name]) for name in names]
    largest = max(float(table.max()) for table in tables)
    lowest = max(min(float(table[table > 0].min()) for table in tables), largest * SMALLEST)
    norm, clipped = LogNorm(lowest, largest), [np.maximum(table, lowest) for table in tables]
    fig, panels = _heat_maps(trace, names, clipped, norm, "singular value (log scale)", title)
    panels[0].invert_yaxis()
    fig.supxlabel(f"index of the {label}'s singular value", fontsize=8)
    return fig


# Singular values of the gradients over training, the largest hundred. WeLore, figure 2, second row.
gradient_values = partial(singular_values, values=lambda matrix: matrix.gradient, label="gradient")


def partition(trace: Trace, *, title: str = "") -> "Figure":
    """Share of the singular values below the ERR-50 threshold, every matrix over training; N-LRCs hatched."""
    from matplotlib.patches import Patch

    groups = _by_type(trace)
    names = [name for group in groups.values() for name in group]
    allocations = [{a.name: a for a in plan.allocations} for plan in trace.plans]
    ratio = np.array([[of_step[name].reduction_ratio for of_step in allocations] for name in names])
    lrc = np.array([[of_step[name].factored for of_step in allocations] for name in names])
    fig = style.new_figure(8.0, max(3.0, 1.6 + 0.13 * len(names)), title)
    ax = fig.subplots()
    mesh = ax.pcolormesh(ratio, cmap="YlGnBu", vmin=0, vmax=1, rasterized=True)
    style.hatch(ax, zip(*np.nonzero(~lrc), strict=True))
    borders = np.cumsum([0, *map(len, groups.values())])
    ax.hlines(borders[1:-1], 0, len(trace.steps), color="white", linewidth=2.5, zorder=1.5)
    ax.set_yticks((borders[:-1] + borders[1:]) / 2, labels=list(groups), fontsize=8)
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.set_ylabel("module; blocks from first to last", fontsize=9)
    ax.set_xlabel("step", fontsize=9)
    _step_ticks(ax.xaxis, trace)
    style.colour_bar(fig, mesh, [ax], "share below the threshold of ERR 50 %", size=8, aspect=25)
    label = "N-LRC, the others are LRCs"
    hatched = Patch(facecolor="white", edgecolor=style.HATCH, hatch="/////", label=label)
    style.legend(fig, handles=[hatched], columns=3)
    return fig


def settled(trace: Trace, *, title: str = "") -> "Figure":
    """Overlap of a gradient's 16 leading directions with those of the end, by module type, means over the blocks.

    Thick: of two batches, over their noise ceiling. Thin: of one and the same batch, as in the paper. Dotted: the noise
    ceiling itself. All corrected for chance.
    """
    from matplotlib.lines import Line2D

    groups = _by_type(trace)
    fig = style.new_figure(9.0, 4.6, title)
    panels = list(fig.subplots(2, 4, sharex=True, sharey=True).flat)
    steps = np.arange(len(trace.steps)) + 0.5
    for ax, (module_type, names) in zip(panels, groups.items(), strict=False):
        matrices = [trace.matrices[name] for name in names]
        colour = TYPE_STYLES.get(module_type, OTHER_STYLE)[0]
        overlap = np.mean([overlap_with_last(matrix) for matrix in matrices], 0)
        same = np.mean([corrected(matrix, matrix.same, SUBSPACE)[:, -1] for matrix in matrices], 0)
        ceiling = np.mean([np.diag(corrected(matrix, matrix.other, SUBSPACE)) for matrix in matrices], 0)
        ax.plot(steps, np.clip(overlap, 0, 1.25), color=colour, linewidth=2)
        ax.plot(steps, same, color=colour, linewidth=0.8)
        ax.plot(steps, ceiling, color=style.BLACK, linewidth=1, linestyle=":")
        ax.axhline(SETTLED, color=style.GREY, linewidth=0.8)
        ax.set_title(style.plain(module_type), fontsize=9)
        ax.set(ylim=(-0.05, 1.28), xlim=(0, len(steps)))
        style.finish_axes(ax, ticks=7)
        _step_ticks(ax.xaxis, trace, 4)
    for ax in panels[len(groups) :]:
        ax.set_visible(False)
    panels[3].tick_params(labelbottom=True)
    for ax in panels[3:7]:
        ax.set_xlabel("step", fontsize=8)
    for ax in panels[::4]:
        ax.set_ylabel("overlap with the end", fontsize=8)
    labels: dict[str, dict[str, Any]] = {
        "two batches, over the noise ceiling": {"linewidth": 2},
        "one batch": {"linewidth": 0.8},
        "noise ceiling: two batches at one step": {"linewidth": 1.4, "linestyle": ":"},
    }
    lines = [Line2D([], [], color=style.BLACK, label=name, **line) for name, line in labels.items()]
    style.legend(fig, handles=lines, columns=3)
    return fig


def course(trace: Trace, *, title: str = "") -> "Figure":
    """Held-out loss, and the stable rank of the gradients by module type beside that of noise, over training."""
    fig = style.new_figure(9.0, 3.4, title)
    loss, rank = fig.subplots(1, 2)
    loss.plot(trace.steps, trace.held_out_loss, color=style.BLACK, marker="o", markersize=3, linewidth=1.2)
    x = np.arange(len(trace.steps)) + 0.5
    for module_type, names in _by_type(trace).items():
        colour, marker = TYPE_STYLES.get(module_type, OTHER_STYLE)
        values = np.median([trace.matrices[name].stable_rank for name in names], 0)
        rank.plot(x, values, color=colour, marker=marker, markersize=3, linewidth=1, label=module_type)
    warm = int(np.argmax(after_warm_up(trace)))
    rank.axvline(warm + 0.5, color=style.GREY, linewidth=0.8, linestyle="--", label="end of warm-up")
    noise = min(noise_stable_rank(*matrix.shape) for matrix in trace.matrices.values())
    rank.axhline(noise, color=style.BLACK, linewidth=1, linestyle=":", label="noise, square matrix")
    rank.set(yscale="log", ylim=(0.9, None))
    style.log_ticks(rank.yaxis)
    _step_ticks(rank.xaxis, trace)
    style.finish_axes(loss, x="step", y="held-out loss")
    style.finish_axes(rank, x="step", y="stable rank of the gradient")
    style.legend(fig, rank)
    return fig


FIGURES: dict[str, tuple[Callable[..., "Figure"], str]] = {
    "course": (course, "Held-out loss, and how many directions the gradients have."),
    "gradient-cosines": (gradient_cosines, "As Figure 2 of the paper, first row: cosines of one batch's gradients."),
    "gradient-values": (gradient_values, "As Figure 2 of the paper, second row: singular values of the gradients."),
    "weight-values": (
        partial(singular_values, values=lambda matrix: matrix.weight, label="weight"),
        "As Figure 3 of the paper: singular values of the weights.",
    ),
    "spectra": (
        lambda trace, title: figures.normalised_spectra(trace.spectra(), trace.plans[-1], title=title),
        "As Figure 4 of the paper: normalised spectra at the end, and the threshold of ERR 50 %.",
    ),
    "reduction": (
        lambda trace, title: figures.reduction_heatmap(trace.plans[-1], title=title),
        "Reduction ratio of every matrix at the end.",
    ),
    "partition": (partition, "LRCs and N-LRCs, from the first step to the last."),
    "settled": (settled, "When the directions of a gradient become those of the end."),
}


def settling(records: Sequence[Record], *, title: str = "") -> "Figure":
    """Settling step and stable rank of the gradient against the reduction ratio, every matrix of every pre-training.

    The titles give the rank correlation of every run with its 95 % interval.
    """
    runs = [record for record in records if record.kind == "pretrain"]
    if not runs:
        raise WeLoreError("there is no record of a pre-training to draw: make one with `welore pretrain`")
    fig = style.new_figure(9.0, 4.2, title)
    for ax, (column, label) in zip(fig.subplots(1, 2), RANK_AXIS.items(), strict=True):
        lines = []
        for nth, record in enumerate(runs):
            rows = record.numbers["matrices"]
            x, y = (np.array([row[key] for row in rows]) for key in ("reduction_ratio", column))
            lines.append(f"{run_name(record)}: {interval_text(rank_correlation(x, y))}")
            for module_type in dict.fromkeys(row["kind"] for row in rows):
                colour, marker = TYPE_STYLES.get(module_type, OTHER_STYLE)
                mine = np.array([row["kind"] == module_type for row in rows])
                dots: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": "none", "markersize": 5}
                ax.plot(x[mine], y[mine], **dots, alpha=0.75, label=None if nth else style.plain(module_type))
        ax.set_title(style.plain("rank correlation  " + "\n".join(lines)), fontsize=8, loc="left")
        style.finish_axes(ax, x="reduction ratio at the end", y=label)
        ax.grid(color=style.PALE)
        ax.set_axisbelow(True)
    style.legend(fig, fig.axes[0])
    return fig


def _papers_panels(trace: Trace) -> list[str]:
    """The matrices of the paper's panels: q and k of the first block, down and up of the block just past the middle."""
    positions = module_positions(trace.matrices)
    layers = sorted({p.layer for p in positions.values() if p.layer is not None})
    deep = layers[min(len(layers) - 1, round(7 / 12 * len(layers)))]
    wanted = [(layers[0], "q_proj"), (layers[0], "k_proj"), (deep, "down_proj"), (deep, "up_proj")]
    names = {(p.layer, p.module_type.rpartition(".")[2]): name for name, p in positions.items()}
    return [names[key] for key in wanted]


def _by_type(trace: Trace) -> dict[str, list[str]]:
    """Module type -> names of its matrices, in the order of TYPES."""
    groups = group_by_type(trace.matrices)
    return {name: groups[name] for name in sorted(groups, key=lambda name: (*TYPES, name).index(name))}


def _heat_maps(
    trace: Trace, names: Sequence[str], tables: Sequence[Array], norm: Any, label: str, title: str
) -> tuple["Figure", list["Axes"]]:
    """A panel for every matrix, training upwards, and one colour bar."""
    fig = style.new_figure(11.0, 3.1, title)
    panels = list(fig.subplots(1, len(names), sharey=True))
    for ax, name, table in zip(panels, names, tables, strict=True):
        ax.set_title(name.removeprefix("model.").replace("self_attn.", "").replace("mlp.", ""), fontsize=9)
        ax.tick_params(labelsize=7)
        mesh = ax.pcolormesh(table, cmap="viridis", norm=norm, rasterized=True)
        _step_ticks(ax.yaxis, trace)
    panels[0].set_ylabel("step", fontsize=8)
    style.colour_bar(fig, mesh, panels, label, size=8, aspect=25)
    return fig, panels


def _step_ticks(axis: Any, trace: Trace, count: int = 6) -> None:
    at: NDArray[np.int64] = np.unique(np.linspace(0, len(trace.steps) - 1, count).round().astype(int))
    axis.set_ticks(at + 0.5, labels=[f"{int(trace.steps[i]):,}" for i in at])
