"""One matrix -> its singular values; one matrix + rank -> its two factors. Pure tensor mathematics.

Shapes: W (m, n) = (out_features, in_features), k = min(m, n), A (m, r), B (r, n), W ~ A B; X (k, l) is W, its shorter
side first.

Which approximation is best depends on the norm: the plain one (Frobenius), or a Metric that weighs what enters and
what leaves the matrix.

Everything starts from the Gram matrix of the shorter side, (k, k); where float64 is needed, and where float32 is enough
and is checked: docs/concepts/decomposition.md.
"""

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from welore.errors import WeLoreError
from welore.linalg import _lapack as lapack
from welore.linalg.cholesky import cholesky, floored

EXCESS = 1e-6  # share of ||W||^2 by which the factors may miss the optimum before float64 repeats them
OTHER = 1e-4  # of ||W||: another matrix differs by more from the one that was decomposed, rounding by less
PROBES = 2  # random vectors that the factors are tried on
SOME = 16  # rows of X by which it is known again
BLOCK = 384  # rows of W, or columns, that are held in float64 at once


class Side:
    """A weight of one side of a matrix, symmetric and positive (n, n) or the diagonal (n,) of one, and its root.

    The root is made when it is first asked for, once, also by several threads; the weight is then let go. Give one
    Side to all metrics that share a side: gate and up read the same inputs, as do q, k and v.
    """

    def __init__(self, weight: Tensor | Callable[[], Tensor]) -> None:
        """weight: or what makes it, a tensor of nobody else's, when the root is asked for."""
        self._weight: Tensor | Callable[[], Tensor] | None = weight
        self._root: tuple[Tensor, int] | None = None
        self._lock = threading.Lock()

    def root(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, int]:
        """L and e: weight = 4^e L L^T; L is a lower triangle (n, n), or the diagonal (n,) of one, of entries near 1."""
        with self._lock:
            if self._weight is not None:
                self._root, self._weight = _root(self._fresh(device), dtype), None
            assert self._root is not None
            half, exponent = self._root
        return half.to(device, dtype), exponent

    def _fresh(self, device: torch.device) -> Tensor:
        """The weight in float64, which may be overwritten."""
        if isinstance(self._weight, Tensor):
            return self._weight.to(device, torch.float64, copy=True)
        assert self._weight is not None
        return self._weight().to(device, torch.float64)


@dataclass(frozen=True)
class Metric:
    """The norm trace(G D H D^T)^(1/2) of an error D = W - A B: its rows weighed by G, its columns by H.

    outputs: G (m, m); inputs: H (n, n); symmetric and positive, or the diagonals of such, (m,) and (n,); or Side
    of such, which share their roots.
    """

    outputs: Tensor | Side
    inputs: Tensor | Side

    def sides(self, shape: tuple[int, ...]) -> tuple[Side, Side]:
        """The weights of the shorter side of a matrix of this shape, and of the longer one."""
        short, long = (self.outputs, self.inputs) if shape[0] <= shape[1] else (self.inputs, self.outputs)
        return _side(short), _side(long)


def _side(weight: Tensor | Side) -> Side:
    return weight if isinstance(weight, Side) else Side(weight)


