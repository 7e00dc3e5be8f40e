"""estimate: what `compress` will need, from shapes alone: sizes, and time, memory and disk of every stage.

Floating-point operations are counted, and their rate is measured. Times are right within a factor of two or so; memory
and disk are upper bounds.
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

import torch

from welore.calibration.statistics import Statistics
from welore.compression.needs import Needs, Stage, size_text
from welore.compression.pipeline import make_job, with_texts
from welore.config import CalibrationConfig, CompressionConfig, RecoveryConfig, RunOptions, settings_of
from welore.io.context import RunContext
from welore.models.source import open_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIDE = 1024  # of the matrices whose product is timed


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
        other = [f"on {self.device}"] * (self.device != "cpu")
        lines = [
            f"{self.model}: {target}",
            f"  {self.dense_parameters / 1e6:,.1f} M parameters, {self.dense_bytes / 1e6:,.1f} MB{after}",
            f"  measured on {self.device}: {rates}",
            f"  {'stage':16}{'time':>10}" + "".join(f"{title:>12}" for title in ("memory", *other, "disk")),
        ]
        for s in self.stages:
            sizes = [s.host_bytes + s.mapped_bytes, *[s.device_bytes] * len(other), s.disk_bytes]
            columns = [f"{_time(s.seconds):>10}", *(f"{size_text(size):>12}" for size in sizes), f"  {s.note}"]
            lines.append(f"  {s.name:16}{''.join(columns)}".rstrip())
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
    """Predict sizes, time, memory and disk of `compress`, whose arguments these are; of weights only headers are read.

    Returns:
        The estimate; `str` of it is a table.

    Raises:
        WeLoreError: If the settings cannot work, or a text or the tokenizer cannot be read, as `compress` does.
    """
    context = RunContext.create(**options)
    config = settings_of(CompressionConfig, config, keep=keep)
    source = open_source(model, context, include=config.include, exclude=config.exclude)
    job = with_texts(make_job(source, config, calibration, recovery, None, statistics, context))
    needs, rates = Needs(job), measured_rates(context.device)
    removed, (name, target) = job.removed, job.target
    return Estimate(
        model=source.name,
        device=str(context.device),
        target={name: target},
        dense_parameters=needs.parameters,
        dense_bytes=needs.dense_bytes,
        parameters=None if removed is None else needs.parameters - removed,
        bytes=None if removed is None else round(needs.result_bytes(removed)),
        rates=rates,
        stages=tuple(needs.stages(rates)),
    )


def measured_rates(device: torch.device) -> dict[str, float]:
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
