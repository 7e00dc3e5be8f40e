"""The context that travels through every stage of a verb: device, workers, progress, processes, unfinished work."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from welore.config import RunConfig, RunOptions, require_options
from welore.errors import WeLoreError
from welore.io.meter import Meter
from welore.io.pages import give_back_freed
from welore.io.parallel import ALONE, STREAMS, Processes, default_workers, parallel_map
from welore.io.progress import Progress, progress_bars, silent
from welore.io.resume import Workspace

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def own_modes() -> Iterator[None]:
    """Gradients where they are wanted; WeLoreError in autocast, whose cast weights a training would read for ever."""
    if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))) or torch.get_default_dtype() != torch.float32:
        raise WeLoreError("call this outside of torch.autocast, and with torch.set_default_dtype(torch.float32)")
    with torch.inference_mode(False):
        yield


@dataclass(frozen=True)
class RunContext:
    """Where a verb computes, how many matrices at once, who is told, who else works, what an earlier run has left.

    workspace: where finished pieces are kept until all are done; None keeps nothing. processes: those that share the
    work; the command line joins them, a library never does.
    """

    device: torch.device
    workers: int
    progress: Progress = silent
    processes: Processes = ALONE
    workspace: Workspace | None = None
    cache_dir: Path | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False
    tokenizer: Any = None
    meter: Meter = field(default_factory=Meter, compare=False)

    @classmethod
    def create(
        cls,
        *,
        processes: Processes = ALONE,
        progress: bool | Progress | None = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> "RunContext":
        """The context of a verb, from its keyword options (config.RunOptions); WeLoreError for one that cannot be.

        progress: True or False, None for bars where a person is looking, or a function of the caller's own.
        """
        require_options(options)
        config = RunConfig(**options)
        device = resolve_device(config.device)
        given = {name: getattr(config, name) for name in ("revision", "trust_remote_code", "overwrite")}
        return cls(
            device=device,
            workers=config.workers or default_workers(device),
            progress=progress if callable(progress) else progress_bars(progress),
            processes=processes,
            cache_dir=None if config.cache_dir is None else Path(config.cache_dir),
            tokenizer=tokenizer,
            **given,
        )

    def within(self, workspace: Workspace | None) -> "RunContext":
        """The same context with another workspace."""
        return dataclasses.replace(self, workspace=workspace)

    @property
    def work(self) -> Workspace:
        """The workspace, which every stage of a long job has."""
        assert self.workspace is not None
        return self.workspace

    @property
    def float64_device(self) -> torch.device:
        """Where float64 is computed: on the device, or on the CPU if the device has none."""
        return self.device if finest_dtype(self.device) == torch.float64 else torch.device("cpu")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what the block takes as a stage of the job, see Meter; the memory that it frees goes back."""
        with self.meter.stage(name, self.device):
            yield
        give_back_freed()

    @property
    def stages(self) -> dict[str, dict[str, float]]:
        """The needs of the stages so far, as measured; see Meter."""
        return self.meter.measured(self.device)

    @property
    def at_once(self) -> int:
        """How many matrices are in work at once, at most: as many as there are workers, on a GPU streams."""
        return min(self.workers, STREAMS.get(self.device.type, self.workers))

    def map(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        costs: Sequence[float],
        label: str,
        memory: Sequence[int] | None = None,
    ) -> list[Result]:
        """function(item) of every item, in order, by `at_once` threads.

        costs: relative time of every item. memory: bytes that every item needs where it is computed, in float64; by it
        fewer run at once if memory is short.
        """
        return parallel_map(
            function,
            items,
            costs,
            workers=self.at_once,
            progress=self.progress,
            label=label,
            memory=memory,
            device=self.float64_device,
        )

    @property
    def options(self) -> dict[str, Any]:
        """The keyword options with which another verb runs as this one does (config.RunOptions)."""
        return {name: getattr(self, name) for name in RunOptions.__annotations__} | {"device": str(self.device)}


@functools.cache
def finest_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums on a device: float64, or float32 where there is none (MPS, some NPUs)."""
    try:
        torch.ones(1, dtype=torch.float64, device=device).sum()
    except (TypeError, RuntimeError):
        return torch.float32
    return torch.float64


def resolve_device(name: str) -> torch.device:
    """The device of a name; "auto" is torch's accelerator (of a launcher's process its own), or the CPU without one."""
    if name == "auto":
        kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if kind is None:
            return torch.device("cpu")
        return kind if kind.type == "mps" else torch.device(kind.type, int(os.environ.get("LOCAL_RANK", "0")))
    try:
        torch.empty(0, device=name).cpu()  # "meta" is a device, too, but nothing comes back from it
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise WeLoreError(f"device {name!r} is not there: use auto, cpu, or a GPU that torch knows") from error
    return torch.device(name)
