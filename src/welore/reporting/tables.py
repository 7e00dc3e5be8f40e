"""Records of perplexities, fine-tuning and scoring -> groups that may be compared, and their tables.

Reads records only: neither torch nor a model.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import PurePath
from typing import Any

from welore.errors import WeLoreError
from welore.evaluation.tasks import TASKS
from welore.records import MODEL_FINGERPRINT, Record
from welore.reporting.formatting import last_name, megabytes, percent, perplexity_text

DENSE = "dense"
METHOD_ORDER = ("full", "lrc", "nlrc", "lora", "galore")  # in tables and figures; other methods follow
UNKNOWN = "–"
PLAN_HEADINGS = ("plan", "model", "strategy", "target", "ERR", "parameters", "bytes", "LRCs", "min_ratio", "threshold")


@dataclass(frozen=True)
class Table:
    """Headings and rows of text. caption: common to all rows; text_columns: the first columns hold words."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1

    def __post_init__(self) -> None:
        for cell in (cell for row in self.rows for cell in row):
            if not isinstance(cell, str):
                raise TypeError(f"{cell!r} is not text")


@dataclass(frozen=True)
class Result:
    """One row of the results: a model on a text. strategy: "dense" for a model without low-rank layers.

    perplexity: None when it is not finite. ratio: to the dense model on the same text, None without one.
    """

    name: str
    strategy: str
    rank_reduction: float
    parameter_ratio: float
    bytes: int
    perplexity: float | None
    ratio: float | None = None

    @property
    def size(self) -> str:
        """ERR, parameter ratio and bytes, which always stand together."""
        err, ratio = percent(self.rank_reduction), percent(self.parameter_ratio)
        return f"ERR {err}, parameters {ratio}, {megabytes(self.bytes)}"


def plan_row(name: str, model: str, settings: Mapping[str, Any], numbers: Mapping[str, Any]) -> list[str]:
    """A row of the table of plans; numbers have `bytes` and `bytes_dense` once a checkpoint was written."""
    n, size = numbers, "not written"
    if "bytes" in n:
        size = f"{megabytes(n['bytes'])} of {megabytes(n['bytes_dense'])}"
    return [
        name,
        last_name(model),
        settings["strategy"],
        target_text(settings["target"]),
        percent(n["rank_reduction"]),
        percent(n["parameter_ratio"]),
        size,
        f"{n['lrcs']} of {n['matrices']}",
        str(settings["min_ratio"]),
        f"{n['threshold']:.4f}",
    ]


def target_text(target: Mapping[str, float]) -> str:
    """The target of a plan in words: "ERR 50.0 %"."""
    names = {"rank_reduction": "ERR", "keep": "parameters"}
    return ", ".join(
        f"{names[name]} {percent(value)}" if name in names else f"{name} {value:.4g}" for name, value in target.items()
    )


@dataclass(frozen=True)
class Comparison:
    """Fine-tuning runs on the same data, with the same seed, steps, tokens of a step and dtype."""

    caption: str
    runs: list[Record]

    @property
    def best(self) -> list[Record]:
        """The run of lowest held-out loss for each name, method and initial model: it had the best learning rate."""
        best: dict[tuple[str, ...], Record] = {}
        for run in self.runs:
            key = (run_name(run), run.settings["method"], run.inputs[MODEL_FINGERPRINT])
            if key not in best or _final_loss(run) < _final_loss(best[key]):
                best[key] = run
        return list(best.values())

    @property
    def table(self) -> Table:
        """A row per run: what it trained, the size, the speed and the losses."""
        best = self.best
        headings = ["run", "trained", "learning rate", "trained parameters", "of", "tokens / s", "peak memory"]
        headings += ["held-out loss before", "after", "perplexity after", "ERR", "parameters", "bytes"]
        rows = [_run_row(run, is_best=run in best) for run in self.runs]
        return Table(self.caption, headings, rows, text_columns=2)


