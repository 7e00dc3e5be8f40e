"""Optimal Brain Surgeon for columns (Hassibi & Stork 1993): which to take out, and what the others become."""

import math

import torch
from torch import Tensor

AT_ONCE = 96  # groups that the neurons of an MLP are taken out in
MOST = 5 / 6  # of the neurons of one MLP


def _group(width: int) -> int:
    return max(1, width // AT_ONCE)


def most_removed(width: int) -> int:
    """How many neurons of an MLP can be taken out at most: whole groups."""
    return int(MOST * width) // _group(width) * _group(width)


def removal(W: Tensor, outputs: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """In which order neurons are taken out, and what each then costs: (count,) and (count,) on the CPU.

    W (d, width) reads the neurons; outputs: G (d, d); inputs: H (width, width), positive definite. A group of them goes
    at once, those that cost least with the others refitted to what has gone before; each bears its share of the cost.
    """
    scale = math.ldexp(1.0, math.frexp(float(inputs.diagonal().mean()))[1])  # exact; float32 cannot invert tiny ones
    inverse = torch.linalg.inv(inputs.double() / scale).float()
    W, G = W.float(), outputs.float()
    group, left = _group(W.shape[1]), torch.arange(W.shape[1], device=W.device)
    order: list[Tensor] = []
    costs: list[float] = []
    while len(costs) < most_removed(len(left) + len(costs)):
        each = (W * (G @ W)).sum(0) / inverse.diagonal()
        gone = each.topk(group, largest=False).indices
        stay = torch.ones(len(each), dtype=torch.bool, device=W.device).index_fill_(0, gone, False)
        small = torch.linalg.inv(inverse[gone][:, gone].double())
        total = float(((W[:, gone].T @ G @ W[:, gone]).double() * small).sum())
        shared = (small @ inverse[gone].double()).float()
        order.append(left[gone])
        costs += [total / group] * group
        W, inverse = (W - W[:, gone] @ shared)[:, stay], (inverse - inverse[:, gone] @ shared)[stay][:, stay]
        left = left[stay]
    return torch.cat(order).cpu(), torch.tensor(costs) * scale


def refit(W: Tensor, inputs: Tensor, neurons: Tensor) -> Tensor:
    """W' (d, count) of some neurons (count,), float64: least squares of W x - W' x[neurons]; inputs: H = E[x x^T]."""
    H = inputs.double()
    return torch.linalg.solve(H[neurons][:, neurons], H[neurons] @ W.double().T).T
