"""The parts that all figures share: colours, an empty figure, ticks, a legend, and the finished picture.

Colours are safe for colour-blind readers and evenly spaced in grey, so that they survive a black-and-white printer.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO, StringIO
from typing import TYPE_CHECKING, Any

from welore.errors import WeLoreError
from welore.reporting.formatting import perplexity_text

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INSTALL = "figures and reports need matplotlib and jinja2: pip install 'welore[report]'"
# The colours of Okabe and Ito, each with its own marker for printers without colour.
STYLES = (("#000000", "D"), ("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "v"), ("#56B4E9", "P"))
BLACK, BLUE, VERMILION = (STYLES[i][0] for i in range(3))
GREY, PALE, HATCH = "#A0A0A0", "#E4E4E4", "#404040"
N_LRC = "n-lrc"  # names the hatched cells in the drawing


@dataclass(frozen=True)
class Picture:
    """A figure in both forms: `svg` is embedded in the page, `png` is written to the file of that name."""

    file: str
    svg: str
    png: bytes


def new_figure(width: float, height: float, title: str) -> "Figure":
    """An empty figure; sizes in inches. WeLoreError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise WeLoreError(INSTALL) from error
    # Letters are not equally wide in SVG and PNG: without a margin one of the two is cut at the edge.
    fig = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.07))
    if title:
        fig.suptitle(plain(title), fontsize=10)
    return fig


def plain(text: str) -> str:
    """A user's text as a label: no formula, no letters that cannot be drawn, in a legend even if it begins with _."""
    text = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def finish_axes(ax: "Axes", *, x: str = "", y: str = "", ticks: int = 8) -> None:
    """Axis labels, small tick labels, no frame at the top and the right."""
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel(y, fontsize=9)
    ax.tick_params(labelsize=ticks)
    ax.spines[["top", "right"]].set_visible(False)


def hatch(ax: "Axes", cells: Iterable[tuple[int, int]]) -> None:
    """Hatch the unit cells (row, column) of a heat map."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    patches = [Rectangle((column, row), 1, 1) for row, column in cells]
    ax.add_collection(
        PatchCollection(patches, hatch="/////", facecolor="none", edgecolor=HATCH, linewidth=0, gid=N_LRC)
    )


def log_ticks(axis: "Axis") -> None:
    """A few ticks in plain numbers on a logarithmic axis whose limits are set, however wide or narrow it is."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    locator: Locator = MaxNLocator(5, steps=[1, 2, 5, 10])
    if math.log10(high) - math.log10(low) > 1:  # matplotlib's LogLocator overflows on the range of a broken model
        first, last = math.floor(math.log10(low)), math.floor(math.log10(high))
        factors = (1, 2, 5) if last - first < 3 else (1,)
        decades = range(first, last + 1, 1 + (last - first) // 10)
        ticks = [factor * 10.0**decade for decade in decades for factor in factors]
        locator = FixedLocator([tick for tick in ticks if low <= tick <= high])
    axis.set_major_locator(locator)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: perplexity_text(value)))
    axis.set_tick_params(labelsize=8)


def legend(fig: "Figure", *axes: "Axes", handles: Sequence["Artist"] = (), columns: int = 4) -> None:
    """One legend below the figure: the labels of all axes, each once, or these handles."""
    pairs = [pair for ax in axes for pair in zip(*ax.get_legend_handles_labels(), strict=True)]
    entries = {label: handle for handle, label in pairs} or {str(handle.get_label()): handle for handle in handles}
    looks: dict[str, Any] = {"loc": "outside lower center", "fontsize": 8, "frameon": False}
    fig.legend(list(entries.values()), list(entries), ncols=columns, **looks)


def colour_bar(fig: "Figure", mesh: Any, axes: Any, label: str, *, size: int = 9, **options: Any) -> "Axes":
    """The bar of a heat map or of coloured lines beside the axes; size: of its label, in points."""
    bar = fig.colorbar(mesh, ax=axes, pad=0.02, **options)
    bar.set_label(label, fontsize=size)
    bar.ax.tick_params(labelsize=size - 1)
    return bar.ax


def picture(figure: "Figure", name: str) -> Picture:
    """The figure as an SVG element for a page and as a PNG file; the same figure gives the same bytes."""
    import matplotlib

    svg, png = StringIO(), BytesIO()
    # Without a salt the ids would be drawn at random.
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        figure.set_layout_engine("none")  # a second layout would take most of the time
        figure.savefig(png, format="png", dpi=150)
    return Picture(f"{name}.png", _inline(svg.getvalue(), name), png.getvalue())


def _inline(svg: str, name: str) -> str:
    """An SVG file as an element of a page: ids of its own, no outside addresses, hundredths of a point."""
    svg = re.sub(r"<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg)
    return re.sub(r' d="[^"]*"', lambda d: re.sub(r"(\.\d\d)\d+", r"\1", d[0]), svg)
