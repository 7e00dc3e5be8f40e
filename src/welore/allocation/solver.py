"""2 - allocate: spectra + target -> the rank of every matrix, a plan.

A strategy (strategies.STRATEGIES) gives every singular value a score; ONE level cuts the scores of the whole model.
Which level meets the target is solved exactly: all scores are pooled and sorted once, and rank reduction and stored
parameters are running sums along that order. numpy only.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from welore.allocation.neurons import came_with
from welore.allocation.plan import Allocation, Plan
from welore.allocation.spectra import Spectra
from welore.allocation.strategies import STRATEGIES, Scores, Strategy, stored
from welore.config import BREAK_EVEN, NONE, MinRatio
from welore.errors import WeLoreError, choose
from welore.layers.block_grid import layer_of
from welore.layers.registry import FACTORED, form_of, storages
from welore.linalg.spectrum import Values


def check_settings(
    asked: Mapping[str, float | None],
    strategy: str | None,
    storage: str | None,
    min_ratio: MinRatio | None,
    rank_multiple: int,
    scaling: str,
) -> tuple[dict[str, float], str, str, MinRatio]:
    """The one target, and strategy, storage and min_ratio; WeLoreError for settings that no model could satisfy.

    What is not given: the paper's for plain weights (welore, factored), ours for scaled ones (waterfill, auto).
    Asked before hours of analysis, not after.
    """
    target = {name: float(value) for name, value in asked.items() if value is not None}
    if len(target) != 1:
        raise WeLoreError("give exactly one target: rank_reduction, params or threshold")
    ((name, value),) = target.items()
    if not 0 <= value <= (2 if name == "params" else 1):  # with allow_growth factors may outgrow W, at most twice
        raise WeLoreError(f"{name} is {value:g}: it is a fraction between 0 and 1 (0.3 means 30 per cent)")
    strategy = strategy or ("welore" if scaling == NONE else "waterfill")
    storage = storage or (FACTORED if scaling == NONE else "auto")
    choose("storage", storage, storages())
    chosen: Strategy = choose("strategy", strategy, STRATEGIES)
    min_ratio = chosen.min_ratio if min_ratio is None else min_ratio
    if min_ratio != BREAK_EVEN and not 0 <= float(min_ratio) < 1:
        raise WeLoreError(f"min_ratio is {min_ratio}: it is a fraction from 0 to below 1, or {BREAK_EVEN!r}")
    if rank_multiple < 1:
        raise WeLoreError(f"rank_multiple is {rank_multiple}: it must be at least 1")
    return target, strategy, storage, min_ratio


def allocate(
    spectra: Spectra,
    *,
    rank_reduction: float | None = None,
    params: float | None = None,
    threshold: float | None = None,
    strategy: str | None = None,
    storage: str | None = None,
    min_ratio: MinRatio | None = None,
    allow_growth: bool = False,
    rank_multiple: int = 1,
) -> Plan:
    """The plan that comes closest to one target.

    rank_reduction: ERR, 0..1. params: stored parameters of the targeted matrices over dense ones, 0..1.
    threshold: the level itself. strategy: one of STRATEGIES; storage: one of storages(); by default the paper's
    welore and factored for plain spectra, waterfill and auto for those of scaled matrices. min_ratio: a matrix is
    factored iff it loses more than this share of its rank (None: the strategy's own; "break-even": iff it becomes
    smaller). Without allow_growth a matrix whose factors would not be smaller than W stays dense; one that no token
    of the calibration reached always does. rank_multiple: ranks are multiples of it (or full), as kernels like them.
    Raises WeLoreError for an unreachable target.
    """
    asked = {"rank_reduction": rank_reduction, "params": params, "threshold": threshold}
    target, strategy, storage, min_ratio = check_settings(
        asked, strategy, storage, min_ratio, rank_multiple, spectra.scaling
    )
    shapes = [spectra.shapes[name] for name in spectra.values]
    scores = STRATEGIES[strategy].scores(spectra, storage)
    top = max(float(s[0]) for s in scores)
    scores = [
        np.full_like(s, top) if n in spectra.unreached else _in_groups(s, rank_multiple, top)
        for n, s in zip(spectra.values, scores, strict=True)
    ]
    if threshold is not None:
        level = float(threshold)
    else:
        layers = ((layer_of(name, spectra.grids), m * n) for name, (m, n) in spectra.shapes.items())
        gone = sum(came_with(numbers, layer, spectra.neurons) - numbers for layer, numbers in layers)
        level = _solve(scores, shapes, gone, next(iter(target.items())), storage, min_ratio, allow_growth)
    allocations = []
    for (name, sigma), shape, s in zip(spectra.values.items(), shapes, scores, strict=True):
        r = max(min(rank_multiple, len(s)), int((s >= level).sum()))
        factored = bool(_factored(np.array([r]), shape, storage, min_ratio, allow_growth)[0])
        form = form_of(*shape, r, storage) if factored else FACTORED
        allocations.append(Allocation(name, shape, r, factored, _tail(sigma, r), form))
    return Plan(
        model=spectra.model,
        strategy=strategy,
        asked=target,
        min_ratio=min_ratio,
        allow_growth=allow_growth,
        threshold=level,
        allocations=tuple(allocations),
        include=spectra.include,
        exclude=spectra.exclude,
        scaling=spectra.scaling,
        calibration=spectra.calibration,
        rank_multiple=rank_multiple,
        grids=spectra.grids,
        neurons=spectra.neurons,
    )


def _in_groups(scores: Values, size: int, top: float) -> Values:
    """Scores (k,) that every `size` neighbours share, so that no level parts them; the first ones are always kept."""
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


def _factored(
    kept: NDArray[np.int64], shape: tuple[int, int], storage: str, min_ratio: MinRatio, allow_growth: bool
) -> NDArray[np.bool_]:
    """Whether W (m, n) is factored at each of the ranks `kept`: the LRC rule, and never larger than dense."""
    m, n = shape
    smaller = stored(kept, shape, storage) < m * n
    if min_ratio == BREAK_EVEN:
        return smaller
    lrc = (min(m, n) - kept) / min(m, n) > float(min_ratio)
    return lrc if allow_growth else lrc & smaller


def _solve(
    scores: Scores,
    shapes: list[tuple[int, int]],
    gone: int,
    target: tuple[str, float],
    storage: str,
    min_ratio: MinRatio,
    allow_growth: bool,
) -> float:
    """The level at which rank reduction (or the parameter ratio) comes closest to the target.

    Every level between two neighbouring pooled scores gives the same plan, so there are as many plans as
    distinct scores. Lowering a matrix from rank k to k - j happens at its j-th smallest score; what that adds to
    the ranks removed and to the parameters stored is an increment, and the curves are cumulative sums. gone: numbers
    of the dense matrices that went with neurons.
    """
    pooled, removed, numbers = [], [], []
    for s, (m, n) in zip(scores, shapes, strict=True):
        k = min(m, n)
        kept = np.arange(k, 0, -1)
        factored = _factored(kept, (m, n), storage, min_ratio, allow_growth)
        pooled.append(s[::-1][: k - 1])
        removed.append(np.diff(np.where(factored, k - kept, 0)))
        numbers.append(np.diff(np.where(factored, stored(kept, (m, n), storage), m * n)))
    events = np.concatenate(pooled)
    order = np.argsort(events, kind="stable")
    events = events[order]

    full = sum(min(shape) for shape in shapes)
    dense = sum(m * n for m, n in shapes)
    removed_after = np.concatenate([[0], np.cumsum(np.concatenate(removed)[order])])
    stored_after = dense + np.concatenate([[0], np.cumsum(np.concatenate(numbers)[order])])

    # Level 0 of this list prunes nothing; level i lies between the i-th score and the next one, if they differ.
    # No level passes the largest score of all, so that a flat spectrum (all ones) is left alone.
    top = max(float(s[0]) for s in scores)
    upper = np.concatenate([events, [top]])
    lower = np.concatenate([upper[:1], events])
    reachable = np.concatenate([[0], 1 + np.flatnonzero(upper[1:] > lower[1:])])
    name, wanted = target
    curve = (removed_after / full if name == "rank_reduction" else stored_after / (dense + gone))[reachable]
    if not curve.min() <= wanted <= curve.max():
        raise WeLoreError(
            f"{name} {wanted:g} cannot be reached: for this model and min_ratio {min_ratio} it lies between "
            f"{curve.min():.4f} and {curve.max():.4f}"
        )
    best = reachable[int(np.argmin(np.abs(curve - wanted)))]
    middle = (lower[best] + upper[best]) / 2
    return float(middle if middle > lower[best] else upper[best])
