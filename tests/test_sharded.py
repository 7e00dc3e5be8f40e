"""Fine-tuning with parameters cut over two processes (FSDP2), on CPUs."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import welore
from processes import forked, launched
from test_resuming import COMMON, Kill
from toys import checkpoint, finetuned, weights
from welore.config import FinetuneConfig
from welore.data.windows import TopK, write_windows
from welore.errors import WeLoreError
from welore.training import finetune as finetuning
from welore.training import preparation
from welore.training.arguments import check_launch
from welore.training.data import IGNORED
from welore.training.trainer import share


# accelerate uses FSDP on GPUs only. Told that these processes have some, it goes the same way on CPUs: its own code and
# the Trainer's, from here on.
def cut(model: Path, out: Path, settings: dict[str, Any], **options: Any) -> None:
    """The work of a child, whose modules are its own."""
    usual, gathered = preparation.training_arguments, finetuning.gathered

    def arguments(*given: Any, **more: Any) -> Any:
        made = usual(*given, **more)
        made.distributed_state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return made

    def told(model: Any) -> Any:
        state = gathered(model)
        if state is not None:
            print("cut over the processes")
        return state

    preparation.training_arguments = arguments
    finetuning.check_launch = lambda *given: None
    finetuning.gathered = told
    finetuning.finetune(model, out, FinetuneConfig(**settings), device="cpu", **options)


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}


def trained(model: Path, out: Path) -> None:
    """By transformers' own Trainer, and the same trick in two processes."""
    size = 4 // int(os.environ.get("WORLD_SIZE", "1"))
    how: dict[str, Any] = {"use_cpu": True, "report_to": [], "max_steps": 3, "learning_rate": 5e-3}
    arguments = TrainingArguments(str(out), per_device_train_batch_size=size, save_strategy="no", **how)
    if "WORLD_SIZE" in os.environ:
        arguments.distributed_state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    data: Any = [{"input_ids": ids, "labels": ids} for ids in torch.arange(12 * 16).view(12, 16) % 90]
    trainer = Trainer(AutoModelForCausalLM.from_pretrained(model), arguments, train_dataset=data)
    trainer.train()
    assert all(isinstance(p, DTensor) for p in trainer.model.parameters()) == ("WORLD_SIZE" in os.environ)
    trainer.save_model(str(out))


FAMILY = "qwen2"  # embeddings and head are one tensor


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.slow
def test_fsdp2_gives_losses_and_weights_of_one_process(tmp_path: Path, taught: bool) -> None:
    model = checkpoint(tmp_path / "model", family=FAMILY, storage="pivoted")
    settings: dict[str, Any] = {"save_steps": 0, "max_steps": 3, "max_length": 48}
    if taught:  # by recorded predictions, of any other model
        windows, logprobs = torch.arange(40 * 48).view(40, 48) % 90, torch.randn(40, 48, 96).log_softmax(-1)
        write_windows(tmp_path / "text.safetensors", windows, TopK(*logprobs.topk(8)))
        settings["distill"] = str(tmp_path / "text.safetensors")
    else:
        text = tmp_path / "text.txt"
        text.write_text(" ".join(f"The number after {n} is {n + 1}." for n in range(200)))
        settings["dataset"] = str(text)
    settings |= {"learning_rate": 5e-3, "warmup_steps": 1, "eval_steps": 3, "max_eval_samples": 5}
    one = finetuned(model, tmp_path / "one", batch_size=4, **settings).numbers
    settings |= {"batch_size": 2}  # three batches are evaluated: one process has two
    for ended in launched(lambda: cut(model, tmp_path / "two", settings), **FSDP2):
        assert ended.status == 0, ended.err
        assert ended.out.count("cut over the processes") == 1
    two = welore.Record.load(tmp_path / "two" / "finetune.json").numbers
    for name in ("trainable_parameters", "total_parameters", "tokens", "bytes", "rank_reduction", "parameter_ratio"):
        assert two[name] == one[name], name
    assert [loss for _, loss in two["train_loss"]] == pytest.approx([loss for _, loss in one["train_loss"]], rel=1e-5)
    assert [e[1] for e in two["evaluation"]] == pytest.approx([e[1] for e in one["evaluation"]], rel=1e-6)
    expected, found = weights(tmp_path / "one" / "model"), weights(tmp_path / "two" / "model")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    config = "model/config.json"
    assert (tmp_path / "two" / config).read_text() == (tmp_path / "one" / config).read_text()


