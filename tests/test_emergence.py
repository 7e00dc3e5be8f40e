import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import Command, done, everything
from processes import launched
from toys import weights
from welore.config import FinetuneConfig, PretrainConfig
from welore.data.packing import blocks_of_text
from welore.emergence.claims import CLAIMS
from welore.emergence.pretrain import pretrain
from welore.emergence.probe import probed_steps
from welore.emergence.trace import Trace
from welore.errors import DivergedError, WeLoreError
from welore.records import Record
from welore.training.data import collate
from welore.training.finetune import finetune

TOY: dict[str, Any] = {
    "size": "32/3/4/56",
    "vocab_size": 300,
    "max_steps": 30,
    "learning_rate": 1e-2,
    "batch_size": 8,
    "max_length": 32,
    "probes": 6,
    "probe_items": 6,
    "max_eval_samples": 16,
    "save_steps": 8,
}
OPTIONS: dict[str, Any] = {"device": "cpu", "progress": False}


def pretrained(output_dir: Path, text: str, changes: dict[str, Any] | None = None, **options: Any) -> Record:
    config = PretrainConfig(**TOY | (changes or {}))
    return pretrain(output_dir, config, dataset=text, **OPTIONS | options)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("\n".join(f"The number after {n} is {n + 1}, and {n * 7 % 13} is another." for n in range(1500)))
    return str(path)


