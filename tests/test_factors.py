import numpy as np
import pytest
import torch

from welore.errors import WeLoreError
from welore.linalg import svd as factors
from welore.linalg.svd import Decomposition, Factors, Metric, Side, decompose, factorise, singular_values, working_bytes

SHAPES = [(7, 5), (5, 7), (1, 9), (9, 1), (64, 64), (33, 150), (150, 33)]


def matrix(m: int, n: int, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(m, n) * torch.rand(n).mul(4).exp()


def pair(found: Factors) -> tuple[torch.Tensor, torch.Tensor]:
    return found.A, found.B


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_are_those_of_a_float64_svd(shape: tuple[int, int], dtype: torch.dtype) -> None:
    W = matrix(*shape).to(dtype)
    expected = np.linalg.svd(W.double().numpy(), compute_uv=False)
    found = singular_values(W)
    assert found.dtype == np.float64
    assert found.shape == (min(shape),)
    # Squaring halves the digits: sigma is right to eps64 * sigma_max^2 / sigma, 1e-8 of sigma_max at worst.
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=3e-8 * expected[0])


def test_values_of_a_singular_matrix_are_finite_and_end_in_zero() -> None:
    low = matrix(40, 3) @ matrix(3, 30)
    found = singular_values(low)
    assert np.isfinite(found).all()
    assert (found[3:] < 1e-5 * found[0]).all()
    assert (singular_values(torch.zeros(4, 6)) == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_reach_the_eckart_young_optimum(shape: tuple[int, int]) -> None:
    W = matrix(*shape, seed=3)
    sigma = np.linalg.svd(W.double().numpy(), compute_uv=False)
    for rank in {1, max(1, min(shape) // 3), min(shape)}:
        A, B = pair(factorise(W, rank))
        assert A.shape == (shape[0], rank)
        assert B.shape == (rank, shape[1])
        error = torch.linalg.matrix_norm(W.double() - A.double() @ B.double()).item()
        optimum = float(np.sqrt((sigma[rank:] ** 2).sum()))
        if rank < min(shape):
            assert error <= optimum * (1 + 1e-6)
        else:  # nothing is cut: what remains is the rounding of float32
            assert error <= 1e-5 * sigma[0]


@pytest.mark.parametrize("shape", [(24, 15), (15, 24)])
def test_factors_share_the_singular_values_evenly(shape: tuple[int, int]) -> None:
    W = matrix(*shape)
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    A, B = pair(factorise(W, 6))
    torch.testing.assert_close(A.T @ A, torch.diag(S[:6]), rtol=1e-3, atol=1e-3 * float(S[0]))
    torch.testing.assert_close(B @ B.T, torch.diag(S[:6]), rtol=1e-3, atol=1e-3 * float(S[0]))
    torch.testing.assert_close(A @ B, (U[:, :6] * S[:6]) @ V[:6], rtol=1e-4, atol=1e-4 * float(S[0]))


@pytest.mark.parametrize("W", [torch.zeros(6, 4), torch.eye(5), matrix(20, 2) @ matrix(2, 12), matrix(8, 8) * 1e-30])
def test_degenerate_matrices_give_finite_factors(W: torch.Tensor) -> None:
    for rank in (1, min(W.shape)):
        A, B = pair(factorise(W, rank))
        assert torch.isfinite(A).all()
        assert torch.isfinite(B).all()
    torch.testing.assert_close(A @ B, W, rtol=1e-4, atol=1e-5 * float(W.abs().max()))


def optimum_of(W: torch.Tensor, metric: Metric | None) -> float:
    sigma = singular_values(W, metric)
    return float(np.sqrt((sigma[5:] ** 2).sum() / (sigma**2).sum()))


def residual(W: torch.Tensor, found: Factors, metric: Metric | None = None) -> float:
    """||W - A B||^2 / ||W||^2, in the norm of the metric."""
    sides = [torch.eye(n) for n in W.shape] if metric is None else [metric.outputs, metric.inputs]
    left, right = (root(side.double()) for side in sides if isinstance(side, torch.Tensor))
    error, scaled = (left @ X.double() @ right for X in (W - found.A.double() @ found.B.double(), W))
    return float(error.norm() / scaled.norm()) ** 2


@pytest.mark.parametrize("shape", SHAPES)
def test_kept_decomposition_gives_the_same_bits(shape: tuple[int, int]) -> None:
    W = matrix(*shape)
    kept = {name: tensor.clone() for name, tensor in decompose(W).tensors().items()}
    rank = max(1, min(shape) // 2)
    fresh, again = factorise(W, rank), factorise(W, rank, decomposition=Decomposition.from_tensors(kept))
    assert torch.equal(fresh.A, again.A)
    assert torch.equal(fresh.B, again.B)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("harm", ["turned", "doubled"])
def test_factors_that_miss_the_optimum_are_computed_again_in_float64(
    monkeypatch: pytest.MonkeyPatch, scaled: bool, harm: str
) -> None:
    W, metric = matrix(30, 20), Metric(weights(30, 1), weights(20, 2)) if scaled else None
    optimum = optimum_of(W, metric)
    right = factors.lapack.tridiagonal_vectors
    dtypes = []

    def poor_in_float32(diagonal: np.ndarray, off: np.ndarray) -> np.ndarray:
        dtypes.append(diagonal.dtype)
        vectors = right(diagonal, off)
        if diagonal.dtype == np.float32:
            if harm == "turned":
                vectors[:, -5] += 0.5 * vectors[:, -6]
            else:
                vectors[:, -5] = vectors[:, -1]
        return vectors

    monkeypatch.setattr(factors.lapack, "tridiagonal_vectors", poor_in_float32)
    found = factorise(W, 5, optimum, metric=metric)
    assert dtypes == [np.float32, np.float64]
    assert found.repaired
    assert found.A.dtype == torch.float32
    assert abs(found.excess) < 1e-12
    assert residual(W, found, metric) == pytest.approx(optimum**2, rel=1e-5)
    monkeypatch.undo()
    assert not factorise(W, 5, optimum, metric=metric).repaired


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_the_excess_is_what_the_factors_lose(
    monkeypatch: pytest.MonkeyPatch, scaled: bool, shape: tuple[int, int]
) -> None:
    W, metric = matrix(*shape), Metric(weights(shape[0], 1), weights(shape[1], 2)) if scaled else None
    optimum = optimum_of(W, metric)
    right = factors.lapack.tridiagonal_vectors

    def turned(diagonal: np.ndarray, off: np.ndarray) -> np.ndarray:
        vectors = right(diagonal, off)
        vectors[:, -5] += 0.5 * vectors[:, -6]
        return vectors

    monkeypatch.setattr(factors.lapack, "tridiagonal_vectors", turned)
    monkeypatch.setattr(factors, "EXCESS", 1.0)
    found = factorise(W, 5, optimum, metric=metric)
    lost = residual(W, found, metric) - optimum**2
    assert lost > 1e-5
    assert found.excess == pytest.approx(lost, rel=0.01)


@pytest.mark.parametrize("scaled", [False, True])
def test_the_decomposition_of_other_weights_is_refused(scaled: bool) -> None:
    metric = Metric(weights(30, 1), weights(20, 2)) if scaled else None
    W, other = matrix(30, 20), matrix(30, 20, seed=1)
    for stale in (decompose(W, metric), Decomposition.from_tensors(decompose(W, metric).tensors())):
        stale.factors(W, 5)
        with pytest.raises(WeLoreError, match="other weights"):
            stale.factors(other, 5)
        with pytest.raises(WeLoreError, match="other weights"):
            stale.factors(W[:, :12], 5)
    with pytest.raises(WeLoreError, match="other weights"):  # of the same weights, in another norm
        decompose(W, Metric(weights(30, 3), weights(20, 4))).factors(W, 5, optimum_of(W, metric))


@pytest.mark.parametrize("shape", [(4096, 11008), (11008, 4096)])
def test_a_matrix_needs_the_same_memory_lying_down(shape: tuple[int, int]) -> None:
    assert working_bytes(shape, scaled=False) == 12 * 4096 * 11008 + 16 * 4096**2
    assert working_bytes(shape, scaled=True) > 8 * (4096**2 + 11008**2) + working_bytes(shape, scaled=False) / 2


def test_matrices_with_one_side_in_common_share_its_root(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, made, make = weights(20, 2), [], factors._root
    monkeypatch.setattr(factors, "_root", lambda weight, dtype: made.append(len(weight)) or make(weight, dtype))
    shared = Side(inputs)
    for seed in (1, 3):
        W, outputs = matrix(30, 20, seed), weights(30, seed)
        ours = singular_values(W, Metric(outputs, shared))
        np.testing.assert_array_equal(ours, singular_values(W, Metric(outputs, inputs)))
    assert made.count(20) == 3


def test_optimum_of_other_weights_is_refused() -> None:
    with pytest.raises(WeLoreError, match="more of .* than the plan says"):
        factorise(matrix(30, 20), 5, 0.01)


@pytest.mark.parametrize("rank", [0, 6])
def test_impossible_rank_is_one_sentence(rank: int) -> None:
    with pytest.raises(WeLoreError, match="ranks from 1 to 5"):
        factorise(matrix(7, 5), rank)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", ["plain", "matrices", "diagonals"])
def test_the_way_of_gpus_gives_the_same(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], norm: str) -> None:
    """Tried on the CPU: torch.linalg in place of LAPACK, as for a matrix that lies on a GPU."""
    W, diagonal = matrix(*shape), norm == "diagonals"
    sides = weights(shape[0], 1, diagonal=diagonal), weights(shape[1], 2, diagonal=diagonal)
    metric = None if norm == "plain" else Metric(*sides)
    rank = max(1, min(shape) // 3)
    sigma, factored = singular_values(W, metric), factorise(W, rank, metric=metric)
    monkeypatch.setattr(factors, "_by_lapack", lambda W: False)
    digits = 1 if norm == "plain" else 10  # scaled matrices are multiplied in float32
    np.testing.assert_allclose(singular_values(W, metric), sigma, rtol=digits * 1e-6, atol=digits * 3e-8 * sigma[0])
    optimum = float(np.sqrt((sigma[rank:] ** 2).sum() / (sigma**2).sum()))
    decomposition = decompose(W, metric)
    assert "tau" not in decomposition.tensors()
    again = decomposition.factors(W, rank, optimum)
    assert not again.repaired
    if metric is None:
        torch.testing.assert_close(again.A @ again.B, factored.A @ factored.B, rtol=1e-4, atol=1e-5 * float(sigma[0]))
    assert residual(factored.A @ factored.B, again, metric) ** 0.5 < 1e-5
    stored = Decomposition.from_tensors(decomposition.tensors()).factors(W, rank, optimum)
    assert torch.equal(stored.A, again.A)
    assert torch.equal(stored.B, again.B)


def weights(k: int, seed: int, *, rank: int | None = None, diagonal: bool = False) -> torch.Tensor:
    """Second moments (k, k), badly conditioned; or a diagonal (k,)."""
    torch.manual_seed(seed)
    samples = torch.randn(rank or 3 * k, k) * torch.rand(k).mul(5).exp()
    moments = (samples.T @ samples / len(samples)).double()
    return moments.diagonal().clone() if diagonal else moments


def root(weight: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(torch.diag(weight) if weight.ndim == 1 else weight)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (1, 9), (9, 1), (40, 40), (33, 90), (90, 33)])
@pytest.mark.parametrize("diagonals", [(False, False), (True, False), (False, True), (True, True)])
def test_factors_are_the_best_in_the_norm_of_a_metric(shape: tuple[int, int], diagonals: tuple[bool, bool]) -> None:
    W = matrix(*shape, seed=5)
    metric = Metric(weights(shape[0], 1, diagonal=diagonals[0]), weights(shape[1], 2, diagonal=diagonals[1]))
    scaled = root(metric.outputs) @ W.double() @ root(metric.inputs)
    sigma = torch.linalg.svdvals(scaled)
    np.testing.assert_allclose(singular_values(W, metric), sigma, rtol=1e-6, atol=1e-6 * float(sigma[0]))
    for rank in {1, max(1, min(shape) // 3), min(shape) - 1} - {0}:
        best = float((sigma[rank:] ** 2).sum() / (sigma**2).sum()) ** 0.5
        found = factorise(W, rank, best, metric=metric)
        error = root(metric.outputs) @ (W.double() - found.A.double() @ found.B.double()) @ root(metric.inputs)
        assert float(error.norm() / scaled.norm()) ** 2 == pytest.approx(best**2, rel=1e-4, abs=1e-6)
        assert abs(found.excess) <= 1e-6
        torch.testing.assert_close(found.A.norm(dim=0), found.B.norm(dim=1), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shape", [(60, 150), (150, 60)])
def test_the_least_values_are_right_beside_outliers_of_the_statistics(shape: tuple[int, int]) -> None:
    """Products with the roots are in float32; the tail of the squares is what a plan reads."""
    W, sides = matrix(*shape), []
    for seed, n in enumerate(shape):
        torch.manual_seed(seed)
        samples = torch.randn(2 * n, n) * torch.logspace(0, -2, n) + 100 * torch.randn(2 * n, 1) * torch.eye(n)[:3].sum(
            0
        )
        moments = (samples.T @ samples / len(samples)).double()
        sides.append(moments + 1e-3 * moments.diagonal().mean() * torch.eye(n))
    squares, exact = (singular_values(X, Metric(*sides)) ** 2 for X in (W, W.double()))
    tail, best = (np.cumsum(x[::-1])[::-1] for x in (squares, exact))
    assert best[-1] < 1e-6 * best[0]
    np.testing.assert_allclose(tail, best, rtol=1e-5)


def test_a_metric_of_ones_is_no_metric() -> None:
    W = matrix(12, 20)
    metric = Metric(torch.ones(12), torch.eye(20))
    np.testing.assert_allclose(singular_values(W, metric), singular_values(W), rtol=1e-9, atol=1e-9)
    plain, scaled = factorise(W, 4), factorise(W, 4, metric=metric)
    torch.testing.assert_close(scaled.A @ scaled.B, plain.A @ plain.B, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_rank_deficient_and_zero_metrics_give_finite_factors(shape: tuple[int, int]) -> None:
    W = matrix(*shape)
    for outputs, inputs in (
        (weights(shape[0], 1, rank=3), weights(shape[1], 2, rank=2)),
        (torch.zeros(shape[0]), torch.zeros(shape[1], shape[1])),
    ):
        found = factorise(W, 5, metric=Metric(outputs, inputs))
        assert torch.isfinite(found.A).all()
        assert torch.isfinite(found.B).all()


def test_a_kept_decomposition_of_the_scaled_matrix_gives_the_same_factors() -> None:
    W, metric = matrix(30, 50), Metric(weights(30, 1), weights(50, 2))
    kept = Decomposition.from_tensors(decompose(W, metric).tensors())
    one, other = factorise(W, 7, decomposition=kept, metric=metric), factorise(W, 7, metric=metric)
    torch.testing.assert_close(one.A @ one.B, other.A @ other.B, rtol=1e-4, atol=1e-4)


def test_factors_that_miss_the_optimum_of_a_metric_are_refused() -> None:
    W, metric = matrix(30, 50), Metric(weights(30, 1), weights(50, 2))
    with pytest.raises(WeLoreError, match="other weights"):
        factorise(W, 7, 0.999, metric=metric)
