"""The claims of the paper about pre-training: the measure of each in a trace, and the verdict over several seeds.

A claim is one entry of CLAIMS. A positive measure agrees with the claim; its 95 % interval is a bootstrap over the
matrices of a run (runs are compared, never pooled). numpy and scipy only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from welore.allocation.plan import Allocation
from welore.emergence.trace import COSINE, OVERLAPS, Array, Matrix, Trace
from welore.errors import WeLoreError
from welore.io.fields import refusing, typed
from welore.records import Record
from welore.reporting.module_types import ModulePosition, module_positions
from welore.reporting.tables import Table

RESAMPLED, COVERED = 2000, 0.95
SETTLED = 0.5  # of the overlap that noise would leave, corrected for chance
SUBSPACE = 16  # rank of the subspaces that define settling
LOW_TYPES, HIGH_TYPES = ("q_proj", "k_proj", "o_proj", "gate_proj"), ("v_proj", "up_proj", "down_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
RANK_AXIS = {  # numbers of a matrix that are compared with its reduction ratio, and the names of their axes
    "settles_at": "settling step, as a share of the run",
    "stable_rank_to_noise": "stable rank of the gradient / that of noise",
}
HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told"
Interval = list[float]  # value, lower end, upper end


class Rows:
    """The rows of all matrices by column, and which of them are of some type, outer, or in the middle of the model."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows = rows
        self.types = np.array([row["kind"].rpartition(".")[2] for row in rows])
        layers = np.array([row["layer"] for row in rows])
        third = (layers.max() + 1) / 3
        self.outer = np.isin(layers, (layers.min(), layers.max()))
        self.middle_mlps = self.of(MLP) & (layers >= np.floor(third)) & (layers < np.ceil(2 * third))

    def __getitem__(self, column: str) -> Array:
        """One number of every matrix, (n,)."""
        return np.array([row[column] for row in self.rows], dtype=np.float64)

    def of(self, types: Sequence[str]) -> NDArray[np.bool_]:
        """The matrices of these module types."""
        return np.isin(self.types, types)

    def within_types(self, column: str) -> Array:
        """A column less the mean of each module type."""
        values = self[column]
        means = {name: values[self.types == name].mean() for name in np.unique(self.types)}
        return values - np.array([means[name] for name in self.types])


@dataclass(frozen=True)
class Claim:
    """A claim in words, its measure in words, and the measure itself, which is positive if the claim holds."""

    statement: str
    measure: str
    value: Callable[[Rows], Interval]


CLAIMS = {
    "C1": Claim(
        "q, k, gate and o become lower in rank than v, up and down",
        "mean reduction ratio of q, k, gate, o minus that of v, up, down",
        lambda m: _difference(m["reduction_ratio"][m.of(LOW_TYPES)], m["reduction_ratio"][m.of(HIGH_TYPES)]),
    ),
    "C2": Claim(
        "the first and the last block are lower in rank than those between",
        "mean reduction ratio of the first and last block minus that of the others",
        lambda m: _difference(m["reduction_ratio"][m.outer], m["reduction_ratio"][~m.outer]),
    ),
    "C4a": Claim(
        "gradients are low rank",
        "1 - median stable rank of a gradient over that of noise of the same shape, after warm-up, mean over matrices",
        lambda m: _mean(1 - m["stable_rank_to_noise"]),
    ),
    "C4b": Claim(
        "gradients of the MLPs in the middle fall to rank 1",
        "2 - the least stable rank of their gradients, mean over these matrices",
        lambda m: _mean(2 - m["stable_rank_least"][m.middle_mlps]),
    ),
    "C4b, later": Claim(
        "and stay there after warm-up",
        "2 - median stable rank of their gradients after warm-up, mean over these matrices",
        lambda m: _mean(2 - m["stable_rank"][m.middle_mlps]),
    ),
    "C5a": Claim(
        "gradients of low-rank matrices keep changing, those of the others saturate (v1)",
        "-(rank correlation of reduction ratio and mean cosine of one batch's gradients in the second half)",
        lambda m: _against(m["reduction_ratio"], m["late_cosine"]),
    ),
    "C5a, less noise": Claim(
        "the same, if noise is taken out",
        "-(the same with cosines of two batches' gradients, over their noise ceiling)",
        lambda m: _against(m["reduction_ratio"], m["late_cosine_less_noise"]),
    ),
    "C5b": Claim(
        "gradient subspaces of low-rank matrices settle sooner (v2)",
        "-(rank correlation of reduction ratio and settling step)",
        lambda m: _against(m["reduction_ratio"], m["settles_at"]),
    ),
    "C5b, within kinds": Claim(
        "the same among matrices of one kind",
        "-(the same, each less the mean of its module kind)",
        lambda m: _against(m.within_types("reduction_ratio"), m.within_types("settles_at")),
    ),
    "C6": Claim(
        "low-rank weights go together with low-rank gradients",
        "-(rank correlation of reduction ratio and stable rank of the gradient over that of noise)",
        lambda m: _against(m["reduction_ratio"], m["stable_rank_to_noise"]),
    ),
}


