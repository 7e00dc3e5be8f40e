from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from conftest import build, compress
from toys import characters, checkpoint, finetuned, weights
from welore.config import FinetuneConfig
from welore.data.windows import TopK, write_windows
from welore.errors import WeLoreError
from welore.io.context import RunContext
from welore.models.load import load_model
from welore.training.teacher import load_teacher, refuse_other_vocabulary, share_frozen, write_text


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # qwen2: the head is tied to the embeddings
def test_what_is_frozen_and_equal_is_held_once(family: str, tokens: torch.Tensor) -> None:
    teacher = build(family).requires_grad_(False)
    student = build(family)
    compress(student, rank_reduction=0.4, min_ratio=0.3)
    student.requires_grad_(False)
    student.model.norm.requires_grad_(True)
    with torch.no_grad():
        student.model.layers[0].input_layernorm.weight[0] += 1
    expected = teacher(tokens).logits
    share_frozen(student, teacher)
    own = {id(p) for p in student.parameters()}
    apart = {name for name, p in teacher.named_parameters() if id(p) not in own}
    factored = {f"{name}.weight" for name, m in student.named_modules() if hasattr(m, "rank")}
    assert factored
    assert apart == factored | {"model.norm.weight", "model.layers.0.input_layernorm.weight"}
    assert teacher.get_input_embeddings().weight is student.get_input_embeddings().weight
    assert teacher.get_output_embeddings().weight is student.get_output_embeddings().weight
    assert torch.equal(teacher(tokens).logits, expected)


def test_another_dtype_is_not_shared() -> None:
    student, teacher = build("llama").requires_grad_(False), build("llama", torch.bfloat16)
    student.lm_head.weight.data = student.lm_head.weight.data.bfloat16()
    share_frozen(student, teacher)
    assert teacher.lm_head.weight is student.lm_head.weight
    assert teacher.model.norm.weight is not student.model.norm.weight


def test_another_vocabulary_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(WeLoreError, match="another vocabulary"):  # other words
        refuse_other_vocabulary(build("llama"), tokenizer, build("llama"), characters())
    with pytest.raises(WeLoreError, match=r"another vocabulary \(96 tokens, 104 outputs; the model has 96 and 96\)"):
        refuse_other_vocabulary(build("llama"), tokenizer, build("llama", vocab_size=104), tokenizer)
    refuse_other_vocabulary(build("llama"), tokenizer, build("gpt2"), tokenizer)  # another architecture may teach


def test_a_teacher_is_loaded_frozen_and_a_model_may_not_be_its_own(tmp_path: Path) -> None:
    dense, small = checkpoint(tmp_path / "dense", None), checkpoint(tmp_path / "small")

    def alone(teacher: Path) -> FinetuneConfig:
        return FinetuneConfig(distill=teacher, distill_weight=1.0)

    context = RunContext.create(device="cpu")
    student = load_model(small, context)
    teacher = load_teacher(alone(dense), student, context)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    with pytest.raises(WeLoreError, match="is its own teacher"):
        load_teacher(alone(small), student, context)
    load_teacher(FinetuneConfig(distill=small, distill_weight=0.5), student, context)


def test_the_teacher_writes_whole_windows_from_a_seed() -> None:
    model = build("llama", vocab_size=98)
    size: dict[str, Any] = {"dataset": "self", "distill": "dense", "self_tokens": 70, "max_length": 16}
    configs = [FinetuneConfig(seed=seed, **size) for seed in (3, 3, 4)]
    first, second, other = (write_text(model, characters(), config, torch.device("cpu")) for config in configs)
    assert first.shape == (5, 16)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def recorded(teacher: Any, windows: torch.Tensor, path: Path, k: int) -> Path:
    """A file of windows with a teacher's predictions."""
    with torch.no_grad():
        logprobs, ids = teacher(windows).logits.log_softmax(-1).topk(k)
    write_windows(path, windows, TopK(logprobs, ids))
    return path


def test_recorded_predictions_teach_as_the_teacher_does(tmp_path: Path) -> None:
    dense, small = checkpoint(tmp_path / "dense", None), checkpoint(tmp_path / "small")
    teacher = AutoModelForCausalLM.from_pretrained(dense)
    windows = torch.randint(0, 96, (12, 16), generator=torch.Generator().manual_seed(0))
    text = recorded(teacher, windows, tmp_path / "text.safetensors", teacher.config.vocab_size)
    settings: dict[str, Any] = {"max_steps": 3, "batch_size": 2, "max_length": 16, "eval_steps": 3, "warmup_steps": 1}
    settings |= {"learning_rate": 5e-3, "distill_weight": 0.7}
    one = finetuned(small, tmp_path / "one", distill=dense, dataset=str(text), **settings)
    two = finetuned(small, tmp_path / "two", distill=text, **settings)
    assert "teacher_bytes" in one.numbers
    assert "teacher_bytes" not in two.numbers  # none was in memory
    assert two.numbers["teacher_eval_loss"] == pytest.approx(one.numbers["teacher_eval_loss"], rel=1e-5)
    for name in ("train_loss", "evaluation"):
        assert [e[1] for e in two.numbers[name]] == pytest.approx([e[1] for e in one.numbers[name]], rel=1e-4), name
    expected, trained = weights(tmp_path / "one" / "model"), weights(tmp_path / "two" / "model")
    for name, tensor in expected.items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "other.txt"}, "holds its own text"),
        ({"distill_temperature": 2.0}, "recorded predictions have only 1"),
        ({}, "holds windows without a teacher's predictions"),
    ],
)
def test_a_record_that_cannot_teach_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    text = tmp_path / "text.safetensors"
    write_windows(text, torch.zeros(4, 16, dtype=torch.long))
    with pytest.raises(WeLoreError, match=message):
        finetuned(
            checkpoint(tmp_path / "small"), tmp_path / "out", distill=text, max_steps=1, max_length=16, **settings
        )
    assert not (tmp_path / "out").exists()
