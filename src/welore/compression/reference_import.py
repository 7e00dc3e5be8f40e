"""Files of the paper's reference scripts: their singular values and their compressed state dict.

Both are torch files; they are read with weights_only=True, so nothing in them is ever executed.
"""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from welore.allocation.plan import Allocation, Plan
from welore.allocation.spectra import Spectra
from welore.config import SHARD_SIZE, RunOptions
from welore.errors import WeLoreError
from welore.io.atomic import atomic_directory
from welore.io.checkpoint import RECORD, OutputTensors, check_finite
from welore.io.claim import claimed, require_unread
from welore.io.context import RunContext
from welore.io.hub import resolve_model
from welore.io.safetensors_stream import FLOATS, TensorInfo
from welore.models.card import read_card, write_card
from welore.models.quantizer import WeLoreConfig
from welore.models.sink import DirectorySink
from welore.models.skeleton import decoder_blocks, skeleton_of
from welore.models.source import open_source
from welore.models.targets import find_targets
from welore.records import Identity, Record


def import_singular_values(
    path: str | Path,
    model: str | Path,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    **options: Unpack[RunOptions],
) -> Spectra:
    """Spectra of MODEL from a torch file {layer index: {"self_attn.q_proj": values (k,), ...}}."""
    content = _load(path)
    weights = open_source(model, RunContext.create(**options), include=include, exclude=exclude)
    blocks, _ = decoder_blocks(weights.skeleton)
    values = {}
    for target in weights.targets:
        layer, _, kind = target.name.removeprefix(blocks + ".").partition(".")
        entry = content.get(int(layer), content.get(layer)) if layer.isdigit() else None  # by number or by text
        stored = entry.get(kind) if isinstance(entry, Mapping) else None
        if not isinstance(stored, Tensor):
            raise WeLoreError(f"{path} has no singular values of layer {layer}, {kind}")
        _check_plain(path, f"layer {layer}, {kind}", stored)
        sigma = np.sort(stored.detach().to(torch.float64).flatten().numpy())[::-1].copy()
        if len(sigma) != min(target.shape):
            raise WeLoreError(f"{path}: layer {layer}, {kind} has {len(sigma)} values, not {min(target.shape)}")
        if not np.isfinite(sigma).all():
            raise WeLoreError(f"{path}: layer {layer}, {kind} has NaN or Inf among its values")
        values[target.name] = sigma
    shapes = {target.name: target.shape for target in weights.targets}
    return Spectra(weights.identity, values, shapes, weights.include, weights.exclude)


def import_checkpoint(
    path: str | Path,
    model: str | Path,
    output_dir: str | Path,
    *,
    max_shard_size: str = SHARD_SIZE,
    **options: Unpack[RunOptions],
) -> Record:
    """Write a checkpoint of ours from a state dict whose LRCs are `NAME.U.weight` (m, r), `NAME.V.weight` (r, n).

    model: gives the configuration and the tokenizer; its own weights are not read. U becomes A, V becomes B.
    """
    context = RunContext.create(**options)
    with claimed(output_dir, path, model, overwrite=context.overwrite, marker="config.json"):
        return _import_checkpoint(path, model, output_dir, max_shard_size, context)


def _import_checkpoint(
    path: str | Path, model: str | Path, output_dir: str | Path, max_shard_size: str, context: RunContext
) -> Record:
    started = time.perf_counter()
    state = _load(path)
    directory = resolve_model(model, cache_dir=context.cache_dir, revision=context.revision)
    require_unread(output_dir, directory)
    outputs, ranks, numbers = _plan_import(state, path, directory)
    with atomic_directory(output_dir, overwrite=context.overwrite) as unfinished:
        sink = DirectorySink(directory, unfinished, max_shard_size)
        numbers["bytes"] = sink.write(outputs, WeLoreConfig(ranks), context.progress)
        numbers["seconds"] = time.perf_counter() - started
        settings: dict[str, Any] = {"strategy": "imported", "target": {}, "include": [], "exclude": []}
        record = Record("compression", {"model": str(model), "file": Path(path).name}, settings, numbers)
        record.save(unfinished / RECORD)
        write_card(unfinished, str(model), read_card(directory))
    return record


def _plan_import(
    state: Mapping[str, Any], path: str | Path, directory: Path
) -> tuple[list[OutputTensors], dict[str, int], dict[str, Any]]:
    skeleton = skeleton_of(directory, str(directory))
    targets = {target.name: target for target in find_targets(skeleton)}
    ranks: dict[str, int] = {}
    steps = []
    for name, parameter in skeleton.named_parameters():  # tied weights once
        module = name.removesuffix(".weight")
        U, V = state.get(f"{module}.U.weight"), state.get(f"{module}.V.weight")
        if isinstance(U, Tensor) and isinstance(V, Tensor) and module in targets:
            (m, n), r = targets[module].shape, U.shape[-1] if U.ndim else 0
            _check_shape(path, f"{module}.U.weight", U, (m, r))
            _check_shape(path, f"{module}.V.weight", V, (r, n))
            if not 1 <= r <= min(m, n):
                raise WeLoreError(f"{path}: {module} has rank {r}, a matrix {(m, n)} has ranks from 1 to {min(m, n)}")
            ranks[module] = r
            parts = {f"{module}.A.weight": U, f"{module}.B.weight": V, name: torch.empty(0, dtype=U.dtype)}
        else:
            tensor = state.get(name)
            if not isinstance(tensor, Tensor):
                raise WeLoreError(f"{path} has neither {name} nor its factors {module}.U.weight and {module}.V.weight")
            _check_shape(path, name, tensor, tuple(parameter.shape))
            parts = {name: tensor}
        infos = {key: TensorInfo(t.dtype, tuple(t.shape)) for key, t in parts.items()}
        steps.append(OutputTensors(infos, partial(_checked, parts)))
    allocations = tuple(
        Allocation(name, t.shape, ranks.get(name, min(t.shape)), name in ranks, 0.0) for name, t in targets.items()
    )
    numbers = Plan(Identity("", ""), "imported", {}, 0.0, False, 0.0, allocations).numbers()
    del numbers["threshold"]
    return steps, ranks, numbers


def _checked(parts: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    for name, tensor in parts.items():
        check_finite(name, tensor)
    return {name: [tensor.detach().flatten()] if tensor.numel() else [] for name, tensor in parts.items()}


def _check_plain(path: str | Path, name: str, tensor: Tensor) -> None:
    """Raise WeLoreError unless a tensor is one of floats that lies in the file as it is."""
    if tensor.dtype not in FLOATS or tensor.layout != torch.strided or tensor.is_meta:
        raise WeLoreError(f"{path}: {name} is no dense tensor of float numbers ({tensor.dtype}, {tensor.layout})")


def _check_shape(path: str | Path, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    _check_plain(path, name, tensor)
    if tuple(tensor.shape) != shape:
        raise WeLoreError(f"{path}: {name} has shape {tuple(tensor.shape)}, the model needs {shape}")


def _load(path: str | Path) -> Mapping[Any, Any]:
    if not Path(path).is_file():
        raise WeLoreError(f"{path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of a damaged file the reader makes any error
        raise WeLoreError(f"{path} is not a torch file of plain tensors: nothing else is ever unpickled") from error
    if not isinstance(content, Mapping):
        raise WeLoreError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content
