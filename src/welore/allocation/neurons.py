"""The neurons that are left of MLPs which were pruned before their matrices were factorised."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from welore.errors import WeLoreError


@dataclass(frozen=True)
class Neurons:
    """The neurons that are left of an MLP: their indices, ascending, out of the `width` of the dense model."""

    width: int
    indices: tuple[int, ...]

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in pairwise(self.indices))
        if not self.indices or not ascending or self.indices[0] < 0 or self.indices[-1] >= self.width:
            raise WeLoreError(f"the neurons of an MLP are some of 0 to {self.width - 1}, ascending, at least one")

    @property
    def pruned(self) -> int:
        """How many neurons were taken out."""
        return self.width - len(self.indices)


def dense_numel(numel: int, layer: str, neurons: Mapping[str, Neurons]) -> int:
    """Parameters that a matrix of `layer`, or a block of it, has in the dense model; numel: those that are left."""
    mlp = neurons.get(layer.rpartition(".")[0])
    return numel * mlp.width // len(mlp.indices) if mlp else numel


def as_json(neurons: Mapping[str, Neurons]) -> dict[str, Any]:
    """MLP -> its width, and the neurons that are left as ranges in a text, such as "0-15,32,40-47"."""
    return {name: {"width": mlp.width, "kept": _ranges(mlp.indices)} for name, mlp in neurons.items()}


def read_neurons(content: Mapping[str, Any]) -> dict[str, Neurons]:
    """The mapping that `as_json` wrote; ValueError, TypeError or KeyError for anything else."""
    return {name: Neurons(int(entry["width"]), _numbers(entry["kept"])) for name, entry in content.items()}


def _ranges(numbers: tuple[int, ...]) -> str:
    borders = [0, *(i for i, (a, b) in enumerate(pairwise(numbers), start=1) if b != a + 1), len(numbers)]
    runs = [(numbers[start], numbers[stop - 1]) for start, stop in pairwise(borders)]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _numbers(ranges: str) -> tuple[int, ...]:
    runs = [[int(number) for number in run.split("-")] for run in ranges.split(",")]
    return tuple(number for run in runs for number in range(run[0], run[-1] + 1))
