"""Matrices that read one input, as one layer: a serving engine stores q, k and v together, and gate and up.

Their first factors lie below each other, so that one product reads the input for all of them. On several devices, a
layer holds the share of one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from welore.errors import WeLoreError
from welore.io.safetensors_stream import check_dtype, check_permutation
from welore.layers.block_grid import WHOLE, Grid, block_names, block_shape
from welore.layers.low_rank import in_order
from welore.layers.storage_forms import DENSE, FORMS, PIVOTED

Product = Callable[[int, int], nn.Module]  # (n, m) -> a linear layer without bias, whose `weight` is (m, n)


@dataclass(frozen=True)
class Part:
    """One matrix W (m, n) of a stacked layer, as it lies in a checkpoint.

    name: of the layer that it was. grid: its blocks, None if it is not split. low_rank: name of the matrix, or of a
    block -> form and rank; others are dense. rows, columns: the share of W that is computed here.
    """

    name: str
    shape: Grid
    rows: range
    columns: range
    grid: Grid | None = None
    low_rank: Mapping[str, tuple[str, int]] = field(default_factory=dict)

    def blocks(self, product: Product) -> Iterator["Block"]:
        """The blocks, or W itself, row by row; also those of which nothing is computed here."""
        grid = self.grid or WHOLE
        (m, n), top = block_shape(*self.shape, grid), -1
        for index, name in enumerate(block_names(self.name, grid) if self.grid else [self.name]):
            row, column = divmod(index, grid[1])
            share = _share(self.rows, row * m, m), _share(self.columns, column * n, n)
            block = Block(name, (m, n), self.low_rank.get(name, (DENSE, 0)), share, product)
            if block.is_here:
                start = column * n + block.columns.start - self.columns.start
                block.reads, block.adds, top = (start, start + len(block.columns)), row == top, row
            yield block


def _share(taken: range, start: int, count: int) -> range:
    """The numbers of a block that begins at `start` which are in `taken`, counted from the beginning of the block."""
    return range(max(taken.start - start, 0), min(taken.stop - start, count))


class Block(nn.Module):
    """A matrix W (m, n), or a block of one, behind the product that it shares: nothing, A, or C and the order of rows.

    share: its rows and columns that are computed here. Of a pivoted matrix with fewer rows than m, those rows of
    cat(1, C)[order] are stored, as an A.
    """

    order: Tensor | None
    reads: tuple[int, int]  # its columns within the input of the stack
    start: int  # its first row in the product that all with these columns share
    adds: bool  # whether its result is added to that of the block before, which lies beside it

    def __init__(
        self, name: str, shape: Grid, low_rank: tuple[str, int], share: tuple[range, range], product: Product
    ) -> None:
        super().__init__()
        (self.form, r), (m, n), (self.rows, self.columns) = low_rank, shape, share
        parts = FORMS[self.form].shapes(m, n, r) if r else {"weight": shape}
        self.shapes = {f"{name}.{part}": size for part, size in parts.items()}
        self.name, self.height = name, r or len(self.rows)  # rows of the shared product
        complete = self.form == PIVOTED and len(self.rows) == m
        self.is_here = bool(self.rows and self.columns)
        self.second = product(r, m - r if complete else len(self.rows)) if r and self.is_here else None
        self.register_buffer("order", torch.arange(m) if complete else None)
        self.waiting: dict[str, Tensor] = {}  # tensors of a pivoted matrix of which only some rows are computed

    def fill(self, key: str, data: Tensor, first: Tensor) -> None:
        """Take a tensor of the checkpoint. first: (height, columns), the rows of the shared product's weight."""
        rows, columns = (slice(share.start, share.stop) for share in (self.rows, self.columns))
        second: Any = self.second
        match key.removeprefix(f"{self.name}."):
            case "weight":
                first.copy_(data[rows, columns])
            case "B.weight" | "P.weight":
                first.copy_(data[:, columns])
            case "A.weight":
                second.weight.data.copy_(data[rows])
            case "C.weight" if self.order is not None:
                second.weight.data.copy_(data)
            case "order" if self.order is not None:
                self.order.copy_(data)
            case part:
                self.waiting[part] = data
        if len(self.waiting) == 2:
            C, order = self.waiting.pop("C.weight"), self.waiting.pop("order").long()
            second.weight.data.copy_(torch.cat((torch.eye(self.height).to(C), C))[order[rows]])

    def forward(self, z: Tensor) -> Tensor:
        """z: (..., height) -> (..., rows)."""
        if self.second is None:
            return z
        y = self.second(z)
        return y if self.order is None else in_order(z, y, self.order)


class StackedLinear(nn.Module):
    """y = cat(W_1 x, W_2 x, ...), without biases; of every W the share that is computed here.

    parts: the matrices. product: makes the (uninitialised) dense layers. Give `fill` one tensor of the checkpoint
    after the other, then call `require_filled`.
    """

    def __init__(self, parts: Sequence[Part], product: Product) -> None:
        super().__init__()
        matrices = [block for part in parts for block in part.blocks(product)]
        blocks = [block for block in matrices if block.is_here]
        self.blocks: Any = nn.ModuleList(blocks)
        self.inputs = sorted({block.reads for block in blocks})
        heights = dict.fromkeys(self.inputs, 0)
        for block in blocks:
            block.start = heights[block.reads]
            heights[block.reads] += block.height
        self.products: Any = nn.ModuleList(product(end - start, heights[start, end]) for start, end in self.inputs)
        self.empty = {key: block for block in matrices for key in block.shapes}

    def fill(self, key: str, data: Tensor) -> None:
        """Take a tensor under its name in the checkpoint; WeLoreError unless it is as config.json says."""
        block = self.empty.get(key)
        if block is None:
            raise WeLoreError(f"the checkpoint holds {key}, of which config.json says nothing: it is damaged")
        if tuple(data.shape) != block.shapes[key]:
            raise WeLoreError(f"{key} has shape {tuple(data.shape)}, not {block.shapes[key]} as config.json says")
        if key.endswith(".order"):
            check_permutation(key, data)
        else:
            check_dtype(key, data.dtype)
        if block.is_here:
            weight = self.products[self.inputs.index(block.reads)].weight.data
            block.fill(key, data, weight[block.start : block.start + block.height])
        del self.empty[key]

    def keys(self, name: str) -> set[str]:
        """The tensors of the part of that name, and the tombstones of its blocks, as they are called within it."""
        own = [key.removeprefix(f"{name}.") for key in self.empty if key.startswith(f"{name}.")]
        return {*own, *(f"{key.partition('.')[0]}.weight" for key in own if key[0].isdigit()), "weight"}

    def require_filled(self) -> None:
        """Raise WeLoreError if a tensor has not come."""
        if self.empty:
            raise WeLoreError(f"the checkpoint has lost the tensor {min(self.empty)}: it cannot be loaded")

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., n), or the columns that are read here -> (..., rows of all parts)."""
        z = {reads: product(x[..., slice(*reads)]) for reads, product in zip(self.inputs, self.products, strict=True)}
        outputs: list[Tensor] = []
        for block in self.blocks:
            y = block(z[block.reads][..., block.start : block.start + block.height])
            if block.adds:
                outputs[-1] = outputs[-1] + y
            else:
                outputs.append(y)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
