"""7 - comparisons: records of perplexities, fine-tuning and scoring -> groups that may be compared, their tables.

Reads records only: neither torch nor a model.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from welore.errors import WeLoreError
from welore.evaluation.tasks import TASKS
from welore.records import MODEL_FINGERPRINT, Record
from welore.reporting.figures import DENSE, Result
from welore.reporting.formatting import megabytes, percent, perplexity_text

# the order of methods in tables and figures
METHOD_ORDER = ("full", "lrc", "nlrc", "lora", "galore")
UNKNOWN = "–"


@dataclass(frozen=True)
class Table:
    """Headings and rows of text; caption: what all rows have in common, names: columns that are words."""

    caption: str
    headings: list[str]
    rows: list[list[str]]
    names: int = 1


@dataclass(frozen=True)
class Comparison:
    """Fine-tuning runs on the same material, with the same seed, steps, tokens of a step and dtype."""

    caption: str
    runs: list[Record]

    @property
    def best(self) -> list[Record]:
        """Of each name, method and beginning the run of lowest held-out loss: its learning rate was the best tried."""
        found: dict[tuple[str, ...], Record] = {}
        for run in self.runs:
            key = (run_name(run), run.settings["method"], run.inputs[MODEL_FINGERPRINT])
            if key not in found or _final_loss(run) < _final_loss(found[key]):
                found[key] = run
        return list(found.values())

    @property
    def table(self) -> Table:
        """A line per run: what it trained, how large that is, how fast it was and what it reached."""
        best = self.best
        headings = ["run", "trained", "learning rate", "trained parameters", "of", "tokens / s", "peak memory"]
        headings += ["held-out loss before", "after", "perplexity after", "ERR", "parameters", "bytes"]
        return Table(self.caption, headings, [_run_row(run, chosen=run in best) for run in self.runs], names=2)


def comparisons(records: Iterable[Record]) -> list[Comparison]:
    """The fine-tuning runs among `records` in groups that may be compared, in the order of the first of each."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for run in records:
        if run.kind == "finetune":
            s = run.settings
            material = (run.inputs["data_sha256"], run.inputs["split"], s["max_length"], s["seed"], s["loss_on_prompt"])
            groups.setdefault(
                (*material, s["max_eval_samples"], s["max_steps"], _sequences(run), s["dtype"]), []
            ).append(run)
    return [Comparison(_caption(runs[0]), sorted(runs, key=_place)) for runs in groups.values()]


