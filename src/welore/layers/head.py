"""Products with the weight of an output layer, which for a large vocabulary is the largest matrix of a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

AT_ONCE = 1 << 25  # numbers of the weight


def pieces_of(weight: Tensor) -> tuple[Tensor, ...]:
    """The rows of a weight (V, width) in pieces of at most AT_ONCE numbers."""
    return weight.split(max(1, AT_ONCE // weight.shape[1]))


def linear_in_pieces(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias; of a half-precision weight on a CPU some rows at a time.

    There every product copies the weight into another order first: half a gigabyte for a vocabulary of 128,000 tokens
    at width 2048, and as much again in the backward pass. x: (..., width) -> (..., V).
    """
    if weight.device.type != "cpu" or weight.itemsize > 2:
        return functional.linear(x, weight, bias)
    y = torch.cat([functional.linear(x, piece) for piece in pieces_of(weight)], -1)
    return y if bias is None else y + bias


@contextmanager
def in_pieces(head: Any) -> Iterator[None]:
    """Let an ordinary linear layer multiply by linear_in_pieces; accelerate's own forward, which fetches it, stays."""
    if type(head) is not nn.Linear or "forward" in vars(head):
        yield
        return
    vars(head)["forward"] = lambda x: linear_in_pieces(x, head.weight, head.bias)
    try:
        yield
    finally:
        del head.forward
