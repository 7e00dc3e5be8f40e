"""The verbs that show results: report, demo."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from welore.cli.output import log, print_result, quiet_libraries
from welore.config import RunConfig

if TYPE_CHECKING:
    from welore.records import Record


def report(
    directories: Annotated[list[Path], typer.Argument(help="Where to look for records.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.", show_default=False)],
    as_json: bool,
) -> None:
    """Draw one HTML page and its figures from every record under the directories."""
    from welore.reporting.page import report

    page = report(directories, output)
    print_result({"output": str(page)}, as_json, f"report -> {page}")


def demo(
    run: RunConfig,
    as_json: bool,
    output_dir: Annotated[Path, typer.Argument(help="Directory for everything the demo makes.")] = Path("demo"),
) -> None:
    """Run the whole pipeline on a real 135M model and compare the methods in one table."""
    from welore.cli.demo import demo
    from welore.io.progress import progress_bars

    quiet_libraries()
    results = demo(output_dir, cache_dir=run.cache_dir, tell=log, progress=progress_bars(run.progress))
    if not as_json:
        Console().print(_table(results.records))
        for sentence in results.findings:
            print(sentence)
    facts = {"output": str(results.page), "records": [dataclasses.asdict(r) for r in results.records]}
    print_result(facts, as_json, f"report -> {results.page}")


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
