"""Pivoted storage: r rows of a rank-r matrix as they are, the others as combinations of them. Pure tensor maths.

Shapes: A (m, r), B (r, n), A B of rank r; P (r, n), C (m - r, r), order (m,) with A B = cat(P, C P)[order]. Nothing
is lost, and r (m + n) numbers become r (m + n - r): fewer than m n at every rank below min(m, n). PIFA, 2025.

Any r independent rows will do in exact arithmetic. In bfloat16 the rounding of P and of z = P x reaches the other
rows multiplied by C, so the rows are chosen such that no combination has a large coefficient.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from torch import Tensor

from welore.errors import WeLoreError
from welore.linalg import _lapack as lapack
from welore.linalg.svd import precision_of, product

LARGEST = 1.01  # no |C| above this


class Pivoted(NamedTuple):
    """P (r, n), C (m - r, r) and order (m,), int64: W = cat(P, C P)[order].

    The pivots, and the other rows, each stand in the order that they have in W.
    """

    P: Tensor
    C: Tensor
    order: Tensor


def pivoted(A: Tensor, B: Tensor) -> Pivoted:
    """The product A B in pivoted form; |C| <= 1.01. P and C in the dtype of A, C computed in float64.

    The pivots come from QR of A^T with column pivoting; then, while a |c| of C is larger, its row changes places with
    its pivot, which multiplies the volume of the pivots by |c| and so comes to an end (Goreinov et al. 2010, How to
    find a good submatrix; on the matrices of SmolLM2 none to six changes). An A of lower rank than r is no trouble:
    the superfluous pivots are kept and not used.
    """
    m, r = A.shape
    if B.shape[0] != r or r > m:
        raise WeLoreError(f"factors of shapes {tuple(A.shape)} and {tuple(B.shape)} are no A (m, r), B (r, n), r <= m")
    triangle = np.array(A.cpu().double().numpy().T, order="F")  # (r, m); torch has no pivoted QR, so the host makes it
    rows = lapack.pivoted_qr(triangle)
    C = _exchange(_coefficients(triangle), rows)
    pivots, others = np.argsort(rows[:r]), np.argsort(rows[r:])
    C = C[np.ix_(others, pivots)]
    rows = np.concatenate([rows[:r][pivots], rows[r:][others]])
    P = product(A[torch.from_numpy(rows[:r]).to(A.device)].to(precision_of(A)), B.to(precision_of(A)))
    return Pivoted(
        P.to(A.device, A.dtype),
        torch.from_numpy(C).to(A.device, A.dtype),
        torch.from_numpy(np.argsort(rows)).to(A.device),
    )


def _coefficients(triangle: NDArray[np.float64]) -> NDArray[np.float64]:
    """C (m - r, r) from R (r, m) = [R_1, R_2] of the pivoted QR: R_1^-1 R_2, transposed, without what is noise in R."""
    r, m = triangle.shape
    diagonal = np.abs(np.diagonal(triangle))
    rank = int((diagonal > diagonal[0] * max(m, r) * np.finfo(np.float64).eps).sum())
    C = np.zeros((m - r, r))
    if rank and m > r:
        C[:, :rank] = solve_triangular(triangle[:rank, :rank], triangle[:rank, r:]).T
    return C


def _exchange(C: NDArray[np.float64], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Exchange `rows`, in place, until no |C| exceeds LARGEST; the C that belongs to them."""
    r = C.shape[1]
    while C.size:
        i, j = divmod(int(np.abs(C).argmax()), r)
        c = C[i, j]
        if not abs(c) > LARGEST:
            break
        rows[[j, r + i]] = rows[[r + i, j]]
        row = C[i] / c
        row[j] = 1 - 1 / c
        # Row i becomes what the old pivot is now; all others put it in the place of the old pivot.
        C -= np.outer(C[:, j], row)
        C[i] = -row
        C[i, j] = 1 / c
    return C
