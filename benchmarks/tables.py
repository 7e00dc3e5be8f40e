"""The tables of README.md and docs/results from the records in docs/benchmarks; `--check` only compares.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. `--demo DIR` first takes the records of a demo,
`--methods DIR` those of recipes/compare_methods_cpu.sh, `--tasks DIR` those of `welore score`, `--protocol DIR` those
of `welore evaluate` on a whole text, `--study DIR` records and figures of recipes/emergence_cpu.sh.
"""

import argparse
import math
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from downstream import DENSE, Downstream, downstream, verdicts
from welore.emergence.claims import claims_table
from welore.evaluation.tasks import TASKS
from welore.records import Record
from welore.reporting.formatting import megabytes, percent, perplexity_text
from welore.reporting.tables import Table, order_methods, task_table

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "docs" / "benchmarks"
STUDY = ROOT / "docs" / "study"
PAGES = (
    ROOT / "README.md",
    ROOT / "docs" / "how-to" / "fine-tune-7b.md",
    ROOT / "docs" / "how-to" / "serve-and-export.md",
    *sorted((ROOT / "docs" / "results").glob("*.md")),
    STUDY / "README.md",
)
METHODS, ITEMS_SHOWN = HERE / "tuning", 3
BEFORE = "before"  # in place of a method: not trained
ARENA = "arena/SmolLM2-135M-Instruct"
ABLATED = (0.8, 0.6)
STRATEGIES = ("uniform", "one threshold", "water-filling")
FACTORISATIONS = {  # in print -> methods of benchmarks/arena.py, one for each of STRATEGIES
    "plain weights, factored": ("plain-uniform", "welore", "plain-waterfill"),
    "ASVD, factored": ("asvd", "asvd-welore", "asvd-waterfill"),
    "whitening, factored": ("svd-llm", "input-welore", "input-waterfill"),
    "K-FAC, factored": ("kfac-uniform", "kfac-welore", "kfac-factored"),
    "K-FAC, smaller storage form": (None, None, "ours-whole"),
    "the same, long matrices in blocks": (None, None, "ours-split"),
    "the same, MLP pruning": (None, None, "ours-text"),
}
SIZED = "ours-self"  # the row whose sizes stand for all: they differ by what pivoted storage keeps beside the numbers
RECOVERED = (  # row, the dense model it is measured against, both in print
    ("ours-raw", "dense", "the original dense model"),
    ("ours-raw", "dense-tuned-first", "its teacher"),
    ("ours-raw", "dense-tuned-on", "the dense control"),
    ("ours-raw-tested", "dense", "the original dense model (statistics of the two tested kinds)"),
    ("ours-raw-tested", "dense-tuned-on", "the dense control (statistics of the two tested kinds)"),
)
FRONT = (  # directory of records, model in print, row, share of the parameters, command in print
    ("quality", "SmolLM2-135M", "dense", 1.0, ""),
    ("quality", "SmolLM2-135M", "welore", 0.9, "`--keep 0.9 --preset paper`"),
    ("quality", "SmolLM2-135M", "ours-default", 0.9, "`--for size --keep 0.9`"),
    ("quality", "SmolLM2-135M", "ours-self", 0.8, "`--for size --keep 0.8 --recovery none`"),
    ("quality", "SmolLM2-135M", "ours-default", 0.8, "`--for size --keep 0.8`"),
    ("quality", "SmolLM2-135M", "ours-web", 0.8, "`--for size --keep 0.8 --recovery web.txt`"),
    ("quality", "SmolLM2-135M", "ours-default", 0.6, "`--for size --keep 0.6`"),
    ("quality-gemma3-270m", "Gemma 3 270M", "dense", 1.0, ""),
    ("quality-gemma3-270m", "Gemma 3 270M", "ours-default", 0.8, "`--for size --keep 0.8 --num-tokens 16384`"),
    ("quality-gemma3-270m", "Gemma 3 270M", "ours-default", 0.6, "`--for size --keep 0.6 --num-tokens 16384`"),
)
TEXTS = ("perplexity_wikitext2", "perplexity_pydoc")
LOW_RANK = ("factored", "pivoted", "split", "narrower MLPs")
DEMO = (  # rows in print; of an older demo some are not there
    *("dense", "uniform-same-err", "uniform-same-parameters", "welore"),
    *("ours", "ours-small", "welore-tuned", "dense-tuned"),
)


def protocol() -> str:
    """A whole text in windows of 2048 tokens, from `welore evaluate`, the largest model first."""
    records = [Record.load(path) for path in (HERE / "protocol").glob("*.json")]
    dense = next(record for record in records if record.inputs["label"] == "dense")
    lines = ["| parameters | weights | windows | tokens | perplexity | to dense |", "|---|---|---|---|---|---|"]
    for record in sorted(records, key=lambda record: -record.numbers["parameter_ratio"]):
        n = record.numbers
        assert (n["tokens"], record.settings) == (dense.numbers["tokens"], dense.settings), record.inputs["label"]
        sizes = f"{percent(n['parameter_ratio'])} | {megabytes(n['bytes'])} | {n['windows']} | {n['tokens']:,}"
        ratio = perplexity_text(n["perplexity"] / dense.numbers["perplexity"])
        lines.append(f"| {sizes} | {perplexity_text(n['perplexity'])} | x {ratio} |")
    return "\n".join(lines)