@pytest.fixture(scope="module")
def run(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that nothing has disturbed."""
    out = tmp_path_factory.mktemp("runs") / "run"
    pretrained(out, text)
    return out


def test_trace_has_every_matrix_at_every_step_in_its_range(run: Path) -> None:
    trace = Trace.load(run / "trace")
    assert list(trace.steps) == probed_steps(30, 6) == [0, 1, 5, 11, 19, 30]
    assert list(trace.tokens) == [step * 8 * 32 for step in trace.steps]
    assert len(trace.matrices) == 3 * 7
    for matrix in trace.matrices.values():
        assert matrix.gradient.shape == matrix.weight.shape == matrix.change.shape == (6, 32)
        assert np.allclose(np.diag(matrix.same["cosine"]), 1, atol=1e-4)
        for table in (matrix.same, matrix.other):
            assert np.abs(table["cosine"]).max() <= 1 + 1e-6
            for field in ("overlap4", "overlap16"):
                assert table[field].min() >= 0
                assert table[field].max() <= 1 + 1e-6
        assert np.allclose(np.diag(matrix.same["overlap16"]), 1, atol=1e-4)
        assert (matrix.stable_rank >= 1 - 1e-6).all()
        assert not matrix.change[0].any()  # nothing has changed before the first step
        assert matrix.change[-1].any()


def test_loss_falls_and_the_record_says_what_was_done(run: Path) -> None:
    record = Record.load(run / "pretrain.json")
    losses = [loss for _, loss in record.numbers["held_out_loss"]]
    assert losses[-1] < losses[0] - 1
    assert record.numbers["claims"].keys() == CLAIMS.keys()
    assert record.settings["size"] == {"hidden": 32, "layers": 3, "heads": 4, "intermediate": 56}
    assert record.settings["learning_rate"] == 1e-2
    assert record.numbers["probe_seconds"] > 0
    assert record.numbers["tokens"] == 30 * 8 * 32
    assert not (run / "trace" / "work").exists()


def test_gradients_are_those_of_the_mean_loss_on_the_held_out_batches(run: Path, text: str) -> None:
    """At step 0, by an ordinary backward pass through the model that the run began with."""
    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run / "start")
    tokenizer = AutoTokenizer.from_pretrained(run / "start")
    held_out = blocks_of_text(text, tokenizer, 32, tokens=10_000, eval_items=16).evaluation
    gradients = []
    name = "model.layers.1.mlp.down_proj"
    for first in (0, 6):
        model.zero_grad()
        model(**collate(held_out[first : first + 6])).loss.backward()
        gradients.append(model.get_submodule(name).weight.grad.clone())
    recorded = Trace.load(run / "trace").matrices[name]
    wanted = torch.linalg.svdvals(gradients[0].double()).numpy()
    assert np.allclose(recorded.gradient[0], wanted, rtol=1e-3, atol=1e-6 * wanted[0])
    assert recorded.gradient_energy[0] == pytest.approx(float(gradients[0].square().sum()), rel=1e-3)
    flat = [g.flatten() for g in gradients]
    ceiling = float(torch.cosine_similarity(flat[0], flat[1], dim=0))
    assert recorded.other["cosine"][0, 0] == pytest.approx(ceiling, abs=1e-2)
    spectrum = torch.linalg.svdvals(weights(run / "training" / "model")[f"{name}.weight"].double()).numpy()
    assert np.allclose(recorded.weight[-1], spectrum, rtol=1e-4, atol=1e-5)


def test_being_watched_changes_nothing(run: Path, text: str, tmp_path: Path) -> None:
    same = {name: TOY[name] for name in ("max_steps", "learning_rate", "batch_size", "max_length", "max_eval_samples")}
    finetune(run / "start", tmp_path / "alone", FinetuneConfig("full", text, save_steps=0, **same), **OPTIONS)
    watched, alone = weights(run / "training" / "model"), weights(tmp_path / "alone" / "model")
    assert all(torch.equal(watched[name], alone[name]) for name in watched)


class KilledError(Exception):
    """What a test stops a run with."""


def killer(at: int) -> Callable[..., Iterable[Any]]:
    """Progress that ends the process, as it were, after `at` steps."""

    def progress(items: Iterable[tuple[Any, float]], label: str, total: float) -> Iterator[Any]:
        for count, (item, _) in enumerate(items):
            if label == "finetune" and count > at:
                raise KilledError
            yield item

    return progress


@pytest.mark.parametrize("at", [3, 20])
@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_trace(run: Path, text: str, tmp_path: Path, at: int) -> None:
    """Before the first checkpoint, and between two, where the trace is ahead of the checkpoint."""
    out = tmp_path / "run"
    with pytest.raises(KilledError):
        pretrained(out, text, progress=killer(at))
    assert not (out / "pretrain.json").exists()
    pretrained(out, text, resume=True)
    assert {p.name: b for p, b in everything(out / "trace").items()} == {
        p.name: b for p, b in everything(run / "trace").items()
    }
    numbers = [Record.load(path / "pretrain.json").numbers for path in (run, out)]
    assert numbers[0]["claims"] == numbers[1]["claims"]
    with pytest.raises(WeLoreError, match="is finished .* there is nothing to resume"):
        pretrained(out, text, resume=True)


def test_a_run_that_lacks_only_its_record_is_completed(run: Path, text: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    (out / "pretrain.json").unlink()
    record = pretrained(out, text, resume=True)
    assert record.numbers["claims"] == Record.load(run / "pretrain.json").numbers["claims"]
    assert record.numbers["probe_seconds"] is None  # nobody has seen it


def test_another_run_is_not_gone_on_with(run: Path, text: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    (out / "pretrain.json").unlink()
    with pytest.raises(WeLoreError, match=r"holds another run: its seed is 0, now it is 1"):
        pretrained(out, text, {"seed": 1}, resume=True)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"size": "5m"}, "unknown size '5m'"),
        ({"probes": 3}, "probes is 3: give at least 4"),
        ({"probes": 40}, "probes is 40: .* no more than the 30 steps"),
        ({"probe_items": 9}, "the two batches of the probe, .* are part of the held-out sequences"),
        ({"vocab_size": 10}, "vocab_size is 10"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"resume": True}, "holds no run that could be resumed"),
        ({"max_eval_samples": 4000, "probe_items": 2000}, "are held out, the two batches of the probe need 4000"),
        ({"max_length": 20_000}, "gives . blocks of 20000 tokens"),
    ],
)
def test_what_cannot_work_is_one_sentence(text: str, tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(WeLoreError, match=sentence):
        resume = "resume" in changes
        pretrained(tmp_path / "run", text, {k: v for k, v in changes.items() if k != "resume"}, resume=resume)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("size", "steps"), [("32/2/4/56", 12), ("16/1/2/24", 4)])
def test_shortest_runs_have_a_record_of_finite_numbers(text: str, tmp_path: Path, size: str, steps: int) -> None:
    short = {"size": size, "max_steps": steps, "probes": 4, "probe_items": 2, "max_eval_samples": 8, "batch_size": 2}
    pretrained(tmp_path / "run", text, short)
    numbers = Record.load(tmp_path / "run" / "pretrain.json").numbers
    assert all(len(interval) == 3 and None not in interval for interval in numbers["claims"].values())
    assert all(None not in row.values() for row in numbers["matrices"])


def test_training_that_diverges_says_so_and_goes_on_to_the_same_sentence(text: str, tmp_path: Path) -> None:
    wild = {"size": "16/1/2/24", "learning_rate": 1e30, "warmup_steps": 0, "max_grad_norm": 0.0}
    with pytest.raises(DivergedError, match="smaller learning_rate"):
        pretrained(tmp_path / "run", text, wild)
    with pytest.raises(DivergedError, match="smaller learning_rate"):
        pretrained(tmp_path / "run", text, wild, resume=True)
    assert not (tmp_path / "run" / "pretrain.json").exists()


def test_fsdp_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(WeLoreError, match="whole gradients, which FSDP cuts"):
        pretrained(tmp_path / "run", text)


@pytest.mark.slow
def test_the_command_says_what_came_out(text: str, tmp_path: Path, command: Command, refused: Any) -> None:
    out = tmp_path / "run"
    flags = ["--size", "16/2/2/24", "--vocab-size", 300, "--max-steps", 6, "--batch-size", 4, "--max-length", 16]
    flags += ["--probes", 4, "--probe-items", 2, "--max-eval-samples", 4, "--device", "cpu", "--weight-decay", 0.1]
    line = done(command("pretrain", out, "--dataset", text, *flags))
    assert "384 tokens, held-out loss 5." in line
    assert "of 14 matrices are LRCs" in line
    assert "name the text to learn from" in refused("pretrain", tmp_path / "other")
    answer = command("pretrain", out, "--dataset", text, *flags, "--overwrite", "--json")
    assert json.loads(answer.out)["settings"]["weight_decay"] == 0.1


@pytest.mark.slow
def test_report_shows_claims_and_figures(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from welore.reporting.page import report

    page = report([run], tmp_path / "report").read_text()
    assert "how weights become low rank" in page
    assert all(claim.statement in page.replace("&#39;", "'") for claim in CLAIMS.values())
    assert (tmp_path / "report" / "study-settling.png").is_file()
    assert (tmp_path / "report" / "study-1-partition.png").is_file()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_two_processes_record_the_trace_of_one(run: Path, text: str, tmp_path: Path) -> None:
    """DDP, gloo: the same sequences in every step, so the same course but for rounding."""
    for ended in launched(lambda: pretrained(tmp_path / "run", text, {"batch_size": 4})):
        assert ended.status == 0, ended.err
    one, two = (Trace.load(path / "trace") for path in (run, tmp_path / "run"))
    assert np.array_equal(one.tokens, two.tokens)
    assert np.allclose(one.held_out_loss, two.held_out_loss, atol=1e-2)
    name = "model.layers.0.self_attn.q_proj"
    assert np.allclose(one.matrices[name].weight[-1], two.matrices[name].weight[-1], rtol=0.05, atol=0.02)
