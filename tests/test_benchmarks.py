"""Every benchmark starts and writes its record, on a tiny model: what it measures there says nothing."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import Command, build, compress, done
from toys import characters, checkpoint, weights
from welore.data.windows import write_windows

DIRECTORY = Path(__file__).resolve().parents[1] / "benchmarks"
NAMES = sorted(path.stem for path in DIRECTORY.glob("*.py"))


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., ModuleType]:
    """A benchmark as a module, that measures a tiny model and writes its record to a temporary directory."""
    monkeypatch.syspath_prepend(DIRECTORY)

    def load(name: str, **constants: Any) -> ModuleType:
        before = set(sys.modules)
        module = importlib.import_module(name)
        for added in set(sys.modules) & set(NAMES) - before:
            monkeypatch.delitem(sys.modules, added)
        if hasattr(module, "embedded_model"):
            model = checkpoint(tmp_path / "model", None)
            monkeypatch.setattr(module, "embedded_model", lambda: model)
        monkeypatch.setattr(sys, "argv", [f"{name}.py"])
        for constant, value in (constants | {"HERE": tmp_path}).items():
            if hasattr(module, constant):
                monkeypatch.setattr(module, constant, value)
        return module

    return load


def numbers(record: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(record.read_text("utf-8"))["numbers"]
    return content


@pytest.mark.parametrize("name", NAMES)
def test_benchmark_can_be_imported(benchmark: Callable[..., ModuleType], name: str) -> None:
    assert callable(getattr(benchmark(name), "main", None)) or name in ("downstream", "floor")


@pytest.mark.parametrize("name", [n for n in NAMES if "argparse" in (DIRECTORY / f"{n}.py").read_text("utf-8")])
def test_benchmark_explains_itself(
    benchmark: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    module = benchmark(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        module.main()
    assert "usage:" in capsys.readouterr().out


@pytest.mark.slow
def test_speed_counts_equal_ranks(benchmark: Callable[..., ModuleType], tmp_path: Path) -> None:
    benchmark("speed", RANK_REDUCTION=0.4).main()
    measured = numbers(tmp_path / "speed.json")
    assert measured["ranks_equal_to_float64"] == measured["matrices"] == 14
    assert measured["two_torch_svd_over_ours"] > 0


@pytest.mark.slow
def test_two_workers_are_compared_with_one(benchmark: Callable[..., ModuleType], tmp_path: Path) -> None:
    benchmark("workers", ROUNDS=1, RANK_REDUCTION=0.4).main()
    assert numbers(tmp_path / "workers.json")["two_workers_over_one"] > 0


def test_speed_in_a_norm_compares_equal_results(benchmark: Callable[..., ModuleType], tmp_path: Path) -> None:
    benchmark("speed_scaled", SHAPES={(40, 60): 2, (50, 50): 1}).main()
    for matrix in numbers(tmp_path / "speed_scaled.json")["matrices"]:
        assert matrix["by_eigenvalues_over_ours"] > 0
        assert matrix["largest_error_of_a_loss"] < 1e-5
        assert abs(matrix["excess"]) < 1e-6


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own(benchmark: Callable[..., ModuleType], tmp_path: Path) -> None:
    benchmark("memory", LIMIT_BYTES=1e9, RANK_REDUCTION=0.4, WORKERS=(2,)).main()
    measured = numbers(tmp_path / "memory.json")["workers_2"]
    assert measured["resident_peak_bytes"] > 0
    assert measured["lrcs"] > 0


@pytest.mark.slow
def test_a_default_job_that_is_killed_at_random_is_measured_and_ends_equal(
    benchmark: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = benchmark("default_job")
    command = "default_job --shape tiny --tokens 1024 --for size --kill-at-random 1 --kills 1 --record"
    monkeypatch.setattr(sys, "argv", [*command.split(), str(tmp_path / "default_job.json")])
    job.main()
    measured = numbers(tmp_path / "default_job.json")
    assert measured["kills"]["unequal_files"] == []
    assert measured["resident_peak_bytes"] > 0
    assert measured["work_bytes"] > 0
    assert measured["recovery"]["text"] == "self"
    assert {"the model writes", "finetune", "writing"} <= measured["stages"].keys()
    rows = benchmark("tables").default_job().splitlines()
    assert [row.split(" | ")[0].strip("| ") for row in rows[2:]] == list(measured["estimated"])
    assert {row.count("|") for row in rows} == {rows[1].count("|")}


@pytest.mark.slow
def test_an_older_commit_is_measured_beside_today(
    benchmark: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    against = benchmark("against_commit", SIZE_OPTION={"before": "--keep", "now": "--keep"})
    monkeypatch.setattr(against, "unpack", lambda commit, directory: against.ROOT)
    model = checkpoint(tmp_path / "short", None, max_position_embeddings=64)  # a window is written token by token
    monkeypatch.setattr(against, "embedded_model", lambda: model)
    text = tmp_path / "text.txt"
    text.write_text("all work and no play " * 200)
    monkeypatch.setattr(against, "MAX_LENGTH", 64)
    arguments = ["against_commit", "--tokens", "64", "--windows", "2", "--text", str(text)]
    monkeypatch.setattr(sys, "argv", arguments)
    against.main()
    one = numbers(tmp_path / "against_commit.json")["seeds"]["0"]
    assert one["processor_seconds"]["before"] > 0
    assert one["perplexity"]["text.txt"]["before"] == one["perplexity"]["text.txt"]["now"]  # the same code ran twice


@pytest.mark.slow
def test_scale_measures_shapes_and_draws_them(benchmark: Callable[..., ModuleType], tmp_path: Path) -> None:
    shapes = {
        "small": {"square": (24, 24), "k, v": (8, 24), "MLP": (48, 24)},
        "large": {"square": (48, 48), "MLP": (96, 48)},
    }
    scale = benchmark("scale", SHAPES=shapes)
    costs = scale.growth()
    assert [cost.kind for cost in costs] == ["square", "k, v", "MLP", "square", "MLP"]
    assert all(cost.svd > 0 and cost.ours > 0 and cost.floor > 0 for cost in costs)
    scale.draw(costs, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").stat().st_size > 10_000


@pytest.mark.slow
def test_scale_measures_a_mixture_and_its_experts_alone(
    benchmark: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scale = benchmark("scale", MIXTURE="tiny-mixture")
    monkeypatch.setattr(sys, "argv", ["scale", "--mixture"])
    with pytest.raises(SystemExit, match="above the limit"):  # which is that of large matrices
        scale.main()
    measured = numbers(tmp_path / "scale_mixture.json")
    assert measured["matrices"] == 2 * (4 + 3 * 8)
    assert measured["experts_alone"]["resident_peak_bytes"] > 0
    assert measured["experts_alone"]["anonymous_peak_bytes"] > 0
    rows = benchmark("tables").mixture().splitlines()
    assert {row.count("|") for row in rows} == {3}


@pytest.mark.slow
def test_inference_compares_the_forms_of_a_layer_and_of_a_model(
    benchmark: Callable[..., ModuleType], tmp_path: Path
) -> None:
    tiny: dict[str, Any] = {"SHAPES": ((24, 16), (32, 16)), "RANKS": (0.2, 0.3), "BEYOND_CACHE_BYTES": 4e3}
    inference = benchmark(
        "inference", PREFILL=8, REPEATS_PREFILL=1, REPEATS_DECODE=1, REPEATS_MODEL=1, NEW_TOKENS=2, **tiny
    )
    layer = inference.measure_layer(24, 16, 0.3, "fp32")
    assert set(layer["speedup"]) == set(inference.PHASES)
    models, sizes = inference.load_models()
    assert set(models) == {"dense", "factored", "pivoted", "merged"}
    assert 0 < sizes["targeted_parameter_ratio"]["pivoted"] < sizes["targeted_parameter_ratio"]["factored"]


@pytest.mark.slow
def test_tuning_measures_a_run_in_a_process_of_its_own(benchmark: Callable[..., ModuleType], tmp_path: Path) -> None:
    tuning = benchmark("tuning")
    model = checkpoint(tmp_path / "small", 0.4)
    short = {"max_steps": 3, "warmup_steps": 0, "batch_size": 1, "max_length": 32, "dtype": "float32", "method": "lrc"}
    measured = tuning.measured(model, tuning.SETTINGS | short)
    assert measured["tokens_per_second"] > 0
    assert measured["above_imports_bytes"] > 0


@pytest.mark.slow
def test_writing_is_measured_in_turns_with_another_loop(benchmark: Callable[..., ModuleType], tmp_path: Path) -> None:
    benchmark("writing", WINDOWS=5, LENGTH=12, OTHER_WINDOWS=2, WINDOWS_READ=2).main()
    measured = numbers(tmp_path / "writing.json")
    assert measured["windows"] == 5
    assert set(measured["milliseconds_per_token"]) == {"ours", "transformers"}
    assert measured["log_likelihood"] < 0
    assert 0 <= measured["divergence"] < 0.1


@pytest.mark.slow
def test_layouts_compares_a_model_and_a_block_for_where_they_run(
    benchmark: Callable[..., ModuleType], tmp_path: Path
) -> None:
    block = {"hidden_size": 32, "intermediate_size": 80, "num_attention_heads": 2}
    short = {"PROMPT": 8, "READ": 8, "NEW_TOKENS": 2, "REPEATS": 1, "CALIBRATION_TOKENS": 128}
    benchmark("layouts", BLOCK=block, **short).main()
    for part in numbers(tmp_path / "layouts.json").values():
        for goal in ("cpu", "size", "gpu"):
            assert part["layouts"][goal]["parameter_ratio"] == pytest.approx(0.8, abs=0.05)
            assert part["layouts"][goal]["kernels_per_block"] > part["layouts"]["dense"]["kernels_per_block"]
            assert part["time"]["fp32"]["decode"][goal]["to_dense"] > 0


@pytest.mark.slow
def test_statistics_of_two_precisions_are_compared(benchmark: Callable[..., ModuleType], tmp_path: Path) -> None:
    benchmark("precision", TOKENS=64, LENGTH=16, BLOCKS=("layers.0.*",)).main()
    measured = numbers(tmp_path / "precision.json")
    assert measured["float32"]["loss_over_least"] == 1
    assert measured["float32"]["ranks_moved"] == 0
    assert all(run["loss_over_least"] > 0.999 for run in measured.values())


@pytest.mark.slow
def test_rows_of_tools_are_joined_and_a_cell_says_why_it_fails(
    benchmark: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = benchmark("tools")
    first, *_ = module.TOOLS

    def wrong(case: Any) -> None:
        case.check(lambda ids: type("Output", (), {"logits": case.logits + 1}))

    def unknown(case: Any) -> None:
        raise module.UnsupportedError("one file only")

    monkeypatch.setitem(module.TOOLS, "wrong", module.Tool("torch", wrong))
    monkeypatch.setitem(module.TOOLS, "unknown", module.Tool("torch", unknown))
    monkeypatch.setitem(module.TOOLS, "absent", module.Tool("no-such-package", unknown))
    for rows, forms in [([first, "absent"], ["split"]), (["wrong", "unknown"], ["split"]), (["unknown"], ["pivoted"])]:
        options = ["--rows", *rows, "--forms", *forms, "--work", str(tmp_path / "work")]
        monkeypatch.setattr(sys, "argv", ["tools.py", *options])
        module.main()
    rows = numbers(tmp_path / "tools.json")["rows"]
    assert list(rows) == [first, "wrong", "unknown"]
    assert rows[first]["cells"] == {"split": "ok"}
    assert rows["wrong"]["cells"]["split"].startswith("fails: AssertionError")
    assert rows["unknown"]["cells"] == {"split": "no: one file only", "pivoted": "no: one file only"}
    assert '"grids"' in (tmp_path / "work" / "split" / "config.json").read_text("utf-8")
    tables = benchmark("tables", HERE=tmp_path)
    assert f"| {first} | transformers" in tables.tools()
    assert f"| {first} | split |" in tables.engines()


def test_int8(benchmark: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module, text = benchmark("int8"), tmp_path / "text.txt"
    dense = checkpoint(tmp_path / "dense", None)
    compress(dense, tmp_path / "small", rank_reduction=0.4)
    text.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    arguments = [str(dense), str(tmp_path / "small"), "--texts", f"foxes={text}", "--num-windows", "1"]
    monkeypatch.setattr(sys, "argv", ["int8.py", *arguments])
    module.main()
    rows = numbers(tmp_path / "int8.json")["rows"]
    assert list(rows) == ["dense, 16 bits", "dense, int8", "compressed, 16 bits", "compressed, int8"]
    assert rows["dense, int8"]["bytes"] < 0.5 * rows["dense, 16 bits"]["bytes"]
    assert all(row["perplexity_foxes"] > 1 for row in rows.values())


def test_trials_for_anywhere(
    benchmark: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module, text, own = benchmark("anywhere", LENGTH=32), tmp_path / "text.txt", tmp_path / "written.safetensors"
    model = checkpoint(tmp_path / "wide", None, intermediate_size=128)
    monkeypatch.setattr(module, "embedded_model", lambda: model)
    write_windows(own, torch.randint(2, 90, (8, 32), generator=torch.Generator().manual_seed(0)))
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    common = [str(own), "--texts", f"foxes={text}", "--work", str(tmp_path / "work"), "--num-windows", "1"]
    for options in (["--recovery", "1e-3:3"], ["--heads", "0", "1", "2"]):
        monkeypatch.setattr(sys, "argv", ["anywhere.py", *common, *options])
        module.main()
    rows = {name.split(": ")[1]: row for name, row in numbers(tmp_path / "anywhere.json")["rows"].items()}
    assert list(rows) == ["dense", "cut", "3 steps at 1e-3", *module.HEADS]
    assert rows["neurons alone"]["perplexity_foxes"] == rows["cut"]["perplexity_foxes"]
    assert rows["3 steps at 1e-3"]["held_out_loss"]["recovered"] != rows["3 steps at 1e-3"]["held_out_loss"]["cut"]
    for name in module.HEADS:
        assert rows[name]["parameter_ratio"] == pytest.approx(0.8, abs=0.05)


@pytest.mark.slow
def test_equal_bytes_goes_on_where_it_was(
    benchmark: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: Command
) -> None:
    """Without the rows that need llama.cpp; its commands are run by this process, which has imported torch."""
    module = benchmark("equal_bytes", LENGTH=32)
    (tmp_path / "text.txt").write_text("a number of words, and a number of other words; " * 40)
    rows = ["dense, 16 bits", "compressed 0.8, 16 bits", "compressed 0.8, int8"]
    sizes = ["--num-windows", "3", "--num-tokens", "1024", "--recovery", "none"]
    options = ["--wikitext", str(tmp_path / "text.txt"), "--work", str(tmp_path / "work"), *sizes]
    measured, once = list[str](), module.Bench.measured
    monkeypatch.setattr(module.Bench, "measured", lambda bench, row: measured.append(row) or once(bench, row))

    def run(words: list[str], **options: Any) -> None:
        assert (words[:3], options) == ([sys.executable, "-m", "welore"], {"check": True})
        assert command(*words[3:]).status == 0

    monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=run))
    for asked in (rows[:2], rows):
        monkeypatch.setattr(sys, "argv", ["equal_bytes", *options, "--rows", *asked])
        module.main()
    assert measured == rows
    dense, compressed, int8 = numbers(tmp_path / f"equal_bytes-{module.EMBEDDED}.json")["rows"].values()
    assert compressed["multiplications_per_token"] < dense["multiplications_per_token"]
    assert int8["bytes"] < compressed["bytes"]
    assert 0 < int8["kl_mean"] < 1
    assert (tmp_path / f"equal_bytes-{module.EMBEDDED}.png").stat().st_size > 1000


def test_more_tokens_tell_more_of_a_divergence(
    benchmark: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module, text = benchmark("top_logprobs", LENGTH=32, SIZES=(2, 20)), tmp_path / "text.txt"
    dense, small = checkpoint(tmp_path / "dense", None), checkpoint(tmp_path / "small")
    text.write_text("a number of words, and a number of other words; " * 4)
    monkeypatch.setattr(sys, "argv", ["top_logprobs", str(dense), f"small={small}", "--text", str(text)])
    module.main()
    row = numbers(tmp_path / "top_logprobs.json")["small"]
    assert row["kl"] > 0
    assert 1 > row["by_k"]["2"]["missed"] > row["by_k"]["20"]["missed"] > 0
    assert 1 > row["by_k"]["2"]["rest"] > row["by_k"]["20"]["rest"] > 0


@pytest.mark.slow
def test_arena_makes_a_record_for_every_cell_once_and_the_tables_read_them(
    benchmark: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: Command
) -> None:
    """The cell of a baseline has a process of its own; the commands are run by this one, which has imported torch."""
    arena, text, out = benchmark("arena"), tmp_path / "text.txt", tmp_path / "arena" / "small"
    model = checkpoint(tmp_path / "small", None, intermediate_size=128)
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    options = f"--keep 0.8 --tokens 128 --calibrate-on {text} --texts foxes={text},dogs={text} --windows 1 --length 64"
    methods = ["plain-uniform", "svd-llm", "magnitude"]
    arguments, apart = ["arena.py", str(model), "--methods", *methods, *options.split()], arena.run

    def run(*words: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        if words[:2] != ("-m", "welore"):
            return apart(*words)
        return json.loads(done(command(*words[2:]))), {"seconds": 0.1, "peak_memory_bytes": 1}

    monkeypatch.setattr(arena, "run", run)
    monkeypatch.setattr(sys, "argv", arguments)
    arena.main()
    cells = {path.stem: numbers(path) for path in out.glob("*.json")}
    assert set(cells) == {"dense-1-0", *(f"{method}-0.8-0" for method in methods)}
    assert "kl_mean_foxes" not in cells.pop("dense-1-0")
    for cell in cells.values():
        assert cell["parameter_ratio"] == pytest.approx(0.8, abs=0.03)
        assert cell["kl_mean_foxes"] == cell["kl_mean_dogs"] > 0
        assert cell["seconds"] > 0
    monkeypatch.setattr(arena, "run", None)  # what is there is not made again
    monkeypatch.setattr(sys, "argv", arguments)
    arena.main()
    assert len(benchmark("tables").arena("arena/small").splitlines()) == 2 + len(cells)


@pytest.mark.slow
def test_tasks_makes_a_record_for_every_row_once_and_trains_the_best_rate_again(
    benchmark: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tasks, out = benchmark("tasks"), tmp_path / "tasks"
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of this process, too
    sizes = "--steps 3 --batch-size 2 --max-length 300 --eval-items 2 --paper-err 0.4"
    common = ["tasks.py", "--tasks", "coin_flip", "--work", str(tmp_path / "work"), *sizes.split()]
    rows = list[str]()

    def call(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", [*common, *options])
        tasks.main()

    call("--models", "paper", "--methods", "--limit", "3")  # in processes of their own
    paper = numbers(out / "paper-coin_flip-before.json")
    assert paper["n"] == 3
    assert paper["parameter_ratio"] < 1

    def run(path: Path, option: str, job: str) -> tuple[dict[str, Any], dict[str, float]]:
        rows.append(job)
        return tasks.done(json.loads(job)), {"seconds": 1.0}

    monkeypatch.setattr(tasks.arena, "run", run)
    call("--models", "paper", "dense", "--methods", "lrc", "--rates", "1e-4", "1e-2", "--limit", "0")
    assert len(rows) == 4
    losses = {rate: numbers(out / f"paper-coin_flip-lrc-{rate}-0.json")["eval_loss"] for rate in ("0.0001", "0.01")}
    assert losses["0.01"] < losses["0.0001"]
    call("--models", "paper", "dense", "--methods", "lrc", "--best", "--limit", "3")
    assert len(rows) == 4 + 5  # two seeds of two models, and the dense one before
    best = numbers(out / "paper-coin_flip-lrc-0.01-2.json")
    assert best["eval_loss"] < best["eval_loss_before"]
    assert best["tokens_per_second"] > 0
    assert best["peak_memory_bytes"] >= best["imports_bytes"] > 0
    assert numbers(out / "dense-coin_flip-lrc-0.01-1.json")["trainable_parameters"] > best["trainable_parameters"]
    call("--models", "paper", "dense", "--methods", "lrc", "--best", "--limit", "3")
    assert len(rows) == 9  # what is there is not made again
    with pytest.raises(SystemExit, match="has max_steps 3, now it is 4: give another --out"):
        call("--models", "paper", "--methods", "lrc", "--best", "--steps", "4", "--limit", "0")
    table = benchmark("tables", HERE=tmp_path).learned()
    assert table.index("the dense model") < table.index("WeLore as published, ERR 0.4")
    (trained, _) = [line for line in table.splitlines() if line.startswith("| lrc |")]
    assert trained.endswith("at 1e-02 (2 seeds) |")


def test_a_task_without_a_training_file_is_cut_by_position(
    benchmark: Callable[..., ModuleType], tmp_path: Path
) -> None:
    tasks, data = benchmark("tasks"), tmp_path / "data"
    data.mkdir()
    lines = [json.dumps({"question": f"is {n} it?", "passage": "No.", "answer": n % 2 == 0}) for n in range(10)]
    (data / "boolq_dev.jsonl").write_text("\n".join(lines) + "\n")
    given = tasks.parser().parse_args(["--data", str(data)])
    bench = tasks.Bench(given, tmp_path / "work")
    cut = Path(bench.data("boolq"))
    assert (cut / "boolq_train.jsonl").read_text().splitlines() == lines[:7]
    assert (cut / "boolq_dev.jsonl").read_text().splitlines() == lines[7:]
    assert bench.data("svamp") == str(data)


def test_a_row_of_tasks_says_what_was_not_run(benchmark: Callable[..., ModuleType], tmp_path: Path) -> None:
    from welore.records import Record

    tables = benchmark("tables", HERE=tmp_path)
    assert tables.learned() == tables.learned_cost() == "Not run yet."

    def row(method: str, rate: float, seed: int, task: str = "svamp", **numbers: Any) -> None:
        settings = {"row": "dense", "task": task, "method": method, "learning_rate": rate, "seed": seed}
        common = {"tokens_per_second": 300.0, "peak_memory_bytes": 3e9, "imports_bytes": 1e9}
        name = f"dense-{task}-{method}-{rate}-{seed}.json"
        Record("task", {"label": "the dense model"}, settings, common | numbers).save(tmp_path / "tasks" / name)

    asked = {"ci95_low": 0.2, "ci95_high": 0.6, "majority_rate": 0.25, "n": 20}
    for rate, loss in ((1e-4, 0.5), (3e-4, 0.3), (1e-3, 0.4)):
        row("full", rate, 0, eval_loss=loss)
    for seed in (1, 2):
        row("full", 3e-4, seed, eval_loss=0.3 + 0.1 * seed, accuracy=0.3 + 0.1 * seed, **asked)
    row("galore", 1e-4, 0, eval_loss=0.7, **{"tokens_per_second": 150.0, "peak_memory_bytes": 2e9})
    row("full", 1e-2, 0, task="boolq", eval_loss=None, diverged="at step 3")
    lines = [line.strip("| ").split(" | ") for line in tables.learned().splitlines()]
    assert lines[2:] == [
        ["accuracy, %; held-out loss", "svamp", "boolq"],
        ["---", "---", "---"],
        ["before training", "not run", "not run"],
        ["full", "45.0 [20.0, 60.0]; 0.400 at 3e-04 (2 seeds)", "diverged"],
        ["galore", "not scored; 0.700 at 1e-04", "not run"],
        ["most frequent answer", "25.0", "not run"],
        ["questions", "20", "not run"],
    ]
    assert "| galore | x 0.50, x 0.50 |" in tables.learned_cost()


def test_neurons_are_chosen_by_their_weights(benchmark: Callable[..., ModuleType], tmp_path: Path) -> None:
    baselines, dense = benchmark("baselines"), build("llama", intermediate_size=128)
    large = torch.arange(1, 128, 2)
    for layer in dense.model.layers:
        for up in (layer.mlp.gate_proj, layer.mlp.up_proj):
            up.weight.data[large] *= 10
    dense.save_pretrained(tmp_path / "dense")
    characters().save_pretrained(tmp_path / "dense")
    for score in baselines.SCORES:
        ratio = baselines.narrow(tmp_path / "dense", tmp_path / score, score, 0.7, 16)
        narrow = weights(tmp_path / score)
        count = narrow["model.layers.0.mlp.down_proj.weight"].shape[1]
        assert 64 <= count < 128
        assert ratio == pytest.approx(0.7, abs=0.03)
        for i, layer in enumerate(dense.model.layers):
            stay = narrow[f"model.layers.{i}.mlp.gate_proj.weight"]
            rows = (layer.mlp.gate_proj.weight[:, None] == stay).all(2).nonzero()
            assert set(large.tolist()) <= set(rows[:, 0].tolist())
            assert torch.equal(
                narrow[f"model.layers.{i}.mlp.down_proj.weight"], layer.mlp.down_proj.weight[:, rows[:, 0]]
            )
