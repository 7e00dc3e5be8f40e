"""A fine-tuning run that is killed goes on with another number of processes, at the right place in the data."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import welore
from processes import Ended, command, forked, launched
from toys import checkpoint, finetuned, weights
from welore.errors import WeLoreError
from welore.training.run_dir import read_checkpoint
from welore.training.trainer import FinetuneTrainer

STEPS, READ = 5, 4  # sequences that a step reads
ROWS = [{"prompt": f"{n} and one is", "completion": f" {'1' * (n % 7)}{n + 1}."} for n in range(30)]
COMMON: dict[str, Any] = {"max_steps": STEPS, "max_length": 64, "learning_rate": 5e-3, "warmup_steps": 1}
COMMON |= {"eval_steps": 5, "max_eval_samples": 3, "save_steps": 2, "dataset": ROWS}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("models") / "compressed")


class Kill(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def train(model: Path, out: Path, processes: int, *, log: Path | None = None, **settings: Any) -> list[Ended]:
    """A run in so many new processes, which write down the tokens that they read: a line for each sequence."""

    def work() -> None:
        if log is not None:
            step = FinetuneTrainer.training_step

            def watched(trainer: Any, net: Any, inputs: Any, *rest: Any) -> torch.Tensor:
                with log.open("a") as file:
                    for ids, labels in zip(inputs["input_ids"].tolist(), inputs["labels"].tolist(), strict=True):
                        learned = [i for i, label in zip(ids, labels, strict=True) if label >= 0]
                        file.write(json.dumps([trainer.state.global_step, learned]) + "\n")
                return step(trainer, net, inputs, *rest)

            FinetuneTrainer.training_step = watched  # type: ignore[method-assign]
        finetuned(model, out, **COMMON | {"batch_size": READ // processes} | settings)

    return launched(work) if processes == 2 else [forked(work)]


def sequences(log: Path) -> list[list[Any]]:
    return sorted(json.loads(line) for line in log.read_text().splitlines())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_killed_run_goes_on_with_another_number_of_processes(
    model: Path, tmp_path: Path, first: int, then: int
) -> None:
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    for ended in train(model, run, first, log=tmp_path / "before", callbacks=[Kill()]):
        assert ended.status == -signal.SIGKILL, ended.err
    assert (run / "checkpoints" / "checkpoint-2" / "checksums.json").is_file()
    for ended in train(model, run, then, log=tmp_path / "after", resume=True):
        assert ended.status == 0, ended.err
    for ended in train(model, undisturbed, 1, log=tmp_path / "all"):
        assert ended.status == 0, ended.err
    before, after, everything = (sequences(tmp_path / name) for name in ("before", "after", "all"))
    assert [line for line in before if line[0] < 2] + after == everything
    assert len(everything) == STEPS * READ == len({tuple(learned) for _, learned in everything})
    resumed, whole = (welore.Record.load(out / "finetune.json") for out in (run, undisturbed))
    assert (resumed.numbers["resumed_at"], resumed.settings["processes"]) == (2, then)
    assert resumed.numbers["tokens"] == whole.numbers["tokens"]
    for losses in ("train_loss", "evaluation"):
        values = [[entry[1] for entry in record.numbers[losses]][-3:] for record in (resumed, whole)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)
    states = [torch.load(out / "checkpoints" / "checkpoint-4" / "optimizer.pt")["state"] for out in (run, undisturbed)]
    assert states[0].keys() == states[1].keys() != set()
    for number, state in states[1].items():
        for name, tensor in state.items():
            torch.testing.assert_close(states[0][number][name], tensor, rtol=1e-3, atol=1e-7)
    expected, tuned = weights(undisturbed / "model"), weights(run / "model")
    for name, tensor in expected.items():
        torch.testing.assert_close(tuned[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.usefixtures("one_thread")
def test_experts_that_tokens_of_one_process_alone_choose_are_trained(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "mixture", 0.4, "qwen3_moe", num_experts=16, moe_intermediate_size=40)
    rows = [{"prompt": letter, "completion": letter} for letter in "abcdefghijklmnop"]
    settings: dict[str, Any] = {"max_steps": 2, "dataset": rows, "optimizer": "sgd"}
    for name, processes in (("two", 2), ("one", 1)):
        for ended in train(model, tmp_path / name, processes, **settings):
            assert ended.status == 0, ended.err
    expected, tuned = weights(tmp_path / "one" / "model"), weights(tmp_path / "two" / "model")
    for name, tensor in expected.items():
        torch.testing.assert_close(tuned[name], tensor, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.usefixtures("one_thread")
def test_what_would_read_other_sequences_is_refused_once_by_all_processes(model: Path, tmp_path: Path) -> None:
    run, rows = tmp_path / "run", tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (ended,) = train(model, run, 1, callbacks=[Kill()], dataset=str(rows), cache_dir=tmp_path)
    assert ended.status == -signal.SIGKILL, ended.err
    words = ["finetune", model, run, "--resume", "--batch-size", 3, "--device", "cpu", "--cache-dir", tmp_path]
    for name, value in (COMMON | {"dataset": rows}).items():
        words += ["--" + name.replace("_", "-"), value]
    sentences = []
    for ended in launched(command(*words)):
        assert ended.status == 2, ended.err
        sentences += [line for line in ended.err.splitlines() if line.startswith("welore: ")]
    assert sentences == [
        f"welore: {run} holds a run that reads 4 sequences in a step, now it would read 6: choose batch_size and "
        "gradient_accumulation_steps whose product with the number of processes (2) is 4"
    ]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_checkpoint_of_fsdp_is_read_under_fsdp_alone(tmp_path: Path, sharded: bool) -> None:
    (tmp_path / ("pytorch_model_fsdp_0" if sharded else "model.safetensors")).touch()
    with read_checkpoint(tmp_path, sharded=sharded):
        pass
    word = "with" if sharded else "without"
    refusal = pytest.raises(WeLoreError, match=f"was written {word} FSDP: resume the run {word} FSDP, too")
    with refusal, read_checkpoint(tmp_path, sharded=not sharded):
        pass
