"""What a job took, by stage."""

import time
from pathlib import Path

import pytest
import torch

import welore
from toys import checkpoint
from welore.config import CalibrationConfig
from welore.io.context import RunContext
from welore.io.meter import Meter

CPU = torch.device("cpu")


def busy(seconds: float) -> None:
    """Occupy the processor."""
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def test_time_of_a_stage_within_another_counts_for_the_inner_one() -> None:
    meter = Meter()
    with meter.stage("outer", CPU):
        busy(0.02)
        with meter.stage("inner", CPU):
            busy(0.1)
        busy(0.02)
    outer, inner = (meter.stages[name] for name in ("outer", "inner"))
    assert inner["processor_seconds"] > 0.1
    assert outer["processor_seconds"] > 0.04
    assert inner["seconds"] > 0.1
    busy(0.02)
    assert meter.stages["outer"] == outer  # no stage is open


def test_a_stage_that_comes_again_is_added_to() -> None:
    meter = Meter()
    for _ in range(2):
        with meter.stage("twice", CPU):
            busy(0.02)
    assert meter.stages["twice"]["processor_seconds"] > 0.04


def test_memory_that_a_stage_gave_back_is_in_its_peak() -> None:
    meter = Meter()
    with meter.stage("before", CPU):
        pass
    with meter.stage("large", CPU):
        numbers = torch.ones(32 << 20)
        before = meter.stages["before"]["peak_memory_bytes"]
        while meter.stages.get("large", {}).get("peak_memory_bytes", 0) < before + numbers.nbytes / 2:
            time.sleep(0.01)  # until the next sample
        del numbers
    assert "peak_device_memory_bytes" not in meter.stages["large"]


def test_contexts_of_one_job_share_its_stages() -> None:
    context = RunContext.create(device="cpu")
    with context.within(None).stage("text"):
        pass
    assert context.meter.stages["text"]["seconds"] >= 0
    assert RunContext.create(device="cpu").meter.stages == {}


def test_an_error_closes_its_stage() -> None:
    meter = Meter()
    try:
        with meter.stage("fails", CPU):
            raise KeyError
    except KeyError:
        pass
    with meter.stage("next", CPU):
        busy(0.02)
    assert meter.stages["next"]["processor_seconds"] >= 0.02


@pytest.mark.slow
def test_the_record_of_a_compression_tells_what_every_stage_took(tmp_path: Path) -> None:
    text = CalibrationConfig(num_tokens=128, max_length=32)
    model = checkpoint(tmp_path / "dense", None, intermediate_size=96)
    record = welore.compress(model, tmp_path / "small", keep=0.6, calibration=text, device="cpu").record
    stages = record.numbers["stages"]
    expected = {"text", "statistics", "decompositions", "mlp pruning", "factors", "recovery", "writing"}
    assert expected == stages.keys()
    assert all(stage["peak_memory_bytes"] > 0 for stage in stages.values())
    assert sum(stage["seconds"] for stage in stages.values()) <= record.numbers["seconds"]
    predicted = welore.estimate(model, keep=0.6, calibration=text, device="cpu")
    assert {stage.name for stage in predicted.stages} == expected
