"""A smoke of the campaigns, and what they count as a failure."""

import random
import subprocess
import sys
from pathlib import Path

import mutations
import pytest
import zygote

CAMPAIGNS = Path(__file__).parent / "campaigns"
CAUGHT = "Traceback (most recent call last):\n  File x\nMemoryError: too much"


@pytest.mark.slow
def test_first_round_of_every_campaign_has_no_failure() -> None:
    command = [sys.executable, CAMPAIGNS / "smoke.py", "--budget", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failures" in done.stdout


@pytest.mark.parametrize(
    ("status", "err", "notes", "kind"),
    [
        (0, "", [], "accepted"),
        (2, "welore: x is y\n", [], "refused"),
        (2, "a warning\nwelore: x is y\n", [], "NOISY"),
        (2, "", [], "NOISY"),
        (1, "welore: this is a bug in welore\n", [], "TRACEBACK"),
        (1, CAUGHT, [], "OOM"),
        (-11, "", [], "STATUS -11"),
        ("HANG", "", [], "HANG"),
        (0, "", ["open /etc/passwd"], "OUTSIDE"),
        (0, "", ["socket.connect ..."], "NETWORK"),
    ],
)
def test_judge_knows_every_class(status: int | str, err: str, notes: list[str], kind: str) -> None:
    assert zygote.judge(zygote.Answer(status, "", err, notes, 0, 0.0)) == kind


@pytest.mark.parametrize("name", ["config.json", "spectra.safetensors"])
def test_seed_repeats_a_mutation(name: str, tmp_path: Path) -> None:
    path, results = tmp_path / name, []
    for _ in range(2):
        if path.suffix == ".json":
            path.write_text('{"hidden_size": 32, "rope": {"theta": 1e4}}')
            how = mutations.damage_json(path, random.Random("config 7"))
        else:
            entry = {"dtype": "F64", "shape": [2], "data_offsets": [0, 16]}
            mutations.join(path, {"w": entry, "__metadata__": {"format": "1"}}, bytes(16))
            how = str(mutations.damage_tensors(path, random.Random("spectra 7")))
        results.append((how, path.read_bytes()))
    assert results[0] == results[1]


def test_digest_leaves_out_times_and_nothing_else(tmp_path: Path) -> None:
    for name, seconds, loss in (("a", 1.5, 2.0), ("b", 3.0, 2.0), ("c", 1.5, 9.0)):
        path = tmp_path / name / "record.json"
        path.parent.mkdir()
        path.write_text(f'{{"seconds_forward": {seconds}, "loss": {loss}}}')
    assert zygote.digest(tmp_path / "a") == zygote.digest(tmp_path / "b") != zygote.digest(tmp_path / "c")