def task_table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the methods-by-tasks table: accuracy in per cent, its 95 % interval, unreadable answers.

    records: of kind "accuracy", others are passed over; a row is a label (`welore score --label`), else a model.
    An answer that could not be read was counted as wrong. The last rows say what the most frequent answer scores,
    and on how many questions. WeLoreError if two records are of the same label and task, or if the tasks were not
    scored on the same questions.
    """
    scores = [r for r in records if r.kind == "accuracy"]
    if not scores:
        raise WeLoreError("there is no record of an accuracy: make one with `welore score`")
    tasks = [task for task in TASKS if any(r.settings["task"] == task for r in scores)]
    cells: dict[str, dict[str, Record]] = {}
    for r in scores:
        row, task = cells.setdefault(run_name(r), {}), r.settings["task"]
        if task in row:
            raise WeLoreError(f"two records are of {run_name(r)!r} and {task}: keep one")
        row[task] = r
    asked = {task: {_questions(r) for r in scores if r.settings["task"] == task} for task in tasks}
    for task, found in asked.items():
        if len(found) > 1:
            raise WeLoreError(f"{task} was scored on different questions: n and majority rate are {sorted(found)}")
    rows = [[name, *(_accuracy(row.get(task)) for task in tasks)] for name, row in cells.items()]
    sizes, rates = zip(*(next(iter(asked[task])) for task in tasks), strict=True)
    rows.append(["most frequent answer", *(f"{100 * rate:.1f}" for rate in rates)])
    rows.append(["n", *map(str, sizes)])
    return ["accuracy, %", *tasks], rows


def task_tables(records: Iterable[Record]) -> list[Table]:
    """The accuracies among `records` in as few tables as can be: what one table refuses begins another."""
    groups: list[list[Record]] = []
    for record in (r for r in records if r.kind == "accuracy"):
        group = next((g for g in groups if all(_side_by_side(record, other) for other in g)), None)
        if group is None:
            groups.append(group := [])
        group.append(record)
    return [Table("", *task_table(group)) for group in groups]


def run_name(record: Record) -> str:
    """The label; without one the method and checkpoint of a run, or the name of the model that was scored."""
    if record.inputs["label"]:
        return str(record.inputs["label"])
    path = PurePath(record.inputs["model"].replace("\\", "/"))
    name = path.parent.name if path.name == "model" and path.parent.name else path.name  # RUN/model is RUN's result
    if record.kind != "finetune":
        return name or record.inputs["model"]
    distilled = ", distilled" if record.settings.get("distill") else ""
    return f"{record.settings['method']} of {name}{distilled}"


def _sequences(run: Record) -> int:
    """Sequences that a step reads, in all processes."""
    s = run.settings
    return int(s["batch_size"] * s["gradient_accumulation_steps"] * s["processes"])


def _caption(run: Record) -> str:
    s = run.settings
    text = last_name(str(s["task"] or s["dataset"]))
    return f"{text}, {s['max_steps']:,} steps of {_sequences(run)} x {s['max_length']} tokens, {s['dtype']}"


def _place(run: Record) -> tuple[Any, ...]:
    dense = run.numbers["rank_reduction"] == 0
    method = run.settings["method"]
    known = METHOD_ORDER.index(method) if method in METHOD_ORDER else len(METHOD_ORDER)
    return known, method, dense, run_name(run), run.settings["learning_rate"]


def _final_loss(run: Record) -> float:
    return float(run.numbers["evaluation"][-1][1]) if run.numbers["evaluation"] else float("inf")


def _run_row(run: Record, *, chosen: bool) -> list[str]:
    s, n = run.settings, run.numbers
    curve = n["evaluation"]
    whole = bool(curve) and curve[0][0] == 0
    speed = n.get("tokens_per_second")
    return [
        run_name(run),
        n["trains"],
        f"{s['learning_rate']:g}" + ("" if chosen else " (not the best)"),
        f"{n['trainable_parameters']:,}",
        f"{n['total_parameters']:,}",
        UNKNOWN if speed is None else f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}",
        f"{n['peak_memory_bytes'] / 1e9:.2f} GB",
        f"{curve[0][1]:.4f}" if whole else UNKNOWN,
        f"{curve[-1][1]:.4f}" if curve else UNKNOWN,
        perplexity_text(curve[-1][2]) if curve else UNKNOWN,
        percent(n["rank_reduction"]),
        percent(n["parameter_ratio"]),
        megabytes(n["bytes"]),
    ]


def _questions(record: Record) -> tuple[int, float]:
    return record.numbers["n"], record.numbers["majority_rate"]


def _side_by_side(one: Record, other: Record) -> bool:
    """Whether two accuracies can stand in one table."""
    if one.settings["task"] != other.settings["task"]:
        return True
    return run_name(one) != run_name(other) and _questions(one) == _questions(other)


def _accuracy(record: Record | None) -> str:
    if record is None:
        return ""
    n = record.numbers
    unread = f" ({n['unparsable']} unreadable)" if n["unparsable"] else ""
    return f"{100 * n['accuracy']:.1f} [{100 * n['ci95_low']:.1f}, {100 * n['ci95_high']:.1f}]{unread}"


# --- perplexities -----------------------------------------------------------------------------------------------


def results(records: Iterable[Record], originals: Collection[str] = ()) -> dict[str, list[Result]]:
    """Caption of a text -> results on it: same text, windows, length and dtype; dense first, then by falling size.

    Batch size and device are left aside: they do not change a perplexity. originals: models that were compressed;
    they decide when several dense models (a merged one, say) could be the one to compare with.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for r in records:
        text = r.inputs.get("text_sha256") or r.settings["dataset"]
        groups.setdefault((text, r.numbers["windows"], r.settings["max_length"], r.settings["dtype"]), []).append(r)
    texts: dict[str, list[Result]] = {}
    for (text, windows, length, dtype), group in groups.items():
        caption = f"{last_name(group[0].settings['dataset'])}, {windows} windows of {length} tokens, {dtype}"
        # one name can hide two texts: pydoc differs between versions of Python
        caption += f" (text {text[:8]})" if caption in texts else ""
        base = _dense_perplexity(group, originals)
        rows = [_result(r, base) for r in group]
        texts[caption] = sorted(rows, key=lambda r: (r.strategy != DENSE, -r.parameter_ratio, r.strategy, r.name))
    return texts


def _result(record: Record, base: float | None) -> Result:
    value = _perplexity(record)
    return Result(
        name=record.inputs.get("label") or last_name(record.inputs["model"]),
        strategy=_strategy(record),
        rank_reduction=record.numbers["rank_reduction"],
        parameter_ratio=record.numbers["parameter_ratio"],
        bytes=record.numbers["bytes"],
        perplexity=value,
        ratio=value / base if value and base else None,
    )


def _perplexity(record: Record) -> float | None:
    value = record.numbers["perplexity"]
    return float(value) if value is not None and math.isfinite(value) else None


def _strategy(record: Record) -> str:
    compression = record.inputs["compression"]
    if not compression and record.numbers["rank_reduction"] == 0:
        return DENSE
    return str((compression or {}).get("strategy", "not recorded"))


def _dense_perplexity(group: Sequence[Record], originals: Collection[str]) -> float | None:
    dense = [r for r in group if _strategy(r) == DENSE]
    dense = [r for r in dense if r.inputs["model"] in originals] or dense
    return _perplexity(dense[0]) if len({r.inputs["model"] for r in dense}) == 1 else None


def last_name(path: str) -> str:
    """What a path or a hub id ends in."""
    return PurePath(path.replace("\\", "/")).name or path