def comparisons(records: Iterable[Record]) -> list[Comparison]:
    """The fine-tuning runs among the records, in groups that may be compared, in the order of each group's first."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for run in records:
        if run.kind == "finetune":
            s = run.settings
            data = (run.inputs["data_sha256"], run.inputs["split"], s["max_length"], s["seed"], s["loss_on_prompt"])
            packed = s.get("packing", False)  # version 0.1 has none
            key = (*data, s["max_eval_samples"], s["max_steps"], _sequences(run), s["dtype"], packed)
            groups.setdefault(key, []).append(run)
    return [Comparison(_caption(runs[0]), sorted(runs, key=_sort_key)) for runs in groups.values()]


def order_methods(methods: Iterable[str]) -> list[str]:
    """METHOD_ORDER, then those of the methods that are not in it, by name."""
    return [*METHOD_ORDER, *sorted(set(methods) - set(METHOD_ORDER))]


def run_name(record: Record) -> str:
    """The label; without one the method and checkpoint of a run, or the name of the model that was scored."""
    if record.inputs.get("label"):
        return str(record.inputs["label"])
    path = PurePath(record.inputs["model"].replace("\\", "/"))
    name = path.parent.name if path.name == "model" and path.parent.name else path.name  # RUN/model is RUN's result
    if record.kind != "finetune":
        return name or record.inputs["model"]
    distilled = ", distilled" if record.settings.get("distill") else ""
    return f"{record.settings['method']} of {name}{distilled}"


def _sequences(run: Record) -> int:
    """Sequences per step, in all processes."""
    s = run.settings
    return int(s["batch_size"] * s["gradient_accumulation_steps"] * s["processes"])


def _caption(run: Record) -> str:
    s = run.settings
    text = last_name(str(s["task"] or s["dataset"]))
    return f"{text}, {s['max_steps']:,} steps of {_sequences(run)} x {s['max_length']} tokens, {s['dtype']}"


def _sort_key(run: Record) -> tuple[Any, ...]:
    method = run.settings["method"]
    position = order_methods([method]).index(method)
    return position, method, run.numbers["rank_reduction"] == 0, run_name(run), run.settings["learning_rate"]


def _final_loss(run: Record) -> float:
    return float(run.numbers["evaluation"][-1][1]) if run.numbers["evaluation"] else math.inf


def _run_row(run: Record, *, is_best: bool) -> list[str]:
    s, n = run.settings, run.numbers
    curve = n["evaluation"]
    from_start = bool(curve) and curve[0][0] == 0
    speed = n.get("tokens_per_second")
    return [
        run_name(run),
        n["trains"],
        f"{s['learning_rate']:g}" + ("" if is_best else " (not the best)"),
        f"{n['trainable_parameters']:,}",
        f"{n['total_parameters']:,}",
        UNKNOWN if speed is None else f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}",
        f"{n['peak_memory_bytes'] / 1e9:.2f} GB",
        f"{curve[0][1]:.4f}" if from_start else UNKNOWN,
        f"{curve[-1][1]:.4f}" if curve else UNKNOWN,
        perplexity_text(curve[-1][2]) if curve else UNKNOWN,
        percent(n["rank_reduction"]),
        percent(n["parameter_ratio"]),
        megabytes(n["bytes"]),
    ]


def task_table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table of methods by tasks: accuracy in per cent with its 95 % interval.

    A row is a label, else a model; the last rows are the accuracy of the most frequent answer, and the number of
    questions. WeLoreError if a label has two records of a task, or a task was scored on different questions.
    """
    scores = [r for r in records if r.kind == "accuracy"]
    if not scores:
        raise WeLoreError("there is no record of an accuracy: make one with `welore score`")
    scored = {r.settings["task"] for r in scores}
    tasks = [*(task for task in TASKS if task in scored), *sorted(scored - set(TASKS))]
    for reason in (_conflict(*pair) for pair in combinations(scores, 2)):
        if reason:
            raise WeLoreError(reason)
    cells: dict[str, dict[str, str]] = {}
    for r in scores:
        n = r.numbers
        unreadable = f" ({n['unparsable']} unreadable)" if n["unparsable"] else ""
        interval = f"[{100 * n['ci95_low']:.1f}, {100 * n['ci95_high']:.1f}]{unreadable}"
        cells.setdefault(run_name(r), {})[r.settings["task"]] = f"{100 * n['accuracy']:.1f} {interval}"
    rows = [[name, *(row.get(task, "") for task in tasks)] for name, row in cells.items()]
    questions = {r.settings["task"]: r.numbers for r in scores}
    sizes, rates = ([questions[task][name] for task in tasks] for name in ("n", "majority_rate"))
    rows.append(["most frequent answer", *(f"{100 * rate:.1f}" for rate in rates)])
    rows.append(["n", *map(str, sizes)])
    return ["accuracy, %", *tasks], rows


