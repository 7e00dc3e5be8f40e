"""Values and factors of one matrix in the K-FAC norm, at the sizes of 1B and 7B models, one thread.

Ours, with Cholesky roots, against symmetric roots by eigenvalues, made for the values and again for the factors, all in
float64 but the vectors: the way of version 0.2. In turns; processor time, so other work on the machine hardly counts.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from welore.linalg import _lapack as lapack
from welore.linalg.svd import Decomposition, Factors, Metric, decompose
from welore.records import Record

HERE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
SHAPES = {(2048, 2048): 3, (4096, 11008): 1}  # (m, n), m <= n -> rounds
KEPT = 0.35  # rank over the smaller side


def moments(size: int, damping: float, seed: int) -> torch.Tensor:
    """Second moments (size, size), heavy-tailed, damped; float64."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(min(2 * size, 2048), size, generator=generator)
    samples *= torch.rand(size, generator=generator).mul(4).exp()
    product = (samples.T @ samples / len(samples)).double()
    product.diagonal().add_(damping * product.diagonal().mean())
    return product


def by_eigenvalues(W: torch.Tensor, G: torch.Tensor, H: torch.Tensor, rank: int) -> np.ndarray:
    """Singular values in the K-FAC norm of W (m, n), m <= n; the factors are computed, too."""
    X = W.double()

    def roots() -> tuple[torch.Tensor, torch.Tensor]:
        values, vectors = torch.linalg.eigh(G)
        return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T

    half, _ = roots()
    gram = half @ (half @ (H @ X.T).T @ X.T).T
    reflectors = np.asfortranarray(((gram + gram.T) / 2).numpy())
    del gram
    diagonal, off, tau = lapack.tridiagonalise(reflectors)
    sigma = np.sqrt(lapack.tridiagonal_values(diagonal, off)[::-1])
    stored = reflectors.astype(np.float32), tau.astype(np.float32)  # between values and factors
    del reflectors
    half, back = roots()
    scale = np.abs(diagonal).max()
    vectors = lapack.tridiagonal_vectors((diagonal / scale).astype(np.float32), (off / scale).astype(np.float32))
    U = vectors[:, : -rank - 1 : -1].copy(order="F")
    lapack.back_transform(*stored, U)
    first = torch.from_numpy(U).double()
    near, _far = (half @ first).T @ X, back @ first
    energy = float(((H @ near.T) * near.T).sum())  # the check against the optimum
    assert abs(energy / float((sigma[:rank] ** 2).sum()) - 1) < 1e-6
    return sigma


def by_cholesky(W: torch.Tensor, G: torch.Tensor, H: torch.Tensor, rank: int) -> tuple[np.ndarray, Factors]:
    """Ours: the same values, and the factors through the tensors that are stored in between."""
    decomposition = decompose(W, Metric(G, H))
    sigma = decomposition.values()
    optimum = float((sigma[rank:] ** 2).sum() / (sigma**2).sum()) ** 0.5
    return sigma, Decomposition.from_tensors(decomposition.tensors()).factors(W, rank, optimum)


def compared(shape: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Processor seconds of one matrix, the fastest of all rounds, and how far the two results are apart."""
    rank = max(1, round(KEPT * min(shape)))
    W = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.02
    G, H = moments(shape[0], 0.1, 1), moments(shape[1], 1e-3, 2)
    seconds: dict[str, list[float]] = {"by_eigenvalues": [], "ours": []}
    for _ in range(rounds):
        started = time.process_time()
        expected = by_eigenvalues(W, G, H, rank)
        seconds["by_eigenvalues"].append(time.process_time() - started)
        started = time.process_time()
        sigma, factors = by_cholesky(W, G, H, rank)
        seconds["ours"].append(time.process_time() - started)
    # Losses are sums of the last squares; those below a millionth of the whole decide nothing.
    tail, exact = (np.cumsum(x[::-1] ** 2)[::-1] for x in (sigma, expected))
    return {
        "shape": list(shape),
        "rank": rank,
        "seconds": {name: min(times) for name, times in seconds.items()},
        "by_eigenvalues_over_ours": min(seconds["by_eigenvalues"]) / min(seconds["ours"]),
        "error_at_rank": float(abs(tail[rank] / exact[rank] - 1)),
        "largest_error_of_a_loss": float(np.abs(tail / exact - 1)[exact > 1e-6 * exact[0]].max()),
        "excess": factors.excess,
        "repaired": factors.repaired,
    }


def main() -> None:
    """Measure, write docs/benchmarks/speed_scaled.json, print one line."""
    torch.set_num_threads(1)
    with threadpool_limits(1):
        matrices = [compared(shape, rounds) for shape, rounds in SHAPES.items()]
    Record("speed_scaled", {}, {"threads": 1, "kept": KEPT}, {"matrices": matrices}).save(HERE / "speed_scaled.json")
    ratios = (f"{n['by_eigenvalues_over_ours']:.1f}x at {n['shape'][0]} x {n['shape'][1]}" for n in matrices)
    print(f"values and factors in the K-FAC norm, ours over roots by eigenvalues: {', '.join(ratios)}")


if __name__ == "__main__":
    main()
