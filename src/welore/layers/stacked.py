"""Matrices that read one input, as one layer: a serving engine stores q, k and v together, and gate and up.

Their first factors lie below each other, so that one product reads the input for all of them. On several devices, a
layer holds the share of one.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from welore.errors import WeLoreError
from welore.io.safetensors_stream import check_dtype, check_permutation
from welore.layers.block_grid import WHOLE, Grid, block_names, block_shape
from welore.layers.int8 import SCALE
from welore.layers.low_rank import in_order
from welore.layers.storage_forms import DENSE, FORMS, PIVOTED

Product = Callable[[int, int, bool], nn.Module]  # n, m, int8 -> a layer without bias; its weight (and scale) as stored
SHARED = {"weight", "B.weight", "P.weight"}  # tensors of a matrix that lie in the product that it shares


@dataclass(frozen=True)
class Part:
    """One matrix W (m, n) of a stacked layer, as it lies in a checkpoint.

    name: of the layer that it was. grid: its blocks, None if it is not split. low_rank: name of the matrix, or of a
    block -> form and rank; others are dense. rows, columns: the share of W that is computed here. int8: the dense
    matrices, blocks and factors that are stored in 8 bits (layers.int8).
    """

    name: str
    shape: Grid
    rows: range
    columns: range
    grid: Grid | None = None
    low_rank: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    int8: Container[str] = ()

    def blocks(self, product: Product) -> Iterator["Block"]:
        """The blocks, or W itself, row by row; also those of which nothing is computed here."""
        grid = self.grid or WHOLE
        (m, n), top = block_shape(*self.shape, grid), -1
        for index, name in enumerate(block_names(self.name, grid) if self.grid else [self.name]):
            row, column = divmod(index, grid[1])
            share = _share(self.rows, row * m, m), _share(self.columns, column * n, n)
            block = Block(name, (m, n), self.low_rank.get(name, (DENSE, 0)), share, product, self.int8)
            if block.is_here:
                start = column * n + block.columns.start - self.columns.start
                block.reads, block.adds, top = (start, start + len(block.columns), block.is_int8), row == top, row
            yield block


def _share(taken: range, start: int, count: int) -> range:
    """The numbers of a block that begins at `start` which are in `taken`, counted from the beginning of the block."""
    return range(max(taken.start - start, 0), min(taken.stop - start, count))


class Block(nn.Module):
    """A matrix W (m, n), or a block of one, behind the product that it shares: nothing, A, or C and the order of rows.

    share: its rows and columns that are computed here. Of a pivoted matrix with fewer rows than m, those rows of
    cat(1, C)[order] are stored, as an A. int8: names of all that is stored in 8 bits.
    """

    order: Tensor | None
    reads: tuple[int, int, bool]  # its columns within the input of the stack, and is_int8
    start: int  # its first row in the product that all with these columns share
    adds: bool  # whether its result is added to that of the block before, which lies beside it

    def __init__(
        self,
        name: str,
        shape: Grid,
        low_rank: tuple[str, int],
        share: tuple[range, range],
        product: Product,
        int8: Container[str],
    ) -> None:
        super().__init__()
        (self.form, r), (m, n), (self.rows, self.columns) = low_rank, shape, share
        parts = FORMS[self.form].shapes(m, n, r) if r else {"weight": shape}
        integers = {part for part in parts if f"{name}.{part}".removesuffix(".weight") in int8}
        parts = {**parts, **{f"{part}_scale": (parts[part][0], 1) for part in integers}}
        self.shapes = {f"{name}.{part}": size for part, size in parts.items()}
        self.is_int8 = not integers.isdisjoint(SHARED)  # what lies in the shared product
        self.name, self.height = name, r or len(self.rows)  # rows of the shared product
        complete = self.form == PIVOTED and len(self.rows) == m
        self.is_here = bool(self.rows and self.columns)
        rows = m - r if complete else len(self.rows)
        self.second = product(r, rows, not integers <= SHARED) if r and self.is_here else None
        self.register_buffer("order", torch.arange(m) if complete else None)
        self.waiting: dict[str, Tensor] = {}  # tensors of a pivoted matrix of which only some rows are computed
        self.awaited = sum(not part.startswith("P.") for part in parts)

    def fill(self, key: str, data: Tensor, product: Any) -> None:
        """Take a tensor of the checkpoint. product: the shared one."""
        part, leaf = key.removeprefix(f"{self.name}."), key.rpartition(".")[2]
        matrix, own = part.removesuffix("_scale"), slice(self.start, self.start + self.height)
        rows, columns = (slice(share.start, share.stop) for share in (self.rows, self.columns))
        if leaf == SCALE:
            columns = slice(None)
        match matrix:
            case "weight":
                getattr(product, leaf).data[own] = data[rows, columns]
            case "B.weight" | "P.weight":
                getattr(product, leaf).data[own] = data[:, columns]
            case "A.weight":
                getattr(self.second, leaf).data.copy_(data[rows])
            case "C.weight" if self.order is not None:
                getattr(self.second, leaf).data.copy_(data)
            case "order" if self.order is not None:
                self.order.copy_(data)
            case _:
                self.waiting[leaf] = data
        if len(self.waiting) == self.awaited:
            order = self.waiting.pop("order").long()[rows]
            for leaf, C in self.waiting.items():
                P = torch.eye(self.height) if leaf == "weight" else torch.ones(self.height, 1)  # 1 and the scale 1
                getattr(self.second, leaf).data.copy_(torch.cat((P.to(C), C))[order])
            self.waiting.clear()

    def forward(self, z: Tensor) -> Tensor:
        """z: (..., height) -> (..., rows)."""
        if self.second is None:
            return z
        y: Tensor = self.second(z)
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
        self.products: Any = nn.ModuleList(
            product(end - start, heights[start, end, int8], int8) for start, end, int8 in self.inputs
        )
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
        elif f"{key}_scale" not in block.shapes:
            check_dtype(key, data.dtype)
        elif data.dtype != torch.int8:
            raise WeLoreError(f"{key} has dtype {data.dtype}, not int8 as config.json says: it is damaged")
        if block.is_here:
            block.fill(key, data, self.products[self.inputs.index(block.reads)])
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
        z = {reads: p(x[..., reads[0] : reads[1]]) for reads, p in zip(self.inputs, self.products, strict=True)}
        outputs: list[Tensor] = []
        for block in self.blocks:
            y = block(z[block.reads][..., block.start : block.start + block.height])
            if block.adds:
                outputs[-1] = outputs[-1] + y
            else:
                outputs.append(y)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
