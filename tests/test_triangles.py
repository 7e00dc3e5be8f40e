"""Symmetric matrices stored as a triangle."""

import pytest
import torch

from welore.linalg.triangles import pack, unpack


def moments(n: int) -> torch.Tensor:
    x = torch.randn(2 * n, n, generator=torch.Generator().manual_seed(n)) * torch.logspace(-6, 2, n)
    moments = x.T @ x
    return (moments + moments.T) / 2


@pytest.mark.parametrize("n", [1, 5, 256, 257, 700])
def test_a_matrix_and_each_part_of_it_come_back(n: int) -> None:
    square = moments(n)
    tensors = pack(square)
    assert torch.equal(unpack(tensors), square)
    for part in (slice(0, n // 2), slice(n // 3, n), slice(n // 2, n // 2 + 1)):
        assert torch.equal(unpack(tensors, part), square[part, part])
    assert sum(t.nbytes for t in tensors.values()) <= 4 * (n * (n + 1) // 2 + 128 * n + n)


@pytest.mark.parametrize("n", [5, 256, 600])
def test_rounded_moments_are_symmetric_near_and_a_quarter_in_size(n: int) -> None:
    square = moments(n)
    square[n // 2] = square[:, n // 2] = 0  # an output whose gradient is zero
    tensors = pack(square, rounded=True)
    rounded = unpack(tensors)
    assert torch.equal(rounded, rounded.T)
    assert torch.equal(rounded.diagonal(), square.diagonal())
    size = square.diagonal().double().sqrt()
    assert bool(((rounded - square).abs() <= torch.outer(size, size) * 2.0**-11 * 1.01).all())
    part = slice(n // 3, n)
    assert torch.equal(unpack(tensors, part), rounded[part, part])
    assert sum(t.nbytes for t in tensors.values()) <= 2 * (n * (n + 1) // 2 + 128 * n + 2 * n)
