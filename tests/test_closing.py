from pathlib import Path
from typing import Any

import pytest

from downstream import downstream, verdicts
from tables import compression_table, tunings_table
from welore.records import Record


def perplexity(label: str, value: float | None) -> Record:
    numbers = {"perplexity": value, "rank_reduction": 0.3, "parameter_ratio": 0.9, "bytes": 8_000_000}
    return Record("perplexity", {"label": label}, {}, numbers)


def tuning(label: str, loss: float) -> Record:
    numbers = {"eval_loss": loss, "evaluation": [[0, 6.0, 400.0], [60, loss, 90.0]], "trainable_parameters": 1000}
    return Record("finetune", {"label": label}, {}, numbers)


def records(seeds: dict[int, dict[str, Any]]) -> dict[Path, Record]:
    """As the recipe lays them out; of every seed, perplexities (floats) and losses (in lists)."""
    found: dict[Path, Record] = {}
    for seed, labels in seeds.items():
        place = Path(f"out/seed-{seed}")
        found[place / "pretrain" / "pretrain.json"] = Record("pretrain", {"label": None}, {"seed": seed}, {})
        found[place / "pretrain" / "training" / "finetune.json"] = tuning("2m", 4.0)
        for label, value in labels.items():
            if isinstance(value, list):
                found[place / label / "finetune.json"] = tuning(label, value[0])
            else:
                found[place / f"{label}.ppl.json"] = perplexity(label, value)
    return found


BOTH = {
    "dense": 90.0,
    "welore-0.3": 100.0,
    "uniform-0.3": 200.0,
    "full-0.3": [4.6],
    "lrc-0.3": [4.59],
    "nlrc-0.3": [4.7],
}


def test_verdicts_want_every_run_to_agree() -> None:
    runs = downstream(records({0: BOTH, 1: BOTH | {"uniform-0.3": 90.0, "nlrc-0.3": [4.8]}}))
    assert [run.name for run in runs] == ["seed 0", "seed 1"]
    rows = {(row[0], row[1].rpartition(", ")[2]): row[3:] for row in verdicts(runs).rows}
    assert rows["C3", "ERR 0.3"] == ["+0.693", "-0.105", "cannot be told"]
    assert rows["C7", "ERR 0.3"] == ["+0.010", "+0.010", "holds"]
    assert rows["C8", "ERR 0.3"] == ["+0.110", "+0.210", "holds"]
    assert rows["C8", "not compressed: the control"] == ["", "", "cannot be told"]


@pytest.mark.parametrize(("full", "verdict"), [(4.58, "holds"), (4.5, "does not hold")])
def test_losses_that_hardly_differ_match(full: float, verdict: str) -> None:
    rows = verdicts(downstream(records({0: BOTH | {"full-0.3": [full]}}))).rows
    assert next(row for row in rows if row[0] == "C7")[-1] == verdict


def test_tables_show_every_run_and_not_the_pre_training_itself() -> None:
    runs = downstream(records({0: BOTH, 1: BOTH | {"welore-0.3": None}}))
    cuts, tunings = compression_table(runs), tunings_table(runs)
    assert [row[0] for row in cuts.rows] == ["dense", "uniform-0.3", "welore-0.3"]
    assert cuts.rows[0][1] == "30.0 %, 90.0 %, 8.0 MB: 90"
    assert cuts.rows[2][2].endswith("not finite")
    assert [row[0] for row in tunings.rows] == ["full-0.3", "lrc-0.3", "nlrc-0.3"]
    assert tunings.rows[1][1] == "1,000: 6.000 -> 4.590"
    assert verdicts(runs).rows[0][-1] == "cannot be told"


def test_a_pre_training_with_nothing_beside_it_is_passed_over() -> None:
    assert downstream(records({0: {}})) == []
