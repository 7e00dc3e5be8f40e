import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import welore
from conftest import Command, allocate, build, compress, done
from toys import calibrate
from welore.cli.ending import Stopped, stoppable
from welore.cli.main import app

VERBS = (
    "analyze",
    "allocate",
    "calibrate",
    "compress",
    "merge",
    "evaluate",
    "finetune",
    "score",
    "report",
    "demo",
)
TARGET = ("--rank-reduction", 0.4)


@pytest.fixture
def model(saved: Callable[..., Path], tokenizer: PreTrainedTokenizerFast) -> Path:
    directory = saved()
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(" ".join(f"w{(7 * i + 3) % 96}" for i in range(40)))
    return tmp_path / "text.txt"


# --- help -----------------------------------------------------------------------------------------------------------


def test_verbs_are_those_of_the_contract() -> None:
    assert {found.callback.__name__ for found in app.registered_commands if found.callback} >= set(VERBS)


def example(verb: str) -> list[str]:
    """The words of the example in a verb's help, without `welore` and the verb."""
    (found,) = (c for c in app.registered_commands if c.callback and c.callback.__name__ == verb)
    words = re.fullmatch(rf"Example: `welore {verb}\b(.*)`", found.epilog or "")
    assert words, f"the help of {verb} has no example"
    return shlex.split(words[1])


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_has_an_example_that_parses(command: Command, verb: str) -> None:
    answer = command(verb, "--help")
    assert answer.status == 0
    assert f"Example: welore {verb}" in re.sub(r"\s+", " ", answer.out)
    parser: Any = typer.main.get_command(app)
    context = parser.commands[verb].make_context(verb, example(verb))
    assert context.params


def test_every_verb_has_json(command: Command) -> None:
    for verb in VERBS:
        assert "--json" in command(verb, "--help").out, verb


@pytest.mark.slow
def test_runs_as_a_module(tmp_path: Path) -> None:
    """A refusal, too: one sentence, status 2."""
    run = [sys.executable, "-m", "welore"]
    answer = subprocess.run([*run, "--version"], capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stdout.strip()) == (0, metadata.version("welore"))
    answer = subprocess.run([*run, "merge", tmp_path, tmp_path / "out"], capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stdout, answer.stderr.count("\n")) == (2, "", 1)


