"""Compress and merge a model in memory: linear layers are exchanged in place."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from welore.allocation import allocate
from welore.analysis import analyze_weights, check_plan, grids_of, opened_calibration
from welore.calibration.artefact import Calibration
from welore.errors import WeLoreError
from welore.factors import factorise
from welore.forms import DENSE, FACTORED, ORDER_BYTES, cost
from welore.grids import Grid, Target, in_blocks
from welore.lowrank import LAYERS, LowRank, PivotedLinear, SplitLinear
from welore.mlps import copies_of, with_zeros
from welore.parallel import spread
from welore.pivot import product, tensors
from welore.plan import Plan
from welore.progress import Progress, silent
from welore.scaling import metric
from welore.source import ModelWeights
from welore.spectra import NONE
from welore.targets import dense_skeleton, find_targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Layer = TypeVar("Layer", LowRank, SplitLinear)


def replace_module(model: nn.Module, name: str, rank: int, form: str = FACTORED) -> LowRank:
    """Put an (uninitialised) low-rank layer in the place of the linear layer `name`; its bias is kept."""
    return _exchanged(model, name, lambda n, m, **like: LAYERS[form](n, m, rank, **like))


def split_module(model: nn.Module, name: str, grid: Grid) -> SplitLinear:
    """Put a layer of (uninitialised) dense blocks in the place of the linear layer `name`; its bias is kept."""
    return _exchanged(model, name, lambda n, m, **like: SplitLinear(n, m, grid, **like))


def _exchanged(model: nn.Module, name: str, make: Callable[..., Layer]) -> Layer:
    if not has_module(model, name):
        raise WeLoreError(f"config.json gives a rank to {name}, but {type(model).__name__} has no such layer")
    old = model.get_submodule(name)
    weight, bias = old.weight, old.bias
    assert isinstance(weight, Tensor)
    m, n = weight.shape if isinstance(old, nn.Linear) else weight.shape[::-1]
    new = make(n, m, device=weight.device, dtype=weight.dtype)
    if bias is not None:
        assert isinstance(bias, nn.Parameter)
        new.bias = bias
    new.train(old.training)
    model.set_submodule(name, new)
    return new


def compress_model(
    model: "PreTrainedModel",
    *,
    plan: Plan | None = None,
    scaling: str = NONE,
    calibration: "Calibration | str | Path | None" = None,
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
    weights = ModelWeights(model, include, exclude)
    known = opened_calibration(calibration, weights)
    if plan is None:
        how: dict[str, Any] = {"workers": workers, "progress": progress}
        how |= {"scaling": scaling, "calibration": known, "grids": grids_of(weights, split, scaling)}
        plan = allocate(analyze_weights(weights, **how), **target)
    else:
        check_plan(plan, weights, known)
    chosen = {a.name: a for a in plan.allocations if a.factored}
    targets, cut = in_blocks(weights.targets, plan.grids), plan.split
    todo = [t for t in targets if t.name in chosen]

    def compute(t: Target) -> dict[str, Tensor]:
        a = chosen[t.name]
        factors = factorise(weights.read(t), a.kept, a.relative_error, metric=metric(plan.scaling, known, t))
        return tensors(factors.A, factors.B, a.form)

    found = spread(compute, todo, [t.cost for t in todo], workers=workers, progress=progress, label="factors")
    dense = {t.name: weights.read(t) for t in targets if t.layer in cut and t.name not in chosen}
    for layer, grid in cut.items():
        split_module(model, layer, grid)
    for name, W in dense.items():
        model.get_submodule(name).state_dict()["weight"].copy_(W)
    for t, parts in zip(todo, found, strict=True):
        state = replace_module(model, t.name, chosen[t.name].kept, chosen[t.name].form).state_dict()
        for part, tensor in parts.items():
            state[part].copy_(tensor)
    return plan


def merge_model(model: "PreTrainedModel") -> None:
    """Make a compressed model in memory dense again, in place: every low-rank layer becomes its product."""
    skeleton = dense_skeleton(model.config, type(model))
    resized = [place(model, name) for name in _config(model).get("shapes", {})]
    copies = copies_of(skeleton, find_targets(skeleton)) if resized else {}
    inside: set[nn.Module] = set()
    done: set[str] = set()
    for name, layer in list(model.named_modules()):
        if layer in inside or not isinstance(layer, SplitLinear | LowRank):
            continue
        inside.update(layer.modules())
        done.add(name)
        dense = skeleton.get_submodule(name)  # nn.Linear, or GPT-2's Conv1D, which stores W^T
        W = _matrix(layer).to(next(next(layer.children()).parameters()).dtype)
        _make_dense(model, name, dense, W if isinstance(dense, nn.Linear) else W.T.contiguous(), copies.get(name, 1))
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
        bias = nn.Parameter(with_zeros(dense, bias.detach(), copies), requires_grad=bias.requires_grad)
    dense.weight = nn.Parameter(with_zeros(dense, weight, copies))
    dense.register_parameter("bias", bias)
    dense.train(old.training)
    model.set_submodule(name, dense)


def _matrix(layer: nn.Module) -> Tensor:
    """W (m, n) of a dense or a low-rank layer, or of one of such blocks."""
    if isinstance(layer, SplitLinear):
        return joined([_matrix(block) for block in layer.children()], layer.grid)
    if isinstance(layer, LowRank):
        return product(layer.state_dict(), layer.form)
    assert isinstance(layer, nn.Linear)
    return layer.weight.detach()


def joined(blocks: Sequence[Tensor], grid: Grid) -> Tensor:
    """The matrix of these blocks, given row by row."""
    across = grid[1]
    return torch.cat([torch.cat(tuple(blocks[i : i + across]), 1) for i in range(0, len(blocks), across)])


def sizes(model: "PreTrainedModel") -> dict[str, Any]:
    """ERR, parameter ratio, parameters and bytes, counted on the model itself; dense: 0, 1.

    parameters, bytes: everything that is stored, tied weights once, in the dtype of the model; in the bytes also the
    orders of pivoted layers.
    """
    about = {"include": (), "exclude": ()} | _config(model)
    ranks_removed = full_ranks = stored = dense = orders = 0
    for target in in_blocks(find_targets(model, about["include"], about["exclude"]), about.get("grids", {})):
        m, n = target.shape
        layer = model.get_submodule(target.name) if has_module(model, target.name) else None
        rank, form = (layer.rank, layer.form) if isinstance(layer, LowRank) else (min(m, n), DENSE)
        full_ranks += min(m, n)
        dense += m * n
        stored += cost(m, n, rank, form)
        ranks_removed += min(m, n) - rank
        orders += ORDER_BYTES * m if isinstance(layer, PivotedLinear) else 0
    if about.get("shapes"):  # neurons were taken out
        whole = find_targets(dense_skeleton(model.config, type(model)), about["include"], about["exclude"])
        dense = sum(math.prod(target.shape) for target in whole)
    return {
        "rank_reduction": ranks_removed / full_ranks,
        "parameter_ratio": stored / dense,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": sum(p.numel() * p.element_size() for p in model.parameters()) + orders,
    }


def _config(model: nn.Module) -> dict[str, Any]:
    """What the configuration of a model says of its compression."""
    config: Any = getattr(model.config, "quantization_config", None)
    return dict(config) if isinstance(config, Mapping) else config.to_dict() if config is not None else {}


def place(model: "PreTrainedModel", name: str) -> str:
    """Where a module of the causal LM lies in `model`: a bare AutoModel has no such first component in its names."""
    return name if has_module(model, name) else name.removeprefix(model.base_model_prefix + ".")


def has_module(model: nn.Module, name: str) -> bool:
    """Whether `model` has a module called `name`."""
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True
