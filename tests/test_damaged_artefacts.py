"""Plans, spectra, statistics and records that are damaged, or lie: one sentence, and nothing is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import welore
from test_fixtures import FIXTURES
from welore.allocation.plan import Plan
from welore.errors import DamagedWeightsError, WeLoreError
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
    "different numbers of experts": lambda plan: plan.update(
        experts={name: {"width": 4, "kept": left} for name, left in (("a", "0-1"), ("b", "0-2"))}
    ),
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


# --- spectra and statistics -----------------------------------------------------------------------------------------

Arrays = dict[str, Any]


def rewritten(source: Path, path: Path, change: Callable[[Arrays, dict[str, Any]], Any]) -> Path:
    """The artefact again with other arrays or metadata, which `change` gets as JSON where they are JSON."""
    with safe_open(source, "np") as file:
        metadata, arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    texts = {name for name, text in metadata.items() if text[:1] not in '[{"' and not text.isdigit()}
    content = {name: text if name in texts else json.loads(text) for name, text in metadata.items()}
    change(arrays, content)
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in content.items()}
    save_file(arrays, path, metadata)
    return path


def some_spectra(path: Path) -> Path:
    values = {name: np.array([4.0, 1.0, 0.5]) for name in ("x.a", "x.b.0", "x.b.1")}
    shapes = dict.fromkeys(values, (3, 5))
    how: dict[str, Any] = {"grids": {"x.b": (2, 1)}, "outliers": dict.fromkeys(values, 0.1), "losses": dict(values)}
    welore.Spectra(Identity("m", "f" * 64), values, shapes, scaling="kfac", unreached=("x.a",), **how).save(path)
    return path


SPECTRA: dict[str, Callable[[Arrays, dict[str, Any]], Any]] = {
    "x.a has values that are NaN": lambda a, m: a.update({"x.a": np.array([np.nan, 1, 0])}),
    "infinite": lambda a, m: a.update({"x.a": np.array([np.inf, 1, 0])}),
    "or negative": lambda a, m: a.update({"x.a": np.array([1, 0, -1.0])}),
    "x.b.1 has values that are": lambda a, m: a.update({"x.b.1": np.array([1e200, 1, 0])}),
    "the singular values of x.a ascend": lambda a, m: a.update({"x.a": np.array([1, 2, 3.0])}),
    "x.b.0 has values": lambda a, m: a.update({"x.b.0.losses": np.array([0, np.nan, 0])}),
    "x.a has values": lambda a, m: a.update({"x.a.losses": np.array([0, -1.0, 0])}),
    "x.a has 2 values": lambda a, m: a.update({"x.a": np.array([2.0, 1.0])}),
    "x.a.losses has the dtype int64": lambda a, m: a.update({"x.a.losses": np.array([2, 1, 0])}),
    "not those that it names": lambda a, m: a.pop("x.a"),
    "its matrices are not those": lambda a, m: a.update(other=np.ones(3)),
    "name elsewhere and have no values": lambda a, m: m.update(unreached=["elsewhere"]),
    "name x.c.0": lambda a, m: m.update(grids={"x.c": [1, 2]}),
    "no share of outliers": lambda a, m: m["outliers"].pop("x.a"),
    "outliers, from 0 to 1": lambda a, m: m["outliers"].update({"x.a": 1e308}),
    "outliers of x.a": lambda a, m: m["outliers"].update({"x.a": "many"}),
    "lacks 'fingerprint'": lambda a, m: m.pop("fingerprint"),
    "shapes of x.a": lambda a, m: m["shapes"].update({"x.a": [3, 5, 1]}),
    "calibration is": lambda a, m: m.update(calibration=[1]),
    "scaling is 'sideways'": lambda a, m: m.update(scaling="sideways"),
    "unit is 'metre'": lambda a, m: m.update(unit="metre"),
    "include is": lambda a, m: m.update(include={"a": 1}),
    "nested too deep": lambda a, m: m.update(exclude="[" * 100_000),
}


@pytest.mark.parametrize("sentence", SPECTRA)
def test_damaged_spectra_are_one_sentence(tmp_path: Path, sentence: str) -> None:
    good = some_spectra(tmp_path / "good.safetensors")
    assert welore.Spectra.load(rewritten(good, tmp_path / "same.safetensors", lambda a, m: None)).unit == "loss"
    bad = rewritten(good, tmp_path / "bad.safetensors", SPECTRA[sentence])
    with pytest.raises(
        WeLoreError, match=r"bad\.safetensors is not a readable safetensors file of spectra \(.*\): make"
    ) as caught:
        welore.Spectra.load(bad)
    assert sentence in str(caught.value)


def test_spectra_in_memory_are_checked_alike() -> None:
    for values in ([1.0, 2.0], [np.nan, 1.0], [1.0, -1.0], [1.0]):
        with pytest.raises(WeLoreError):
            welore.Spectra(Identity("m", "f"), {"a": np.array(values)}, {"a": (2, 3)})


def first(arrays: Arrays, ending: str) -> str:
    return next(name for name in arrays if name.endswith(ending))


def owner(arrays: Arrays) -> str:
    return first(arrays, "q_proj.inputs").removesuffix(".inputs")


def spoiled(ending: str, value: float) -> Callable[[Arrays, dict[str, Any]], Any]:
    return lambda a, m: a[first(a, ending)].__setitem__((0,) * a[first(a, ending)].ndim, value)


STATISTICS: dict[str, Callable[[Arrays, dict[str, Any]], Any]] = {
    "counts of": lambda a, m: m["counts"].update({owner(a): "many"}),
    "its counts": lambda a, m: m["counts"].pop(owner(a)),
    "a matrix that tokens reached": lambda a, m: m["counts"].update({owner(a): 0}),
    "none of its size": lambda a, m: m["shared"].update({owner(a): owner(a).replace("self_attn.q", "mlp.down")}),
    "has the inputs of elsewhere": lambda a, m: m["shared"].update({owner(a): "elsewhere"}),
    "its tensors": lambda a, m: a.pop(first(a, ".outputs")),
    "its tensors are not": lambda a, m: a.update(other=np.ones(2, dtype=np.float32)),
    "shapes": lambda a, m: m.update(shapes=[]),
    "a has the sizes 0 and 1": lambda a, m: m.update(grids={"a": [0, 1]}),
    "measured": lambda a, m: m.update(measured=1.5),
    "written": lambda a, m: m.update(written=[1]),
    "lacks 'record'": lambda a, m: m.pop("record"),
    "settings": lambda a, m: m["record"].update(settings=3),
}
TENSORS: dict[str, Callable[[Arrays, dict[str, Any]], Any]] = {
    "inputs is NaN": spoiled("q_proj.inputs", np.nan),
    "outputs is NaN, infinite": spoiled("q_proj.outputs", np.inf),
    "magnitudes is NaN, infinite or negative": spoiled("q_proj.magnitudes", -1),
    "losses is NaN": spoiled("q_proj.losses", np.nan),
    "inputs is NaN, infinite or negative": spoiled("q_proj.inputs", -1),
    "outputs is not symmetric": lambda a, m: a[first(a, "q_proj.outputs")].__setitem__((0, 1), 9.0),
    "written is NaN": spoiled("written", -1),
}


@pytest.mark.parametrize("sentence", STATISTICS)
def test_damaged_statistics_are_one_sentence(tmp_path: Path, sentence: str) -> None:
    bad = rewritten(FIXTURES / "statistics.safetensors", tmp_path / "bad.safetensors", STATISTICS[sentence])
    with pytest.raises(WeLoreError, match=r"bad\.safetensors holds no statistics that can be \(.*\): make") as caught:
        welore.Statistics.load(bad)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("sentence", TENSORS)
def test_tensor_that_is_no_statistic_is_refused_when_it_is_read(tmp_path: Path, sentence: str) -> None:
    bad = rewritten(FIXTURES / "statistics.safetensors", tmp_path / "bad.safetensors", TENSORS[sentence])
    statistics = welore.Statistics.load(bad)
    with pytest.raises(DamagedWeightsError, match=rf"{sentence}.*make the statistics again"):
        for name in statistics.layout():
            statistics.store.read(name)


def test_statistics_of_other_shapes_than_the_models_are_refused(tmp_path: Path, refused: Any) -> None:
    def forget(arrays: Arrays, metadata: dict[str, Any]) -> None:
        name = owner(arrays)
        for table in ("shapes", "counts", "shared"):
            metadata[table] = {n: v for n, v in metadata[table].items() if n == name}
        metadata |= {"grids": {}}
        for key in set(arrays) - {"written"} - {f"{name}.{k}" for k in ("inputs", "magnitudes", "outputs", "losses")}:
            del arrays[key]

    bad = rewritten(FIXTURES / "statistics.safetensors", tmp_path / "bad.safetensors", forget)
    out = tmp_path / "s.safetensors"
    assert "the statistics have no" in refused("analyze", FIXTURES / "dense", "--statistics", bad, "-o", out)


def test_damaged_statistics_leave_nothing_behind(tmp_path: Path, refused: Any) -> None:
    for ending in ("q_proj.inputs", "down_proj.outputs"):
        bad = rewritten(FIXTURES / "statistics.safetensors", tmp_path / "bad.safetensors", spoiled(ending, np.nan))
        out = tmp_path / "s.safetensors"
        assert "is NaN" in refused("analyze", FIXTURES / "dense", "--statistics", bad, "-o", out)


# --- the configuration of a compressed model ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sentence", "settings"),
    {
        "ranks is": {"ranks": [3]},
        "ranks of a": {"ranks": {"a": "3"}},
        "ranks of b is 3.0": {"ranks": {"b": 3.0}},
        "the rank of a is 0": {"ranks": {"a": 0}},
        "forms of a": {"ranks": {}, "forms": {"a": ["pivoted"]}},
        "unknown form 'x'": {"ranks": {}, "forms": {"a": "x"}},
        "grids is": {"ranks": {}, "grids": [[2, 1]]},
        "a has the sizes 0 and 1": {"ranks": {}, "grids": {"a": [0, 1]}},
        "shapes of a": {"ranks": {}, "shapes": {"a": [2, 1.5]}},
        "a pattern": {"ranks": {}, "include": "q_proj"},
        "version": {"version": "1"},
        "has format 9": {"version": 9},
        "unknown setting": {"kep": 0.8},
        "keep is 'a lot'": {"keep": "a lot"},
        "split is": {"split": "yes"},
    }.items(),
)
def test_damaged_configuration_of_a_compressed_model_is_one_sentence(sentence: str, settings: dict[str, Any]) -> None:
    with pytest.raises(WeLoreError, match=sentence):
        welore.WeLoreConfig(**settings)
