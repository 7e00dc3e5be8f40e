"""The neurons that are left of MLPs which were pruned before their matrices were factorised."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from welore.errors import WeLoreError
from welore.io.fields import typed

MOST = 1 << 24  # neurons of an MLP, so that a damaged file does not fill the memory


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


def read_neurons(content: Any) -> dict[str, Neurons]:
    """The mapping that `as_json` wrote; KeyError or WeLoreError for anything else."""
    entries = typed(content, Mapping[str, Mapping[str, Any]], "neurons")
    return {name: Neurons(typed(e["width"], int, f"width of {name}"), _numbers(e, name)) for name, e in entries.items()}


def _ranges(numbers: tuple[int, ...]) -> str:
    borders = [0, *(i for i, (a, b) in enumerate(pairwise(numbers), start=1) if b != a + 1), len(numbers)]
    runs = [(numbers[start], numbers[stop - 1]) for start, stop in pairwise(borders)]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _numbers(entry: Mapping[str, Any], name: str) -> tuple[int, ...]:
    ranges = typed(entry["kept"], str, f"neurons of {name}")
    runs = [[int(number) for number in run.split("-")] for run in ranges.split(",")]
    if sum(run[-1] - run[0] + 1 for run in runs) > MOST:
        raise WeLoreError(f"{name} has more than {MOST} neurons: no MLP has so many")
    return tuple(number for run in runs for number in range(run[0], run[-1] + 1))
