"""Every verb finds the GPU by itself, computes there, and mixes no devices: on a simulated one, and on a real one.

The simulator changes torch for the whole process, which is one of its own.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from device_runs import RUNS, WRITTEN, prepare
from welore.io.context import resolve_device

TESTS = Path(__file__).parent

# Verbs that leave work to the CPU that a GPU could do, with the reason.
ON_CPU: dict[str, str] = {}
# Lines that stay on the CPU: the bases of all probes are in the host's memory; a pivoted QR is LAPACK's.
HOST_LINES = ("emergence/subspace.py", "linalg/interpolative.py")
FAILING: dict[str, str] = {}


# Verbs that compute sums, run on a device without float64 as well.
WITHOUT_FLOAT64 = ("calibrate", "compress", "finetune_lrc", "distill", "pretrain", "evaluate")


def outcomes(kind: str, directory: Path) -> dict[str, dict[str, Any]]:
    """Runs all verbs; name -> error and counts."""
    prepare(directory)
    names = WITHOUT_FLOAT64 if kind == "single" else [name for name in RUNS if (kind, name) != ("real", "second_gpu")]
    command = [sys.executable, str(TESTS / "device_runs.py"), kind, str(directory), *names]
    process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert process.returncode == 0, process.stderr
    lines = [line for line in process.stdout.splitlines() if line.startswith('{"name"')]
    return {run["name"]: run for run in map(json.loads, lines)}


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return outcomes("simulated", tmp_path_factory.mktemp("simulated"))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return outcomes("single", tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return outcomes("real", tmp_path_factory.mktemp("real"))


def each(marks: dict[str, str]) -> Any:
    """A case for every verb; those that are known to fail must fail."""
    xfail = functools.partial(pytest.mark.xfail, strict=True)
    return pytest.mark.parametrize(
        "name", [pytest.param(n, marks=xfail(reason=marks[n]) if n in marks else ()) for n in RUNS]
    )


@pytest.mark.parametrize(("kind", "device"), [("cuda", "cuda:1"), ("xpu", "xpu:1"), ("mps", "mps")])
def test_auto_is_the_accelerator_of_torch(monkeypatch: pytest.MonkeyPatch, kind: str, device: str) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(resolve_device("auto")) == device
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert str(resolve_device("auto")) == "cpu"


@pytest.mark.slow
@each(FAILING)
def test_verb_runs_on_a_simulated_gpu(simulated: dict[str, dict[str, Any]], name: str) -> None:
    assert not simulated[name]["error"], simulated[name]["error"]


@pytest.mark.slow
@each(ON_CPU)
def test_verb_leaves_no_work_to_the_cpu(simulated: dict[str, dict[str, Any]], name: str) -> None:
    assert simulated[name]["launches"], "nothing was computed on the GPU"
    assert not [line for line in simulated[name]["cpu_work"] if not line.startswith(HOST_LINES)]


# The rooms whose lines wait for the GPU in a default job, and how often at most: for every position of the windows that
# are written at once, or for every matrix.
POSITIONS, MATRICES = WRITTEN["max_length"], 14
WAITS = {"data/": POSITIONS, "calibration/": 5 * MATRICES, "linalg/": 15 * MATRICES, "compression/": MATRICES}


@pytest.mark.slow
def test_the_host_waits_once_a_token_and_a_few_times_a_matrix(simulated: dict[str, dict[str, Any]]) -> None:
    for room, most in WAITS.items():
        waits = {line: n for line, n in simulated["compress"]["waits"].items() if line.startswith(room)}
        assert 0 < sum(waits.values()) <= most, waits


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT_FLOAT64)
def test_verb_runs_on_a_device_without_float64(single: dict[str, dict[str, Any]], name: str) -> None:
    assert not single[name]["error"], single[name]["error"]
    assert single[name]["launches"]


@pytest.mark.slow
def test_a_gpu_that_is_named_computes_alone(simulated: dict[str, dict[str, Any]]) -> None:
    assert simulated["second_gpu"]["devices"]["cuda:1"] > 0
    assert "cuda:0" not in simulated["second_gpu"]["devices"]


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in RUNS if name != "second_gpu"])
def test_verb_runs_on_a_gpu(real: dict[str, dict[str, Any]], name: str) -> None:
    assert not real[name]["error"], real[name]["error"]
