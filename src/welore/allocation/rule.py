"""Which matrices are factored and how they are stored, and what depends on where the result will run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from welore.config import ANYWHERE, AUTO, BREAK_EVEN, CPU, GPU, SIZE, MinRatio, StorageName
from welore.layers.storage_forms import FACTORED, PIVOTED, cost, form_of, overhead

Shape = tuple[int, int]
LARGEST_OVERHEAD, LARGEST_MULTIPLE = 1 / 8, 1 / 16  # of the numbers of a mean matrix; of a mean full rank


@dataclass(frozen=True)
class Layout:
    """How a result is stored for the hardware that it will run on.

    split: whether long matrices are stored in blocks; None: by the scaling. rank_multiple: of ranks and MLP widths.
    overheads: form -> numbers of a weight that are read in the time that the further kernels of this form take.
    """

    split: bool | None
    rank_multiple: int
    overheads: Mapping[str, float] = field(default_factory=dict)


# CPU: on a core of an AMD EPYC 9005 a further product of one token takes 6 us in float32, reordering 4 us, at 16 GB/s.
# Less than half of that counts: with all of it SmolLM2 was hardly faster, and lost more on validation text. GPU, by
# arithmetic for an H100: 2.5 us a kernel in a CUDA graph, 85 % of 3.35 TB/s, bfloat16; plain factors launch one kernel
# more than a dense layer, pivoted ones three.
LAYOUTS: Mapping[str, Layout] = {
    CPU: Layout(False, 16, {FACTORED: 10_000, PIVOTED: 18_000}),
    GPU: Layout(False, 64, {FACTORED: 3_500_000, PIVOTED: 10_500_000}),
    SIZE: Layout(None, 1),
    ANYWHERE: Layout(False, 1),
}


@dataclass(frozen=True)
class Rule:
    """Which matrices are factored, and how they are stored.

    overheads: form -> numbers that a matrix in this form counts as more than it stores.
    """

    storage: StorageName
    min_ratio: MinRatio = BREAK_EVEN
    allow_growth: bool = False
    overheads: Mapping[str, float] = field(default_factory=dict)

    def counted(self, ranks: NDArray[np.int64], shape: Shape) -> Any:
        """Numbers that W (m, n) counts as at each of the ranks: in low rank with the overhead, at full rank dense."""
        m, n = shape
        low = cost(m, n, ranks, self.storage, self.overheads) + overhead(m, n, ranks, self.storage, self.overheads)
        return np.where(ranks == min(m, n), m * n, low)

    def factored(self, ranks: NDArray[np.int64], shape: Shape) -> NDArray[np.bool_]:
        """Whether W (m, n) is an LRC at each of the ranks, and not larger in low rank than dense."""
        m, n = shape
        smaller: NDArray[np.bool_] = self.counted(ranks, shape) < m * n
        if self.min_ratio == BREAK_EVEN:
            return smaller
        lrc = (min(m, n) - ranks) / min(m, n) > float(self.min_ratio)
        return lrc if self.allow_growth else lrc & smaller

    def removed(self, ranks: NDArray[np.int64], shape: Shape) -> NDArray[np.int64]:
        """By how much W (m, n) loses rank at each of the ranks: not at all where it stays dense."""
        return (min(shape) - ranks) * self.factored(ranks, shape)

    def numel(self, ranks: NDArray[np.int64], shape: Shape) -> NDArray[np.int64]:
        """Numbers stored for W (m, n) at each of the ranks."""
        m, n = shape
        return np.where(self.factored(ranks, shape), cost(m, n, ranks, self.storage, self.overheads), m * n)

    def form(self, rank: int, shape: Shape) -> str:
        """The form in which a factored W (m, n) of this rank is stored."""
        return form_of(*shape, rank, self.storage, self.overheads)


def layout_of(optimize_for: str, shapes: Sequence[Shape]) -> Layout:
    """The layout for a goal, that of size for auto, adjusted to a model with matrices of these shapes.

    Small models could not reach their target otherwise: overheads and the multiple (a power of 2) are at most shares of
    what a mean matrix has.
    """
    layout = LAYOUTS[SIZE if optimize_for == AUTO else optimize_for]
    if not layout.overheads:
        return layout
    numbers = LARGEST_OVERHEAD * sum(m * n for m, n in shapes) / len(shapes)
    rank = int(LARGEST_MULTIPLE * sum(map(min, shapes)) / len(shapes))
    share = min(1.0, numbers / min(layout.overheads.values()))
    return replace(
        layout,
        rank_multiple=min(layout.rank_multiple, 1 << max(0, rank.bit_length() - 1)),
        overheads={form: share * numbers for form, numbers in layout.overheads.items()},
    )
