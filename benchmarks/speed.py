"""Analysis and factors of SmolLM2 against what the reference scripts do, one thread each, in one process.

For every matrix, one after the other: two torch.svd (float32; the reference computes each decomposition twice: once
for the thresholds, once for the factors), torch.linalg.svdvals, and ours: ratios of processor time.
The floor is the time that the floating point operations of ours would take at the speed of a matrix product.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from floor import operations, speeds
from welore.allocation.plan import Plan
from welore.allocation.solver import allocate
from welore.allocation.spectra import Spectra
from welore.io.hub import resolve_model
from welore.linalg.spectrum import normalise
from welore.linalg.svd import Decomposition, decompose
from welore.models.embedded import embedded_model
from welore.models.source import CheckpointSource
from welore.records import Record

HERE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
RANK_REDUCTION = 0.5


def timed(totals: dict[str, float], name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result; its processor seconds are added to totals[name]."""
    started = time.process_time()
    result = function(*arguments)
    totals[name] = totals.get(name, 0.0) + time.process_time() - started
    return result


def kept_on_disk(W: torch.Tensor) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """Ours, first half: the singular values, and what `compress` keeps for the factors."""
    decomposition = decompose(W)
    return decomposition.values(), decomposition.tensors()


def floor_seconds(plan: Plan) -> float:
    """What ours takes at least."""
    costs = [operations(a.shape, a.rank if a.factored else None) for a in plan.allocations]
    return sum(sum(of_type) / speed for of_type, speed in zip(zip(*costs, strict=True), speeds(), strict=True))


def main() -> None:
    """Measure, check every rank against float64, write docs/benchmarks/speed.json, print one line."""
    torch.set_num_threads(1)
    seconds: dict[str, float] = {}
    values, references, kept = {}, {}, {}
    weights = CheckpointSource(resolve_model(embedded_model()))
    with threadpool_limits(1):
        for target in weights.targets:
            W = weights.read(target)
            for _ in range(2):
                timed(seconds, "two_torch_svd", torch.svd, W)
            timed(seconds, "svdvals", torch.linalg.svdvals, W)
            values[target.name], kept[target.name] = timed(seconds, "ours", kept_on_disk, W)
            references[target.name] = np.linalg.svd(W.double().numpy(), compute_uv=False)
        spectra = Spectra(weights.identity, values, {t.name: t.shape for t in weights.targets})
        plan = timed(seconds, "ours", lambda: allocate(spectra, rank_reduction=RANK_REDUCTION))
        by_name = {a.name: a for a in plan.allocations if a.factored}
        excess = 0.0
        for target in weights.targets:
            if target.name in by_name:
                a, W = by_name[target.name], weights.read(target)
                decomposition = Decomposition.from_tensors(kept.pop(target.name))
                found = timed(seconds, "ours", decomposition.factors, W, a.rank, a.relative_error)
                excess = max(excess, abs(found.excess))
        floor = floor_seconds(plan)
    same = sum(int((normalise(references[a.name]) >= plan.threshold).sum()) == a.rank for a in plan.allocations)
    numbers = {
        "matrices": len(plan.allocations),
        "lrcs": len(by_name),
        "ranks_equal_to_float64": same,
        "largest_excess": excess,
        "two_torch_svd_over_ours": seconds["two_torch_svd"] / seconds["ours"],
        "svdvals_over_ours": seconds["svdvals"] / seconds["ours"],
        "ours_over_floor": seconds["ours"] / floor,
        "seconds": seconds | {"floor": floor},
    }
    settings = {"threads": 1, "rank_reduction": RANK_REDUCTION}
    Record("speed", {"model": embedded_model().stem}, settings, numbers).save(HERE / "speed.json")
    print(
        f"analysis + factors, one thread: {numbers['two_torch_svd_over_ours']:.1f}x faster than two torch.svd, "
        f"{numbers['svdvals_over_ours']:.1f}x svdvals alone, {numbers['ours_over_floor']:.1f}x the flop floor; "
        f"{same} of {len(plan.allocations)} ranks equal float64"
    )


if __name__ == "__main__":
    main()
