"""One matrix -> its singular values; one matrix + rank -> its two factors. Pure tensor mathematics.

Shapes: W (m, n) = (out_features, in_features), k = min(m, n), A (m, r), B (r, n), W ~ A B.

Which approximation is best depends on the norm: the plain one (Frobenius), or a Metric that weighs what enters and
what leaves the matrix.

Everything starts from the Gram matrix of the shorter side, (k, k), reduced to tridiagonal form; where float64 is
needed, and where float32 is enough and is checked: docs/concepts/decomposition.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from welore.errors import WeLoreError
from welore.linalg import _lapack as lapack

EXCESS = 1e-6  # share of ||W||^2 by which the factors may miss the optimum before float64 repeats them
BLOCK = 384  # rows of W, or columns, that are held in float64 at once


@dataclass(frozen=True)
class Metric:
    """The norm trace(G D H D^T)^(1/2) of an error D = W - A B: its rows weighed by G, its columns by H.

    outputs: G (m, m); inputs: H (n, n); symmetric and positive, or the diagonals of such, (m,) and (n,).
    """

    outputs: Tensor
    inputs: Tensor

    def sides(self, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """W (k, long), the shorter side first, and the weights of that side and of the other; float64, where W is."""
        wide = W.shape[0] <= W.shape[1]
        ordered = (self.outputs, self.inputs) if wide else (self.inputs, self.outputs)
        short, long = (weight.to(W.device, torch.float64) for weight in ordered)
        double = (W if wide else W.T).to(torch.float64, copy=True, memory_format=torch.contiguous_format)
        return double, short, long


@dataclass(frozen=True)
class Reduction:
    """The Gram matrix as Q T Q^T: T tridiagonal, Q in Householder reflectors.

    diagonal (k,) and off_diagonal (k - 1,): float64. tau (k - 1,) and reflectors (k, k), Fortran order: float32
    when they come from disk or are meant for it, else float64.
    """

    diagonal: NDArray[Any]
    off_diagonal: NDArray[Any]
    tau: NDArray[Any]
    reflectors: NDArray[Any]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that lie on disk between the values and the factors: 4 k^2 bytes. See `from_tensors`."""
        return {
            "diagonal": torch.from_numpy(self.diagonal),
            "off_diagonal": torch.from_numpy(self.off_diagonal),
            "tau": torch.from_numpy(self.tau.astype(np.float32)),
            "reflectors": torch.from_numpy(self.reflectors.T.astype(np.float32)),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Reduction":
        """The reduction that `tensors` wrote; its float32 factors have the same bits as before."""
        diagonal, off_diagonal, tau = (tensors[name].numpy() for name in ("diagonal", "off_diagonal", "tau"))
        return cls(diagonal, off_diagonal, tau, tensors["reflectors"].numpy().T)

    def values(self) -> NDArray[np.float64]:
        """Singular values (k,) of W, descending."""
        squares = lapack.tridiagonal_values(self.diagonal, self.off_diagonal)
        return np.sqrt(np.clip(squares[::-1], 0, None))

    def vectors(self, rank: int, precision: Any) -> NDArray[Any]:
        """The singular vectors (k, rank) of the `rank` largest values, on the shorter side of W, descending."""
        scale = np.abs(self.diagonal).max() or 1.0  # the squares of tiny weights would vanish in float32
        diagonal, off_diagonal = (x / scale for x in (self.diagonal, self.off_diagonal))
        vectors = lapack.tridiagonal_vectors(diagonal.astype(precision), off_diagonal.astype(precision))
        chosen = vectors[:, : -rank - 1 : -1].copy(order="F")
        lapack.back_transform(self.reflectors.astype(precision, copy=False), self.tau.astype(precision), chosen)
        return chosen


def reduce(W: Tensor, metric: Metric | None = None) -> Reduction:
    """Float64 reduction of the Gram matrix of W (m, n) on the CPU; W W^T if m <= n, else W^T W.

    metric: of W scaled by it, G^(1/2) W H^(1/2).
    """
    m, n = W.shape
    if metric is not None:
        scaled = np.asfortranarray(_scaled_gram(W.cpu(), metric).numpy())
        return Reduction(*lapack.tridiagonalise(scaled), scaled)
    gram = np.zeros((min(m, n), min(m, n)), order="F")
    rows = W.T if m <= n else W
    # A fresh copy, always laid out alike: the same W gives the same bits wherever it came from.
    copy = torch.empty(BLOCK, min(m, n), dtype=torch.float64)
    for block in rows.split(BLOCK):
        lapack.add_gram(gram, copy[: len(block)].copy_(block).numpy())
    return Reduction(*lapack.tridiagonalise(gram), gram)


def singular_values(W: Tensor, metric: Metric | None = None) -> NDArray[np.float64]:
    """Singular values of W (m, n): (k,), descending, float64. On a GPU where W lies on one. metric: see `reduce`."""
    if _by_lapack(W):
        return reduce(W, metric).values()
    squares = torch.linalg.eigvalsh(_gram(W.double()) if metric is None else _scaled_gram(W, metric))
    return squares.flip(0).clamp(min=0).sqrt().cpu().numpy()


@dataclass(frozen=True)
class Factors:
    """A (m, r) and B (r, n), and how good they are.

    excess: (||W||^2 - ||A B||^2) / ||W||^2 minus what the best factors leave; 0 if that was not known.
    repaired: whether float32 missed the optimum, so that float64 was needed.
    """

    A: Tensor
    B: Tensor
    excess: float = 0.0
    repaired: bool = False


def factorise(
    W: Tensor, rank: int, optimum: float | None = None, reduction: Reduction | None = None, metric: Metric | None = None
) -> Factors:
    """A = U_r sqrt(S_r) and B = sqrt(S_r) V_r^T: the best approximation A B of W of rank `rank`.

    W: any float dtype; A and B: float32 (float64 if W is). optimum: the relative error ||W - A B|| / ||W|| that
    the best factors have, if known; factors that miss it are computed again in float64. reduction: of this W, if
    it is at hand. Raises WeLoreError if W cannot have that optimum. WeLore section 4.2; Eckart & Young 1936.

    metric: the norm in which A B is best, and in which optimum and excess are meant; the reduction is the scaled one.
    With U the first singular vectors of G^(1/2) W H^(1/2), m <= n: A B = G^(-1/2) U U^T G^(1/2) W, so only the weights
    of the shorter side are ever inverted. Every column of A is as long as its row of B.
    """
    k = min(W.shape)
    if not 1 <= rank <= k:
        raise WeLoreError(f"rank is {rank}: a matrix of shape {tuple(W.shape)} has ranks from 1 to {k}")
    precision = torch.float64 if W.dtype == torch.float64 else torch.float32
    if metric is not None:
        return _factorise_scaled(W, rank, metric, optimum, reduction, precision)
    W = W.to(precision, copy=True, memory_format=torch.contiguous_format)
    for repaired in (False, True):
        W = W.double() if repaired else W
        A, B = _project(W, _vectors(W, rank, reduction, W.dtype))
        excess = 0.0 if optimum is None else residual(W, A, B) - optimum**2
        if abs(excess) <= EXCESS:
            return Factors(A.to(precision), B.to(precision), excess, repaired)
        del A, B
        reduction = None
    raise WeLoreError(f"rank {rank} leaves {excess:+.1e} more of ||W||^2 than the plan says: other weights?")


def _factorise_scaled(
    W: Tensor, rank: int, metric: Metric, optimum: float | None, reduction: Reduction | None, precision: torch.dtype
) -> Factors:
    """`factorise` in the norm of a metric: vectors in float32, all else in float64."""
    double, short, long = metric.sides(W)
    half, back = _roots(short)
    for vectors_in in (torch.float32, torch.float64):
        if not _by_lapack(W):
            values, vectors = torch.linalg.eigh(_scaled_gram(W, metric))
            vectors, total = vectors.flip(1)[:, :rank], float(values.sum())
        else:
            reduction = reduction or reduce(W, metric)
            kind = np.float32 if vectors_in == torch.float32 else np.float64
            vectors, total = torch.from_numpy(reduction.vectors(rank, kind)).double(), float(reduction.diagonal.sum())
        vectors = vectors / torch.linalg.vector_norm(vectors, dim=0)
        near, far = _times(half, vectors).T @ double, _times(back, vectors)
        energy = float((_times(long, near.T) * near.T).sum())
        excess = 0.0 if optimum is None or not total else 1 - energy / total - optimum**2
        if abs(excess) <= EXCESS:
            break
        reduction = None
    else:
        raise WeLoreError(f"rank {rank} leaves {excess:+.1e} more of the loss than the plan says: other weights?")
    lengths = [torch.linalg.vector_norm(near, dim=1), torch.linalg.vector_norm(far, dim=0)]
    a, b = (x.clamp(min=float(x.max()) * 1e-6 or 1.0) for x in lengths)
    near, far = (near * (b / a).sqrt()[:, None]).to(precision), (far * (a / b).sqrt()).to(precision)
    A, B = (far, near) if W.shape[0] <= W.shape[1] else (near.T, far.T)
    return Factors(A.contiguous(), B.contiguous(), excess, repaired=vectors_in == torch.float64)


def residual(W: Tensor, A: Tensor, B: Tensor) -> float:
    """(||W||^2 - ||A B||^2) / ||W||^2 (Frobenius): the squared relative error of factors that project W.

    From r x r products, in the precision of the factors, summed in float64. W = 0: 0.
    """
    # In blocks, for torch makes the whole W float64 to sum it.
    blocks = W.split(BLOCK)
    norm = sum(float(torch.linalg.vector_norm(rows, dtype=torch.float64)) ** 2 for rows in blocks)
    return 1 - float(((A.T @ A) * (B @ B.T)).sum(dtype=torch.float64)) / norm if norm else 0.0


def _by_lapack(W: Tensor) -> bool:
    """Whether LAPACK of this machine's processor does the work; torch does it where W lies on a GPU."""
    return W.device.type == "cpu"


def _gram(W: Tensor) -> Tensor:
    return W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W


def _scaled_gram(W: Tensor, metric: Metric) -> Tensor:
    """(k, k), float64: G^(1/2) W H W^T G^(1/2) if m <= n, else H^(1/2) W^T G W H^(1/2)."""
    double, short, long = metric.sides(W)
    half, _ = _roots(short)
    gram = _times(half, _times(half, _times(long, double.T).T @ double.T).T)
    return (gram + gram.T) / 2


def _times(weight: Tensor, X: Tensor) -> Tensor:
    """weight @ X; weight: (k, k), or the diagonal (k,) of one."""
    return weight[:, None] * X if weight.ndim == 1 else weight @ X


def _roots(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a weight (k, k) or (k,), and its inverse, in float64.

    By eigenvalues, so that rank-deficient weights do no harm: those below 1e-12 of the largest count as that; a weight
    of zeros counts as ones.
    """
    if weight.ndim == 1:
        root = _floored(weight).sqrt()
        return root, 1 / root
    values, vectors = torch.linalg.eigh(weight)
    root = _floored(values).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def _floored(values: Tensor) -> Tensor:
    largest = float(values.max())
    return values.clamp(min=largest * 1e-12) if largest > 0 else torch.ones_like(values)


def _vectors(W: Tensor, rank: int, reduction: Reduction | None, precision: torch.dtype) -> Tensor:
    """The first `rank` singular vectors (k, rank) on the shorter side of W, where W is, float32 or float64."""
    if not _by_lapack(W):
        return torch.linalg.eigh(_gram(W.to(precision)))[1].flip(1)[:, :rank]
    reduction = reduction or reduce(W)
    return torch.from_numpy(reduction.vectors(rank, np.float64 if precision == torch.float64 else np.float32))


def _project(W: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    """A and B from orthonormal vectors (k, r): W is projected on them; both factors get sqrt(S)."""
    wide = W.shape[0] <= W.shape[1]
    side = side / torch.linalg.vector_norm(side, dim=0)  # float32 vectors are 1e-6 too long or short
    other = side.T @ W if wide else W @ side
    sigma = torch.linalg.vector_norm(other, dim=1 if wide else 0)
    # Any positive scale gives the same product A B: where sigma is zero it must only not be zero.
    root = sigma.clamp(min=float(sigma[0]) * 1e-6 or 1.0).sqrt()
    side *= root  # both are our own: in place
    other /= root[:, None] if wide else root
    return (side, other) if wide else (other, side.T)
