"""What all figures share: colours, an empty figure, ticks, a legend.

Colours are safe for the colour-blind and fall or rise evenly in grey, so that they survive a printer.
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from welore.errors import WeLoreError
from welore.reporting.formatting import perplexity_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INSTALL = "figures and reports need matplotlib and jinja2: pip install 'welore[report]'"
# Okabe and Ito's colours; a marker of its own for each, for printers without colour
STYLES = (("#000000", "D"), ("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "v"), ("#56B4E9", "P"))
BLACK, BLUE, VERMILION = (STYLES[i][0] for i in range(3))
GREY, PALE, HATCH = "#A0A0A0", "#E4E4E4", "#404040"
N_LRC = "n-lrc"  # names the hatched cells in the drawing


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


def hatch(ax: "Axes", cells: Iterable[tuple[int, int]]) -> None:
    """Hatch the unit cells (row, column) of a heat map."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    patches = [Rectangle((column, row), 1, 1) for row, column in cells]
    ax.add_collection(
        PatchCollection(patches, hatch="/////", facecolor="none", edgecolor=HATCH, linewidth=0, gid=N_LRC)
    )


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
