"""Optimal Brain Surgeon for columns (Hassibi & Stork 1993): which to take out, and what the others become."""

import math

import torch
from torch import Tensor

from welore.linalg.cholesky import cholesky, inverse

AT_ONCE = 96  # groups that the neurons of an MLP are taken out in
COMPACT = 12  # groups after which their rows and columns, zero by then, are cut off
MOST = 5 / 6  # of the neurons of one MLP


def _group(width: int) -> int:
    return max(1, width // AT_ONCE)


def most_removed(width: int) -> int:
    """How many neurons of an MLP can be taken out at most: whole groups."""
    return int(MOST * width) // _group(width) * _group(width)


def whole_groups(width: int, count: int) -> int:
    """The least number of neurons in whole groups that is at least `count`."""
    return -(-count // _group(width)) * _group(width)


def removal(
    W: Tensor, outputs: Tensor, inputs: Tensor, *, most: int | None = None, dearest: float = math.inf
) -> tuple[Tensor, Tensor]:
    """In which order neurons are taken out, and what each then costs: (count,) and (count,) on the CPU.

    W (d, width) reads the neurons; outputs: G (d, d); inputs: H (width, width), positive definite; all on one device,
    which does the work. A group of them goes at once, those that cost least with the others refitted to what has gone
    before; each bears its share of the cost. most: of neurons, in whole groups; dearest: the last group is the first
    whose neurons cost more.

    The inverse of H, W and G W are made once, and what a group takes is subtracted from them. 2 width^2 + 3 d width
    numbers of float32 are in memory, for a moment width^2 of float64.
    """
    scale = math.ldexp(1.0, math.frexp(float(inputs.diagonal().mean()))[1])  # exact; float32 cannot hold tiny ones
    H = inverse(inputs.to(torch.float64, copy=True).div_(scale), torch.float32)
    W = W.to(torch.float32, copy=True)
    weighed = outputs.to(torch.float32) @ W
    width, group = W.shape[1], _group(W.shape[1])
    most = min(most_removed(width), width if most is None else most)
    left, gone_here = torch.arange(width, device=W.device), torch.zeros(width, dtype=torch.bool, device=W.device)
    order: list[Tensor] = []
    costs: list[float] = []
    while len(costs) + group <= most and not (costs and costs[-1] * scale > dearest):
        each = torch.linalg.vecdot(W, weighed, dim=0) / H.diagonal()
        gone = each.masked_fill_(gone_here, math.inf).topk(group, largest=False).indices
        small = torch.linalg.inv(H[gone][:, gone].double())
        total = float(((W[:, gone].T @ weighed[:, gone]).double() * small).sum())
        shared = (small @ H[gone].double()).float()
        order.append(left[gone])
        costs += [total / group] * group
        for rows in (W, weighed, H):
            rows.addmm_(rows[:, gone], shared, alpha=-1)
        gone_here[gone] = True
        if len(costs) % (COMPACT * group) == 0:
            stay = gone_here.logical_not().nonzero()[:, 0]
            W, weighed, H, left, gone_here = W[:, stay], weighed[:, stay], H[stay][:, stay], left[stay], gone_here[stay]
    return torch.cat(order or [left[:0]]).cpu(), torch.tensor(costs) * scale


def refit(W: Tensor, inputs: Tensor, neurons: Tensor) -> Tensor:
    """W' (d, count) of some neurons (count,), float64: least squares of W x - W' x[neurons]; inputs: H = E[x x^T].

    The neurons keep their columns of W, and share what the others said: W' = W[neurons] + W[gone] H[gone, neurons]
    H[neurons, neurons]^-1.
    """
    gone = torch.ones(W.shape[1], dtype=torch.bool, device=W.device).index_fill_(0, neurons, False).nonzero()[:, 0]
    rows, W = inputs[neurons].double(), W.double()
    said = rows[:, gone] @ W[:, gone].T
    return W[:, neurons] + torch.cholesky_solve(said, cholesky(rows[:, neurons])).T
