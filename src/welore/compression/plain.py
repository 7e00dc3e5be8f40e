"""--for anywhere: every MLP loses the same number of neurons, and the result is an ordinary smaller checkpoint."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from welore.allocation.plan import Allocation, Plan
from welore.config import ANYWHERE, CompressionConfig
from welore.errors import WeLoreError
from welore.layers.remaining import Remaining
from welore.linalg.brain_surgeon import most_removed
from welore.models.mlp import find_mlps
from welore.models.resizing import Resizing, find_resizing
from welore.models.source import CheckpointSource, OverlaySource, TensorSource

MULTIPLE = 256  # of widths: the blocks of llama.cpp's k-quants; other quantizers take groups of 32, 64 or 128
STEPS = 16  # multiples in a width, at least


def plain_width(source: TensorSource, config: CompressionConfig) -> int:
    """Neurons of every MLP in the result: the multiple that comes closest to the target.

    Raises WeLoreError for a target that neurons alone do not reach, and for a model whose configuration has no number
    for the width of all its MLPs.
    """
    mlps = find_mlps(source.skeleton, source.targets)
    if config.keep is None:
        raise WeLoreError("for anywhere the target is a share of the parameters: give keep")
    if len({(mlp.width, mlp.numbers) for mlp in mlps}) != 1:
        widths = ", ".join(str(width) for width in sorted({mlp.width for mlp in mlps})) or "none that can be resized"
        raise WeLoreError(f"for anywhere all MLPs must have one width, {source.name} has {widths}")
    width, dense = mlps[0].width, sum(m * n for m, n in (target.shape for target in source.targets))
    multiple = config.rank_multiple or default_multiple(width)
    neuron = len(mlps) * mlps[0].numbers / dense  # share of the parameters that one neuron of every MLP takes
    least = -(-(width - most_removed(width)) // multiple) * multiple
    most = (width - 1) // multiple * multiple
    wanted = round((width - (1 - config.keep) / neuron) / multiple) * multiple
    if not least <= wanted <= most:
        low, high = (1 - (width - end) * neuron for end in (least, most))
        raise WeLoreError(
            f"keep {config.keep:g} cannot be reached by narrower MLPs alone: with widths in multiples of {multiple} it "
            f"lies between {low:.4f} and {high:.4f}"
        )
    shapes = {layer: shape for mlp in mlps for layer, shape in mlp.shapes(wanted).items()}
    find_resizing(source, shapes, width, wanted)
    return wanted


def default_multiple(width: int) -> int:
    """Of widths: 256, or the largest power of 2 that is at most a sixteenth of a smaller width."""
    return min(MULTIPLE, 1 << max(0, (width // STEPS).bit_length() - 1))


def plain_plan(
    source: TensorSource,
    target: tuple[str, float],
    neurons: Mapping[str, Remaining],
    experts: Mapping[str, Remaining],
    config: CompressionConfig,
    statistics: Mapping[str, Any],
) -> Plan:
    """The plan of a source without all but these neurons, or experts: every matrix stays dense."""
    original, multiple = source.original, config.rank_multiple or 1
    if neurons:
        multiple = config.rank_multiple or default_multiple(next(iter(neurons.values())).width)
    mlps = [] if experts else find_mlps(original.skeleton, original.targets)
    if lost := [mlp.name for mlp in mlps if mlp.name not in neurons]:
        raise WeLoreError(f"no token reached {lost[0]}: take more num_tokens, or another text")
    return Plan(
        model=source.identity,
        strategy="uniform",
        target=dict([target]),
        min_ratio=0.0,
        allow_growth=False,
        threshold=0.0,
        allocations=tuple(Allocation(t.name, t.shape, min(t.shape), False, 0.0) for t in source.targets),
        include=source.include,
        exclude=source.exclude,
        scaling=str(config.scaling),
        statistics=statistics,
        rank_multiple=multiple,
        optimize_for=ANYWHERE,
        neurons=neurons,
        experts=experts,
    )


def resizing_of(source: TensorSource, plan: Plan) -> Resizing | None:
    """The change of MLPs in the configuration that a plan for anywhere makes, if any; source: the original."""
    if not plan.neurons:
        return None
    neurons = next(iter(plan.neurons.values()))
    return find_resizing(source, plan.shapes, neurons.width, len(neurons.indices))


def with_trained(source: TensorSource, plan: Plan, trained: CheckpointSource) -> TensorSource:
    """The pruned source with the matrices of a checkpoint of its size."""
    names = [f"{target.name}.weight" for target in source.targets]
    overrides = {name: partial(trained.tensor, plan.name_in_result(name)) for name in names}
    return OverlaySource(source, plan.shapes, overrides)