def test_help_does_not_wait_for_torch() -> None:
    code = """
import sys
from welore.cli.main import main
sys.argv = ["welore", "--help"]
try:
    main()
finally:
    slow = {"torch", "transformers", "datasets", "scipy", "numpy"} & set(sys.modules)
    assert not slow, slow
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert all(verb in answer.stdout for verb in VERBS)


def test_compressing_does_not_wait_for_the_trainer() -> None:
    code = "import sys, welore.compression.pipeline; print({'peft', 'transformers.trainer'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# --- the pipeline ---------------------------------------------------------------------------------------------------


def test_pipeline_writes_what_the_verbs_promise(command: Command, model: Path, text: Path, tmp_path: Path) -> None:
    s, p, small, again = (tmp_path / name for name in ("s.safetensors", "plan.json", "small", "again"))
    before = set(tmp_path.iterdir())

    assert "384 singular values of 14 matrices" in done(command("analyze", model, "-o", s))
    spectra = welore.Spectra.load(s)
    with safe_open(s, "np") as file:
        assert file.metadata()["fingerprint"] == spectra.model.fingerprint == welore.analyze(model).model.fingerprint

    line = done(command("allocate", s, *TARGET, "-o", p))
    plan = welore.Plan.load(p)
    assert f"target rank_reduction 0.4; achieved ERR {plan.rank_reduction:.2%}" in line
    assert f"parameters {plan.parameter_ratio:.2%}" in line
    assert plan.ranks == allocate(spectra, rank_reduction=0.4).ranks

    assert f"ERR {plan.rank_reduction:.2%}" in done(command("compress", model, small, "--plan", p))
    assert {path.name for path in small.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "plan.json",
        "compression.json",
        "tokenizer.json",
    }
    assert json.loads((small / "config.json").read_text())["quantization_config"]["ranks"] == plan.ranks
    assert welore.Record.load(small / "compression.json").kind == "compression"

    line = done(command("evaluate", small, "--dataset", text, "--max-length", 9, "-o", tmp_path / "small.ppl.json"))
    record = welore.Record.load(tmp_path / "small.ppl.json")
    assert record.numbers["rank_reduction"] == plan.rank_reduction
    assert f"perplexity {record.numbers['perplexity']:.4g}" in line

    done(command("merge", small, again))
    assert "quantization_config" not in json.loads((again / "config.json").read_text())
    assert load_file(again / "model.safetensors").keys() == load_file(model / "model.safetensors").keys()
    done(command("evaluate", again, "--dataset", text, "--max-length", 9, "-o", tmp_path / "again.ppl.json"))
    merged = welore.Record.load(tmp_path / "again.ppl.json").numbers
    assert merged["perplexity"] == pytest.approx(record.numbers["perplexity"], rel=1e-5)

    line = done(command("report", tmp_path, "-o", tmp_path / "report"))
    pages = list((tmp_path / "report").glob("*.html"))
    assert len(pages) == 1
    assert str(pages[0]) in line
    assert f"{record.numbers['perplexity']:.4g}" in pages[0].read_text(encoding="utf-8")

    records = {tmp_path / "small.ppl.json", tmp_path / "again.ppl.json"}
    assert set(tmp_path.iterdir()) - before == {s, p, small, again, tmp_path / "report"} | records


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_reduction": 0.4},
        {"keep": 0.7, "strategy": "uniform"},
        {"threshold": 0.2, "min_ratio": 0.3},
        {"keep": 0.8, "strategy": "welore", "min_ratio": "break-even"},
        {"rank_reduction": 0.2, "min_ratio": 0.0, "allow_growth": True},
        {"keep": 0.8, "strategy": "uniform", "rank_multiple": 4},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_one_command_makes_what_three_make_and_what_python_makes(
    command: Command, model: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    s, p, three, one, python = (tmp_path / name for name in ("s.safetensors", "plan.json", "three", "one", "python"))
    flags = [x for k, v in settings.items() for x in (f"--{k.replace('_', '-')}", v) if x is not True]
    command("analyze", model, "-o", s)
    command("allocate", s, *flags, "-o", p)
    done(command("compress", model, three, "--plan", p))
    done(command("compress", model, one, *flags))
    compress(model, python, **settings)
    assert welore.Plan.load(p) == allocate(welore.Spectra.load(s), **settings)
    assert welore.Plan.load(p).ranks
    for name in ("model.safetensors", "plan.json", "config.json"):
        assert (one / name).read_bytes() == (three / name).read_bytes() == (python / name).read_bytes(), name


def test_calibrate_says_what_it_gathered_and_writes_what_python_writes(
    command: Command, model: Path, text: Path, tmp_path: Path
) -> None:
    path, how = (
        tmp_path / "c.safetensors",
        ("--num-tokens", 32, "--max-length", 8, "--seed", 3, "--exclude", "down_proj"),
    )
    answer = done(command("calibrate", model, "--dataset", f"{text}:3,self", "-o", path, *how))
    assert answer == f"second moments of 12 matrices over 32 tokens -> {path}\n"
    found = welore.Statistics.load(path)
    assert [source["weight"] for source in found.record.inputs["sources"]] == [3.0, 1.0]
    wanted: dict[str, Any] = {"num_tokens": 32, "max_length": 8, "seed": 3, "exclude": ["down_proj"]}
    same = calibrate(model, {str(text): 3, "self": 1}, tmp_path / "same.safetensors", **wanted)
    for name in found.layout():
        assert torch.equal(found.store.read(name), same.store.read(name))
    facts = json.loads(done(command("calibrate", model, "-o", path, *how, "--json")))
    assert facts["kind"] == "calibration"
    assert [source["name"] for source in facts["inputs"]["sources"]] == ["self"]
    assert facts["settings"]["first"] == "vocabulary"


def test_patterns_choose_the_targets(command: Command, model: Path, tmp_path: Path) -> None:
    only = ("--include", "q_proj", "--include", "mlp", "--exclude", "layers.1")
    command("analyze", model, "-o", tmp_path / "s.safetensors", *only)
    names = {f"model.layers.0.{name}" for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}
    assert set(welore.Spectra.load(tmp_path / "s.safetensors").values) == names
    command("compress", model, tmp_path / "out", "--paper", "--keep", 0.5, *only)
    assert {a.name for a in welore.Plan.load(tmp_path / "out" / "plan.json").allocations} == names


def test_shards_are_as_small_as_asked(command: Command, model: Path, tmp_path: Path) -> None:
    done(command("compress", model, tmp_path / "out", *TARGET, "--max-shard-size", "20KB"))
    files = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_what_stays_dense_is_said(command: Command, saved: Callable[..., Path], tmp_path: Path) -> None:
    answer = command("compress", saved("mixtral"), tmp_path / "out", "--paper", "--keep", 0.9)
    assert answer.status == 0
    assert "left dense inside the blocks: 0.0 M parameters (mlp.gate)" in answer.err
    assert answer.out.count("\n") == 1
    answer = command("compress", saved("mixtral"), tmp_path / "some", "--paper", "--keep", 0.5, "--exclude", "experts")
    numbers = json.loads((tmp_path / "some/compression.json").read_text())["numbers"]
    blocks, model = (numbers[name] / numbers[f"{name}_dense"] for name in ("block_parameters", "parameters"))
    assert numbers["parameter_ratio"] < 0.6 < 0.9 < blocks < 1
    assert (
        f"of the targeted matrices, {blocks:.2%} of all matrices of the blocks, {model:.2%} of the model" in answer.out
    )


def test_overwrite_replaces_a_result(command: Command, model: Path, tmp_path: Path) -> None:
    done(command("compress", model, tmp_path / "out", "--rank-reduction", 0.4))
    done(command("compress", model, tmp_path / "out", "--rank-reduction", 0.2, "--overwrite"))
    assert welore.Plan.load(tmp_path / "out" / "plan.json").target == {"rank_reduction": 0.2}


# --- json -----------------------------------------------------------------------------------------------------------


def test_json_holds_the_whole_result(command: Command, model: Path, text: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    facts = json.loads(done(command("compress", model, small, *TARGET, "--json")))
    assert facts == json.loads((small / "compression.json").read_text())
    assert 0.3 < facts["numbers"]["rank_reduction"] < 0.5
    assert facts["numbers"]["parameter_ratio"] < 1
    assert facts["numbers"]["bytes"] == (small / "model.safetensors").stat().st_size

    o = tmp_path / "small.ppl.json"
    facts = json.loads(done(command("evaluate", small, "--dataset", text, "--max-length", 9, "-o", o, "--json")))
    assert facts == json.loads(o.read_text())
    assert {"rank_reduction", "parameter_ratio", "bytes", "perplexity"} <= facts["numbers"].keys()


def test_json_of_the_other_verbs_says_what_was_made(command: Command, model: Path, tmp_path: Path) -> None:
    s, p, small, again = (tmp_path / name for name in ("s.safetensors", "plan.json", "small", "again"))
    facts = json.loads(done(command("analyze", model, "-o", s, "--json")))
    assert (facts["output"], facts["matrices"]) == (str(s), 14)
    facts = json.loads(done(command("allocate", s, *TARGET, "-o", p, "--json")))
    assert facts["rank_reduction"] == welore.Plan.load(p).rank_reduction
    assert facts["target"] == {"rank_reduction": 0.4}
    command("compress", model, small, "--plan", p)
    assert json.loads(done(command("merge", small, again, "--json"))) == {"output": str(again)}


def test_report_clears_the_lock_of_a_killed_one(command: Command, model: Path, text: Path, tmp_path: Path) -> None:
    done(command("evaluate", model, "--dataset", text, "--max-length", 9, "-o", tmp_path / "run" / "a.ppl.json"))
    for _ in range(2):  # a page may be made again
        done(command("report", tmp_path / "run", "-o", tmp_path / "out"))
    (tmp_path / ".out.welore-lock").touch()
    (tmp_path / "out" / "report.html").unlink()
    done(command("report", tmp_path / "run", "-o", tmp_path / "out"))
    assert (tmp_path / "out" / "report.html").is_file()
    assert not (tmp_path / ".out.welore-lock").exists()


# --- files of the reference scripts ---------------------------------------------------------------------------------


def test_values_of_the_reference_scripts_take_the_place_of_analysis(
    command: Command, model: Path, tmp_path: Path
) -> None:
    values: dict[int, dict[str, torch.Tensor]] = {}
    for name, sigma in welore.analyze(model).values.items():
        layer, _, kind = name.removeprefix("model.layers.").partition(".")
        values.setdefault(int(layer), {})[kind] = torch.from_numpy(sigma)
    torch.save(values, tmp_path / "values.pt")
    done(command("analyze", model, "-o", tmp_path / "s", "--reference-values", tmp_path / "values.pt"))
    command("allocate", tmp_path / "s", *TARGET, "-o", tmp_path / "plan.json")
    done(command("compress", model, tmp_path / "theirs", "--plan", tmp_path / "plan.json"))
    done(command("compress", model, tmp_path / "ours", *TARGET))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("ours", "theirs")]
    assert weights[0] == weights[1]


def test_checkpoint_of_the_reference_scripts_is_imported(command: Command, model: Path, tmp_path: Path) -> None:
    state, name = dict(build("llama").state_dict()), "model.layers.0.self_attn.q_proj"
    del state[f"{name}.weight"]
    state |= {f"{name}.U.weight": torch.ones(32, 3), f"{name}.V.weight": torch.ones(3, 32)}
    torch.save(state, tmp_path / "lrc.pt")
    given = ("compress", model, tmp_path / "out", "--reference-checkpoint", tmp_path / "lrc.pt")
    refused = command(*given, *TARGET)
    assert (refused.status, refused.out) == (2, "")
    assert "not both" in refused.err
    assert f"achieved ERR {29 / 384:.2%}" in done(command(*given))  # 2 x (32 + 16 + 16 + 32 + 3 x 32) ranks
    assert load_file(tmp_path / "out" / "model.safetensors")[f"{name}.A.weight"].shape == (32, 3)


# --- bad input: one sentence, exit status 2, nothing left behind ----------------------------------------------------


def spoil(directory: Path, name: str) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors[name].view(-1)[5] = torch.nan
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_nan_in_a_weight_names_the_tensor(refused: Callable[..., str], model: Path, tmp_path: Path, name: str) -> None:
    spoil(model, name)
    assert f"{name} holds NaN or Inf" in refused("compress", model, tmp_path / "out", *TARGET)
    if ".mlp." in name:
        assert f"{name} holds NaN or Inf" in refused("analyze", model, "-o", tmp_path / "s.safetensors")


def test_nan_leaves_the_result_that_was_to_be_replaced(
    command: Command, refused: Callable[..., str], model: Path, tmp_path: Path
) -> None:
    command("compress", model, tmp_path / "out", *TARGET)
    spoil(model, "model.norm.weight")
    assert "model.norm.weight holds NaN" in refused("compress", model, tmp_path / "out", *TARGET, "--overwrite")


def test_missing_shard_is_named(
    refused: Callable[..., str], saved: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    sharded = saved(shard="20KB")
    missing = sorted(sharded.glob("model-*.safetensors"))[1]
    missing.unlink()
    for arguments in (
        ("analyze", sharded, "-o", tmp_path / "s.safetensors"),
        ("compress", sharded, tmp_path / "out", *TARGET),
        ("evaluate", sharded, "--dataset", text, "--max-length", 9, "-o", tmp_path / "a.json"),
    ):
        assert f"lacks {missing.name}" in refused(*arguments)


@pytest.mark.parametrize(
    ("keep", "share", "sentence"), [(0.6, 0.999, "mlp_pruning is too large"), (0.9, 0.8, "keep 0.9 cannot be reached")]
)
def test_neurons_that_are_too_many_are_refused_before_the_calibration(
    refused: Callable[..., str], model: Path, tmp_path: Path, keep: float, share: float, sentence: str
) -> None:
    assert sentence in refused("compress", model, tmp_path / "out", "--keep", keep, "--mlp-pruning", share)


def test_plan_of_another_model_is_refused(
    command: Command, refused: Callable[..., str], model: Path, tmp_path: Path
) -> None:
    command("analyze", model, "-o", tmp_path / "s.safetensors")
    command("allocate", tmp_path / "s.safetensors", *TARGET, "-o", tmp_path / "plan.json")
    tensors = load_file(model / "model.safetensors")  # the same architecture and shapes, other weights
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.5
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    sentence = refused("compress", model, tmp_path / "out", "--plan", tmp_path / "plan.json")
    assert "plan was made for another model" in sentence


@pytest.mark.parametrize("target", [("--rank-reduction", 0.99), ("--keep", 0.001), ("--keep", 1.5)])
def test_unreachable_target_says_what_can_be_reached(
    command: Command, refused: Callable[..., str], model: Path, tmp_path: Path, target: tuple[str, float]
) -> None:
    command("analyze", model, "-o", tmp_path / "s.safetensors")
    for arguments in (
        ("allocate", tmp_path / "s.safetensors", "-o", tmp_path / "plan.json", *target),
        ("compress", model, tmp_path / "out", "--scaling", "none", *target),
    ):
        found = re.search(r"between (\d\.\d+) and (\d\.\d+)", refused(*arguments))
        assert found
        low, high = map(float, found.groups())
        assert not low <= target[1] <= high
        wanted = ("--scaling", "none", target[0], (low + high) / 2)
        inside = command("compress", model, tmp_path / f"in-{arguments[0]}", *wanted)
        assert inside.status == 0, "a target inside the range that was named must work"


def test_existing_directory_needs_overwrite(
    command: Command, refused: Callable[..., str], model: Path, tmp_path: Path
) -> None:
    command("compress", model, tmp_path / "out", *TARGET)
    assert "--overwrite" in refused("compress", model, tmp_path / "out", *TARGET)
    assert "--overwrite" in refused("merge", tmp_path / "out", model)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    assert "not a result of ours" in refused("compress", model, tmp_path / "home", *TARGET, "--overwrite")
    assert "which is read" in refused("compress", model, model, *TARGET, "--overwrite")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("compress MODEL OUT --keep 0.8 --strategy unifrom", "unknown strategy 'unifrom'; did you mean 'uniform'"),
        ("compress MODEL OUT --keep 0.8 --rank-reduction 0.3", "exactly one target"),
        ("compress MODEL OUT", "exactly one target"),
        ("compress MODEL OUT --keep 0.8 --min-ratio half", "min-ratio is 'half': it is a fraction .* or break-even"),
        ("compress MODEL OUT --keep 0.8 --min-ratio 1.5", "min_ratio is 1.5"),
        ("compress MODEL OUT --keep 0.8 --min-ratio nan", "min_ratio is nan"),
        ("compress MODEL OUT --keep 0.8 --rank-multiple 0", "rank_multiple is 0: it must be at least 1"),
        ("compress MODEL OUT --threshold 1.5", "threshold is 1.5: .* between 0 and 1"),
        ("compress MODEL OUT --keep nan", "keep (is )?nan"),
        ("compress MODEL OUT --keep 0.8 --device cuda:77", "device 'cuda:77' is not there"),
        ("compress MODEL OUT --keep 0.8 --device meta", "device 'meta' is not there"),
        ("compress MODEL OUT --keep 0.8 --include q_porj", "pattern 'q_porj' matches no linear layer"),
        ("compress MODEL OUT --paper --keep 0.8 --max-shard-size many", "max_shard_size is 'many': write it like"),
        ("compress MODEL TEXT/out --keep 0.8", "cannot be written: .* is a file"),
        ("compress MODEL OUT --plan none.json", "none.json does not exist"),
        ("compress MODEL OUT --plan TEXT", "text.txt is not JSON"),
        ("compress MODEL OUT --plan CONFIG", "config.json is not a plan"),
        ("compress ./none OUT --keep 0.8", "none is neither a model directory, a .gguf file nor a hub id"),
        (
            "compress some/model OUT --keep 0.8",
            "some/model is not in the local cache .*HF_HUB_OFFLINE.* connect",
        ),
        ("compress none.gguf OUT --keep 0.8", "none.gguf does not exist"),
        ("compress HERE OUT --keep 0.8", "is not a Hugging Face model: it has no config.json"),
        ("analyze MODEL -o TEXT/s.safetensors", "cannot be written: .* is a file"),
        (
            "allocate none.safetensors --keep 0.8 -o OUT",
            "none.safetensors does not exist: make it with `welore analyze",
        ),
        ("allocate WEIGHTS --keep 0.8 -o OUT", "model.safetensors is not a readable safetensors file of spectra"),
        ("allocate TEXT --keep 0.8 -o OUT", "text.txt is not a readable safetensors file"),
        (
            "calibrate MODEL --max-length 8 --dataset wikitext -o OUT",
            "unknown data set 'wikitext'; did you mean 'wikitext2'",
        ),
        ("calibrate MODEL --dataset TEXT:0 -o OUT", "text.txt is 0: it must be above 0"),
        ("calibrate MODEL --max-length 100 -o OUT", "length is 100: this model reads at most 64 tokens at once"),
        ("calibrate MODEL --max-length 8 --first chat -o OUT", "this tokenizer has no chat template"),
        ("calibrate ./none -o OUT", "none is neither a model directory"),
        (
            "compress MODEL OUT --rank-reduction 0.5 --dataset TEXT",
            "dataset is the text for statistics, and scaling none",
        ),
        ("compress MODEL OUT --keep 0.8 --paper --strategy owl", "owl counts outliers by statistics: give statistics"),
        ("compress MODEL OUT --for anywhere", "for anywhere give keep, or expert_pruning"),
        ("merge MODEL OUT", "has no low-rank layers of welore: there is nothing to merge"),
        ("evaluate MODEL --dataset wikitext -o OUT", "unknown data set 'wikitext'; did you mean 'wikitext2'"),
        ("evaluate MODEL --dataset none.txt -o OUT", "none.txt does not exist"),
        ("evaluate MODEL --dataset TEXT --dtype float61 -o OUT", "unknown dtype 'float61'; did you mean 'float16'"),
        ("evaluate MODEL --dataset TEXT --max-length 1 -o OUT", "max_length is 1: it must be at least 2"),
        ("evaluate MODEL --dataset TEXT --num-windows 0 -o OUT", "windows is 0"),
        ("evaluate MODEL --dataset TEXT --batch-size 0 -o OUT", "batch_size is 0"),
        ("evaluate ./none --dataset TEXT -o OUT", "none is neither a model directory"),
    ],
)
def test_mistake_is_one_sentence(
    refused: Callable[..., str],
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {
        "MODEL": model,
        "OUT": tmp_path / "out",
        "TEXT": text,
        "HERE": tmp_path,
        "CONFIG": model / "config.json",
        "WEIGHTS": model / "model.safetensors",
    }
    filled = re.sub("|".join(places), lambda found: str(places[found[0]]), arguments)
    assert re.search(sentence, refused(*filled.split()))


def test_output_that_is_a_directory_is_refused_before_the_work(
    command: Command, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worked(*_: object, **__: object) -> None:
        raise AssertionError("hours of work would be lost")

    monkeypatch.setattr("welore.compression.analysis.analyze", worked)
    monkeypatch.setattr("welore.evaluation.perplexity.evaluate", worked)
    for arguments in (("analyze", model), ("calibrate", model), ("evaluate", model, "--dataset", text)):
        answer = command(*arguments, "-o", tmp_path)
        assert answer.status == 2
        assert "is a directory" in re.sub(r"[\s│]+", " ", answer.err)


class OutOfMemoryError(RuntimeError):
    """Has the name of the one of torch."""


def with_note(error: BaseException) -> BaseException:
    error.add_note("the finished work lies in out.work")
    return error


ENDS = {  # an exception that leaves a verb -> status, and what is said
    "bug": (ZeroDivisionError("1 / 0"), 1, r"this is a bug in welore: ZeroDivisionError: 1 / 0 \(test_cli.py:\d+\)"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "$"),
    "told to end": (with_note(Stopped(signal.SIGTERM)), 143, "stopped; the finished work lies in out.work$"),
    "memory": (MemoryError("of a kind"), 2, r"out of memory \(of a kind\)"),
    "package": (ImportError("pip install x"), 2, "a package is missing or does not fit: pip install x$"),
    "GPU": (OutOfMemoryError("CUDA"), 2, r"out of memory \(CUDA\)"),
    "disk": (OSError(errno.ENOSPC, "No space left", "x.txt"), 2, "x.txt: No space left$"),
}


@pytest.mark.parametrize("end", ENDS)
def test_command_never_ends_with_a_traceback(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    error, status, sentence = ENDS[end]

    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("welore.compression.pipeline.compress", broken)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    answer = command("compress", "model", tmp_path / "out", "--keep", "0.8")
    assert (answer.status, answer.out) == (status, "")
    assert re.match(f"(welore: )?{sentence}", answer.err.removesuffix("\n"))
    logs = [path.read_text() for path in tmp_path.glob("welore-bug-*.log")]
    assert len(logs) == (status == 1)
    assert all("compress model" in log and "Traceback" in log and log.endswith("1 / 0\n") for log in logs)


def test_sentence_does_nothing_to_a_terminal(command: Command, tmp_path: Path) -> None:
    answer = command("info", tmp_path / "a\x1b[31m\udc80")
    assert answer.status == 2
    assert "a\\x1b[31m\\udc80" in answer.err


def test_signals_stop_a_command_and_are_given_back() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    # Whoever started the tests in the background may have had SIGINT ignored.
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        for number in numbers:
            with pytest.raises(Stopped) as caught, stoppable():
                os.kill(os.getpid(), number)
            assert caught.value.number == number
        assert {signal.getsignal(number) for number in numbers} == {signal.default_int_handler}
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_reader_that_goes_away_is_no_failure_but_a_full_disk_is() -> None:
    run = [sys.executable, "-m", "welore", "--help"]
    result = [sys.executable, "-c", "from welore.cli.output import print_result; print_result({'a': 1}, False, 'b')"]
    reader, writer = os.pipe()
    os.close(reader)
    pipes: dict[str, Any] = {"stdout": writer, "stderr": subprocess.PIPE, "text": True, "check": False}
    answer = subprocess.run(run, **pipes)
    assert "Traceback" not in answer.stderr
    assert "Exception ignored" not in answer.stderr
    for environment in (os.environ, os.environ | {"PYTHONUNBUFFERED": "1"}):
        answer = subprocess.run(result, **pipes, env=environment)
        assert (answer.returncode, answer.stderr) == (0, "")
    os.close(writer)
    with Path("/dev/full").open("w") as full:
        answer = subprocess.run(run, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (answer.returncode, answer.stderr.count("\n")) == (2, 1)
    assert "No space left" in answer.stderr


def test_other_output_than_what_is_read(command: Command, refused: Callable[..., str], model: Path, text: Path) -> None:
    """The claim itself is tested with the files; here, that every verb makes it."""
    config = text.with_suffix(".yaml")
    config.write_text("keep: 0.8")
    evaluation = ("--dataset", text, "--max-length", 9)
    for words in (
        ("analyze", model, "-o", model / "config.json"),
        ("analyze", model, "-o", model / "model.safetensors"),
        ("analyze", model, "--reference-values", text, "-o", text),
        ("analyze", model, "--statistics", text, "-o", text),
        ("allocate", text, *TARGET, "-o", text),
        ("calibrate", model, *evaluation[:2], "-o", text),
        ("calibrate", model, *evaluation[:2], "-o", model / "tokenizer.json"),
        ("evaluate", model, *evaluation, "-o", text),
        ("evaluate", model, *evaluation, "-o", model / "tokenizer_config.json"),
        ("score", model, "--task", "svamp", "--dataset", text, "-o", text),
        ("allocate", "none.safetensors", "--config", config, "-o", config),
        ("merge", model, model.parent, "--overwrite"),
        ("export", model, model, "--overwrite"),
        ("finetune", model, model, "--dataset", text, "--overwrite"),
        ("finetune", "none", text.parent, "--dataset", text, "--overwrite"),
        ("pretrain", text.parent, "--dataset", text, "--overwrite"),
        ("compress", "none", text.parent, "--statistics", text, *TARGET, "--overwrite"),
    ):
        assert "read: name another output" in refused(*words), words


def test_installed_command_exits_with_two_and_a_sentence(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("welore")
    run = [script, "allocate", "none.safetensors", "--keep", "0.8", "-o", tmp_path / "plan.json"]
    answer = subprocess.run(run, capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert (
        answer.stderr
        == "welore: none.safetensors does not exist: make it with `welore analyze MODEL -o none.safetensors`\n"
    )


# --- killed at any moment -------------------------------------------------------------------------------------------

# Kills the work of a command at its first, second, ... tensor written or access to its output, and finds what the one
# before has left, until one is not killed any more. Prints for each: exit status, and the sizes of the files under its
# name and under that of the unfinished directory.
KILLED_AT_EVERY_MOMENT = """
import gc, itertools, json, os, shutil, signal, sys
from pathlib import Path
import welore
from welore.io.safetensors_stream import TensorWriter

