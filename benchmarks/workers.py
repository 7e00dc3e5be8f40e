"""`compress` of SmolLM2 by the paper's method with one worker and with two, in turns, on a machine that is idle.

The time of analysis and factors, and of the whole, which also opens the model and writes the result; medians of the
ratios of neighbouring runs. Processor time beside it tells whether the machine was idle: with two workers it is then
close to twice the time.
"""

import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from welore.compression.pipeline import compress
from welore.config import CompressionConfig
from welore.io._malloc import return_freed_memory
from welore.io.hub import resolve_model
from welore.models.embedded import embedded_model
from welore.records import Record

HERE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
RANK_REDUCTION, ROUNDS = 0.5, 5
MATRICES, WHOLE, PROCESSOR = "analysis and factors", "whole", "processor, analysis and factors"


def compressed(model: Path, workers: int) -> dict[str, float]:
    """Seconds of one `compress`: of the matrices, the processor's for them, and of all of it."""
    seconds = {MATRICES: 0.0, PROCESSOR: 0.0}

    def progress(items: Iterable[tuple[Any, float]], label: str, total: float) -> Iterator[Any]:
        started, processor = time.perf_counter(), time.process_time()
        for item, _ in items:
            yield item
        if label != "writing":
            seconds[MATRICES] += time.perf_counter() - started
            seconds[PROCESSOR] += time.process_time() - processor

    config = CompressionConfig(rank_reduction=RANK_REDUCTION)
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "small"
        started = time.perf_counter()
        compress(model, out, config, workers=workers, progress=progress)
        seconds[WHOLE] = time.perf_counter() - started
    return seconds


def main() -> None:
    """Measure, write docs/benchmarks/workers.json, print one line."""
    model = resolve_model(embedded_model())
    return_freed_memory()  # as the command does
    compressed(model, 1)  # loads what is loaded once
    rounds = [(compressed(model, 1), compressed(model, 2)) for _ in range(ROUNDS)]
    ratios = {name: [one[name] / two[name] for one, two in rounds] for name in (MATRICES, WHOLE)}
    numbers: dict[str, Any] = {
        "two_workers_over_one": statistics.median(ratios[MATRICES]),
        "two_workers_over_one_whole_command": statistics.median(ratios[WHOLE]),
        "rounds": [{"one": one, "two": two} for one, two in rounds],
    }
    settings = {"rank_reduction": RANK_REDUCTION, "rounds": ROUNDS}
    Record("workers", {"model": embedded_model().stem}, settings, numbers).save(HERE / "workers.json")
    print(
        f"two workers {numbers['two_workers_over_one']:.2f}x as fast as one in analysis and factors, "
        f"{numbers['two_workers_over_one_whole_command']:.2f}x in the whole command"
    )


if __name__ == "__main__":
    main()
