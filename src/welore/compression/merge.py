"""merge: a compressed model -> a dense one, W = A B, which needs nothing of this package."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor

from welore.config import SHARD_SIZE, RunOptions
from welore.errors import WeLoreError
from welore.io.checkpoint import OutputTensors, check_finite
from welore.io.claim import claimed, require_unread
from welore.io.context import RunContext, own_modes
from welore.io.safetensors_stream import TensorInfo
from welore.layers.block_grid import Grid, block_names
from welore.layers.storage_forms import FACTORED, FORMS
from welore.models.card import read_card, write_card
from welore.models.mlp import outputs_per_neuron, pad_neurons
from welore.models.quantizer import METHOD, WeLoreConfig
from welore.models.sink import open_sink
from welore.models.source import CheckpointSource, TensorSource, open_source
from welore.models.targets import known_kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MADE = "The factors of the compressed model are multiplied back, W = A B: this is an ordinary, dense checkpoint."


@own_modes()
def merge(
    model: "str | Path | PreTrainedModel",
    output_dir: str | Path | None = None,
    *,
    max_shard_size: str = SHARD_SIZE,
    **options: Unpack[RunOptions],
) -> Path | None:
    """Make a compressed model dense again: every low-rank layer becomes its product W = A B (m, n).

    Args:
        model: Hub id, directory or a model in memory, which is changed in place.
        output_dir: The directory to write; a model in memory is saved there if it is given.
        max_shard_size: Largest size of one weight file.
        **options: Where downloads lie and what may be replaced (config.RunOptions).

    Returns:
        The directory, or None.

    Raises:
        WeLoreError: If the model is not one that `compress` made, or the directory may not be written.
    """
    context = RunContext.create(**options)
    with claimed(output_dir, model, overwrite=context.overwrite, marker="config.json"):
        _merge(model, output_dir, max_shard_size, context)
    return None if output_dir is None else Path(output_dir)


def _merge(model: Any, output_dir: str | Path | None, max_shard_size: str, context: RunContext) -> None:
    source = open_source(model, context)
    config = welore_config(source)
    if config is None:
        raise WeLoreError(
            f"{source.name} has no low-rank layers of welore: there is nothing to merge, it loads as it is"
        )
    if config.int8 and not isinstance(source, CheckpointSource):
        raise WeLoreError("the weights of this model are int8: merge its directory, one matrix after the other")
    if isinstance(source, CheckpointSource) and output_dir is not None:
        require_unread(output_dir, source.directory)
    outputs = merged_tensors(source, config, source.empty_skeleton(), context)
    with open_sink(source, output_dir, max_shard_size=max_shard_size, overwrite=context.overwrite) as sink:
        sink.write(outputs, None, context.progress)
        if sink.directory is not None:
            origin = read_card(source.directory) if isinstance(source, CheckpointSource) else ""
            write_card(sink.directory, source.name, origin, relation="finetune", made=MADE)


def welore_config(source: TensorSource) -> WeLoreConfig | None:
    """How a model is compressed, under the names of its modules; None if it is not."""
    settings: Any = source.config if isinstance(source, CheckpointSource) else source.skeleton.config
    config = getattr(settings, "quantization_config", None)
    if isinstance(config, dict) and config.get("quant_method") == METHOD:
        config = WeLoreConfig.read(config)
    return config.within(source.skeleton) if isinstance(config, WeLoreConfig) else None  # it may be a bare AutoModel


def merged_tensors(
    source: TensorSource, config: WeLoreConfig, skeleton: "PreTrainedModel", context: RunContext
) -> list[OutputTensors]:
    """The tensors of the dense model: the product where there were factors, everything else as it is.

    skeleton: the dense model. Layers that are smaller than there are filled up with zeros.
    """
    ranks, split = config.ranks or {}, config.split
    copies = outputs_per_neuron(source.empty_skeleton()) if config.shapes else {}
    forms = {name: config.forms.get(name, FACTORED) for name in ranks}

    def matrix(name: str) -> Tensor:
        if name in split:
            return joined([matrix(block) for block in block_names(name, split[name])], split[name])
        if name not in forms:
            return source.tensor(f"{name}.weight")
        form = FORMS[forms[name]]
        stored = {part: source.tensor(f"{name}.{part}") for part in form.parts}
        device = next(iter(stored.values())).device
        return form.unpack({part: tensor.to(context.device) for part, tensor in stored.items()}).to(device)

    def make(name: str, dtype: torch.dtype) -> dict[str, list[Tensor]]:
        layer, _, part = name.rpartition(".")
        dense = skeleton.get_submodule(layer)
        low_rank = part == "weight" and (layer in split or layer in forms)
        values = known_kind(dense).stored(matrix(layer)) if low_rank else source.tensor(name)
        values = pad_neurons(dense, values, copies.get(layer, 1)).to(dtype)
        check_finite(name, values)
        return {name: [values.flatten()]}

    parts = {f"{name}.{part}" for name, form in forms.items() for part in FORMS[form].parts}
    parts |= {f"{name}.weight" for layer, grid in split.items() for name in block_names(layer, grid)}
    changed, outputs = set(config.layers), []
    for name in source.names():
        layer = name.rpartition(".")[0]
        if name in parts:
            continue
        if layer in changed and name.removeprefix(f"{layer}.") in skeleton.get_submodule(layer)._parameters:
            info = TensorInfo(source.info(name).dtype, tuple(skeleton.get_parameter(name).shape))
            outputs.append(OutputTensors({name: info}, partial(make, name, info.dtype), layer))
        else:
            outputs.append(source.copied(name))
    return outputs


def joined(blocks: list[Tensor], grid: Grid) -> Tensor:
    """The matrix of these blocks, given row by row."""
    across = grid[1]
    return torch.cat([torch.cat(tuple(blocks[i : i + across]), 1) for i in range(0, len(blocks), across)])
