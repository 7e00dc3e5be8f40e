"""allocate: spectra and a target -> the rank of every matrix, a plan (docs/concepts/ranks.md). numpy only.

A strategy (strategies.STRATEGIES) gives every singular value a score, and ONE level cuts the scores of the whole model.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from welore.allocation.plan import Allocation, Plan
from welore.allocation.rule import Rule, Shape, layout_of
from welore.allocation.spectra import Spectra
from welore.allocation.strategies import STRATEGIES, Scores, Strategy
from welore.config import ANYWHERE, AUTO, NONE, SIZE, AllocationConfig, StorageName, StrategyName, settings_of
from welore.errors import WeLoreError, choose
from welore.layers.block_grid import layer_of
from welore.layers.remaining import dense_numel
from welore.layers.storage_forms import FACTORED, storages
from welore.linalg.spectrum import Values

PARTS, TOGETHER = 16, 1 << 16  # scores are sorted in parts of about TOGETHER of them, but in no more than PARTS
Amount = Callable[[NDArray[np.int64], Shape], NDArray[np.int64]]  # ranks, shape -> rank lost, or numbers stored


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
    targets = {"keep": keep, "rank_reduction": rank_reduction, "threshold": threshold}
    config = settings_of(AllocationConfig, config, **targets)
    if config.optimize_for == ANYWHERE:
        raise WeLoreError("for anywhere neurons are taken out, which spectra do not describe: call compress")
    (name, value), layout = config.target, layout_of(config.optimize_for, list(spectra.shapes.values()))
    strategy, rule = resolve(config, spectra.scaling, layout.overheads)
    multiple = config.rank_multiple or layout.rank_multiple
    scores = _scores(strategy, spectra, rule, multiple)
    level = value if name == "threshold" else _solve(scores, spectra, (name, value), rule)
    # Overheads decide which matrices are factored; the ranks then meet the target.
    if rule.overheads and name != "threshold":
        factored = [a.name for a in _allocations(scores, spectra, level, rule, multiple) if a.factored]
        least = min(rule.overheads.values())  # which all forms share: between them it decides nothing
        rule = replace(rule, overheads={form: numbers - least for form, numbers in rule.overheads.items()})
        scores = _scores(strategy, spectra, rule, multiple, factored)
        level = _solve(scores, spectra, (name, value), rule, nearest=True)
    return Plan(
        model=spectra.model,
        strategy=strategy,
        target={name: value},
        min_ratio=rule.min_ratio,
        allow_growth=config.allow_growth,
        threshold=level,
        allocations=_allocations(scores, spectra, level, rule, multiple),
        include=spectra.include,
        exclude=spectra.exclude,
        scaling=spectra.scaling,
        statistics=spectra.statistics,
        rank_multiple=multiple,
        optimize_for=SIZE if config.optimize_for == AUTO else config.optimize_for,
        grids=spectra.grids,
        neurons=spectra.neurons,
        experts=spectra.experts,
    )


def resolve(
    config: AllocationConfig, scaling: str, overheads: Mapping[str, float] | None = None
) -> tuple[StrategyName, Rule]:
    """Strategy and rule of a config, with the defaults for a scaling; WeLoreError for an unknown name.

    overheads: those of the layout.
    """
    strategy: StrategyName = config.strategy or ("welore" if scaling == NONE else "waterfill")
    storage: StorageName = config.storage or ("factored" if scaling == NONE else "auto")
    choose("storage", storage, storages())
    defaults: Strategy = choose("strategy", strategy, STRATEGIES)
    min_ratio = defaults.min_ratio if config.min_ratio is None else config.min_ratio
    return strategy, Rule(storage, min_ratio, config.allow_growth, overheads or {})


def check_reachable(
    config: AllocationConfig,
    scaling: str,
    shapes: Sequence[Shape],
    *,
    pruned: float = 0,
    gone: int = 0,
    dense: int | None = None,
) -> None:
    """Raise WeLoreError for a target that no ranks of these shapes reach.

    pruned: largest share taken out of an MLP. gone: the parameters that neurons take with them. dense: those of all
    targeted matrices, if there are others than these, of experts that are taken out.
    """
    (name, target), layout = config.target, layout_of(config.optimize_for, shapes)
    _, rule = resolve(config, scaling, layout.overheads)
    if name == "threshold":
        return
    multiple = config.rank_multiple or layout.rank_multiple
    least = [max(1, min(multiple, min(shape))) for shape in shapes]
    every = [np.arange(r, min(shape) + 1) for r, shape in zip(least, shapes, strict=True)]
    if name == "keep":
        dense = dense or sum(m * n for m, n in shapes)
        numel = [rule.numel(ranks, shape) for ranks, shape in zip(every, shapes, strict=True)]
        low = (1 - pruned) * sum(int(n.min()) for n in numel) / dense
        high = (sum(int(n.max()) for n in numel) - gone) / dense
    else:
        removed = [rule.removed(ranks, shape) for ranks, shape in zip(every, shapes, strict=True)]
        low, high = 0.0, sum(int(n.max()) for n in removed) / sum(min(shape) for shape in shapes)
    _require_between(name, target, low, high, rule)


def _require_between(name: str, target: float, low: float, high: float, rule: Rule) -> None:
    if not low <= target <= high:
        raise WeLoreError(
            f"{name} {target:g} cannot be reached: for this model and min_ratio {rule.min_ratio} it lies between "
            f"{low:.4f} and {high:.4f}"
        )


def _scores(
    strategy: StrategyName, spectra: Spectra, rule: Rule, multiple: int, low_rank: Collection[str] | None = None
) -> Scores:
    """The scores of all singular values; the largest of all for those of matrices that stay dense.

    low_rank: the matrices that may be factored, by default all that some token reached.
    """
    scores = STRATEGIES[strategy].scores(spectra, rule)
    top = max(float(s[0]) for s in scores)
    dense = spectra.unreached if low_rank is None else set(spectra.values) - set(low_rank)
    return [
        np.full_like(s, top) if name in dense else _in_groups(s, multiple, top)
        for name, s in zip(spectra.values, scores, strict=True)
    ]


def _allocations(scores: Scores, spectra: Spectra, level: float, rule: Rule, multiple: int) -> tuple[Allocation, ...]:
    """The allocation of every matrix if this level cuts the scores."""
    allocations = []
    for (name, sigma), s in zip(spectra.values.items(), scores, strict=True):
        shape = spectra.shapes[name]
        rank = max(min(multiple, len(s)), int((s >= level).sum()))
        factored = bool(rule.factored(np.array([rank]), shape)[0])
        form = rule.form(rank, shape) if factored else FACTORED
        error = np.sqrt((sigma[rank:] ** 2).sum() / ((sigma**2).sum() or 1.0))
        allocations.append(Allocation(name, shape, rank, factored, float(error), form))
    return tuple(allocations)


def _in_groups(scores: Values, size: int, top: float) -> Values:
    """Scores (k,) that every `size` neighbours share, so that no level separates them; the first ones always stay."""
    if size == 1:
        return scores
    borders = np.arange(0, len(scores), size)
    counts = np.diff([*borders, len(scores)])
    shared = np.repeat(np.add.reduceat(scores, borders) / counts, counts)
    shared[:size] = top
    return np.minimum.accumulate(shared)  # rounding must not turn the order round


def _solve(scores: Scores, spectra: Spectra, target: tuple[str, float], rule: Rule, *, nearest: bool = False) -> float:
    """The level at which rank reduction (or the parameter ratio) comes closest to the target; running sums over scores.

    nearest: take the closest to a target out of reach.
    """
    shapes = [spectra.shapes[name] for name in spectra.values]
    name, value = target
    if name == "rank_reduction":
        start, full, amount = 0, sum(map(min, shapes)), rule.removed
    else:
        layers = ((layer_of(name, spectra.grids), m * n) for name, (m, n) in zip(spectra.values, shapes, strict=True))
        start, amount = sum(m * n for m, n in shapes), rule.numel
        full = int(sum(dense_numel(numel, layer, spectra.neurons, spectra.experts) for layer, numel in layers))

    # A level lies between a score and the next one, if they differ; the first cuts nothing. No level passes the largest
    # score of all, so that a flat spectrum (all ones) is left alone.
    top = np.array([max(float(s[0]) for s in scores)])
    below, total = -np.inf, start
    best, low, high = (np.inf, 0.0, 0.0), np.inf, -np.inf  # distance and the scores around the level; the reach
    for events, changes in itertools.chain(_ascending(scores, shapes, amount), [(top, np.zeros(1, np.int64))]):
        lower = np.concatenate([[below], events[:-1]])
        totals = total + np.concatenate([[0], np.cumsum(changes)])
        levels = np.flatnonzero(events > lower)
        if len(levels):
            curve = totals[levels] / full
            closest = int(np.argmin(np.abs(curve - value)))
            i = levels[closest]
            best = min(best, (abs(curve[closest] - value), lower[i], events[i]))
            low, high = min(low, curve.min()), max(high, curve.max())
        below, total = events[-1], totals[-1]
    if not nearest:
        _require_between(name, value, low, high, rule)
    _, under, over = best
    middle = (under + over) / 2
    return float(middle if under < middle < over else over)


def _ascending(scores: Scores, shapes: Sequence[Shape], amount: Amount) -> Iterator[tuple[Values, NDArray[np.int64]]]:
    """All scores but the largest of every matrix, ascending, and by how much `amount` changes when each is cut.

    In at most PARTS arrays, so that a copy of all scores is never in memory; equal scores are in the same one. A matrix
    goes from rank k - j + 1 to k - j at its j-th smallest score.
    """
    parts = min(PARTS, 1 + sum(map(len, scores)) // TOGETHER)
    some = np.sort(np.concatenate([s[::PARTS] for s in scores]))
    borders = np.unique(some[len(some) * np.arange(1, parts) // parts])
    for low, high in itertools.pairwise([-np.inf, *borders, np.inf]):
        events, changes = [], []
        for s, shape in zip(scores, shapes, strict=True):
            k = len(s)
            first, last = np.minimum(np.searchsorted(s[::-1], (low, high)), k - 1)
            events.append(s[::-1][first:last])
            changes.append(np.diff(amount(np.arange(k - first, k - last - 1, -1), shape)))
        together = np.concatenate(events)
        if len(together):
            order = np.argsort(together, kind="stable")
            yield together[order], np.concatenate(changes)[order]
