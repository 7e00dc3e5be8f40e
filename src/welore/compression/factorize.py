"""The matrices of a plan: factored in parallel into a workspace, streamed from there into a Hugging Face directory."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from welore.allocation.plan import Allocation, Plan
from welore.calibration.scaling import metric
from welore.calibration.statistics import Statistics
from welore.io.checkpoint import PLAN, OutputTensors, weight_files, write_config, write_weights
from welore.io.parallel import Processes, parallel_map
from welore.io.progress import Progress
from welore.io.resume import Workspace
from welore.io.safetensors_stream import TensorInfo
from welore.layers.registry import FORMS
from welore.linalg.svd import Reduction, factorise
from welore.models.quantizer import WeLoreConfig
from welore.models.source import TensorSource
from welore.models.targets import Target, census, in_blocks, result_key

Trained = Callable[[str], Tensor]  # name of a factor -> its numbers


def factor_matrices(
    source: TensorSource,
    plan: Plan,
    calibration: Statistics | None,
    workspace: Workspace,
    crew: Processes,
    *,
    device: str | None,
    workers: int | None,
    progress: Progress,
) -> dict[str, Any]:
    """Put the factors of every LRC into the workspace; how good they are, over all of them, for the one who leads."""
    targets = {target.name: target for target in in_blocks(source.targets, plan.grids)}

    def compute(a: Allocation) -> dict[str, Tensor]:
        found = workspace.fetch(_kept(a))
        if found is None:
            kept = workspace.fetch(f"{result_key(a.name, a.shape)}.reduction") if device is None else None
            reduction = None if kept is None else Reduction.from_tensors(kept)
            norm = metric(plan.scaling, calibration, targets[a.name])
            # W without a name here: factorise makes its own copy and lets this one go.
            factors = factorise(source.read(targets[a.name]).to(device), a.rank, a.relative_error, reduction, norm)
            parts = FORMS[a.form].pack(factors.A, factors.B).items()
            dtype = source.dtype(targets[a.name])
            found = {
                **{part: (t.to(dtype) if t.is_floating_point() else t).cpu().contiguous() for part, t in parts},
                "excess": torch.tensor(factors.excess, dtype=torch.float64),
                "repaired": torch.tensor(factors.repaired),
            }
            workspace.store(_kept(a), found)
        workspace.drop(f"{result_key(a.name, a.shape)}.reduction")
        return {name: found[name] for name in ("excess", "repaired")}

    lrcs = [a for a in plan.allocations if a.factored]
    mine = crew.share(lrcs)
    costs = [targets[a.name].cost for a in mine]
    done = dict(
        zip(mine, parallel_map(compute, mine, costs, workers=workers, progress=progress, label="factors"), strict=True)
    )
    crew.wait()
    if not crew.is_main:
        return {}
    about = {a.name: done[a] if a in done else compute(a) for a in lrcs}
    return {
        "largest_excess": max((abs(float(x["excess"])) for x in about.values()), default=0.0),
        "repaired_in_float64": [name for name, x in about.items() if bool(x["repaired"])],
    }


def write_checkpoint(
    source: TensorSource,
    plan: Plan,
    workspace: Workspace,
    directory: Path,
    max_shard_size: str,
    progress: Progress,
    trained: Trained | None,
) -> dict[str, Any]:
    """Weights, configuration and plan of a compressed checkpoint; the sizes."""
    written = write_weights(directory, _compressed(source, plan, workspace, trained), max_shard_size, progress)
    origin: Any = source.original
    write_config(origin.directory, directory, WeLoreConfig.of(plan).to_dict())
    plan.save(directory / PLAN)
    return _sizes_on_disk(source, plan, written)


def _compressed(source: TensorSource, plan: Plan, workspace: Workspace, trained: Trained | None) -> list[OutputTensors]:
    """What a compressed checkpoint holds, in the order of the source; trained: the factors after healing."""
    cut = plan.split
    layers: dict[str, list[tuple[Target, Allocation]]] = {}
    allocations = {a.name: a for a in plan.allocations}
    for target in in_blocks(source.targets, plan.grids):
        if allocations[target.name].factored or target.layer in cut:
            layers.setdefault(target.layer + ".weight", []).append((target, allocations[target.name]))

    def factors(a: Allocation) -> dict[str, list[Tensor]]:
        found = workspace.fetch(_kept(a))
        if found is None:
            raise OSError(f"the factors of {a.name} in {workspace.directory} were damaged: run the same command again")
        if trained is not None:
            numbers = FORMS[a.form].numbers
            found |= {part: trained(f"{a.name}.{part}").to(found[part].dtype) for part in numbers}
        return {f"{a.name}.{part}": [found[part].flatten()] for part in FORMS[a.form].parts} | {f"{a.name}.weight": []}

    def matrix(target: Target, a: Allocation, dtype: torch.dtype) -> OutputTensors:
        if not a.factored:
            return OutputTensors(
                {f"{a.name}.weight": TensorInfo(dtype, a.shape)},
                lambda: {f"{a.name}.weight": [source.read(target).flatten()]},
                target.layer,
            )
        form = FORMS[a.form]
        announced = {
            f"{a.name}.{part}": TensorInfo(torch.int32 if part in form.indices else dtype, shape)
            for part, shape in form.shapes(*a.shape, a.rank).items()
        }
        return OutputTensors(
            {**announced, f"{a.name}.weight": TensorInfo(dtype, (0,))}, partial(factors, a), target.layer
        )

    steps = []
    for name in source.names():
        dtype = source.info(name).dtype
        if name not in layers:
            layer = name.rpartition(".")[0]
            steps.append(replace(source.copied(name), layer=layer if layer in plan.shapes else None))
            continue
        if name.removesuffix(".weight") in cut:
            steps.append(_tombstone(name, dtype))
        steps += [matrix(target, a, dtype) for target, a in layers.pop(name)]
    assert not layers, f"planned but not in the checkpoint: {sorted(layers)}"
    return steps


def _tombstone(name: str, dtype: torch.dtype) -> OutputTensors:
    """The empty weight of a layer that is stored in blocks."""
    return OutputTensors({name: TensorInfo(dtype, (0,))}, lambda: {name: []}, name.removesuffix(".weight"))


def _kept(a: Allocation) -> str:
    """Name of the factors of a matrix in the workspace."""
    return f"{result_key(a.name, a.shape)}.{a.form}-{a.rank}"


def _sizes_on_disk(source: TensorSource, plan: Plan, written: int) -> dict[str, Any]:
    found = census(source.skeleton, source.targets)
    whole: Any = source.original
    return {
        "bytes_dense": sum(path.stat().st_size for path in weight_files(whole.directory)),
        "bytes": written,
        "parameters_dense": census(whole.skeleton, whole.targets).total,
        "parameters": found.total - found.targeted + plan.numbers()["targeted_parameters"],
        "left_dense_in_blocks": found.blocks_other,
        "left_dense_names": list(found.blocks_other_names),
    }