def measured(trace: Trace) -> dict[str, Any]:
    """Numbers of a record: the threshold, every matrix, and the value with its interval of each of CLAIMS."""
    plan, positions = trace.plans[-1], module_positions(trace.matrices)
    rows = [_row(allocation, positions[allocation.name], trace) for allocation in plan.allocations]
    matrices = Rows(rows)
    return {
        "threshold": plan.threshold,
        "rank_reduction": plan.rank_reduction,
        "parameter_ratio": plan.parameter_ratio,
        "lrcs": len(plan.ranks),
        "matrices": rows,
        "claims": {name: claim.value(matrices) for name, claim in CLAIMS.items()},
    }


def _row(allocation: Allocation, position: ModulePosition, trace: Trace) -> dict[str, Any]:
    """One matrix in numbers; steps are shares of the run, 0 to 1."""
    matrix = trace.matrices[allocation.name]
    warm = after_warm_up(trace)
    late = np.ix_(*2 * [trace.steps >= min(trace.steps[-1] / 2, trace.steps[-2])])  # two checkpoints make a pair
    stable_rank, square = float(np.median(matrix.stable_rank[warm])), matrix.other[COSINE][late]
    ceiling = np.sqrt(np.clip(np.diag(square), 0, None))
    most = _off_diagonal(np.outer(ceiling, ceiling))
    return {
        "name": allocation.name,
        "kind": position.module_type,
        "layer": position.layer,
        "reduction_ratio": allocation.reduction_ratio,
        "lrc": allocation.factored,
        "stable_rank_first": float(matrix.stable_rank[0]),
        "stable_rank_least": float(matrix.stable_rank.min()),
        "stable_rank": stable_rank,
        "stable_rank_to_noise": stable_rank / noise_stable_rank(*matrix.shape),
        "top1_energy": float(np.median(matrix.top1_energy[warm])),
        "late_cosine": _off_diagonal(matrix.same[COSINE][late]),
        "late_cosine_less_noise": _off_diagonal(square) / most if most > 0 else 0.0,
        "late_ceiling": float(np.mean(np.diag(square))),
        "settles_at": settling(matrix, trace.steps),
        "settles_at_same_batch": _last_below(corrected(matrix, matrix.same, SUBSPACE)[:, -1], trace.steps),
        "effective_rank": effective_rank(matrix.weight[-1]),
        "stable_rank_of_weight": _stable(matrix.weight[-1]),
        "effective_rank_of_change": effective_rank(matrix.change[-1]),
        "stable_rank_of_change": _stable(matrix.change[-1]),
    }


def after_warm_up(trace: Trace) -> NDArray[np.bool_]:
    """The checkpoints from the step of the highest learning rate on."""
    return trace.steps >= trace.steps[int(np.argmax(trace.learning_rate))]


def noise_stable_rank(m: int, n: int) -> float:
    """Stable rank of a large m x n matrix of independent Gaussian numbers."""
    return float(m * n / (np.sqrt(m) + np.sqrt(n)) ** 2)


def effective_rank(sigma: Array) -> float:
    """exp of the entropy of the singular values' shares (Roy and Vetterli, 2007); 0 for a zero matrix."""
    share = sigma[sigma > 0] / sigma.sum() if sigma.any() else np.zeros(0)
    return float(np.exp(-(share * np.log(share)).sum())) if len(share) else 0.0


def _stable(sigma: Array) -> float:
    return float((sigma**2).sum() / sigma[0] ** 2) if sigma[0] > 0 else 0.0


def overlap_with_last(matrix: Matrix, rank: int = SUBSPACE) -> Array:
    """Overlap of the gradient's subspace with that of the last checkpoint, (T,): 0 chance, 1 as noise would leave it.

    Of two batches: less chance (r / k), then divided by the overlap of the two batches at either checkpoint (the
    correction for attenuation of psychometrics). May exceed 1 by chance; 0 where the two batches do not overlap.
    """
    square = corrected(matrix, matrix.other, rank)
    ceiling = np.sqrt(np.clip(np.diag(square) * square[-1, -1], 0, None))
    return np.where(ceiling > 0, square[:, -1] / np.maximum(ceiling, 1e-12), 0.0)


