"""MLP pruning: neurons that are taken out before factorisation (docs/concepts/mlp-pruning.md).

A neuron is a row of each up layer (gate and up) and a column of the down layer, whose other columns are refitted.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from welore.calibration.scaling import regularized
from welore.calibration.statistics import Selection, Statistics
from welore.errors import WeLoreError
from welore.io.context import RunContext
from welore.layers.remaining import Remaining
from welore.linalg.brain_surgeon import most_removed, refit, removal, whole_groups
from welore.models.mlp import Mlp, find_mlps
from welore.models.source import OverlaySource, TensorSource
from welore.models.targets import Target

WORTH = 0.4  # the loss of pruning is predicted two and a half times worse than that of factorisation (research/LOG.md)
NOTHING = 1e-30  # stands for inputs that are all zero, which nothing can be divided by
DEAREST = 1.0  # times the price, a neuron beyond which none is looked at: two and a half times what is WORTH it
LEAST = 0.05  # of all neurons: fewer are not worth layers of another size

# Gives "W", the down layer's matrix (d, count) of the neurons that are left, and "stronger", (count,): the ratio of the
# weight of every neuron in the outputs, with that matrix over with the dense one.
Refitted = Callable[[], dict[str, Tensor]]


def require_neurons(name: str, mlps: Sequence[Mlp], share: float | None) -> int:
    """The least number of parameters that go with a share of all neurons; WeLoreError if they are too many."""
    if share and not mlps:
        raise WeLoreError(f"{name} has no MLP whose neurons could be taken out: leave mlp_pruning out")
    wanted = round((share or 0) * sum(mlp.width for mlp in mlps))
    most = sum(most_removed(mlp.width) for mlp in mlps)
    if wanted > most:
        raise WeLoreError(f"mlp_pruning is too large: a sixth of every MLP stays, at most {most} neurons can go")
    return wanted * min((mlp.numbers for mlp in mlps), default=0)


@dataclass(frozen=True)
class Search:
    """How many neurons are looked for.

    share: of all neurons, those of the least loss are taken out. price: without a share, those whose loss is less than
    the price of the numbers that they store (the threshold of a plan by water-filling). most: numbers that may go at
    most with them, so that the target stays within reach; None is no limit. multiple: of which a number is left. width:
    in place of all that, how many are left of every MLP.
    """

    share: float | None = None
    price: float | None = None
    most: int | None = None
    multiple: int = 1
    width: int | None = None

    def level(self, losses: Mapping[Mlp, NDArray[np.float64]]) -> float:
        """The loss per number below which neurons go; losses: of the neurons of every MLP, ascending."""
        assert self.price is not None
        each = np.concatenate([values / mlp.numbers for mlp, values in losses.items()])
        numbers = np.concatenate([np.full(len(values), mlp.numbers) for mlp, values in losses.items()])
        order = np.argsort(each, kind="stable")
        too_many = np.flatnonzero(np.cumsum(numbers[order]) > (math.inf if self.most is None else self.most))
        return min(WORTH * self.price, float(each[order[too_many[0]]]) if len(too_many) else math.inf)

    def limits(self, mlp: Mlp) -> tuple[int, float]:
        """How many neurons of an MLP are looked at, at most, and the loss of one beyond which none is."""
        most = most_removed(mlp.width)
        if self.width is not None:
            return min(most, whole_groups(mlp.width, mlp.width - self.width)), math.inf
        if self.share is not None or self.price is None:
            return most, math.inf
        return most if self.most is None else min(most, self.most // mlp.numbers), DEAREST * self.price * mlp.numbers


def is_worth_it(mlps: Sequence[Mlp], removed: int) -> bool:
    """Whether a target that removes so many numbers leaves room for the fewest neurons that are worth taking out."""
    return LEAST * sum(mlp.width for mlp in mlps) * min((mlp.numbers for mlp in mlps), default=0) <= removed


def select_neurons(
    source: TensorSource, statistics: Statistics, context: RunContext, search: Search
) -> dict[str, Remaining]:
    """MLP -> the neurons that are left; {} if pruning is not worth it.

    An MLP that no token of the statistics has reached keeps all.
    """
    mlps = find_mlps(source.skeleton, source.targets)
    mlps = [mlp for mlp in mlps if all(statistics.knows(layer.name) for layer in mlp.layers)]
    require_neurons(source.name, mlps, search.share)
    if not mlps:
        return {}
    compute = partial(_removal, source, statistics, context, search)
    _share(mlps, compute, context, "neurons")
    removals = {mlp.name: compute(mlp) for mlp in mlps}
    # Later groups may lose less: a neuron is taken out for the least loss that is still to come.
    losses = {name: np.minimum.accumulate(r["costs"].double().numpy()[::-1])[::-1] for name, r in removals.items()}
    total = sum(mlp.width for mlp in mlps)
    if search.width is not None:
        counts = {mlp.name: mlp.width - search.width for mlp in mlps}
    elif search.share is None:
        level = search.level({mlp: losses[mlp.name] for mlp in mlps})
        counts = {mlp.name: int((losses[mlp.name] < level * mlp.numbers).sum()) for mlp in mlps}
    else:
        wanted = round(search.share * total)
        least = np.sort(np.concatenate(list(losses.values())))[wanted - 1] if wanted else -math.inf
        counts = {name: int((values <= least).sum()) for name, values in losses.items()}
    left = {mlp: -(-(mlp.width - counts[mlp.name]) // search.multiple) * search.multiple for mlp in mlps}
    counts = {mlp.name: max(0, mlp.width - width) for mlp, width in left.items()}
    if search.price is not None and sum(counts.values()) < LEAST * total:
        return {}
    neurons = {}
    for mlp in mlps:
        pruned = removals[mlp.name]["order"][: counts[mlp.name]]
        stay = torch.ones(mlp.width, dtype=torch.bool).index_fill_(0, pruned, False)
        if len(pruned):
            neurons[mlp.name] = Remaining(mlp.width, tuple(stay.nonzero()[:, 0].tolist()))
    return neurons


def _removal(
    source: TensorSource, statistics: Statistics, context: RunContext, search: Search, mlp: Mlp
) -> dict[str, Tensor]:
    """The order in which neurons are taken out, and their losses; from the workspace if they are there."""
    most, dearest = search.limits(mlp)

    def make() -> dict[str, Tensor]:
        order, costs = removal(*_problem(source, statistics, context, mlp), most=most, dearest=dearest)
        return {"order": order, "costs": costs}

    return context.work.remember(f"{mlp.name}.removal-{most}-{dearest:.17g}", make)


def _overrides(source: TensorSource, mlp: Mlp, indices: Tensor, refitted: Refitted) -> dict[str, Callable[[], Tensor]]:
    """Name of a tensor of the pruned layers -> a function that makes it, as it is stored."""

    def rows_of(name: str, up: Target) -> Tensor:
        parameter = source.tensor(name)
        return up.kind.take_rows(parameter, mlp.rows(up, indices).to(parameter.device))

    down, names = mlp.down_layer, set(source.names())
    made: dict[str, Callable[[], Tensor]] = {f"{down.name}.weight": lambda: down.kind.stored(refitted()["W"])}
    for up in mlp.up_layers:
        for name in names & {f"{up.name}.weight", f"{up.name}.bias"}:
            made[name] = partial(rows_of, name, up)
    return made


def _selections(statistics: Statistics, mlp: Mlp, indices: Tensor, refitted: Refitted) -> dict[str, Selection]:
    """Name of a statistic -> the part of it that is left."""
    inputs = statistics.shared[mlp.down_layer.name]
    selections = dict.fromkeys((f"{inputs}.inputs", f"{inputs}.magnitudes"), Selection(indices))
    gains = refitted()["stronger"]
    for up in mlp.up_layers:
        selections[f"{up.name}.outputs"] = Selection(mlp.rows(up, indices), gains.repeat(mlp.copies(up)))
    return selections


def prune(
    source: TensorSource, statistics: Statistics, neurons: Mapping[str, Remaining], context: RunContext
) -> tuple[TensorSource, Statistics]:
    """The weights and the statistics with these neurons only; WeLoreError if the model has no such MLPs.

    Tensors of smaller layers are made when they are read. The statistics have no measured losses any more.
    """
    shapes = pruned_shapes(source, neurons)
    overrides: dict[str, Callable[[], Tensor]] = {}
    selections: dict[str, Selection] = {}
    for mlp, refitted in refit_layers(source, statistics, neurons, context).items():
        stay = torch.tensor(neurons[mlp.name].indices)
        overrides |= _overrides(source, mlp, stay, refitted)
        selections |= _selections(statistics, mlp, stay, refitted)
    return OverlaySource(source, shapes, overrides), statistics.select(shapes, selections)


def refit_layers(
    source: TensorSource, statistics: Statistics, neurons: Mapping[str, Remaining], context: RunContext
) -> dict[Mlp, Refitted]:
    """Refit the down layers of MLPs to these neurons, into the workspace: MLP -> its matrix and gains."""
    mlps = _mlps(source, neurons)

    def compute(mlp: Mlp) -> dict[str, Tensor]:
        return _refitted(source, statistics, context, mlp, torch.tensor(neurons[mlp.name].indices))

    pruned = [mlps[name] for name in neurons]
    _share(pruned, compute, context, "neurons refitted")
    return {mlp: partial(compute, mlp) for mlp in pruned}


def pruned_shapes(source: TensorSource, neurons: Mapping[str, Remaining]) -> dict[str, tuple[int, int]]:
    """Layer -> its shape with these neurons only; WeLoreError if the model has no such MLPs."""
    mlps = _mlps(source, neurons)
    shapes = (mlps[name].shapes(len(remaining.indices)) for name, remaining in neurons.items())
    return {layer: shape for table in shapes for layer, shape in table.items()}


def _mlps(source: TensorSource, neurons: Mapping[str, Remaining]) -> dict[str, Mlp]:
    mlps = {mlp.name: mlp for mlp in find_mlps(source.skeleton, source.targets)} if neurons else {}
    for name, remaining in neurons.items():
        if name not in mlps or mlps[name].width != remaining.width:
            raise WeLoreError(f"the plan takes neurons out of {name}, which this model does not have in that size")
    return mlps


def _refitted(
    source: TensorSource, statistics: Statistics, context: RunContext, mlp: Mlp, indices: Tensor
) -> dict[str, Tensor]:
    """W and gains of Refitted; from the workspace if they are there."""

    def make() -> dict[str, Tensor]:
        W, G, H = _problem(source, statistics, context, mlp)
        made = refit(W, H, indices.to(W.device))
        before, after = ((columns * (G @ columns)).sum(0) for columns in (W.double()[:, indices.to(W.device)], made))
        gains = (after / before.clamp(min=float(before.max()) * 1e-12 or 1.0)).sqrt()
        return {"W": made.to(W.dtype).cpu(), "stronger": gains.cpu()}

    return context.work.remember(f"{mlp.name}.refit-{hashlib.sha256(indices.numpy().tobytes()).hexdigest()[:16]}", make)


def _problem(
    source: TensorSource, statistics: Statistics, context: RunContext, mlp: Mlp
) -> tuple[Tensor, Tensor, Tensor]:
    """W (d, width) of the down layer, G (d, d) of its outputs and H (width, width) of its inputs.

    G in float64; H in float32, regularized as in the scaling.
    """
    G, H = statistics.outputs(mlp.down_layer.name), statistics.inputs(mlp.down_layer.name)
    assert G is not None
    assert H is not None
    device = context.float64_device
    if not H.any():  # an MLP whose neurons say nothing
        H = torch.eye(len(H)) * NOTHING
    H = regularized(H.to(device), statistics.shrinkage)
    return source.read(mlp.down_layer).to(device), G.to(device, torch.float64), H


def _share(mlps: Sequence[Mlp], compute: Callable[[Mlp], dict[str, Tensor]], context: RunContext, label: str) -> None:
    """Compute what the workspace lacks; the processes share it."""
    mine = context.processes.share(mlps, [float(mlp.width) ** 3 for mlp in mlps])
    memory = [20 * mlp.width**2 + 16 * mlp.width * mlp.down_layer.shape[0] for mlp in mine]
    context.map(compute, mine, [float(mlp.width) ** 3 for mlp in mine], label, memory)
    context.processes.wait()
