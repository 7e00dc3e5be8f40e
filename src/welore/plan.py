"""2 - Spectra + target -> the rank of every matrix: the artefact `plan.json`.

A strategy (strategies.STRATEGIES) gives every singular value a score; ONE level cuts the scores of the whole model.
Which level meets the target is solved exactly: all scores are pooled and sorted once, and rank reduction and stored
parameters are running sums along that order. numpy only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from welore.errors import WeLoreError, choose
from welore.forms import DENSE, FACTORED, FORMS, PIVOTED, STORAGES, cost, form_of
from welore.grids import WHOLE, Grid, block_names, layer_of, read_grids, split_layers
from welore.neurons import Neurons, as_json, came_with, read_neurons
from welore.records import read_json, write_json
from welore.spectra import NONE, Identity, Spectra, Values
from welore.strategies import BREAK_EVEN, STRATEGIES, MinRatio, Scores, Strategy, stored

FORMAT = "welore.plan/1"


@dataclass(frozen=True)
class Allocation:
    """What the plan says of one matrix W (m, n), full rank k = min(m, n).

    kept: how many of its singular values lie at or above the level. factored: True for an LRC, which is stored
    in low rank; False for an N-LRC, which stays dense and untouched.
    relative_error: ||W - A B|| / ||W|| of the best factors of that rank, from the spectrum (Eckart-Young); in the norm
    of the plan's scaling.
    form: how an LRC is stored, one of forms.FORMS.
    """

    name: str
    shape: tuple[int, int]
    kept: int
    factored: bool
    relative_error: float
    form: str = FACTORED

    @property
    def full_rank(self) -> int:
        """k = min(m, n)."""
        return min(self.shape)

    @property
    def reduction_ratio(self) -> float:
        """Share of the singular values below the level, p / k; not removed unless the matrix is factored."""
        return 1 - self.kept / self.full_rank

    @property
    def dense_parameters(self) -> int:
        """m n; of what is left of the MLP, where neurons were taken out of it."""
        return self.shape[0] * self.shape[1]

    @property
    def stored_parameters(self) -> int:
        """What its form costs at this rank when it is an LRC, m n when not."""
        return int(cost(*self.shape, self.kept, self.form if self.factored else DENSE))


@dataclass(frozen=True)
class Plan:
    """Rank and form of every targeted matrix of one model.

    asked: the target as the user gave it, {"rank_reduction" | "params" | "threshold": value}.
    threshold: the level at which the scores were cut (WeLore's t when the strategy is `welore`).
    scaling, calibration, grids, neurons: as in the spectra that the plan was made from. rank_multiple: as it was asked
    for.
    """

    model: Identity
    strategy: str
    asked: Mapping[str, float]
    min_ratio: MinRatio
    allow_growth: bool
    threshold: float
    allocations: tuple[Allocation, ...]
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    scaling: str = NONE
    calibration: Mapping[str, Any] = field(default_factory=dict)
    rank_multiple: int = 1
    grids: Mapping[str, Grid] = field(default_factory=dict)
    neurons: Mapping[str, Neurons] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        """Name -> rank of every matrix that is factored (the LRCs)."""
        return {a.name: a.kept for a in self.allocations if a.factored}

    @property
    def forms(self) -> dict[str, str]:
        """Name -> form of every LRC."""
        return {a.name: a.form for a in self.allocations if a.factored}

    @property
    def split(self) -> dict[str, Grid]:
        """Layer -> grid of those that are stored in blocks, because at least one block is an LRC."""
        return split_layers(self.grids, self.ranks)

    @property
    def lrc_layers(self) -> set[str]:
        """The layers that are stored in low rank, all of them or a block."""
        return {layer_of(name, self.grids) for name in self.ranks}

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Layer -> shape (m, n) of those that are smaller than they came, for neurons were taken out of their MLP."""
        found = {}
        for a in self.allocations:
            layer = layer_of(a.name, self.grids)
            if layer.rpartition(".")[0] in self.neurons:
                down, across = self.grids.get(layer, WHOLE)
                found[layer] = (down * a.shape[0], across * a.shape[1])
        return found

    @property
    def rank_reduction(self) -> float:
        """ERR: ranks removed from the LRCs over the full ranks of all targeted matrices, as they were when cut."""
        removed = sum(a.full_rank - a.kept for a in self.allocations if a.factored)
        return removed / sum(a.full_rank for a in self.allocations)

    @property
    def parameter_ratio(self) -> float:
        """Stored parameters of the targeted matrices, compressed over dense."""
        return sum(a.stored_parameters for a in self.allocations) / sum(map(self.came_with, self.allocations))

    def came_with(self, a: Allocation) -> int:
        """Parameters of a matrix in the dense model, before neurons were taken out."""
        return came_with(a.dense_parameters, layer_of(a.name, self.grids), self.neurons)

    def numbers(self) -> dict[str, Any]:
        """The achieved figures that stand in every record made with this plan."""
        return {
            "rank_reduction": self.rank_reduction,
            "parameter_ratio": self.parameter_ratio,
            "matrices": len(self.allocations),
            "lrcs": len(self.ranks),
            "threshold": self.threshold,
            "targeted_parameters_dense": sum(map(self.came_with, self.allocations)),
            "targeted_parameters": sum(a.stored_parameters for a in self.allocations),
        }

    def save(self, path: str | Path) -> None:
        """Write `plan.json`, whole or not at all."""
        content = {
            "format": FORMAT,
            "model": {"name": self.model.name, "fingerprint": self.model.fingerprint},
            "strategy": self.strategy,
            "scaling": self.scaling,
            "calibration": dict(self.calibration),
            "asked": dict(self.asked),
            "achieved": self.numbers(),
            "min_ratio": self.min_ratio,
            "allow_growth": self.allow_growth,
            "rank_multiple": self.rank_multiple,
            "grids": dict(self.grids),
            "neurons": as_json(self.neurons),
            "threshold": self.threshold,
            "include": list(self.include),
            "exclude": list(self.exclude),
            "matrices": [
                {
                    "name": a.name,
                    "shape": list(a.shape),
                    "kept": a.kept,
                    "factored": a.factored,
                    "relative_error": a.relative_error,
                    "form": a.form if a.factored else DENSE,
                }
                for a in self.allocations
            ],
        }
        write_json(path, content)

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """The plan at `path`; WeLoreError if the file is not one or contradicts itself."""
        content = read_json(path)
        try:
            if content["format"] != FORMAT:
                raise WeLoreError(f"{path} has format {content['format']!r}, this version reads {FORMAT!r}")
            if not content["matrices"]:
                raise WeLoreError(f"{path} plans no matrix: make it again with `welore allocate`")
            grids = read_grids(content.get("grids", {}))
            names = {matrix["name"] for matrix in content["matrices"]}
            for layer, grid in grids.items():
                lost = set(block_names(layer, grid)) - names
                if lost:
                    raise WeLoreError(f"{path} splits {layer} and says nothing of {min(lost)}: make it again")
            return cls(
                model=Identity(content["model"]["name"], content["model"]["fingerprint"]),
                strategy=content["strategy"],
                asked=content["asked"],
                min_ratio=content["min_ratio"],
                allow_growth=content["allow_growth"],
                threshold=content["threshold"],
                allocations=tuple(_read_allocation(m, path) for m in content["matrices"]),
                include=tuple(content["include"]),
                exclude=tuple(content["exclude"]),
                scaling=content.get("scaling", NONE),
                calibration=content.get("calibration", {}),
                rank_multiple=content.get("rank_multiple", 1),
                grids=grids,
                neurons=read_neurons(content.get("neurons", {})),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise WeLoreError(f"{path} is not a plan of welore ({error!r}): make one with `welore allocate`") from error


def _read_allocation(entry: Mapping[str, Any], path: str | Path) -> Allocation:
    (m, n), kept = entry["shape"], entry["kept"]
    if not all(isinstance(x, int) and x > 0 for x in (m, n, kept)):
        raise WeLoreError(f"{path}: shape and rank of {entry['name']} must be whole numbers above 0")
    if not 1 <= kept <= min(m, n):
        raise WeLoreError(f"{path}: rank {kept} of {entry['name']} must lie between 1 and {min(m, n)}")
    factored = bool(entry["factored"])
    form = entry.get("form", FACTORED) if factored else FACTORED  # plans from before there were forms have none
    choose(f"form of {entry['name']} in {path}:", form, FORMS)
    if form == PIVOTED and kept == min(m, n):
        raise WeLoreError(f"{path}: {entry['name']} has full rank {kept}; pivoted storage needs a lower one")
    return Allocation(entry["name"], (m, n), kept, factored, float(entry["relative_error"]), form)


# --- the solver ------------------------------------------------------------------------------------------------


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
    choose("storage", storage, STORAGES)
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
    threshold: the level itself. strategy: one of STRATEGIES; storage: one of forms.STORAGES; by default the paper's
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
