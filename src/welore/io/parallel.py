"""Many independent matrices: over threads of one process, and over the processes of torchrun or accelerate."""

import math
import os
import threading
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
from welore.io.memory import free_memory
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

    def share(self, items: Sequence[Item], costs: Sequence[float] | None = None) -> Sequence[Item]:
        """The items of this process, in order; costs: relative time of every item, by default the same for all.

        The item that costs most goes first, each to the process that has the least to do.
        """
        costs = [1.0] * len(items) if costs is None else costs
        loads, mine = [0.0] * self.size, []
        for index in _dearest_first(costs):
            rank = loads.index(min(loads))
            loads[rank] += costs[index]
            if rank == self.rank:
                mine.append(index)
        return [items[index] for index in sorted(mine)]

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.size > 1:
            with _all_there():
                dist.barrier()

    def gather(self, item: Item) -> list[Item]:
        """The item of every process, in order of rank, in every process."""
        everyones = [item] * self.size
        if self.size > 1:
            with _all_there():
                dist.all_gather_object(everyones, item)
        return everyones

    def add(self, total: torch.Tensor) -> None:
        """Make a tensor the sum of those of all processes."""
        if self.size > 1:
            host = total.cpu()
            with _all_there():
                dist.all_reduce(host)
            total.copy_(host)

    def agreed(self, value: Result) -> Result:
        """The value that the main process has."""
        values = [value]
        if self.size > 1:
            with _all_there():
                dist.broadcast_object_list(values)
        return values[0]


@contextmanager
def _all_there() -> Iterator[None]:
    """Raise WeLoreError if another process has gone."""
    try:
        yield
    except RuntimeError as error:  # that process has said why
        raise WeLoreError("another process of this job ended before its work was done") from error


ALONE = Processes(0, 1)
CPU = torch.device("cpu")
SHARE = 0.9  # of the free memory that items may fill
STREAMS = {"cuda": 2, "xpu": 2}  # kind of GPU -> items that it works on at once at most


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


def default_workers(device: torch.device = CPU) -> int:
    """One thread for every core that this process may use; as many as have streams on a GPU."""
    if device.type != "cpu":
        return STREAMS.get(device.type, 1)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _dearest_first(costs: Sequence[float]) -> list[int]:
    return sorted(range(len(costs)), key=lambda index: -costs[index])


def parallel_map(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    costs: Sequence[float],
    *,
    workers: int,
    progress: Progress,
    label: str,
    memory: Sequence[int] | None = None,
    device: torch.device = CPU,
) -> list[Result]:
    """function(item) of every item, in order, by `workers` threads of one BLAS thread each.

    With one BLAS thread a result has the same bits however many workers there are. The first error stops the rest.
    costs: relative time of every item, for an honest estimate of the time left; the dearest begin. memory: bytes that
    every item needs on the device; no more items run at once than its free memory holds, but always one. On a GPU every
    item has a stream of its own.
    """
    room = _Room(None if memory is None else free_memory(device))
    needs = [0] * len(items) if memory is None else memory

    def run(index: int) -> Result:
        with room.held(needs[index]), _own_stream(device):
            return function(items[index])

    if device.type in STREAMS:  # torch loads its libraries for that, which several threads cannot (pytorch issue 90613)
        torch.linalg.inv(torch.ones(1, 1, device=device))
    # OpenMP and MKL count threads per calling thread: every worker has to say it for itself.
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    with _one_thread_each(), pool:
        index_of = {pool.submit(run, index): index for index in _dearest_first(costs)}
        done: Iterator[object] = as_completed(index_of)
        try:
            for future in progress(((f, costs[index_of[f]]) for f in done), label, sum(costs)):  # type: ignore[index]
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in sorted(index_of, key=index_of.__getitem__)]


class _Room:
    """Memory that several threads share, in bytes; None: there is no limit."""

    def __init__(self, size: int | None) -> None:
        self.size = math.inf if size is None else SHARE * size
        self.used = 0
        self.changed = threading.Condition()

    @contextmanager
    def held(self, need: int) -> Iterator[None]:
        """Wait until there is room for `need`, or nobody else has any; the room is given back at the end."""
        with self.changed:
            self.changed.wait_for(lambda: not self.used or self.used + need <= self.size)
            self.used += need
        try:
            yield
        finally:
            with self.changed:
                self.used -= need
                self.changed.notify_all()


@contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """Work for a GPU runs beside that of other threads, after all that it was given before; done at the end."""
    if device.type not in STREAMS:
        yield
        return
    module = getattr(torch, device.type)
    stream = module.Stream(device)
    stream.wait_stream(module.current_stream(device))
    with module.stream(stream):
        yield
    stream.synchronize()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)
