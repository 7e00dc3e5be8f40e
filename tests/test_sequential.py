"""One step after the other: a tuned model is merged, compressed again, given adapters, or trained further."""

from pathlib import Path
from typing import Any

import pytest
import torch

import welore
from conftest import compress
from toys import checkpoint, finetuned, weights
from welore.config import EvaluationConfig
from welore.errors import WeLoreError

SHORT: dict[str, Any] = {
    **{"max_steps": 4, "batch_size": 4, "max_length": 48, "learning_rate": 5e-3, "warmup_steps": 0},
    **{"eval_steps": 4, "max_eval_samples": 4, "save_steps": 0},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(" ".join(f"The number after {n} is {n + 1}." for n in range(400)))
    return path


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of LRC-only training."""
    out = tmp_path_factory.mktemp("runs")
    finetuned(checkpoint(out / "small"), out / "run", dataset=str(text), **SHORT)
    return out / "run"


def loss(model: Path, text: Path) -> float:
    nll: float = welore.evaluate(model, EvaluationConfig(str(text), 48, 4), device="cpu").numbers["nll"]
    return nll


def test_a_tuned_model_is_merged_and_compressed_again(run: Path, text: Path, tmp_path: Path) -> None:
    """The product of tuned factors has their rank: a small threshold finds them again, another target goes on."""
    welore.merge(run / "model", tmp_path / "dense")
    tuned, before = loss(run / "model", text), weights(run / "model")
    assert loss(tmp_path / "dense", text) == pytest.approx(tuned, rel=1e-4)
    compress(tmp_path / "dense", tmp_path / "again", threshold=1e-4, min_ratio=0.1, scaling="none")
    assert {n: t.shape for n, t in weights(tmp_path / "again").items()} == {n: t.shape for n, t in before.items()}
    assert loss(tmp_path / "again", text) == pytest.approx(tuned, rel=1e-4)
    smaller = compress(tmp_path / "dense", tmp_path / "smaller", rank_reduction=0.6, min_ratio=0.3)
    assert smaller.numbers["bytes"] < welore.Record.load(run / "model" / "compression.json").numbers["bytes"]
    further = finetuned(tmp_path / "smaller", tmp_path / "run", dataset=str(text), **SHORT).numbers["evaluation"]
    assert further[-1][1] < further[0][1]


@pytest.mark.parametrize("method", ["lora", "lrc", "full"])
def test_a_finished_run_goes_on_by_any_method_with_more_data(
    run: Path, text: Path, tmp_path: Path, method: str
) -> None:
    """The second run begins at the loss at which the first ended, also on another text."""
    before = weights(run / "model")
    more = tmp_path / "more.txt"
    more.write_text(" ".join(f"The number before {n + 1} is {n}." for n in range(400)))
    rank = {"rank": 2} if method == "lora" else {}
    on_same = finetuned(run / "model", tmp_path / "same", method, dataset=str(text), **SHORT, **rank).numbers
    ended = welore.Record.load(run / "finetune.json").numbers["evaluation"][-1]
    assert on_same["evaluation"][0][1:] == pytest.approx(ended[1:], rel=1e-5)
    on_more = finetuned(run / "model", tmp_path / "more", method, dataset=str(more), **SHORT, **rank).numbers
    assert on_more["eval_loss"] < on_more["evaluation"][0][1]
    after = weights(tmp_path / "more" / "model")
    factors = {name for name in before if name.endswith((".A.weight", ".B.weight"))}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert after.keys() == before.keys()
    assert changed == factors if method == "lrc" else changed > factors
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(run / "model").items())


def test_a_run_itself_is_no_model_and_says_where_its_model_is(run: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(WeLoreError, match=r"run is not a Hugging Face model: it has no .*; .*run/model is one"):
        finetuned(run, tmp_path / "on", dataset=str(text), **SHORT)
