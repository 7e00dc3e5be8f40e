"""estimate: what `compress` will need, from shapes alone: sizes, and time, memory and disk of every stage.

Floating-point operations are counted, and their rate is measured. Times are right within a factor of two or so; memory
and disk are upper bounds.
"""

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

import torch

from welore.calibration.statistics import Statistics
from welore.compression.pipeline import Job, make_job
from welore.config import MAX_LENGTH, NONE, SELF, CalibrationConfig, CompressionConfig, RecoveryConfig, RunOptions
from welore.io.context import RunContext
from welore.models.load import fastest
from welore.models.mlp import find_mlps
from welore.models.skeleton import decoder_blocks
from welore.models.source import open_source
from welore.models.targets import Target, in_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIDE = 1024  # of the matrices whose product is timed
DISK_RATE = 5e8  # bytes per second
WRITING_BATCH, WRITING_SHARE = 32, 0.45  # windows written at once; their share of the rate of large products
LAUNCHES = 0.9e-3  # seconds of one decoder block and token on a GPU, where launches of kernels are the limit
# Operations of a decomposition of a k x l matrix, over k^3 and k l^2, float64; measured on one core.
SCALED, PLAIN = (50.0, 5.2), (7.0, 2.0)
PRUNING = 94.0, 7.0  # the same of an MLP (d, f), over d^2 f and f^3
TRAINED = 0.9  # share of the stored parameters that lies in factors, and is trained
EIGENPROBLEM = 0.9, 4096, 2.6  # seconds of one of this size on a GPU, and how they grow with it


@dataclass(frozen=True)
class Stage:
    """One stage: seconds, and bytes of memory (of the device that works) and of unfinished work on disk."""

    name: str
    seconds: float
    memory_bytes: float
    disk_bytes: float


@dataclass(frozen=True)
class Estimate:
    """The needs of a compression. parameters, bytes: of the result, None if the target does not tell them.

    rates: dtype -> measured operations per second of `device`, with all its cores.
    """

    model: str
    device: str
    target: dict[str, float]
    dense_parameters: int
    dense_bytes: int
    parameters: int | None
    bytes: int | None
    rates: dict[str, float]
    stages: tuple[Stage, ...]

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        target = ", ".join(f"{name} {value:g}" for name, value in self.target.items())
        after = ""
        if self.parameters is not None and self.bytes is not None:
            after = f" -> {self.parameters / 1e6:,.1f} M parameters, {self.bytes / 1e6:,.1f} MB"
        rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s {dtype}" for dtype, rate in self.rates.items())
        lines = [
            f"{self.model}: {target}",
            f"  {self.dense_parameters / 1e6:,.1f} M parameters, {self.dense_bytes / 1e6:,.1f} MB{after}",
            f"  measured on {self.device}: {rates}",
            f"  {'stage':16}{'time':>10}{'memory':>12}{'disk':>12}",
        ]
        for s in self.stages:
            lines.append(f"  {s.name:16}{_time(s.seconds):>10}{_size(s.memory_bytes):>12}{_size(s.disk_bytes):>12}")
        lines.append(f"  {'all':16}{_time(sum(s.seconds for s in self.stages)):>10}")
        return "\n".join(lines)


def estimate(
    model: "str | Path | PreTrainedModel",
    config: CompressionConfig | None = None,
    *,
    keep: float | None = None,
    calibration: CalibrationConfig | None = None,
    recovery: RecoveryConfig | Literal["auto"] | None = "auto",
    statistics: "Statistics | str | Path | None" = None,
    **options: Unpack[RunOptions],
) -> Estimate:
    """Predict sizes, time, memory and disk of `compress` with the same arguments; reads no weights but their headers.

    Args:
        model: Hub id, directory, .gguf file or a model in memory.
        config: Target and method.
        keep: The target, in place of one in the config.
        calibration: How statistics would be collected.
        recovery: How the factors would be trained.
        statistics: Statistics of this model, or their file.
        **options: Where it would compute (config.RunOptions).

    Returns:
        The estimate; `str` of it is a table.

    Raises:
        WeLoreError: If the settings cannot work, as `compress` does.
    """
    context = RunContext.create(**options)
    config = config or CompressionConfig()
    config = config if keep is None else dataclasses.replace(config, keep=keep)
    source = open_source(model, context, include=config.include, exclude=config.exclude)
    job = make_job(source, config, calibration, recovery, None, statistics, context)
    costs = _Costs(job)
    dense_bytes = sum(source.info(name).bytes for name in source.names())
    removed = None if config.keep is None else round((1 - config.keep) * costs.targeted)
    name, target = config.target
    return Estimate(
        model=source.name,
        device=str(context.device),
        target={name: target},
        dense_parameters=costs.parameters,
        dense_bytes=dense_bytes,
        parameters=None if removed is None else costs.parameters - removed,
        bytes=None if removed is None else dense_bytes - removed * source.dtype(source.targets[0]).itemsize,
        rates=costs.rates,
        stages=tuple(costs.stages()),
    )


