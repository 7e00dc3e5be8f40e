"""The result of `compress`."""

import html
from dataclasses import dataclass
from pathlib import Path

from welore.allocation.plan import Plan
from welore.records import Record


@dataclass(frozen=True, repr=False)
class CompressionResult:
    """A smaller model, and how it was made. output_dir: None for a model that was changed in memory only."""

    plan: Plan
    record: Record
    output_dir: Path | None = None

    @property
    def parameter_ratio(self) -> float:
        """Stored parameters of the targeted matrices over those of the dense model."""
        return float(self.record.numbers["parameter_ratio"])

    @property
    def rank_reduction(self) -> float:
        """ERR: removed ranks over all ranks of the targeted matrices."""
        return float(self.record.numbers["rank_reduction"])

    @property
    def bytes(self) -> int:
        """Size of the weights."""
        return int(self.record.numbers["bytes"])

    def _rows(self) -> dict[str, str]:
        return {
            "parameters of the targeted matrices": f"{self.parameter_ratio:.1%}",
            "effective rank reduction": f"{self.rank_reduction:.1%}",
            "size of the weights": f"{self.bytes / 1e6:,.1f} MB",
            "low-rank matrices": f"{len(self.plan.lrcs)} of {len(self.plan.allocations)}",
            "written to": str(self.output_dir or "(in memory)"),
        }

    def __repr__(self) -> str:
        return f"CompressionResult({', '.join(f'{name}: {value}' for name, value in self._rows().items())})"

    def _repr_html_(self) -> str:
        """A small table for notebooks."""
        rows = "".join(f"<tr><th>{name}</th><td>{html.escape(value)}</td></tr>" for name, value in self._rows().items())
        return f"<table>{rows}</table>"
