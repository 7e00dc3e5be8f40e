"""Many independent matrices: over threads of one process, and over the processes of torchrun or accelerate."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from threadpoolctl import threadpool_limits

from welore.errors import WeLoreError
from welore.io.progress import Progress

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """The processes that do one job together: each takes every `size`-th item, the main one writes the result."""

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
            try:
                dist.barrier()
            except RuntimeError as error:  # that process has said why
                raise WeLoreError("another process of this job ended before its work was done") from error


ALONE = Processes(0, 1)


def join_processes() -> Processes:
    """All processes that torchrun or accelerate started for this command; one without a launcher.

    It makes a process group, so only the command line calls it; a library is given its processes.
    """
    if not dist.is_available() or _of_launcher("WORLD_SIZE", 1) < 2:
        return ALONE
    if not dist.is_initialized():
        # The others wait while the first one writes; half an hour, the default, is short for a large model.
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    return Processes(dist.get_rank(), dist.get_world_size())


def launched_rank() -> int:
    """The number of this process among those that torchrun or accelerate started; 0 without a launcher."""
    _of_launcher("WORLD_SIZE", 1)
    return _of_launcher("RANK", 0)


def _of_launcher(name: str, alone: int) -> int:
    """A number that a launcher sets in the environment."""
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise WeLoreError(f"{name} is {text!r} in the environment: it is a number that torchrun sets; unset it")
    return int(text or alone)


def default_workers() -> int:
    """One thread for every core this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel_map(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    costs: Sequence[float],
    *,
    workers: int,
    progress: Progress,
    label: str,
) -> list[Result]:
    """function(item) of every item, in order, by `workers` threads of one BLAS thread each.

    With one BLAS thread a result has the same bits however many workers there are. The first error stops the rest.
    costs: relative time of every item, for an honest estimate of the time left.
    """
    # OpenMP and MKL count threads per calling thread: every worker has to say it for itself.
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    with _one_thread_each(), pool:
        futures = [pool.submit(function, item) for item in items]
        cost_of = dict(zip(futures, costs, strict=True))
        done: Iterator[object] = as_completed(futures)
        try:
            for future in progress(((f, cost_of[f]) for f in done), label, sum(costs)):  # type: ignore[index]
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
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
