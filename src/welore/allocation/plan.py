"""The rank and the storage form of every targeted matrix of a model: the artefact `plan.json`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from welore.allocation.neurons import Neurons, as_json, dense_numel, read_neurons
from welore.config import NONE, MinRatio, current_name
from welore.errors import WeLoreError, choose
from welore.io.atomic import read_json, write_json
from welore.layers.block_grid import WHOLE, Grid, block_names, layer_of, read_grids, split_layers
from welore.layers.storage_forms import DENSE, FACTORED, FORMS
from welore.records import Identity

FORMAT = "welore.plan/1"


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
    scaling, statistics, grids, neurons: those of the spectra from which the plan was made.
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
    grids: Mapping[str, Grid] = field(default_factory=dict)
    neurons: Mapping[str, Neurons] = field(default_factory=dict)

    @cached_property
    def lrcs(self) -> tuple[Allocation, ...]:
        """The matrices that are stored in low rank."""
        return tuple(a for a in self.allocations if a.factored)

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
        return self.stored_parameters / sum(map(self.dense_numel, self.allocations))

    @cached_property
    def stored_parameters(self) -> int:
        """Stored parameters of the targeted matrices."""
        return sum(a.stored_parameters for a in self.allocations)

    def dense_numel(self, a: Allocation) -> int:
        """Parameters of a matrix in the dense model, before pruning of the MLPs."""
        return dense_numel(a.dense_parameters, layer_of(a.name, self.grids), self.neurons)

    def numbers(self) -> dict[str, Any]:
        """The achieved figures that every record of this plan holds."""
        return {
            "rank_reduction": self.rank_reduction,
            "parameter_ratio": self.parameter_ratio,
            "matrices": len(self.allocations),
            "lrcs": len(self.lrcs),
            "threshold": self.threshold,
            "targeted_parameters_dense": sum(map(self.dense_numel, self.allocations)),
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
            "grids": dict(self.grids),
            "neurons": as_json(self.neurons),
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
        try:
            if content["format"] != FORMAT:
                raise WeLoreError(f"{path} has format {content['format']!r}, this version reads {FORMAT!r}")
            if not content["matrices"]:
                raise WeLoreError(f"{path} plans no matrix: make it again with `welore allocate`")
            grids = read_grids(content.get("grids", {}))
            names = {matrix["name"] for matrix in content["matrices"]}
            for layer, grid in grids.items():
                if lost := set(block_names(layer, grid)) - names:
                    raise WeLoreError(f"{path} splits {layer} and says nothing of {min(lost)}: make it again")
            return cls(
                model=Identity(content["model"]["name"], content["model"]["fingerprint"]),
                strategy=content["strategy"],
                target={current_name(name): value for name, value in content["asked"].items()},
                min_ratio=content["min_ratio"],
                allow_growth=content["allow_growth"],
                threshold=content["threshold"],
                allocations=tuple(_read_allocation(m, path) for m in content["matrices"]),
                include=tuple(content["include"]),
                exclude=tuple(content["exclude"]),
                scaling=current_name(content.get("scaling", NONE)),
                statistics=content.get("calibration", {}),
                rank_multiple=content.get("rank_multiple", 1),
                grids=grids,
                neurons=read_neurons(content.get("neurons", {})),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise WeLoreError(f"{path} is not a plan of welore ({error!r}): make one with `welore allocate`") from error


def _read_allocation(entry: Mapping[str, Any], path: str | Path) -> Allocation:
    (m, n), rank = entry["shape"], entry["kept"]
    if not all(isinstance(x, int) and x > 0 for x in (m, n, rank)):
        raise WeLoreError(f"{path}: shape and rank of {entry['name']} must be whole numbers above 0")
    if not 1 <= rank <= min(m, n):
        raise WeLoreError(f"{path}: rank {rank} of {entry['name']} must lie between 1 and {min(m, n)}")
    factored = bool(entry["factored"])
    form = entry.get("form", FACTORED) if factored else FACTORED  # plans from before there were forms have none
    choose(f"form of {entry['name']} in {path}:", form, FORMS)
    if factored and rank == min(m, n) and not FORMS[form].full_rank:
        raise WeLoreError(f"{path}: {entry['name']} has full rank {rank}; {form} storage needs a lower one")
    return Allocation(entry["name"], (m, n), rank, factored, float(entry["relative_error"]), form)
