"""The rank and the storage form of every targeted matrix of a model: the artefact `plan.json`."""

import reprlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from welore.config import ANYWHERE, NONE, SIZE, AllocationConfig, Goal, MinRatio, ScalingName, current_name
from welore.errors import WeLoreError, choose
from welore.io.atomic import read_json, write_json
from welore.io.fields import refusing, typed
from welore.layers.block_grid import WHOLE, Grid, block_names, layer_of, read_grids, split_layers
from welore.layers.remaining import Remaining, as_json, dense_numel, read_remaining, renumbered
from welore.layers.storage_forms import DENSE, FACTORED, FORMS
from welore.records import Identity

FORMAT = "welore.plan/1"
LARGEST_SIDE = 1 << 24  # of a matrix, so that a damaged plan does not fill the memory


@dataclass(frozen=True)
class Allocation:
    """Rank and storage form of one matrix W (m, n), full rank k = min(m, n).

    rank: number of singular values at or above the threshold. factored: True for an LRC, which is stored in low rank;
    False for an N-LRC, which stays dense and untouched.
    relative_error: ||W - A B|| / ||W|| of the best factors of that rank, from the spectrum (Eckart-Young); in the norm
    of the plan's scaling.
    form: how an LRC is stored, one of layers.storage_forms.FORMS.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    factored: bool
    relative_error: float
    form: str = FACTORED

    @property
    def full_rank(self) -> int:
        """k = min(m, n)."""
        return min(self.shape)

    @property
    def reduction_ratio(self) -> float:
        """Share of the singular values below the threshold; they are removed only from a factored matrix."""
        return 1 - self.rank / self.full_rank

    @property
    def dense_parameters(self) -> int:
        """m n, of the matrix as it is when it is factorised: after pruning of the MLPs."""
        return self.shape[0] * self.shape[1]

    @property
    def stored_parameters(self) -> int:
        """Parameters of its storage form at this rank if it is an LRC, else m n."""
        return int(FORMS[self.form].cost(*self.shape, self.rank)) if self.factored else self.dense_parameters


@dataclass(frozen=True)
class Plan:
    """Rank and storage form of every targeted matrix of one model.

    target: the target that was asked for, {"keep" | "rank_reduction" | "threshold": value}.
    threshold: the level that cuts the scores (the paper's threshold if the strategy is `welore`).
    scaling, statistics, grids, neurons, experts: those of the spectra from which the plan was made. Matrices of experts
    have the numbers of the dense model; `in_result` is the plan with those of the result.
    optimize_for: cpu, gpu, size or anywhere.
    """

    model: Identity
    strategy: str
    target: Mapping[str, float]
    min_ratio: MinRatio
    allow_growth: bool
    threshold: float
    allocations: tuple[Allocation, ...]
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    scaling: str = NONE
    statistics: Mapping[str, Any] = field(default_factory=dict)
    rank_multiple: int = 1
    optimize_for: str = SIZE
    grids: Mapping[str, Grid] = field(default_factory=dict)
    neurons: Mapping[str, Remaining] = field(default_factory=dict)
    experts: Mapping[str, Remaining] = field(default_factory=dict)

    @cached_property
    def lrcs(self) -> tuple[Allocation, ...]:
        """The matrices that are stored in low rank."""
        return tuple(a for a in self.allocations if a.factored)

    @property
    def plain(self) -> bool:
        """Whether the result is an ordinary checkpoint: MLPs or mixtures are smaller alike, and nothing is factored."""
        return self.optimize_for == ANYWHERE

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Name -> rank of every LRC."""
        return {a.name: a.rank for a in self.lrcs}

    @cached_property
    def forms(self) -> dict[str, str]:
        """Name -> storage form of every LRC."""
        return {a.name: a.form for a in self.lrcs}

    @cached_property
    def split(self) -> dict[str, Grid]:
        """Layer -> grid of the layers that are stored in blocks, because at least one block is an LRC."""
        return split_layers(self.grids, self.ranks)

    @cached_property
    def lrc_layers(self) -> set[str]:
        """The layers that are stored in low rank, whole or in part."""
        return {layer_of(name, self.grids) for name in self.ranks}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Layer -> shape (m, n) of the layers of pruned MLPs."""
        shapes = {}
        for a in self.allocations:
            layer = layer_of(a.name, self.grids)
            if layer.rpartition(".")[0] in self.neurons:
                down, across = self.grids.get(layer, WHOLE)
                shapes[layer] = (down * a.shape[0], across * a.shape[1])
        return shapes

    @cached_property
    def rank_reduction(self) -> float:
        """ERR: ranks removed from the LRCs over the full ranks of all targeted matrices, after pruning of the MLPs."""
        removed = sum(a.full_rank - a.rank for a in self.lrcs)
        return removed / sum(a.full_rank for a in self.allocations)

    @cached_property
    def parameter_ratio(self) -> float:
        """Stored parameters of the targeted matrices over those of the dense model."""
        return self.stored_parameters / self.dense_parameters

    @cached_property
    def dense_parameters(self) -> int:
        """Parameters of the targeted matrices in the dense model."""
        return int(sum(map(self.dense_numel, self.allocations)))

    @cached_property
    def stored_parameters(self) -> int:
        """Stored parameters of the targeted matrices."""
        return sum(a.stored_parameters for a in self.allocations)

    def dense_numel(self, a: Allocation) -> Fraction:
        """Parameters that a matrix stands for in the dense model, before neurons and experts were taken out."""
        return dense_numel(a.dense_parameters, layer_of(a.name, self.grids), self.neurons, self.experts)

    @cached_property
    def in_result(self) -> "Plan":
        """The plan under the names of the result, whose experts are numbered anew."""
        if not self.experts:
            return self
        grids = {self.name_in_result(name): grid for name, grid in self.grids.items()}
        neurons = {self.name_in_result(name): left for name, left in self.neurons.items()}
        allocations = tuple(replace(a, name=self.name_in_result(a.name)) for a in self.allocations)
        return replace(self, allocations=allocations, grids=grids, neurons=neurons, experts={})

    def name_in_result(self, name: str) -> str:
        """The name that a module or a tensor of the dense model has in the result."""
        return renumbered(name, self.experts)

    def numbers(self) -> dict[str, Any]:
        """The achieved figures that every record of this plan holds."""
        return {
            "rank_reduction": self.rank_reduction,
            "parameter_ratio": self.parameter_ratio,
            "matrices": len(self.allocations),
            "lrcs": len(self.lrcs),
            "threshold": self.threshold,
            "targeted_parameters_dense": self.dense_parameters,
            "targeted_parameters": self.stored_parameters,
        }

    def save(self, path: str | Path) -> None:
        """Write `plan.json`, whole or not at all."""
        content = {
            "format": FORMAT,
            "model": {"name": self.model.name, "fingerprint": self.model.fingerprint},
            "strategy": self.strategy,
            "scaling": self.scaling,
            "calibration": dict(self.statistics),
            "asked": dict(self.target),
            "achieved": self.numbers(),
            "min_ratio": self.min_ratio,
            "allow_growth": self.allow_growth,
            "rank_multiple": self.rank_multiple,
            "optimize_for": self.optimize_for,
            "grids": dict(self.grids),
            "neurons": as_json(self.neurons),
            "experts": as_json(self.experts),
            "threshold": self.threshold,
            "include": list(self.include),
            "exclude": list(self.exclude),
            "matrices": [
                {
                    "name": a.name,
                    "shape": list(a.shape),
                    "kept": a.rank,
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
        with refusing(f"{path} is not a plan of welore", "make one with `welore allocate`"):
            content = typed(content, Mapping[str, Any], "the file")
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {reprlib.repr(content['format'])}, this version reads {FORMAT!r}")
            plan = cls(**_read(content))
            plan._check_names()
        return plan

    def _check_names(self) -> None:
        """Raise WeLoreError for a plan without matrices, with one twice, or with blocks that do not make a layer."""
        shapes = {a.name: a.shape for a in self.allocations}
        if not shapes:
            raise WeLoreError("it plans no matrix")
        if len(shapes) < len(self.allocations):
            twice, _ = Counter(a.name for a in self.allocations).most_common(1)[0]
            raise WeLoreError(f"it names {twice} twice")
        sizes = [len({(t.width, len(t.indices)) for t in table.values()}) for table in (self.neurons, self.experts)]
        if self.plain and (self.lrcs or sorted(sizes) != [0, 1]):
            raise WeLoreError(f"it is for {ANYWHERE}, where all MLPs have one width and every matrix stays dense")
        if sizes[1] > 1:
            raise WeLoreError("it takes different numbers of experts out of layers")
        for layer, grid in self.grids.items():
            blocks = block_names(layer, grid)
            if lost := [name for name in blocks if name not in shapes]:
                raise WeLoreError(f"it splits {layer} and says nothing of {lost[0]}")
            if layer in shapes or len({shapes[name] for name in blocks}) > 1:
                raise WeLoreError(f"it splits {layer}, but not in blocks of one shape")

    def check_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise WeLoreError unless the matrices of the plan are those of a model; shapes: name -> (m, n) of those."""
        planned = {a.name: a.shape for a in self.allocations}
        for name in {**shapes, **planned}:
            mine, theirs = (table.get(name, "none") for table in (planned, shapes))
            if mine != theirs:
                raise WeLoreError(
                    f"the plan gives {name} the shape {mine}, the model has {theirs}: make the plan again with it"
                )


def _read(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a plan in the content of its file; KeyError or WeLoreError for one that is not as it must be."""

    def value(name: str, kind: Any, *default: Any) -> Any:
        return typed(default[0] if default and name not in content else content[name], kind, name)

    model = value("model", Mapping[str, Any])
    entries = value("matrices", tuple[Mapping[str, Any], ...])
    min_ratio, rank_multiple = value("min_ratio", MinRatio), value("rank_multiple", int, 1)
    AllocationConfig(min_ratio=min_ratio, rank_multiple=rank_multiple)  # checks both
    return {
        "model": Identity(*(typed(model[name], str, f"{name} of the model") for name in ("name", "fingerprint"))),
        "strategy": value("strategy", str),
        "target": {current_name(name): number for name, number in value("asked", Mapping[str, float]).items()},
        "min_ratio": min_ratio,
        "allow_growth": value("allow_growth", bool),
        "threshold": value("threshold", float),
        "allocations": tuple(map(_read_allocation, entries)),
        "include": value("include", tuple[str, ...]),
        "exclude": value("exclude", tuple[str, ...]),
        "scaling": typed(current_name(value("scaling", str, NONE)), ScalingName, "scaling"),
        "statistics": value("calibration", Mapping[str, Any], {}),
        "rank_multiple": rank_multiple,
        "optimize_for": value("optimize_for", Goal, SIZE),
        "grids": read_grids(content.get("grids", {})),
        "neurons": read_remaining(content.get("neurons", {})),
        "experts": read_remaining(content.get("experts", {}), "experts"),
    }


def _read_allocation(entry: Mapping[str, Any]) -> Allocation:
    name = typed(entry["name"], str, "the name of a matrix")
    m, n = typed(entry["shape"], tuple[int, int], f"shape of {name}")
    rank, factored = typed(entry["kept"], int, f"rank of {name}"), typed(entry["factored"], bool, f"factored of {name}")
    if max(m, n) > LARGEST_SIDE:
        raise WeLoreError(f"{name} has the shape {(m, n)}: no matrix of a model is so large")
    if not 1 <= rank <= min(m, n):
        raise WeLoreError(f"rank {rank} of {name} must lie between 1 and {min(m, n)}")
    form = entry.get("form", FACTORED) if factored else FACTORED  # plans from before there were forms have none
    choose("form", typed(form, str, f"form of {name}"), FORMS)
    if factored and rank == min(m, n) and not FORMS[form].full_rank:
        raise WeLoreError(f"{name} has full rank {rank}; {form} storage needs a lower one")
    if (error := float(typed(entry["relative_error"], float, f"relative_error of {name}"))) < 0:
        raise WeLoreError(f"relative_error of {name} is {error}, it must be at least 0")
    return Allocation(name, (m, n), rank, factored, error, form)
