"""Divergence from the dense model, against whole logits in float64."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import welore
from conftest import FAMILIES, build
from welore.config import EvaluationConfig
from welore.errors import WeLoreError
from welore.evaluation import divergence as module

IDS = random.Random(0).choices(range(96), k=60)
LENGTH = 25
WINDOWS = [IDS[0:25], IDS[25:50], IDS[50:60]]  # the last one is shorter
CONFIG: dict[str, Any] = {"max_length": LENGTH, "batch_size": 2}


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in IDS))
    return str(tmp_path / "text.txt")


def test_a_dense_model_with_another_tokenizer_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Its distributions would be of other tokens under the same numbers."""
    build("llama").save_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "a")
    build("llama").save_pretrained(tmp_path / "b")
    content = tokenizer.backend_tokenizer.to_str().replace('"w7"', '"x"').replace('"w8"', '"w7"').replace('"x"', '"w8"')
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(content), unk_token="w0")
    other.save_pretrained(tmp_path / "b")
    config = EvaluationConfig(["w7 w8 w9 w7 w8"], **CONFIG)
    welore.evaluate(tmp_path / "a", config, against=tmp_path / "a")
    with pytest.raises(WeLoreError, match="the tokenizers of the two models divide the text differently"):
        welore.evaluate(tmp_path / "a", config, against=tmp_path / "b")


def changed(family: str = "llama") -> PreTrainedModel:
    """A model that differs from build(family) in every matrix."""
    model = build(family)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def reference(model: PreTrainedModel, dense: PreTrainedModel) -> dict[str, float]:
    """From the whole logits of every window, in float64."""
    values, same = [], []
    for window in WINDOWS:
        p, q = (m.double()(torch.tensor([window])).logits[0, :-1].log_softmax(-1) for m in (dense, model))
        values += (p.exp() * (p - q)).sum(-1).tolist()
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
    return {
        "kl_mean": float(np.mean(values)),
        "kl_median": float(np.median(values)),
        "kl_p99": float(np.percentile(values, 99)),
        "top1_agreement": float(np.mean(same)),
    }


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_divergence_is_that_of_whole_logits(
    family: str, text: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROWS", 14)  # pieces of 7 tokens of two windows; of the last window alone 9 at once
    config = EvaluationConfig(text, **CONFIG)
    numbers = welore.evaluate(changed(family), config, against=build(family), tokenizer=tokenizer).numbers
    expected = reference(changed(family), build(family))
    assert expected["kl_mean"] > 1e-3
    for name, value in expected.items():
        assert numbers[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


def test_model_does_not_diverge_from_itself(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = build("llama")
    record = welore.evaluate(model, EvaluationConfig(text, **CONFIG), against=model, tokenizer=tokenizer)
    assert record.numbers["kl_p99"] == 0
    assert record.numbers["top1_agreement"] == 1


def test_perplexity_is_the_same_with_and_without_divergence(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    alone = welore.evaluate(build("llama"), EvaluationConfig(text, **CONFIG), tokenizer=tokenizer).numbers
    beside = welore.evaluate(
        build("llama"), EvaluationConfig(text, **CONFIG), against=changed(), tokenizer=tokenizer
    ).numbers
    assert alone["nll"] == beside["nll"]
    assert "kl_mean" not in alone


@pytest.mark.parametrize("batch_size", [1, 3])
def test_few_rows_of_logits_exist_at_once(
    text: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    monkeypatch.setattr(module, "ROWS", 8)
    model, rows = build("llama"), []
    batches = [torch.tensor(WINDOWS[:2]), torch.tensor(WINDOWS[2:])]
    model.lm_head.register_forward_hook(lambda head, inputs, output: rows.append(output.shape[:-1].numel()))
    module.divergence(model, changed(), batches)
    assert max(rows) <= 8
    assert sum(rows) == 2 * (LENGTH - 1) + 9  # no row of a token that predicts nothing


def test_dense_directory_is_named_in_the_record(
    saved: Callable[..., Path], text: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    dense = saved("llama")
    tokenizer.save_pretrained(dense)
    record = welore.evaluate(dense, EvaluationConfig(text, **CONFIG), against=str(dense))
    assert record.inputs["against"] == str(dense)
    assert record.numbers["kl_mean"] == 0


def test_both_models_stay_in_the_mode_that_they_had(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model, dense = build("llama").train(), build("llama").train()
    welore.evaluate(model, EvaluationConfig(text, **CONFIG), against=dense, tokenizer=tokenizer)
    assert model.training
    assert dense.training


def test_another_vocabulary_is_refused(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(WeLoreError, match="the two models have 96 and 100 tokens: compare with the dense model"):
        welore.evaluate(
            build("llama"),
            EvaluationConfig(text, **CONFIG),
            against=build("llama", vocab_size=100),
            tokenizer=tokenizer,
        )


def test_nan_of_the_dense_model_is_no_divergence(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    dense = build("llama")
    with torch.no_grad():
        dense.model.norm.weight[3] = torch.nan
    with pytest.raises(WeLoreError, match="one of the two models computes NaN or Inf"):
        welore.evaluate(build("llama"), EvaluationConfig(text, **CONFIG), against=dense, tokenizer=tokenizer)


def test_error_leaves_the_model_in_the_mode_that_it_had(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = build("llama").train()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(WeLoreError, match="computes NaN"):
        welore.evaluate(model, EvaluationConfig(text, **CONFIG), tokenizer=tokenizer)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    model.forward = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of memory"):
        welore.evaluate(model, EvaluationConfig(text, **CONFIG), tokenizer=tokenizer)
    assert model.training
