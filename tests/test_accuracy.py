from pathlib import Path
from typing import Any

import pytest
import torch

import welore
from conftest import build
from toys import characters, checkpoint
from welore.config import CalibrationConfig, ScoreConfig
from welore.data.self_generated import generate_text
from welore.errors import WeLoreError
from welore.evaluation.accuracy import NEW_TOKENS, answers, grade, score
from welore.evaluation.tasks import TASKS, Item, items


def test_unparsable_answer_counts_as_wrong() -> None:
    found = [Item("p", "yes"), Item("p", "yes"), Item("p", "no"), Item("p", "no")]
    numbers = grade(TASKS["coin_flip"], found, [" yes.", " who knows", " yes.", ""])
    assert numbers["accuracy"] == 0.25
    assert numbers["n"] == 4
    assert numbers["unparsable"] == 2
    assert numbers["majority_rate"] == 0.5
    assert [item["extracted"] for item in numbers["items"]] == ["yes", None, "yes", None]


def test_interval_is_wilsons() -> None:
    numbers = grade(TASKS["coin_flip"], [Item("p", "yes")] * 10, [" yes."] * 7 + [" no."] * 3)
    z, p, n = 1.959964, 0.7, 10  # Wilson 1927
    middle, half = (p + z * z / (2 * n)), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert numbers["ci95_low"] == pytest.approx((middle - half) / (1 + z * z / n), abs=1e-5)
    assert numbers["ci95_high"] == pytest.approx((middle + half) / (1 + z * z / n), abs=1e-5)


def test_record_holds_every_prompt_output_and_extracted_answer(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model")
    record = score(model, ScoreConfig("coin_flip", "generated", limit=5))
    path = tmp_path / "model.score.json"
    record.save(path)
    kept = welore.Record.load(path)
    expected = items(TASKS["coin_flip"], "evaluation", "generated")[:5]
    assert kept.kind == "accuracy"
    assert [item["prompt"] for item in kept.numbers["items"]] == [item.prompt for item in expected]
    assert set(kept.numbers["items"][0]) == {"prompt", "output", "extracted", "answer", "correct"}
    assert kept.settings["part"] == "evaluation"
    assert 0 < kept.numbers["rank_reduction"] < 1
    assert kept.numbers["parameter_ratio"] < 1
    assert kept.numbers["bytes"] > 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_result_does_not_depend_on_the_batch_size(tmp_path: Path, family: str) -> None:
    changes: dict[str, Any] = {"n_positions": 512} if family == "gpt2" else {}
    model = checkpoint(tmp_path / "model", family=family, **changes)
    alone, together = (score(model, ScoreConfig("object_tracking", "generated", limit=7, batch_size=b)) for b in (1, 4))
    assert alone.numbers["items"] == together.numbers["items"]


def test_decoding_is_greedy_whatever_the_model_prefers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint(tmp_path / "model"))
    tokenizer = characters()
    prompt = "A: The answer is"
    model.generation_config.do_sample, model.generation_config.temperature = True, 9.0
    (text,), _ = answers(model, tokenizer, [prompt], 1)
    ids = tokenizer(prompt).input_ids
    for _ in range(NEW_TOKENS):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    expected = ids[len(prompt) :]
    expected = expected[: expected.index(1)] if 1 in expected else expected
    assert text == tokenizer.decode(expected, skip_special_tokens=True)


def test_prompt_longer_than_the_context_keeps_its_end_and_is_counted(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint(tmp_path / "model"))
    end = "b" * (512 - NEW_TOKENS)
    outputs, truncated = answers(model, characters(), ["a" * 100 + end, end], 2)
    assert truncated == 1
    assert outputs[0] == outputs[1]
    opening, shorter = characters(opens=True), "b" * (511 - NEW_TOKENS)  # BOS stays in front of what is left
    outputs, truncated = answers(model, opening, ["a" * 100 + shorter, shorter], 2)
    assert truncated == 1
    assert outputs[0] == outputs[1]


def test_the_number_of_an_end_token_that_is_none_is_one_sentence() -> None:
    model = build("llama", vocab_size=98)
    model.generation_config.eos_token_id = "</s>"  # type: ignore[assignment]
    with pytest.raises(WeLoreError, match="eos_token_id is '</s>', it must be the number of a token"):
        answers(model, characters(), ["Q: short"], 1)
    with pytest.raises(WeLoreError, match="eos_token_id is '</s>', it must be the number of a token"):
        generate_text(model, characters(), CalibrationConfig(num_tokens=8, max_length=4))


def test_a_model_that_computes_nan_has_no_accuracy() -> None:
    model = build("llama", vocab_size=98)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(WeLoreError, match="the model computes NaN or Inf"):
        answers(model, characters(), ["Q: short"], 1)


def test_tokens_that_the_embedding_does_not_have() -> None:
    """Padding beyond it, as Llama's tokenizers often have, is never read; a text beyond it is refused."""
    model, tokenizer, prompts = build("llama", vocab_size=98), characters(), ["Q: short", "Q: a longer one"]
    expected = answers(model, tokenizer, prompts, 2)
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    assert tokenizer.pad_token_id == 98
    assert answers(model, tokenizer, prompts, 2) == expected
    with pytest.raises(WeLoreError, match="tokenizer is another model's: it gives token 9., this model knows 90"):
        answers(build("llama", vocab_size=90), tokenizer, ["Q: xyz"], 1)
    with pytest.raises(WeLoreError, match="the tokenizer gives no tokens"):
        answers(model, tokenizer, [""], 1)
    with pytest.raises(WeLoreError, match="reads at most 8 tokens at once: a question and its answer need more"):
        answers(build("llama", vocab_size=98, max_position_embeddings=8), tokenizer, prompts, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "boolk"}, "unknown task 'boolk'; did you mean 'boolq'"),
        ({"task": "coin_flip", "limit": 0}, "limit is 0"),
        ({"task": "coin_flip", "batch_size": 0}, "batch_size is 0"),
        ({"task": "coin_flip", "dtype": "float"}, "unknown dtype 'float'"),
        ({"task": "svamp", "dataset": "nowhere.json"}, "nowhere.json does not exist"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(WeLoreError, match=message):
        score(tmp_path, ScoreConfig(**settings))


def test_model_in_memory_needs_its_tokenizer() -> None:
    with pytest.raises(WeLoreError, match="needs its tokenizer"):
        score(build("llama"), ScoreConfig("coin_flip", "generated", limit=1))
