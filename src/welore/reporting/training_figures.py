"""7 - Figures 1 and 5 of the paper, from the records of fine-tuning.

Needs the extra `report`. Reads records only: neither torch nor a model.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from welore.errors import WeLoreError
from welore.records import Record
from welore.reporting.style import PALE, STYLES, legend, log_ticks, new_figure, plain
from welore.reporting.tables import METHOD_ORDER, run_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURE_1 = ("full", "galore", "lrc")
FIGURE_5 = ("lrc", "nlrc")
LINES = ("-", "--", ":", "-.")  # the first, second, ... run of one method
SMOOTHED = 50  # points of the training-loss curve that are left after averaging


def fine_tuning(records: Sequence[Record], methods: Sequence[str] | None = None, *, title: str = "") -> "Figure":
    """Training loss, held-out perplexity, trained parameters and throughput, by method. WeLore, figures 1 and 5.

    records: of kind "finetune", one per method and label; others are passed over. methods: only these (FIGURE_1,
    FIGURE_5), default all. WeLoreError if none is left, or if the runs had not the same number of steps and tokens:
    such curves cannot be compared.
    """
    runs = [r for r in records if r.kind == "finetune" and (methods is None or r.settings["method"] in methods)]
    if not runs:
        raise WeLoreError("there is no record of a fine-tuning run to draw: make one with `welore finetune`")
    amounts = {(r.settings["max_steps"], r.numbers["tokens"]) for r in runs if not r.numbers["resumed_at"]}
    if len(amounts) > 1:
        raise WeLoreError(f"the runs differ in steps and tokens ({sorted(amounts)}): compare runs of the same length")
    runs.sort(key=lambda r: METHOD_ORDER.index(r.settings["method"]))
    fig = new_figure(9.0, 6.0, title)
    loss, perplexity, parameters, speed = fig.subplots(2, 2).flat
    drawn = _drawn(runs)
    for run in drawn:
        _draw_loss(loss, run)
        _draw_perplexity(perplexity, run)
    loss.set(xlabel="step", ylabel="training loss")
    perplexity.set(xlabel="step", ylabel="held-out perplexity", yscale="log")
    log_ticks(perplexity.yaxis)
    for ax in (loss, perplexity):
        ax.xaxis.get_major_locator().set_params(integer=True)
    perplexity.grid(axis="y", color=PALE)
    trained = [r.numbers["trainable_parameters"] / 1e6 for r in runs]
    _draw_bars(parameters, drawn, trained, "trained parameters, millions")
    _draw_bars(speed, drawn, [r.numbers.get("tokens_per_second", 0.0) for r in runs], "tokens / s")
    for ax in fig.axes:
        ax.tick_params(labelsize=8)
        ax.xaxis.label.set_fontsize(9)
        ax.yaxis.label.set_fontsize(9)
        ax.spines[["top", "right"]].set_visible(False)
    legend(fig, loss)
    return fig


@dataclass(frozen=True)
class Drawn:
    """A run and how it is drawn: of each method its own colour and marker in every figure, of each run its line."""

    run: Record
    name: str
    colour: str
    marker: str
    nth: int  # of its method

    @property
    def line(self) -> str:
        """Its kind of line."""
        return LINES[self.nth % len(LINES)]


def _drawn(runs: Sequence[Record]) -> list[Drawn]:
    """The runs; where all are of different methods and have no label, the method is name enough."""
    methods = [r.settings["method"] for r in runs]
    alike = len(set(methods)) < len(methods)
    names = [run_name(r) if r.inputs["label"] or alike else r.settings["method"] for r in runs]
    return [
        Drawn(run, plain(name), *STYLES[METHOD_ORDER.index(method)], methods[:i].count(method))
        for i, (run, name, method) in enumerate(zip(runs, names, methods, strict=True))
    ]


def _draw_loss(ax: "Axes", drawn: Drawn) -> None:
    """Every step pale, and the mean of neighbouring steps."""
    steps, values = np.array(drawn.run.numbers["train_loss"]).T
    ax.plot(steps, values, color=drawn.colour, alpha=0.2, linewidth=0.6)
    averaged = _averaged(steps), _averaged(values)
    ax.plot(*averaged, color=drawn.colour, linestyle=drawn.line, linewidth=1.4, label=drawn.name)


def _averaged(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of equal stretches, at most SMOOTHED of them."""
    return np.array([part.mean() for part in np.array_split(values, min(SMOOTHED, len(values)))])


def _draw_perplexity(ax: "Axes", drawn: Drawn) -> None:
    if not drawn.run.numbers["evaluation"]:
        return
    steps, _, values = np.array(drawn.run.numbers["evaluation"]).T
    fill = "white" if drawn.nth else drawn.colour
    (line,) = ax.plot(steps, values, color=drawn.colour, linestyle=drawn.line, linewidth=1.2)
    line.set(marker=drawn.marker, markersize=4, markerfacecolor=fill)


def _draw_bars(ax: "Axes", drawn: Sequence[Drawn], values: Sequence[float], what: str) -> None:
    for i, (d, value) in enumerate(zip(drawn, values, strict=True)):
        ax.bar(i, value, 0.6, color="white" if d.nth else d.colour, edgecolor=d.colour, hatch="///" if d.nth else None)
        text = f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
        ax.annotate(text, (i, value), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    long = sum(len(d.name) for d in drawn) > 40
    ax.set_xticks(range(len(drawn)), labels=[textwrap.fill(d.name, 14) if long else d.name for d in drawn])
    if long and len(drawn) > 4:
        ax.tick_params(axis="x", rotation=90)
    ax.set_xlim(-0.6, max(len(drawn), 4) - 0.4)  # a single bar is no wall
    ax.set_ylabel(what)
    ax.margins(y=0.12)
