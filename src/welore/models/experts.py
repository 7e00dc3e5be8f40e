"""Mixtures of experts: a family's 3-D parameters as ordinary linear layers, and back.

transformers keeps the experts of a layer in a few parameters (experts, ...), which it makes of the files' matrices when
it loads them. Here they are taken apart, so that every matrix of every expert is a linear layer with the name
LAYER.experts.NUMBER.gate_proj, up_proj or down_proj (gate_up_proj where a family mixes the rows of both).
"""

import copy
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)

from welore.io.checkpoint import CheckpointReader, OutputTensors
from welore.io.safetensors_stream import TensorInfo
from welore.layers.experts import DOWN, Expert, Experts, Gate, RepeatingExperts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPEATING = "Llama4TextExperts"  # the class that has no settings of transformers' interface; it would have these
SETTINGS = {"has_gate": True, "has_bias": False, "is_concatenated": True, "is_transposed": True}


@dataclass(frozen=True)
class FusedTensor:
    """A parameter (experts, ...) of fused experts: what it holds of each of them.

    layers: whose tensors lie below each other in it. part: weight or bias. transposed: matrices are W^T.
    """

    name: str
    layers: tuple[str, ...]
    part: str
    transposed: bool

    def split(self, tensor: Tensor) -> list[Tensor]:
        """W (m, n) or the bias (m,) of every layer: views of what the parameter holds of one expert."""
        return list((tensor.T if self._turned(tensor) else tensor).chunk(len(self.layers)))

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """The part of the parameter that is one expert's."""
        joined = torch.cat(tuple(tensors))
        return joined.T if self._turned(joined) else joined

    def names(self, experts: str, number: int) -> list[str]:
        """The tensors of one expert; experts: name of the module of all of them."""
        return [f"{experts}.{number}.{layer}.{self.part}" for layer in self.layers]

    def _turned(self, tensor: Tensor) -> bool:
        return self.transposed and tensor.ndim > 1


@dataclass(frozen=True)
class Slice:
    """Where a tensor of one expert lies in the files: in the tensor `key`, as that of the layer at a position."""

    key: str
    fused: FusedTensor
    number: int
    position: int

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor, W (m, n) or a bias (m,); stored: that of the tensor in the files."""
        m, *n = stored[:0:-1] if self.fused.transposed and len(stored) > 2 else stored[1:]
        return (m // len(self.fused.layers), *n)

    def read(self, files: CheckpointReader, rows: int | None = None) -> Tensor:
        """The tensor, or its first rows."""
        stored = files.entries[self.key].shape
        m = self.shape(stored)[0]
        start, across = self.position * m, self.fused.transposed and len(stored) > 2
        part = slice(start, start + (m if rows is None else min(rows, m)))
        values = files.readers[self.key].part(self.key, self.number, *[slice(None)] * across, part)
        return values.T if across else values


def slices_of(key: str, name: str, fused: FusedTensor, count: int) -> dict[str, Slice]:
    """Name -> place of the tensors in a 3-D tensor that is called `name` in the model."""
    experts = name.rpartition(".")[0]
    return {
        own: Slice(key, fused, number, position)
        for number in range(count)
        for position, own in enumerate(fused.names(experts, number))
    }


def fused_tensors(fused: Any) -> list[FusedTensor]:
    """The parameters of a family's module of fused experts."""
    gate, bias, concatenated, transposed = (getattr(fused, name, default) for name, default in SETTINGS.items())
    up = "gate_up_proj" if gate else "up_proj"
    layers = {up: ("gate_proj", "up_proj") if gate and concatenated else (up,), DOWN: (DOWN,)}
    tensors = [FusedTensor(name, group, "weight", transposed) for name, group in layers.items()]
    return tensors + [FusedTensor(f"{name}_bias", group, "bias", False) for name, group in layers.items()] * bias


def fused_experts(model: nn.Module) -> dict[str, Any]:
    """Name -> module of the fused experts that can be taken apart: {} where the files hold other parts of them."""
    modules: dict[str, Any] = {}
    for name, module in model.named_modules():
        known = type(module).__name__ == REPEATING or all(hasattr(module, own) for own in (*SETTINGS, "_apply_gate"))
        if known and "vision" not in name:
            own = {tensor.name for tensor in fused_tensors(module)}
            if not own ^ set(dict(module.named_parameters())) and not getattr(module, "has_post_expert_norm", False):
                modules[name] = module
    if not modules or not hasattr(model, "config"):
        return {}
    tensors = _parameters(modules)
    converters = [entry for entry in get_model_conversion_mapping(model) if _converts(entry, tensors)]  # type: ignore[arg-type]
    return modules if all(_merges(entry) or _turns(entry) for entry in converters) else {}


