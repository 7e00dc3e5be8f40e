"""Module types of a model (q_proj, mlp.c_fc, ...): a matrix's name without its layer; and a plan summed by type."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from welore.allocation.plan import Plan
from welore.layers.expert_names import of_all_experts
from welore.linalg.spectrum import gaussian_null


@dataclass(frozen=True)
class ModulePosition:
    """Module type and layer of a matrix; the layer is None outside the decoder blocks."""

    module_type: str
    layer: int | None


@dataclass(frozen=True)
class TypeSummary:
    """One module type in a plan; reduction_ratio and null (its share in Gaussian noise, `welore` only) are means."""

    module_type: str
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


def module_positions(names: Iterable[str]) -> dict[str, ModulePosition]:
    """Name -> position; a type is shortened to the fewest last components that tell it from all other types.

    The matrices of all experts of a layer have one position.
    """
    split = {name: _split_layer(of_all_experts(name)) for name in names}
    full_names = {module_type for module_type, _ in split.values()}
    short = {module_type: _shorten(module_type, full_names) for module_type in full_names}
    return {name: ModulePosition(short[module_type], layer) for name, (module_type, layer) in split.items()}


def group_by_type(names: Iterable[str]) -> dict[str, list[str]]:
    """Module type -> names, both in the order given."""
    groups: dict[str, list[str]] = {}
    for name, position in module_positions(names).items():
        groups.setdefault(position.module_type, []).append(name)
    return groups


def summarise(plan: Plan) -> list[TypeSummary]:
    """One entry per module type, in the model's order."""
    allocations = {a.name: a for a in plan.allocations}
    summaries = []
    for module_type, names in group_by_type(allocations).items():
        group = [allocations[name] for name in names]
        ratio = float(np.mean([a.reduction_ratio for a in group]))
        shares = [(gaussian_null(*a.shape) < plan.threshold).mean() for a in group if plan.strategy == "welore"]
        null = float(np.mean(shares)) if shares else None
        dense, stored = int(sum(map(plan.dense_numel, group))), sum(a.stored_parameters for a in group)
        lrcs = sum(a.factored for a in group)
        summaries.append(TypeSummary(module_type, len(group), lrcs, ratio, null, dense, stored))
    return summaries


def _split_layer(name: str) -> tuple[str, int | None]:
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if at is None:
        return name, None
    return ".".join(parts[:at] + parts[at + 1 :]), int(parts[at])


def _shorten(module_type: str, all_types: Iterable[str]) -> str:
    parts = module_type.split(".")
    others = [f".{other}" for other in all_types if other != module_type]
    # An ending that starts with an expert's number tells a reader nothing.
    endings = (".".join(parts[-n:]) for n in range(1, len(parts)) if not parts[-n].isdecimal())
    return next((end for end in endings if not any(o.endswith(f".{end}") for o in others)), module_type)
