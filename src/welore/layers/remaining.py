"""The neurons and the experts that are left, where some were pruned before matrices were factorised."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

from welore.errors import WeLoreError
from welore.io.fields import typed

MOST = 1 << 24  # of an MLP or a mixture, so that a damaged file does not fill the memory


@dataclass(frozen=True)
class Remaining:
    """The neurons that are left of an MLP, or the experts of a mixture.

    indices: theirs, ascending, out of the `width` of the dense model.
    """

    width: int
    indices: tuple[int, ...]

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in pairwise(self.indices))
        if not self.indices or not ascending or self.indices[0] < 0 or self.indices[-1] >= self.width:
            few = f"some of 0 to {self.width - 1}, ascending, at least one"
            raise WeLoreError(f"the neurons of an MLP, or the experts of a mixture, are {few}")

    @property
    def pruned(self) -> int:
        """How many were taken out."""
        return self.width - len(self.indices)


def dense_numel(numel: int, layer: str, neurons: Mapping[str, Remaining], experts: Mapping[str, Remaining]) -> Fraction:
    """Parameters that a matrix of `layer`, or a block of it, stands for in the dense model; numel: those that are left.

    An expert stands for its share of those that were taken out, too: all experts of a layer have one size.
    """
    mlp = layer.rpartition(".")[0]
    pruned = (neurons.get(mlp), experts.get(mlp.rpartition(".")[0]))
    return math.prod((Fraction(p.width, len(p.indices)) for p in pruned if p), start=Fraction(numel))


def renumbered(name: str, experts: Mapping[str, Remaining]) -> str:
    """The name that a module or a tensor has in the result, where the experts that are left are numbered anew."""
    mixture, number = _expert_around(name, experts)
    if number is None:
        return name
    inside = name.removeprefix(f"{mixture}.{number}")
    return f"{mixture}.{experts[mixture].indices.index(number)}{inside}"


def is_left(name: str, experts: Mapping[str, Remaining]) -> bool:
    """Whether a module or a tensor does not lie in an expert that was taken out."""
    mixture, number = _expert_around(name, experts)
    return number is None or number in experts[mixture].indices


def _expert_around(name: str, experts: Mapping[str, Remaining]) -> tuple[str, int | None]:
    """The mixture around a module or a tensor, and the number of the expert; None if it lies in no expert."""
    mixture = next((mixture for mixture in experts if name.startswith(f"{mixture}.")), "")
    number = name.removeprefix(f"{mixture}.").partition(".")[0] if mixture else ""
    return mixture, int(number) if number.isdecimal() else None


def as_json(left: Mapping[str, Remaining]) -> dict[str, Any]:
    """Name -> width, and what is left as ranges in a text, such as "0-15,32,40-47"."""
    return {name: {"width": one.width, "kept": _ranges(one.indices)} for name, one in left.items()}


def read_remaining(content: Any, field: str = "neurons") -> dict[str, Remaining]:
    """The mapping that `as_json` wrote; KeyError or WeLoreError for anything else. field: its name in the file."""
    entries = typed(content, Mapping[str, Mapping[str, Any]], field)
    return {
        name: Remaining(typed(e["width"], int, f"width of {name}"), _numbers(e, f"{field} of {name}"))
        for name, e in entries.items()
    }


def _ranges(numbers: tuple[int, ...]) -> str:
    borders = [0, *(i for i, (a, b) in enumerate(pairwise(numbers), start=1) if b != a + 1), len(numbers)]
    runs = [(numbers[start], numbers[stop - 1]) for start, stop in pairwise(borders)]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _numbers(entry: Mapping[str, Any], what: str) -> tuple[int, ...]:
    ranges = typed(entry["kept"], str, what)
    runs = [[int(number) for number in run.split("-")] for run in ranges.split(",")]
    if sum(run[-1] - run[0] + 1 for run in runs) > MOST:
        raise WeLoreError(f"the {what} are more than {MOST}: no MLP has so many, and no mixture")
    return tuple(number for run in runs for number in range(run[0], run[-1] + 1))
