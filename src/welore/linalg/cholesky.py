"""Cholesky factors of symmetric positive matrices, and inverses by them: LAPACK on the CPU, torch on a GPU."""

import torch
from torch import Tensor

from welore.linalg import _lapack as lapack

FLOOR = 1e-12  # of a matrix's largest eigenvalue: what is smaller counts as that


def cholesky(matrix: Tensor) -> Tensor:
    """Lower triangle L (n, n), matrix = L L^T; matrix: float64, overwritten.

    Rank-deficient matrices do no harm: eigenvalues below the floor count as the floor, those of zeros as ones.
    """
    diagonal = matrix.diagonal().clone()
    if _by_lapack(matrix):
        triangle = matrix.contiguous()  # LAPACK, in Fortran order, sees its lower part as the upper one
        positive = lapack.cholesky(triangle.numpy().T)
    else:
        triangle, info = torch.linalg.cholesky_ex(matrix)
        positive = int(info) == 0
    if positive and float(triangle.diagonal().min()) ** 2 > FLOOR * float(diagonal.max()):
        return triangle.tril_()
    matrix.diagonal().copy_(diagonal)
    values, vectors = torch.linalg.eigh(matrix, UPLO="U")
    return torch.linalg.qr(floored(values).sqrt()[:, None] * vectors.T, mode="r").R.T.contiguous()


def floored(values: Tensor) -> Tensor:
    """Eigenvalues (n,), those below the floor as the floor; ones if all are zero."""
    largest = float(values.max())
    return values.clamp(min=largest * FLOOR) if largest > 0 else torch.ones_like(values)


def inverse(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse (n, n) of a matrix, in `dtype`, exactly symmetric; matrix: float64, overwritten."""
    triangle = cholesky(matrix)
    if not _by_lapack(triangle):
        return torch.cholesky_inverse(triangle).to(dtype)
    lapack.invert(triangle.numpy().T)
    full = triangle.to(dtype)
    return full.add_(full.tril(-1).T)


def _by_lapack(matrix: Tensor) -> bool:
    return matrix.device.type == "cpu"
