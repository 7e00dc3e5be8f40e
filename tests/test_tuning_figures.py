import subprocess
import sys
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest

from welore.errors import WeLoreError
from welore.records import Record
from welore.reporting.training_figures import FIGURE_1, FIGURE_5, fine_tuning

pytest.importorskip("matplotlib")


def run(method: str, label: str | None = None, steps: int = 400, **numbers: Any) -> Record:
    rate = {"full": 0.010, "lrc": 0.012, "nlrc": 0.006, "lora": 0.008, "galore": 0.007}[method]
    noise = np.random.default_rng(len(method)).normal(0, 0.15, steps)
    loss = [[i + 1, 3 + 4 * float(np.exp(-rate * i)) + float(noise[i])] for i in range(steps)]
    evaluation = [
        [i, 3 + 4 * np.exp(-rate * i), float(np.exp(3 + 4 * np.exp(-rate * i)))] for i in range(0, steps + 1, 50)
    ]
    found = {
        "train_loss": loss,
        "evaluation": evaluation,
        "trainable_parameters": {"full": 97, "lrc": 34, "nlrc": 34, "lora": 2, "galore": 97}[method] * 10**6,
        "tokens_per_second": {"full": 60.0, "lrc": 97.0, "nlrc": 90.0, "lora": 110.0, "galore": 50.0}[method],
        "tokens": steps * 1024,
        "resumed_at": 0,
    }
    return Record("finetune", {"label": label, "model": "m"}, {"method": method, "max_steps": steps}, found | numbers)


ALL = [run(method) for method in ("galore", "lora", "nlrc", "lrc", "full")]


@pytest.mark.parametrize(
    ("methods", "names"), [(FIGURE_1, ["full", "lrc", "galore"]), (FIGURE_5, ["lrc", "nlrc"]), (None, None)]
)
def test_every_method_has_its_curves_and_bars(methods: Any, names: list[str] | None) -> None:
    figure = fine_tuning(ALL, methods, title="t")
    figure.savefig(BytesIO(), format="png", dpi=40)
    loss, perplexity, parameters, speed = figure.axes
    count = len(names or ALL)
    assert [text.get_text() for text in speed.get_xticklabels()] == (names or ["full", "lrc", "nlrc", "lora", "galore"])
    assert len(loss.lines) == 2 * count
    assert len(perplexity.lines) == len(parameters.patches) == len(speed.patches) == count
    assert [bar.get_height() for bar in parameters.patches][:1] == [97.0 if methods != FIGURE_5 else 34.0]


def test_a_method_looks_the_same_in_every_figure() -> None:
    first, fifth = (
        {line.get_label(): line.get_color() for line in fine_tuning(ALL, methods).axes[0].lines}
        for methods in (FIGURE_1, FIGURE_5)
    )
    assert first["lrc"] == fifth["lrc"]


def test_methods_of_other_packages_are_drawn_after_the_known_ones() -> None:
    new = [replace(run("lora"), settings={"method": name, "max_steps": 400}) for name in ("dora", "boft")]
    figure = fine_tuning([*new, run("lrc"), run("galore")])
    assert [text.get_text() for text in figure.axes[3].get_xticklabels()] == ["lrc", "galore", "boft", "dora"]
    assert len({line.get_color() for line in figure.axes[1].lines}) == 4


def test_labels_name_runs_of_the_same_method() -> None:
    figure = fine_tuning([run("lrc", "compressed"), run("lrc", "dense $1")])
    figure.savefig(BytesIO(), format="png", dpi=40)
    assert [text.get_text() for text in figure.axes[3].get_xticklabels()] == ["compressed", r"dense \$1"]


def test_further_runs_of_a_method_are_drawn_in_another_way() -> None:
    figure = fine_tuning([run("lrc", "compressed"), run("lrc", "dense")])
    figure.savefig(BytesIO(), format="png", dpi=40)
    styles = [(line.get_linestyle(), line.get_markerfacecolor()) for line in figure.axes[1].lines]
    assert len(set(styles)) == 2
    assert len({line.get_color() for line in figure.axes[1].lines}) == 1


@pytest.mark.parametrize("values", [(26.1, 21.3), (120.0, 31.0), (5e5, 20.0), (7.0, 7.0)])
def test_a_perplexity_axis_of_any_range_has_several_plain_ticks(values: tuple[float, float]) -> None:
    evaluation = [[10 * i, float(np.log(value)), value] for i, value in enumerate(values)]
    figure = fine_tuning([run("lrc", evaluation=evaluation)])
    figure.savefig(BytesIO(), format="png", dpi=40)
    low, high = figure.axes[1].get_ylim()
    ticks = figure.axes[1].get_yticks()
    labels = [t.get_text() for t, at in zip(figure.axes[1].get_yticklabels(), ticks, strict=True) if low <= at <= high]
    assert len(labels) >= 3
    assert len(set(labels)) == len(labels)
    assert not any("$" in label for label in labels)


def test_runs_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(WeLoreError, match="differ in steps and tokens"):
        fine_tuning([run("lrc"), run("full", steps=300)])
    with pytest.raises(WeLoreError, match="no record of a fine-tuning run"):
        fine_tuning([])


def test_a_run_without_evaluation_is_drawn_without_it() -> None:
    figure = fine_tuning([run("lrc", evaluation=[])])
    figure.savefig(BytesIO(), format="png", dpi=40)
    assert not figure.axes[1].lines


def test_figures_are_drawn_without_torch() -> None:
    code = "import sys, welore.reporting.training_figures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
