"""merge: a compressed directory -> a plain dense checkpoint, W = A B, that needs nothing of ours."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from welore.compression.in_memory import joined, merge_model
from welore.errors import WeLoreError
from welore.io.atomic import atomic_directory, read_json, require_free, require_outside
from welore.io.checkpoint import SHARD_SIZE, OutputTensors, weight_files, write_config, write_weights
from welore.io.hub import resolve_model
from welore.io.progress import Progress, silent
from welore.io.safetensors_stream import TensorInfo
from welore.layers.block_grid import block_names, split_layers
from welore.layers.registry import FACTORED, FORMS
from welore.models.mlp import outputs_per_neuron, pad_neurons
from welore.models.quantizer import METHOD, WeLoreConfig, check_factors
from welore.models.source import CheckpointSource
from welore.models.targets import known_kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def merge(
    model: "str | Path | PreTrainedModel",
    out: str | Path | None = None,
    *,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
    max_shard_size: str = SHARD_SIZE,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Path | None:
    """Write the dense checkpoint, W = A B, that needs nothing of ours; or make a model in memory dense again."""
    if isinstance(model, nn.Module):
        merge_model(model)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        if out is not None:
            with atomic_directory(out, overwrite=overwrite) as unfinished:
                model.save_pretrained(unfinished, max_shard_size=max_shard_size)
        return None if out is None else Path(out)
    if out is None:
        raise WeLoreError("name the directory to write: merge(model, out)")
    require_free(out, overwrite=overwrite)
    directory = resolve_model(model, cache_dir=cache_dir, revision=revision)
    require_outside(out, directory)
    about = read_json(directory / "config.json").get("quantization_config") or {}
    if about.get("quant_method") != METHOD:
        raise WeLoreError(f"{model} is not a checkpoint compressed by welore: there is nothing to merge")
    config = WeLoreConfig(**about)
    check_factors(config, weight_files(directory))
    with CheckpointSource(directory, str(model)) as source, atomic_directory(out, overwrite=overwrite) as unfinished:
        write_weights(unfinished, _merged(source, config), max_shard_size, progress)
        write_config(directory, unfinished, None)
    return Path(out)


def _merged(source: CheckpointSource, config: WeLoreConfig) -> list[OutputTensors]:
    """What the dense checkpoint holds: the product where there were factors, everything else as it is."""
    ranks = config.ranks or {}
    cut = split_layers(config.grids, ranks)
    copies = outputs_per_neuron(source.skeleton) if config.shapes else {}
    forms = {name: config.forms.get(name, FACTORED) for name in ranks}

    def matrix(name: str) -> Tensor:
        if name in cut:
            return joined([matrix(block) for block in block_names(name, cut[name])], cut[name])
        if name not in forms:
            return source.tensor(f"{name}.weight")
        return FORMS[forms[name]].unpack({part: source.tensor(f"{name}.{part}") for part in FORMS[forms[name]].parts})

    def dense(name: str, dtype: torch.dtype) -> dict[str, list[Tensor]]:
        W = known_kind(source.skeleton.get_submodule(name)).stored(matrix(name))
        return {f"{name}.weight": [restored(f"{name}.weight", W).to(dtype).flatten()]}

    def larger(key: str) -> dict[str, list[Tensor]]:
        return {key: [restored(key, source.tensor(key)).flatten()]}

    def restored(key: str, numbers: Tensor) -> Tensor:
        name = key.rpartition(".")[0]
        return pad_neurons(source.skeleton.get_submodule(name), numbers, copies.get(name, 1))

    gone = {f"{name}.{part}" for name, form in forms.items() for part in FORMS[form].parts}
    gone |= {f"{name}.weight" for layer, grid in cut.items() for name in block_names(layer, grid)}
    steps = []
    for key in source.names():
        name = key.removesuffix(".weight")
        if key in gone:
            continue
        if name in cut or name in forms:
            info = TensorInfo(source.info(key).dtype, tuple(source.skeleton.get_parameter(key).shape))
            steps.append(OutputTensors({key: info}, partial(dense, name, info.dtype), name))
        elif key.rpartition(".")[0] in config.shapes:
            info = TensorInfo(source.info(key).dtype, tuple(source.skeleton.get_parameter(key).shape))
            steps.append(OutputTensors({key: info}, partial(larger, key), key.rpartition(".")[0]))
        else:
            steps.append(source.copied(key))
    return steps
