"""Which neurons of an MLP are left: what a plan says of the MLPs that became smaller before their matrices were cut."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from welore.errors import WeLoreError


@dataclass(frozen=True)
class Neurons:
    """The neurons that an MLP keeps, ascending, of the `width` that it came with."""

    width: int
    kept: tuple[int, ...]

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in pairwise(self.kept))
        if not self.kept or not ascending or self.kept[0] < 0 or self.kept[-1] >= self.width:
            raise WeLoreError(f"the kept neurons of an MLP are some of 0 to {self.width - 1}, ascending, at least one")


def came_with(parameters: int, layer: str, neurons: Mapping[str, Neurons]) -> int:
    """Numbers of a matrix of `layer`, or of a block of it, before neurons were taken out; parameters: those after."""
    found = neurons.get(layer.rpartition(".")[0])
    return parameters * found.width // len(found.kept) if found else parameters


def as_json(neurons: Mapping[str, Neurons]) -> dict[str, Any]:
    """MLP -> its width, and the kept ones as ranges in a text, such as "0-15,32,40-47"."""
    return {name: {"width": found.width, "kept": _ranges(found.kept)} for name, found in neurons.items()}


def read_neurons(content: Mapping[str, Any]) -> dict[str, Neurons]:
    """What `as_json` gave; ValueError, TypeError or KeyError if it is something else."""
    return {name: Neurons(int(found["width"]), _numbers(found["kept"])) for name, found in content.items()}


def _ranges(numbers: tuple[int, ...]) -> str:
    borders = [0, *(i for i, (a, b) in enumerate(pairwise(numbers), start=1) if b != a + 1), len(numbers)]
    runs = [(numbers[start], numbers[stop - 1]) for start, stop in pairwise(borders)]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _numbers(ranges: str) -> tuple[int, ...]:
    runs = [[int(number) for number in run.split("-")] for run in ranges.split(",")]
    return tuple(number for run in runs for number in range(run[0], run[-1] + 1))
