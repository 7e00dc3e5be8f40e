"""6 - After a pre-training: its result cut and fine-tuned, by the commands of the other verbs -> tables and verdicts.

Reads what recipes/emergence_cpu.sh writes, by place and label: beside the directory of a pre-training the perplexities
of `dense`, `welore-ERR` and `uniform-ERR` (at equal parameters), and the fine-tunings `METHOD-ERR` and `dense-METHOD`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from welore.emergence.claims import FAILS, HOLDS, OPEN, run_of
from welore.records import Record
from welore.reporting.formatting import megabytes, percent, perplexity_text
from welore.reporting.tables import Table

ALIKE = 0.02  # two held-out losses that differ by no more match each other
WELORE, UNIFORM, DENSE = "welore-", "uniform-", "dense"


@dataclass(frozen=True)
class Closed:
    """One pre-training and what was made of its result: label -> record of a perplexity, of a fine-tuning."""

    name: str
    cuts: Mapping[str, Record]
    tunings: Mapping[str, Record]


def closed(records: Mapping[Path, Record]) -> list[Closed]:
    """Every pre-training among the records (by their paths) that has a cut beside it, in the order of the paths."""
    found = []
    for path, record in records.items():
        if record.kind == "pretrain":
            place = path.parent.parent
            beside = {p: r for p, r in records.items() if place in p.parents and path.parent not in p.parents}
            cuts, tunings = (
                {str(r.inputs["label"]): r for r in beside.values() if r.kind == kind}
                for kind in ("perplexity", "finetune")
            )
            if any(label.startswith(WELORE) for label in cuts):
                found.append(Closed(run_of(record), cuts, tunings))
    return found


def verdicts(runs: list[Closed]) -> Table:
    """C3, C7 and C8 and their controls: a value of every run, above 0 as claimed, and the verdict over all runs."""
    errs = sorted({label.removeprefix(WELORE) for run in runs for label in run.cuts if label.startswith(WELORE)})
    rows = []
    for err in errs:
        says = f"one threshold beats uniform ranks at equal parameters, ERR {err}"
        values = [_log_ratio(run, UNIFORM + err, WELORE + err) for run in runs]
        rows.append(["C3", says, "log(perplexity of uniform / of WeLore)", *_cells(values, 0.0)])
    where = {f"ERR {err}": f"{{}}-{err}" for err in errs} | {"not compressed: the control": f"{DENSE}-{{}}"}
    for claim, says, other, least in (
        ("C7", "LRC-only fine-tuning matches or beats full", "full", -ALIKE),
        ("C8", "LRC-only fine-tuning beats N-LRC-only", "nlrc", 0.0),
    ):
        for place, label in where.items():
            values = [_difference(run, label.format(other), label.format("lrc")) for run in runs]
            by = f"held-out loss of {other} minus that of lrc"
            rows.append([claim, f"{says}, {place}", by, *_cells(values, least)])
    headings = ["", "claim", "measure, above 0 as claimed", *(run.name for run in runs), "verdict"]
    return Table("", headings, rows, text_columns=3)


def cuts_table(runs: list[Closed]) -> Table:
    """Every cut model: ERR, parameters, bytes and perplexity, in every run."""
    labels = list(dict.fromkeys(label for run in runs for label in run.cuts))
    labels.sort(key=lambda label: (label != DENSE, label.rpartition("-")[2], label))
    rows = []
    for label in labels:
        of_runs = [run.cuts[label].numbers if label in run.cuts else None for run in runs]
        cells = [
            ""
            if n is None
            else f"{percent(n['rank_reduction'])}, {percent(n['parameter_ratio'])}, "
            f"{megabytes(n['bytes'])}: {perplexity_text(n['perplexity'])}"
            for n in of_runs
        ]
        rows.append([label, *cells])
    return Table("", ["ERR, parameters, bytes: perplexity", *(run.name for run in runs)], rows)


def tunings_table(runs: list[Closed]) -> Table:
    """Every fine-tuning: trained parameters, held-out loss before and after, in every run."""
    rows = []
    for label in dict.fromkeys(label for run in runs for label in run.tunings):
        cells = []
        for run in runs:
            n = run.tunings[label].numbers if label in run.tunings else None
            curve = n["evaluation"] if n else []
            cells.append(f"{n['trainable_parameters']:,}: {curve[0][1]:.3f} -> {curve[-1][1]:.3f}" if n else "")
        rows.append([label, *cells])
    return Table("", ["trained parameters: held-out loss before -> after", *(run.name for run in runs)], rows)


def _cells(values: list[float], least: float) -> list[str]:
    """A cell of every run, and the verdict: every value above `least`, every one below it, or neither."""
    if all(value > least for value in values):
        verdict = HOLDS
    else:
        verdict = FAILS if all(value < least for value in values) else OPEN
    return [*("" if math.isnan(value) else f"{value:+.3f}" for value in values), verdict]


def _log_ratio(run: Closed, above: str, below: str) -> float:
    """Of two perplexities; NaN where one is missing or not finite."""
    found = [run.cuts[label].numbers["perplexity"] for label in (above, below) if label in run.cuts]
    known = [float(value) for value in found if value is not None]
    return math.log(known[0] / known[1]) if len(known) == 2 else math.nan


def _difference(run: Closed, above: str, below: str) -> float:
    """Of two last held-out losses; NaN where one is missing."""
    if not run.tunings.keys() >= {above, below}:
        return math.nan
    last = [run.tunings[label].numbers["eval_loss"] for label in (above, below)]
    return float(last[0] - last[1])
