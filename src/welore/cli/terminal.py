"""What every verb says, and where: results to the standard output, all else to the standard error."""

import contextlib
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from welore.errors import WeLoreError

if TYPE_CHECKING:
    from welore.records import Record


def tell(facts: dict[str, Any], as_json: bool, line: str) -> None:
    """The result: one line, or all its facts."""
    if leads():
        print(json.dumps(facts) if as_json else line)


def say(line: str) -> None:
    """Things worth knowing while work goes on: to the standard error."""
    print(line, file=sys.stderr)


def leads() -> bool:
    """Whether this is the only process, or the first of those that torchrun or accelerate started."""
    return int(os.environ.get("RANK", "0")) == 0


def achieved(asked: Mapping[str, Any], numbers: dict[str, Any]) -> str:
    """What was asked for and what came of it, of a plan's numbers."""
    wish = ", ".join(f"asked {name} {value:g}" for name, value in asked.items()) or "imported"
    return (
        f"{wish}; achieved ERR {numbers['rank_reduction']:.2%}, parameters {numbers['parameter_ratio']:.2%} "
        f"of the targeted matrices, {numbers['lrcs']} of {numbers['matrices']} factored"
    )


def plain(record: "Record") -> dict[str, Any]:
    """A record as its file has it."""
    return dataclasses.asdict(record)


def silence_bitsandbytes() -> None:
    """It regrets kernels that nobody asked for."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def device_of(name: str | None) -> str | None:
    """The device asked for, a GPU if there is one, else None."""
    import torch

    if name is None:
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else None
    try:
        torch.empty(0, device=name).cpu()  # "meta" is a device, too, but nothing comes back from it
    except (RuntimeError, AssertionError) as error:
        raise WeLoreError(f"device {name!r} is not there: use cpu, or a GPU that torch knows") from error
    return name


@contextlib.contextmanager
def progress_bars() -> Iterator[Any]:
    """Bars on the standard error where that is a terminal; silence, ours and the libraries', where it is not."""
    console = Console(stderr=True)
    shown = console.is_terminal and leads()
    if not shown:
        from huggingface_hub.utils import disable_progress_bars as disable_progress_of_downloads
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        disable_progress_of_downloads()
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # read by datasets, which is not imported yet
    columns = (
        TextColumn("{task.description:>24}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, disable=not shown) as bars:

        def progress(items: Iterable[tuple[Any, float]], label: str, total: float) -> Iterator[Any]:
            task = bars.add_task(label, total=total)
            for item, cost in items:
                yield item
                bars.advance(task, cost)

        yield progress