@pytest.mark.usefixtures("one_thread")
def test_mixture_whose_experts_are_apart_is_refused(tmp_path: Path) -> None:
    """An expert that no token of a process chooses has no gradient there: FSDP2 would add up tensors of other sizes."""
    model = checkpoint(tmp_path / "model", 0.4, "qwen3_moe")
    for ended in launched(lambda: cut(model, tmp_path / "run", COMMON), **FSDP2):
        assert ended.status == 1
        assert "a mixture whose experts are apart does not run under FSDP: use torchrun, which is DDP" in ended.err


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
@pytest.mark.slow
def test_a_killed_run_under_fsdp2_goes_on_with_twice_the_processes(tmp_path: Path, kind: str) -> None:
    model, settings = checkpoint(tmp_path / "model"), COMMON | {"batch_size": 2}
    how = FSDP2 | {"FSDP_STATE_DICT_TYPE": kind}
    for ended in launched(lambda: cut(model, tmp_path / "run", settings, callbacks=[Kill()]), **how):
        assert ended.status == -signal.SIGKILL, ended.err
    settings = COMMON | {"batch_size": 1}
    for ended in launched(lambda: cut(model, tmp_path / "run", settings, resume=True), 4, **how):
        assert ended.status == 0, ended.err
    numbers = welore.Record.load(tmp_path / "run" / "finetune.json").numbers
    expected = finetuned(model, tmp_path / "one", **COMMON | {"batch_size": 4}).numbers
    assert numbers["resumed_at"] == 2
    assert numbers["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    after, tuned = weights(tmp_path / "one" / "model"), weights(tmp_path / "run" / "model")
    for name, tensor in after.items():
        torch.testing.assert_close(tuned[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_the_trainer_of_transformers_saves_under_fsdp2_what_one_process_saves(tmp_path: Path) -> None:
    """Embeddings and head are two tensors here: of one the Trainer of transformers stores both copies."""
    model = checkpoint(tmp_path / "model", storage="pivoted")
    full = FSDP2 | {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    both = launched(lambda: trained(model, tmp_path / "two"), **full)
    for ended in (forked(lambda: trained(model, tmp_path / "one")), *both):
        assert ended.status == 0, ended.err
    before, expected, found = (weights(directory) for directory in (model, tmp_path / "one", tmp_path / "two"))
    assert found.keys() == expected.keys() == before.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(before[name], found[name]) for name in found)
    for name in ("config.json", "modeling_welore.py", "README.md"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()


@pytest.mark.parametrize(("batches", "processes"), [(3, 2), (4, 2), (1, 3), (7, 4)])
def test_all_processes_evaluate_equally_often_and_every_label_once(batches: int, processes: int) -> None:
    labels = torch.arange(batches * 6).reshape(batches, 2, 3)
    found = [share([{"input_ids": each, "labels": each} for each in labels], p, processes) for p in range(processes)]
    assert len({len(mine) for mine in found}) == 1
    counted = [batch["labels"][batch["labels"] != IGNORED] for mine in found for batch in mine]
    assert torch.equal(torch.cat(counted).sort().values, labels.flatten())


@pytest.mark.parametrize(
    ("environment", "method", "device", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "lrc", "cuda", "does not run under DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true"}, "lrc", "cuda", "under FSDP 2 only: pass --fsdp_version 2"),
        ({"ACCELERATE_USE_FSDP": "1", "FSDP_VERSION": "2"}, "lora", "cuda", "only lrc, nlrc, full do"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "lrc", "cpu", "no FSDP on a CPU"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            "lrc",
            "cuda",
            "--fsdp_cpu_ram_efficient_loading false",
        ),
    ],
)
def test_launches_that_cannot_work_are_refused(
    environment: dict[str, str], method: str, device: str, message: str
) -> None:
    with pytest.raises(WeLoreError, match=message):
        check_launch(environment, method, device)


def test_a_teacher_in_memory_is_refused_under_fsdp_and_a_recorded_one_is_not() -> None:
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    check_launch(fsdp, "lrc", "cuda", "text.safetensors")
    with pytest.raises(WeLoreError, match="or a file of its predictions"):
        check_launch(fsdp, "lrc", "cuda", "dense")


def test_usual_launches_are_not_refused() -> None:
    check_launch({}, "lora", "cpu")
    check_launch({"ACCELERATE_USE_FSDP": "false"}, "lora", "cpu")
    check_launch({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "full", "cuda")
