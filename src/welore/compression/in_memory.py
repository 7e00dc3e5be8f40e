"""Compress and merge a model in memory: linear layers are exchanged in place."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from welore.allocation.plan import Plan
from welore.allocation.solver import allocate
from welore.calibration.scaling import metric
from welore.calibration.statistics import Statistics
from welore.compression.analysis import analyze_weights, check_plan, grids_of, opened_calibration
from welore.config import NONE, AllocationConfig
from welore.errors import WeLoreError
from welore.io.parallel import parallel_map
from welore.io.progress import Progress, silent
from welore.layers.block_grid import Grid
from welore.layers.low_rank import LowRankLayer, SplitLinear
from welore.layers.registry import FORMS
from welore.linalg.svd import factorise
from welore.models.mlp import outputs_per_neuron, pad_neurons
from welore.models.replace import _config, replace_module, split_module, submodule_name
from welore.models.skeleton import dense_skeleton
from welore.models.source import ModelSource
from welore.models.targets import Target, in_blocks, known_kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compress_model(
    model: "PreTrainedModel",
    *,
    plan: Plan | None = None,
    scaling: str = NONE,
    calibration: "Statistics | str | Path | None" = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    workers: int | None = None,
    split: bool | None = None,
    progress: Progress = silent,
    **target: Any,
) -> Plan:
    """Compress a model in memory, in place, by a plan or by the target and settings of `allocate`.

    scaling, calibration, split: see `analysis.analyze`; a plan has its own.
    """
    if plan is not None:
        include, exclude = plan.include, plan.exclude
        if plan.neurons:
            raise WeLoreError("this plan takes neurons out, which needs a model in a directory, not one in memory")
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise WeLoreError("this model is spread over several devices: load it on one to compress it in memory")
    weights = ModelSource(model, include, exclude)
    known = opened_calibration(calibration, weights)
    if plan is None:
        how: dict[str, Any] = {"workers": workers, "progress": progress}
        how |= {"scaling": scaling, "calibration": known, "grids": grids_of(weights, split, scaling)}
        plan = allocate(analyze_weights(weights, **how), AllocationConfig(**target))
    else:
        check_plan(plan, weights, known)
    chosen = {a.name: a for a in plan.allocations if a.factored}
    targets, cut = in_blocks(weights.targets, plan.grids), plan.split
    todo = [t for t in targets if t.name in chosen]

    def compute(t: Target) -> dict[str, Tensor]:
        a = chosen[t.name]
        factors = factorise(weights.read(t), a.rank, a.relative_error, metric=metric(plan.scaling, known, t))
        return FORMS[a.form].pack(factors.A, factors.B)

    found = parallel_map(compute, todo, [t.cost for t in todo], workers=workers, progress=progress, label="factors")
    dense = {t.name: weights.read(t) for t in targets if t.layer in cut and t.name not in chosen}
    for layer, grid in cut.items():
        split_module(model, layer, grid)
    for name, W in dense.items():
        model.get_submodule(name).state_dict()["weight"].copy_(W)
    for t, parts in zip(todo, found, strict=True):
        state = replace_module(model, t.name, chosen[t.name].rank, chosen[t.name].form).state_dict()
        for part, tensor in parts.items():
            state[part].copy_(tensor)
    return plan


def merge_model(model: "PreTrainedModel") -> None:
    """Make a compressed model in memory dense again, in place: every low-rank layer becomes its product."""
    skeleton = dense_skeleton(model.config, type(model))
    resized = [submodule_name(model, name) for name in _config(model).get("shapes", {})]
    copies = outputs_per_neuron(skeleton) if resized else {}
    inside: set[nn.Module] = set()
    done: set[str] = set()
    for name, layer in list(model.named_modules()):
        if layer in inside or not isinstance(layer, SplitLinear | LowRankLayer):
            continue
        inside.update(layer.modules())
        done.add(name)
        dense = skeleton.get_submodule(name)
        W = _matrix(layer).to(next(next(layer.children()).parameters()).dtype)
        _make_dense(model, name, dense, known_kind(dense).stored(W), copies.get(name, 1))
    for name in resized:
        if name not in done:
            weight = model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            _make_dense(model, name, skeleton.get_submodule(name), weight.detach(), copies.get(name, 1))


def _make_dense(model: nn.Module, name: str, dense: nn.Module, weight: Tensor, copies: int) -> None:
    """Put the layer `dense` of the skeleton in its place, with this weight; zeros stand for neurons that are gone."""
    old = model.get_submodule(name)
    bias, full = (layer._parameters.get("bias") for layer in (old, dense))
    if bias is not None and full is not None and full.shape != bias.shape:
        bias = nn.Parameter(pad_neurons(dense, bias.detach(), copies), requires_grad=bias.requires_grad)
    dense.weight = nn.Parameter(pad_neurons(dense, weight, copies))
    dense.register_parameter("bias", bias)
    dense.train(old.training)
    model.set_submodule(name, dense)


def _matrix(layer: nn.Module) -> Tensor:
    """W (m, n) of a dense or a low-rank layer, or of one of such blocks."""
    if isinstance(layer, SplitLinear):
        return joined([_matrix(block) for block in layer.children()], layer.grid)
    if isinstance(layer, LowRankLayer):
        return FORMS[layer.form].unpack(layer.state_dict())
    assert isinstance(layer, nn.Linear)
    return layer.weight.detach()


def joined(blocks: Sequence[Tensor], grid: Grid) -> Tensor:
    """The matrix of these blocks, given row by row."""
    across = grid[1]
    return torch.cat([torch.cat(tuple(blocks[i : i + across]), 1) for i in range(0, len(blocks), across)])
