"""`compress` in a process of its own that measures itself, above what the imports take: for memory.py, scale.py and
default_job.py.

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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

import torch

from welore.compression.pipeline import compress
from welore.config import CompressionConfig
from welore.io._malloc import return_freed_memory
from welore.linalg.svd import factorise, singular_values
from welore.models.source import CheckpointSource

Item = TypeVar("Item")


def measured(model: Path, rank_reduction: float, workers: int, *exclude: str) -> dict[str, Any]:
    """Peaks in bytes, overall and by stage; seconds of every step; the numbers of the compression record.

    exclude: patterns of the matrices that stay dense.
    """
    with tempfile.TemporaryDirectory() as directory:
        out = str(Path(directory) / "small")
        command = [sys.executable, __file__, str(model), out, str(rank_reduction), str(workers), *exclude]
        found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def status(*fields: str) -> tuple[int, ...]:
    """Bytes of fields of /proc/self/status."""
    with Path("/proc/self/status").open() as file:
        read = {name: text.split()[0] for name, _, text in (line.partition(":") for line in file) if name in fields}
    return tuple(int(read[field]) * 1024 for field in fields)


class Watch:
    """Samples this process while it works. A context manager, made when everything is imported.

    progress: to be given to the verb; it names the stage. stages: its peaks above the memory at the start, in bytes,
    and its seconds, of the wall clock and of all threads of the process. steps: label -> cost and seconds of every
    item. whenever: called with the stages once in a while.
    """

    def __init__(self, interval: float, whenever: Callable[[dict[str, Any]], None] = lambda stages: None) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the present
        self.anonymous, self.resident = status("RssAnon", "VmRSS")
        self.interval, self.whenever = interval, whenever
        self.stages: dict[str, dict[str, float]] = {}
        self.steps: dict[str, list[tuple[float, float]]] = {}
        self._stage, self._running = "start", True
        self._lock = threading.Lock()
        self._before = time.perf_counter(), time.process_time()
        self._thread = threading.Thread(target=self._watch)

    def progress(self, items: Iterable[tuple[Item, float]], label: str, total: float) -> Iterator[Item]:
        """The items; until the next one is taken, of this or of another work, the stage is `label`."""
        self._enter(label)
        before = time.perf_counter()
        for item, cost in items:  # with one worker, from one finished matrix to the next
            self._enter(label)
            now = time.perf_counter()
            self.steps.setdefault(label, []).append((cost, now - before))
            before = now
            yield item

    def _enter(self, label: str) -> None:
        if label != self._stage:
            self._sample()
            self._stage = label

    def _watch(self) -> None:
        told = 0.0
        while self._running:
            time.sleep(self.interval)
            self._sample()
            if time.perf_counter() > told + 1:
                self.whenever(self.stages)
                told = time.perf_counter()

    def _sample(self) -> None:
        """Add the time since the last sample to the stage, and look at the memory."""
        with self._lock:
            stage = self.stages.setdefault(self._stage, dict.fromkeys(("seconds", "processor_seconds"), 0.0))
            now = time.perf_counter(), time.process_time()
            for name, after, before in zip(("seconds", "processor_seconds"), now, self._before, strict=True):
                stage[name] += after - before
            self._before = now
            anonymous, resident = status("RssAnon", "VmRSS")
            for name, size in (
                ("anonymous_peak_bytes", anonymous - self.anonymous),
                ("resident_peak_bytes", resident - self.resident),
            ):
                stage[name] = max(stage.get(name, 0), size)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._running = False
        self._thread.join()
        self._sample()
        self.whenever(self.stages)


def main(model: str, out: str, rank_reduction: float, workers: int, *exclude: str) -> dict[str, Any]:
    """Compress, and what `measured` returns."""
    factorise(torch.randn(64, 64), 8)
    singular_values(torch.randn(64, 64))
    _ = CheckpointSource(Path(model)).skeleton
    return_freed_memory()  # as the command does
    modules = set(sys.modules)
    with Watch(0.002) as watch:
        config = CompressionConfig(rank_reduction=rank_reduction, exclude=exclude)
        result = compress(model, out, config, workers=workers, progress=watch.progress)
    assert set(sys.modules) == modules, f"loaded within what is measured: {sorted(set(sys.modules) - modules)}"
    peaks = {label: stage["anonymous_peak_bytes"] for label, stage in watch.stages.items()}
    return {
        "anonymous_baseline_bytes": watch.anonymous,
        "anonymous_peak_bytes": max(peaks.values()),
        "anonymous_peak_bytes_by_stage": peaks,
        "resident_baseline_bytes": watch.resident,
        "resident_peak_bytes": status("VmHWM")[0] - watch.resident,
        "steps": watch.steps,
        "numbers": result.record.numbers,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])))
