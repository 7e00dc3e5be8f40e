"""Scalings: the norms in which the truncation of a matrix W is best, each made from statistics.

Plain truncation minimises the error of the weights. An error D of W costs E[(g^T D x)^2] / 2 of the loss to second
order, where x enters the matrix and g is the gradient of the loss at its output. E[g g^T] and E[x x^T] stand for it if
x and g are independent (K-FAC, arXiv 1503.05671). The other scalings know less.
"""

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from welore.calibration.statistics import Statistics
from welore.config import ASVD, KFAC, NONE, WHITENING, current_name
from welore.errors import WeLoreError, choose
from welore.linalg.svd import Metric, Side
from welore.models.targets import Target

DAMPING_INPUTS, DAMPING_OUTPUTS = 1e-3, 1e-1  # of the mean diagonal: directions that the sample has not shown
ASVD_ALPHA = 0.5
SHARED_SIDES = 4  # are remembered, the last ones used


class Sides:
    """The weights of sides that several matrices share, of the matrices in work: gate and up read the same inputs."""

    def __init__(self) -> None:
        self._sides: dict[Hashable, Side] = {}
        self._lock = threading.Lock()

    def get(self, name: str, part: slice, make: Callable[[], Tensor]) -> Side:
        """The side of a part of a statistic; make: makes its weight."""
        key = name, part.start, part.stop
        with self._lock:
            side = self._sides.pop(key, None) or Side(make)
            self._sides[key] = side
            if len(self._sides) > SHARED_SIDES:
                del self._sides[next(iter(self._sides))]
            return side


@dataclass(frozen=True)
class Scaling:
    """A norm for every matrix.

    unit: "loss" if the squares of the scaled values are losses, in one unit for the whole model; else "relative".
    metric: makes the norm of a matrix; None is the plain norm.
    block_split: whether long matrices are best split in blocks. measured: whether losses that `calibrate` measures are
    those of its components.
    """

    unit: Literal["loss", "relative"]
    metric: Callable[[Statistics, Target, Sides], Metric] | None = None
    block_split: bool = False
    measured: bool = False


def asvd(statistics: Statistics, target: Target, sides: Sides) -> Metric:
    """Columns scaled by E[|x_j|]^alpha. ASVD, arXiv 2312.05821, with its alpha of 0.5."""
    magnitudes = _known(statistics.magnitudes(target.layer, target.columns), statistics, target).double()
    scale = (magnitudes + DAMPING_INPUTS * magnitudes.mean()) ** ASVD_ALPHA
    return Metric(torch.ones(target.shape[0]), scale**2)


def whitening(statistics: Statistics, target: Target, sides: Sides) -> Metric:
    """The error of the outputs on the text of the statistics, which SVD-LLM (arXiv 2403.07378) minimises.

    All outputs of a matrix weigh the same: the mean of E[g_i^2]. That moves no singular vector, but makes the values
    of different matrices comparable.
    """
    gradients = _output_gradients(statistics, target).diagonal().mean()
    return Metric(gradients.repeat(target.shape[0]), _input_side(statistics, target, sides))


def kfac(statistics: Statistics, target: Target, sides: Sides) -> Metric:
    """Both sides: the rise of the loss, as far as inputs and gradients are independent."""

    def outputs() -> Tensor:
        return damped(_output_gradients(statistics, target), DAMPING_OUTPUTS)

    shared = target.grid[1] > 1  # by the blocks beside each other
    side = sides.get(f"{target.layer}.outputs", target.rows, outputs) if shared else Side(outputs)
    return Metric(side, _input_side(statistics, target, sides, statistics.shrinkage))


SCALINGS: dict[str, Scaling] = {
    NONE: Scaling("relative"),
    ASVD: Scaling("relative", asvd),
    WHITENING: Scaling("loss", whitening),
    KFAC: Scaling("loss", kfac, block_split=True, measured=True),
}


def scaling_of(name: str) -> Scaling:
    """The scaling of a name, also of version 0.1 ("input"); WeLoreError for an unknown one."""
    return choose("scaling", current_name(name), SCALINGS)


def metric(name: str, statistics: Statistics | None, target: Target, sides: Sides | None = None) -> Metric | None:
    """The norm of a scaling for one matrix; None is the plain one, also for a matrix that no token reached.

    sides: of the matrices in work with these statistics.
    """
    scaling = scaling_of(name)
    if scaling.metric is None:
        return None
    if statistics is None:
        raise WeLoreError(f"scaling {name} needs statistics: make them with `welore calibrate MODEL -o FILE`")
    return scaling.metric(statistics, target, sides or Sides()) if statistics.knows(target.layer) else None


def outliers(W: Tensor, statistics: Statistics, target: Target) -> float:
    """Share of the weights whose |W_ij| rms(x_j) exceeds five times its mean over the matrix. OWL, section 3, M = 5."""
    rms = _inputs(statistics, target).diagonal().clamp(min=0).sqrt()
    saliency = W.float().abs() * rms.to(W.device)
    return float((saliency > 5 * saliency.mean()).double().mean())


def damped(moments: Tensor, damping: float) -> Tensor:
    """The matrix of second moments, changed in place: a share of its mean diagonal is added to the diagonal."""
    moments.diagonal().add_(damping * moments.diagonal().mean())
    return moments


def regularized(inputs: Tensor, shrinkage: float) -> Tensor:
    """E[x x^T] of a sample, changed in place: shrunk by a share towards its own diagonal, and damped."""
    diagonal = inputs.diagonal().clone()
    inputs.mul_(1 - shrinkage).diagonal().copy_(diagonal)
    return damped(inputs, DAMPING_INPUTS)


def _input_side(statistics: Statistics, target: Target, sides: Sides, shrinkage: float = 0.0) -> Side:
    def inputs() -> Tensor:
        return regularized(_inputs(statistics, target), shrinkage)

    owner = statistics.shared.get(target.layer, target.layer)
    shared = target.grid[0] > 1 or sum(other == owner for other in statistics.shared.values()) > 1
    return sides.get(f"{owner}.inputs", target.columns, inputs) if shared else Side(inputs)


def _inputs(statistics: Statistics, target: Target) -> Tensor:
    """E[x x^T] of the inputs of W."""
    return _known(statistics.inputs(target.layer, target.columns), statistics, target).double()


def _output_gradients(statistics: Statistics, target: Target) -> Tensor:
    """E[g g^T] of the gradients at the outputs of W."""
    return _known(statistics.outputs(target.layer, target.rows), statistics, target).double()


def _known(statistic: Tensor | None, statistics: Statistics, target: Target) -> Tensor:
    if statistic is None:
        raise WeLoreError(f"the statistics of {statistics.model.name} lack {target.layer}: make them with its targets")
    return statistic
