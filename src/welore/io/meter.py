"""The needs of the stages of a job, measured: seconds, processor time, peak memory of the process and of its device."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from welore.io.memory import tensor_memory

INTERVAL = 0.1  # seconds between two looks at the memory
STATUS = Path("/proc/self/statm")


class Meter:
    """The stages of one job in this process; what is spent in a stage within a stage counts for the inner one.

    stages: name -> `seconds`, `processor_seconds` (of all threads), `peak_memory_bytes` (the resident set of the
    process, sampled; on Linux) and, on another device than the CPU, `peak_device_memory_bytes` (of tensors).
    """

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, float]] = {}
        self._open: list[str] = []
        self._lock = threading.Lock()
        self._wall = self._processor = 0.0
        self._highest = 0

    @contextmanager
    def stage(self, name: str, device: torch.device) -> Iterator[None]:
        """Count what the block takes under this name; a stage that comes again is added to. Only for one thread."""
        self._charge(device)
        with self._lock:
            self._open.append(name)
        closed = threading.Event()
        if len(self._open) == 1:
            threading.Thread(target=self._watch, args=(device, closed), daemon=True).start()
        try:
            yield
        finally:
            self._charge(device)
            closed.set()
            with self._lock:
                self._open.pop()

    def measured(self, device: torch.device) -> dict[str, dict[str, float]]:
        """The stages up to now, those that are open, too."""
        self._charge(device)
        with self._lock:
            return {name: dict(stage) for name, stage in self.stages.items()}

    def _watch(self, device: torch.device, closed: threading.Event) -> None:
        while not closed.wait(INTERVAL):
            self._charge(device)

    def _charge(self, device: torch.device) -> None:
        """Add the time since the last call to the innermost open stage, and look at the memory."""
        with self._lock:
            now, spent = time.perf_counter(), time.process_time()
            if self._open:
                stage = self.stages.setdefault(self._open[-1], {"seconds": 0.0, "processor_seconds": 0.0})
                stage["seconds"] += now - self._wall
                stage["processor_seconds"] += spent - self._processor
                for name, size in self._memory(device).items():
                    stage[name] = max(stage.get(name, 0), size)
            self._wall, self._processor = now, spent

    def _memory(self, device: torch.device) -> dict[str, int]:
        """Bytes now; of a device its own peak, which no sample misses, if that is higher than ever before."""
        sizes = {}
        if STATUS.exists():
            sizes["peak_memory_bytes"] = int(STATUS.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if device.type != "cpu":
            now, highest = tensor_memory(device)
            sizes["peak_device_memory_bytes"] = highest if highest > self._highest else now
            self._highest = highest
        return sizes
