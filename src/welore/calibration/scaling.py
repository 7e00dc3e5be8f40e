"""Scalings: in which norm a truncation of W is best. Statistics of a calibration -> the Metric of every matrix.

Plain truncation minimises the error of the weights; what hurts a model is the error of its outputs, and in the end
its loss. Let x be what enters the matrix and g the gradient of the loss at what leaves it: an error D of W costs
E[(g^T D x)^2] / 2 of the loss to second order, and E[g g^T] and E[x x^T] stand for it if x and g are independent
(K-FAC, arXiv 1503.05671). The other scalings know less.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from welore.calibration.statistics import Statistics
from welore.config import ASVD, INPUT, KFAC, NONE
from welore.errors import WeLoreError, choose
from welore.linalg.svd import Metric
from welore.models.targets import Target

DAMPING_INPUTS, DAMPING_OUTPUTS = 1e-3, 1e-1  # of the mean diagonal: directions that the sample has not shown
ASVD_ALPHA = 0.5


def asvd(calibration: Statistics, target: Target) -> Metric:
    """Columns scaled by E[|x_j|]^alpha. ASVD, arXiv 2312.05821, with its alpha of 0.5."""
    magnitudes = _known(calibration.magnitudes(target.layer), calibration, target.layer)[target.columns].double()
    scale = (magnitudes + DAMPING_INPUTS * magnitudes.mean()) ** ASVD_ALPHA
    return Metric(torch.ones(target.shape[0]), scale**2)


def inputs(calibration: Statistics, target: Target) -> Metric:
    """The error of the outputs on the calibration's text, which SVD-LLM (arXiv 2403.07378) minimises.

    All outputs of a matrix weigh the same: the mean of E[g_i^2]. That moves no singular vector, but makes the values
    of different matrices comparable.
    """
    gradients = _leaving(calibration, target).diagonal().mean()
    return Metric(gradients.repeat(target.shape[0]), damped(_entering(calibration, target), DAMPING_INPUTS))


def kfac(calibration: Statistics, target: Target) -> Metric:
    """Both sides: the rise of the loss, as far as inputs and gradients are independent."""
    return Metric(
        damped(_leaving(calibration, target), DAMPING_OUTPUTS),
        damped(_entering(calibration, target), DAMPING_INPUTS),
    )


SCALINGS: dict[str, Callable[[Statistics, Target], Metric | None]] = {
    NONE: lambda calibration, target: None,
    ASVD: asvd,
    INPUT: inputs,
    KFAC: kfac,
}


def metric(scaling: str, calibration: Statistics | None, target: Target) -> Metric | None:
    """The norm for one matrix; None is the plain one, also for a matrix that the calibration never reached."""
    make = choose("scaling", scaling, SCALINGS)
    if scaling == NONE:
        return None
    if calibration is None:
        raise WeLoreError(f"scaling {scaling} needs a calibration: make one with `welore calibrate MODEL -o FILE`")
    return make(calibration, target) if calibration.counts.get(target.layer) else None


def outliers(W: Tensor, calibration: Statistics, target: Target) -> float:
    """Share of the weights whose |W_ij| rms(x_j) exceeds five times its mean over the matrix. OWL, section 3, M = 5."""
    rms = _entering(calibration, target).diagonal().clamp(min=0).sqrt()
    found = W.float().abs() * rms.to(W.device)
    return float((found > 5 * found.mean()).double().mean())


def _entering(calibration: Statistics, target: Target) -> Tensor:
    """E[x x^T] of what enters W."""
    found = _known(calibration.inputs(target.layer), calibration, target.layer)
    return found[target.columns, target.columns].double()


def _leaving(calibration: Statistics, target: Target) -> Tensor:
    """E[g g^T] of what leaves W."""
    found = _known(calibration.outputs(target.layer), calibration, target.layer)
    return found[target.rows, target.rows].double()


def _known(statistic: Tensor | None, calibration: Statistics, name: str) -> Tensor:
    if statistic is None:
        raise WeLoreError(f"the calibration of {calibration.model.name} has no {name}: make it with the same targets")
    return statistic


def damped(moments: Tensor, damping: float) -> Tensor:
    """The matrix of second moments with a share of its mean diagonal added to the diagonal."""
    found = moments.clone()
    found.diagonal().add_(damping * found.diagonal().mean())
    return found
