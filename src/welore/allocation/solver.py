"""allocate: spectra and a target -> the rank of every matrix, a plan (docs/concepts/ranks.md). numpy only.

A strategy (strategies.STRATEGIES) gives every singular value a score, and ONE level cuts the scores of the whole model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from welore.allocation.neurons import dense_numel
from welore.allocation.plan import Allocation, Plan
from welore.allocation.spectra import Spectra
from welore.allocation.strategies import STRATEGIES, Scores, Strategy, stored
from welore.config import BREAK_EVEN, NONE, AllocationConfig, MinRatio, StorageName, StrategyName
from welore.errors import WeLoreError, choose
from welore.layers.block_grid import layer_of
from welore.layers.storage_forms import FACTORED, form_of, storages
from welore.linalg.spectrum import Values

Shape = tuple[int, int]


def allocate(
    spectra: Spectra,
    config: AllocationConfig | None = None,
    *,
    keep: float | None = None,
    rank_reduction: float | None = None,
    threshold: float | None = None,
) -> Plan:
    """Choose the rank of every matrix, so that the model comes as close as possible to one target.

    Args:
        spectra: Singular values of the targeted matrices, from `analyze`.
        config: Target and method; by default the paper's for plain spectra (scaling none), strategy welore and storage
            factored; for those of scaled matrices strategy waterfill and storage auto.
        keep: The target in place of one in the config: stored parameters of the targeted matrices over dense ones.
        rank_reduction: The target as effective rank reduction (ERR), 0 to 1.
        threshold: The target as the level itself; of strategy welore the paper's threshold.

    Returns:
        The plan: ranks, and the target that they achieve. A matrix that no token of the statistics reached stays dense.

    Raises:
        WeLoreError: If there is not exactly one target, or no level reaches it.

    Source: WeLore (arXiv 2407.11239), section 4.1.
    """
    targets: dict[str, Any] = {"keep": keep, "rank_reduction": rank_reduction, "threshold": threshold}
    config = replace(config or AllocationConfig(), **{n: v for n, v in targets.items() if v is not None})
    (name, value), (strategy, rule) = config.target, resolve(config, spectra.scaling)
    scores = STRATEGIES[strategy].scores(spectra, rule.storage)
    top = max(float(s[0]) for s in scores)
    scores = [
        np.full_like(s, top) if n in spectra.unreached else _in_groups(s, config.rank_multiple, top)
        for n, s in zip(spectra.values, scores, strict=True)
    ]
    level = value if name == "threshold" else _solve(scores, spectra, (name, value), rule)
    allocations = []
    for (matrix, sigma), s in zip(spectra.values.items(), scores, strict=True):
        shape = spectra.shapes[matrix]
        rank = max(min(config.rank_multiple, len(s)), int((s >= level).sum()))
        factored = bool(rule.factored(np.array([rank]), shape)[0])
        form = form_of(*shape, rank, rule.storage) if factored else FACTORED
        allocations.append(Allocation(matrix, shape, rank, factored, _tail(sigma, rank), form))
    return Plan(
        model=spectra.model,
        strategy=strategy,
        target={name: value},
        min_ratio=rule.min_ratio,
        allow_growth=config.allow_growth,
        threshold=level,
        allocations=tuple(allocations),
        include=spectra.include,
        exclude=spectra.exclude,
        scaling=spectra.scaling,
        statistics=spectra.statistics,
        rank_multiple=config.rank_multiple,
        grids=spectra.grids,
        neurons=spectra.neurons,
    )


@dataclass(frozen=True)
class Rule:
    """Which matrices are factored, and how they are stored."""

    storage: StorageName
    min_ratio: MinRatio
    allow_growth: bool

    def factored(self, ranks: NDArray[np.int64], shape: Shape) -> NDArray[np.bool_]:
        """Whether W (m, n) is an LRC at each of the ranks, and not larger in low rank than dense."""
        m, n = shape
        smaller = stored(ranks, shape, self.storage) < m * n
        if self.min_ratio == BREAK_EVEN:
            return smaller
        lrc = (min(m, n) - ranks) / min(m, n) > float(self.min_ratio)
        return lrc if self.allow_growth else lrc & smaller

    def numel(self, ranks: NDArray[np.int64], shape: Shape) -> NDArray[np.int64]:
        """Numbers stored for W (m, n) at each of the ranks."""
        return np.where(self.factored(ranks, shape), stored(ranks, shape, self.storage), shape[0] * shape[1])


def resolve(config: AllocationConfig, scaling: str) -> tuple[StrategyName, Rule]:
    """Strategy and rule of a config, with the defaults for a scaling; WeLoreError for an unknown name."""
    strategy: StrategyName = config.strategy or ("welore" if scaling == NONE else "waterfill")
    storage: StorageName = config.storage or ("factored" if scaling == NONE else "auto")
    choose("storage", storage, storages())
    defaults: Strategy = choose("strategy", strategy, STRATEGIES)
    min_ratio = defaults.min_ratio if config.min_ratio is None else config.min_ratio
    return strategy, Rule(storage, min_ratio, config.allow_growth)


def check_reachable(
    config: AllocationConfig, scaling: str, shapes: Sequence[Shape], pruned: float = 0, gone: int = 0
) -> None:
    """Raise WeLoreError for a target that no ranks of these shapes reach.

    pruned: largest share taken out of an MLP. gone: the parameters that neurons take with them.
    """
    (name, target), (_, rule) = config.target, resolve(config, scaling)
    if name == "threshold":
        return
    least = [max(1, min(config.rank_multiple, min(shape))) for shape in shapes]
    every = [np.arange(r, min(shape) + 1) for r, shape in zip(least, shapes, strict=True)]
    if name == "keep":
        dense = sum(m * n for m, n in shapes)
        numel = [rule.numel(ranks, shape) for ranks, shape in zip(every, shapes, strict=True)]
        low = (1 - pruned) * sum(int(n.min()) for n in numel) / dense
        high = (sum(int(n.max()) for n in numel) - gone) / dense
    else:
        removed = [(min(s) - r) * rule.factored(r, s) for r, s in zip(every, shapes, strict=True)]
        low, high = 0.0, sum(int(n.max()) for n in removed) / sum(min(shape) for shape in shapes)
    _require_between(name, target, low, high, rule)


def _require_between(name: str, target: float, low: float, high: float, rule: Rule) -> None:
    if not low <= target <= high:
        raise WeLoreError(
            f"{name} {target:g} cannot be reached: for this model and min_ratio {rule.min_ratio} it lies between "
            f"{low:.4f} and {high:.4f}"
        )


def _in_groups(scores: Values, size: int, top: float) -> Values:
    """Scores (k,) that every `size` neighbours share, so that no level separates them; the first ones always stay."""
    if size == 1:
        return scores
    borders = np.arange(0, len(scores), size)
    counts = np.diff([*borders, len(scores)])
    shared = np.repeat(np.add.reduceat(scores, borders) / counts, counts)
    shared[:size] = top
    return np.minimum.accumulate(shared)  # rounding must not turn the order round


def _tail(sigma: Values, rank: int) -> float:
    total = float((sigma**2).sum())
    return float(np.sqrt((sigma[rank:] ** 2).sum() / total)) if total else 0.0


def _solve(scores: Scores, spectra: Spectra, target: tuple[str, float], rule: Rule) -> float:
    """The level at which rank reduction (or the parameter ratio) comes closest to the target; running sums over scores.

    A matrix goes from rank k - j + 1 to k - j at its j-th smallest score.
    """
    shapes = [spectra.shapes[name] for name in spectra.values]
    pooled, removed, numbers = [], [], []
    for s, shape in zip(scores, shapes, strict=True):
        k = min(shape)
        ranks = np.arange(k, 0, -1)
        pooled.append(s[::-1][: k - 1])
        removed.append(np.diff(np.where(rule.factored(ranks, shape), k - ranks, 0)))
        numbers.append(np.diff(rule.numel(ranks, shape)))
    events = np.concatenate(pooled)
    order = np.argsort(events, kind="stable")
    events = events[order]

    full = sum(min(shape) for shape in shapes)
    dense = sum(m * n for m, n in shapes)
    layers = ((layer_of(name, spectra.grids), m * n) for name, (m, n) in zip(spectra.values, shapes, strict=True))
    unpruned = sum(dense_numel(numel, layer, spectra.neurons) for layer, numel in layers)
    removed_after = np.concatenate([[0], np.cumsum(np.concatenate(removed)[order])])
    stored_after = dense + np.concatenate([[0], np.cumsum(np.concatenate(numbers)[order])])

    # Level 0 of this list removes nothing; level i lies between the i-th score and the next one, if they differ.
    # No level passes the largest score of all, so that a flat spectrum (all ones) is left alone.
    top = max(float(s[0]) for s in scores)
    upper = np.concatenate([events, [top]])
    lower = np.concatenate([upper[:1], events])
    reachable = np.concatenate([[0], 1 + np.flatnonzero(upper[1:] > lower[1:])])
    name, value = target
    curve = (removed_after / full if name == "rank_reduction" else stored_after / unpruned)[reachable]
    _require_between(name, value, curve.min(), curve.max(), rule)
    best = reachable[int(np.argmin(np.abs(curve - value)))]
    middle = (lower[best] + upper[best]) / 2
    return float(middle if middle > lower[best] else upper[best])
