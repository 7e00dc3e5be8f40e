"""Every recipe, run whole and in miniature; its `welore` commands are answered by this process.

Each command in a process of its own would import torch again, ten seconds a time.
"""

import contextlib
import io
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer.main

import welore.cli.main
from toys import checkpoint
from welore.errors import WeLoreError
from welore.evaluation.tasks import TASKS
from welore.models.embedded import PACKAGE, embedded_model
from welore.records import Record

ROOT = Path(__file__).resolve().parents[1]
Answer = tuple[int, str]  # exit status, output
TOY = {"MAX_STEPS": "2", "MAX_LENGTH": "16"}
CONTINUAL = {"max_steps": 10_000, "batch_size": 4, "max_length": 1024}
DOWNSTREAM = {"max_steps": 1_000, "batch_size": 8, "max_length": 512}
PAPER = {  # section 4
    "learning_rate": 5e-5,
    "gradient_accumulation_steps": 1,
    "warmup_steps": None,
    "method": "lrc",
    "train_norms": False,
}

CLIENT = """#!{python} -IS
import json, socket, sys

with socket.create_connection(("127.0.0.1", {port})) as connection:
    connection.sendall(json.dumps(sys.argv[1:]).encode() + b"\\n")
    status, output = json.load(connection.makefile())
print(output, end="")
sys.exit(status)
"""


def run(
    recipe: str, *arguments: object, answer: Callable[[Sequence[str]], Answer], place: Path, **knobs: str
) -> tuple[Answer, list[list[str]]]:
    """Exit status and output of a recipe, and the commands it gave; knobs: its environment variables."""
    place.mkdir()
    commands: list[list[str]] = []
    with socket.create_server(("127.0.0.1", 0)) as server, (place / "output").open("w+") as output:
        client = place / "welore"
        client.write_text(CLIENT.format(python=sys.executable, port=server.getsockname()[1]))
        client.chmod(0o755)
        path = os.pathsep.join([str(place), str(Path(sys.executable).parent), os.environ["PATH"]])
        process = subprocess.Popen(
            ["bash", str(ROOT / "recipes" / recipe), *map(str, arguments)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PATH": path} | knobs,
        )
        server.settimeout(0.2)
        while process.poll() is None:
            with contextlib.suppress(TimeoutError):
                connection, _ = server.accept()
                with connection, connection.makefile("rw") as stream:
                    commands.append(json.loads(stream.readline()))
                    json.dump(answer(commands[-1]), stream)
        output.seek(0)
        return (process.returncode, output.read()), commands


def obeyed(command: Sequence[str]) -> Answer:
    """What the command line does, in this process."""
    before, status, said = sys.argv, 0, io.StringIO()
    sys.argv = ["welore", *command]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            welore.cli.main.main()
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.argv = before
    return status, said.getvalue()


def noted(command: Sequence[str]) -> Answer:
    """Nothing is done, but the command must be one that parses, and its result seems to be there."""
    parsed(command)
    if command[0] == "compress":
        Path(command[2]).mkdir()
        (Path(command[2]) / "config.json").write_text("{}")
    return 0, ""


def parsed(command: Sequence[str]) -> dict[str, Any]:
    parser: Any = typer.main.get_command(welore.cli.main.app)
    return parser.commands[command[0]].make_context(command[0], list(command[1:])).params


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("models") / "dense", rank_reduction=None)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(" ".join(f"The number after {n} is {n + 1}." for n in range(100)))
    return str(path)


def test_every_recipe_is_run_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    for recipe in (ROOT / "recipes").iterdir():
        if "exec bash" in recipe.read_text():  # settings for another recipe
            assert f'"{recipe.name}"' in source, recipe
            continue
        assert re.search(rf'run\(\s*"{recipe.name}"[^)]*answer=obeyed', source), recipe


@pytest.mark.slow
def test_methods_are_compared_on_the_same_tokens_and_with_their_controls(
    model: Path, text: str, tmp_path: Path
) -> None:
    pytest.importorskip("galore_torch")
    knobs = TOY | {
        "MODEL": str(model),
        "DATASET": text,
        "MAX_EVAL_SAMPLES": "2",
        "BATCH_SIZE": "1",
        "RATES": "1e-3",
        "LORA_RATES": "1e-2",
    }
    out = tmp_path / "out"
    (status, output), commands = run("compare_methods_cpu.sh", out, answer=obeyed, place=tmp_path / "first", **knobs)
    assert status == 0, output
    records = [Record.load(path) for path in out.glob("*/finetune.json")]
    compressed, dense = {"lrc", "nlrc", "full", "lora", "galore"}, {"dense-lrc", "dense-nlrc", "dense-full"}
    assert {record.inputs["label"] for record in records} == compressed | dense
    assert {(record.numbers["tokens"], record.inputs["data_sha256"]) for record in records} == {
        (2 * 16, records[0].inputs["data_sha256"])
    }
    for record in records:
        assert (record.numbers["rank_reduction"] > 0) == (record.inputs["label"] in compressed)
        assert f"{record.numbers['eval_loss']:.4f}" in output
    assert {path.name for path in out.glob("*.png")} == {"all.png", "figure1.png", "figure5.png"}

    again, commands = run("compare_methods_cpu.sh", out, answer=noted, place=tmp_path / "again", **knobs)
    assert again[0] == 0, again[1]
    assert commands == []  # what is finished is kept


