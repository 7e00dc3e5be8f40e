"""The low-rank matrices of a plan, computed in parallel into a workspace."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from welore.allocation.plan import Allocation, Plan
from welore.calibration.scaling import Sides, metric
from welore.calibration.statistics import Statistics
from welore.config import NONE
from welore.io.context import RunContext
from welore.io.resume import Workspace
from welore.layers.storage_forms import FORMS
from welore.linalg.svd import Decomposition, decompose, working_bytes
from welore.models.source import CheckpointSource, TensorSource
from welore.models.targets import Target, decomposition_key, in_blocks, result_key

Factors = Callable[[Allocation], dict[str, Tensor]]  # of a matrix: part of its storage form -> tensor


def factor_matrices(
    source: TensorSource,
    plan: Plan,
    statistics: Statistics | None,
    context: RunContext,
    stored: Callable[[Target], None] = lambda target: None,
) -> dict[str, Any]:
    """Store the factors of every LRC in the workspace; returns how good they are, in the process that leads.

    stored: is told of every matrix whose factors are stored.
    """
    workspace, processes = context.work, context.processes
    targets, sides = {target.name: target for target in in_blocks(source.targets, plan.grids)}, Sides()

    def compute(a: Allocation) -> dict[str, Tensor]:
        parts, target = workspace.fetch(factors_key(a)), targets[a.name]
        if parts is None:
            tensors = workspace.fetch(decomposition_key(a.name, a.shape))
            if tensors is None:
                norm = metric(plan.scaling, statistics, target, sides)
                tensors = decompose(source.read(target).to(context.float64_device), norm).tensors()
            decomposition = Decomposition.from_tensors(tensors)
            # The matrix has no name here: `factors` makes its own copy and lets this one go.
            factors = decomposition.factors(source.read(target).to(context.float64_device), a.rank, a.relative_error)
            dtype = source.dtype(target)
            packed = FORMS[a.form].pack(factors.A, factors.B)
            parts = {
                **{n: (t.to(dtype) if t.is_floating_point() else t).cpu().contiguous() for n, t in packed.items()},
                "excess": torch.tensor(factors.excess, dtype=torch.float64),
                "repaired": torch.tensor(factors.repaired),
            }
            workspace.store(factors_key(a), parts)
        workspace.drop(decomposition_key(a.name, a.shape))
        stored(target)
        return {name: parts[name] for name in ("excess", "repaired")}

    for name in targets.keys() - {a.name for a in plan.lrcs}:
        workspace.drop(decomposition_key(name, targets[name].shape))
    mine = processes.share(plan.lrcs, [targets[a.name].cost for a in plan.lrcs])
    memory = [working_bytes(a.shape, scaled=plan.scaling != NONE) for a in mine]
    with context.stage("factors"):
        computed = context.map(compute, mine, [targets[a.name].cost for a in mine], "factors", memory)
    processes.wait()
    if not processes.is_main:
        return {}
    done = {a.name: quality for a, quality in zip(mine, computed, strict=True)}
    done = {a.name: done[a.name] if a.name in done else compute(a) for a in plan.lrcs}
    return {
        "largest_excess": max((abs(float(quality["excess"])) for quality in done.values()), default=0.0),
        "repaired_in_float64": [name for name, quality in done.items() if bool(quality["repaired"])],
    }


def stored_factors(
    workspace: Workspace, trained: CheckpointSource | None = None, rename: Callable[[str], str] = str
) -> Factors:
    """The factors in a workspace, read one matrix at a time.

    trained: a checkpoint that holds better ones. rename: name of a matrix -> its name there.
    """

    def factors(a: Allocation) -> dict[str, Tensor]:
        parts = workspace.fetch(factors_key(a))
        if parts is None:
            raise OSError(f"the factors of {a.name} in {workspace.directory} were damaged: run the same command again")
        form = FORMS[a.form]
        if trained is not None:
            for part in form.numbers:
                parts[part] = trained.tensor(f"{rename(a.name)}.{part}").to(parts[part].dtype)
        return {part: parts[part] for part in form.parts}

    return factors


def factors_key(a: Allocation) -> str:
    """Name under which the factors of a matrix are stored."""
    return f"{result_key(a.name, a.shape)}.{a.form}-{a.rank}"
