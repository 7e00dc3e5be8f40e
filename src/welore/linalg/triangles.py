"""Symmetric matrices in half of their memory: one triangle, row after row of blocks; of moments also in a quarter."""

from collections.abc import Mapping

import torch
from torch import Tensor

STEP = 256  # rows of a block

ALL = slice(None)


def pack(square: Tensor, *, rounded: bool = False) -> dict[str, Tensor]:
    """The upper triangle of a symmetric matrix (n, n), with the blocks on its diagonal, as tensors to store.

    rounded: for second moments; the correlations in float16 and the diagonal as it is. An entry is then wrong by at
    most 2^-11 of the root of the product of its two diagonal entries.
    """
    n, diagonal = len(square), square.diagonal().clone()
    size = sum((min(start + STEP, n) - start) * (n - start) for start in range(0, n, STEP))
    upper = square.new_empty(size, dtype=torch.float16 if rounded else square.dtype)
    scale = diagonal.double().rsqrt().nan_to_num(posinf=0.0) if rounded else None
    position = 0
    for start in range(0, n, STEP):
        block = square[start : start + STEP, start:]
        if scale is not None:
            block = block * torch.outer(scale[start : start + STEP], scale[start:])
        upper[position : position + block.numel()] = block.flatten()
        position += block.numel()
    return {"upper": upper, "diagonal": diagonal}


def unpack(tensors: Mapping[str, Tensor], part: slice = ALL) -> Tensor:
    """The symmetric matrix (n, n) that `pack` was given, or the rows and columns of a part of it."""
    upper, diagonal = tensors["upper"], tensors["diagonal"]
    n = len(diagonal)
    first, last, _ = part.indices(n)
    square = diagonal.new_empty((last - first, last - first))
    scale = None if upper.dtype == diagonal.dtype else diagonal.double().sqrt()
    position = 0
    for start in range(0, n, STEP):
        stop = min(start + STEP, n)
        block = upper[position : position + (stop - start) * (n - start)].view(stop - start, n - start)
        position += block.numel()
        top, left, bottom = max(start, first), max(start, first), min(stop, last)
        if top >= bottom:
            continue
        block = block[top - start : bottom - start, left - start : last - start]
        if scale is not None:
            block = block * torch.outer(scale[top:bottom], scale[left:last])
        square[top - first : bottom - first, left - first :] = block
        square[left - first :, top - first : bottom - first] = block.T
    square.diagonal().copy_(diagonal[first:last])
    return square
