import numpy as np
import pytest
import torch

from welore.emergence.probe import _of_gradients
from welore.emergence.subspace import leading, overlaps


def basis(k: int, r: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(k, r, generator=torch.Generator().manual_seed(seed)))[0]


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6), (9, 1)])
def test_leading_directions_are_those_of_the_shorter_side(shape: tuple[int, int]) -> None:
    G = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values, found = leading(G, 3)
    U, S, V = torch.linalg.svd(G.double(), full_matrices=False)
    side = U if shape[0] <= shape[1] else V.T
    assert torch.allclose(values, S, atol=1e-6)
    assert found.shape == (min(shape), min(3, *shape))
    assert torch.allclose((found * side[:, :3]).sum(0).abs(), torch.ones(found.shape[1]).double(), atol=1e-6)


def overlap(U: torch.Tensor, V: torch.Tensor) -> float:
    return float(overlaps(U[None], V[None]))


def test_overlap_is_one_for_the_same_space_and_zero_for_an_orthogonal_one() -> None:
    Q = basis(8, 8, 0)
    turned = Q[:, :3] @ basis(3, 3, 1)
    assert overlap(Q[:, :3], turned) == pytest.approx(1, abs=1e-5)
    assert overlap(Q[:, :3], Q[:, 3:6]) == pytest.approx(0, abs=1e-6)
    assert overlap(Q[:, :4], torch.cat([Q[:, :1], Q[:, 5:8]], 1)) == pytest.approx(1 / 4, abs=1e-5)


def test_overlaps_of_several_are_those_of_every_pair() -> None:
    U, V = (torch.stack([basis(9, 4, seed) for seed in seeds]) for seeds in ((1, 2, 3), (4, 5)))
    found = overlaps(U, V)
    assert found.shape == (3, 2)
    wanted = [[float((u.T @ v).square().sum() / 4) for v in V] for u in U]
    assert np.allclose(found, wanted, atol=1e-6)


def test_overlap_of_random_subspaces_is_their_share_of_the_space() -> None:
    found = [overlap(basis(64, 16, i), basis(64, 16, i + 1000)) for i in range(40)]
    assert np.mean(found) == pytest.approx(16 / 64, abs=0.01)


def test_gradients_are_kept_at_length_one_and_zero_stays_zero() -> None:
    _, directions = _of_gradients("x", [torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)])
    assert torch.allclose(directions["x:gradients"].float(), torch.tensor([[0.6, 0.8], [0.0, 0.0]]), rtol=2**-8)
