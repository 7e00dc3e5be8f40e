"""The low-rank layers: nn.Modules and nothing else."""

from collections.abc import Mapping
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from welore.errors import WeLoreError
from welore.layers.block_grid import Grid, block_shape
from welore.layers.registry import FACTORED, FORMS, PIVOTED
from welore.linalg.interpolative import pivoted

Layer = TypeVar("Layer", bound=nn.Module)


class LowRankLinear(nn.Module):
    """y = A (B x) + b in place of y = W x + b, with W ~ A B.

    A: nn.Linear(rank, out_features), weight (m, r). B: nn.Linear(in_features, rank), weight (r, n). Two plain
    Linears, so that peft, torchao, FSDP and hooks see nothing unusual. The bias stays here, under the key that
    the dense layer had.

    `weight` is an empty buffer, the tombstone: a loader that does not know this format would fill a missing
    dense weight with random numbers; it meets a shape mismatch here and stops instead.
    """

    form: ClassVar[str] = FACTORED
    weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.A = nn.Linear(rank, out_features, bias=False, device=device, dtype=dtype)
        self.A.register_state_dict_post_hook(_by_row)
        self.B = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., n) -> (..., m)."""
        _lay_by_column(self.A, x)
        y = self.A(self.B(x))
        return y if self.bias is None else y + self.bias

    def train(self, mode: bool = True) -> "LowRankLinear":
        """As of any module; what decoding has laid by column is laid by row again to be trained."""
        return _train(super().train(mode), self.A)

    def extra_repr(self) -> str:
        """Shapes, as nn.Linear prints them."""
        return _shapes(self, f"rank={self.rank}")


class PivotedLinear(nn.Module):
    """y = cat(z, C z)[order] + b with z = P x: r rows of a rank-r matrix W, and the others as combinations of them.

    P: nn.Linear(in_features, rank), weight (r, n). C: nn.Linear(rank, out_features - rank), weight (m - r, r): plain
    Linears, as in LowRankLinear, and so are `bias` and the tombstone `weight`. order: (m,), int32, a permutation:
    where in cat(z, C z) every output lies. A rank of m would leave C empty, and P as large as W: refused.
    """

    form: ClassVar[str] = PIVOTED
    weight: Tensor
    order: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 1 <= rank < out_features:
            raise WeLoreError(
                f"rank is {rank}: a pivoted layer with {out_features} outputs has ranks from 1 to {out_features - 1}; "
                "keep it dense"
            )
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.P = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.C = nn.Linear(rank, out_features - rank, bias=False, device=device, dtype=dtype)
        self.C.register_state_dict_post_hook(_by_row)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("order", torch.arange(out_features, device=device, dtype=torch.int32))
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., n) -> (..., m)."""
        _lay_by_column(self.C, x)
        z = self.P(x)
        y = torch.cat((z, self.C(z)), -1)
        # gather with a stretched index: on a CPU several times as fast, both ways, as index_select or y[..., order].
        y = y.gather(-1, self.order.long().expand(y.shape))
        return y if self.bias is None else y + self.bias

    def train(self, mode: bool = True) -> "PivotedLinear":
        """As of any module; what decoding has laid by column is laid by row again to be trained."""
        return _train(super().train(mode), self.C)

    def extra_repr(self) -> str:
        """Shapes, as nn.Linear prints them."""
        return _shapes(self, f"rank={self.rank}")


class SplitLinear(nn.Module):
    """y = W x + b with W in equal blocks, each a linear or a low-rank layer of its own.

    grid: how many blocks lie below each other and side by side. The blocks are called 0, 1, ..., row by row, and are
    made as nn.Linear without bias. `bias` and the tombstone `weight` are those of LowRankLinear.
    """

    weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid: Grid,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        m, n = block_shape(out_features, in_features, grid)
        super().__init__()
        self.in_features, self.out_features, self.grid = in_features, out_features, grid
        for index in range(grid[0] * grid[1]):
            self.add_module(str(index), nn.Linear(n, m, bias=False, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))

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
        """Shapes, as nn.Linear prints them."""
        return _shapes(self, f"grid={self.grid}")


def _lay_by_column(tall: nn.Linear, x: Tensor) -> None:
    """Before the first token is decoded on a CPU in float32: the numbers of `tall` (m, r) column after column.

    One token reads every weight once. Rows of r numbers are too short to be read at full speed, columns of m are not:
    a layer at r = 0.3 n gains a third. The tensor keeps its shape and values; it is no longer contiguous, so what
    state_dict gives is a contiguous copy (`_by_row`), and `train` lays it by row again.
    """
    weight = tall.weight
    if x.shape[-1] != x.numel() or x.device.type != "cpu" or weight.dtype != torch.float32 or weight.stride(0) == 1:
        return
    if tall.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    with torch.inference_mode(False):  # the weight may be trained later, which a tensor made in that mode may not
        weight.data = weight.data.T.contiguous().T


def _by_row(module: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
    state[prefix + "weight"] = state[prefix + "weight"].contiguous()


def _train(layer: Layer, tall: nn.Linear) -> Layer:
    if layer.training and not tall.weight.is_contiguous():
        tall.weight.data = tall.weight.data.contiguous()
    return layer


LowRank = LowRankLinear | PivotedLinear
LAYERS: dict[str, type[LowRank]] = {FACTORED: LowRankLinear, PIVOTED: PivotedLinear}


def _shapes(layer: LowRank | SplitLinear, inside: str) -> str:
    return (
        f"in_features={layer.in_features}, out_features={layer.out_features}, {inside}, bias={layer.bias is not None}"
    )


def tensors(A: Tensor, B: Tensor, form: str) -> dict[str, Tensor]:
    """What a layer of this form holds of W = A B: name inside the layer -> tensor, as in `forms.shapes`."""
    if form != PIVOTED:
        return dict(zip(FORMS[form], (A, B), strict=True))
    found = pivoted(A, B)
    return dict(zip(FORMS[form], (found.P, found.C, found.order), strict=True))


def product(parts: Mapping[str, Tensor], form: str) -> Tensor:
    """W (m, n), float32, from the tensors of a layer of this form."""
    if form != PIVOTED:
        A, B = (parts[name].float() for name in FORMS[form])
        return A @ B
    P, C, order = (parts[name] for name in FORMS[form])
    return torch.cat((P.float(), C.float() @ P.float()))[order]
