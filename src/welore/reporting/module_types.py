"""The kinds of matrices of a model: names without their layer, as short as tells them apart, and a plan by kind."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from welore.allocation.plan import Allocation, Plan
from welore.linalg.spectrum import gaussian_null


@dataclass(frozen=True)
class Place:
    """Where a matrix sits: its kind is its name without the layer; layer None: outside the blocks."""

    kind: str
    layer: int | None


@dataclass(frozen=True)
class KindSummary:
    """One module kind in a plan: means over its matrices; null is the Gaussian share (`welore` plans only)."""

    kind: str
    matrices: int
    lrcs: int
    reduction_ratio: float
    null: float | None
    dense_parameters: int
    stored_parameters: int

    @property
    def parameter_ratio(self) -> float:
        """Stored over dense parameters."""
        return self.stored_parameters / self.dense_parameters


def places(names: Iterable[str]) -> dict[str, Place]:
    """Name -> place. A kind is shortened to the fewest last components that tell it from all other kinds."""
    parted = {name: _without_layer(name) for name in names}
    kinds = {kind for kind, _ in parted.values()}
    short = {kind: _shortest(kind, kinds) for kind in kinds}
    return {name: Place(short[kind], layer) for name, (kind, layer) in parted.items()}


def summarise(plan: Plan) -> list[KindSummary]:
    """One line per module kind, in the model's order."""
    place = places(a.name for a in plan.allocations)
    members: dict[str, list[Allocation]] = {}
    for a in plan.allocations:
        members.setdefault(place[a.name].kind, []).append(a)
    return [
        KindSummary(
            kind=kind,
            matrices=len(group),
            lrcs=sum(a.factored for a in group),
            reduction_ratio=float(np.mean([a.reduction_ratio for a in group])),
            null=_null_share(group, plan.threshold) if plan.strategy == "welore" else None,
            dense_parameters=sum(map(plan.dense_numel, group)),
            stored_parameters=sum(a.stored_parameters for a in group),
        )
        for kind, group in members.items()
    ]


def _without_layer(name: str) -> tuple[str, int | None]:
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if at is None:
        return name, None
    return ".".join(parts[:at] + parts[at + 1 :]), int(parts[at])


def _shortest(kind: str, kinds: Iterable[str]) -> str:
    parts = kind.split(".")
    others = [f".{other}" for other in kinds if other != kind]
    # an ending that starts with an expert's number tells a reader nothing
    endings = (".".join(parts[-n:]) for n in range(1, len(parts)) if not parts[-n].isdecimal())
    return next((end for end in endings if not any(o.endswith(f".{end}") for o in others)), kind)


def _null_share(group: Sequence[Allocation], threshold: float) -> float:
    return float(np.mean([(gaussian_null(*a.shape) < threshold).mean() for a in group]))
