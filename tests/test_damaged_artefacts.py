"""Plans, spectra, statistics and records that are damaged, or lie: one sentence, and nothing is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import welore
from welore.allocation.plan import Plan
from welore.errors import WeLoreError
from welore.records import Identity

Change = Callable[[dict[str, Any]], Any]


def some_plan(path: Path) -> dict[str, Any]:
    """The content of a plan of a matrix "a" and a layer "b" in two blocks, one MLP of which lost neurons."""
    values = {name: np.array([4.0, 1.0, 0.5, 0.1]) for name in ("x.a", "x.b.0", "x.b.1")}
    shapes = {"x.a": (4, 9), "x.b.0": (4, 5), "x.b.1": (4, 5)}
    spectra = welore.Spectra(Identity("m", "f" * 64), values, shapes, grids={"x.b": (2, 1)})
    welore.allocate(spectra, rank_reduction=0.4).save(path)
    content: dict[str, Any] = json.loads(path.read_text())
    return content | {"neurons": {"mlp": {"width": 9, "kept": "0-3,7"}}}


def matrix(**changes: Any) -> Change:
    return lambda plan: plan["matrices"][0].update(changes)


PLANS: dict[str, Change] = {
    "format": lambda plan: plan.update(format="welore.plan/9"),
    "model": lambda plan: plan.update(model="m"),
    "fingerprint of the model": lambda plan: plan["model"].update(fingerprint=5),
    "name of the model": lambda plan: plan["model"].update(name={"a": 1}),
    "strategy": lambda plan: plan.update(strategy=None),
    "asked of rank_reduction": lambda plan: plan.update(asked={"rank_reduction": float("nan")}),
    "min_ratio": lambda plan: plan.update(min_ratio="half"),
    "min_ratio is 1.5": lambda plan: plan.update(min_ratio=1.5),
    "allow_growth": lambda plan: plan.update(allow_growth="no"),
    "threshold": lambda plan: plan.update(threshold=float("inf")),
    "rank_multiple is 0": lambda plan: plan.update(rank_multiple=0),
    "include": lambda plan: plan.update(include="q_proj"),
    "exclude": lambda plan: plan.update(exclude=[1]),
    "scaling": lambda plan: plan.update(scaling=["kfac"]),
    "calibration": lambda plan: plan.update(calibration=[]),
    "no matrix": lambda plan: plan.update(matrices=[]),
    "matrices": lambda plan: plan.update(matrices={}),
    "names x.a twice": lambda plan: plan["matrices"].append(plan["matrices"][0]),
    "says nothing of x.b.1": lambda plan: plan["matrices"].pop(),
    "not in blocks of one shape": lambda plan: plan["matrices"][1].update(shape=[5, 4]),
    "must be 1 or more": lambda plan: plan.update(grids={"x.b": [2, 0]}),
    "grids of x.b": lambda plan: plan.update(grids={"x.b": [2]}),
    "65536 together": lambda plan: plan.update(grids={"x.b": [1 << 40, 1]}),
    "neurons of an MLP": lambda plan: plan["neurons"]["mlp"].update(kept="0-3,3"),
    "0 to 8": lambda plan: plan["neurons"]["mlp"].update(kept="0-9"),
    "invalid literal": lambda plan: plan["neurons"]["mlp"].update(kept="0-3;7"),
    "no MLP has so many": lambda plan: plan["neurons"]["mlp"].update(kept=f"0-{1 << 50}", width=1 << 51),
    "width of mlp": lambda plan: plan["neurons"]["mlp"].update(width=9.5),
    "the name of a matrix": matrix(name=2),
    "shape of x.a": matrix(shape=[4, 9, 1]),
    "rank of x.a": matrix(kept=True),
    "rank 0 of x.a": matrix(kept=0),
    "factored of x.a": matrix(factored=1),
    "relative_error of x.a": matrix(relative_error=-1),
    "must be a finite number": matrix(relative_error=float("nan")),
    "form of x.a": matrix(factored=True, kept=1, form=["pivoted"]),
    "unknown form": matrix(factored=True, kept=1, form="pivot"),
    "lacks 'kept'": lambda plan: plan["matrices"][0].pop("kept"),
}


@pytest.mark.parametrize("sentence", PLANS)
def test_damaged_plan_is_one_sentence_that_names_the_field(tmp_path: Path, sentence: str) -> None:
    path = tmp_path / "plan.json"
    content = some_plan(path)
    path.write_text(json.dumps(content))
    assert set(Plan.load(path).neurons) == {"mlp"}
    PLANS[sentence](content)
    path.write_text(json.dumps(content))
    with pytest.raises(WeLoreError, match=r"plan\.json is not a plan of welore \(.*\): make one with") as caught:
        Plan.load(path)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": ' + "1" * 5000 + "}", "[]", "7", '"welore.plan/1"', "\\"])
def test_json_that_cannot_be_a_plan_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(WeLoreError, match=r"plan\.json is not (JSON|a plan of welore)"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    "damage",
    [
        matrix(name="/etc/x"),
        matrix(name="model.layers.0"),
        matrix(shape=[64, 32]),
        lambda plan: plan["matrices"].pop(),
    ],
)
def test_plan_of_other_matrices_than_the_models_is_refused_before_the_work(
    saved: Any, refused: Any, tmp_path: Path, damage: Change
) -> None:
    model = saved("llama")
    welore.allocate(welore.analyze(model), rank_reduction=0.4).save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    damage(content)
    (tmp_path / "plan.json").write_text(json.dumps(content))
    assert "make the plan again" in refused("compress", model, tmp_path / "out", "--plan", tmp_path / "plan.json")
