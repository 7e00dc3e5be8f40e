"""Stock tasks of lm-eval on a checkpoint, offline: a small task of our own in lm-eval's format."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import welore
from conftest import Command
from toys import characters, checkpoint
from welore.errors import WeLoreError
from welore.evaluation.lm_eval import SETS, evaluate_tasks

ABSENT = importlib.util.find_spec("lm_eval") is None
needs_lm_eval = pytest.mark.skipif(ABSENT, reason="lm-eval is absent: pip install -e '.[eval]'")
needs_lm_eval_warnings = pytest.mark.filterwarnings("ignore")  # its dependencies', at import

TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 3.0}}
"""
QUESTIONS = [{"question": f"{n} + 1 =", "choices": [str(n), str(n + 1), "?"], "answer": n % 3} for n in range(7)]


@pytest.fixture
def tasks_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "tasks"
    directory.mkdir()
    lines = tmp_path / "sums.jsonl"
    lines.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (directory / "sums.yaml").write_text(TASK.format(file=lines))
    return directory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "model")


def best_choices(directory: Path) -> list[int]:
    """By hand: the choice of the largest log-likelihood after the question."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), characters()
    found = []
    for q in QUESTIONS:
        scores = []
        for choice in q["choices"]:  # type: ignore[attr-defined]
            prompt, answer = tokenizer(q["question"]).input_ids, tokenizer(f" {choice}").input_ids
            with torch.inference_mode():
                logs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            scores.append(sum(float(logs[len(prompt) + i - 1, token]) for i, token in enumerate(answer)))
        found.append(scores.index(max(scores)))
    return found


@needs_lm_eval
@needs_lm_eval_warnings
def test_a_task_of_lm_eval_gives_the_accuracy_found_by_hand(model: Path, tasks_dir: Path) -> None:
    best = best_choices(model)
    record = evaluate_tasks(model, ["sums"], tasks_dir=tasks_dir, batch_size=2, label="a")
    found = record.numbers["tasks"]["sums"]
    right = [choice == question["answer"] for choice, question in zip(best, QUESTIONS, strict=True)]
    assert record.kind == "lm_eval"
    assert found["metrics"]["acc"] == pytest.approx(sum(right) / len(right))
    assert (found["n"], found["version"]) == (7, 3.0)
    assert record.inputs["label"] == "a"
    assert 0 < record.numbers["rank_reduction"] < 1
    first = evaluate_tasks(model, ["sums"], tasks_dir=tasks_dir, limit=3).numbers["tasks"]["sums"]
    assert first["n"] == 3
    assert first["metrics"]["acc"] == pytest.approx(sum(right[:3]) / 3)


@needs_lm_eval
@needs_lm_eval_warnings
@pytest.mark.slow
def test_results_are_those_of_the_command_of_lm_eval_on_the_merged_model(
    model: Path, tasks_dir: Path, tmp_path: Path
) -> None:
    welore.merge(model, tmp_path / "merged", progress=False)
    arguments = f"pretrained={tmp_path / 'merged'},dtype=float32"
    options = ["--model_args", arguments, "--tasks", "sums", "--include_path", tasks_dir, "--output_path", tmp_path]
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "1", *options]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    (path,) = tmp_path.glob("*/results_*.json")
    theirs = json.loads(path.read_text("utf-8"))["results"]["sums"]
    for directory in (model, tmp_path / "merged"):
        ours = evaluate_tasks(directory, ["sums"], tasks_dir=tasks_dir, dtype="float32").numbers["tasks"]["sums"]
        assert ours["metrics"]["acc"] == theirs["acc,none"]


@needs_lm_eval
@needs_lm_eval_warnings
@pytest.mark.slow
def test_lm_eval_knows_the_tasks_of_our_sets() -> None:
    from lm_eval.tasks import TaskManager

    assert set().union(*SETS.values(), ["gsm8k"]) <= set(TaskManager().all_tasks)


def test_a_set_stands_for_its_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def manager(tasks: list[str], directory: str | None) -> None:
        asked.append(tasks)
        raise WeLoreError("enough")

    monkeypatch.setattr("welore.evaluation.lm_eval.importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr("welore.evaluation.lm_eval._task_manager", manager)
    with pytest.raises(WeLoreError, match="enough"):
        evaluate_tasks("nowhere", ["gsm8k", "zero-shot", "piqa"])
    assert asked == [["gsm8k", *SETS["zero-shot"]]]


@needs_lm_eval
@needs_lm_eval_warnings
def test_command_prints_a_line_for_a_task_and_writes_the_record(
    command: Command, model: Path, tasks_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.lm_eval.json"
    answer = command("evaluate", model, "--lm-eval", "sums", "--tasks-dir", tasks_dir, "--limit", 5, "-o", out)
    assert (answer.status, answer.err) == (0, "")
    assert answer.out.startswith("sums: acc ")
    assert "(n 5)" in answer.out
    assert answer.out.count("\n") == 1
    assert welore.Record.load(out).settings["limit"] == 5


@needs_lm_eval
@needs_lm_eval_warnings
def test_an_unknown_task_is_answered_with_the_nearest(model: Path, tasks_dir: Path) -> None:
    with pytest.raises(WeLoreError, match="unknown lm-eval task 'sum'; did you mean 'sums'\\? \\(1 are known\\)"):
        evaluate_tasks(model, ["sum"], tasks_dir=tasks_dir)
    with pytest.raises(WeLoreError, match="no task is named"):
        evaluate_tasks(model, [], tasks_dir=tasks_dir)
    with pytest.raises(WeLoreError, match="nowhere is not a directory"):
        evaluate_tasks(model, ["sums"], tasks_dir="nowhere")
    with pytest.raises(WeLoreError, match="limit is 0"):
        evaluate_tasks(model, ["sums"], tasks_dir=tasks_dir, limit=0)


@needs_lm_eval
@needs_lm_eval_warnings
def test_data_that_cannot_be_read_are_one_sentence(model: Path, tasks_dir: Path) -> None:
    (tasks_dir.parent / "sums.jsonl").unlink()
    with pytest.raises(WeLoreError, match="the data of sums cannot be read"):
        evaluate_tasks(model, ["sums"], tasks_dir=tasks_dir)


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("welore.evaluation.lm_eval.importlib.util.find_spec", lambda name: None)
    with pytest.raises(WeLoreError, match=r"need the package lm-eval: pip install 'welore\[eval\]'"):
        evaluate_tasks("nowhere", ["boolq"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lm-eval", "boolq", "--dataset", "pydoc"], "give --dataset or --lm-eval, not both"),
        (["--lm-eval", "boolq", "--num-windows", "3"], "--num-windows and --bos go with --dataset"),
        (["--lm-eval", "boolq", "--bos", "never"], "--num-windows and --bos go with --dataset"),
        (["--lm-eval", "boolq", "--against", "dense"], "--against and --save-logprobs go with --dataset"),
        (["--limit", "3"], "--limit and --tasks-dir go with --lm-eval"),
        (["--tasks-dir", "x"], "--limit and --tasks-dir go with --lm-eval"),
    ],
)
def test_options_of_the_other_kind_are_refused(refused: Callable[..., str], options: list[str], message: str) -> None:
    assert message in refused("evaluate", "nowhere", *options)
