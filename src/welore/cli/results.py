"""The verbs that show what was found: report, demo."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from welore.cli.options import AsJson, CacheDir
from welore.cli.terminal import plain, progress_bars, say, tell

if TYPE_CHECKING:
    from welore.records import Record


def report(
    directories: Annotated[list[Path], typer.Argument(help="Where to look for records.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Every record under the directories -> one HTML page and its figures."""
    from welore.reporting.page import report

    page = report(directories, output)
    tell({"output": str(page)}, as_json, f"report -> {page}")


def demo(
    out: Annotated[Path, typer.Argument(help="Directory for everything the demo makes.")] = Path("demo"),
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """The whole pipeline on a real 135M model: analyze, allocate, compress, load back, evaluate, fine-tune, report."""
    from welore.cli.demo import demo

    with progress_bars() as progress:
        results = demo(out, cache_dir=cache_dir, tell=say, progress=progress)
    if not as_json:
        Console().print(_table(results.records))
        for sentence in results.findings:
            print(sentence)
    tell(
        {"output": str(results.page), "records": [plain(r) for r in results.records]},
        as_json,
        f"report -> {results.page}",
    )


def _table(records: "Sequence[Record]") -> Table:
    table = Table(title="SmolLM2-135M on the Python reference: equal rank reduction, equal parameters")
    for heading in ("", "ERR", "parameters", "MB", "perplexity"):
        table.add_column(heading, justify="left" if not heading else "right")
    for record in records:
        n = record.numbers
        table.add_row(
            record.inputs["label"],
            f"{n['rank_reduction']:.1%}",
            f"{n['parameter_ratio']:.1%}",
            f"{n['bytes'] / 1e6:.1f}",
            f"{n['perplexity']:.4g}" if n["perplexity"] < 1e4 else f"{n['perplexity']:.1e}",
        )
    return table
