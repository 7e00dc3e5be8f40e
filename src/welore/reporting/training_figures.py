"""Figures 1 and 5 of the paper, from the records of fine-tuning.

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
from welore.reporting.style import PALE, STYLES, finish_axes, legend, log_ticks, new_figure, plain
from welore.reporting.tables import order_methods, run_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURE_1 = ("full", "galore", "lrc")
FIGURE_5 = ("lrc", "nlrc")
LINES = ("-", "--", ":", "-.")  # the first, second, ... run of one method
SMOOTHED = 50  # points of the averaged training loss


@dataclass(frozen=True)
class StyledRun:
    """A run, and how it is drawn: colour and marker tell the method, the line which of the method's runs it is."""

    run: Record
    name: str
    colour: str
    marker: str
    line: str
    nth: int  # of its method


def fine_tuning(records: Sequence[Record], methods: Sequence[str] | None = None, *, title: str = "") -> "Figure":
    """Training loss, held-out perplexity, trained parameters and throughput by method. WeLore, figures 1 and 5.

    methods: only runs of these (FIGURE_1, FIGURE_5); None: all. WeLoreError if there is none, or if the runs differ in
    steps and tokens: their curves cannot be compared.
    """
    runs = [r for r in records if r.kind == "finetune" and (methods is None or r.settings["method"] in methods)]
    if not runs:
        raise WeLoreError("there is no record of a fine-tuning run to draw: make one with `welore finetune`")
    amounts = {(r.settings["max_steps"], r.numbers["tokens"]) for r in runs if not r.numbers["resumed_at"]}
    if len(amounts) > 1:
        raise WeLoreError(f"the runs differ in steps and tokens ({sorted(amounts)}): compare runs of the same length")
    styled = _styled(runs)
    fig = new_figure(9.0, 6.0, title)
    loss, perplexity, parameters, speed = fig.subplots(2, 2).flat
    for run in styled:
        _draw_curves(loss, perplexity, run)
    perplexity.set(yscale="log")
    log_ticks(perplexity.yaxis)
    for ax in (loss, perplexity):
        ax.xaxis.get_major_locator().set_params(integer=True)
    perplexity.grid(axis="y", color=PALE)
    _draw_bars(parameters, styled, [s.run.numbers["trainable_parameters"] / 1e6 for s in styled])
    _draw_bars(speed, styled, [s.run.numbers.get("tokens_per_second") or 0.0 for s in styled])
    finish_axes(loss, x="step", y="training loss")
    finish_axes(perplexity, x="step", y="held-out perplexity")
    finish_axes(parameters, y="trained parameters, millions")
    finish_axes(speed, y="tokens / s")
    legend(fig, loss)
    return fig


def curves(run: Record) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Training loss (n, 2): step, loss; evaluation (e, 3): step, loss, perplexity."""
    numbers = run.numbers
    if not isinstance(numbers["tokens"], int | float) or numbers["resumed_at"] is None:
        raise TypeError(f"tokens is {numbers['tokens']!r}")
    loss = np.array(numbers["train_loss"], dtype=float).reshape(-1, 2)
    return loss, np.array(numbers["evaluation"], dtype=float).reshape(-1, 3)


def _styled(runs: Sequence[Record]) -> list[StyledRun]:
    """The runs in the order of their methods; the method is the name where no two runs share it."""
    order = order_methods(r.settings["method"] for r in runs)
    runs = sorted(runs, key=lambda r: order.index(r.settings["method"]))
    methods = [r.settings["method"] for r in runs]
    shared = len(set(methods)) < len(methods)
    names = [run_name(r) if r.inputs.get("label") or shared else r.settings["method"] for r in runs]
    styled = []
    for i, (run, name, method) in enumerate(zip(runs, names, methods, strict=True)):
        nth, look = methods[:i].count(method), STYLES[order.index(method) % len(STYLES)]
        styled.append(StyledRun(run, plain(name), *look, LINES[nth % len(LINES)], nth))
    return styled


def _draw_curves(loss: "Axes", perplexity: "Axes", styled: StyledRun) -> None:
    """The loss of every step in pale, the means of neighbouring steps, and the held-out perplexity."""
    training, evaluation = curves(styled.run)
    steps, values = training.T
    loss.plot(steps, values, color=styled.colour, alpha=0.2, linewidth=0.6)
    parts = min(SMOOTHED, len(values))
    averaged = [[part.mean() for part in np.array_split(column, parts)] for column in (steps, values)]
    loss.plot(*averaged, color=styled.colour, linestyle=styled.line, linewidth=1.4, label=styled.name)
    if len(evaluation):
        steps, _, values = evaluation.T
        (line,) = perplexity.plot(steps, values, color=styled.colour, linestyle=styled.line, linewidth=1.2)
        line.set(marker=styled.marker, markersize=4, markerfacecolor="white" if styled.nth else styled.colour)


def _draw_bars(ax: "Axes", styled: Sequence[StyledRun], values: Sequence[float]) -> None:
    for i, (s, value) in enumerate(zip(styled, values, strict=True)):
        ax.bar(i, value, 0.6, color="white" if s.nth else s.colour, edgecolor=s.colour, hatch="///" if s.nth else None)
        text = f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
        ax.annotate(text, (i, value), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    long = sum(len(s.name) for s in styled) > 40
    ax.set_xticks(range(len(styled)), labels=[textwrap.fill(s.name, 14) if long else s.name for s in styled])
    if long and len(styled) > 4:
        ax.tick_params(axis="x", rotation=90)
    ax.set_xlim(-0.6, max(len(styled), 4) - 0.4)  # keeps a single bar narrow
    ax.margins(y=0.12)
