"""The claims about models that were pre-trained, compressed and fine-tuned: the verdicts, for `tables.py`.

Reads the output of recipes/emergence_cpu.sh, by directory and label. Beside the directory of a pre-training are the
perplexities of `dense`, `welore-ERR` and `uniform-ERR` (at equal parameters), and the fine-tuning runs `METHOD-ERR` and
`dense-METHOD`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from welore.emergence.claims import run_name, verdict
from welore.records import Record
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
                {str(r.inputs.get("label")): r for r in beside if r.kind == kind} for kind in ("perplexity", "finetune")
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
        pairs = [_pair(run.perplexities, "perplexity", UNIFORM + err, WELORE + err) for run in runs]
        values = [math.log(uniform / welore) if min(uniform, welore) > 0 else math.nan for uniform, welore in pairs]
        rows.append(["C3", statement, "log(perplexity of uniform / of WeLore)", *_cells(values, 0.0)])
    models = {f"ERR {err}": f"{{}}-{err}" for err in errs} | {"not compressed: the control": f"{DENSE}-{{}}"}
    for claim, statement, other, least in (
        ("C7", "LRC-only fine-tuning matches or beats full", "full", -ALIKE),
        ("C8", "LRC-only fine-tuning beats N-LRC-only", "nlrc", 0.0),
    ):
        for model, label in models.items():
            pairs = [_pair(run.tunings, "eval_loss", label.format(other), label.format("lrc")) for run in runs]
            measure = f"held-out loss of {other} minus that of lrc"
            rows.append([claim, f"{statement}, {model}", measure, *_cells([a - b for a, b in pairs], least)])
    headings = ["", "claim", "measure, above 0 as claimed", *(run.name for run in runs), "verdict"]
    return Table("", headings, rows, text_columns=3)


def _cells(values: list[float], least: float) -> list[str]:
    """A cell of every run, and the verdict: every value above `least`, every one below it, or neither."""
    cells = ["" if math.isnan(value) else f"{value:+.3f}" for value in values]
    return [*cells, verdict([(value - least,) * 3 for value in values])]


def _pair(records: Mapping[str, Record], number: str, *labels: str) -> list[float]:
    """One number of the records with these labels; NaN where it is missing or not finite."""
    values = [records[label].numbers.get(number) if label in records else None for label in labels]
    return [float(value) if isinstance(value, int | float) else math.nan for value in values]
