"""How long work tells where it stands: bars where a person is looking, silence elsewhere."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
# (items with their costs, what is done with them, the sum of the costs) -> the items, counted while they are taken
Progress = Callable[[Iterable[tuple[Any, float]], str, float], Iterable[Any]]


def silent(items: Iterable[tuple[Item, float]], label: str, total: float) -> Iterator[Item]:
    """No progress shown."""
    return (item for item, _ in items)


def progress_bars(show: bool | None = None) -> Progress:
    """Bars of tqdm on the standard error; None: where that is a terminal, or in a notebook."""
    if show is None:
        show = sys.stderr.isatty() or "ipykernel" in sys.modules
    return _bars if show else silent


def counted(progress: Progress, items: Sequence[Item], label: str) -> Iterable[Item]:
    """Progress over items that all cost the same."""
    return progress(((item, 1.0) for item in items), label, float(len(items)))


def _bars(items: Iterable[tuple[Item, float]], label: str, total: float) -> Iterator[Item]:
    from tqdm.auto import tqdm

    layout = "{desc:>24} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"  # costs are no counts of anything
    with tqdm(total=total, desc=label, bar_format=layout, leave=True, disable=False) as bar:
        for item, cost in items:
            yield item
            bar.update(cost)
