"""Expert pruning: whole experts of a mixture, taken out before all else (docs/concepts/mlp-pruning.md)."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from welore.calibration.statistics import Statistics
from welore.errors import WeLoreError
from welore.io.context import RunContext
from welore.layers.experts import DOWN
from welore.layers.remaining import Remaining
from welore.models.expert_pruning import ExpertPruning, FewerExperts, find_expert_pruning
from welore.models.experts import experts_of
from welore.models.source import TensorSource
from welore.models.targets import Target


def require_experts(source: TensorSource, share: float) -> ExpertPruning:
    """The change that takes a share of the experts out of every layer; WeLoreError if the model allows none."""
    mixtures = experts_of(source.skeleton)
    names = {target.name for target in source.targets}
    if not mixtures or any(f"{name}.{i}.{DOWN}" not in names for name, width in mixtures.items() for i in range(width)):
        raise WeLoreError(f"{source.name} has no targeted experts that could be taken out: leave expert_pruning out")
    width = next(iter(mixtures.values()))
    gone = round(share * width)
    if not 0 < gone < width:
        taken = f"expert_pruning {share:g} takes out {'all' if gone else 'none'} of the {width} experts of a layer"
        raise WeLoreError(f"{taken}: {1 / width:g} takes out one")
    return find_expert_pruning(source, width - gone)


def select_experts(
    source: TensorSource, statistics: Statistics, context: RunContext, pruning: ExpertPruning
) -> dict[str, Remaining]:
    """Mixture -> the experts that are left, of the mixtures that the statistics speak of.

    A mixture is left out until the losses of all its experts are known; those of earlier calls lie in the workspace.
    """
    experts = {}
    for mixture in store_losses(source, statistics, context, pruning):
        losses = [context.work.fetch(f"{mixture}.{i}.{DOWN}.silence") for i in range(pruning.before)]
        if None not in losses:
            experts[mixture] = pruning.select(torch.stack([stored["loss"] for stored in losses if stored]))
    return experts


def store_losses(
    source: TensorSource, statistics: Statistics, context: RunContext, pruning: ExpertPruning
) -> list[str]:
    """Store the losses of the experts that the statistics speak of in the workspace: their mixtures."""
    names = {f"{mixture}.{i}.{DOWN}": mixture for mixture in pruning.mixtures for i in range(pruning.before)}
    layers = [target for target in source.targets if target.name in names and target.name in statistics.shapes]
    compute = partial(_loss, source, statistics, context)
    mine = context.processes.share(layers, [layer.cost for layer in layers])
    memory = [4 * sum(layer.shape) ** 2 for layer in mine]
    with context.stage("expert pruning"):
        context.map(compute, mine, [layer.cost for layer in mine], "experts", memory)
    context.processes.wait()
    return list(dict.fromkeys(names[layer.name] for layer in layers))


def _loss(source: TensorSource, statistics: Statistics, context: RunContext, down: Target) -> dict[str, Tensor]:
    """The loss of an expert that falls silent, tr(G W H W^T); from the workspace if it is there."""

    def make() -> dict[str, Tensor]:
        G, H = statistics.outputs(down.name), statistics.inputs(down.name)
        assert G is not None
        assert H is not None
        G, W, H = (tensor.to(context.device, torch.float32) for tensor in (G, source.read(down), H))
        return {"loss": ((G @ W) * (W @ H)).sum().double().cpu()}

    return context.work.remember(f"{down.name}.silence", make)


def require_same_experts(source: TensorSource, experts: Mapping[str, Remaining]) -> ExpertPruning:
    """The change that leaves the experts of a plan; WeLoreError if the model has no such ones."""
    mixtures = experts_of(source.skeleton)
    for name in {**mixtures, **experts}:
        if name not in experts or mixtures.get(name) != experts[name].width:
            raise WeLoreError(f"the plan takes experts out of {name}, which this model does not have in that number")
    return find_expert_pruning(source, len(next(iter(experts.values())).indices))


def without_experts(
    source: TensorSource, pruning: ExpertPruning | None, experts: Mapping[str, Remaining]
) -> TensorSource:
    """The source with these experts alone; itself without any pruning."""
    return source if pruning is None else FewerExperts(source, pruning, experts)


def any_experts(pruning: ExpertPruning | None) -> dict[str, Remaining]:
    """As many experts as are left, the first ones: for shapes, which are those of any others."""
    if pruning is None:
        return {}
    return {mixture: pruning.select(-torch.arange(float(pruning.before))) for mixture in pruning.mixtures}