def task_tables(records: Iterable[Record]) -> list[Table]:
    """The accuracies among the records in as few tables as possible: a record that one table refuses begins another."""
    groups: list[list[Record]] = []
    for record in (r for r in records if r.kind == "accuracy"):
        group = next((g for g in groups if not any(_conflict(record, other) for other in g)), None)
        if group is None:
            groups.append(group := [])
        group.append(record)
    return [Table("", *task_table(group)) for group in groups]


def _conflict(one: Record, other: Record) -> str:
    """Why two accuracies cannot be in one table; empty if they can."""
    task, sets = one.settings["task"], sorted({(r.numbers["n"], r.numbers["majority_rate"]) for r in (one, other)})
    if task != other.settings["task"]:
        return ""
    if run_name(one) == run_name(other):
        return f"two records are of {run_name(one)!r} and {task}: keep one"
    return f"{task} was scored on different questions: n and majority rate are {sets}" if len(sets) > 1 else ""


def results(records: Iterable[Record], originals: Collection[str] = ()) -> dict[str, list[Result]]:
    """Caption of a text -> perplexities on it (same windows, BOS and dtype), dense first, then by falling size.

    originals: models that were compressed; they decide which of several dense models (a merged one, say) is the base.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for r in records:
        text, s = r.inputs.get("text_sha256") or r.settings["dataset"], r.settings
        key = text, r.numbers["windows"], s["max_length"], s["dtype"], s.get("bos", "text")  # version 0.1 has no other
        groups.setdefault(key, []).append(r)
    texts: dict[str, list[Result]] = {}  # batch size and device are ignored: they do not change a perplexity
    for (text, windows, length, dtype, bos), group in groups.items():
        caption = f"{last_name(group[0].settings['dataset'])}, {windows} windows of {length} tokens, {dtype}"
        caption += "" if bos == "text" else f", BOS: {bos}"
        # One name can stand for two texts: pydoc differs between versions of Python.
        caption += f" (text {text[:8]})" if caption in texts else ""
        dense = [r for r in group if _strategy(r) == DENSE]
        dense = [r for r in dense if r.inputs["model"] in originals] or dense
        base = _perplexity(dense[0]) if len({r.inputs["model"] for r in dense}) == 1 else None
        rows = [_result(r, base) for r in group]
        texts[caption] = sorted(rows, key=lambda r: (r.strategy != DENSE, -r.parameter_ratio, r.strategy, r.name))
    return texts


def _result(record: Record, base: float | None) -> Result:
    value = _perplexity(record)
    name = str(record.inputs.get("label") or last_name(record.inputs["model"]))
    rank_reduction, parameter_ratio, size = (record.numbers[n] for n in ("rank_reduction", "parameter_ratio", "bytes"))
    ratio = value / base if value and base else None
    return Result(name, _strategy(record), rank_reduction, parameter_ratio, size, value, ratio)


def _perplexity(record: Record) -> float | None:
    value = record.numbers["perplexity"]
    return float(value) if value is not None and math.isfinite(value) and value > 0 else None


def _strategy(record: Record) -> str:
    compression = record.inputs["compression"]
    if not compression and record.numbers["rank_reduction"] == 0:
        return DENSE
    return str((compression or {}).get("strategy", "not recorded"))