def experts_of(model: nn.Module) -> dict[str, int]:
    """Name of every mixture of a model whose experts are apart -> how many it has."""
    return {name: len(list(m.children())) for name, m in model.named_modules() if isinstance(m, Experts)}


def fused_names(model: nn.Module) -> dict[str, FusedTensor]:
    """Name -> parameter that the experts of a model would be, which are apart."""
    return _parameters({name: module for name, module in model.named_modules() if isinstance(module, Experts)})


def with_turned(tensors: dict[str, FusedTensor], turned: Collection[str]) -> dict[str, FusedTensor]:
    """The same parameters as in files that hold the matrices of some of them the other way."""
    return tensors | {name: replace(tensors[name], transposed=not tensors[name].transposed) for name in turned}


# --- apart and together ----------------------------------------------------------------------------------------------


def unfuse(model: Any, *, views: bool = False) -> None:
    """Take the fused experts of a model apart, in place; views: their weights stay parts of the 3-D parameters."""
    modules = fused_experts(model)
    if not modules:
        return
    for name, module in modules.items():
        model.set_submodule(name, _apart(module, views=views))
    model._weight_conversions = unmerged(conversions(model), model)


def unfused(model: Any) -> Any:
    """The model with its experts apart: itself, or another one with the same tensors."""
    if not fused_experts(model):
        return model
    twin = _twin(model)
    unfuse(twin, views=True)
    return twin


def fused(model: Any) -> Any:
    """A dense model with its experts together, as its family has them: itself, or another one with the same numbers.

    A compressed model whose experts are layers of their own stays as it is.
    """
    if not experts_of(model) or getattr(model.config, "quantization_config", None) is not None:
        return model
    twin = _twin(model)
    fuse(twin)
    return twin


