"""Frozen weights that stay on the host, as they are in their file.

Each is copied to the device, and converted, when it multiplies, forward and backward.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from welore.models.skeleton import decoder_blocks


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
    """x W^T with W frozen and elsewhere. The graph holds no copy of W: the backward pass makes another one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, room: Room) -> Tensor:
        """x: (..., n), weight: (m, n) -> (..., m)."""
        ctx.weight, ctx.room = weight, room
        return x @ room.filled(weight, x.device).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient at x."""
        gradient = gradients[0]
        return gradient @ ctx.room.filled(ctx.weight, gradient.device), None, None


def _forward(layer: nn.Linear, room: Room, x: Tensor) -> Tensor:
    y: Tensor = _Product.apply(x.to(room.room.dtype), layer.weight.detach(), room)
    return y if layer.bias is None else y + layer.bias.to(y)


def _stay(layer: nn.Linear, convert: Any, recurse: bool = True) -> nn.Linear:
    return layer


@contextmanager
def streamed(model: Any, dtype: torch.dtype) -> Iterator[list[nn.Linear]]:
    """Keep the frozen linear layers of the decoder blocks where they are, whatever moves the model to a device.

    They compute in `dtype`; the device holds one of their weights at a time. Yields the layers.
    """
    blocks = decoder_blocks(model)[1]
    layers = [layer for block in blocks for layer in block.modules() if type(layer) is nn.Linear]
    layers = [layer for layer in layers if not any(p.requires_grad for p in layer.parameters())]
    room = Room(max((layer.weight.numel() for layer in layers), default=0), dtype)
    for layer in layers:
        layer.forward = partial(_forward, layer, room)  # type: ignore[method-assign]
        layer._apply = partial(_stay, layer)  # type: ignore[method-assign]
    try:
        yield layers
    finally:
        for layer in layers:
            for name in ("forward", "_apply"):
                del vars(layer)[name]
