"""The low-rank layers: nn.Modules and nothing else."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from welore.errors import WeLoreError
from welore.layers.block_grid import Grid, block_shape
from welore.layers.storage_forms import FACTORED, PIVOTED
from welore.linalg.interpolative import pivoted


class CompressedLayer(nn.Module):
    """A layer in the place of y = W x + b whose children hold what W is made of.

    They are plain nn.Linear layers, so that peft, torchao, FSDP and hooks see nothing unusual. The bias stays here,
    under the key that the dense layer had.

    `weight` is an empty buffer, the tombstone: a loader that does not know this format would fill a missing
    dense weight with random numbers; it meets a shape mismatch here and stops instead.
    """

    bias: nn.Parameter | None
    weight: Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False, **like: Any) -> None:
        """like: device and dtype, as of nn.Linear."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features, **like)) if bias else None
        self.register_buffer("weight", torch.empty(0, **like))

    def extra_repr(self) -> str:
        """Shapes, as nn.Linear prints them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class LowRankLayer(CompressedLayer):
    """A linear layer whose matrix W (m, n) of rank r is stored in one of the forms of the registry."""

    form: ClassVar[str]
    tall: ClassVar[str]  # the child whose weight has more rows than columns

    def __init__(self, in_features: int, out_features: int, rank: int, **options: Any) -> None:
        super().__init__(in_features, out_features, **options)
        self.rank = rank

    @staticmethod
    def pack(A: Tensor, B: Tensor) -> tuple[Tensor, ...]:
        """The tensors of W = A B, in the order of the form's parts. A: (m, r). B: (r, n)."""
        raise NotImplementedError

    @staticmethod
    def unpack(*parts: Tensor) -> Tensor:
        """W (m, n), float32, from the tensors in the order of the form's parts."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """With the rank."""
        return f"{super().extra_repr()}, rank={self.rank}"


class LowRankLinear(LowRankLayer):
    """y = A (B x) + b in place of y = W x + b, with W ~ A B.

    A: nn.Linear(rank, out_features), weight (m, r). B: nn.Linear(in_features, rank), weight (r, n).
    """

    form, tall = FACTORED, "A"

    def __init__(self, in_features: int, out_features: int, rank: int, **options: Any) -> None:
        super().__init__(in_features, out_features, rank, **options)
        options.pop("bias", None)
        self.A = nn.Linear(rank, out_features, bias=False, **options)
        self.B = nn.Linear(in_features, rank, bias=False, **options)

    @staticmethod
    def pack(A: Tensor, B: Tensor) -> tuple[Tensor, ...]:
        """A and B themselves."""
        return A, B

    @staticmethod
    def unpack(*parts: Tensor) -> Tensor:
        """A B."""
        A, B = parts
        return A.float() @ B.float()

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., n) -> (..., m)."""
        y = self.A(self.B(x))
        return y if self.bias is None else y + self.bias


class PivotedLinear(LowRankLayer):
    """y = cat(z, C z)[order] + b with z = P x: r rows of a rank-r matrix W, and the others as combinations of them.

    P: nn.Linear(in_features, rank), weight (r, n). C: nn.Linear(rank, out_features - rank), weight (m - r, r).
    order: (m,), int64, a permutation: where in cat(z, C z) every output lies. A rank of m would leave C empty, and P
    as large as W: refused.
    """

    form, tall = PIVOTED, "C"
    order: Tensor

    def __init__(self, in_features: int, out_features: int, rank: int, **options: Any) -> None:
        if not 1 <= rank < out_features:
            raise WeLoreError(
                f"rank is {rank}: a pivoted layer with {out_features} outputs has ranks from 1 to {out_features - 1}; "
                "keep it dense"
            )
        super().__init__(in_features, out_features, rank, **options)
        options.pop("bias", None)
        self.P = nn.Linear(in_features, rank, bias=False, **options)
        self.C = nn.Linear(rank, out_features - rank, bias=False, **options)
        self.register_buffer("order", torch.arange(out_features, device=options.get("device")))

    @staticmethod
    def pack(A: Tensor, B: Tensor) -> tuple[Tensor, ...]:
        """P, C and order: see linalg.interpolative."""
        return pivoted(A, B)

    @staticmethod
    def unpack(*parts: Tensor) -> Tensor:
        """cat(P, C P)[order]."""
        P, C, order = parts
        return torch.cat((P.float(), C.float() @ P.float()))[order]

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., n) -> (..., m)."""
        z = self.P(x)
        y = in_order(z, self.C(z), self.order)
        return y if self.bias is None else y + self.bias


def in_order(z: Tensor, others: Tensor, order: Tensor) -> Tensor:
    """cat(z, others)[order], over the last axis. z: (..., r). others: (..., m - r). order: (m,), a permutation."""
    y, order = torch.cat((z, others), -1), order.long()  # int32 in old files
    # gather with a stretched index is several times as fast on a CPU, both ways; its backward on a GPU is not
    # deterministic.
    return y.gather(-1, order.expand(y.shape)) if y.device.type == "cpu" else y.index_select(-1, order)


class SplitLinear(CompressedLayer):
    """y = W x + b with W in equal blocks, each a linear or a low-rank layer of its own.

    grid: how many blocks lie below each other and side by side. The blocks are called 0, 1, ..., row by row, and are
    made as nn.Linear without bias.
    """

    def __init__(self, in_features: int, out_features: int, grid: Grid, **options: Any) -> None:
        m, n = block_shape(out_features, in_features, grid)
        super().__init__(in_features, out_features, **options)
        self.grid = grid
        options.pop("bias", None)
        for index in range(grid[0] * grid[1]):
            self.add_module(str(index), nn.Linear(n, m, bias=False, **options))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., n) -> (..., m)."""
        down, across = self.grid
        blocks, parts = iter(self.children()), x.split(self.in_features // across, -1)
        rows = []
        for _ in range(down):
            row = next(blocks)(parts[0])
            for part in parts[1:]:
                row = row + next(blocks)(part)
            rows.append(row)
        y = rows[0] if down == 1 else torch.cat(rows, -1)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """With the grid."""
        return f"{super().extra_repr()}, grid={self.grid}"


# --- one token on a CPU ---------------------------------------------------------------------------------------------


def optimize_for_decoding(model: nn.Module) -> None:
    """Lay the weights of low-rank layers for decoding one token at a time, on a CPU in float32; others stay.

    A and C (m, r) get their numbers column after column: one token reads every weight once, and columns of m numbers
    are read faster than rows of r (docs/results/inference.md). Values and results of saving stay, but the parameters
    are no longer contiguous. Train and export a model before, or load it anew.

    Args:
        model: A model with low-rank layers, changed in place.
    """
    for layer in model.modules():
        tall = getattr(layer, layer.tall) if isinstance(layer, LowRankLayer) else None
        weight = getattr(tall, "weight", None)
        if type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype == torch.float32:
            with torch.inference_mode(False):  # it may be trained later, which a tensor made in that mode may not
                weight.data = weight.data.T.contiguous().T
