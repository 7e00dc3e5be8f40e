"""`welore finetune` and `welore score`: what they print and write, and what they refuse."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import welore
from conftest import Command, done, everything
from toys import checkpoint

Refused = Callable[..., str]
QUICK = ("--max-steps", 2, "--batch-size", 1, "--max-length", 32, "--max-eval-samples", 2, "--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("models") / "compressed")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("models") / "dense", rank_reduction=None)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(" ".join(f"The number after {n} is {n + 1}." for n in range(60)))
    return tmp_path / "text.txt"


def coins(path: Path, count: int = 20, **changes: Any) -> Path:
    """A file of coin-flip questions; `changes` replace fields of the third one."""
    records = [{"question": f"{n} people flip a coin. Heads?", "answer": ("yes", "no")[n % 2]} for n in range(count)]
    if count > 2:
        records[2] = {name: value for name, value in (records[2] | changes).items() if value is not None}
    path.write_text(json.dumps({"examples": records}))
    return path


# --- what they do -----------------------------------------------------------------------------------------------------


def test_finetune_prints_one_line_and_writes_a_model_that_can_be_scored(
    command: Command, model: Path, text: Path, tmp_path: Path
) -> None:
    line = done(command("finetune", model, tmp_path / "run", "--dataset", text, "--label", "a", *QUICK))
    record = welore.Record.load(tmp_path / "run" / "finetune.json")
    n = record.numbers
    assert f"lrc: {n['trainable_parameters']:,} of {n['total_parameters']:,} parameters trained" in line
    assert f"held-out perplexity {n['eval_perplexity']:.4g}" in line
    assert str(tmp_path / "run" / "model") in line
    assert n["evaluation"][-1][0] == 2  # the last step is evaluated, whatever --eval-steps

    scored = tmp_path / "a.score.json"
    arguments = ("--task", "coin_flip", "--dataset", "generated", "--limit", 4, "--label", "a", "-o", scored)
    line = done(command("score", tmp_path / "run" / "model", *arguments))
    score = welore.Record.load(scored).numbers
    assert f"accuracy {score['accuracy']:.1%} on coin_flip (n = 4, 95 % interval" in line
    assert f"{score['unparsable']} without an answer" in line
    assert f"ERR {score['rank_reduction']:.1%}" in line


def test_a_distilled_run_says_what_its_teacher_reaches(
    command: Command, model: Path, dense: Path, text: Path, tmp_path: Path
) -> None:
    line = done(command("finetune", model, tmp_path / "run", "--dataset", text, "--distill", dense, *QUICK))
    n = welore.Record.load(tmp_path / "run" / "finetune.json").numbers
    reached = math.exp(n["teacher_eval_loss"])
    assert f"held-out perplexity {n['eval_perplexity']:.4g} (teacher {reached:.4g}), " in line


def test_json_is_the_record(command: Command, model: Path, text: Path, tmp_path: Path) -> None:
    facts = json.loads(done(command("finetune", model, tmp_path / "run", "--dataset", text, *QUICK, "--json")))
    assert facts == json.loads((tmp_path / "run" / "finetune.json").read_text())
    scored = tmp_path / "a.score.json"
    (tmp_path / "c.yaml").write_text("dataset: generated\nlimit: 2\n")  # which goes with the task
    arguments = ("--task", "coin_flip", "--config", tmp_path / "c.yaml", "-o", scored, "--json")
    assert json.loads(done(command("score", model, *arguments))) == json.loads(scored.read_text())


def test_a_sequence_longer_than_the_block_is_counted_and_said(command: Command, model: Path, tmp_path: Path) -> None:
    file = coins(tmp_path / "coin_flip.json", question="a long coin " * 60)
    answer = command(
        "finetune",
        model,
        tmp_path / "run",
        "--task",
        "coin_flip",
        "--task-dataset",
        file,
        *QUICK[:4],
        "--max-length",
        90,
    )
    assert answer.status == 0
    assert "1 items were longer than 90 tokens: their prompts lost the beginning" in answer.err
    assert welore.Record.load(tmp_path / "run" / "finetune.json").numbers["items_cut"] == 1

    file = coins(tmp_path / "long.json", 4, question="a long coin " * 60)
    answer = command("score", model, "--task", "coin_flip", "--dataset", file, "-o", tmp_path / "a.score.json")
    assert answer.status == 0
    assert "1 prompts were longer than the model's context and lost their beginning" in answer.err
    assert welore.Record.load(tmp_path / "a.score.json").numbers["truncated"] == 1


# --- what they refuse: one sentence, exit status 2, nothing changed ---------------------------------------------------


def test_a_missing_field_names_file_record_and_field(refused: Refused, model: Path, tmp_path: Path) -> None:
    file = coins(tmp_path / "coin_flip.json", answer=None)
    named = f"{file}, record 3: field 'answer' is missing"
    assert named in refused("finetune", model, tmp_path / "run", "--task", "coin_flip", "--task-dataset", file, *QUICK)
    assert named in refused("score", model, "--task", "coin_flip", "--dataset", file, "-o", tmp_path / "a.score.json")


def test_an_empty_data_set_is_refused(refused: Refused, model: Path, tmp_path: Path) -> None:
    file = coins(tmp_path / "coin_flip.json", 0)
    assert "holds no train items of coin_flip" in refused(
        "finetune", model, tmp_path / "run", "--task", "coin_flip", "--task-dataset", file, *QUICK
    )
    assert "holds no evaluation items of coin_flip" in refused("score", model, "--task", "coin_flip", "--dataset", file)
    (tmp_path / "empty.txt").write_text("")
    sentence = refused("finetune", model, tmp_path / "run", "--dataset", tmp_path / "empty.txt", *QUICK)
    assert "empty" in sentence
    (tmp_path / "short.txt").write_text("short")
    sentence = refused("finetune", model, tmp_path / "run", "--dataset", tmp_path / "short.txt", *QUICK)
    assert "gives 0 blocks of 32 tokens" in sentence


def test_a_checkpoint_from_another_run_is_refused(
    command: Command, refused: Refused, model: Path, dense: Path, text: Path, tmp_path: Path
) -> None:
    begun = ("--dataset", text, *QUICK, "--save-steps", 1)
    done(command("finetune", model, tmp_path / "run", *begun))
    (tmp_path / "run" / "finetune.json").unlink()  # as if it had been killed
    other = checkpoint(tmp_path / "other", 0.2)
    same = ("finetune", model, tmp_path / "run", *begun, "--resume")
    assert re.search("another run: its model_fingerprint is .*, now it is", refused("finetune", other, *same[2:]))
    assert re.search(r"another run: its learning_rate is \S+, now it is 0.01", refused(*same, "--learning-rate", 0.01))
    assert "another run: its method is 'lrc', now it is 'full'" in refused(*same, "--method", "full")
    text.write_text(text.read_text() + " And so on, a few more words.")
    assert "another run: its data_sha256 is" in refused(*same)


def test_a_record_that_could_not_be_written_is_refused_before_the_work(
    refused: Refused, text: Path, tmp_path: Path
) -> None:
    output = text / "a.json"
    for verb, data in (("score", ("--task", "coin_flip", "--dataset", "generated")), ("evaluate", ("--dataset", text))):
        sentence = refused(verb, tmp_path / "no-model", *data, "-o", output)  # the model is not looked for before
        assert f"{output} cannot be written: {text} is a file" in sentence


@pytest.mark.parametrize(("what", "said"), [("FSDP", "under FSDP 2 only"), ("DEEPSPEED", "not run under DeepSpeed")])
def test_a_launch_that_cannot_work_is_refused(
    refused: Refused, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, said: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{what}", "true")
    assert said in refused("finetune", model, tmp_path / "run", "--dataset", text, *QUICK)


def test_a_method_that_has_nothing_to_train_is_refused(
    refused: Refused, dense: Path, text: Path, tmp_path: Path
) -> None:
    sentence = refused("finetune", dense, tmp_path / "run", "--dataset", text, *QUICK)
    assert "lrc has nothing to train" in sentence
    assert "compress it first" in sentence


def test_nothing_is_lost_when_a_run_that_was_to_be_replaced_cannot_begin(
    command: Command, refused: Refused, model: Path, dense: Path, text: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done(command("finetune", model, run, "--dataset", text, *QUICK))
    before = everything(run)
    assert "--overwrite" in refused("finetune", model, run, "--dataset", text, *QUICK)
    for arguments in (
        (dense, run, "--dataset", text, "--overwrite"),  # nothing to train
        (model, run, "--dataset", tmp_path / "none.txt", "--overwrite"),
        (model, run, "--task", "svamp", "--task-dataset", text, "--overwrite"),
        (model, run, "--dataset", text, "--overwrite", "--resume"),
        (run / "model", run, "--dataset", text, "--overwrite"),
    ):
        refused("finetune", *arguments, *QUICK)
    assert everything(run) == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("finetune MODEL OUT", "give dataset or task, one of them"),
        ("finetune MODEL OUT --dataset TEXT --task svamp", "give dataset or task, one of them"),
        ("finetune MODEL OUT --dataset TEXT --method lcr", "unknown method 'lcr'; did you mean 'lrc'"),
        ("finetune MODEL OUT --dataset TEXT --max-steps 0", "max_steps is 0"),
        ("finetune MODEL OUT --dataset TEXT --max-length 1", "max_length is 1: it must be at least 2"),
        ("finetune MODEL OUT --dataset TEXT --learning-rate nan", "learning_rate is nan"),
        ("finetune MODEL OUT --dataset TEXT --dtype bf16", "unknown dtype 'bf16'"),
        ("finetune MODEL OUT --dataset TEXT --optimizer adam", "unknown optimizer 'adam'"),
        (
            "finetune MODEL OUT --dataset TEXT --max-length 32 --optimizer lomo",
            "optimizer lomo cannot be used: You need to",
        ),
        (
            "finetune MODEL OUT --dataset TEXT --max-length 32 --optimizer galore_adamw",
            "cannot be used: .*optim_target_modules",
        ),
        ("finetune MODEL OUT --dataset TEXT --report-to tensorbord", "did you mean 'tensorboard'"),
        ("finetune MODEL OUT --dataset TEXT --max-length 32 --plan none.json", "none.json does not exist"),
        ("finetune MODEL OUT --dataset TEXT --device cuda:77", "device 'cuda:77' is not there"),
        ("finetune MODEL OUT --dataset TEXT --resume", "holds no run that could be resumed"),
        ("finetune MODEL OUT --max-length 32 --dataset pydok", "did you mean 'pydoc'"),
        ("finetune MODEL OUT --dataset TEXT --task-dataset TEXT", "goes with task"),
        ("finetune MODEL OUT --task svamp --task-dataset generated", "svamp cannot be generated"),
        ("finetune MODEL OUT --dataset self", "name the teacher by distill"),
        ("finetune MODEL OUT --dataset TEXT --distill-weight 0.5", "go with distill"),
        ("finetune MODEL OUT --dataset TEXT --distill MODEL --max-length 32", "is its own teacher"),
        ("finetune MODEL OUT --dataset TEXT --distill ./none --max-length 32", "none is neither a model directory"),
        ("finetune MODEL OUT --dataset TEXT --distill MODEL --distill-temperature 0", "distill_temperature is 0"),
        ("finetune MODEL OUT --dataset TEXT --distill MODEL --self-tokens 9", "goes with dataset self"),
        ("finetune ./none OUT --dataset TEXT", "none is neither a model directory"),
        ("finetune MODEL TEXT/out --max-length 32 --dataset TEXT", "cannot be written: .* is a file"),
        ("score MODEL", "name the task: --task commonsense_qa"),
        ("score MODEL --task coinflip", "did you mean 'coin_flip'"),
        ("score MODEL --task svamp --dataset none.json", "none.json does not exist"),
        ("score MODEL --task svamp --dataset TEXT", "text.txt is not JSON"),
        ("score MODEL --task coin_flip --dataset generated --limit 0", "limit is 0"),
        ("score MODEL --task coin_flip --dataset generated --dtype half", "unknown dtype 'half'"),
        ("score ./none --task coin_flip --dataset generated", "none is neither a model directory"),
        ("score MODEL --task coin_flip --dataset generated --limit 1 -o TEXT/a.json", "cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(
    refused: Refused, model: Path, text: Path, tmp_path: Path, arguments: str, sentence: str
) -> None:
    known = {"MODEL": str(model), "TEXT": str(text), "OUT": str(tmp_path / "out")}
    words = [re.sub("|".join(known), lambda found: known[found[0]], word) for word in arguments.split()]
    assert re.search(sentence, refused(*words))
