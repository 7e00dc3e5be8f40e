from typing import Any

import pytest

from welore.errors import WeLoreError
from welore.records import Record
from welore.reporting.tables import comparisons, run_name, task_table, task_tables


def run(method: str = "lrc", label: str | None = None, loss: float = 3.0, err: float = 0.5, **settings: Any) -> Record:
    inputs = {
        "model": "models/small" if err else "models/dense",
        "label": label,
        "model_fingerprint": f"{err}",
        "data_sha256": "d",
        "split": "s",
    }
    asked: dict[str, Any] = {
        "method": method,
        "dataset": "texts/prose.txt",
        "task": None,
        "max_steps": 1200,
        "learning_rate": 1e-3,
        "batch_size": 2,
        "gradient_accumulation_steps": 1,
        "processes": 1,
        "max_length": 128,
        "seed": 0,
        "dtype": "float32",
        "loss_on_prompt": False,
        "max_eval_samples": 8,
    }
    numbers = {
        "trains": "some",
        "trainable_parameters": 1000,
        "total_parameters": 97_000,
        "tokens_per_second": 61.234,
        "peak_memory_bytes": 1.5e9,
        "evaluation": [[0, 5.0, 148.4], [1200, loss, 20.09]],
        "rank_reduction": err,
        "parameter_ratio": 1 - err / 2,
        "bytes": 3e8,
    }
    return Record("finetune", inputs, asked | settings, numbers)


def accuracy(label: str | None, task: str, value: float, n: int = 100, unparsable: int = 0) -> Record:
    numbers = {"accuracy": value, "ci95_low": value - 0.1, "ci95_high": value + 0.1, "n": n, "majority_rate": 0.5}
    return Record("accuracy", {"label": label, "model": "m"}, {"task": task}, numbers | {"unparsable": unparsable})


def test_only_runs_on_the_same_tokens_stand_together() -> None:
    same = [
        run("full"),
        run("lrc"),
        run("lrc", batch_size=1, gradient_accumulation_steps=2),
        run("lrc", batch_size=1, processes=2),
    ]
    other = [run(max_steps=600), run(max_length=64), run(seed=1), run(dtype="bfloat16"), run(batch_size=4)]
    found = comparisons([*same, *other, accuracy("a", "svamp", 0.5)])
    assert [len(comparison.runs) for comparison in found] == [4, 1, 1, 1, 1, 1]
    assert found[0].caption == "prose.txt, 1,200 steps of 2 x 128 tokens, float32"


def test_of_every_learning_rate_the_best_is_drawn_and_all_are_listed() -> None:
    rates = [run("lrc", "a", loss, learning_rate=lr) for lr, loss in ((1e-4, 4.0), (1e-3, 3.0), (1e-2, 3.5))]
    (found,) = comparisons([*rates, run("full", "b", 2.0), run("lrc", "a", 1.0, err=0.0)])
    assert [(r.inputs["label"], r.settings["learning_rate"], r.inputs["model"]) for r in found.best] == [
        ("b", 1e-3, "models/small"),
        ("a", 1e-3, "models/small"),
        ("a", 1e-3, "models/dense"),  # another model is another run; compressed ones come first
    ]
    assert [row[2] for row in found.table.rows] == [
        "0.001",
        "0.0001 (not the best)",
        "0.001",
        "0.01 (not the best)",
        "0.001",
    ]


def test_a_line_says_what_was_trained_how_fast_and_to_what() -> None:
    (found,) = comparisons([run(label="a")])
    assert dict(zip(found.table.headings, found.table.rows[0], strict=True)) == {
        "run": "a",
        "trained": "some",
        "learning rate": "0.001",
        "trained parameters": "1,000",
        "of": "97,000",
        "tokens / s": "61.2",
        "peak memory": "1.50 GB",
        "held-out loss before": "5.0000",
        "after": "3.0000",
        "perplexity after": "20.09",
        "ERR": "50.0 %",
        "parameters": "75.0 %",
        "bytes": "300.0 MB",
    }


def test_methods_of_other_packages_are_listed_after_the_known_ones() -> None:
    (comparison,) = comparisons([run("dora"), run("galore"), run("full")])
    assert [row[0] for row in comparison.table.rows] == ["full of small", "galore of small", "dora of small"]


def test_what_was_not_measured_is_not_made_up() -> None:
    record = run()
    del record.numbers["tokens_per_second"]
    record.numbers["evaluation"] = []
    (found,) = comparisons([record])
    row = dict(zip(found.table.headings, found.table.rows[0], strict=True))
    assert {row[name] for name in ("tokens / s", "held-out loss before", "after", "perplexity after")} == {"\u2013"}


def test_a_run_without_a_label_is_named_by_method_and_checkpoint() -> None:
    assert run_name(run()) == "lrc of small"
    scored = Record("accuracy", {"label": None, "model": "runs/first/model"}, {"task": "svamp"}, {})
    assert run_name(scored) == "first"


def test_table_has_a_row_per_label_and_says_what_guessing_scores() -> None:
    headings, rows = task_table(
        [accuracy("lrc", "svamp", 0.3), accuracy("lrc", "boolq", 0.8, 50, 3), accuracy(None, "svamp", 0.2), run()]
    )
    assert headings == ["accuracy, %", "svamp", "boolq"]
    assert rows == [
        ["lrc", "30.0 [20.0, 40.0]", "80.0 [70.0, 90.0] (3 unreadable)"],
        ["m", "20.0 [10.0, 30.0]", ""],
        ["most frequent answer", "50.0", "50.0"],
        ["n", "100", "50"],
    ]


def test_scores_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(WeLoreError, match="'a' and svamp: keep one"):
        task_table([accuracy("a", "svamp", 0.3), accuracy("a", "svamp", 0.4)])
    with pytest.raises(WeLoreError, match="svamp was scored on different questions"):
        task_table([accuracy("a", "svamp", 0.3), accuracy("b", "svamp", 0.4, 99)])
    with pytest.raises(WeLoreError, match="no record of an accuracy"):
        task_table([run()])


def test_what_cannot_stand_in_one_table_begins_another() -> None:
    records = [
        accuracy("a", "svamp", 0.3),
        accuracy("a", "svamp", 0.4),
        accuracy("b", "svamp", 0.3, 99),
        accuracy("b", "boolq", 0.3),
    ]
    tables = task_tables([run(), *records])
    assert [[row[0] for row in table.rows[:-2]] for table in tables] == [["a", "b"], ["a"], ["b"]]
    assert task_tables([run()]) == []
