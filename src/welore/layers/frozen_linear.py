"""Linear layers with frozen weights that stay as they are in their file: torch only.

Each weight is copied to the device, and converted, when it multiplies, forward and backward.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class Room:
    """Memory for one weight in the dtype of the products, on the device of the last one; size: of the largest."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.size, self.room = size, torch.empty(0, dtype=dtype)

    def filled(self, weight: Tensor, device: torch.device) -> Tensor:
        """The weight there, until the next one is; the weight itself if it needs no copy."""
        if weight.device == device and weight.dtype is self.room.dtype:
            return weight
        if self.room.device != device or not len(self.room):
            self.room = torch.empty(self.size, dtype=self.room.dtype, device=device)
        return self.room[: weight.numel()].view(weight.shape).copy_(weight)


class _Product(torch.autograd.Function):
    """x W^T + b with W frozen and elsewhere. The graph holds no copy of W: the backward pass makes another one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, room: Room) -> Tensor:
        """x: (..., n), weight: (m, n), bias: (m,) -> (..., m)."""
        ctx.weight, ctx.room = weight, room
        return linear(x, room.filled(weight, x.device), None if bias is None else bias.to(x))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient at x."""
        gradient = gradients[0]
        return gradient @ ctx.room.filled(ctx.weight, gradient.device), None, None, None


def _forward(layer: nn.Linear, room: Room, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.detach()
    y: Tensor = _Product.apply(x.to(room.room.dtype), layer.weight.detach(), bias, room)
    return y


def leave_weights(layers: list[nn.Linear], dtype: torch.dtype) -> None:
    """Make frozen layers compute in `dtype`, with one weight at a time converted and on the device of their input."""
    room = Room(max((layer.weight.numel() for layer in layers), default=0), dtype)
    for layer in layers:
        layer.forward = partial(_forward, layer, room)  # type: ignore[method-assign]
