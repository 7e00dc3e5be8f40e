import numpy as np
import pytest
import scipy.linalg

from welore.linalg import _lapack as lapack


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
