"""Peak memory of `compress` on SmolLM2, above what the imports take: a record and one line."""

from pathlib import Path

from footprint import measured
from welore.io.checkpoint import weight_files
from welore.io.hub import resolve_model
from welore.models.embedded import embedded_model
from welore.records import Record

HERE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
RANK_REDUCTION = 0.5
WORKERS = (1, 2)
LIMIT_BYTES = 64e6  # of the peak resident set
KEPT = (
    "anonymous_baseline_bytes",
    "anonymous_peak_bytes",
    "anonymous_peak_bytes_by_stage",
    "resident_baseline_bytes",
    "resident_peak_bytes",
)


def main() -> None:
    """Measure with one and two workers, write docs/benchmarks/memory.json, print a line each; 1 if over the limit."""
    model = resolve_model(embedded_model())
    numbers: dict[str, object] = {
        "model_bytes": sum(path.stat().st_size for path in weight_files(model)),
        "limit_bytes": LIMIT_BYTES,
    }
    peaks = []
    for workers in WORKERS:
        found = measured(model, RANK_REDUCTION, workers)
        counts = {name: found["numbers"][name] for name in ("lrcs", "matrices")}
        numbers[f"workers_{workers}"] = {name: found[name] for name in KEPT} | counts
        peaks.append(found["resident_peak_bytes"])
        print(
            f"compress, {workers} workers: peak anonymous memory {found['anonymous_peak_bytes'] / 1e6:.0f} MB, peak "
            f"resident set {found['resident_peak_bytes'] / 1e6:.0f} MB above the imports"
        )
    settings = {"rank_reduction": RANK_REDUCTION}
    Record("memory", {"model": embedded_model().stem}, settings, numbers).save(HERE / "memory.json")
    if max(peaks) > LIMIT_BYTES:
        raise SystemExit("the peak is above the limit")


if __name__ == "__main__":
    main()
