"""Weights in 8 bits: which layers of a model have them, and their exchange, in memory and on the way to files."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from welore.io.checkpoint import OutputTensors
from welore.io.safetensors_stream import CHUNK, TensorInfo
from welore.layers.block_grid import block_names
from welore.layers.int8 import Int8Embedding, Int8Layer, Int8Linear, quantize_rows
from welore.layers.storage_forms import FACTORED, FORMS
from welore.models.replace import share_layer
from welore.models.targets import LINEAR, find_targets, kind_of, known_kind, reads_weight, shared_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from welore.models.quantizer import WeLoreConfig

WEIGHT = ".weight"


def with_int8(config: "WeLoreConfig", model: "PreTrainedModel", outputs: Iterable[OutputTensors]) -> "WeLoreConfig":
    """The config of the same model with all weights in 8 bits that can be: factors, dense layers, embeddings and head.

    Biases, norms, routers and weights that the code around their layer reads itself stay.

    model: dense, may be on meta. outputs: the tensors that are stored.
    """
    ranks, shared = config.ranks or {}, shared_layers(model)
    names = [
        f"{name}.{part.removesuffix(WEIGHT)}"
        for name in ranks
        for part in FORMS[config.forms.get(name, FACTORED)].numbers
    ]
    names += [n for layer, grid in config.split.items() for n in block_names(layer, grid) if n not in ranks]
    tied = {other for others in shared.values() for other in others} | set(shared)
    dense = [target.name for target in find_targets(model) if target.name not in {*ranks, *config.split, *tied}]
    names += [name for name in dense if not reads_weight(model, name)] + _ends(model, shared)
    stored = {name for output in outputs for name in output.tensors}
    return config.quantized([name for name in dict.fromkeys(names) if name + WEIGHT in stored])


def _ends(model: "PreTrainedModel", shared: Mapping[str, Sequence[str]]) -> list[str]:
    """The embedding and the head, the first alone where they share a weight; not one that others share or read."""
    names = {id(module): name for name, module in model.named_modules()}
    ends = [names[id(m)] for m in (model.get_input_embeddings(), model.get_output_embeddings()) if id(m) in names]

    def fits(name: str) -> bool:
        layer: Any = model.get_submodule(name)
        known = layer.max_norm is None if isinstance(layer, nn.Embedding) else kind_of(layer) is LINEAR
        return known and not reads_weight(model, name)

    groups = [[first, *others] for first, others in shared.items()]
    groups = [next((group for group in groups if name in group), [name]) for name in ends]
    return [group[0] for group in groups if set(group) <= set(ends) and all(map(fits, group))]


def quantize_layers(model: nn.Module, names: Sequence[str]) -> None:
    """Put 8-bit layers in the place of those of these names, and of those that share their weights.

    Their numbers are quantized, but for a model on meta, whose numbers are yet to come.
    """
    shared = shared_layers(model)
    for name in names:
        model.set_submodule(name, _quantized(model.get_submodule(name)))
    for first, others in shared.items():
        inside = [name for name in names if f"{name}.".startswith(f"{first}.")]
        for other in others if inside else ():
            for name in inside:
                copy = other + name.removeprefix(first)
                if not isinstance(model.get_submodule(copy), Int8Layer):  # of a layer in several places
                    model.set_submodule(copy, _quantized(model.get_submodule(copy)))
            share_layer(model, first, other)


@torch.no_grad()
def _quantized(layer: Any) -> Any:
    if isinstance(layer, nn.Embedding):
        new: Any = Int8Embedding.of(layer)
        W = layer.weight
    else:
        kind, like = known_kind(layer), layer.weight
        m, n = kind.shape(layer)
        new, W = Int8Linear(n, m, device=like.device, dtype=like.dtype), kind.matrix(like)
        new.bias = layer.bias
    new.weight._is_hf_initialized = True  # transformers cannot draw integers for a layer that stays on the disk
    if not W.is_meta:
        for part, numbers in zip((new.weight, new.weight_scale), quantize_rows(W), strict=True):
            part.copy_(numbers)
    new.train(layer.training)
    return new


def quantized_tensors(
    outputs: Iterable[OutputTensors], model: "PreTrainedModel", names: Sequence[str]
) -> list[OutputTensors]:
    """The same output with the weights of these layers in 8 bits, each stored once.

    model: dense, may be on meta.
    """
    chosen = set(names)
    repeated = {f"{n}{WEIGHT}" for first, rest in shared_layers(model).items() if first in chosen for n in rest}
    kinds = {name: kind_of(layer) for name, layer in model.named_modules() if name in chosen}
    transposed = {f"{name}{WEIGHT}" for name, kind in kinds.items() if kind is not None and kind.transposed}
    quantized = []
    for output in outputs:
        infos: dict[str, TensorInfo] = {}
        for name, info in output.tensors.items():
            if name in repeated:
                continue
            if name.removesuffix(WEIGHT) not in chosen:
                infos[name] = info
                continue
            shape = info.shape[::-1] if name in transposed else info.shape
            infos |= {name: TensorInfo(torch.int8, shape), f"{name}_scale": TensorInfo(info.dtype, (shape[0], 1))}
        if infos:
            quantized.append(replace(output, tensors=infos, make=partial(_make, output, infos, transposed)))
    return quantized


def _make(output: OutputTensors, infos: Mapping[str, TensorInfo], transposed: set[str]) -> dict[str, Iterable[Tensor]]:
    made: dict[str, Iterable[Tensor]] = {}
    for name, chunks in output.make().items():
        if f"{name}_scale" not in infos:
            made[name] = chunks
            continue
        m, n = infos[name].shape
        scales: list[Tensor] = []
        if name in transposed:
            chunks = [torch.cat(list(chunks)).view(n, m).T]
        made |= {name: _rows(chunks, n, scales), f"{name}_scale": scales}  # which the rows fill when they are written
    return made


def _rows(chunks: Iterable[Tensor], columns: int, scales: list[Tensor]) -> Iterator[Tensor]:
    """The int8 rows of a weight that comes in pieces of some rows; their scales are added to `scales`."""
    for chunk in chunks:
        for W in chunk.reshape(-1, columns).split(max(1, CHUNK // columns)):
            weight, scale = quantize_rows(W)
            scales.append(scale.flatten())
            yield weight.flatten()
