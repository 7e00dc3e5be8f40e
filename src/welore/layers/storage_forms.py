"""The storage forms: how a matrix W (m, n) of rank r is stored, one object for each.

A form is what one matrix has; the setting `storage` is a form for all of them, or "auto".
"""

import math
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from welore.errors import choose

if TYPE_CHECKING:
    from torch import Tensor

    from welore.layers.low_rank import LowRankLayer

DENSE, FACTORED, PIVOTED, AUTO = "dense", "factored", "pivoted", "auto"
NUMBER_BYTES, INDEX_BYTES = 4, 8  # of a float32 weight, when forms are compared; of an int64 position
NO_OVERHEADS: Mapping[str, float] = {}


@dataclass(frozen=True)
class StorageForm:
    """One form: its tensors, what they cost, and the layer that computes with them.

    parts: tensor name inside the layer -> its axes: "m", "n", "r" or "m - r". indices: the parts that hold int64
    positions, not numbers. full_rank: whether a matrix of full rank can be stored. layer_path: MODULE:CLASS of a
    `LowRankLayer`, which is imported on first use because plans are made without torch.
    """

    name: str
    description: str
    layer_path: str
    parts: Mapping[str, tuple[str, ...]]
    indices: tuple[str, ...] = ()
    full_rank: bool = True

    @property
    def numbers(self) -> list[str]:
        """The parts that hold numbers, which can be trained."""
        return [part for part in self.parts if part not in self.indices]

    def shapes(self, m: int, n: int, r: Any) -> dict[str, tuple[Any, ...]]:
        """Part -> its shape. r: an int, or an array of ranks."""
        sizes = {"m": m, "n": n, "r": r, "m - r": m - r}
        return {part: tuple(sizes[axis] for axis in axes) for part, axes in self.parts.items()}

    def cost(self, m: int, n: int, r: Any) -> Any:
        """How many numbers are stored; indices count in bytes alone. r: an int, or an array of ranks."""
        shapes = self.shapes(m, n, r)
        return sum(math.prod(shapes[part]) for part in self.numbers)

    def index_bytes(self, m: int, n: int, r: Any) -> Any:
        """Bytes of the indices."""
        shapes = self.shapes(m, n, r)
        return INDEX_BYTES * sum(math.prod(shapes[part]) for part in self.indices)

    def check(self, shapes: Mapping[str, tuple[int, ...]], r: int) -> bool:
        """Whether tensors of these shapes can be the parts of one matrix of rank r."""
        sizes = {"r": r}
        for part, axes in self.parts.items():
            if len(axes) != len(shapes[part]):
                return False
            for axis, size in zip(axes, shapes[part], strict=True):
                if sizes.setdefault(axis, size) != size:
                    return False
        return "m - r" not in sizes or sizes.get("m", sizes["m - r"] + r) == sizes["m - r"] + r

    @cached_property
    def layer(self) -> "type[LowRankLayer]":
        """The class of the layer."""
        layer: type[LowRankLayer] = pkgutil.resolve_name(self.layer_path)
        return layer

    def pack(self, A: "Tensor", B: "Tensor") -> "dict[str, Tensor]":
        """Part -> tensor of W = A B. A: (m, r). B: (r, n)."""
        return dict(zip(self.parts, self.layer.pack(A, B), strict=True))

    def unpack(self, tensors: "Mapping[str, Tensor]") -> "Tensor":
        """W (m, n), float32, from the parts; other tensors of the layer may be among them."""
        return self.layer.unpack(*(tensors[part] for part in self.parts))


FORMS = {
    FACTORED: StorageForm(
        FACTORED,
        "A (m, r) and B (r, n)",
        "welore.layers.low_rank:LowRankLinear",
        {"A.weight": ("m", "r"), "B.weight": ("r", "n")},
    ),
    PIVOTED: StorageForm(
        PIVOTED,
        "P (r, n) and C (m - r, r)",
        "welore.layers.low_rank:PivotedLinear",
        {"P.weight": ("r", "n"), "C.weight": ("m - r", "r"), "order": ("m",)},
        indices=("order",),
        full_rank=False,
    ),
}


def storages() -> dict[str, str]:
    """Every value of the setting `storage`, with its description."""
    return {name: form.description for name, form in FORMS.items()} | {AUTO: "the smallest of them"}


def cost(m: int, n: int, r: Any, storage: str, overheads: Mapping[str, float] = NO_OVERHEADS) -> Any:
    """Numbers that W (m, n) of rank r takes, stored in low rank. r: an int, or an array of ranks."""
    if storage != AUTO:
        return FORMS[storage].cost(m, n, r)
    costs = np.array([form.cost(m, n, r) for form in FORMS.values()])
    return np.take_along_axis(costs, _smallest(m, n, r, overheads)[None], 0)[0]


def overhead(m: int, n: int, r: Any, storage: str, overheads: Mapping[str, float]) -> Any:
    """The overhead of the form of W (m, n) of rank r, in numbers. r: an int, or an array of ranks."""
    if storage != AUTO:
        return overheads.get(storage, 0)
    return np.array([overheads.get(form, 0) for form in FORMS])[_smallest(m, n, r, overheads)]


def form_of(m: int, n: int, r: int, storage: str, overheads: Mapping[str, float] = NO_OVERHEADS) -> str:
    """The form that a matrix of rank r < min(m, n) gets; WeLoreError for an unknown storage."""
    choose("storage", storage, storages())
    return list(FORMS)[int(_smallest(m, n, r, overheads))] if storage == AUTO else storage


def _smallest(m: int, n: int, r: Any, overheads: Mapping[str, float]) -> Any:
    """Index of the form of the fewest bytes, where a number takes four; the first of equals. r: as in `cost`.

    overheads: form -> numbers that it counts as more than it stores.
    """
    sizes = [
        NUMBER_BYTES * (form.cost(m, n, r) + overheads.get(name, 0)) + form.index_bytes(m, n, r)
        for name, form in FORMS.items()
    ]
    return np.argmin(np.broadcast_arrays(*sizes), axis=0)
