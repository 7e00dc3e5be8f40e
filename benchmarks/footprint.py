"""`compress` in a process of its own that measures itself, above what the imports take: for memory.py and scale.py.

The process imports everything, notes its memory, compresses, and reads the peak that the kernel kept. Anonymous memory
is what it allocated; the resident set also counts pages of mapped files. What every use of the command loads lazily
(the model's class, the linear algebra libraries) belongs to the imports; no module is loaded after that.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from welore.compression.pipeline import compress
from welore.config import CompressionConfig
from welore.io._malloc import return_freed_memory
from welore.linalg.svd import factorise, singular_values
from welore.models.source import CheckpointSource

Item = TypeVar("Item")


def measured(model: Path, rank_reduction: float, workers: int) -> dict[str, Any]:
    """Peaks in bytes, overall and by stage; seconds of every step; the numbers of the compression record."""
    with tempfile.TemporaryDirectory() as directory:
        out = str(Path(directory) / "small")
        command = [sys.executable, __file__, str(model), out, str(rank_reduction), str(workers)]
        found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    with Path("/proc/self/status").open() as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))


def main(model: str, out: str, rank_reduction: float, workers: int) -> dict[str, Any]:
    """Compress, and what `measured` returns."""
    factorise(torch.randn(64, 64), 8)
    singular_values(torch.randn(64, 64))
    _ = CheckpointSource(Path(model)).skeleton
    return_freed_memory()  # as the command does
    modules = set(sys.modules)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the present
    baseline, resident = status("RssAnon"), status("VmRSS")
    peaks: dict[str, int] = {}
    steps: dict[str, list[tuple[float, float]]] = {}
    stage, running = "start", True

    def watch() -> None:
        while running:
            peaks[stage] = max(peaks.get(stage, 0), status("RssAnon") - baseline)
            time.sleep(0.002)

    def timed(items: Iterable[tuple[Item, float]], label: str, total: float) -> Iterator[Item]:
        nonlocal stage
        stage, before = label, time.perf_counter()
        for item, cost in items:  # with one worker, from one finished matrix to the next
            now = time.perf_counter()
            steps.setdefault(label, []).append((cost, now - before))
            before = now
            yield item

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = compress(model, out, CompressionConfig(rank_reduction=rank_reduction), workers=workers, progress=timed)
    running = False
    watcher.join()
    assert set(sys.modules) == modules, f"loaded within what is measured: {sorted(set(sys.modules) - modules)}"
    return {
        "anonymous_baseline_bytes": baseline,
        "anonymous_peak_bytes": max(peaks.values()),
        "anonymous_peak_bytes_by_stage": peaks,
        "resident_baseline_bytes": resident,
        "resident_peak_bytes": status("VmHWM") - resident,
        "steps": steps,
        "numbers": result.record.numbers,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))))
