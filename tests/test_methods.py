"""mark_trainable, and fine-tuning as a library: a model in memory, callbacks, transformers' own arguments."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import welore
from conftest import build
from toys import characters, checkpoint, finetuned, weights
from welore.config import FinetuneConfig, MethodName, choices
from welore.errors import WeLoreError
from welore.training.arguments import _use_device, training_argument, training_arguments
from welore.training.methods import ADAPTER_RATE, METHODS, RATE
from welore.training.preparation import cast

IDS = torch.randint(2, 90, (4, 16), generator=torch.Generator().manual_seed(0))
SHORT: dict[str, Any] = {
    **{"max_steps": 4, "batch_size": 2, "max_length": 48, "learning_rate": 5e-3, "warmup_steps": 1},
    **{"eval_steps": 2, "max_eval_samples": 4, "save_steps": 0},
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"The number after {n} is {n + 1}." for n in range(200)))
    return str(path)


def changed(model: Any, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def factors(model: Any) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.endswith((".A.weight", ".B.weight"))}


def test_registry_has_the_names_of_the_settings() -> None:
    assert tuple(METHODS) == choices(MethodName)


@pytest.mark.parametrize(("method", "scaling", "magnitudes"), [("lora", 2, 0), ("rslora", 8**0.5, 0), ("dora", 2, 1)])
def test_the_merged_model_of_an_adapter_is_an_ordinary_one(
    small: Path, method: str, scaling: float, magnitudes: int
) -> None:
    model = AutoModelForCausalLM.from_pretrained(small)
    names = [name for name, _ in model.named_parameters()]
    marked = welore.mark_trainable(model, method, rank=2)
    layers = [module for module in marked.model.modules() if hasattr(module, "lora_magnitude_vector")]
    assert [layer.scaling["default"] for layer in layers] == pytest.approx([scaling] * len(layers))
    assert {len(layer.lora_magnitude_vector) for layer in layers} == {magnitudes}
    torch.nn.init.ones_(marked.parameters[1])  # B is zero, so that an adapter adds nothing
    expected = marked.model(IDS).logits
    assert [name for name, _ in marked.merged().named_parameters()] == names
    torch.testing.assert_close(marked.merged()(IDS).logits, expected)
    assert welore.mark_trainable(AutoModelForCausalLM.from_pretrained(small), "lrc").merged() is not None


def test_a_bare_loop_trains_the_factors_alone(small: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(small)
    before = {name: p.clone() for name, p in model.named_parameters()}
    marked = welore.mark_trainable(model, "lrc")
    assert marked.model is model
    assert marked.description == "the factors of the LRCs"
    optimizer = torch.optim.AdamW(marked.parameters, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert changed(model, before) == factors(model) != set()


def test_the_stock_trainer_trains_what_is_marked(small: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(small)
    before = {name: p.clone() for name, p in model.named_parameters()}
    welore.mark_trainable(model, train_norms=True)  # the result may be ignored
    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True)
    Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids} for ids in IDS]).train()
    assert changed(model, before) == factors(model) | {name for name in before if "norm" in name}


def test_the_learning_rate_is_in_proportion_to_the_matrices_that_learn(small: Path) -> None:
    def rms(ends: tuple[str, ...], *, inputs: bool = False) -> float:
        """Of the matrices of the blocks with such names; inputs: times the root of how many they read."""
        model = AutoModelForCausalLM.from_pretrained(small)
        matrices = [
            p for name, p in model.named_parameters() if ".layers." in name and name.endswith(ends) and p.ndim == 2
        ]
        squares = sum(float(p.detach().double().square().sum()) * (p.shape[1] if inputs else 1) for p in matrices)
        return (squares / sum(p.numel() for p in matrices)) ** 0.5

    def marked(method: str) -> Any:
        return welore.mark_trainable(AutoModelForCausalLM.from_pretrained(small), method)

    lrc, full, lora = marked("lrc"), marked("full"), marked("lora")
    assert lrc.learning_rate() == pytest.approx(RATE * rms((".A.weight", ".B.weight")))
    assert full.learning_rate() == pytest.approx(RATE * rms(("",)))
    assert lora.learning_rate() == pytest.approx(ADAPTER_RATE * rms(("",), inputs=True))
    assert lora.learning_rate(0.25) == pytest.approx(0.25 * lora.scale)


def test_adapters_of_transposed_matrices_count_their_inputs() -> None:
    model = build("gpt2")  # whose weights are (inputs, outputs)
    ends = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    matrices = [p.detach().double() for name, p in model.named_parameters() if name.endswith(ends)]
    assert any(len(matrix) != matrix.shape[1] for matrix in matrices)
    squares = sum(float(matrix.square().sum()) * len(matrix) for matrix in matrices)
    expected = (squares / sum(matrix.numel() for matrix in matrices)) ** 0.5
    with pytest.warns(UserWarning, match="fan_in_fan_out"):  # peft says so of such layers
        marked = welore.mark_trainable(model, "lora")
    assert marked.scale == pytest.approx(expected)


def test_a_run_takes_the_rate_of_its_model_unless_one_is_given(small: Path, text: str, tmp_path: Path) -> None:
    own = {key: value for key, value in SHORT.items() if key != "learning_rate"}
    rate = welore.mark_trainable(AutoModelForCausalLM.from_pretrained(small), "lrc").learning_rate
    for name, given, expected in (
        ("own", {}, rate()),
        ("relative", {"relative_learning_rate": 0.01}, rate(0.01)),
        ("given", {"learning_rate": 1e-3}, 1e-3),
    ):
        record = finetuned(small, tmp_path / name, dataset=text, **own, **given)
        assert record.settings["learning_rate"] == expected
        assert record.numbers["eval_loss"] != record.numbers["evaluation"][0][1]
    with pytest.raises(WeLoreError, match="give learning_rate or relative_learning_rate, not both"):
        FinetuneConfig(learning_rate=1e-3, relative_learning_rate=1e-3)


def test_impossible_marks_are_refused(small: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(small)
    for options, message in [
        ({"method": "lcr"}, "unknown method 'lcr'; did you mean 'lrc'"),
        ({"rank": 4}, "rank goes with lora, rslora, dora, updates, galore, apollo; lrc has no rank"),
        ({"method": "full", "train_norms": True}, "train_norms goes with lrc and nlrc"),
    ]:
        with pytest.raises(WeLoreError, match=message):
            welore.mark_trainable(model, **options)  # type: ignore[arg-type]


def test_a_model_in_memory_is_trained_in_place_as_one_on_disk(small: Path, text: str, tmp_path: Path) -> None:
    on_disk = finetuned(small, tmp_path / "disk", dataset=text, **SHORT).numbers
    model = AutoModelForCausalLM.from_pretrained(small)
    before = {name: p.clone() for name, p in model.named_parameters()}
    in_memory = finetuned(model, tmp_path / "memory", dataset=text, tokenizer=characters(), **SHORT).numbers
    assert in_memory["train_loss"] == on_disk["train_loss"]
    assert in_memory["evaluation"] == on_disk["evaluation"]
    assert changed(model, before) == factors(model)
    saved, expected = weights(tmp_path / "memory/model"), weights(tmp_path / "disk/model")
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    with pytest.raises(WeLoreError, match="a model in memory needs its tokenizer"):
        finetuned(model, tmp_path / "no", dataset=text, **SHORT)


def test_a_text_may_be_strings_a_dataset_or_windows(small: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    documents = [f"The number after {n} is {n + 1}." for n in range(300)]
    given = [documents, Dataset.from_dict({"text": documents})]
    losses = [
        finetuned(small, tmp_path / str(i), dataset=dataset, **SHORT).numbers["train_loss"]
        for i, dataset in enumerate(given)
    ]
    assert losses[0] == losses[1]
    windows = torch.randint(2, 90, (20, 48), generator=torch.Generator().manual_seed(0))
    config = FinetuneConfig(**SHORT)
    record = welore.finetune(small, tmp_path / "windows", config, dataset=windows, device="cpu")
    assert record.numbers["train_blocks"] == 18
    assert record.settings["dataset"] == "Tensor"
    with pytest.raises(WeLoreError, match="windows of 40 tokens: give that as max_length"):
        welore.finetune(small, tmp_path / "no", config, dataset=windows[:, :40], device="cpu")


def test_callbacks_are_those_of_transformers_or_made_for_the_trainer(small: Path, text: str, tmp_path: Path) -> None:
    class Steps(TrainerCallback):
        def __init__(self, losses: Any = None) -> None:
            self.steps: list[int] = []
            self.losses = losses

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.steps.append(state.global_step)

    ready, made = Steps(), []

    def make(trainer: Any) -> Steps:
        assert trainer.resumed_at is None
        made.append(Steps(trainer.held_out_loss))
        return made[0]

    finetuned(small, tmp_path / "run", dataset=text, callbacks=[ready, make], **SHORT)
    assert ready.steps == made[0].steps == [1, 2, 3, 4]


def test_other_arguments_of_transformers_go_by_their_own_names(small: Path, text: str, tmp_path: Path) -> None:
    settings = SHORT | {"save_steps": 4, "training_arguments": {"lr_scheduler_type": "linear", "adam_beta1": 0.8}}
    record = finetuned(small, tmp_path / "run", dataset=text, **settings)
    assert record.settings["training_arguments"] == {"lr_scheduler_type": "linear", "adam_beta1": 0.8}
    state = json.loads((tmp_path / "run/checkpoints/checkpoint-4/trainer_state.json").read_text())
    rates = [entry["learning_rate"] / 5e-3 for entry in state["log_history"] if "learning_rate" in entry]
    assert rates == pytest.approx([0, 1, 2 / 3, 1 / 3])
    for arguments, message in [
        ({"adam_beta": 0.8}, "has an option 'adam_beta'; did you mean 'adam_beta"),
        ({"bf16": True}, "bf16 is no training argument to give"),
        ({"max_steps": 3}, "max_steps is no training argument to give"),
        ({"push_to_hub": True}, "push_to_hub is .* to give: give nothing, and upload OUTPUT_DIR/model afterwards"),
        ({"resume_from_checkpoint": "x"}, "resume_from_checkpoint is .* to give: give resume"),
        ({"lr_scheduler_type": "quadratic"}, "a training argument cannot be used: .*quadratic"),
        (
            {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"cycles": 1}},
            "lr_scheduler_kwargs .* cannot be used",
        ),
    ]:
        with pytest.raises(WeLoreError, match=message):
            finetuned(small, tmp_path / "no", dataset=text, training_arguments=arguments, **SHORT)
        assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("lr_scheduler_type", "linear", "linear"),
        ("adam_beta1", "0.8", 0.8),
        ("dataloader_num_workers", "2", 2),
        ("torch_compile", "true", True),
        ("logging_first_step", "False", False),
    ],
)
def test_arguments_of_transformers_are_read_from_text_by_their_type(name: str, text: str, value: Any) -> None:
    read = training_argument(name, text)
    assert read == value
    assert type(read) is type(value) or isinstance(read, type(value))


def test_text_of_another_type_is_refused() -> None:
    with pytest.raises(WeLoreError, match="--adam-beta1 cannot be 'fast'"):
        training_argument("adam_beta1", "fast")
    with pytest.raises(WeLoreError, match="has an option 'learning_rat'; did you mean 'learning_rate'"):
        training_argument("learning_rat", "1")


def test_a_named_gpu_is_the_one_that_trains(tmp_path: Path) -> None:
    config = FinetuneConfig(dataset="pydoc", max_steps=1, warmup_steps=0, batch_size=1, dtype="float32")
    arguments = training_arguments(config, tmp_path, torch.device("cpu"))
    assert arguments.device == torch.device("cpu")
    _use_device(arguments, torch.device("cuda", 1))
    assert arguments.device == arguments.distributed_state.device == torch.device("cuda", 1)
    assert arguments.n_gpu <= 1


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_frozen_weights_that_have_the_dtype_stay_in_their_file(stored: torch.dtype) -> None:
    model = build("llama", stored)
    model.requires_grad_(False)
    trained = model.model.norm.weight.requires_grad_(True)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    cast(model, torch.bfloat16)
    assert trained.dtype is torch.float32
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    assert {p.dtype for p in frozen.values()} == {torch.bfloat16}
    for name, parameter in frozen.items():
        assert (parameter.data_ptr() == before[name]) == (stored is torch.bfloat16), name


@pytest.mark.parametrize("method", ["lrc", "lora"])
@pytest.mark.filterwarnings("ignore")  # of peft
def test_the_head_of_a_classifier_is_trained(small: Path, method: str) -> None:
    kind: Any = AutoModelForSequenceClassification if method == "lrc" else AutoModelForTokenClassification
    model = welore.mark_trainable(kind.from_pretrained(small, num_labels=3), method).model
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert [name for name in trained if "score" in name and "original" not in name]
    assert not [name for name in trained if "embed" in name or "norm" in name]
