"""Compress and merge a model in memory: linear layers are exchanged in place."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from welore.analysis import analyze_weights, check_plan, opened_calibration
from welore.calibration.artefact import Calibration
from welore.errors import WeLoreError
from welore.factors import factorise
from welore.forms import DENSE, FACTORED, FORMS, ORDER_BYTES, cost
from welore.lowrank import LAYERS, LowRank, PivotedLinear
from welore.parallel import spread
from welore.pivot import product, tensors
from welore.plan import Plan, allocate
from welore.progress import Progress, silent
from welore.scaling import metric
from welore.source import ModelWeights
from welore.spectra import NONE
from welore.targets import Target, dense_skeleton, find_targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def replace_module(model: nn.Module, name: str, rank: int, form: str = FACTORED) -> LowRank:
    """Put an (uninitialised) low-rank layer in the place of the linear layer `name`; its bias is kept."""
    if not has_module(model, name):
        raise WeLoreError(f"config.json gives a rank to {name}, but {type(model).__name__} has no such layer")
    old = model.get_submodule(name)
    weight, bias = old.weight, old.bias
    assert isinstance(weight, Tensor)
    m, n = weight.shape if isinstance(old, nn.Linear) else weight.shape[::-1]
    new = LAYERS[form](n, m, rank, device=weight.device, dtype=weight.dtype)
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
    progress: Progress = silent,
    **target: Any,
) -> Plan:
    """Compress a model in memory, in place, by a plan or by the target and settings of `allocate`.

    scaling, calibration: see `analysis.analyze`; a plan has its own scaling.
    """
    if plan is not None:
        include, exclude = plan.include, plan.exclude
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise WeLoreError("this model is spread over several devices: load it on one to compress it in memory")
    weights = ModelWeights(model, include, exclude)
    known = opened_calibration(calibration, weights)
    if plan is None:
        how: dict[str, Any] = {"workers": workers, "progress": progress}
        plan = allocate(analyze_weights(weights, scaling=scaling, calibration=known, **how), **target)
    else:
        check_plan(plan, weights, known)
    chosen = {a.name: a for a in plan.allocations if a.factored}
    todo = [t for t in weights.targets if t.name in chosen]

    def compute(t: Target) -> dict[str, Tensor]:
        a = chosen[t.name]
        factors = factorise(weights.read(t), a.kept, a.relative_error, metric=metric(plan.scaling, known, t.name))
        return tensors(factors.A, factors.B, a.form)

    found = spread(compute, todo, [t.cost for t in todo], workers=workers, progress=progress, label="factors")
    for t, parts in zip(todo, found, strict=True):
        state = replace_module(model, t.name, chosen[t.name].kept, chosen[t.name].form).state_dict()
        for part, tensor in parts.items():
            state[part].copy_(tensor)
    return plan


def merge_model(model: "PreTrainedModel") -> None:
    """Make a compressed model in memory dense again, in place: every low-rank layer becomes its product."""
    skeleton = dense_skeleton(model.config, type(model))
    for name, layer in [(n, module) for n, module in model.named_modules() if isinstance(module, LowRank)]:
        dense = skeleton.get_submodule(name)  # nn.Linear, or GPT-2's Conv1D, which stores W^T
        parts = layer.state_dict()
        W = product(parts, layer.form).to(parts[FORMS[layer.form][0]].dtype)
        dense.weight = nn.Parameter(W if isinstance(dense, nn.Linear) else W.T.contiguous())
        dense.register_parameter("bias", layer.bias)
        dense.train(layer.training)
        model.set_submodule(name, dense)


def sizes(model: "PreTrainedModel") -> dict[str, Any]:
    """ERR, parameter ratio, parameters and bytes, counted on the model itself; dense: 0, 1.

    parameters, bytes: everything that is stored, tied weights once, in the dtype of the model; in the bytes also the
    orders of pivoted layers.
    """
    config: Any = getattr(model.config, "quantization_config", None)
    about = dict(config) if isinstance(config, Mapping) else config.to_dict() if config is not None else {}
    ranks_removed = full_ranks = stored = dense = orders = 0
    for target in find_targets(model, about.get("include", ()), about.get("exclude", ())):
        m, n = target.shape
        layer = model.get_submodule(target.name)
        rank, form = (layer.rank, layer.form) if isinstance(layer, LowRank) else (min(m, n), DENSE)
        full_ranks += min(m, n)
        dense += m * n
        stored += cost(m, n, rank, form)
        ranks_removed += min(m, n) - rank
        orders += ORDER_BYTES * m if isinstance(layer, PivotedLinear) else 0
    return {
        "rank_reduction": ranks_removed / full_ranks,
        "parameter_ratio": stored / dense,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": sum(p.numel() * p.element_size() for p in model.parameters()) + orders,
    }


def has_module(model: nn.Module, name: str) -> bool:
    """Whether `model` has a module called `name`."""
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True
