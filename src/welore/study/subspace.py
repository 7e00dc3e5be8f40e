"""6 - How alike two gradients are: cosine, overlap of leading subspaces, effective and stable rank. Tensors only.

Shapes: G (m, n), its shorter side k = min(m, n); U (k, r), orthonormal columns.
"""

import torch
from torch import Tensor


def leading(G: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Singular values (k,) of G, descending, float64, and the first `rank` singular vectors (k, rank) of the shorter
    side; all of them if there are fewer. From the float64 Gram matrix of that side, where G lies.
    """
    wide = (G if G.shape[0] <= G.shape[1] else G.T).double()
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    return squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)[:, :rank].contiguous()


def cosine(G: Tensor, H: Tensor) -> float:
    """<G, H> / (norm(G) norm(H)); 0 where one of them is zero."""
    norms = float(torch.linalg.vector_norm(G)) * float(torch.linalg.vector_norm(H))
    return float((G * H).sum()) / norms if norms else 0.0


def overlap(U: Tensor, V: Tensor) -> float:
    """Share of one subspace inside another, 0 (orthogonal) to 1 (equal).

    U, V: (k, r), orthonormal columns. norm(U^T V)^2 / r, WeLore section 3; r / k for independent random subspaces.
    """
    return float((U.T @ V).square().sum()) / U.shape[1]
