"""MLP pruning: neurons that are taken out before factorisation.

Factorisation costs every neuron of an MLP a little accuracy. Below some 75 % of the parameters it costs less to take
some neurons out: a row of each up layer (gate and up) and a column of the down layer, whose other columns are refitted.
The loss of that, and the refitted columns, are Optimal Brain Surgeon's answer (Hassibi & Stork 1993) for columns, in
the norm of K-FAC.
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

from welore.allocation.neurons import Neurons
from welore.calibration.scaling import DAMPING_INPUTS, damped
from welore.calibration.statistics import Selection, Statistics
from welore.errors import WeLoreError
from welore.io.context import RunContext
from welore.linalg.brain_surgeon import refit, removal
from welore.models.mlp import Mlp, find_mlps
from welore.models.source import OverlaySource, TensorSource
from welore.models.targets import Target

WORTH = 0.4  # the loss of pruning is predicted two and a half times worse than that of factorisation (research/LOG.md)
LEAST = 0.05  # of all neurons: fewer are not worth layers of another size


# --- which neurons --------------------------------------------------------------------------------------------------


def select_neurons(
    source: TensorSource, statistics: Statistics, context: RunContext, *, share: float | None, price: float | None
) -> dict[str, Neurons]:
    """MLP -> the neurons that are left; {} if pruning is not worth it.

    share: of all neurons, those of the least loss are taken out. price: without a share, those whose loss is less than
    the price of the numbers that they store (the threshold of a plan by water-filling). An MLP that no token of the
    statistics has reached keeps all.
    """
    mlps = [mlp for mlp in find_mlps(source.skeleton, source.targets) if _reached(mlp, statistics)]
    if not mlps:
        if share:
            raise WeLoreError(f"{source.name} has no MLP whose neurons could be taken out: leave mlp_pruning out")
        return {}
    compute = partial(_removal, source, statistics, context)
    _share(mlps, compute, context, "neurons")
    removals = {mlp.name: compute(mlp) for mlp in mlps}
    # Later groups may lose less: a neuron is taken out for the least loss that is still to come.
    losses = {name: np.minimum.accumulate(r["costs"].double().numpy()[::-1])[::-1] for name, r in removals.items()}
    total = sum(mlp.width for mlp in mlps)
    if share is None:
        assert price is not None
        counts = {mlp.name: int((losses[mlp.name] < WORTH * price * mlp.numbers).sum()) for mlp in mlps}
        if sum(counts.values()) < LEAST * total:
            return {}
    else:
        counts = _cheapest(losses, round(share * total))
    neurons = {}
    for mlp in mlps:
        pruned = removals[mlp.name]["order"][: counts[mlp.name]]
        stay = torch.ones(mlp.width, dtype=torch.bool).index_fill_(0, pruned, False)
        if len(pruned):
            neurons[mlp.name] = Neurons(mlp.width, tuple(stay.nonzero()[:, 0].tolist()))
    return neurons


def _removal(source: TensorSource, statistics: Statistics, context: RunContext, mlp: Mlp) -> dict[str, Tensor]:
    """The order in which neurons are taken out, and their losses; from the workspace if they are there."""
    assert context.workspace is not None
    workspace, key = context.workspace, f"{mlp.name}.removal"
    stored = workspace.fetch(key)
    if stored is None:
        order, costs = removal(*_problem(source, statistics, context, mlp))
        stored = {"order": order, "costs": costs}
        workspace.store(key, stored)
    return stored


def _cheapest(losses: Mapping[str, NDArray[np.float64]], wanted: int) -> dict[str, int]:
    """How many of every MLP, so that they are as many as wanted, or a group more, and lose least."""
    pooled = np.sort(np.concatenate(list(losses.values())))
    if wanted > len(pooled):
        raise WeLoreError(
            f"mlp_pruning is too large: a sixth of every MLP stays, at most {len(pooled)} neurons can be taken out"
        )
    level = pooled[wanted - 1] if wanted else -math.inf
    return {name: int((values <= level).sum()) for name, values in losses.items()}


# --- without them ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrunedMlp:
    """An MLP of which some neurons are left.

    indices: of those neurons, (count,). refitted: gives "W", the down layer's matrix (d, count), and "stronger",
    (count,): the ratio of the weight of every neuron in the outputs, with that matrix over with the dense one.
    """

    mlp: Mlp
    indices: Tensor
    refitted: Callable[[], dict[str, Tensor]]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Layer -> its shape (m, n) after pruning."""
        return self.mlp.shapes(len(self.indices))

    def overrides(self, source: TensorSource, names: set[str]) -> dict[str, Callable[[], Tensor]]:
        """Name of a tensor of the pruned layers -> a function that makes it, as it is stored."""
        down = self.mlp.down_layer
        made: dict[str, Callable[[], Tensor]] = {f"{down.name}.weight": lambda: down.kind.stored(self.refitted()["W"])}
        for up in self.mlp.up_layers:
            for name in names & {f"{up.name}.weight", f"{up.name}.bias"}:
                made[name] = partial(_rows_of, source, name, up, self.mlp.rows(up, self.indices))
        return made

    def selections(self, statistics: Statistics) -> dict[str, Selection]:
        """Name of a statistic -> the part of it that is left."""
        inputs = statistics.shared[self.mlp.down_layer.name]
        selections = dict.fromkeys((f"{inputs}.inputs", f"{inputs}.magnitudes"), Selection(self.indices))
        gains = self.refitted()["stronger"]
        for up in self.mlp.up_layers:
            rows = self.mlp.rows(up, self.indices)
            selections[f"{up.name}.outputs"] = Selection(rows, gains.repeat(self.mlp.copies(up)))
        return selections


