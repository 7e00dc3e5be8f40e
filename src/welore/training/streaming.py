"""Frozen weights that stay on the host: each is copied to the device when it multiplies, forward and backward."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from welore.models.skeleton import decoder_blocks


class _Product(torch.autograd.Function):
    """x W^T with W frozen and elsewhere. The graph holds no copy of W: the backward pass makes another one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """x: (..., n), weight: (m, n) -> (..., m)."""
        ctx.weight = weight
        return x @ weight.to(x.device).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient at x."""
        gradient = gradients[0]
        return gradient @ ctx.weight.to(gradient.device), None


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    y: Tensor = _Product.apply(x.to(layer.weight.dtype), layer.weight.detach())
    return y if layer.bias is None else y + layer.bias.to(y.device)


def _stay(layer: nn.Linear, convert: Any, recurse: bool = True) -> nn.Linear:
    return layer


@contextmanager
def streamed(model: Any) -> Iterator[None]:
    """Keep the frozen linear layers of the decoder blocks where they are, whatever moves the model to a device.

    The device holds one of their weights at a time.
    """
    blocks = decoder_blocks(model)[1]
    layers = [layer for block in blocks for layer in block.modules() if type(layer) is nn.Linear]
    layers = [layer for layer in layers if not any(p.requires_grad for p in layer.parameters())]
    for layer in layers:
        layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
        layer._apply = partial(_stay, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            for name in ("forward", "_apply"):
                del vars(layer)[name]