model, out = sys.argv[1:]
unfinished = str(Path(out).with_name(f".{Path(out).name}.welore-partial"))
welore.compress(model, out + "-before", welore.CompressionConfig(rank_reduction=0.4))  # all imports are done then
write = TensorWriter.write

def die_at(moment):
    moments = itertools.count(1)
    def count():
        if next(moments) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
    def access(event, details):
        if event in ("open", "os.mkdir", "os.rename", "os.remove"):
            if str(details[0]) == out or str(details[0]).startswith((out + "/", unfinished)):
                count()
    def write_counted(self, name, chunks):
        count()
        write(self, name, chunks)
    TensorWriter.write = write_counted
    sys.addaudithook(access)

def sizes(directory):
    return {path.name: path.stat().st_size for path in directory.iterdir()} if directory.exists() else None

gc.collect()
gc.freeze()  # a child that looked at every object would copy all of the memory
left = []
while not left or left[-1][0] == signal.SIGKILL:
    for place in (out, out + ".work"):  # all but the unfinished directory
        shutil.rmtree(place, ignore_errors=True)
    child = os.fork()
    if child == 0:
        die_at(len(left) + 1)
        welore.compress(model, out, welore.CompressionConfig(rank_reduction=0.4))
        os._exit(0)
    left.append((os.waitpid(child, 0)[1], sizes(Path(out)), sizes(Path(unfinished))))
