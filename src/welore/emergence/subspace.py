"""Similarity of gradients: their directions, and their leading subspaces. Tensors only.

Shapes: G (m, n), its shorter side k = min(m, n); U (k, r), orthonormal columns.
"""

import torch
from torch import Tensor


def leading(G: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Singular values (k,) of G, descending, float64, and at most `rank` singular vectors (k, rank) of its short side.

    From the float64 Gram matrix of that side, on the device of G.
    """
    wide = (G if G.shape[0] <= G.shape[1] else G.T).double()
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    return squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)[:, :rank].contiguous()


def overlaps(U: Tensor, V: Tensor) -> Tensor:
    """Share of one subspace inside another, 0 (orthogonal) to 1 (equal): (i, j) for U (i, k, r) and V (j, k, r).

    Orthonormal columns. norm(U^T V)^2 / r, WeLore section 3; r / k for independent random subspaces.
    """
    i, k, r = U.shape
    j = len(V)
    products = U.permute(0, 2, 1).reshape(i * r, k) @ V.permute(1, 0, 2).reshape(k, j * r)
    return products.square().reshape(i, r, j, r).sum((1, 3)) / r