def _twin(model: Any) -> Any:
    """Other modules that hold the same tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


@torch.no_grad()
def fuse(model: Any) -> None:
    """Put the experts of a model, all dense again, back into 3-D parameters, in place."""
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, Experts)]
    for name, module in modules:
        fused = copy.copy(module.gate.fused)
        fused._parameters = {}
        for tensor in fused_tensors(fused):
            inside = [f"{layer}.{tensor.part}" for layer in tensor.layers]
            parts = [[expert.get_parameter(name) for name in inside] for expert in module.children()]
            stacked = torch.stack([tensor.join(part) for part in parts])
            fused.register_parameter(tensor.name, nn.Parameter(stacked, requires_grad=parts[0][0].requires_grad))
        model.set_submodule(name, fused.train(module.training))
    if modules:
        used = [entry for entry in conversions(model) if not isinstance(entry, ExpertRenaming)]
        known, tensors = [entry.source_patterns for entry in used], _parameters(dict(modules))
        missing = [entry for entry in _default_conversions(model) if entry.source_patterns not in known]
        model._weight_conversions = used + [entry for entry in missing if _makes(entry, tensors)]


def _apart(module: Any, *, views: bool) -> Experts:
    empty = copy.copy(module)
    empty._parameters = {}
    gate, kind = Gate(empty), RepeatingExperts if type(module).__name__ == REPEATING else Experts
    layers: list[dict[str, nn.Linear]] = [{} for _ in getattr(module, DOWN)]
    for tensor in fused_tensors(module):
        stacked = getattr(module, tensor.name)
        for own, values in zip(layers, stacked.detach().unbind(), strict=True):
            for name, part in zip(tensor.layers, tensor.split(values), strict=True):
                part = part if views else part.clone(memory_format=torch.contiguous_format)
                parameter = nn.Parameter(part, requires_grad=stacked.requires_grad)
                if tensor.part == "weight":
                    m, n = part.shape
                    own[name] = nn.Linear(n, m, bias=hasattr(module, f"{tensor.name}_bias"), device="meta")
                setattr(own[name], tensor.part, parameter)
    return kind([Expert(own, gate) for own in layers], gate).train(module.training)


# --- names in files --------------------------------------------------------------------------------------------------


class ExpertRenaming(WeightRenaming):
    """The name of a matrix of one expert in the files, and in a model whose experts are apart."""

    __slots__ = ()


def unmerged(mapping: Iterable[WeightTransform], model: nn.Module) -> list[WeightTransform]:
    """A mapping of transformers for a model whose experts are apart: it renames matrices and merges none of them."""
    tensors = fused_names(model)
    entries: list[WeightTransform] = []
    for entry in mapping:
        entries += _renamings(entry, tensors) if _converts(entry, tensors) else [entry]
    return entries


def fused_outputs(
    outputs: Iterable[OutputTensors], model: "PreTrainedModel", turned: Collection[str] = ()
) -> list[OutputTensors]:
    """The same output with the experts' tensors together, if the files of the family hold them so.

    model: dense, its experts apart; it may live on the meta device. turned: parameters that are to be written so.
    """
    tensors = fused_names(model)
    if any(_converts(entry, tensors) and not _turns(entry) for entry in get_model_conversion_mapping(model)):
        return list(outputs)
    tensors = with_turned(tensors, turned)
    parts: dict[str, str] = {}
    for name, tensor in tensors.items():
        experts = name.rpartition(".")[0]
        for number, _ in enumerate(model.get_submodule(experts).children()):
            parts |= dict.fromkeys(tensor.names(experts, number), name)
    pieces: dict[str, dict[str, OutputTensors]] = {}
    for output in outputs:
        name, *others = output.tensors
        assert name not in parts or not others, f"{name} is not alone"
        pieces.setdefault(parts.get(name, name), {})[name] = output
    return [_joined(name, tensors[name], own) if name in tensors else own[name] for name, own in pieces.items()]


def _joined(name: str, tensor: FusedTensor, pieces: dict[str, OutputTensors]) -> OutputTensors:
    """One 3-D tensor of the tensors of its experts, made one expert after the other."""
    experts, count = name.rpartition(".")[0], len(pieces) // len(tensor.layers)

    def values(number: int) -> list[Tensor]:
        outputs = [(n, pieces[n]) for n in tensor.names(experts, number)]
        return [torch.cat(list(o.make()[n])).view(o.tensors[n].shape) for n, o in outputs]

    infos = [pieces[n].tensors[n] for n in tensor.names(experts, 0)]
    shape = tensor.join([torch.empty(info.shape, device="meta") for info in infos]).shape
    info = TensorInfo(infos[0].dtype, (count, *shape))
    flat = partial(map, lambda number: tensor.join(values(number)).flatten(), range(count))
    return OutputTensors({name: info}, lambda: {name: flat()})


def conversions(model: Any) -> list[WeightTransform]:
    """The mapping of transformers by which a model is saved."""
    known: list[WeightTransform] | None = getattr(model, "_weight_conversions", None)
    return _default_conversions(model) if known is None else known


def _default_conversions(model: Any) -> list[WeightTransform]:
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    return [entry for entry in mapping if not isinstance(entry, PrefixChange)]  # as transformers does


def _parameters(modules: dict[str, Any]) -> dict[str, FusedTensor]:
    """Name in the model -> parameter, of fused experts or of those that are apart."""
    fused = {name: module.gate.fused if isinstance(module, Experts) else module for name, module in modules.items()}
    return {f"{name}.{tensor.name}": tensor for name, module in fused.items() for tensor in fused_tensors(module)}


def _makes(entry: WeightTransform, tensors: Iterable[str]) -> bool:
    """Whether transformers makes or renames one of these tensors by this entry."""
    back = entry.reverse_transform()
    return any(back._scoped_match(name) is not None for name in tensors)


def _converts(entry: WeightTransform, tensors: Iterable[str]) -> bool:
    return isinstance(entry, WeightConverter) and _makes(entry, tensors)


def _merges(entry: WeightTransform) -> bool:
    """Whether it puts the matrices of all experts together, and changes nothing else."""
    together = all(isinstance(op, MergeModulelist | Concatenate) for op in entry.operations)  # type: ignore[attr-defined]
    return together and all("*." in source for source in entry._original_source_patterns)


def _turns(entry: WeightTransform) -> bool:
    """Whether it turns the matrices of all experts where a file holds them the other way, and changes nothing else."""
    return all(isinstance(op, Transpose) and op.check_dims for op in entry.operations)  # type: ignore[attr-defined]


def _renamings(entry: WeightTransform, tensors: dict[str, FusedTensor]) -> list[ExpertRenaming]:
    """The layers' other names, which are left of an entry that merges; none of one that turns."""
    if _turns(entry):
        return []
    back = entry.reverse_transform()
    tensor = next(tensor for name, tensor in tensors.items() if back._scoped_match(name) is not None)
    target = entry._original_target_patterns[0].removesuffix(tensor.name)
    renamings = []
    for source, layer in zip(entry._original_source_patterns, tensor.layers, strict=True):
        head, _, own = source.removesuffix(".weight").partition("*.")
        if (head, own) == (target, layer):
            continue
        renaming = ExpertRenaming(rf"{head}(\d+)\.{own}\.", rf"{target}\1.{layer}.")
        renaming.scope_prefix, renaming.base_model_prefix = entry.scope_prefix, entry.base_model_prefix
        renamings.append(renaming)
    return renamings
