"""Weights in 8 bits: whole numbers with one scale for every row, and the layers that compute with them.

The scheme is the symmetric one per output channel of the library compressed-tensors (W8A16, "int-quantized"), with its
names of the tensors: `weight`, int8 (m, n), and `weight_scale` (m, 1), in the dtype that the weight had.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from welore.errors import WeLoreError

INT8 = "int8"
SCALE = "weight_scale"
LEVELS = 127  # on either side of 0
KERNEL_STEP, KERNEL_ROWS = 16, 16  # torch's kernel reads 16 aligned bytes at once, and beyond the end of others


def quantize_rows(W: Tensor) -> tuple[Tensor, Tensor]:
    """The weight int8 (m, n) and its scale (m, 1), in the dtype of W (m, n), so that W ~ weight * scale."""
    scale = (W.abs().amax(1, keepdim=True).float() / LEVELS).to(W.dtype)
    scale[scale == 0] = 1  # a row of zeros
    weight = (W.float() / scale.float()).round_().clamp_(-LEVELS, LEVELS).to(torch.int8)
    return weight, scale


def dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    """W (m, n) in the dtype of the scale; WeLoreError if somebody has put other numbers in place of the integers."""
    if weight.dtype != torch.int8:
        raise WeLoreError(f"an int8 layer holds {weight.dtype}: merge adapters before `export --format int8`")
    return weight * scale


def int8_product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias. x: (..., n). weight, scale: of W (m, n)."""
    m, n = weight.shape
    if not _has_kernel(x, scale):
        return functional.linear(x, dequantize(weight, scale), bias)
    y = torch._weight_int8pack_mm(x.reshape(-1, n).contiguous(), weight, scale.flatten()).view(*x.shape[:-1], m)
    return y if bias is None else y + bias


def _has_kernel(x: Tensor, scale: Tensor) -> bool:
    """Whether torch multiplies by the int8 weight itself, and is faster for it: few rows in bfloat16 on a CPU."""
    n = x.shape[-1]
    return (
        x.device.type == "cpu"
        and x.dtype == scale.dtype == torch.bfloat16
        and n % KERNEL_STEP == 0
        and x.numel() <= KERNEL_ROWS * n
        and not (torch.is_grad_enabled() and x.requires_grad)
    )


class Int8Linear(nn.Linear):
    """y = W x + b with W = weight * weight_scale, in place of a linear layer."""

    weight_scale: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", None)
        _add_parameters(self, (out_features, in_features), device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., n) -> (..., m)."""
        return int8_product(x, self.weight, self.weight_scale, self.bias)


class Int8Embedding(nn.Embedding):
    """Rows of an embedding W = weight * weight_scale. A family's own forward gets the rows that are read.

    Made by `of`, which keeps the family's class in the bases.
    """

    weight_scale: nn.Parameter

    @classmethod
    def of(cls, layer: nn.Embedding) -> Any:
        """An (uninitialised) 8-bit embedding in place of this one, with what else it knows."""
        new: Any = copy.copy(layer)
        new._parameters = {}
        own = type(layer)
        new.__class__ = cls if own is nn.Embedding else type(f"Int8{own.__name__}", (cls, own), {})
        _add_parameters(new, tuple(layer.weight.shape), layer.weight.device, layer.weight.dtype)
        return new

    def forward(self, input: Tensor) -> Tensor:
        """input: (...), token ids -> (..., n)."""
        rows = dequantize(*(functional.embedding(input, part) for part in (self.weight, self.weight_scale)))
        if type(self) is Int8Embedding:
            return rows
        like: Any = copy.copy(self)
        like._parameters, like.padding_idx = {"weight": rows.flatten(0, -2)}, None
        result: Tensor = super(Int8Embedding, like).forward(torch.arange(input.numel(), device=input.device))
        return result.view(rows.shape)


Int8Layer = Int8Linear | Int8Embedding


def _add_parameters(layer: Any, shape: tuple[int, ...], device: Any, dtype: torch.dtype | None) -> None:
    for name, size, kind in (("weight", shape, torch.int8), (SCALE, (shape[0], 1), dtype)):
        layer.register_parameter(name, nn.Parameter(torch.empty(size, device=device, dtype=kind), requires_grad=False))