class _Costs:
    """The formulas, with everything that they rest on."""

    def __init__(self, job: Job) -> None:
        self.job, self.context, self.rates = job, job.context, _rates(job.context.device)
        self.source = source = job.source
        self.parameters = sum(p.numel() for p in source.skeleton.parameters())
        self.targeted = sum(math.prod(target.shape) for target in source.targets)
        self.layers = len(decoder_blocks(source.skeleton)[1])
        self.hidden = source.skeleton.config.get_text_config(decoder=True).hidden_size
        self.blocks = in_blocks(source.targets, job.grids)
        self.on_cpu = job.context.device.type == "cpu"
        self.stored = (1.0 if job.config.keep is None else job.config.keep) * self.targeted
        self.tokens, self.length = job.calibration.num_tokens, job.calibration.max_length or MAX_LENGTH
        groups: dict[str, list[Target]] = {}
        for target in source.targets:
            groups.setdefault(target.name.rpartition(".")[0], []).append(target)
        moments = sum(target.shape[0] ** 2 for target in source.targets)
        for group in groups.values():  # the last of a module reads an input of its own, the others share one
            moments += sum(n**2 for n in {t.shape[1] for t in group[:-1]}) + group[-1].shape[1] ** 2
        self.statistics_bytes = 4 * moments

    def stages(self) -> list[Stage]:
        """All stages that the settings ask for."""
        job, itemsize = self.job, self.source.dtype(self.source.targets[0]).itemsize
        stages = []
        if job.collects:
            stages += [self._text()] * (job.calibration.dataset == SELF) + [self._statistics()]
        stages.append(self._decompositions())
        if job.config.mlp_pruning:
            stages.append(self._pruning())
        if job.recovery is not None:
            stages.append(self._recovery(job.recovery))
        size = itemsize * (self.stored + self.parameters - self.targeted)
        largest = max(math.prod(target.shape) for target in self.blocks)
        return [*stages, Stage("writing", size / DISK_RATE, 3 * 4 * largest, size)]

    def _text(self) -> Stage:
        steps = math.ceil(self.tokens / self.length / WRITING_BATCH) * self.length
        seconds = 2 * self.parameters * self.tokens / (WRITING_SHARE * self.rates["float32"])
        seconds = seconds if self.on_cpu else max(seconds, steps * self.layers * LAUNCHES)
        return Stage("text", seconds, (4 if self.on_cpu else 2) * self.parameters, 4 * self.tokens)

    def _statistics(self) -> Stage:
        hidden = 4 * self.tokens * self.hidden
        operations = 6 * self.targeted * self.tokens + 0.65 * 2 * self.tokens * self.statistics_bytes / 4
        seconds = operations / self.rates["float32"] + 4 * self.statistics_bytes / DISK_RATE
        outside = 4 * (self.parameters - self.targeted)
        memory = (2 * self.statistics_bytes + 4 * self.targeted) / self.layers + outside + 3 * hidden
        return Stage("statistics", seconds, memory, (self.layers + 1) * hidden + 2 * self.statistics_bytes)

    def _decompositions(self) -> Stage:
        scaled = self.job.scaling != NONE
        a, b = SCALED if scaled else PLAIN
        sides = [(min(t.shape), max(t.shape)) for t in self.blocks]
        if self.on_cpu:
            seconds = sum(a * k**3 + b * k * long**2 for k, long in sides) / self.rates["float64"]
        else:
            unit, size, power = EIGENPROBLEM
            seconds = sum((4 if scaled else 2) * unit * (k / size) ** power for k, _ in sides)
        one = max((24 * (k * k + n * n) if scaled else 12 * k * k) + 24 * k * n for k, n in sides)
        disk = sum(4 * k * k for k, _ in sides) * self.on_cpu + 4 * self.stored
        return Stage("decompositions", seconds, self.context.workers * one, disk)

    def _pruning(self) -> Stage:
        a, b = PRUNING
        shapes = [mlp.down_layer.shape for mlp in find_mlps(self.source.skeleton, self.source.targets)]
        seconds = sum(a * d * d * f + b * f**3 for d, f in shapes) / self.rates["float64"]
        memory = self.context.workers * 29 * max((f * f for _, f in shapes), default=0)
        return Stage("mlp pruning", seconds, memory, sum(4 * d * f for d, f in shapes))

    def _recovery(self, training: RecoveryConfig) -> Stage:
        factors = TRAINED * self.stored
        windows = (self.tokens if training.dataset == SELF else training.num_tokens or 0) // self.length
        steps = max(1, (windows - max(1, windows // 10)) // training.batch_size)
        steps = min(training.max_steps, steps) if training.dataset == SELF else steps
        tokens = training.batch_size * self.length
        operations = steps * tokens * (6 * self.stored + 2 * self.parameters)
        rate = self.rates[str(fastest(self.context.device)["dtype"])]
        frozen = 2 * (self.stored - factors + self.parameters - self.targeted) + 2 * self.targeted
        activations = tokens * self.layers * 60 * self.hidden
        return Stage("recovery", operations / rate, 18 * factors + frozen + activations, 3 * 12 * factors)


def _rates(device: torch.device) -> dict[str, float]:
    """dtype -> operations per second of a product of matrices on a device."""
    rates: dict[str, float] = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        try:
            x = torch.ones(SIDE, SIDE, dtype=dtype, device=device)
        except TypeError:  # MPS has no float64
            rates[name] = 0.0
            continue
        seconds = []
        for _ in range(4):
            started = time.perf_counter()
            float((x @ x)[0, 0])  # the number is fetched, so the product is done
            seconds.append(time.perf_counter() - started)
        rates[name] = 2 * SIDE**3 / min(seconds)
    return {name: rate or max(rates.values()) for name, rate in rates.items()}


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"
