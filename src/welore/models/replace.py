"""Compress and merge a model in memory: linear layers are exchanged in place."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from welore.errors import WeLoreError
from welore.layers.block_grid import block_names
from welore.layers.int8 import SCALE
from welore.layers.low_rank import LowRankLayer, SplitLinear
from welore.layers.storage_forms import FACTORED, FORMS
from welore.models.experts import unfused
from welore.models.key_names import loaded_name, of_layer
from welore.models.mlp import resize_layers
from welore.models.skeleton import dense_skeleton
from welore.models.targets import find_targets, in_blocks, kind_of, known_kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from welore.models.quantizer import WeLoreConfig

Layer = TypeVar("Layer", LowRankLayer, SplitLinear)


def replace_module(model: nn.Module, name: str, rank: int, form: str = FACTORED) -> LowRankLayer:
    """Put an (uninitialised) low-rank layer in the place of the linear layer `name`; its bias is kept."""
    return _exchanged(model, name, lambda n, m, **like: FORMS[form].layer(n, m, rank, **like))


def _exchanged(model: nn.Module, name: str, make: Callable[..., Layer]) -> Layer:
    old: Any = model.get_submodule(name)
    m, n = known_kind(old).shape(old)
    new = make(n, m, device=old.weight.device, dtype=old.weight.dtype)
    _as_before(new, old)
    if old.bias is not None:
        new.bias = old.bias
    model.set_submodule(name, new)
    return new


def _as_before(new: nn.Module, old: nn.Module) -> None:
    """Give a layer the mode, the hooks and the frozen weights of the one in whose place it comes."""
    new.train(old.training)
    if not any(parameter.requires_grad for name, parameter in old.named_parameters() if name != "bias"):
        new.requires_grad_(False)
    for name in filter(re.compile(r"(_is_full)?_(for|back)ward(_pre)?_hooks?(_\w+)?").fullmatch, vars(old)):
        setattr(new, name, getattr(old, name))


def build_layer(model: nn.Module, layer: str, config: "WeLoreConfig", others: Sequence[str] = ()) -> None:
    """Put the (uninitialised) layer that a compression describes in the place of a dense one; its bias is kept.

    others: layers of the model that share its weight (`shared_layers`), and share what stands for it.
    """
    if not has_module(model, layer) or kind_of(model.get_submodule(layer)) is None:
        raise WeLoreError(f"config.json compresses {layer}; {type(model).__name__} has no such layer that is linear")
    ranks, grid = config.ranks or {}, config.split.get(layer)
    for copy in (layer, *others):
        if copy != layer and model.get_submodule(copy) is model.get_submodule(layer):
            continue  # a module that lies in several places
        if layer in config.shapes:
            resize_layers(model, {copy: config.shapes[layer]})
        if grid is None:
            pairs = {copy: layer}
        else:
            _exchanged(model, copy, lambda n, m, **like: SplitLinear(n, m, grid, **like))
            pairs = dict(zip(block_names(copy, grid), block_names(layer, grid), strict=True))
        for part, matrix in pairs.items():
            if matrix in ranks:
                replace_module(model, part, ranks[matrix], config.forms.get(matrix, FACTORED))
        if copy != layer:
            share_layer(model, layer, copy)


def share_layer(model: nn.Module, name: str, other: str) -> None:
    """Give a layer the tensors of another one of its shape; they are saved under the name of that one."""
    tied, copy = getattr(model, "all_tied_weights_keys", {}), model.get_submodule(other)
    tied.pop(f"{other}.weight", None)
    for part, tensor in (*model.get_submodule(name).named_parameters(), *model.get_submodule(name).named_buffers()):
        owner, _, key = part.rpartition(".")
        setattr(copy.get_submodule(owner), key, tensor)
        if isinstance(tensor, nn.Parameter):
            tied[f"{other}.{part}"] = f"{name}.{part}"  # what transformers ties when it loads and saves
    for module in copy.modules():
        module._non_persistent_buffers_set.update(module._buffers)


def restore_layer(model: nn.Module, name: str, dense: nn.Module) -> None:
    """Put the (uninitialised) layer `dense` in the place of a compressed one; a bias of its size is kept."""
    old = model.get_submodule(name)
    like, bias, full = next(old.parameters()), *(layer._parameters.get("bias") for layer in (old, dense))
    dense.to_empty(device=like.device).to(like.dtype)
    _as_before(dense, old)
    if bias is not None and full is not None and full.shape == bias.shape:
        dense.register_parameter("bias", bias)
    model.set_submodule(name, dense)


def sizes(model: "PreTrainedModel") -> dict[str, Any]:
    """ERR, parameter ratio, parameters and bytes, counted on the model itself; dense: 0, 1.

    parameters, bytes: everything that is stored, tied weights once, in the dtype of the model; in the bytes also the
    indices of low-rank layers.
    """
    config, model = {"include": (), "exclude": ()} | compression_config(model), unfused(model)
    patterns = config["include"], config["exclude"]
    ranks_removed = full_ranks = stored = dense = indices = 0
    rename = submodule_names(model)
    grids = {rename(name): grid for name, grid in config.get("grids", {}).items()}
    for target in in_blocks(find_targets(model, *patterns), grids):
        m, n = target.shape
        layer = model.get_submodule(target.name) if has_module(model, target.name) else None
        full_ranks += min(m, n)
        dense += m * n
        if not isinstance(layer, LowRankLayer):
            stored += m * n
            continue
        ranks_removed += min(m, n) - layer.rank
        stored += FORMS[layer.form].cost(m, n, layer.rank)
        indices += sum(layer.get_buffer(part).nbytes for part in FORMS[layer.form].indices)
    if config.get("shapes"):  # neurons were taken out
        original = find_targets(dense_skeleton(model.config, type(model)), *patterns)
        dense = sum(math.prod(target.shape) for target in original)
    return {
        "rank_reduction": ranks_removed / full_ranks,
        "parameter_ratio": stored / dense,
        "parameters": sum(p.numel() for name, p in model.named_parameters() if not name.endswith(SCALE)),
        "bytes": sum(p.numel() * p.element_size() for p in model.parameters()) + indices,
    }


def compression_config(model: nn.Module) -> dict[str, Any]:
    """The fields of a model's compression, {} for a dense one."""
    config: Any = getattr(model.config, "quantization_config", None)
    return dict(config) if isinstance(config, Mapping) else config.to_dict() if config is not None else {}


def submodule_names(model: Any) -> Callable[[str], str]:
    """Name of a layer or block in config.json -> its name in `model`.

    A bare AutoModel leaves out the first component; what lies in files under other names has those there, too.
    """
    rename = loaded_name(model) if hasattr(model, "base_model_prefix") else str

    def name_of(name: str) -> str:
        for own in (name, name.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")):
            if has_module(model, own):
                return own
        return of_layer(rename, name)

    return name_of


def has_module(model: nn.Module, name: str) -> bool:
    """Whether `model` has a module called `name`."""
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True
