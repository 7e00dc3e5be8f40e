import json
import math
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.utils.logging import disable_propagation, enable_propagation

import welore
from conftest import allocate, build, compress, everything
from processes import command, forked, launched
from toys import characters, checkpoint, finetuned, weights
from welore.config import EvaluationConfig
from welore.errors import WeLoreError
from welore.training.originals import is_checkpointing
from welore.training.trainer import FinetuneTrainer

SHORT: dict[str, Any] = {
    "max_steps": 4,
    "batch_size": 2,
    "max_length": 48,
    "learning_rate": 5e-3,
    "warmup_steps": 1,
    "eval_steps": 2,
    "max_eval_samples": 4,
    "save_steps": 0,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small compressed model; some of its matrices are factored, some dense."""
    return checkpoint(tmp_path_factory.mktemp("models") / "compressed")


@pytest.fixture(scope="module", params=["factored", "pivoted", "split"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in every storage; with long matrices where they are split."""
    longer = {"intermediate_size": 64} if request.param == "split" else {}
    return checkpoint(tmp_path_factory.mktemp("models") / request.param, storage=request.param, **longer)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("models") / "dense", rank_reduction=None)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(" ".join(f"The number after {n} is {n + 1}." for n in range(400)))
    return str(path)


@pytest.fixture(scope="module")
def teacher(dense: Path, text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense model after it has learned something: what a compressed one may be far from."""
    out = tmp_path_factory.mktemp("models") / "taught"
    finetuned(dense, out, "full", dataset=text, **SHORT | {"max_steps": 24, "eval_steps": 0})
    return out / "model"


def changed(before: Path, after: Path) -> set[str]:
    """The tensors that differ in a bit; all have the dtypes that they had."""
    return differing(weights(before), weights(after))


def differing(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> set[str]:
    assert {name: t.dtype for name, t in old.items()} == {name: t.dtype for name, t in new.items()}
    raw = [{name: t.contiguous().view(-1).view(torch.uint8) for name, t in each.items()} for each in (old, new)]
    return {name for name in old if not torch.equal(raw[0][name], raw[1][name])}


FACTORS = (".A.weight", ".B.weight", ".P.weight", ".C.weight")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lrc_changes_exactly_the_factors(stored: Path, text: str, tmp_path: Path, dtype: str) -> None:
    model = stored
    record = finetuned(model, tmp_path / "run", dataset=text, **SHORT | {"dtype": dtype})
    result = tmp_path / "run" / "model"
    factors = {name for name in weights(model) if name.endswith(FACTORS)}
    assert factors
    assert changed(model, result) == factors
    assert record.numbers["trainable_parameters"] == sum(weights(model)[name].numel() for name in factors)
    assert record.numbers["eval_loss"] < record.numbers["evaluation"][0][1]


@pytest.mark.parametrize(
    ("stored_as", "computed_in", "method"),
    [
        *(("float16", dtype, method) for dtype in ("float32", "bfloat16") for method in ("lrc", "lora", "full")),
        ("bfloat16", "float32", "lrc"),
        ("float32", "bfloat16", "lora"),
    ],
)
def test_what_is_frozen_keeps_every_bit_and_its_dtype(
    text: str, tmp_path: Path, stored_as: str, computed_in: str, method: str
) -> None:
    """In a directory, whose norms have another dtype than the rest, and in memory; what is trained keeps its dtype."""
    model = checkpoint(tmp_path / "model", tie_word_embeddings=True)
    half = {n: t.to(getattr(torch, stored_as)) if t.is_floating_point() else t for n, t in weights(model).items()}
    half |= {name: tensor.float() for name, tensor in half.items() if name.endswith("norm.weight")}
    half["model.rotary.buffer"] = torch.full((3,), 0.1)  # a tensor that the model does not know
    save_file(half, model / "model.safetensors", {"format": "pt"})
    settings = json.loads((model / "config.json").read_text()) | {"dtype": stored_as}
    (model / "config.json").write_text(json.dumps(settings))
    expected = {
        "lrc": {name for name in half if name.endswith(FACTORS)},
        "lora": {name for name, t in half.items() if "proj" in name and t.numel() and t.is_floating_point()},
        "full": {name for name, t in half.items() if t.numel() and t.is_floating_point() and "rotary" not in name},
    }[method]
    how = SHORT | {"dtype": computed_in, "dataset": text, "learning_rate": 0.1, "max_grad_norm": 0.0}
    how |= {"max_steps": 2, "eval_steps": 0}
    finetuned(model, tmp_path / "run", method, **how)
    assert changed(model, tmp_path / "run" / "model") == expected
    assert json.loads((tmp_path / "run/model/config.json").read_text()) == settings

    memory: Any = AutoModelForCausalLM.from_pretrained(model)
    before = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    finetuned(memory, tmp_path / "memory", method, tokenizer=characters(), **how)
    assert differing(before, dict(memory.state_dict())) - {"lm_head.weight"} == expected
    saved = weights(tmp_path / "memory" / "model")
    assert differing(saved, {name: memory.state_dict()[name] for name in saved}) == set()


@pytest.mark.slow
def test_a_model_in_memory_is_given_back_as_it_was(text: str, tmp_path: Path) -> None:
    """Also after an error: only what is trained has other numbers."""

    class Broken(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise ZeroDivisionError

    def train(method: str, **settings: Any) -> None:
        model: Any = build("llama", vocab_size=98, max_position_embeddings=512)
        model.train().model.layers[0].eval()
        model.model.norm.weight.requires_grad_(False)
        model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
        state, names = {n: t.clone() for n, t in model.state_dict().items()}, [n for n, _ in model.named_modules()]
        with pytest.raises(ZeroDivisionError) if "callbacks" in settings else nullcontext():
            finetuned(model, tmp_path / method, method, tokenizer=characters(), dataset=text, **SHORT | settings)
        assert [name for name, _ in model.named_modules()] == names
        assert [module.training for module in (model, *model.model.layers)] == [True, False, True]
        assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
        assert [name for name, p in model.named_parameters() if p.grad is not None] == ["lm_head.weight"]
        assert "forward" not in model.__dict__
        assert not is_checkpointing(model)
        assert not any(module._forward_hooks for module in model.modules())
        assert model(torch.tensor([[5, 6]])).logits.dtype is torch.float32
        if "callbacks" not in settings:
            assert differing(state, dict(model.state_dict()))
        elif method == "lora":
            assert not differing(state, dict(model.state_dict()))

    for method in ("full", "lora"):
        train(method, gradient_checkpointing=True, dtype="bfloat16")
        train(method, gradient_checkpointing=True, dtype="bfloat16", callbacks=[Broken()], overwrite=True)


def test_what_is_computed_in_bfloat16_can_be_saved_unrounded(stored: Path, text: str, tmp_path: Path) -> None:
    finetuned(stored, tmp_path / "run", dataset=text, **SHORT | {"dtype": "bfloat16", "save_dtype": "float32"})
    found = weights(tmp_path / "run" / "model")
    assert {tensor.dtype for tensor in found.values() if tensor.is_floating_point()} == {torch.float32}
    for name in (name for name in found if name.endswith(FACTORS)):
        assert not torch.equal(found[name], found[name].bfloat16().float()), name
    with pytest.raises(WeLoreError, match="unknown dtype 'fp32'"):
        finetuned(stored, tmp_path / "no", dataset=text, **SHORT | {"save_dtype": "fp32"})


def test_train_norms_adds_exactly_the_norms(model: Path, text: str, tmp_path: Path) -> None:
    finetuned(model, tmp_path / "run", dataset=text, **SHORT | {"train_norms": True})
    assert changed(model, tmp_path / "run" / "model") == {
        name for name in weights(model) if name.endswith(FACTORS) or "norm" in name
    }


def test_nlrc_changes_exactly_the_dense_targeted_matrices(model: Path, text: str, tmp_path: Path) -> None:
    finetuned(model, tmp_path / "run", "nlrc", dataset=text, **SHORT)
    expected = {n for n, t in weights(model).items() if "proj.weight" in n and t.numel()}
    assert expected
    assert changed(model, tmp_path / "run" / "model") == expected


def test_full_changes_everything_that_the_text_reaches(stored: Path, text: str, tmp_path: Path) -> None:
    record = finetuned(stored, tmp_path / "run", "full", dataset=text, **SHORT)
    assert changed(stored, tmp_path / "run" / "model") == {
        n for n, t in weights(stored).items() if t.numel() and t.is_floating_point()
    }
    assert record.numbers["trainable_parameters"] == record.numbers["total_parameters"]


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_adapters_are_merged_into_an_ordinary_checkpoint(stored: Path, text: str, tmp_path: Path, method: str) -> None:
    model = stored
    record = finetuned(model, tmp_path / "run", method, dataset=text, **SHORT | {"rank": 2})
    result = tmp_path / "run" / "model"
    blocks = {n for n, t in weights(model).items() if "proj" in n and t.numel() and t.is_floating_point()}
    assert changed(model, result) == blocks  # the same tensors as before: no adapter is left
    evaluated = welore.evaluate(result, EvaluationConfig(text, 48, 4)).numbers["nll"]
    assert evaluated == pytest.approx(record.numbers["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("method", ["galore", "apollo"])
def test_projections_train_everything_with_their_optimiser(model: Path, text: str, tmp_path: Path, method: str) -> None:
    pytest.importorskip(f"{method}_torch")
    record = finetuned(model, tmp_path / "run", method, dataset=text, **SHORT | {"rank": 3, "save_steps": 4})
    state = torch.load(tmp_path / "run/checkpoints/checkpoint-4/optimizer.pt", weights_only=False)["state"]
    ranks = {value["projector"].rank for value in state.values() if "projector" in value}
    assert ranks == {3}
    assert record.numbers["trainable_parameters"] == record.numbers["total_parameters"]


def test_result_loads_and_gives_the_perplexity_that_the_record_says(model: Path, text: str, tmp_path: Path) -> None:
    record = finetuned(model, tmp_path / "run", dataset=text, **SHORT)
    evaluated = welore.evaluate(tmp_path / "run" / "model", EvaluationConfig(text, 48, 4)).numbers
    assert evaluated["perplexity"] == pytest.approx(record.numbers["eval_perplexity"], rel=1e-5)
    assert 0 < evaluated["rank_reduction"] < 1


def test_record_says_how_it_was_and_what_it_took(model: Path, text: str, tmp_path: Path) -> None:
    finetuned(model, tmp_path / "run", dataset=text, label="a", **SHORT)
    record = welore.Record.load(tmp_path / "run" / "finetune.json")
    n = record.numbers
    assert record.kind == "finetune"
    assert record.inputs["label"] == "a"
    assert record.settings["method"] == "lrc"
    assert [step for step, _ in n["train_loss"]] == [1, 2, 3, 4]
    assert [step for step, *_ in n["evaluation"]] == [0, 2, 4]
    assert n["tokens"] == 4 * 2 * 48
    assert n["timed_steps"] == 2  # the first two are warm-up
    assert n["tokens_per_second"] > 0
    assert n["tokens_per_second"] == pytest.approx(2 * 48 / n["seconds_per_step"])
    assert n["peak_memory_bytes"] > 1e8
    assert "held out" in record.inputs["split"]


@pytest.mark.slow
def test_padding_is_not_counted_as_tokens_read(model: Path, tmp_path: Path) -> None:
    from welore.evaluation.tasks import TASKS, items

    settings = SHORT | {"max_length": 400, "max_steps": 1, "batch_size": 315, "warmup_steps": 0, "eval_steps": 0}
    record = finetuned(model, tmp_path / "run", task="coin_flip", task_dataset="generated", **settings)
    read = items(TASKS["coin_flip"], "train", "generated")[:315]
    assert record.numbers["train_items"] == 315  # of 350, the last tenth is held out
    assert record.numbers["tokens"] == sum(len(item.prompt + item.completion) + 1 for item in read)


@pytest.mark.slow
def test_gradient_checkpointing_and_accumulation_give_the_same_losses(model: Path, text: str, tmp_path: Path) -> None:
    ways: list[dict[str, Any]] = [
        {},
        {"gradient_checkpointing": True},
        {"selective_checkpointing": True},
        {"batch_size": 1, "gradient_accumulation_steps": 2},
    ]
    losses = [
        [loss for _, loss in finetuned(model, tmp_path / str(i), dataset=text, **SHORT | way).numbers["train_loss"]]
        for i, way in enumerate(ways)
    ]
    assert losses[2] == losses[1] == losses[0]
    assert losses[3] == pytest.approx(losses[0], rel=1e-5)


def test_learning_rate_warms_up_and_ends_at_a_tenth(model: Path, text: str, tmp_path: Path) -> None:
    finetuned(model, tmp_path / "run", dataset=text, **SHORT | {"max_steps": 8, "warmup_steps": 2, "save_steps": 8})
    state = json.loads((tmp_path / "run/checkpoints/checkpoint-8/trainer_state.json").read_text())
    rates = [entry["learning_rate"] / 5e-3 for entry in state["log_history"] if "learning_rate" in entry]
    assert rates[:3] == pytest.approx([0, 0.5, 1])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0.1 < rates[-1] < 0.2  # the next step would be a tenth


class Kill(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", ["lrc", "lora", "dora", "galore", "apollo"])
@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_losses_and_weights(
    model: Path, text: str, tmp_path: Path, method: str
) -> None:
    if method in ("galore", "apollo"):
        pytest.importorskip(f"{method}_torch")
    settings = SHORT | {"max_steps": 7, "save_steps": 2, "rank": None if method == "lrc" else 2}
    settings["dataset"] = text
    killed = forked(lambda: finetuned(model, tmp_path / "killed", method, callbacks=[Kill()], **settings))
    assert killed.status == -signal.SIGKILL, killed.err
    assert not (tmp_path / "killed" / "finetune.json").exists()
    resumed = finetuned(model, tmp_path / "killed", method, resume=True, **settings).numbers
    whole = finetuned(model, tmp_path / "whole", method, **settings).numbers
    assert resumed["resumed_at"] == 4
    assert resumed["train_loss"] == whole["train_loss"]
    assert resumed["evaluation"] == whole["evaluation"]
    assert resumed["tokens"] == whole["tokens"]
    assert not changed(tmp_path / "whole" / "model", tmp_path / "killed" / "model")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("own_text", [False, True])
@pytest.mark.slow
def test_a_killed_run_with_a_teacher_resumes_to_the_same_losses_and_weights(
    model: Path, teacher: Path, text: str, tmp_path: Path, own_text: bool
) -> None:
    data = "self" if own_text else text
    settings = SHORT | {"max_steps": 7, "save_steps": 2, "distill": teacher, "dataset": data}
    killed = forked(lambda: finetuned(model, tmp_path / "killed", callbacks=[Kill()], **settings))
    assert killed.status == -signal.SIGKILL, killed.err
    kept = tmp_path / "killed" / "written.safetensors"
    assert kept.exists() == own_text
    before = kept.stat().st_mtime_ns if own_text else None
    resumed = finetuned(model, tmp_path / "killed", resume=True, **settings).numbers
    assert before == (kept.stat().st_mtime_ns if own_text else None)  # read, not written again
    whole = finetuned(model, tmp_path / "whole", **settings).numbers
    assert resumed["resumed_at"] == 4
    assert resumed["train_loss"] == whole["train_loss"]
    assert resumed["evaluation"] == whole["evaluation"]
    assert not changed(tmp_path / "whole" / "model", tmp_path / "killed" / "model")


def test_resuming_misses_no_tied_weights(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dense = checkpoint(tmp_path / "dense", None, "qwen2")
    settings = SHORT | {"save_steps": 2, "dataset": text}
    finetuned(dense, tmp_path / "run", "full", **settings)
    shutil.copytree(tmp_path / "run" / "model", tmp_path / "finished")
    assert "lm_head.weight" not in weights(tmp_path / "finished")
    (tmp_path / "run" / "finetune.json").unlink()  # as if killed after the last checkpoint
    enable_propagation()
    try:
        resumed = finetuned(dense, tmp_path / "run", "full", resume=True, **settings).numbers
    finally:
        disable_propagation()
    assert resumed["resumed_at"] == 4
    assert not [record.message for record in caplog.records if "missing keys" in record.message]
    assert not changed(tmp_path / "finished", tmp_path / "run" / "model")


def test_an_incomplete_checkpoint_is_passed_over(tmp_path: Path) -> None:
    from welore.training.run_dir import last_checkpoint, seal

    for step, state in ((2, "{}"), (4, '{"half'), (6, "{}"), (10, None)):
        directory = tmp_path / "checkpoints" / f"checkpoint-{step}"
        directory.mkdir(parents=True)
        (directory / "model.safetensors").write_bytes(b"weights")
        if state is not None:
            (directory / "trainer_state.json").write_text(state)
        (directory / "model.safetensors").chmod(0o600)  # as safetensors makes it
        if step in (2, 6):
            seal(directory)
            assert directory.stat().st_mode & 0o666 == (directory / "model.safetensors").stat().st_mode & 0o777
    (tmp_path / "checkpoints/checkpoint-6/model.safetensors").write_bytes(b"damaged")
    found = last_checkpoint(tmp_path)
    assert found is not None
    assert found.name == "checkpoint-2"


def test_old_run_stays_until_the_one_that_replaces_it_is_finished(
    model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, settings = tmp_path / "run", SHORT | {"dataset": text, "save_steps": 2}
    finetuned(model, out, **settings)
    before = everything(out)
    step = FinetuneTrainer.training_step

    def interrupted(trainer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(FinetuneTrainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        finetuned(model, out, overwrite=True, **settings | {"seed": 5})
    assert everything(out) == before
    assert caught.value.__notes__ == [f"the run lies in {tmp_path}/run.work: --resume goes on there"]
    monkeypatch.undo()
    checkpoint = tmp_path / "run.work/checkpoints/checkpoint-2"
    (checkpoint / "checksums.json").unlink()  # as if killed just before
    stored = (checkpoint / "optimizer.pt").read_bytes()
    for damage in (b"", stored[:-99], b"\x80\x02cos\nsystem\n(S'true'\ntR."):
        (checkpoint / "optimizer.pt").write_bytes(damage)
        with pytest.raises(WeLoreError, match="checkpoint-2 is damaged .*: delete it to go on without it"):
            finetuned(model, out, resume=True, **settings | {"seed": 5})
        (checkpoint / "checksums.json").unlink(missing_ok=True)
    (checkpoint / "optimizer.pt").write_bytes(stored)
    assert finetuned(model, out, resume=True, **settings | {"seed": 5}).numbers["resumed_at"] == 2
    assert (out / "checkpoints/checkpoint-2/checksums.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert changed(tmp_path / "run" / "model", model)
    result = everything(out)
    out.rename(tmp_path / "run.work")  # as if killed as soon as it was finished
    out.mkdir()
    for path, content in before.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with pytest.raises(WeLoreError, match="is finished"):
        finetuned(model, out, resume=True, **settings | {"seed": 5})
    assert everything(out) == result
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(model: Path, text: str, tmp_path: Path) -> None:
    common = [
        "--dataset",
        text,
        "--max-steps",
        "4",
        "--max-length",
        "48",
        "--learning-rate",
        "5e-3",
        "--warmup-steps",
        "1",
        "--eval-steps",
        "2",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += ["--no-python", str(Path(sys.executable).with_name("welore")), "finetune", str(model)]
    command += [str(tmp_path / "two"), *common, "--batch-size", "2", "--device", "cpu", "--max-eval-samples", "5"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1  # one process speaks
    two = welore.Record.load(tmp_path / "two" / "finetune.json").numbers
    one = finetuned(model, tmp_path / "one", dataset=text, **SHORT | {"batch_size": 4, "max_eval_samples": 5}).numbers
    assert two["tokens"] == one["tokens"]
    assert [loss for _, loss in two["train_loss"]] == pytest.approx([loss for _, loss in one["train_loss"]], rel=1e-5)
    assert [e[1] for e in two["evaluation"]] == pytest.approx([e[1] for e in one["evaluation"]], rel=1e-6)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_two_processes_distil_as_one_does(model: Path, teacher: Path, tmp_path: Path) -> None:
    common = [
        "--dataset",
        "self",
        "--distill",
        str(teacher),
        "--max-steps",
        "4",
        "--max-length",
        "48",
        "--learning-rate",
        "5e-3",
    ]
    common += ["--warmup-steps", "1", "--eval-steps", "2", "--max-eval-samples", "4"]
    for ended in launched(
        command("finetune", model, tmp_path / "two", *common, "--batch-size", "2", "--device", "cpu")
    ):
        assert ended.status == 0, ended.err
    two = welore.Record.load(tmp_path / "two" / "finetune.json")
    settings = SHORT | {"batch_size": 4}
    one = finetuned(model, tmp_path / "one", dataset="self", distill=teacher, **settings)
    assert two.inputs["data_sha256"] == one.inputs["data_sha256"]
    for losses in ("train_loss", "evaluation"):
        values = [[entry[1] for entry in run.numbers[losses]] for run in (two, one)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert two.numbers["teacher_eval_loss"] == pytest.approx(one.numbers["teacher_eval_loss"], rel=1e-6)


def test_a_plan_makes_the_control_on_the_dense_model(dense: Path, text: str, tmp_path: Path) -> None:
    spectra = welore.analyze(dense)
    plan = allocate(spectra, rank_reduction=0.4, min_ratio=0.3)
    finetuned(dense, tmp_path / "run", dataset=text, plan=plan, **SHORT)
    assert changed(dense, tmp_path / "run" / "model") == {f"{name}.weight" for name in plan.ranks}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.slow
def test_a_distilled_model_comes_closer_to_its_teacher_by_the_factors_alone(
    stored: Path, teacher: Path, text: str, tmp_path: Path, dtype: str
) -> None:
    steps = 40 if stored.name == "split" else 12  # a larger model than its teacher has further to go
    record = finetuned(
        stored, tmp_path / "run", dataset=text, distill=teacher, **SHORT | {"max_steps": steps, "dtype": dtype}
    )
    n = record.numbers
    losses = [loss for _, loss in n["train_loss"]]
    assert losses[-1] < 0.9 * losses[0]
    if dtype == "float32":
        assert changed(stored, tmp_path / "run" / "model") == {w for w in weights(stored) if w.endswith(FACTORS)}
    assert n["logits_in_pieces"]
    assert n["trains"] == "the factors of the LRCs"
    assert record.settings["distill"] == str(teacher)
    assert (record.settings["distill_weight"], record.settings["distill_temperature"]) == (1.0, 1.0)


def test_record_says_what_the_teacher_costs_and_what_it_reaches(
    model: Path, dense: Path, text: str, tmp_path: Path
) -> None:
    record = finetuned(model, tmp_path / "run", dataset=text, distill=dense, **SHORT)
    n, held = record.numbers, welore.evaluate(dense, EvaluationConfig(text, 48, 4)).numbers["nll"]
    assert n["teacher_eval_loss"] == pytest.approx(held, rel=1e-5)
    assert record.inputs["teacher_fingerprint"] != record.inputs["model_fingerprint"]
    teachers, factored = weights(dense), {name for name in weights(model) if name.endswith(".weight")}
    apart = [t for name, t in teachers.items() if name in factored and not weights(model)[name].numel()]
    assert apart
    assert n["teacher_bytes"] == 4 * sum(t.numel() for t in apart)  # the rest is the model's own
    assert n["teacher_parameters"] == sum(t.numel() for t in teachers.values())


@pytest.mark.parametrize("method", ["nlrc", "full", "lora"])
def test_every_method_can_be_distilled(model: Path, teacher: Path, text: str, tmp_path: Path, method: str) -> None:
    settings = SHORT | {"max_steps": 8, "rank": 2 if method == "lora" else None}
    losses = finetuned(model, tmp_path / "run", method, dataset=text, distill=teacher, **settings).numbers["train_loss"]
    assert losses[-1][1] < losses[0][1]


@pytest.mark.slow
def test_distilling_has_the_same_losses_however_the_step_is_computed(
    model: Path, teacher: Path, text: str, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"distill_weight": 0.6, "distill_temperature": 1.5, "distill": teacher, "dataset": text}
    ways: list[dict[str, Any]] = [
        {},
        {"gradient_checkpointing": True},
        {"batch_size": 1, "gradient_accumulation_steps": 2},
    ]
    losses = [
        [loss for _, loss in finetuned(model, tmp_path / str(i), **SHORT | how | way).numbers["train_loss"]]
        for i, way in enumerate([*ways, {"whole_logits": True}])
    ]
    assert losses[1] == losses[0]
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
    assert losses[3] == pytest.approx(losses[0], rel=1e-5)


def test_questions_are_distilled_on_their_answers(model: Path, teacher: Path, tmp_path: Path) -> None:
    settings = SHORT | {"max_length": 200, "max_steps": 8}
    record = finetuned(model, tmp_path / "run", task="coin_flip", task_dataset="generated", distill=teacher, **settings)
    assert record.numbers["train_loss"][-1][1] < record.numbers["train_loss"][0][1]


def test_the_teacher_writes_what_the_steps_read_and_a_tenth_more(model: Path, dense: Path, tmp_path: Path) -> None:
    from welore.data.windows import given_windows

    record = finetuned(model, tmp_path / "run", dataset="self", distill=dense, **SHORT)
    windows = given_windows(tmp_path / "run" / "written.safetensors")
    assert windows.shape == (9, 48)  # 4 steps of 2, and one held out
    assert record.inputs["split"] == "the teacher's own text: the first 1 of 9 blocks are held out"
    assert record.numbers["train_blocks"] == 8

    settings = SHORT | {"self_tokens": 100, "seed": 1}
    record = finetuned(model, tmp_path / "less", dataset="self", distill=dense, **settings)
    less = given_windows(tmp_path / "less" / "written.safetensors")
    assert less.shape == (3, 48)
    assert record.numbers["tokens"] == 4 * 2 * 48  # read again and again
    assert not torch.equal(less[0], windows[0])


@pytest.mark.slow
def test_what_a_teacher_wrote_is_read_by_another_run(model: Path, dense: Path, text: str, tmp_path: Path) -> None:
    first = finetuned(model, tmp_path / "first", dataset="self", distill=dense, **SHORT)
    written = tmp_path / "first/written.safetensors"
    second = finetuned(model, tmp_path / "second", dataset=str(written), distill=dense, **SHORT)
    assert second.numbers["train_loss"] == first.numbers["train_loss"]
    assert second.inputs["data_sha256"] == first.inputs["data_sha256"]
    finetuned(model, tmp_path / "alone", dataset=str(written), **SHORT)  # as any other text

    other = tmp_path / "other.safetensors"
    save_file({"windows": torch.full((4, 48), 10**6)}, other)
    flat = tmp_path / "flat.safetensors"
    save_file({"windows": torch.full((48,), 1)}, flat)
    cases = [
        ({"dataset": str(flat)}, r"is a tensor of shape \(48,\): give token ids"),
        ({"dataset": str(written), "max_length": 32}, "has windows of 48 tokens, not of 32"),
        ({"dataset": str(other)}, "tokenizer is another model's: it gives token 1000000, this model knows 98"),
        ({"dataset": str(dense / "model.safetensors")}, "is no file of windows"),
        ({"dataset": "nowhere.safetensors"}, "is no file of windows"),
    ]
    for settings, message in cases:
        with pytest.raises(WeLoreError, match=message):
            finetuned(model, tmp_path / "run", **SHORT | settings)
        assert not (tmp_path / "run").exists()


def test_attention_can_be_computed_in_another_way(model: Path, text: str, tmp_path: Path) -> None:
    usual, eager = (
        finetuned(model, tmp_path / str(way), dataset=text, attention=way, **SHORT).numbers for way in (None, "eager")
    )
    assert [loss for _, loss in eager["train_loss"]] == pytest.approx(
        [loss for _, loss in usual["train_loss"]], rel=1e-4
    )
    configs = [json.loads((tmp_path / way / "model/config.json").read_text()) for way in ("None", "eager")]
    assert configs[0] == configs[1]  # a matter of the run, not of the model
    with pytest.raises(WeLoreError, match="cannot be loaded: .*eagle"):
        finetuned(model, tmp_path / "run", dataset=text, attention="eagle", **SHORT)
    assert not (tmp_path / "run").exists()


def test_impossible_teachers_are_refused_before_anything_is_written(
    model: Path, dense: Path, text: str, tmp_path: Path
) -> None:
    short = shutil.copytree(dense, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32}))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"distill": model}, "is its own teacher and has nothing to learn"),
        ({"distill": short}, "length is 48: this model reads at most 32 tokens"),
        ({"distill": tmp_path / "none"}, "none is neither a model directory"),
        ({"distill": dense, "distill_weight": 0.0}, "distill_weight is 0.0"),
        ({"distill": dense, "distill_weight": 1.5}, "distill_weight is 1.5"),
        ({"distill": dense, "distill_temperature": 0.0}, "distill_temperature is 0.0"),
        ({"distill_weight": 0.5}, "go with distill"),
        ({"distill_temperature": 2.0}, "go with distill"),
        ({"dataset": "self"}, "name the teacher by distill"),
        ({"distill": dense, "self_tokens": 100}, "self_tokens goes with dataset self"),
        ({"distill": dense, "dataset": "self", "self_tokens": 48}, "two blocks of 48 tokens are needed"),
    ]
    for settings, message in cases:
        with pytest.raises(WeLoreError, match=message):
            finetuned(model, tmp_path / "run", **SHORT | {"dataset": text} | settings)
        assert not (tmp_path / "run").exists()
    finetuned(model, tmp_path / "run", dataset=text, distill=model, distill_weight=0.5, **SHORT)


def test_another_teacher_is_another_run(model: Path, dense: Path, text: str, tmp_path: Path) -> None:
    finetuned(model, tmp_path / "run", dataset=text, distill=dense, **SHORT)
    (tmp_path / "run" / "finetune.json").unlink()
    again = {"dataset": text, "resume": True} | SHORT
    with pytest.raises(WeLoreError, match="holds another run: its distill is .* now it is None"):
        finetuned(model, tmp_path / "run", **again)
    with pytest.raises(WeLoreError, match="its distill_temperature is 1.0, now it is 2.0"):
        finetuned(model, tmp_path / "run", distill=dense, distill_temperature=2.0, **again)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "lcr"}, "unknown method 'lcr'; did you mean 'lrc'"),
        ({"dtype": "bf16"}, "unknown dtype 'bf16'"),
        ({"optimizer": "adam"}, "unknown optimizer 'adam'"),
        ({"dtype": "float16"}, "float16 is trained on a GPU only"),
        ({"report_to": "tensorbord"}, "did you mean 'tensorboard'"),
        ({"task": "coin_flip"}, "give dataset or task, one of them"),
        ({"dataset": None}, "give dataset or task, one of them"),
        ({"dataset": None, "task": "coinflip"}, "did you mean 'coin_flip'"),
        ({"loss_on_prompt": True}, "loss_on_prompt goes with .* is a text"),
        ({"packing": True, "eval_dataset": [{"text": "a"}]}, "packing and eval_dataset go with .* is a text"),
        ({"max_steps": None, "num_train_epochs": 2}, "num_train_epochs goes with .* is a text: give max_steps"),
        ({"max_steps": None, "num_train_epochs": 2, "dataset": "no.txt"}, "no.txt does not exist"),
        ({"max_steps": None, "num_train_epochs": 2, "dataset": "pydok"}, "did you mean 'pydoc'"),
        ({"dataset": torch.ones(4, 8, dtype=torch.long), "packing": True}, "packing goes with .* windows of tokens"),
        ({"dataset": "self", "distill": "x", "eval_split": "test"}, "eval_split goes with .* self is a text"),
        ({"dataset": None, "task": "coin_flip", "eval_dataset": "a.jsonl"}, "eval_dataset goes with .* own questions"),
        ({"max_steps": None, "num_train_epochs": 0}, "num_train_epochs is 0: it must be a number, above 0"),
        ({"num_train_epochs": 2}, "give max_steps or num_train_epochs, not both"),
        ({"max_steps": None, "dataset": "self", "distill": "x", "num_train_epochs": 1}, "give self_tokens"),
        ({"method": "full", "train_norms": True}, "train_norms goes with lrc and nlrc"),
        ({"rank": 4}, "rank goes with lora, rslora, dora, updates, galore, apollo"),
        ({"gradient_checkpointing": True, "selective_checkpointing": True}, "not both"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"seed": -1}, "seed is -1: it must be a whole number from 0 to 4294967295"),
        ({"warmup_steps": 4}, "warmup_steps is 4: it must be less than the 4 steps"),
        ({"eval_steps": -1}, "eval_steps is -1"),
        ({"max_length": 513}, "reads at most 512 tokens"),
        ({"max_length": 20_000, "dataset": "nowhere.txt"}, "reads at most 512"),
        ({"dataset": "nowhere.txt"}, "nowhere.txt does not exist"),
        ({"dataset": "pydok"}, "did you mean 'pydoc'"),
        ({"resume": True}, "holds no run that could be resumed"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(
    model: Path, text: str, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(WeLoreError, match=message):
        finetuned(model, tmp_path / "run", **SHORT | {"dataset": text} | settings)
    assert not (tmp_path / "run").exists()


def test_tokens_that_the_embedding_does_not_have_are_refused_and_padding_is_never_read(tmp_path: Path) -> None:
    tokenizer, questions = (
        characters(),
        {"task": "coin_flip", "task_dataset": "generated"} | SHORT | {"max_length": 300},
    )
    model, words = build("llama", vocab_size=90, max_position_embeddings=512), ["the quick brown fox xyz " * 40] * 9
    for data in (questions, SHORT | {"dataset": words}):
        with pytest.raises(WeLoreError, match="tokenizer is another model's: it gives token 9., this model knows 90"):
            finetuned(model, tmp_path / "run", "full", tokenizer=tokenizer, **data)
        assert not (tmp_path / "run").exists()
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    model = build("llama", vocab_size=98, max_position_embeddings=512)
    finetuned(model, tmp_path / "run", "full", tokenizer=tokenizer, **questions)


def test_a_method_with_nothing_to_train_is_refused(dense: Path, model: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(WeLoreError, match="lrc has nothing to train: this model has no low-rank matrices"):
        finetuned(dense, tmp_path / "run", dataset=text, **SHORT)
    plan = allocate(welore.analyze(dense), strategy="uniform", rank_reduction=0.6)
    compress(dense, tmp_path / "all", plan=plan)
    with pytest.raises(WeLoreError, match="nlrc has nothing to train: every targeted matrix"):
        finetuned(tmp_path / "all", tmp_path / "run", "nlrc", dataset=text, **SHORT)
    with pytest.raises(WeLoreError, match="this model is compressed already"):
        finetuned(model, tmp_path / "run", dataset=text, plan=plan, **SHORT)
    assert not (tmp_path / "run").exists()


def test_run_on_a_model_whose_configuration_has_changed_is_not_resumed(model: Path, text: str, tmp_path: Path) -> None:
    small, out = shutil.copytree(model, tmp_path / "small"), tmp_path / "run"
    finetuned(small, out, dataset=text, **SHORT)
    (out / "finetune.json").unlink()
    run = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({name: run[name] for name in run if name != "model_settings_sha256"}))
    finetuned(small, out, dataset=text, resume=True, **SHORT)  # a run of version 0.1 goes on
    (out / "finetune.json").unlink()
    (out / "run.json").write_text(json.dumps(run))
    content = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(content | {"rms_norm_eps": 0.5}))
    with pytest.raises(WeLoreError, match="holds another run: its model_settings_sha256 is"):
        finetuned(small, out, dataset=text, resume=True, **SHORT)


def test_missing_packages_are_named(model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("welore.training.methods.importlib.util.find_spec", lambda name: None)
    with pytest.raises(WeLoreError, match=r"galore needs galore_torch, bitsandbytes: pip install 'welore\[galore\]'"):
        finetuned(model, tmp_path / "run", "galore", dataset=text, **SHORT)


def test_weights_that_dora_reads_are_not_streamed(model: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(WeLoreError, match="method dora reads the frozen weights at every step: leave stream_weights"):
        finetuned(model, tmp_path / "run", "dora", dataset=text, **SHORT | {"stream_weights": True})


def test_another_run_is_not_resumed_and_a_finished_one_not_overwritten(model: Path, text: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    finetuned(model, out, dataset=text, **SHORT)
    with pytest.raises(WeLoreError, match="exists already"):
        finetuned(model, out, dataset=text, **SHORT)
    with pytest.raises(WeLoreError, match="is finished"):
        finetuned(model, out, dataset=text, resume=True, **SHORT)
    (out / "finetune.json").unlink()
    with pytest.raises(WeLoreError, match="holds an unfinished run: give resume to go on with it"):
        finetuned(model, out, dataset=text, **SHORT)
    with pytest.raises(WeLoreError, match="holds another run: its learning_rate is 0.005, now it is 0.001"):
        finetuned(model, out, dataset=text, resume=True, **SHORT | {"learning_rate": 1e-3})
    with pytest.raises(WeLoreError, match="resume or overwrite, not both"):
        finetuned(model, out, dataset=text, resume=True, overwrite=True, **SHORT)
    assert (out / "model").is_dir()
    finetuned(model, out, dataset=text, overwrite=True, **SHORT)
    with pytest.raises(WeLoreError, match="is or holds .*, which is read"):
        finetuned(out / "model", out, dataset=text, overwrite=True, **SHORT)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [(1e38, "training loss is inf at step 1"), (math.inf, r"model\.norm\.weight holds NaN or Inf: the checkpoint is")],
)
def test_a_loss_that_is_not_a_number_stops_the_run(
    dense: Path, text: str, tmp_path: Path, value: float, sentence: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense)
    with torch.no_grad():
        model.model.norm.weight.fill_(value)
    model.save_pretrained(tmp_path / "broken")
    characters().save_pretrained(tmp_path / "broken")
    with pytest.raises(WeLoreError, match=sentence):
        finetuned(tmp_path / "broken", tmp_path / "run", "full", dataset=text, **SHORT | {"eval_steps": 0})
    assert (tmp_path / "run").exists() == math.isfinite(value)  # damage is seen before anything is written


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_is_gone_after_its_training_mixes_with_nothing(text: str, tmp_path: Path, dtype: str) -> None:
    model = checkpoint(tmp_path / "model")
    before = weights(model)

    class Remove(TrainerCallback):
        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            (model / "model.safetensors").unlink()

    how = SHORT | {"dataset": text, "dtype": dtype, "max_steps": 2, "eval_steps": 0, "callbacks": [Remove()]}
    if dtype == "float32":  # nothing was rounded, so that memory has it all
        finetuned(model, tmp_path / "run", **how)
        factors = {name for name in before if name.endswith(FACTORS)}
        assert differing(before, weights(tmp_path / "run" / "model")) == factors
    else:
        with pytest.raises(WeLoreError, match="was changed while its model was trained: put it back and resume"):
            finetuned(model, tmp_path / "run", **how)


def test_weights_that_are_no_numbers_after_the_last_step_are_no_result(dense: Path, text: str, tmp_path: Path) -> None:
    """The last step has no loss after it, if nothing is evaluated."""
    how = SHORT | {"max_steps": 1, "warmup_steps": 0, "eval_steps": 0, "learning_rate": 1e38}
    with pytest.raises(WeLoreError, match="has become NaN or too large for float32: try a smaller learning_rate"):
        finetuned(dense, tmp_path / "run", "full", dataset=text, weight_decay=1e30, **how)
    assert not (tmp_path / "run" / "model").exists()


def test_an_interrupted_run_shows_no_result(model: Path, text: str, tmp_path: Path) -> None:
    def impatient(items: Any, label: str, total: float) -> Any:
        for item, _ in items:
            if item == 2:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        finetuned(model, tmp_path / "run", dataset=text, progress=impatient, **SHORT)
    assert not (tmp_path / "run" / "finetune.json").exists()
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("method", ["lrc", "lora"])
def test_half_precision_reads_the_weights_of_every_step(model: Path, text: str, method: str, tmp_path: Path) -> None:
    """autocast keeps casted weights until its outermost region ends: none may be open around the training."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        settings = SHORT | {"dtype": dtype, "learning_rate": 1e-2, "eval_steps": 2}
        record = finetuned(model, tmp_path / dtype, method, dataset=text, **settings)
        losses[dtype] = [loss for _, loss, _ in record.numbers["evaluation"]]
    assert losses["float32"][0] - losses["float32"][-1] > 0.05
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.02)
