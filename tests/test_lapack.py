import numpy as np
import pytest
import scipy.linalg
import torch

from welore.linalg import _lapack as lapack
from welore.linalg import cholesky


def symmetric(k: int, kind: type) -> np.ndarray:
    X = np.random.default_rng(k).standard_normal((k, 2 * k))
    return np.asfortranarray((X @ X.T).astype(kind))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("k", [1, 2, 3, 17, 130])
def test_reduction_and_back_transform_give_the_eigenvectors(k: int, kind: type) -> None:
    G = symmetric(k, kind)
    reflectors = G.copy(order="F")
    diagonal, off, tau = lapack.tridiagonalise(reflectors)
    expected = scipy.linalg.eigvalsh(G.astype(np.float64))
    accuracy = np.finfo(kind).eps * expected[-1] * 20
    np.testing.assert_allclose(lapack.tridiagonal_values(diagonal, off), expected, rtol=0, atol=accuracy)
    vectors = lapack.tridiagonal_vectors(diagonal, off)
    lapack.back_transform(reflectors, tau, vectors)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(k), atol=50 * np.finfo(kind).eps)
    np.testing.assert_allclose(G @ vectors, vectors * expected, rtol=0, atol=10 * accuracy)


@pytest.mark.parametrize("way", ["cpu", "gpu"])
def test_inverses_and_roots_are_those_of_the_matrix(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setattr(cholesky, "_by_lapack", lambda matrix: way == "cpu")
    G = torch.from_numpy(symmetric(40, np.float64)).contiguous()
    L = cholesky.cholesky(G.clone())
    assert (L.triu(1) == 0).all()
    torch.testing.assert_close(L @ L.T, G)
    inverse = cholesky.inverse(G.clone(), torch.float64)
    assert torch.equal(inverse, inverse.T)
    torch.testing.assert_close(inverse @ G, torch.eye(40, dtype=torch.float64))


@pytest.mark.parametrize("way", ["cpu", "gpu"])
def test_roots_of_rank_deficient_matrices_are_floored(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setattr(cholesky, "_by_lapack", lambda matrix: way == "cpu")
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((40, 3)))
    L = cholesky.cholesky(x @ x.T)
    torch.testing.assert_close(L @ L.T, x @ x.T, rtol=1e-9, atol=1e-9)
    assert float(torch.linalg.svdvals(L)[-1]) > 1e-7 * float(torch.linalg.svdvals(L)[0])
    L = cholesky.cholesky(torch.zeros(4, 4, dtype=torch.float64))
    torch.testing.assert_close(L @ L.T, torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_gram_is_added_on_the_lower_triangle(kind: type) -> None:
    rows = np.random.default_rng(0).standard_normal((9, 5)).astype(kind)
    gram = np.asfortranarray(np.ones((5, 5), kind))
    lapack.add_gram(gram, rows)
    np.testing.assert_allclose(np.tril(gram), np.tril(rows.T @ rows + 1), rtol=1e-5)
    assert (gram[np.triu_indices(5, 1)] == 1).all()


def test_failure_is_an_error_not_a_result() -> None:
    broken = np.full((4, 4), np.nan, order="F")
    diagonal, off, _ = lapack.tridiagonalise(broken)
    with pytest.raises(ArithmeticError, match="dsterf failed"):
        lapack.tridiagonal_values(diagonal, off)
