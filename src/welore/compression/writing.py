"""The tensors of a compressed model, made from the factors one matrix at a time."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from welore.allocation.plan import Allocation, Plan
from welore.compression.expert_pruning import require_same_experts
from welore.compression.factorize import Factors
from welore.compression.plain import resizing_of
from welore.config import AUTO
from welore.io.checkpoint import PLAN, OutputTensors, weight_files
from welore.io.progress import Progress
from welore.io.safetensors_stream import TensorInfo
from welore.layers.int8 import INT8
from welore.layers.storage_forms import FORMS
from welore.models.int8 import with_int8
from welore.models.quantizer import WeLoreConfig
from welore.models.sink import TensorSink
from welore.models.source import CheckpointSource, TensorSource
from welore.models.targets import Target, census, in_blocks, shared_layers


def write_compressed(
    source: TensorSource, plan: Plan, factors: Factors, sink: TensorSink, progress: Progress, weights: str = AUTO
) -> dict[str, Any]:
    """Write the weights, the configuration and the plan of a compressed model; returns its sizes."""
    counts, original = census(source.skeleton, source.targets), source.original
    dense = sum(p.numel() for p in original.skeleton.parameters())
    dense_bytes = (
        sum(path.stat().st_size for path in weight_files(original.directory))
        if isinstance(original, CheckpointSource)
        else sum(p.numel() * p.element_size() for p in original.skeleton.parameters())
    )
    others = census(original.skeleton, original.targets).blocks_other
    outputs = compressed_tensors(source, plan, factors)
    config = resizing_of(original, plan) if plan.plain else WeLoreConfig.of(plan.in_result)
    if plan.experts:
        rename = plan.name_in_result
        outputs = [replace(o.renamed(rename), layer=None if o.layer is None else rename(o.layer)) for o in outputs]
        sink.take_out(require_same_experts(original, plan.experts), plan.experts)
    if weights == INT8:
        assert isinstance(config, WeLoreConfig)
        config = with_int8(config, original.skeleton, outputs)
    size = sink.write(outputs, config, progress)
    if sink.directory is not None:
        plan.save(sink.directory / PLAN)
        if (plan.plain or plan.experts) and isinstance(original, CheckpointSource):
            trust = original.trust_remote_code
            CheckpointSource(sink.directory, original.name, trust_remote_code=trust).require_complete()
    return {
        "bytes_dense": dense_bytes,
        "bytes": size,
        "parameters_dense": dense,
        "parameters": counts.total - counts.targeted + plan.stored_parameters,
        "block_parameters_dense": plan.dense_parameters + others,
        "block_parameters": plan.stored_parameters + counts.blocks_other,
        "left_dense_in_blocks": counts.blocks_other,
        "left_dense_names": list(counts.blocks_other_names),
    }


def compressed_tensors(source: TensorSource, plan: Plan, factors: Factors) -> list[OutputTensors]:
    """All tensors of the compressed model, in the order of the source."""
    allocations = {a.name: a for a in plan.allocations}
    layers: dict[str, list[tuple[Target, Allocation]]] = {}
    for target in in_blocks(source.targets, plan.grids):
        if target.layer in plan.lrc_layers:
            layers.setdefault(f"{target.layer}.weight", []).append((target, allocations[target.name]))
    shared = shared_layers(source.original.skeleton)
    repeated = {f"{name}.weight" for layer in plan.lrc_layers | set(plan.shapes) for name in shared.get(layer, ())}
    changed, outputs = set(plan.shapes) | {target.name for target in source.targets if plan.plain}, []
    for name in source.names():
        if name in repeated:
            continue
        layer, dtype = name.rpartition(".")[0], source.info(name).dtype
        if name not in layers:
            copied = source.copied(name)
            outputs.append(OutputTensors(copied.tensors, copied.make, layer if layer in changed else None))
            continue
        if layer in plan.split:  # the tombstone of a layer that is stored in blocks
            tombstone = {name: TensorInfo(dtype, (0,))}
            outputs.append(OutputTensors(tombstone, partial(dict[str, list[Tensor]], {name: []}), layer))
        for target, a in layers.pop(name):
            outputs.append(_low_rank(target, a, factors, dtype) if a.factored else _dense(source, target, dtype))
    assert not layers, f"planned but not in the model: {sorted(layers)}"
    return outputs


def _low_rank(target: Target, a: Allocation, factors: Factors, dtype: torch.dtype) -> OutputTensors:
    """The factors of a matrix and its tombstone."""
    form, tombstone = FORMS[a.form], f"{a.name}.weight"

    def make() -> dict[str, list[Tensor]]:
        return {f"{a.name}.{part}": [tensor.flatten()] for part, tensor in factors(a).items()} | {tombstone: []}

    infos = {
        f"{a.name}.{part}": TensorInfo(torch.int64 if part in form.indices else dtype, shape)
        for part, shape in form.shapes(*a.shape, a.rank).items()
    }
    return OutputTensors(infos | {tombstone: TensorInfo(dtype, (0,))}, make, target.layer)


def _dense(source: TensorSource, target: Target, dtype: torch.dtype) -> OutputTensors:
    """A dense block of a layer that is stored in blocks."""
    name = f"{target.name}.weight"
    return OutputTensors(
        {name: TensorInfo(dtype, target.shape)}, lambda: {name: [source.read(target).flatten()]}, target.layer
    )