def demo() -> str:
    """Perplexity on the Python reference, from the records of `make demo`."""
    paths = [HERE / "demo" / f"{name}.ppl.json" for name in DEMO]
    records = [Record.load(path) for path in paths if path.is_file()]
    base = records[0].numbers["perplexity"]
    lines = [
        "| | ERR | parameters of the targeted matrices | weights | perplexity | to dense |",
        "|---|---|---|---|---|---|",
    ]
    for r in records:
        n = r.numbers
        cells = [
            r.inputs["label"],
            percent(n["rank_reduction"]),
            percent(n["parameter_ratio"]),
            megabytes(n["bytes"]),
            perplexity_text(n["perplexity"]),
            f"x {perplexity_text(n['perplexity'] / base)}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def speed() -> str:
    """Analysis and factors, one thread and two workers, from benchmarks/speed.py and workers.py."""
    n, workers = (Record.load(HERE / f"{name}.json").numbers for name in ("speed", "workers"))
    return "\n".join(
        [
            "| singular values of all matrices + factors of the LRCs at ERR 50 %, one thread | ratio |",
            "|---|---|",
            f"| two float32 `torch.svd` each (what the reference does) / ours | {n['two_torch_svd_over_ours']:.1f} |",
            f"| `torch.linalg.svdvals` of each matrix, no factors / ours | {n['svdvals_over_ours']:.1f} |",
            f"| ours / floor (its operations at the speed of a matrix product) | {n['ours_over_floor']:.1f} |",
            f"| analysis and factors with one worker / with two | {workers['two_workers_over_one']:.2f} |",
            f"| ranks equal to a float64 SVD | {n['ranks_equal_to_float64']} of {n['matrices']} |",
            f"| largest excess of {n['lrcs']} LRCs over the optimum, of the squared norm | {n['largest_excess']:.0e} |",
        ]
    )


def speed_scaled() -> str:
    """Values and factors in the K-FAC norm, one thread, from benchmarks/speed_scaled.py."""
    lines = [
        "| values and factors of one matrix in the K-FAC norm, one thread | processor seconds "
        "| roots by eigenvalues / ours | largest error of a predicted loss |",
        "|---|---|---|---|",
    ]
    for n in Record.load(HERE / "speed_scaled.json").numbers["matrices"]:
        rows, columns = n["shape"]
        ratio, seconds = n["by_eigenvalues_over_ours"], n["seconds"]["ours"]
        lines.append(f"| {rows} x {columns} | {seconds:.1f} | {ratio:.1f} | {n['largest_error_of_a_loss']:.0e} |")
    return "\n".join(lines)


def writing() -> str:
    """The text that a model writes: processor time and likelihood, from benchmarks/writing.py."""
    record = Record.load(HERE / "writing.json")
    n, at = record.numbers, record.settings
    times = n["milliseconds_per_token"]
    return "\n".join(
        [
            f"| SmolLM2, {at['max_length']} tokens a window, one thread | milliseconds per token |",
            "|---|---|",
            f"| ours, {n['windows']} windows at once, {at['dtype']} | {times['ours']:.2f} |",
            f"| a loop with transformers' cache, {at['windows_of_transformers']} windows at once, float32 "
            f"| {times['transformers']:.2f} |",
            f"| ratio | {n['ours_over_transformers']:.2f} |",
            f"| mean log-likelihood of the text in float32; expected | {n['log_likelihood']:.2f}; "
            f"{n['expected_log_likelihood']:.2f} |",
            f"| divergence of the writing distribution from float32, nats per token | {n['divergence']:.4f} |",
        ]
    )


def against_commit() -> str:
    """The default job and that of an older commit at once: processor time and quality, benchmarks/against_commit.py.

    The last column is of `welore evaluate` on results for size; rows of several seeds compare it with the recorded ones
    of version 0.1.
    """
    n = Record.load(HERE / "against_commit.json").numbers
    rows = []
    for seed, run in n["seeds"].items():
        before, now = (run["processor_seconds"][name] / 60 for name in ("before", "now"))
        rows.append([f"processor time, seed {seed}", f"{before:.1f} min", f"{now:.1f} min (x {now / before:.2f})", ""])
        for text, perplexity in run["perplexity"].items():
            shown = [perplexity_text(perplexity[name]) for name in ("before", "now")]
            sized = Record.load(HERE / "against_commit_size" / f"{text}-{seed}.json").numbers["perplexity"]
            rows.append([f"perplexity, {text}, seed {seed}", *shown, perplexity_text(sized)])
    first = quality_cells("quality")["ours-default", 0.8]
    for text in ("wikitext2", "pydoc"):
        found = sorted((HERE / "against_commit_size").glob(f"{text}-*.json"))
        seeds = [int(path.stem.rpartition("-")[2]) for path in found]
        before = [r.numbers[f"perplexity_{text}"] for r in first if r.settings["seed"] in seeds]
        sized = [Record.load(path).numbers["perplexity"] for path in found]
        rows.append([f"perplexity, {text}, seeds {seeds[0]} to {seeds[-1]}", over_seeds(before), "", over_seeds(sized)])
    head = ["SmolLM2, `--keep 0.8`, one thread", "version 0.1, for size", "now, for a CPU", "now, for size"]
    return marked_down(Table("", head, rows))


def default_job() -> str:
    """The default job at a billion parameters by stage, measured and estimated; estimates for larger ones."""
    n = Record.load(HERE / "default_job.json").numbers
    measured, base = n["record_of_the_job"], n["resident_baseline_bytes"]
    cards = [f"{name}: card of {column['card']['bytes'] / 1e9:.0f} GB" for name, column in n["extrapolated"].items()]
    head = ["stage", "processor time", "resident memory", "estimated memory", *cards]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, stage in n["estimated"].items():
        took = measured.get(name)
        cells = ["", ""] if took is None else [f"{took['processor_seconds']:,.0f} s"]
        if took is not None:
            cells.append(f"{max(0, took['peak_memory_bytes'] - base) / 1e9:.1f} GB")
        cells.append(f"{(stage['host_bytes'] + stage['mapped_bytes']) / 1e9:.1f} GB")
        for column in n["extrapolated"].values():
            need = column["stages"][name]
            sizes = f"{need['device_bytes'] / 1e9:.0f} GB, disk {need['disk_bytes'] / 1e9:.0f} GB"
            fits = need["device_bytes"] <= column["card"]["bytes"]
            cells.append(f"{sizes}, {need['seconds'] / 60:.1f} min" if fits else need["note"])
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def mixture() -> str:
    """Layers of a mixture through the paper's method, and all layers by extrapolation, from benchmarks/scale.py."""
    n = Record.load(HERE / "scale_mixture.json").numbers
    alone, relative = n["experts_alone"], "the same over one matrix of an expert in float32"
    rows = [
        ["peak anonymous memory", megabytes(n["anonymous_peak_bytes"])],
        ["peak resident set, mapped pages included", megabytes(n["resident_peak_bytes"])],
        ["the same over the largest matrix in float32", f"{n['resident_peak_over_largest_matrix']:.1f}"],
        ["peak anonymous memory with the experts alone", megabytes(alone["anonymous_peak_bytes"])],
        [relative, f"{alone['anonymous_peak_bytes_over_their_largest_matrix']:.1f}"],
        ["peak resident set with the experts alone", megabytes(alone["resident_peak_bytes"])],
        [relative, f"{alone['resident_peak_bytes_over_their_largest_matrix']:.1f}"],
        ["anonymous memory before the first matrix is read", megabytes(n["anonymous_peak_bytes_by_stage"]["start"])],
        [f"processor time of {n['matrices']} matrices", f"{n['processor_seconds']:,.0f} s"],
        [f"processor time of {n['all_layers']} layers, extrapolated", f"{n['processor_hours_extrapolated']:.1f} h"],
        [f"singular values of {n['all_layers']} layers", megabytes(n["singular_values_bytes_extrapolated"])],
    ]
    head = [f"shape of Qwen3-30B-A3B, {n['layers']} layers, one worker", "above the imports"]
    return marked_down(Table("", head, rows))


def mixture_job() -> str:
    """The default job of one layer of a mixture by stage, and what the formulas say of all of its layers."""
    record = Record.load(HERE / "default_job_mixture.json")
    n, base = record.numbers, record.numbers["resident_baseline_bytes"]
    head = ["stage", "processor time", "resident memory", "estimated memory", "all layers and experts: memory"]
    head += ["pages of the mapped file", "disk"]
    rows = []
    for name, stage in n["estimated"].items():
        took, whole = n["record_of_the_job"][name], n["entire"][name]
        needed = whole["note"] if "does not fit" in whole["note"] else f"{whole['host_bytes'] / 1e9:.1f} GB"
        row = [name, f"{took['processor_seconds']:,.0f} s", f"{(took['peak_memory_bytes'] - base) / 1e9:.1f} GB"]
        row += [f"{(stage['host_bytes'] + stage['mapped_bytes']) / 1e9:.1f} GB", needed]
        row += [f"{whole[key] / 1e9:.0f} GB" for key in ("mapped_bytes", "disk_bytes")]
        rows.append(row)
    reached, larger = ("statistics", "decompositions", "factors", "writing"), n["entire_over_measured"]
    seconds = larger * sum(n["record_of_the_job"][name]["processor_seconds"] for name in reached)
    rows.append(["all but text and recovery, of all layers and experts", f"{seconds / 3600:.1f} h", *[""] * 5])
    return marked_down(Table("", head, rows))


def memory() -> str:
    """Peak memory of compress, from benchmarks/memory.py."""
    n = Record.load(HERE / "memory.json").numbers
    one, two = n["workers_1"], n["workers_2"]
    rows = (
        ("peak anonymous memory", "anonymous_peak_bytes"),
        ("peak resident set, mapped pages included", "resident_peak_bytes"),
    )
    lines = [
        f"| `welore compress`, SmolLM2 ({megabytes(n['model_bytes'])}), above the imports | 1 worker | 2 workers |",
        "|---|---|---|",
    ]
    return "\n".join(lines + [f"| {text} | {megabytes(one[key])} | {megabytes(two[key])} |" for text, key in rows])


def inference() -> str:
    """Speed of SmolLM2 at ERR 50 % over the dense model, and what single layers reach, from benchmarks/inference.py."""
    n = Record.load(HERE / "inference.json").numbers
    forms = ("factored", "pivoted", "merged")
    lines = ["| | factored | pivoted | merged |", "|---|---|---|---|"]
    ratio = n["model"]["model_parameter_ratio"]
    lines.append(f"| parameters of the model, to dense | {' | '.join(f'{ratio.get(f, 1.0):.2f}' for f in forms)} |")
    for speed in n["model"]["speed"]:
        for phase in ("prefill", "decode"):
            threads = f"{speed['threads']} thread{'s' if speed['threads'] > 1 else ''}"
            cells = " | ".join(f"x {speed[phase][form]['speedup']:.2f}" for form in forms)
            lines.append(f"| tokens/s of {phase}, {threads}, to dense | {cells} |")
    for name, found in n["worst_reach_at_0.3"].items():
        cells = " | ".join(f"{found[form]:.2f}" for form in forms[:2])
        lines.append(f"| one layer, r = 0.3 n, {name}: speed-up x parameter ratio, worst of three shapes | {cells} | |")
    return "\n".join(lines)


TOLD = {"prefill": "a prompt of 512 tokens", "decode": "a token after 256"}


def layouts() -> str:
    """Time and kernels of a token in every layout, over the dense model, from benchmarks/layouts.py."""
    n = Record.load(HERE / "layouts.json").numbers
    goals = ("cpu", "size", "gpu")
    lines = ["| 80 % of the parameters, one thread | dense | `cpu` | `size` | `gpu` |", "|---|---|---|---|---|"]
    for name, part in n.items():
        for kind, phases in part["time"].items():
            for phase, models in phases.items():
                dense = f"{1e3 * models['dense']['seconds']:.0f} ms"
                cells = " | ".join(f"x {models[goal]['to_dense']:.2f}" for goal in goals)
                lines.append(f"| {name}, {kind}, {TOLD[phase]} | {dense} | {cells} |")
        made = part["layouts"]
        kernels = " | ".join(f"{made[goal]['kernels_per_block']:.0f}" for goal in ("dense", *goals))
        lines.append(f"| {name}, kernels of a token and block (counted) | {kernels} |")
        forms = " | ".join(f"{made[g]['factored_per_block']:.1f} + {made[g]['pivoted_per_block']:.1f}" for g in goals)
        lines.append(f"| {name}, factored + pivoted matrices of a block |  | {forms} |")
        if "h100_to_dense_by_arithmetic" in made["cpu"]:
            cells = " | ".join(f"x {made[goal]['h100_to_dense_by_arithmetic']:.2f}" for goal in goals)
            lines.append(f"| {name}, a token on an H100, by arithmetic |  | {cells} |")
    return "\n".join(lines)


def tuning() -> str:
    """Speed and memory of fine-tuning, from benchmarks/tuning.py."""
    n = Record.load(HERE / "tuning.json").numbers
    lines = [
        "| | tokens / s | speed | peak of the process | above the imports | both, to `full, whole logits` |",
        "|---|---|---|---|---|---|",
    ]
    for name, own in n["configurations"].items():
        full, stock = own["to_full"], own["to_stock"]
        cells = [
            name,
            f"{own['tokens_per_second']:.0f}",
            f"x {full['speed']:.2f}",
            f"{own['peak_memory_bytes'] / 1e9:.2f} GB, x {full['process']:.2f}",
            f"{own['above_imports_bytes'] / 1e9:.2f} GB, x {full['above_imports']:.2f}",
            f"x {stock['process']:.2f}, x {stock['above_imports']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def training_memory() -> str:
    """Memory of a training step of large models by the formula, from benchmarks/training_memory.py."""
    record = Record.load(HERE / "training_memory.json")
    models = record.inputs["models"]
    lines = []
    for kind, rows in record.numbers.items():
        for name, own in rows.items():
            cells = [f"{own[model]['total'] / 1e9:.0f} GB ({own[model]['trained'] / 1e6:,.0f} M)" for model in models]
            lines.append([kind, name, *cells])
    return marked_down(Table("", ["model", "method", *(f"{model} (trained)" for model in models)], lines))


def methods() -> str:
    """Held-out loss of every method at its learning rates, from recipes/compare_methods_cpu.sh."""
    runs: dict[str, list[Record]] = {}
    for record in sorted(map(Record.load, METHODS.glob("*.finetune.json")), key=lambda r: r.settings["learning_rate"]):
        runs.setdefault(record.inputs["label"], []).append(record)
    best = {label: min(r.numbers["eval_loss"] for r in found) for label, found in runs.items()}
    lines = [
        "| run | trained parameters | held-out loss before | after, at its best rate | at each learning rate |",
        "|---|---|---|---|---|",
    ]
    for label in sorted(runs, key=lambda label: (label.startswith("dense"), best[label])):
        n = runs[label][0].numbers
        rates = ", ".join(f"{r.settings['learning_rate']:.0e}: {r.numbers['eval_loss']:.3f}" for r in runs[label])
        before = f"{n['evaluation'][0][1]:.3f}"
        lines.append(f"| {label} | {n['trainable_parameters']:,} | {before} | {best[label]:.3f} | {rates} |")
    return "\n".join(lines)


def learning_rates() -> str:
    """Held-out loss at rates in proportion to the size of the weights, from benchmarks/learning_rates.py."""
    found: dict[tuple[str, str, str], dict[float, Record]] = {}
    for record in map(Record.load, sorted(HERE.glob("learning_rates/*/*.json"))):
        key = record.inputs["model"], record.inputs["row"], record.settings["method"]
        found.setdefault(key, {})[record.numbers["relative"]] = record
    relatives = sorted({relative for rows in found.values() for relative in rows})
    lines = []
    for key, rows in found.items():
        numbers = next(iter(rows.values())).numbers
        cells = [
            f"{rows[r].numbers['eval_loss']:.3f} ({rows[r].settings['learning_rate']:.1e})" if r in rows else ""
            for r in relatives
        ]
        lines.append(
            [f"{key[0]}, {key[1]}", key[2], f"{numbers['scale']:.3g}", f"{numbers['evaluation'][0][1]:.3f}", *cells]
        )
    head = ["model", "method", "size", "before", *(f"{relative:g} x size" for relative in relatives)]
    return marked_down(Table("", head, lines))


def tasks() -> str:
    """Accuracy of every method on the tasks, from recipes/downstream.sh."""
    return marked_down(Table("", *task_table([Record.load(path) for path in sorted(METHODS.glob("*.score.json"))])))


def learned(directory: Path | None = None) -> str:
    """Every method on every task, a table for each model, from benchmarks/tasks.py."""
    rows = task_rows(directory)
    if not rows:
        return "Not run yet."
    tasks = [task for task in TASKS if any(row.settings["task"] == task for row in rows)]
    parts = []
    for model in dict.fromkeys(row.settings["row"] for row in rows):
        own = [row for row in rows if row.settings["row"] == model]
        lines = [["before training", *(learned_cell(own, task, BEFORE) for task in tasks)]]
        lines += [[method, *(learned_cell(own, task, method) for task in tasks)] for method in methods_of(rows)]
        asked = {task: [r.numbers for r in rows if r.settings["task"] == task and "n" in r.numbers] for task in tasks}
        rates = {task: sorted({f"{100 * n['majority_rate']:.1f}" for n in asked[task]}) for task in tasks}
        counts = {task: sorted({n["n"] for n in asked[task]}) for task in tasks}
        for name, values in (("most frequent answer", rates), ("questions", counts)):
            lines.append([name, *(", ".join(map(str, values[task])) or "not run" for task in tasks)])
        head = ["accuracy, %; held-out loss", *tasks]
        parts.append(f"**{own[0].inputs['label']}**\n\n{marked_down(Table('', head, lines))}")
    return "\n\n".join(parts)


def learned_cost(directory: Path | None = None) -> str:
    """Tokens per second and memory of every method, to full on the same model and task, from benchmarks/tasks.py."""
    rows = [row for row in task_rows(directory) if "tokens_per_second" in row.numbers]
    if not rows:
        return "Not run yet."
    models = dict.fromkeys(row.settings["row"] for row in rows)

    def mean(model: str, task: str, method: str, measure: Callable[[Mapping[str, Any]], float]) -> float | None:
        asked = [model, task, method]
        own = [measure(r.numbers) for r in rows if [r.settings[key] for key in ("row", "task", "method")] == asked]
        return sum(own) / len(own) if own else None

    def cell(model: str, method: str) -> str:
        ratios = []
        for measure in (speed_of, memory_of):
            pairs = [(mean(model, t, method, measure), mean(model, t, "full", measure)) for t in TASKS]
            both = [own / base for own, base in pairs if own is not None and base is not None]
            ratios.append(f"x {sum(both) / len(both):.2f}" if both else "not run")
        return ", ".join(ratios)

    head = ["tokens/s, memory above the imports, to full", *models]
    return marked_down(Table("", head, [[name, *(cell(m, name) for m in models)] for name in methods_of(rows)]))


def speed_of(numbers: Mapping[str, Any]) -> float:
    """Tokens per second of processor time."""
    return float(numbers["tokens_per_second"])


def memory_of(numbers: Mapping[str, Any]) -> float:
    """Peak of a training above the imports, in bytes."""
    return float(numbers["peak_memory_bytes"] - numbers["imports_bytes"])


def task_rows(directory: Path | None) -> list[Record]:
    """The records of benchmarks/tasks.py, the dense model's first."""
    rows = [Record.load(path) for path in sorted((directory or HERE / "tasks").glob("*.json"))]
    return sorted(rows, key=lambda row: str(row.settings["row"]) != "dense")


def methods_of(rows: Sequence[Record]) -> list[str]:
    """The fine-tuning methods of rows, in the order of all tables."""
    run = {row.settings["method"] for row in rows} - {BEFORE}
    return [method for method in order_methods(run) if method in run]


def best_rate(rows: Sequence[Record], model: str, task: str, method: str) -> float | None:
    """The learning rate with the lowest held-out loss at the first seed; None if there is no loss."""
    losses = {
        row.settings["learning_rate"]: row.numbers["eval_loss"]
        for row in rows
        if [row.settings[key] for key in ("row", "task", "method")] == [model, task, method]
        and row.settings["seed"] == 0
        and row.numbers.get("eval_loss") is not None
    }
    return min(losses, key=lambda rate: losses[rate]) if losses else None


def learned_cell(rows: Sequence[Record], task: str, method: str) -> str:
    """Of one model: accuracy with its interval, and held-out loss, at the best rate: means over the seeds."""
    own = [row for row in rows if [row.settings["task"], row.settings["method"]] == [task, method]]
    if not own:
        return "not run"

    def mean(records: Sequence[Record], key: str) -> float:
        return float(sum(record.numbers[key] for record in records) / len(records))

    rate = None if method == BEFORE else best_rate(own, own[0].settings["row"], task, method)
    if method != BEFORE and rate is None:
        return "diverged"
    best = [row for row in own if row.settings.get("learning_rate") == rate]
    scored = [row for row in best if "accuracy" in row.numbers]
    low, high = (100 * mean(scored, key) if scored else 0.0 for key in ("ci95_low", "ci95_high"))
    parts = [f"{100 * mean(scored, 'accuracy'):.1f} [{low:.1f}, {high:.1f}]" if scored else "not scored"]
    if rate is not None:
        finite = [row for row in best if row.numbers.get("eval_loss") is not None]
        parts.append(f"{mean(finite, 'eval_loss'):.3f} at {rate:.0e}")
    return "; ".join(parts) + (f" ({len(scored)} seeds)" if len(scored) > 1 else "")


def marked_down(table: Table) -> str:
    """A table of the report in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (table.headings, ["---"] * len(table.headings), *table.rows))


def study_records() -> dict[Path, Record]:
    """Everything kept of the pre-trainings, by path."""
    return {path: Record.load(path) for path in sorted(STUDY.rglob("*.json"))}


def study_closed() -> list[Downstream]:
    """What was made of the pre-trained models."""
    return downstream(study_records())


def compression_table(runs: Sequence[Downstream]) -> Table:
    """ERR, parameters, bytes and perplexity of every compressed model, in every run."""

    def cell(record: Record) -> str:
        n = record.numbers
        sizes = f"{percent(n['rank_reduction'])}, {percent(n['parameter_ratio'])}, {megabytes(n['bytes'])}"
        return f"{sizes}: {perplexity_text(n['perplexity'])}"

    table = _by_label("ERR, parameters, bytes: perplexity", runs, [run.perplexities for run in runs], cell)
    rows = sorted(table.rows, key=lambda row: (row[0] != DENSE, row[0].rpartition("-")[2], row[0]))
    return Table("", table.headings, rows)


def tunings_table(runs: Sequence[Downstream]) -> Table:
    """Trained parameters and the held-out loss before and after, of every fine-tuning in every run."""

    def cell(record: Record) -> str:
        curve = record.numbers["evaluation"]
        return f"{record.numbers['trainable_parameters']:,}: {curve[0][1]:.3f} -> {curve[-1][1]:.3f}"

    heading = "trained parameters: held-out loss before -> after"
    return _by_label(heading, runs, [run.tunings for run in runs], cell)


def _by_label(
    heading: str, runs: Sequence[Downstream], records: Sequence[Mapping[str, Record]], cell: Callable[[Record], str]
) -> Table:
    """A row per label, a column per run; empty where a run has no such record."""
    labels = dict.fromkeys(label for of_run in records for label in of_run)
    rows = [[label, *(cell(r[label]) if label in r else "" for r in records)] for label in labels]
    return Table("", [heading, *(run.name for run in runs)], rows)


def quality_cells(of: str) -> dict[tuple[str, float], list[Record]]:
    """(row, share of the parameters) -> the records of benchmarks/arena.py or recovery.py, one for each seed."""
    cells: dict[tuple[str, float], list[Record]] = {}
    for record in map(Record.load, sorted((HERE / of).glob("*.json"))):
        cells.setdefault((record.inputs["row"], record.settings["keep"]), []).append(record)
    return cells


def ratio_to(base: Record, found: list[Record], text: str) -> str:
    """The perplexity of a cell on a text to that of `base`: mean over seeds, and half their range."""
    return f"x {over_seeds([r.numbers[f'perplexity_{text}'] / base.numbers[f'perplexity_{text}'] for r in found])}"


def over_seeds(values: list[float]) -> str:
    """The mean of perplexities or their ratios, and half their range if there are several."""
    half = (max(values) - min(values)) / 2
    spread = f"{half:.2g}" if half < 100 else perplexity_text(half)
    return perplexity_text(sum(values) / len(values)) + (f" ± {spread}" if values[1:] else "")


def ratios_to(base: Record, found: list[Record]) -> str:
    """Both perplexities of a cell to those of `base`."""
    return " / ".join(ratio_to(base, found, text) for text in ("wikitext2", "pydoc"))


def cost(record: Record) -> str:
    """Minutes of calibration, compression and tuning of a cell, and the largest peak memory."""
    n = record.numbers
    parts = [part for part in ("calibration_", "", "tuning_") if f"{part}seconds" in n]
    minutes = " + ".join(f"{n[f'{part}seconds'] / 60:.0f}" for part in parts)
    return f"{minutes} min, {max(n[f'{part}peak_memory_bytes'] for part in parts) / 1e9:.1f} GB"


def arena(of: str = ARENA) -> str:
    """Every method at equal parameters, from benchmarks/arena.py: perplexity, divergence and cost, the worst first."""
    cells = quality_cells(of)
    (dense,) = cells.pop(("dense", 1.0))
    texts = list(dense.settings["texts"])

    def mean(records: list[Record], key: str) -> float:
        return float(sum(record.numbers[key] for record in records) / len(records))

    def row(records: list[Record]) -> list[str]:
        n = records[0].numbers
        return [
            f"{records[0].inputs['label']}",
            f"{percent(n['parameter_ratio'])}, {megabytes(n['bytes'])}",
            " / ".join(ratio_to(dense, records, text) for text in texts),
            " / ".join(f"{mean(records, f'kl_mean_{text}'):.3g}" for text in texts),
            " / ".join(percent(mean(records, f"top1_agreement_{text}")) for text in texts),
            cost(records[0]),
        ]

    def worst(cell: tuple[tuple[str, float], list[Record]]) -> tuple[float, float]:
        return -cell[0][1], -mean(cell[1], f"perplexity_{texts[0]}")

    head = ["method", "parameters, weights", "perplexity, to dense", "KL, nats", "same first token", "time, memory"]
    return marked_down(Table("", head, [row(records) for _, records in sorted(cells.items(), key=worst)]))


def shrinkage() -> str:
    """Quality by how far moments are shrunk, a line for each amount of text and size, from benchmarks/shrinkage.py."""
    lines: dict[tuple[str, int, float], dict[float, list[float]]] = {}
    for directory in sorted((HERE / "shrinkage").iterdir()):
        dense = Record.load(directory / "dense-1-0.json")
        keys = [f"perplexity_{text}" for text in dense.settings["texts"]]
        for record in map(Record.load, sorted(directory.glob("*-*-*-*.json"))):
            at = record.settings
            ratio = math.prod(record.numbers[key] / dense.numbers[key] for key in keys) ** (1 / len(keys))
            cells = lines.setdefault((record.inputs["model"], at["num_tokens"], at["keep"]), {})
            cells.setdefault(at["shrinkage"], []).append(ratio)
    shares = sorted({share for cells in lines.values() for share in cells})
    rows = [
        [model, f"{tokens:,}", percent(keep), *(f"x {over_seeds(cells[s])}" if s in cells else "" for s in shares)]
        for (model, tokens, keep), cells in sorted(lines.items())
    ]
    return marked_down(Table("", ["model", "tokens", "parameters", *(f"shrunk by {s:g}" for s in shares)], rows))


def ablation(of: str = "quality") -> str:
    """Allocation of ranks (columns) apart from factorisation, storage and neurons (rows), from benchmarks/arena.py."""
    cells = quality_cells(of)
    (dense,) = cells["dense", 1.0]

    def cell(method: str | None, ratio: float) -> str:
        records = cells.get((method or "", ratio))
        return ratios_to(dense, records) if records else ""

    head = ["", *(f"{strategy}, {percent(ratio)}" for ratio in ABLATED for strategy in STRATEGIES)]
    rows = [
        [name, *(cell(method, ratio) for ratio in ABLATED for method in methods)]
        for name, methods in FACTORISATIONS.items()
    ]
    return marked_down(Table("", head, [row for row in rows if any(row[1:])]))


def quality(of: str = "quality") -> str:
    """Perplexity of every method at equal parameters, from benchmarks/arena.py: mean over seeds, and their range."""
    cells = quality_cells(of)
    (dense,) = cells["dense", 1.0]
    ratios = sorted({ratio for _, ratio in cells} - {1.0}, reverse=True)

    head = ["parameters of the targeted matrices kept", *(percent(ratio) for ratio in ratios), "time, memory"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    order = {
        row: max(f[0].numbers["perplexity_wikitext2"] for (name, _), f in cells.items() if name == row)
        for row, _ in cells
    }
    for row in sorted(order, key=lambda row: -order[row]):
        own = {ratio: cells.get((row, ratio), []) for ratio in ratios}
        measured = [found for found in own.values() if found]
        if measured:
            shown = " | ".join(ratios_to(dense, found) if found else "" for found in own.values())
            lines.append(f"| {measured[0][0].inputs['label']} | {shown} | {cost(measured[-1][0])} |")
    sizes = [cells[SIZED, ratio][0].numbers for ratio in ratios]
    shown = " | ".join(f"{percent(n['rank_reduction'])}, {megabytes(n['bytes'])}" for n in sizes)
    lines.append(f"| ERR and weights (no data, no recovery; dense {megabytes(dense.numbers['bytes'])}) | {shown} | |")
    for found in (found for (row, _), found in cells.items() if row.startswith("dense-tuned")):
        lines += ["", f"{found[0].inputs['label']}: {ratios_to(dense, found)}."]
    return "\n".join(lines)


def front() -> str:
    """The front page's table: one row for each command, with parameters, bytes, perplexity and time of one seed."""
    lines = [
        "| model | `welore compress MODEL OUT` with | parameters | weights | perplexity, to dense | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for of, model, row, ratio, command in FRONT:
        cells = quality_cells(of)
        (dense,), records = cells["dense", 1.0], cells[row, ratio]
        n = records[0].numbers
        text = "x 1 / x 1" if row == "dense" else " / ".join(_ratios(dense, records))
        minutes = f"{(n.get('calibration_seconds', 0) + n['seconds']) / 60:.1f}" if "seconds" in n else ""
        cells_of_row = [model, command or "(dense)", percent(n.get("parameter_ratio", 1.0)), megabytes(n["bytes"])]
        lines.append(f"| {' | '.join([*cells_of_row, text, minutes])} |")
    return "\n".join(lines)


def _ratios(base: Record, records: list[Record]) -> list[str]:
    """Mean perplexity over seeds on both texts, to that of `base`."""
    means = [sum(r.numbers[text] for r in records) / len(records) / base.numbers[text] for text in TEXTS]
    return [f"x {perplexity_text(mean)}" for mean in means]


def kinds() -> str:
    """Perplexity on texts of other kinds, from benchmarks/arena.py --texts: a ratio to the dense model."""
    cells = quality_cells("quality-kinds")
    (dense,) = cells.pop(("dense", 1.0))
    names = list(dense.settings["texts"])
    rows = [["dense (perplexity)", *(perplexity_text(dense.numbers[f"perplexity_{name}"]) for name in names)]]
    for (_, ratio), found in sorted(cells.items(), key=lambda cell: (cell[0][0], -cell[0][1])):
        shown = [ratio_to(dense, found, name) for name in names]
        rows.append([f"{found[0].inputs['label']}, {percent(ratio)}", *shown])
    return marked_down(Table("", ["parameters of the targeted matrices kept", *names], rows))


def recovered() -> str:
    """Perplexity after recovery on real text, to dense models that read the same text, from benchmarks/recovery.py."""
    cells, ratios = quality_cells("quality"), (0.9, 0.8, 0.6)
    rows = []
    for row, base, label in RECOVERED:
        own = [cells.get((row, ratio)) for ratio in ratios]
        rows.append([label, *(ratios_to(cells[base, 1.0][0], records) if records else "" for records in own)])
    return marked_down(Table("", ["relative to", *map(percent, ratios)], rows))


def tools() -> str:
    """What every tool does with every form, from benchmarks/tools.py."""
    numbers = Record.load(HERE / "tools.json").numbers
    forms = list(
        dict.fromkeys([*numbers["forms"], *(form for row in numbers["rows"].values() for form in row["cells"])])
    )
    lines = [f"| tool | version | {' | '.join(forms)} |", "|---" * (len(forms) + 2) + "|"]
    for name, row in numbers["rows"].items():
        cells = [row["cells"].get(form, "not run").replace("ok", "yes") for form in forms]
        lines.append(f"| {name} | {row['package']} {row['version']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def heads() -> str:
    """Neurons alone beside heads and neurons at equal parameters, from benchmarks/anywhere.py --heads."""
    record = Record.load(HERE / "anywhere.json")
    texts = [f"perplexity_{text}" for text in record.settings["texts"]]
    rows = [
        [name.partition(": ")[2], percent(row["parameter_ratio"]), *(perplexity_text(row[text]) for text in texts)]
        for name, row in record.numbers["rows"].items()
    ]
    names = [text.replace("_", " ") for text in texts]
    return marked_down(Table("", ["taken out", "parameters", *names], rows))


def int8() -> str:
    """Perplexity and bytes of weights in 16 and in 8 bits, from benchmarks/int8.py."""
    record = Record.load(HERE / "int8.json")
    rows, texts = record.numbers["rows"], record.settings["texts"]
    lines = [f"| weights | bytes | {' | '.join(f'perplexity, {text} (to 16 bits)' for text in texts)} |"]
    lines.append("|---" * (len(texts) + 2) + "|")
    for name, row in rows.items():
        wide = rows[f"{name.split(', ')[0]}, 16 bits"]
        values = [(row[f"perplexity_{text}"], wide[f"perplexity_{text}"]) for text in texts]
        cells = [f"{perplexity_text(value)} (x {perplexity_text(value / base)})" for value, base in values]
        label = name.replace("compressed", f"{percent(record.numbers['parameter_ratio'])} of the parameters")
        lines.append(f"| {label} | {megabytes(row['bytes'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def equal_bytes(of: str) -> str:
    """Quality of files of the dense model and of compressed ones, from benchmarks/equal_bytes.py."""
    rows = Record.load(HERE / f"equal_bytes-{of}.json").numbers["rows"]
    lines = []
    for name, row in rows.items():
        what, form = name.split(", ")
        kind, _, ratio = what.partition(" ")
        dense, exact = rows["dense, 16 bits"], rows[f"{what}, 16 bits"]
        label = "dense" if kind == "dense" else percent(float(ratio)) + (", anywhere" if kind == "anywhere" else "")
        ratios = (f"x {perplexity_text(row[text] / dense[text])}" for text in TEXTS)
        millions = f"{exact['multiplications_per_token'] / 1e6:.0f} M"
        divergence = (f"{row['kl_mean']:.4f}", percent(row["top1_agreement"]))
        lines.append([label, form, megabytes(row["bytes"]), millions, " / ".join(ratios), *divergence])
    head = ["parameters", "weights", "bytes", "multiplications", "perplexity, to dense", "KL", "same first token"]
    return marked_down(Table("", head, lines))


def engines() -> str:
    """The same for the front page: the forms of low rank in one column."""
    numbers = Record.load(HERE / "tools.json").numbers
    columns = {"low rank": LOW_RANK} | {form: (form,) for form in numbers["forms"] if form not in LOW_RANK}
    lines = [f"| tool | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in numbers["rows"].items():
        cells = []
        for forms in columns.values():
            right = [form for form in forms if row["cells"].get(form) == "ok"]
            ran = any(form in row["cells"] for form in forms)
            cells.append("yes" if len(right) == len(forms) else ", ".join(right) or ("no" if ran else "not run"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def serving() -> str:
    """Tokens/s and time to first token in vLLM, over the dense model, from benchmarks/serving.py."""
    record = Record.load(HERE / "serving.json")
    n, new_tokens = record.numbers, record.settings["new_tokens"]
    names = [name for name in n["bytes"] if name != "dense"]
    rows = [["weights", f"{n['bytes']['dense'] / 1e6:,.0f} MB", *(f"{n['bytes'][m] / 1e6:,.0f} MB" for m in names)]]
    first = n["first_token"]
    label = f"time to the first token, a prompt of {record.settings['first_prompt']}"
    rows.append([label, f"{first['dense']['seconds']:.2f} s", *(f"x {first[m]['to_dense']:.2f}" for m in names)])
    for count, taken in n["requests"].items():
        speed = int(count) * new_tokens / taken["dense"]["seconds"]
        ratios = [f"x {1 / taken[m]['to_dense']:.2f}" for m in names]
        rows.append([f"throughput, {count} at once", f"{speed:,.0f} tokens/s", *ratios])
    return marked_down(Table("", [f"vLLM {record.inputs['vllm']}", "dense", *(f"`{m}`" for m in names)], rows))


def take(source: Path, target: Path, root: Path | None = None) -> None:
    """Copy a record without the paths of its model and text, and with only a few of the questions of a task.

    root: what the model's name is relative to; without one it is the last part of its path.
    """
    record = Record.load(source)
    model = PurePath(record.inputs["model"])
    record.inputs["model"] = model.relative_to(root).as_posix() if root else model.name
    statistics = (record.inputs.get("compression") or {}).get("statistics") or {}
    if statistics:
        statistics["inputs"]["model"] = PurePath(statistics["inputs"]["model"]).name
    if record.settings.get("dataset"):
        record.settings["dataset"] = PurePath(record.settings["dataset"]).name
    if "items" in record.numbers:
        record.numbers["items_left_out"] = max(0, len(record.numbers["items"]) - ITEMS_SHOWN)
        del record.numbers["items"][ITEMS_SHOWN:]
    record.save(target)


def take_study(source: Path) -> None:
    """Records (not weights) of every seed, with their places, and the report's figures of the first."""
    for place in sorted(source.glob("seed-*")):
        shutil.rmtree(STUDY / place.name, ignore_errors=True)
        for path in (place / "pretrain" / "pretrain.json", *place.glob("*.ppl.json"), *place.glob("*/finetune.json")):
            take(path, STUDY / path.relative_to(source), source)
    (STUDY / "figures").mkdir(exist_ok=True)
    for path in (source / "report" / "study-settling.png", *(source / "report").glob("study-1-*.png")):
        shutil.copyfile(path, STUDY / "figures" / path.name.replace("-1-", "-"))


TABLES = {
    "front": front,
    "demo": demo,
    "protocol": protocol,
    "speed": speed,
    "speed_scaled": speed_scaled,
    "writing": writing,
    "against_commit": against_commit,
    "memory": memory,
    "default_job": default_job,
    "mixture": mixture,
    "mixture_job": mixture_job,
    "inference": inference,
    "layouts": layouts,
    "serving": serving,
    "tuning": tuning,
    "training_memory": training_memory,
    "methods": methods,
    "learning_rates": learning_rates,
    "tasks": tasks,
    "learned": learned,
    "learned_cost": learned_cost,
    "arena": arena,
    "arena_gemma": lambda: arena("arena/gemma-3-270m-Q4_K_M"),
    "ablation": ablation,
    "shrinkage": shrinkage,
    "quality": quality,
    "quality_gemma3": lambda: quality("quality-gemma3-270m"),
    "kinds": kinds,
    "tools": tools,
    "heads": heads,
    "int8": int8,
    "equal_bytes": lambda: equal_bytes("SmolLM2-135M-Instruct"),
    "engines": engines,
    "recovered": recovered,
    "study": lambda: marked_down(claims_table(list(study_records().values()))),
    "study_closing": lambda: marked_down(verdicts(study_closed())),
    "study_cuts": lambda: marked_down(compression_table(study_closed())),
    "study_tunings": lambda: marked_down(tunings_table(study_closed())),
}


def filled(text: str) -> str:
    """The text with every marked table made anew."""
    pattern = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}", text)


def main() -> None:
    """Rewrite the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--demo", type=Path, help="directory that `make demo` wrote")
    parser.add_argument("--methods", type=Path, help="directory that recipes/compare_methods_cpu.sh wrote")
    parser.add_argument("--tasks", type=Path, help="directory with score records of the tasks")
    parser.add_argument(
        "--protocol", type=Path, help="directory with records of whole texts, one of them labelled dense"
    )
    parser.add_argument("--study", type=Path, help="directory that recipes/emergence_cpu.sh wrote")
    arguments = parser.parse_args()
    if arguments.demo:
        for name in DEMO:
            take(arguments.demo / f"{name}.ppl.json", HERE / "demo" / f"{name}.ppl.json")
    if arguments.methods:
        for path in sorted(arguments.methods.glob("*/finetune.json")):
            take(path, METHODS / f"{path.parent.name}.finetune.json")
    if arguments.tasks:
        for path in sorted(arguments.tasks.glob("*.score.json")):
            take(path, METHODS / path.name)
    if arguments.protocol:
        for path in sorted(arguments.protocol.glob("*.json")):
            take(path, HERE / "protocol" / path.name)
    if arguments.study:
        take_study(arguments.study)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if not arguments.check:
            page.write_text(filled(text), encoding="utf-8")
        elif filled(text) != text:
            sys.exit(f"{page.name} differs from its records: run benchmarks/tables.py")


if __name__ == "__main__":
    main()
