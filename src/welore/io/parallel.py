"""Many independent matrices: over threads of one process, and over the processes of torchrun or accelerate."""

import ctypes
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from threadpoolctl import threadpool_limits

from welore.errors import WeLoreError
from welore.io.progress import Progress

Item = TypeVar("Item")
Result = TypeVar("Result")

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # M_TRIM_THRESHOLD and so on, of malloc.h
GROWTH = 12 << 20  # bytes by which a process that works through matrices may grow before it gives back what is free


@dataclass(frozen=True)
class Processes:
    """The processes that do one job together: each takes every `size`-th item, the first one writes the result."""

    rank: int
    size: int

    @property
    def is_main(self) -> bool:
        """Whether this process writes the result."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items of this process."""
        return items[self.rank :: self.size]

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.size > 1:
            dist.barrier()


ALONE = Processes(0, 1)


def team() -> Processes:
    """All processes that torchrun or accelerate started for this command; one without a launcher."""
    if not dist.is_available() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ALONE
    if not dist.is_initialized():
        # The others wait while the first one writes; half an hour, the default, is short for a large model.
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    return Processes(dist.get_rank(), dist.get_world_size())


def default_workers() -> int:
    """One thread for every core this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def return_freed_memory() -> None:
    """Make glibc keep one heap for all threads and give very large freed blocks back at once; no effect elsewhere.

    For a process that works through matrices: otherwise every thread's heap keeps the largest ones it has seen, and
    the more so the larger the blocks that the imports have freed. What the one heap keeps all the same, `parallel_map`
    gives back. Not for a process that runs a model, which wants its blocks again.
    """
    set_glibc({TRIM_THRESHOLD: 16 << 20, MMAP_THRESHOLD: 4 << 20, ARENA_MAX: 1})


def keep_freed_memory() -> None:
    """What glibc would come to by itself, before a process that worked through matrices runs a model."""
    set_glibc({TRIM_THRESHOLD: 64 << 20, MMAP_THRESHOLD: 32 << 20})


def set_glibc(options: dict[int, int]) -> None:
    """Tell glibc's heap, where there is one: option of mallopt -> bytes, or a number of heaps."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in options.items():
            libc.mallopt(option, value)


@contextmanager
def _heap() -> Iterator[Callable[[int], None]]:
    """A function that gives all free memory back to the system if the process has grown by so many bytes since.

    By glibc on Linux; elsewhere it does nothing. Free memory is not given back at every matrix, for what the system
    hands out again it has to clear first, which takes a third of the time of the work on small matrices; but now and
    then it must be, for small things that stay split the room of large ones that have gone.
    """
    statm = Path("/proc/self/statm")
    if platform.libc_ver()[0] != "glibc" or not statm.exists():
        yield lambda growth: None
        return
    libc, page = ctypes.CDLL(None), os.sysconf("SC_PAGE_SIZE")
    with statm.open("rb", buffering=0) as file:  # once: to open it takes longer than to read it

        def anonymous() -> int:
            _, resident, shared, *_ = os.pread(file.fileno(), 200, 0).split()
            return (int(resident) - int(shared)) * page

        floor = anonymous()

        def trim(growth: int) -> None:
            nonlocal floor
            if anonymous() > floor + growth:
                libc.malloc_trim(0)
                floor = anonymous()

        yield trim


def parallel_map(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    costs: Sequence[float],
    *,
    workers: int | None,
    progress: Progress,
    label: str,
) -> list[Result]:
    """function(item) of every item, in order, by `workers` threads of one BLAS thread each (None: one per core).

    With one BLAS thread a result has the same bits however many workers there are. The first error stops the rest.
    costs: relative time of every item, for an honest estimate of the time left.
    """
    workers = default_workers() if workers is None else workers
    if workers < 1:
        raise WeLoreError(f"workers is {workers}: it must be at least 1")
    growth = GROWTH * (workers + 2) // 3  # what the others hold has grown, too, and is not free
    # OpenMP and MKL count threads per calling thread: every worker has to say it for itself.
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    with _heap() as trim, _one_thread_each(), pool:

        def work(item: Item) -> Result:
            result = function(item)
            trim(growth)
            return result

        futures = [pool.submit(work, item) for item in items]
        cost_of = dict(zip(futures, costs, strict=True))
        done: Iterator[object] = as_completed(futures)
        try:
            for future in progress(((f, cost_of[f]) for f in done), label, sum(costs)):  # type: ignore[index]
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        trim(0)
    return [future.result() for future in futures]


@contextmanager
def _one_thread_each() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)