def prune(
    source: TensorSource, statistics: Statistics, neurons: Mapping[str, Neurons], context: RunContext
) -> tuple[TensorSource, Statistics]:
    """The weights and the statistics with these neurons only; WeLoreError if the model has no such MLPs.

    Both are views: tensors of smaller layers are made when they are read. Losses that were measured along the dense
    matrices do not hold any more, so the statistics have none.
    """
    mlps = {mlp.name: mlp for mlp in find_mlps(source.skeleton, source.targets)}
    for name, mlp in neurons.items():
        if name not in mlps or mlps[name].width != mlp.width:
            raise WeLoreError(f"the plan takes neurons out of {name}, which this model does not have in that size")
    indices = {name: torch.tensor(mlp.indices) for name, mlp in neurons.items()}

    def compute(mlp: Mlp) -> dict[str, Tensor]:
        return _refitted(source, statistics, context, mlp, indices[mlp.name])

    _share([mlps[name] for name in neurons], compute, context, "neurons refitted")
    pruned = [PrunedMlp(mlps[name], indices[name], partial(compute, mlps[name])) for name in neurons]
    names = set(source.names())
    shapes = {layer: shape for mlp in pruned for layer, shape in mlp.shapes.items()}
    overrides = {name: make for mlp in pruned for name, make in mlp.overrides(source, names).items()}
    selections = {name: part for mlp in pruned for name, part in mlp.selections(statistics).items()}
    return OverlaySource(source, shapes, overrides), statistics.select(shapes, selections)


def _refitted(
    source: TensorSource, statistics: Statistics, context: RunContext, mlp: Mlp, indices: Tensor
) -> dict[str, Tensor]:
    """W and gains of PrunedMlp; from the workspace if they are there."""
    assert context.workspace is not None
    workspace, key = context.workspace, f"{mlp.name}.refit-{hashlib.sha256(indices.numpy().tobytes()).hexdigest()[:16]}"
    stored = workspace.fetch(key)
    if stored is None:
        W, G, H = _problem(source, statistics, context, mlp)
        made = refit(W, H, indices.to(W.device))
        before, after = ((columns * (G @ columns)).sum(0) for columns in (W.double()[:, indices.to(W.device)], made))
        gains = (after / before.clamp(min=float(before.max()) * 1e-12 or 1.0)).sqrt()
        stored = {"W": made.to(W.dtype).cpu(), "stronger": gains.cpu()}
        workspace.store(key, stored)
    return stored


def _rows_of(source: TensorSource, name: str, up: Target, rows: Tensor) -> Tensor:
    parameter = source.tensor(name)
    return up.kind.take_rows(parameter, rows.to(parameter.device))


# --- both ------------------------------------------------------------------------------------------------------------


def _reached(mlp: Mlp, statistics: Statistics) -> bool:
    return all(statistics.counts.get(layer.name) for layer in mlp.layers)


def _problem(
    source: TensorSource, statistics: Statistics, context: RunContext, mlp: Mlp
) -> tuple[Tensor, Tensor, Tensor]:
    """W (d, width) of the down layer, G (d, d) of its outputs and H (width, width) of its inputs.

    G and H in float64; H damped as in the scaling.
    """
    G, H = statistics.outputs(mlp.down_layer.name), statistics.inputs(mlp.down_layer.name)
    assert G is not None
    assert H is not None
    W, G, H = (tensor.to(context.float64_device) for tensor in (source.read(mlp.down_layer), G, H))
    return W, G.double(), damped(H.double(), DAMPING_INPUTS)


def _share(mlps: Sequence[Mlp], compute: Callable[[Mlp], dict[str, Tensor]], context: RunContext, label: str) -> None:
    """Compute what the workspace lacks; the processes share it."""
    mine = context.processes.share(mlps)
    context.map(compute, mine, [float(mlp.width) ** 3 for mlp in mine], label)
    context.processes.wait()
