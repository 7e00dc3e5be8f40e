"""Divergence from the dense model, in memory or saved, against whole logits in float64."""

import copy
import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import welore
from conftest import FAMILIES, Command, build, done
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
def reference(model: PreTrainedModel, dense: PreTrainedModel, k: int | None = None) -> dict[str, float]:
    """From the whole logits of every window, in float64; with k all but the k likeliest tokens are one."""
    values, same = [], []
    for window in WINDOWS:
        p, q = (m.double()(torch.tensor([window])).logits[0, :-1].log_softmax(-1) for m in (dense, model))
        for one, other in zip(p.exp().numpy(), q.exp().numpy(), strict=True):
            order = np.argsort(-one)
            listed, rest = order[:k], [] if k is None else order[k:]
            terms = [(one[i], other[i]) for i in listed] + ([(one[rest].sum(), other[rest].sum())] if len(rest) else [])
            values.append(sum(a * np.log(a / b) for a, b in terms))
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
        assert numbers[name] == pytest.approx(value, rel=0, abs=1e-6), name


@pytest.mark.parametrize("k", [1, 5, 96, 1000])
def test_divergence_from_a_file_is_that_of_the_likeliest_tokens_and_one_class_for_the_others(
    k: int, text: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROWS", 7)
    config, file = EvaluationConfig(text, **CONFIG), tmp_path / "dense.safetensors"
    dense = welore.evaluate(build("llama"), config, tokenizer=tokenizer, save_logprobs=file, top_logprobs=k)
    alone = welore.evaluate(build("llama"), config, tokenizer=tokenizer)
    assert dense.numbers["nll"] == pytest.approx(alone.numbers["nll"], rel=1e-6)
    record = welore.evaluate(changed(), config, against=file, tokenizer=tokenizer)
    for name, value in reference(changed(), build("llama"), k).items():
        assert record.numbers[name] == pytest.approx(value, rel=0, abs=1e-6), name
    assert record.numbers["kl_mean"] <= reference(changed(), build("llama"))["kl_mean"] + 1e-6
    assert record.inputs["against"] == dense.inputs["model"]
    assert record.inputs["against_top_logprobs"] == min(k, 96)
    assert (record.numbers["kl_rest"] == 0) == (k >= 96)


def test_one_pass_of_the_dense_model_serves_the_command(
    command: Command, saved: Callable[..., Path], text: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    dense, file = saved("llama"), tmp_path / "dense.safetensors"
    tokenizer.save_pretrained(dense)
    how = ("--dataset", text, "--max-length", LENGTH)
    done(command("evaluate", dense, *how, "--save-logprobs", file, "--top-logprobs", 3))
    answer = command("evaluate", dense, *how, "--against", file)
    assert "KL 0, top-1 100.0%" in answer.out


@pytest.fixture
def predictions(text: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """The log-probabilities of build("llama")."""
    file = tmp_path / "dense.safetensors"
    config = EvaluationConfig(text, **CONFIG)
    welore.evaluate(build("llama"), config, tokenizer=tokenizer, save_logprobs=file, top_logprobs=3)
    return file


def test_a_file_of_another_text_or_other_windows_is_refused(
    text: str, tokenizer: PreTrainedTokenizerFast, predictions: Path
) -> None:
    def refusal(config: EvaluationConfig, **changes: Any) -> str:
        with pytest.raises(WeLoreError) as refused:
            welore.evaluate(build("llama", **changes), config, against=predictions, tokenizer=tokenizer)
        return str(refused.value)

    usual = EvaluationConfig(text, **CONFIG)
    assert "was made with another text: give the --dataset" in refusal(EvaluationConfig(["w1 w2 w3"], **CONFIG))
    assert "was made with other windows" in refusal(dataclasses.replace(usual, max_length=20))
    assert "was made with other windows" in refusal(dataclasses.replace(usual, num_windows=1))
    assert "the two models have 100 and 96 tokens" in refusal(usual, vocab_size=100)
    tokenizer = copy.deepcopy(tokenizer)  # the fixture serves other files as well
    tokenizer.add_tokens(["w1000"])
    assert "was made with another tokenizer: compare with the dense model" in refusal(usual)


@pytest.mark.parametrize("damage", ["id", "sum", "nan", "shape"])
def test_a_damaged_file_is_refused(
    damage: str, text: str, tokenizer: PreTrainedTokenizerFast, predictions: Path
) -> None:
    with safe_open(predictions, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    match damage:
        case "id":
            tensors["1.ids"][2, 1] = 96
        case "sum":
            tensors["1.rest"][2] += 0.1
        case "nan":
            tensors["1.logprobs"][2, 1] = torch.nan
        case "shape":
            tensors["1.first"] = tensors["1.first"][:-1].clone()
    save_file(tensors, predictions, metadata)
    with pytest.raises(WeLoreError, match="is damaged: make it again with --save-logprobs"):
        welore.evaluate(build("llama"), EvaluationConfig(text, **CONFIG), against=predictions, tokenizer=tokenizer)


def test_what_is_no_file_of_log_probabilities_is_refused(tmp_path: Path, text: str) -> None:
    save_file({"windows": torch.zeros(2, 3)}, tmp_path / "windows.safetensors")
    with pytest.raises(WeLoreError, match="holds no log-probabilities that can be read"):
        welore.evaluate(build("llama"), against=tmp_path / "windows.safetensors")
    with pytest.raises(WeLoreError, match="does not exist: make it with `welore evaluate DENSE --save-logprobs"):
        welore.evaluate(build("llama"), against=tmp_path / "nothing.safetensors")
    with pytest.raises(WeLoreError, match=r"call it NAME\.safetensors"):
        welore.evaluate(build("llama"), EvaluationConfig(text), save_logprobs=tmp_path / "a.npz")


def test_nan_leaves_no_file_and_the_one_of_before(
    text: str, tokenizer: PreTrainedTokenizerFast, predictions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, config, pieces = predictions.read_bytes(), EvaluationConfig(text, **CONFIG), module.logit_pieces

    def late(model: PreTrainedModel, batch: torch.Tensor) -> Any:
        """The last window is NaN."""
        return ((x if batch.shape[1] > 10 else x * torch.nan, following) for x, following in pieces(model, batch))

    monkeypatch.setattr(module, "logit_pieces", late)
    for name in (predictions, predictions.with_name("other.safetensors")):
        with pytest.raises(WeLoreError, match="computes NaN or Inf"):
            welore.evaluate(build("llama"), config, tokenizer=tokenizer, save_logprobs=name)
    assert predictions.read_bytes() == before
    assert [path.name for path in predictions.parent.glob("*.safetensors")] == [predictions.name]


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
    assert beside["nll"] == pytest.approx(alone["nll"], rel=1e-6)
    assert beside["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-6)
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
