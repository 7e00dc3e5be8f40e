import dataclasses
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import welore
from conftest import build, compress
from toys import checkpoint
from welore.config import EvaluationConfig, ScoreConfig
from welore.errors import WeLoreError
from welore.evaluation.perplexity import negative_log_likelihood

IDS = random.Random(0).choices(range(96), k=24)
LENGTH = 7
WINDOWS = [IDS[0:7], IDS[7:14], IDS[14:21], IDS[21:24]]  # the last one is shorter


def decided(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A small model with strong opinions: where a mistake of one position changes the perplexity a lot."""
    model = build(family, **changes)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    return model.to(dtype)


@torch.no_grad()
def own_losses(model: PreTrainedModel) -> list[float]:
    """The mean loss of every window as transformers computes it."""
    return [float(model(ids, labels=ids).loss) for ids in (torch.tensor([window]) for window in WINDOWS)]


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in IDS))
    return str(tmp_path / "text.txt")


@pytest.fixture
def directory(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """Saves a model of strong opinions with its tokenizer."""

    def save(**settings: Any) -> Path:
        decided(**settings).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


@torch.no_grad()
def reference(model: PreTrainedModel) -> list[list[float]]:
    """-log p of every predicted token of every window in float64: the model reads only what stands before it."""
    model = model.double()
    return [
        [
            -float(torch.log_softmax(model(torch.tensor([window[:position]])).logits[0, -1], dim=-1)[window[position]])
            for position in range(1, len(window))
        ]
        for window in WINDOWS
    ]


# --- the number ---------------------------------------------------------------------------------------------------


def test_perplexity_is_that_of_a_loop_over_tokens(directory: Callable[..., Path], text: str) -> None:
    numbers = welore.evaluate(directory(), EvaluationConfig(text, max_length=LENGTH)).numbers
    losses = [loss for window in reference(decided()) for loss in window]
    assert (numbers["tokens"], numbers["windows"]) == (6 + 6 + 6 + 2, 4)
    assert numbers["nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert numbers["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_last_window_counts_by_its_own_tokens(directory: Callable[..., Path], text: str) -> None:
    measured = welore.evaluate(directory(), EvaluationConfig(text, max_length=LENGTH)).numbers["nll"]
    means = own_losses(decided())
    assert measured == pytest.approx(sum(m * n for m, n in zip(means, (6, 6, 6, 2), strict=True)) / 20, rel=1e-5)
    assert abs(measured - sum(means) / 4) > 0.01  # so that the weights matter


def test_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(
    text: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = build("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    measured = welore.evaluate(model, EvaluationConfig(text, max_length=LENGTH), tokenizer=tokenizer).numbers[
        "perplexity"
    ]
    assert measured == pytest.approx(96, rel=1e-6)


@pytest.mark.parametrize("batch_size", [2, 3, 50])
def test_perplexity_does_not_depend_on_the_batch_size(
    directory: Callable[..., Path], text: str, batch_size: int
) -> None:
    path = directory()
    alone = welore.evaluate(path, EvaluationConfig(text, max_length=LENGTH)).numbers
    together = welore.evaluate(path, EvaluationConfig(text, max_length=LENGTH, batch_size=batch_size)).numbers
    assert together["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-6)
    assert together["tokens"] == alone["tokens"]


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # Gemma 2 caps its logits, so that no piece of them is right
def test_logits_in_pieces_give_the_same_perplexity(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    model = build(family, vocab_size=96)
    batches = [{"input_ids": window[None], "labels": window[None]} for window in map(torch.tensor, WINDOWS)]
    at_once = negative_log_likelihood(model, batches, torch.device("cpu"))
    largest = []
    model.get_output_embeddings().register_forward_hook(lambda head, inputs, logits: largest.append(logits.numel()))
    monkeypatch.setattr("welore.evaluation.perplexity.LOGITS", 2 * 96)
    in_pieces = negative_log_likelihood(model, batches, torch.device("cpu"))
    assert in_pieces == pytest.approx(at_once, rel=1e-6)
    assert max(largest) == (96 if family == "llama" else LENGTH * 96)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["factored", "pivoted", "split"])
def test_a_model_on_the_disk_has_the_same_perplexity(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, storage: str
) -> None:
    path = checkpoint(tmp_path / "model", storage=storage, intermediate_size=96)
    (tmp_path / "text.txt").write_text("all work and no play " * 9)
    how = EvaluationConfig(str(tmp_path / "text.txt"), max_length=32)
    usual = welore.evaluate(path, how, device="cpu")
    monkeypatch.setattr(
        "transformers.integrations.accelerate.get_max_memory", lambda *_: {"cpu": usual.numbers["bytes"] * 4 // 5}
    )
    spread = welore.evaluate(path, dataclasses.replace(how, device_map="auto"), against=path)
    assert (usual.settings["device"], spread.settings["device"]) == ("cpu", "cpu, disk")
    assert spread.numbers["perplexity"] == pytest.approx(usual.numbers["perplexity"], rel=1e-6)  # read in pieces
    for name in ("bytes", "parameter_ratio", "rank_reduction"):
        assert spread.numbers[name] == usual.numbers[name]
    assert spread.numbers["kl_mean"] == 0
    questions = ScoreConfig("coin_flip", "generated", limit=2)
    answers = [
        welore.score(path, dataclasses.replace(questions, device_map=how), device="cpu") for how in ("auto", None)
    ]
    assert answers[0].settings["device"] == "cpu, disk"
    assert answers[0].numbers["accuracy"] == answers[1].numbers["accuracy"]


def test_limit_reads_only_the_first_windows(directory: Callable[..., Path], text: str) -> None:
    record = welore.evaluate(directory(), EvaluationConfig(text, max_length=LENGTH, num_windows=2))
    losses = [loss for window in reference(decided())[:2] for loss in window]
    assert record.numbers["nll"] == pytest.approx(sum(losses) / 12, rel=1e-6)
    assert (record.numbers["windows"], record.settings["num_windows"]) == (2, 2)


def test_progress_counts_every_batch(directory: Callable[..., Path], text: str) -> None:
    seen = []

    def count(batches: Any, label: str, total: float) -> Any:
        for batch, cost in batches:
            seen.append((label, tuple(batch.shape), cost / total))
            yield batch

    welore.evaluate(directory(), EvaluationConfig(text, max_length=LENGTH, batch_size=2), progress=count)
    third = pytest.approx(1 / 3)
    assert seen == [("perplexity", shape, third) for shape in ((2, 7), (1, 7), (1, 3))]


def test_number_beyond_a_double_is_cut_but_its_logarithm_is_exact(
    text: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = decided()
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)
    record = welore.evaluate(model, EvaluationConfig(text, max_length=LENGTH), tokenizer=tokenizer)
    assert record.numbers["nll"] > 710
    assert math.isfinite(record.numbers["perplexity"])
    json.dumps(record.numbers, allow_nan=False)


# --- dtype --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_is_that_of_the_checkpoint(directory: Callable[..., Path], text: str, stored: torch.dtype) -> None:
    record = welore.evaluate(directory(dtype=stored), EvaluationConfig(text, max_length=LENGTH))
    losses = own_losses(decided(dtype=stored))
    assert record.settings["dtype"] == str(stored).removeprefix("torch.")
    assert record.numbers["bytes"] == record.numbers["parameters"] * stored.itemsize
    assert record.numbers["nll"] == pytest.approx(
        sum(m * n for m, n in zip(losses, (6, 6, 6, 2), strict=True)) / 20, rel=1e-3 if stored.itemsize == 2 else 1e-5
    )


def test_chosen_dtype_is_used(directory: Callable[..., Path], text: str) -> None:
    path = directory(dtype=torch.bfloat16)
    record = welore.evaluate(path, EvaluationConfig(text, max_length=LENGTH, dtype="float32"))
    losses = [loss for window in reference(decided(dtype=torch.bfloat16)) for loss in window]
    assert record.settings["dtype"] == "float32"
    assert record.numbers["nll"] == pytest.approx(sum(losses) / 20, rel=1e-6)
    assert welore.evaluate(path, EvaluationConfig(text, max_length=LENGTH)).numbers["nll"] != pytest.approx(
        sum(losses) / 20, rel=1e-6
    )


@pytest.mark.parametrize(
    ("can", "slow"),
    [
        ({"architecture": "x86_64"}, True),
        ({"architecture": "x86_64", "avx512_bf16": True}, False),
        ({"architecture": "aarch64"}, False),  # not known
        ({}, False),
    ],
)
def test_half_precision_on_a_processor_without_it_is_called_slow(
    directory: Callable[..., Path],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    can: dict[str, Any],
    slow: bool,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can, raising=False)
    path = directory(dtype=torch.bfloat16)
    welore.evaluate(path, EvaluationConfig(text, max_length=LENGTH, dtype="float32"), device="cpu")
    assert not caplog.text
    welore.evaluate(path, EvaluationConfig(text, max_length=LENGTH), device="cpu")
    assert ("no instructions for bfloat16: --dtype float32 is several times faster" in caplog.text) == slow


def test_unknown_dtype_is_answered_with_the_nearest(text: str) -> None:
    with pytest.raises(WeLoreError, match="unknown dtype 'bfloat61'; did you mean 'bfloat16'?"):
        welore.evaluate("model", EvaluationConfig(text, dtype="bfloat61"))


# --- what stands beside the number -----------------------------------------------------------------------------------


def test_compressed_record_equals_a_recount_of_the_file(
    directory: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    compression = compress(directory(), tmp_path / "small", rank_reduction=0.4)
    record = welore.evaluate(tmp_path / "small", EvaluationConfig(text, max_length=LENGTH))

    with safe_open(tmp_path / "small" / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
    removed = full = stored = dense = 0
    for layer in AutoModelForCausalLM.from_pretrained(directory()).named_modules():
        if not isinstance(layer[1], torch.nn.Linear) or layer[0] == "lm_head":
            continue
        m, n = layer[1].weight.shape
        A = shapes.get(f"{layer[0]}.A.weight")
        removed += 0 if A is None else min(m, n) - A[1]
        full += min(m, n)
        stored += m * n if A is None else A[1] * (m + n)
        dense += m * n
    assert removed > 0
    assert record.numbers["rank_reduction"] == removed / full == compression.numbers["rank_reduction"]
    assert record.numbers["parameter_ratio"] == stored / dense == compression.numbers["parameter_ratio"]
    assert record.numbers["parameters"] == sum(math.prod(shape) for shape in shapes.values())
    assert record.numbers["bytes"] == 4 * record.numbers["parameters"]
    assert record.inputs["compression"] == compression.settings
    assert record.inputs["compression"]["target"] == {"rank_reduction": 0.4}


def test_compressed_perplexity_is_that_of_the_product_of_the_factors(
    directory: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    compress(directory(), tmp_path / "small", rank_reduction=0.4)
    welore.merge(tmp_path / "small", tmp_path / "merged")
    losses = [x for window in reference(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) for x in window]
    numbers = welore.evaluate(tmp_path / "small", EvaluationConfig(text, max_length=LENGTH)).numbers
    assert numbers["nll"] == pytest.approx(sum(losses) / 20, rel=1e-5)


def test_dense_model_has_lost_nothing(directory: Callable[..., Path], text: str) -> None:
    record = welore.evaluate(directory(), EvaluationConfig(text, max_length=LENGTH), label="dense")
    assert (record.numbers["rank_reduction"], record.numbers["parameter_ratio"]) == (0, 1)
    assert record.inputs["compression"] is None
    assert record.inputs["label"] == "dense"


def test_tied_weights_are_counted_once(text: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    build("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    numbers = welore.evaluate(tmp_path / "tied", EvaluationConfig(text, max_length=LENGTH)).numbers
    stored = load_file(tmp_path / "tied" / "model.safetensors")
    assert numbers["parameters"] == sum(tensor.numel() for tensor in stored.values())


def test_record_comes_back_from_disk(directory: Callable[..., Path], text: str, tmp_path: Path) -> None:
    record = welore.evaluate(directory(), EvaluationConfig(text, max_length=LENGTH))
    record.save(tmp_path / "a.ppl.json")
    assert welore.Record.load(tmp_path / "a.ppl.json") == record
    assert record.settings == {
        "dataset": text,
        "max_length": LENGTH,
        "num_windows": None,
        "batch_size": 1,
        "dtype": "float32",
        "device": "cpu",
        "dataset_split": None,
        "text_column": "text",
        "bos": "text",  # the tokenizer puts nothing in front of a text
        "device_map": None,
    }


# --- a model in memory --------------------------------------------------------------------------------------------


def test_model_in_memory_gives_what_its_directory_gives(
    directory: Callable[..., Path], text: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = decided().train()
    in_memory = welore.evaluate(model, EvaluationConfig(text, max_length=LENGTH), tokenizer=tokenizer)
    on_disk = welore.evaluate(directory(), EvaluationConfig(text, max_length=LENGTH))
    assert in_memory.numbers["perplexity"] == pytest.approx(on_disk.numbers["perplexity"], rel=1e-6)
    assert in_memory.numbers["bytes"] == on_disk.numbers["bytes"]
    assert model.training, "evaluation must give the model back as it was"


def test_dropout_is_off_while_a_model_in_training_is_evaluated(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model: Any = build("llama", attention_dropout=0.9).train()
    model.model.layers[0].eval()
    first, second = (
        welore.evaluate(model, EvaluationConfig(text, max_length=LENGTH), tokenizer=tokenizer).numbers["nll"]
        for _ in range(2)
    )
    assert first == second
    assert [module.training for module in (model, *model.model.layers)] == [True, False, True]


def test_model_in_memory_needs_its_tokenizer(text: str) -> None:
    with pytest.raises(WeLoreError, match="a model in memory needs its tokenizer"):
        welore.evaluate(build("llama"), dataset=text)


def test_tokenizer_of_another_model_is_refused(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(WeLoreError, match=rf"tokenizer is another model's: it gives token {max(IDS)}, .* knows 50"):
        welore.evaluate(build("llama", vocab_size=50), EvaluationConfig(text, max_length=LENGTH), tokenizer=tokenizer)


# --- what a user can put right ------------------------------------------------------------------------------------


def damaged(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_nan_is_refused_and_never_a_perplexity(directory: Callable[..., Path], text: str) -> None:
    def nan(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] = torch.nan

    with pytest.raises(WeLoreError, match="computes NaN or Inf"):
        welore.evaluate(damaged(directory(), nan), EvaluationConfig(text, max_length=LENGTH))


@pytest.mark.parametrize("shape", [None, (3, 32)])
def test_lost_or_foreign_tensor_is_named_and_never_random(
    directory: Callable[..., Path], text: str, shape: tuple[int, ...] | None
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def lose(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]
        if shape is not None:
            tensors[name] = torch.ones(shape)

    with pytest.raises(
        WeLoreError, match=rf"(lacks {name}|has {name} in another shape).*: that would be random numbers"
    ):
        welore.evaluate(damaged(directory(), lose), EvaluationConfig(text, max_length=LENGTH))


def test_file_that_is_cut_off_is_one_sentence(directory: Callable[..., Path], text: str) -> None:
    path = directory()
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(WeLoreError, match="is cut off, or has a header") as caught:
        welore.evaluate(path, EvaluationConfig(text, max_length=LENGTH))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_missing_tokenizer_is_one_sentence(saved: Callable[..., Path], text: str, family: str) -> None:
    with pytest.raises(WeLoreError, match="has no tokenizer that can be read.*: copy") as caught:
        welore.evaluate(saved(family), EvaluationConfig(text, max_length=LENGTH))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_window_longer_than_the_model_reads_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, family: str
) -> None:
    (tmp_path / "long.txt").write_text("w5 " * 100)
    with pytest.raises(
        WeLoreError, match="length is 65: this model reads at most 64 tokens at once, pass --max-length 64"
    ):
        welore.evaluate(build(family), EvaluationConfig(str(tmp_path / "long.txt"), max_length=65), tokenizer=tokenizer)
    numbers = welore.evaluate(
        build(family), EvaluationConfig(str(tmp_path / "long.txt"), max_length=64), tokenizer=tokenizer
    ).numbers
    assert numbers["tokens"] == 63 + 35


def test_batch_of_nothing_is_refused(text: str) -> None:
    with pytest.raises(WeLoreError, match="batch_size is 0: it must be at least 1"):
        welore.evaluate("model", EvaluationConfig(text, batch_size=0))
