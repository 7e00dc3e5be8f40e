"""Neurons taken out of the MLPs before their matrices are cut: which ones, and what is left of a checkpoint.

A cut gives every neuron of an MLP up a little. Below some 75 % of the parameters it costs less to give some of them up
altogether, with a row of each maker (gate and up) and a column of the reader (down), whose other columns then stand in
for it. What that costs, and what the others have to be, is Optimal Brain Surgeon's answer (Hassibi & Stork 1993) for
columns, in the norm of K-FAC.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from welore.allocation.neurons import Neurons
from welore.calibration.scaling import DAMPING_INPUTS, damped
from welore.calibration.statistics import Selection, Statistics
from welore.errors import WeLoreError
from welore.io.parallel import Processes, parallel_map
from welore.io.progress import Progress
from welore.io.resume import Workspace
from welore.io.safetensors_stream import Entry
from welore.linalg.brain_surgeon import refit, removal
from welore.models.mlp import Mlp, find_mlps, resize_layers, take_rows
from welore.models.source import CheckpointSource, TensorOverrides

WORTH = 0.4  # what neurons cost is predicted two and a half times worse than what cuts cost (research/LOG.md)
LEAST = 0.05  # of all neurons: fewer are not worth layers of another size


def worth_taking_out(
    source: CheckpointSource,
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
            order, costs = removal(source.read(mlp.reader), G, H)
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
    source: CheckpointSource,
    calibration: Statistics,
    neurons: Mapping[str, Neurons],
    workspace: Workspace,
    crew: Processes,
    *,
    workers: int | None,
    progress: Progress,
) -> tuple[CheckpointSource, Statistics]:
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
            W, (G, H) = source.read(mlp.reader), _statistics(mlp, calibration)
            made = refit(W, H, kept[mlp.name])
            felt = [(columns * (G @ columns)).sum(0) for columns in (W.double()[:, kept[mlp.name]], made)]
            stronger = (felt[1] / felt[0].clamp(min=float(felt[0].max()) * 1e-12 or 1.0)).sqrt()
            found = {"W": made.to(W.dtype), "stronger": stronger}
            workspace.store(place, found)
        return found

    _over(chosen, compute, crew, workers, progress, "neurons refitted")
    shapes = {layer: shape for mlp in chosen for layer, shape in mlp.shapes(len(kept[mlp.name])).items()}
    skeleton = deepcopy(source.skeleton)
    resize_layers(skeleton, shapes)
    readers: dict[str, Mlp] = {}
    rows: dict[str, tuple[nn.Module, Tensor]] = {}
    selections: dict[str, Selection] = {}
    entries: dict[str, Entry] = {}
    for mlp in chosen:
        ids, inputs, stronger = kept[mlp.name], calibration.shared[mlp.reader.name], compute(mlp)["stronger"]
        selections |= dict.fromkeys((f"{inputs}.inputs", f"{inputs}.magnitudes"), Selection(ids))
        for layer in (*mlp.makers, mlp.reader):
            for part in ("weight", "bias"):
                key = source.key(f"{layer.name}.{part}")
                if key is None or (layer == mlp.reader and part == "bias"):
                    continue
                if layer == mlp.reader:
                    readers[key] = mlp
                else:
                    rows[key] = source.skeleton.get_submodule(layer.name), mlp.rows(layer, ids)
                size = skeleton.get_parameter(f"{layer.name}.{part}").shape
                entries[key] = Entry(source.entry(key).dtype, tuple(size), 0, 0)
        for maker in mlp.makers:
            weights = stronger.repeat(mlp.copies(maker))
            selections[f"{maker.name}.outputs"] = Selection(mlp.rows(maker, ids), weights)

    def make(key: str) -> Tensor:
        if key in rows:
            return take_rows(rows[key][0], source.tensor(key), rows[key][1])
        W = compute(readers[key])["W"]
        return (W.T if readers[key].reader.transposed else W).contiguous()

    return source.with_others(skeleton, TensorOverrides(entries, make)), calibration.select(shapes, selections)


def _reached(mlp: Mlp, calibration: Statistics) -> bool:
    return all(calibration.counts.get(layer.name) for layer in (*mlp.makers, mlp.reader))


def _statistics(mlp: Mlp, calibration: Statistics) -> tuple[Tensor, Tensor]:
    """G (d, d) of what leaves the reader and H (width, width) of what enters it, float64; H damped as for a cut."""
    G, H = calibration.outputs(mlp.reader.name), calibration.inputs(mlp.reader.name)
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
