"""Neurons taken out of the MLPs before their matrices are cut: which ones, and what is left of a checkpoint.

A cut gives every neuron of an MLP up a little. Below some 75 % of the parameters it costs less to give some of them up
altogether, with a row of each maker (gate and up) and a column of the reader (down), whose other columns then stand in
for it. What that costs, and what the others have to be, is Optimal Brain Surgeon's answer (Hassibi & Stork 1993) for
columns, in the norm of K-FAC.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from welore.allocation.neurons import Neurons
from welore.calibration.scaling import DAMPING_INPUTS, damped
from welore.calibration.statistics import Selection, Statistics
from welore.errors import WeLoreError
from welore.io.parallel import Processes, parallel_map
from welore.io.progress import Progress
from welore.io.resume import Workspace
from welore.linalg.brain_surgeon import refit, removal
from welore.models.mlp import Mlp, find_mlps
from welore.models.source import OverlaySource, TensorSource
from welore.models.targets import Target

WORTH = 0.4  # what neurons cost is predicted two and a half times worse than what cuts cost (research/LOG.md)
LEAST = 0.05  # of all neurons: fewer are not worth layers of another size


def worth_taking_out(
    source: TensorSource,
    calibration: Statistics,
    workspace: Workspace,
    crew: Processes,
    *,
    share: float | None,
    price: float | None,
    workers: int | None,
    progress: Progress,
) -> dict[str, Neurons]:
    """MLP -> the neurons that it keeps; {} where none is worth taking out.

    share: of all neurons, those that cost least. Without it those that cost less than the numbers that they take, at
    the price of one stored number (the level of a plan by water-filling). An MLP that no token of the calibration has
    reached keeps all.
    """
    mlps = [mlp for mlp in find_mlps(source.skeleton, source.targets) if _reached(mlp, calibration)]
    if not mlps:
        if share:
            raise WeLoreError(f"{source.name} has no MLP whose neurons could be taken out: leave neurons out")
        return {}

    def compute(mlp: Mlp) -> dict[str, Tensor]:
        found = workspace.fetch(f"{mlp.name}.removal")
        if found is None:
            G, H = _statistics(mlp, calibration)
            order, costs = removal(source.read(mlp.down_layer), G, H)
            found = {"order": order, "costs": costs}
            workspace.store(f"{mlp.name}.removal", found)
        return found

    _over(mlps, compute, crew, workers, progress, "neurons")
    orders = {mlp.name: compute(mlp) for mlp in mlps}
    # What comes later may cost less, for it goes in groups: a neuron is taken out for the least that is still to come.
    costs = {n: np.minimum.accumulate(found["costs"].double().numpy()[::-1])[::-1] for n, found in orders.items()}
    every = sum(mlp.width for mlp in mlps)
    if price is not None:
        counts = {mlp.name: int((costs[mlp.name] < WORTH * price * mlp.numbers).sum()) for mlp in mlps}
        if sum(counts.values()) < LEAST * every:
            return {}
    else:
        counts = _cheapest(costs, round((share or 0) * every))
    kept = {}
    for mlp in mlps:
        gone = orders[mlp.name]["order"][: counts[mlp.name]]
        stay = torch.ones(mlp.width, dtype=torch.bool).index_fill_(0, gone, False)
        if len(gone):
            kept[mlp.name] = Neurons(mlp.width, tuple(stay.nonzero()[:, 0].tolist()))
    return kept


def without(
    source: TensorSource,
    calibration: Statistics,
    neurons: Mapping[str, Neurons],
    workspace: Workspace,
    crew: Processes,
    *,
    workers: int | None,
    progress: Progress,
) -> tuple[TensorSource, Statistics]:
    """The checkpoint and its calibration with these neurons alone; WeLoreError if it has no such MLPs.

    Both are views: tensors of smaller layers are made when they are read. Losses that were measured along the matrices
    as they came say nothing of these, so the calibration has none.
    """
    mlps = {mlp.name: mlp for mlp in find_mlps(source.skeleton, source.targets)}
    for name, found in neurons.items():
        if name not in mlps or mlps[name].width != found.width:
            raise WeLoreError(f"the plan takes neurons out of {name}, which this model does not have in that size")
    chosen = [mlps[name] for name in neurons]
    kept = {name: torch.tensor(found.indices) for name, found in neurons.items()}

    def compute(mlp: Mlp) -> dict[str, Tensor]:
        place = f"{mlp.name}.refit-{len(kept[mlp.name])}"
        found = workspace.fetch(place)
        if found is None:
            W, (G, H) = source.read(mlp.down_layer), _statistics(mlp, calibration)
            made = refit(W, H, kept[mlp.name])
            felt = [(columns * (G @ columns)).sum(0) for columns in (W.double()[:, kept[mlp.name]], made)]
            stronger = (felt[1] / felt[0].clamp(min=float(felt[0].max()) * 1e-12 or 1.0)).sqrt()
            found = {"W": made.to(W.dtype), "stronger": stronger}
            workspace.store(place, found)
        return found

    _over(chosen, compute, crew, workers, progress, "neurons refitted")
    shapes = {layer: shape for mlp in chosen for layer, shape in mlp.shapes(len(kept[mlp.name])).items()}
    selections: dict[str, Selection] = {}
    overrides: dict[str, Callable[[], Tensor]] = {}
    names = set(source.names())
    for mlp in chosen:
        ids, inputs, stronger = kept[mlp.name], calibration.shared[mlp.down_layer.name], compute(mlp)["stronger"]
        selections |= dict.fromkeys((f"{inputs}.inputs", f"{inputs}.magnitudes"), Selection(ids))
        overrides[f"{mlp.down_layer.name}.weight"] = partial(_stored, mlp.down_layer, compute, mlp)
        for up in mlp.up_layers:
            rows = mlp.rows(up, ids)
            selections[f"{up.name}.outputs"] = Selection(rows, stronger.repeat(mlp.copies(up)))
            for name in names & {f"{up.name}.weight", f"{up.name}.bias"}:
                overrides[name] = partial(_rows_of, source, name, up, rows)
    return OverlaySource(source, shapes, overrides), calibration.select(shapes, selections)


def _stored(down: Target, compute: Callable[[Mlp], dict[str, Tensor]], mlp: Mlp) -> Tensor:
    return down.kind.stored(compute(mlp)["W"])


def _rows_of(source: TensorSource, name: str, up: Target, rows: Tensor) -> Tensor:
    return up.kind.take_rows(source.tensor(name), rows)


def _reached(mlp: Mlp, calibration: Statistics) -> bool:
    return all(calibration.counts.get(layer.name) for layer in mlp.layers)


def _statistics(mlp: Mlp, calibration: Statistics) -> tuple[Tensor, Tensor]:
    """G (d, d) of what leaves the reader and H (width, width) of what enters it, float64; H damped as for a cut."""
    G, H = calibration.outputs(mlp.down_layer.name), calibration.inputs(mlp.down_layer.name)
    assert G is not None
    assert H is not None
    return G.double(), damped(H.double(), DAMPING_INPUTS)


def _over(
    mlps: Sequence[Mlp],
    compute: Callable[[Mlp], dict[str, Tensor]],
    crew: Processes,
    workers: int | None,
    progress: Progress,
    label: str,
) -> None:
    """Compute each where the workspace has none; the processes of a team share them."""
    mine = crew.share(mlps)
    parallel_map(
        compute, mine, [float(mlp.width) ** 3 for mlp in mine], workers=workers, progress=progress, label=label
    )
    crew.wait()


def _cheapest(costs: Mapping[str, NDArray[np.float64]], wanted: int) -> dict[str, int]:
    """How many of every MLP, so that they are as many as wanted, or a group more, and cost least."""
    pooled = np.sort(np.concatenate(list(costs.values())))
    if wanted > len(pooled):
        raise WeLoreError(f"neurons is too large: of every MLP a sixth is kept, at most {len(pooled)} can be taken out")
    level = pooled[wanted - 1] if wanted else -math.inf
    return {name: int((found <= level).sum()) for name, found in costs.items()}
