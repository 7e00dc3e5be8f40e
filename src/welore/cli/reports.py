"""The verbs that show results: report, demo."""

import dataclasses
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from welore.cli.output import print_result, quiet_libraries
from welore.config import RunConfig
from welore.errors import WeLoreError

SIZES = "weights in float32: four to five times the 4-bit file that they were read from"


def report(
    directories: Annotated[list[Path], typer.Argument(help="Where to look for records.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.", show_default=False)],
    as_json: bool,
) -> None:
    """Draw one HTML page and its figures from every record under the directories."""
    from welore.io.claim import claimed
    from welore.reporting.page import report

    with suppress(WeLoreError), claimed(output, overwrite=True, marker="report.html"):
        pass  # clears what a killed report left beside a directory that is in use by now
    used = output.is_dir() and any(output.iterdir())
    with claimed(output / "report.html", overwrite=True) if used else claimed(output, marker="report.html"):
        page = report(directories, output)
    print_result({"output": str(page)}, as_json, f"report -> {page}")


def demo(
    run: RunConfig,
    as_json: bool,
    output_dir: Annotated[Path, typer.Argument(help="Directory for everything the demo makes.")] = Path("demo"),
) -> None:
    """Run the whole pipeline on a real 135M model and compare the methods in one table."""
    quiet_libraries()
    from welore.cli.demo import HEADINGS, demo

    results = demo(output_dir, **run.options)
    if not as_json:
        table = Table(*HEADINGS, title="SmolLM2-135M, perplexity on the Python reference", caption=SIZES)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in results.rows:
            table.add_row(*row)
        Console().print(table)
        print(*results.findings, sep="\n")
    facts = {"output": str(results.page), "records": [dataclasses.asdict(r) for r in results.records]}
    print_result(facts, as_json, f"report -> {results.page}")