def settling(matrix: Matrix, steps: Array) -> float:
    """Share of the run after which `overlap_with_last` never falls below SETTLED again."""
    return _last_below(overlap_with_last(matrix), steps)


def corrected(matrix: Matrix, table: Mapping[str, Array], rank: int) -> Array:
    """Overlaps (T, T) of `matrix.same` or `matrix.other` less chance: 0 random subspaces, 1 equal ones."""
    chance = min(rank, matrix.full_rank) / matrix.full_rank
    return (table[OVERLAPS[rank]] - chance) / max(1 - chance, 1e-12)


def _last_below(values: Array, steps: Array) -> float:
    below = np.flatnonzero(values < SETTLED)
    at = 0 if not len(below) else min(below[-1] + 1, len(steps) - 1)
    return float(steps[at] / steps[-1])


def _off_diagonal(square: Array) -> float:
    return float(square[np.triu_indices(len(square), 1)].mean())


def rank_correlation(x: Array, y: Array) -> Interval:
    """Spearman's coefficient of x and y, (n,), with its interval; 0 where one of them is constant."""
    return _interval([np.arange(len(x))], lambda i: _spearman(x[i], y[i]))


def _against(x: Array, y: Array) -> Interval:
    value, low, high = rank_correlation(x, y)
    return [-value, -high, -low]


def _spearman(x: Array, y: Array) -> Array:
    """Along the last axis."""
    x, y = (rankdata(values, axis=-1) for values in (x, y))
    x, y = (values - values.mean(-1, keepdims=True) for values in (x, y))
    spread = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    return np.where(spread > 0, (x * y).sum(-1) / np.maximum(spread, 1e-12), 0.0)


def _mean(x: Array) -> Interval:
    return _interval([np.arange(len(x))], lambda i: x[i].mean(-1))


def _difference(x: Array, y: Array) -> Interval:
    """Of two means; 0 where one group is empty."""
    if not len(x) or not len(y):
        return [0.0, 0.0, 0.0]
    return _interval([np.arange(len(x)), np.arange(len(y))], lambda i, j: x[i].mean(-1) - y[j].mean(-1))


def _interval(groups: Sequence[NDArray[np.int64]], statistic: Callable[..., Array]) -> Interval:
    """The statistic of all, and its percentile bootstrap interval: every group is resampled with replacement."""
    draws = np.random.default_rng(0)
    drawn = [draws.choice(group, (RESAMPLED, len(group))) for group in groups]
    ends = np.quantile(statistic(*drawn), [(1 - COVERED) / 2, (1 + COVERED) / 2])
    return [float(statistic(*groups)), *map(float, ends)]


def load_pretraining(path: str | Path) -> Record:
    """The record of a pre-training; WeLoreError if it lacks one of CLAIMS or the numbers of a matrix."""
    record = Record.load(path)
    with refusing(f"{path} lacks claims or matrices", "it is of another version, run `welore pretrain` again"):
        claims = typed(record.numbers["claims"], Mapping[str, tuple[float, float, float]], "claims")
        rows = typed(record.numbers["matrices"], tuple[dict[str, Any], ...], "matrices")
        if CLAIMS.keys() - claims or not rows:
            raise WeLoreError("it has not all of them")
        for row in rows:
            typed(row["kind"], str, "kind")
            typed({name: row[name] for name in ("reduction_ratio", *RANK_AXIS)}, Mapping[str, float], "a matrix")
    run_name(record)
    return record


def claims_table(records: Sequence[Record]) -> Table:
    """Every claim by the pre-trainings among the records: value and interval of each, and the verdict over all."""
    runs = [record for record in records if record.kind == "pretrain"]
    rows = []
    for name, claim in CLAIMS.items():
        values = [record.numbers["claims"][name] for record in runs]
        cells = [interval_text(value) for value in values]
        rows.append([name, claim.statement, claim.measure, *cells, verdict(values)])
    headings = ["", "claim", "measure, above 0 as claimed", *map(run_name, runs), "verdict"]
    return Table("", headings, rows, text_columns=3)


def interval_text(interval: Sequence[float]) -> str:
    """A value with its interval."""
    value, low, high = interval
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def verdict(values: Sequence[Sequence[float]]) -> str:
    """On values with their intervals (value, low, high), one for each run: HOLDS if all lie above 0, FAILS if below."""
    if all(low > 0 for _, low, _ in values):
        return HOLDS
    return FAILS if all(high < 0 for _, _, high in values) else OPEN


def run_name(record: Record) -> str:
    """The name of a pre-training in tables: its label, or its seed."""
    return str(record.inputs.get("label") or f"seed {record.settings['seed']}")