def _root(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """`Side.root` of a float64 weight, which is overwritten."""
    largest = float((weight if weight.ndim == 1 else weight.diagonal()).max())
    exponent = math.frexp(largest)[1] // 2 if largest > 0 else 0  # 4^e is exact, and float32 cannot hold tiny ones
    half = floored(weight).sqrt() if weight.ndim == 1 else cholesky(weight)
    return half.mul_(2.0**-exponent).to(dtype), exponent


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


@dataclass(frozen=True)
class Decomposition(ABC):
    """All singular values of a matrix, and all that its factors of any rank need beside the matrix itself.

    image: some rows of X times a fixed vector, by which another matrix is told. scaled: whether there was a metric.
    """

    image: Tensor
    scaled: bool

    @abstractmethod
    def squares(self) -> NDArray[np.float64]:
        """The squares of the singular values (k,), ascending; those that are zero may be slightly negative."""

    @abstractmethod
    def total(self) -> float:
        """The sum of the squares."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors to store between the values and the factors, on the CPU: 4 k^2 bytes. See `from_tensors`."""

    @abstractmethod
    def sides(self, rank: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """L U and L^-T U, (k, rank) each, and the energy (rank,) that each vector of U has, float64.

        U: the first vectors of L^T X R, of the best factors (L U)^T X = B and L^-T U = A if m <= n. Computed on the
        device if that is a GPU's decomposition, else on the CPU.
        """

    def values(self) -> NDArray[np.float64]:
        """Singular values (k,) of W, in the norm of the metric, descending."""
        return np.sqrt(np.clip(self.squares()[::-1], 0, None))

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> "Decomposition":
        """The decomposition that `tensors` wrote; its factors have the same bits as before."""
        parts: dict[str, Any] = {**tensors, "scaled": bool(tensors["scaled"])}
        return Tridiagonal(**parts) if "tau" in parts else Spectral(**parts)

    def factors(self, W: Tensor, rank: int, optimum: float | None = None) -> Factors:
        """The best approximation A B of rank `rank` of the matrix that was decomposed; see `factorise`."""
        k = min(W.shape)
        if not 1 <= rank <= k:
            raise WeLoreError(f"rank is {rank}: a matrix of shape {tuple(W.shape)} has ranks from 1 to {k}")
        precision, wide = precision_of(W), W.shape[0] <= W.shape[1]
        near, far, excess, repaired = self._checked(rank, precision, W.device, optimum)
        # A fresh copy, always laid out alike: the same W gives the same bits wherever it came from.
        W = W.to(precision, copy=True, memory_format=torch.contiguous_format)
        X = W if wide else W.T
        image, expected = _image(X), self.image.to(X.device)
        if len(image) != len(expected) or not float((image - expected).norm()) <= OTHER * float(X.norm()):
            raise WeLoreError("the decomposition is that of other weights: compute it again")
        projected = product(near.T, X) if wide else product(W, near)
        rows = projected if wide else projected.T
        lengths = torch.linalg.vector_norm(rows, dim=1), torch.linalg.vector_norm(far, dim=0)
        # Any positive scale gives the same product A B: where a singular value is zero it must only not be zero.
        a, b = (x.clamp(min=float(x.max()) * 1e-6 or 1.0) for x in lengths)
        rows *= (b / a).sqrt()[:, None]  # both are our own: in place
        far *= (a / b).sqrt()
        A, B = (far, rows) if wide else (rows.T, far.T)
        return Factors(A.contiguous(), B.contiguous(), excess, repaired)

    def _checked(
        self, rank: int, precision: torch.dtype, device: torch.device, optimum: float | None
    ) -> tuple[Tensor, Tensor, float, bool]:
        """L U, L^-T U, their excess, and whether float64 was needed for them."""
        total = self.total()
        for dtype in dict.fromkeys((precision, torch.float64)):
            near, far, energy = self.sides(rank, dtype, device)
            if optimum is None or total <= 0:
                excess = 0.0
                break
            excess = 1 - float(energy.sum()) / total + _missed(near, far, energy) / total - optimum**2
            if abs(excess) <= EXCESS:
                break
        else:
            raise WeLoreError(f"rank {rank} leaves {excess:+.1e} more of the loss than the plan says: other weights?")
        return near.to(device, precision), far.to(device, precision), excess, dtype != precision


def _missed(near: Tensor, far: Tensor, energy: Tensor) -> float:
    """||(U^T U - I) S||^2, S^2 the energies: what factors lose that do not project, estimated by random vectors."""
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(len(energy), PROBES, generator=generator, dtype=torch.float64).to(energy.device)
    probes *= energy.clamp(min=0).sqrt()[:, None]
    sent = probes.to(near.dtype)
    return float(((product(near.T, product(far, sent)) - sent).double() ** 2).sum()) / PROBES


@dataclass(frozen=True)
class Tridiagonal(Decomposition):
    """The Gram matrix as Q T Q^T: T tridiagonal, Q in Householder reflectors. By LAPACK, on the CPU.

    diagonal (k,) and off_diagonal (k - 1,): float64; tau (k - 1,) and packed (k, k), in float32 unless W is float64.
    packed: the reflectors above the diagonal of the transposed matrix that LAPACK leaves, and L on and below it.
    """

    diagonal: Tensor
    off_diagonal: Tensor
    tau: Tensor
    packed: Tensor

    def squares(self) -> NDArray[np.float64]:
        """See Decomposition."""
        return lapack.tridiagonal_values(self.diagonal.numpy(), self.off_diagonal.numpy())

    def total(self) -> float:
        """See Decomposition."""
        return float(self.diagonal.sum())

    def tensors(self) -> dict[str, Tensor]:
        """See Decomposition."""
        names = ("image", "diagonal", "off_diagonal", "tau", "packed")
        return {name: getattr(self, name) for name in names} | {"scaled": torch.tensor(self.scaled)}

    def sides(self, rank: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """See Decomposition."""
        kind = np.float64 if dtype == torch.float64 else np.float32
        scale = float(self.diagonal.abs().max()) or 1.0  # the squares of tiny weights would vanish in float32
        diagonal, off = ((x.numpy() / scale) for x in (self.diagonal, self.off_diagonal))
        vectors = lapack.tridiagonal_vectors(diagonal.astype(kind), off.astype(kind))
        U = vectors[:, : -rank - 1 : -1].copy(order="F")
        del vectors
        energy = _rayleigh(diagonal, off, U) * scale
        packed = self.packed.numpy().T.astype(kind, copy=False)
        lapack.back_transform(packed, self.tau.numpy().astype(kind, copy=False), U)
        U /= np.sqrt(np.einsum("ij,ij->j", U, U))  # float32 vectors are 1e-6 too long or short
        near, far = U, U.copy(order="F")
        if self.scaled:
            lapack.times_triangle(packed, near, side=b"L", transposed=b"T")
            lapack.solve_triangle(packed, far)
        return torch.from_numpy(near), torch.from_numpy(far), torch.from_numpy(energy)


def _rayleigh(diagonal: NDArray[np.float64], off: NDArray[np.float64], V: NDArray[Any]) -> NDArray[np.float64]:
    """v^T T v / v^T v of every column v of V (k, r)."""
    energies = [np.empty(0)]
    for start in range(0, V.shape[1], BLOCK):
        v = V[:, start : start + BLOCK].astype(np.float64)
        mixed = 2 * np.einsum("i,ij,ij->j", off, v[:-1], v[1:])
        energies.append((diagonal @ np.square(v, out=v) + mixed) / v.sum(0))
    return np.concatenate(energies)


@dataclass(frozen=True)
class Spectral(Decomposition):
    """The eigenvectors of the Gram matrix, where W lies on a GPU.

    energies (k,): the squares of the singular values, descending, float64; vectors (k, k): L U, columns in that order.
    """

    energies: Tensor
    vectors: Tensor

    def squares(self) -> NDArray[np.float64]:
        """See Decomposition."""
        return self.energies.flip(0).cpu().numpy()

    def total(self) -> float:
        """See Decomposition."""
        return float(self.energies.sum())

    def tensors(self) -> dict[str, Tensor]:
        """See Decomposition."""
        parts = {name: getattr(self, name).cpu() for name in ("image", "energies", "vectors")}
        return parts | {"scaled": torch.tensor(self.scaled)}

    def sides(self, rank: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """See Decomposition."""
        vectors = self.vectors.to(device, dtype)
        near = vectors[:, :rank]
        # U is orthogonal: L^-T U is the inverse of (L U)^T.
        far = torch.linalg.inv(vectors.double())[:rank].T.to(dtype) if self.scaled else near.clone()
        return near, far, self.energies[:rank].to(device)


def decompose(W: Tensor, metric: Metric | None = None) -> Decomposition:
    """The decomposition of W (m, n), computed where W lies; from the float64 Gram matrix of its shorter side.

    metric: of W scaled by it, L^T X R with G = L L^T and H = R R^T if m <= n.
    """
    half, exponent, X = None, 0, W if W.shape[0] <= W.shape[1] else W.T
    image, precision = _image(X), precision_of(W)
    if metric is not None:
        half, exponent, X = _scaled(X, metric.sides(W.shape), precision)
    if not _by_lapack(W):
        double = X.double()
        energies, vectors = torch.linalg.eigh(double @ double.T)
        del X, double
        vectors = vectors.flip(1)
        if half is not None:
            half = half.double()
            vectors = half[:, None] * vectors if half.ndim == 1 else half @ vectors
        return Spectral(image, half is not None, energies.flip(0) * 4.0**exponent, vectors.to(precision))

    gram = np.zeros((len(X), len(X)), order="F")
    copy = torch.empty(BLOCK, len(X), dtype=torch.float64)
    for block in X.T.split(BLOCK):
        lapack.add_gram(gram, copy[: len(block)].copy_(block).numpy())
    del X, copy
    diagonal, off, tau = (torch.from_numpy(x) for x in lapack.tridiagonalise(gram))
    packed = torch.from_numpy(gram.T).to(precision)
    if half is not None:
        packed = packed.triu_(1) + (torch.diag(half) if half.ndim == 1 else half)
    return Tridiagonal(
        image, half is not None, diagonal * 4.0**exponent, off * 4.0**exponent, tau.to(precision), packed
    )


def working_bytes(shape: tuple[int, int], *, scaled: bool) -> int:
    """Bytes that a matrix of this shape takes at most while it is decomposed or factored on the CPU.

    W itself in float32 is counted; scaled: the weights of the metric, too, in float64.
    """
    k, long = sorted(shape)
    return max(12 * k * long + 16 * k * k, (8 * k * long + 28 * k * k + 12 * long * long) if scaled else 0)


def singular_values(W: Tensor, metric: Metric | None = None) -> NDArray[np.float64]:
    """Singular values of W (m, n): (k,), descending, float64. On a GPU where W lies on one. metric: see `decompose`."""
    return decompose(W, metric).values()


def factorise(
    W: Tensor,
    rank: int,
    optimum: float | None = None,
    decomposition: Decomposition | None = None,
    metric: Metric | None = None,
) -> Factors:
    """A = U_r sqrt(S_r) and B = sqrt(S_r) V_r^T: the best approximation A B of W of rank `rank`.

    W: any float dtype; A and B: float32 (float64 if W is). optimum: the relative error ||W - A B|| / ||W|| that
    the best factors have, if known; factors that miss it are computed again in float64. decomposition: of this W in
    this metric, if it is at hand. Raises WeLoreError if W cannot have that optimum. WeLore section 4.2; Eckart & Young
    1936.

    metric: the norm in which A B is best, and in which optimum and excess are meant. With U the first singular vectors
    of L^T W R, m <= n, G = L L^T and H = R R^T: A B = L^-T U U^T L^T W, so only the weights of the shorter side are
    ever inverted. Every column of A is as long as its row of B.
    """
    return (decomposition or decompose(W, metric)).factors(W, rank, optimum)


def precision_of(W: Tensor) -> torch.dtype:
    """The dtype of the factors of W, float32 or float64."""
    return torch.float64 if W.dtype == torch.float64 else torch.float32


def _by_lapack(W: Tensor) -> bool:
    """Whether LAPACK of this machine's processor does the work; torch does it where W lies on a GPU."""
    return W.device.type == "cpu"


def product(X: Tensor, Y: Tensor) -> Tensor:
    """X @ Y; on the CPU by numpy, twice as fast as torch where a side is short."""
    return torch.from_numpy(X.numpy() @ Y.numpy()) if _by_lapack(X) else X @ Y


def _image(X: Tensor) -> Tensor:
    """Some rows of X, spread over all of it, times a fixed vector; in float32, in float64 if X is."""
    rows = X[:: -(-len(X) // SOME)].to(precision_of(X))
    return rows @ torch.arange(X.shape[1], dtype=torch.float64).cos().to(X.device, rows.dtype)


def _scaled(X: Tensor, sides: tuple[Side, Side], precision: torch.dtype) -> tuple[Tensor, int, Tensor]:
    """L, e and L^T X R of X (k, l), the last without its factor of 2^e."""
    (short, e), (long, f) = (side.root(X.device, precision) for side in sides)
    X = X.to(precision, copy=True, memory_format=torch.contiguous_format)
    if short.ndim == 1:
        X *= short[:, None]
    if long.ndim == 1:
        X *= long
    if not _by_lapack(X):
        X = X if short.ndim == 1 else short.T @ X
        return short, e + f, X if long.ndim == 1 else X @ long
    # In Fortran order the memory of X is X^T (l, k), that of L is L^T: X^T L, then R^T X^T, in place.
    if short.ndim == 2:
        lapack.times_triangle(short.numpy().T, X.numpy().T, side=b"R", transposed=b"T")
    if long.ndim == 2:
        lapack.times_triangle(long.numpy().T, X.numpy().T, side=b"L", transposed=b"N")
    return short, e + f, X