print(json.dumps(left))
"""


@pytest.mark.slow
def test_compress_killed_at_any_moment_leaves_nothing_that_looks_whole(
    saved: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = saved(num_hidden_layers=1)
    tokenizer.save_pretrained(model)
    run = subprocess.run(
        [sys.executable, "-c", KILLED_AT_EVERY_MOMENT, model, tmp_path / "out"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    *killed, (status, whole, partial) = json.loads(run.stdout.splitlines()[-1])
    assert (status, partial) == (0, None), "after killed ones, the same command must succeed and leave nothing of them"
    assert len(killed) > 20
    for _, out, partial in killed:
        assert out is None or out.keys() == whole.keys(), "a killed run must not leave half of anything under its name"
        if partial is not None and "config.json" in partial:
            assert partial["model.safetensors"] == whole["model.safetensors"]
    for name in whole.keys() - {"compression.json"}:  # which says how long it took
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "out-before" / name).read_bytes(), name


def test_a_file_that_is_none_of_ours_is_not_replaced_unasked(
    command: Command, refused: Callable[..., str], model: Path, text: Path, tmp_path: Path
) -> None:
    notes, evaluation = tmp_path / "notes.txt", ("--dataset", text, "--max-length", 9)
    notes.write_text('{"kind": "mine"}')
    for words in (("evaluate", model, *evaluation), ("analyze", model), ("calibrate", model, *evaluation)):
        assert "notes.txt is there, and no file of ours: choose another name, or delete it first" in refused(
            *words, "-o", notes
        )
        assert notes.read_text() == '{"kind": "mine"}'
    record = ("evaluate", model, *evaluation, "-o", tmp_path / "r.json")
    done(command(*record))
    done(command(*record))  # its own may be made again
    done(command("evaluate", model, *evaluation, "-o", notes, "--overwrite"))
    assert json.loads(notes.read_text())["kind"] == "perplexity"
