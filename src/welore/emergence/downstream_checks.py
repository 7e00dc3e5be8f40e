"""The claims about compressed and fine-tuned models: tables and verdicts after a pre-training.

Reads the output of recipes/emergence_cpu.sh, by directory and label. Beside the directory of a pre-training are the
perplexities of `dense`, `welore-ERR` and `uniform-ERR` (at equal parameters), and the fine-tuning runs `METHOD-ERR` and
`dense-METHOD`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from welore.emergence.claims import FAILS, HOLDS, OPEN, run_name
from welore.records import Record
from welore.reporting.formatting import megabytes, percent, perplexity_text
from welore.reporting.tables import Table

ALIKE = 0.02  # two held-out losses that differ by at most this count as equal
WELORE, UNIFORM, DENSE = "welore-", "uniform-", "dense"


@dataclass(frozen=True)
class Downstream:
    """One pre-training and the records of its compressed and fine-tuned results, by label."""

    name: str
    perplexities: Mapping[str, Record]
    tunings: Mapping[str, Record]


def downstream(records: Mapping[Path, Record]) -> list[Downstream]:
    """Every pre-training among the records (by their paths) that has a compressed model beside it, in order."""
    runs = []
    for path, record in records.items():
        if record.kind == "pretrain":
            directory = path.parent.parent
            beside = [r for p, r in records.items() if directory in p.parents and path.parent not in p.parents]
            by_kind = [
                {str(r.inputs["label"]): r for r in beside if r.kind == kind} for kind in ("perplexity", "finetune")
            ]
            if any(label.startswith(WELORE) for label in by_kind[0]):
                runs.append(Downstream(run_name(record), *by_kind))
    return runs


def verdicts(runs: Sequence[Downstream]) -> Table:
    """C3, C7, C8 and their controls: a value of every run, above 0 if the claim holds, and the verdict over all."""
    labels = {label for run in runs for label in run.perplexities if label.startswith(WELORE)}
    errs = sorted(label.removeprefix(WELORE) for label in labels)
    rows = []
    for err in errs:
        statement = f"one threshold beats uniform ranks at equal parameters, ERR {err}"
        values = [_log_ratio(run, UNIFORM + err, WELORE + err) for run in runs]
        rows.append(["C3", statement, "log(perplexity of uniform / of WeLore)", *_cells(values, 0.0)])
    models = {f"ERR {err}": f"{{}}-{err}" for err in errs} | {"not compressed: the control": f"{DENSE}-{{}}"}
    for claim, statement, other, least in (
        ("C7", "LRC-only fine-tuning matches or beats full", "full", -ALIKE),
        ("C8", "LRC-only fine-tuning beats N-LRC-only", "nlrc", 0.0),
    ):
        for model, label in models.items():
            values = [_difference(run, label.format(other), label.format("lrc")) for run in runs]
            measure = f"held-out loss of {other} minus that of lrc"
            rows.append([claim, f"{statement}, {model}", measure, *_cells(values, least)])
    headings = ["", "claim", "measure, above 0 as claimed", *(run.name for run in runs), "verdict"]
    return Table("", headings, rows, text_columns=3)


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


def _cells(values: list[float], least: float) -> list[str]:
    """A cell of every run, and the verdict: every value above `least`, every one below it, or neither."""
    if all(value > least for value in values):
        verdict = HOLDS
    else:
        verdict = FAILS if all(value < least for value in values) else OPEN
    return [*("" if math.isnan(value) else f"{value:+.3f}" for value in values), verdict]


def _log_ratio(run: Downstream, above: str, below: str) -> float:
    """Of two perplexities; NaN if one is missing or not finite."""
    records = [run.perplexities[label] for label in (above, below) if label in run.perplexities]
    values = [float(r.numbers["perplexity"]) for r in records if r.numbers["perplexity"] is not None]
    return math.log(values[0] / values[1]) if len(values) == 2 else math.nan


def _difference(run: Downstream, above: str, below: str) -> float:
    """Of two last held-out losses; NaN if one is missing."""
    if not run.tunings.keys() >= {above, below}:
        return math.nan
    last = [run.tunings[label].numbers["eval_loss"] for label in (above, below)]
    return float(last[0] - last[1])
