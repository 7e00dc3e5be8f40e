"""info: how large a checkpoint is, and how it was made."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import torch

from welore.allocation.plan import Plan
from welore.config import AUTO, RunOptions
from welore.errors import WeLoreError
from welore.io.checkpoint import PLAN, RECORD, CheckpointReader, read_config
from welore.io.context import RunContext
from welore.io.hub import resolve_model
from welore.io.safetensors_stream import TensorInfo
from welore.layers.block_grid import layer_of
from welore.layers.int8 import INT8, SCALE
from welore.models.quantizer import METHOD, WeLoreConfig
from welore.models.source import CheckpointSource, TensorSource
from welore.records import Record
from welore.reporting.module_types import group_by_type


@dataclass(frozen=True)
class RankSummary:
    """The low-rank matrices of one module type: how many, and their least, mean and largest rank."""

    matrices: int
    least: int
    mean: float
    largest: int


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint directory; fields that it says nothing of are None or empty.

    format: version of the compressed format; None for a dense checkpoint. parameters, bytes: of the weights in the
    files. target: what was asked for. rank_reduction, parameter_ratio: what was achieved. ranks: by module type.
    weights: int8, or auto for those of a float dtype. made_from, settings, versions: of the compression's record.
    """

    directory: Path
    model_type: str
    format: int | None
    parameters: int
    bytes: int
    target: dict[str, float] = field(default_factory=dict)
    rank_reduction: float | None = None
    parameter_ratio: float | None = None
    ranks: dict[str, RankSummary] = field(default_factory=dict)
    weights: str = AUTO
    made_from: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dataclasses.asdict(self) | {"directory": str(self.directory)}

    def __str__(self) -> str:
        kind = "dense" if self.format is None else f"compressed by welore, format {self.format}"
        kind += ", made smaller by welore" * (self.format is None and bool(self.target))
        kind += "" if self.weights == AUTO else f", weights in {self.weights}"
        lines = [
            f"{self.directory}: {self.model_type}, {kind}",
            f"  {self.parameters:,} parameters, {self.bytes / 1e6:,.1f} MB",
        ]
        if self.parameter_ratio is not None and self.rank_reduction is not None:
            target = ", ".join(f"{name} {value:g}" for name, value in self.target.items())
            lines.append(
                f"  parameters of the targeted matrices {self.parameter_ratio:.1%}, rank reduction "
                f"{self.rank_reduction:.1%}" + (f" (target: {target})" if target else "")
            )
        if self.settings:
            method = ["preset", "optimize_for", "strategy", "scaling", "storage"]
            method += ["expert_pruning", "mlp_pruning", "recovery"]
            told = {name: self.settings[name] for name in method if self.settings.get(name)}
            lines.append("  " + ", ".join(f"{name} {_short(value)}" for name, value in told.items()))
        lines += [
            f"  {kind}: {r.matrices} in low rank, ranks {r.least} to {r.largest}, mean {r.mean:.0f}"
            for kind, r in self.ranks.items()
        ]
        if self.made_from:
            versions = ", ".join(f"{n} {self.versions[n]}" for n in ("welore", "torch") if n in self.versions)
            lines.append(f"  made from {self.made_from} with {versions}")
        return "\n".join(lines)


def info(directory: str | Path, **options: Unpack[RunOptions]) -> CheckpointInfo:
    """Describe a checkpoint from its configuration, its records and the headers of its files.

    Args:
        directory: Directory of a compressed or a dense checkpoint, or a hub id.
        **options: Where downloads lie (config.RunOptions).

    Returns:
        Sizes, target, ranks by module type, and how it was made.

    Raises:
        WeLoreError: If there is no checkpoint, or one that was quantized by something else.
    """
    context = RunContext.create(**options)
    path = resolve_model(directory, cache_dir=context.cache_dir, revision=context.revision)
    config = read_config(path)
    sizes: dict[str, Any] = {"directory": path, "model_type": config.get("model_type", "unknown")}
    sizes |= size_of(CheckpointReader(path).entries)
    quantization = config.get("quantization_config")
    if quantization is not None and quantization.get("quant_method") != METHOD:
        raise WeLoreError(f"{directory} is quantized by {quantization.get('quant_method')}, not compressed by welore")
    plan = Plan.load(path / PLAN) if (path / PLAN).is_file() else None
    if quantization is None and not (plan and plan.plain):
        return CheckpointInfo(format=None, **sizes)
    compressed = None if quantization is None else WeLoreConfig.read(quantization)
    CheckpointSource(path, str(directory), trust_remote_code=context.trust_remote_code).require_complete()
    record = Record.load_if_there(path / RECORD)
    return CheckpointInfo(
        format=compressed.version if compressed else None,
        target=dict(plan.target) if plan else {},
        rank_reduction=plan.rank_reduction if plan else None,
        parameter_ratio=plan.parameter_ratio if plan else None,
        ranks=_ranks(compressed) if compressed else {},
        weights=INT8 if compressed and compressed.int8 else AUTO,
        made_from=record.inputs.get("model") if record else None,
        settings=record.settings if record else {},
        versions=record.versions if record else {},
        **sizes,
    )


def stored_size(source: TensorSource) -> dict[str, int]:
    """Parameters and bytes of a model as it is stored: its files, or its tensors in memory."""
    if isinstance(source, CheckpointSource):
        return size_of(CheckpointReader(source.directory).entries)
    return size_of({name: source.info(name) for name in source.names()})


def size_of(tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Parameters and bytes of the weights, by name; positions, and scales of integers, are no parameters."""
    weights = [info for name, info in tensors.items() if not name.endswith(f".{SCALE}")]
    numbers = sum(math.prod(w.shape) for w in weights if w.dtype.is_floating_point or w.dtype == torch.int8)
    return {"parameters": numbers, "bytes": sum(info.bytes for info in tensors.values())}


def _ranks(config: WeLoreConfig) -> dict[str, RankSummary]:
    layers: dict[str, list[int]] = {}
    for name, rank in (config.ranks or {}).items():
        layers.setdefault(layer_of(name, config.grids), []).append(rank)
    summary = {}
    for kind, names in group_by_type(layers).items():
        ranks = [rank for name in names for rank in layers[name]]
        summary[kind] = RankSummary(len(ranks), min(ranks), sum(ranks) / len(ranks), max(ranks))
    return summary


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return str(value.get("text", "yes")) + (" (failed)" if "failed" in value else "")
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)