def test_the_embedded_model_is_compared_when_none_is_named(tmp_path: Path) -> None:
    try:
        model = embedded_model()
    except WeLoreError:
        pytest.skip(f"the package {PACKAGE} is not installed")
    (status, _), commands = run(
        "compare_methods_cpu.sh", tmp_path / "out", answer=lambda command: (3, ""), place=tmp_path / "bin"
    )
    assert status == 3  # the recipe stops where a command fails
    assert [command[:2] for command in commands] == [["compress", str(model)]]


@pytest.mark.slow
def test_continual_recipe_tunes_and_evaluates(model: Path, text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (status, output), _ = run(
        "continual.sh", model, out, answer=obeyed, place=tmp_path / "bin", METHODS="lrc nlrc", DATASET=text, **TOY
    )
    assert status == 0, output
    for method in ("lrc", "nlrc"):
        record = Record.load(out / method / "finetune.json")
        assert (record.settings["method"], record.settings["max_steps"]) == (method, 2)
        assert Record.load(out / f"{method}.ppl.json").inputs["label"] == method


@pytest.mark.slow
def test_downstream_recipe_tunes_scores_and_prints_the_table(model: Path, tmp_path: Path) -> None:
    knobs = {"TASKS": "coin_flip object_tracking", "TASK_DATASET": "generated", "LIMIT": "3", "MAX_STEPS": "2"}
    out = tmp_path / "out"
    (status, output), _ = run("downstream.sh", model, out, answer=obeyed, place=tmp_path / "bin", **knobs)
    assert status == 0, output
    for task in ("coin_flip", "object_tracking"):
        assert Record.load(out / f"{task}-lrc" / "finetune.json").settings["task"] == task
        assert Record.load(out / f"{task}-lrc.score.json").numbers["n"] == 3
    assert "| lrc |" in output


def test_recovery_recipe_needs_no_data_and_compares_the_three_models(model: Path, text: str, tmp_path: Path) -> None:
    knobs = TOY | {
        "BATCH_SIZE": "1",
        "KEEP": "0.7",
        "NUM_TOKENS": "256",
        "EVAL_DATASET": text,
        "EVAL_LENGTH": "64",
        "NUM_WINDOWS": "2",
    }
    out = tmp_path / "out"
    (status, output), _ = run("recover.sh", model, out, answer=obeyed, place=tmp_path / "first", **knobs)
    assert status == 0, output
    record = Record.load(out / "recovered" / "finetune.json")
    assert (record.settings["method"], record.settings["dataset"]) == ("lrc", "self")
    assert record.settings["distill"] == str(model)
    scores = {name: Record.load(out / f"{name}.ppl.json").numbers for name in ("dense", "small", "recovered")}
    assert scores["dense"]["parameter_ratio"] == 1
    assert scores["small"]["parameter_ratio"] == scores["recovered"]["parameter_ratio"] < 0.75
    assert all(numbers["tokens"] == scores["dense"]["tokens"] for numbers in scores.values())

    again, commands = run("recover.sh", model, out, answer=noted, place=tmp_path / "again", **knobs)
    assert again[0] == 0, again[1]
    assert [command[0] for command in commands] == ["evaluate"] * 3  # what is finished is kept


@pytest.mark.slow
def test_own_text_recipe_cuts_the_model_that_has_learned_the_text(model: Path, text: str, tmp_path: Path) -> None:
    knobs = {
        "BATCH_SIZE": "1",
        "MAX_LENGTH": "16",
        "KEEP": "0.7",
        "NUM_TOKENS": "1024",
        "STATISTICS_TOKENS": "512",
        "MAX_STEPS": "2",
    }
    knobs |= {"DATASET": text, "EVAL_LENGTH": "64", "NUM_WINDOWS": "2"}
    out = tmp_path / "out"
    (status, output), _ = run("own_text.sh", model, out, answer=obeyed, place=tmp_path / "first", **knobs)
    assert status == 0, output
    assert Record.load(out / "tuned" / "finetune.json").settings["method"] == "full"
    record = Record.load(out / "small" / "compression.json")
    assert record.inputs["model"] == str(out / "tuned" / "model")  # not the model as it came
    assert record.settings["recovery"]["text"] == text
    scores = {name: Record.load(out / f"{name}.ppl.json").numbers for name in ("dense", "tuned", "small")}
    assert scores["dense"]["parameter_ratio"] == scores["tuned"]["parameter_ratio"] == 1
    assert scores["small"]["parameter_ratio"] < 0.75

    again, commands = run("own_text.sh", model, out, answer=noted, place=tmp_path / "again", **knobs)
    assert again[0] == 0, again[1]
    assert [command[0] for command in commands] == ["evaluate"] * 3  # what is finished is kept


@pytest.mark.slow
def test_study_recipe_pretrains_cuts_both_ways_and_fine_tunes_with_controls(text: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    knobs = {
        "DATASET": text,
        "SIZE": "32/2/4/56",
        "VOCAB_SIZE": "300",
        "MAX_STEPS": "8",
        "PROBES": "4",
        "PROBE_ITEMS": "2",
    }
    knobs |= {
        "MAX_EVAL_SAMPLES": "4",
        "BATCH_SIZE": "4",
        "MAX_LENGTH": "16",
        "NUM_WINDOWS": "4",
        "TUNING_MAX_STEPS": "2",
    }
    out = tmp_path / "out"
    (status, output), _ = run("emergence_cpu.sh", out, answer=obeyed, place=tmp_path / "first", **knobs)
    assert status == 0, output
    place = out / "seed-0"
    cut = {n: Record.load(place / f"{n}-0.5.ppl.json").numbers for n in ("welore", "uniform")}
    assert cut["uniform"]["parameter_ratio"] == pytest.approx(cut["welore"]["parameter_ratio"], abs=0.04)
    dense = Record.load(place / "dense.ppl.json").numbers
    assert dense["parameter_ratio"] == 1
    names = {f"{m}-{err}" for m in ("full", "lrc", "nlrc") for err in ("0.3", "0.5")}
    names |= {f"dense-{m}" for m in ("full", "lrc", "nlrc")}
    assert {path.parent.name for path in place.glob("*/finetune.json")} == names
    assert (out / "report" / "study-settling.png").is_file()

    again, commands = run("emergence_cpu.sh", out, answer=noted, place=tmp_path / "again", **knobs)
    assert again[0] == 0, again[1]
    assert [command[0] for command in commands] == ["report"]  # what is finished is kept


def test_study_recipe_at_the_papers_size(tmp_path: Path) -> None:
    def noted_or_refused(command: Sequence[str]) -> Answer:
        return noted(command) if command[0] == "pretrain" else (3, "")

    (status, _), commands = run("emergence_gpu.sh", tmp_path / "out", answer=noted_or_refused, place=tmp_path / "bin")
    assert status == 3  # the recipe stops where a command fails
    settings = parsed(commands[0])
    wanted = {
        "size": "130m",
        "dataset": "c4",
        "max_steps": 25_000,
        "vocab_size": 32_000,
        "weight_decay": 0.0,
        "probes": 30,
    }
    assert settings.items() >= wanted.items()


def tuned(commands: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    return [parsed(command) for command in commands if command[0] == "finetune"]


def test_continual_recipe_has_the_settings_of_the_paper(tmp_path: Path) -> None:
    (status, output), commands = run(
        "continual.sh", "meta-llama/Llama-2-7b-hf", tmp_path / "out", answer=noted, place=tmp_path / "bin"
    )
    assert status == 0, output
    assert [command[0] for command in commands] == ["compress", "finetune", "evaluate"]
    assert parsed(commands[0])["rank_reduction"] == 0.5
    (settings,) = tuned(commands)
    assert settings.items() >= (CONTINUAL | PAPER | {"dataset": "c4", "task": None, "eval_steps": 500}).items()


def test_downstream_recipe_has_the_settings_of_the_paper(tmp_path: Path) -> None:
    (status, output), commands = run(
        "downstream.sh", "meta-llama/Llama-2-7b-hf", tmp_path / "out", answer=noted, place=tmp_path / "bin"
    )
    assert "no record of an accuracy" in output  # nothing was scored in truth
    assert status != 0
    assert parsed(commands[0])["rank_reduction"] == 0.5
    assert [settings["task"] for settings in tuned(commands)] == list(TASKS)
    for settings in tuned(commands):
        assert settings.items() >= (DOWNSTREAM | PAPER | {"dataset": None, "loss_on_prompt": False}).items()


@pytest.mark.parametrize(
    ("recipe", "directory"),
    [("continual.sh", "lrc"), ("downstream.sh", "svamp-lrc"), ("recover.sh", "recovered"), ("own_text.sh", "tuned")],
)
def test_a_stopped_recipe_goes_on_with_its_run(recipe: str, directory: str, tmp_path: Path) -> None:
    begun = tmp_path / "out" / directory
    begun.mkdir(parents=True)
    (begun / "run.json").write_text("{}")
    knobs = {"TASKS": "svamp boolq", "DATASET": "my.txt"}
    _, commands = run(recipe, "some/model", tmp_path / "out", answer=noted, place=tmp_path / "bin", **knobs)
    resumed = {Path(settings["output_dir"]).name: settings["resume"] for settings in tuned(commands)}
    assert resumed.pop(directory) is True
    assert not any(resumed.values())
