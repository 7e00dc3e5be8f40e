import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import allocate
from welore.allocation import solver
from welore.allocation.plan import Plan
from welore.allocation.rule import LAYOUTS, Rule, layout_of
from welore.allocation.solver import check_reachable
from welore.allocation.spectra import Spectra
from welore.allocation.strategies import STRATEGIES
from welore.config import AllocationConfig
from welore.errors import WeLoreError
from welore.layers.storage_forms import FACTORED, storages
from welore.linalg.spectrum import Values
from welore.records import Identity

SHAPES = {"a": (7, 5), "b": (12, 12), "c": (6, 20), "d": (20, 6), "e": (3, 3), "one": (1, 9)}


def spectra(shapes: dict[str, tuple[int, int]] = SHAPES, seed: int = 0) -> Spectra:
    random = np.random.default_rng(seed)
    values: dict[str, Values] = {}
    for name, (m, n) in shapes.items():
        values[name] = np.sort(random.gamma(0.7, size=min(m, n)))[::-1].copy()
    shares = {name: float(random.random()) for name in shapes}
    return Spectra(Identity("m", "f" * 64), values, shapes, outliers=shares)


def every_plan(
    s: Spectra, strategy: str, storage: str, min_ratio: float | str, allow_growth: bool
) -> list[tuple[float, float]]:
    """(ERR, parameter ratio) of every distinct level, straight from the definitions."""
    scores = STRATEGIES[strategy].scores(s, Rule(storage))
    top = max(x[0] for x in scores)
    found = []
    for level in sorted({float(v) for x in scores for v in x} | {0.0}):
        if level > top:
            continue
        removed = stored = 0
        for (m, n), x in zip(s.shapes.values(), scores, strict=True):
            k = min(m, n)
            r = max(1, sum(1 for v in x if v >= level))
            pivoted = storage == "pivoted" or (storage == "auto" and 2 * r * r > 4 * m)
            numbers = r * (m + n - r) if pivoted else r * (m + n)
            pays = numbers < m * n and r < k
            lrc = pays if min_ratio == "break-even" else (k - r) / k > float(min_ratio) and (pays or allow_growth)
            removed += (k - r) if lrc else 0
            stored += numbers if lrc else m * n
        full = sum(min(shape) for shape in s.shapes.values())
        dense = sum(m * n for m, n in s.shapes.values())
        found.append((removed / full, stored / dense))
    return found


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@pytest.mark.parametrize(
    ("min_ratio", "allow_growth"), [(0.5, False), (0.0, False), (0.0, True), ("break-even", False)]
)
@pytest.mark.parametrize("target", ["rank_reduction", "keep"])
@pytest.mark.parametrize("storage", sorted(storages()))
def test_solution_is_the_closest_of_all_plans(
    strategy: str, min_ratio: float, allow_growth: bool, target: str, storage: str
) -> None:
    how: dict[str, Any] = {"strategy": strategy, "storage": storage, "min_ratio": min_ratio}
    for seed in range(3):
        s = spectra(seed=seed)
        curve = [point[target == "keep"] for point in every_plan(s, **how, allow_growth=allow_growth)]
        for wanted in np.linspace(min(curve), max(curve), 17):
            plan = allocate(s, allow_growth=allow_growth, **how, **{target: wanted})
            achieved = plan.parameter_ratio if target == "keep" else plan.rank_reduction
            assert abs(achieved - wanted) == pytest.approx(min(abs(x - wanted) for x in curve), abs=1e-12)


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@pytest.mark.parametrize("target", ["rank_reduction", "keep"])
def test_sorting_scores_a_part_at_a_time_gives_the_same_plan(
    strategy: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = spectra({f"{i}.{name}": shape for i in range(5) for name, shape in SHAPES.items()})
    s.values["0.b"][3:7] = s.values["0.b"][3]  # equal scores, in a matrix and in two
    s.values["1.b"][:] = s.values["0.b"]
    wanted = np.linspace(0.1, 0.8, 8) if target == "rank_reduction" else np.linspace(0.3, 0.99, 8)
    at_once = [allocate(s, strategy=strategy, **{target: value}, min_ratio=0.0, allow_growth=True) for value in wanted]
    for parts, together in ((16, 1), (3, 1), (16, 40)):
        monkeypatch.setattr(solver, "PARTS", parts)
        monkeypatch.setattr(solver, "TOGETHER", together)
        for value, plan in zip(wanted, at_once, strict=True):
            assert allocate(s, strategy=strategy, **{target: value}, min_ratio=0.0, allow_growth=True) == plan


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@pytest.mark.parametrize("target", ["rank_reduction", "keep"])
def test_ranks_are_multiples_and_the_target_is_met_as_nearly_as_they_allow(
    strategy: str, target: str, tmp_path: Path
) -> None:
    s = spectra({"a": (64, 48), "b": (50, 60), "c": (16, 80), "small": (5, 9)})
    how: dict[str, Any] = {"strategy": strategy, "rank_multiple": 8}

    def reached(plan: Plan) -> float:
        return plan.parameter_ratio if target == "keep" else plan.rank_reduction

    curve = {reached(allocate(s, threshold=level, **how)) for level in np.geomspace(1e-9, 1, 400)}
    for wanted in np.linspace(min(curve), max(curve), 7):
        plan = allocate(s, **how, **{target: wanted})
        assert plan.rank_multiple == 8
        assert all(rank % 8 == 0 or rank == min(s.shapes[name]) for name, rank in plan.ranks.items())
        assert next(a.rank for a in plan.allocations if a.name == "small") == 5  # smaller than the multiple
        assert abs(reached(plan) - wanted) <= min(abs(x - wanted) for x in curve) + 1e-12
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    with pytest.raises(WeLoreError, match="rank_multiple is 0"):
        allocate(s, keep=0.5, rank_multiple=0)


def test_a_layout_for_speed_factors_fewer_matrices_to_the_same_size() -> None:
    kinds: dict[str, tuple[int, int]] = {"q": (96, 96), "k": (32, 96), "up": (256, 96)}
    shapes = {f"{kind}{i}": shape for kind, shape in kinds.items() for i in range(8)}
    values = {
        name: (2 + i % 5) * np.exp(-np.arange(min(shape)) / (30 + 9 * (i % 7)))
        for i, (name, shape) in enumerate(shapes.items())
    }
    s = Spectra(Identity("m", "f" * 64), values, shapes, scaling="kfac")
    plans = {goal: allocate(s, keep=0.8, optimize_for=goal) for goal in ("size", "cpu", "gpu")}
    for goal, plan in plans.items():
        assert plan.optimize_for == goal
        assert plan.parameter_ratio == pytest.approx(0.8, abs=2e-3), goal
    assert plans["size"].rank_multiple == 1
    assert all(plan.rank_multiple == 4 == math.gcd(4, *plan.ranks.values()) for plan in (plans["cpu"], plans["gpu"]))
    assert len(plans["gpu"].ranks) <= len(plans["cpu"].ranks) < len(plans["size"].ranks)
    pivoted = [list(plan.forms.values()).count("pivoted") for plan in plans.values()]
    assert pivoted[0] > pivoted[1] >= pivoted[2] == 0


def test_overheads_are_a_share_of_a_small_matrix_and_the_same_for_all_large_ones() -> None:
    small, large = [(576, 576), (192, 576), (1536, 576)], [(4096, 4096), (11008, 4096)]
    assert layout_of("cpu", large) == LAYOUTS["cpu"]
    assert layout_of("gpu", large) == LAYOUTS["gpu"]
    assert layout_of("auto", small) == layout_of("size", small) == LAYOUTS["size"]
    assert layout_of("gpu", small).overheads[FACTORED] == sum(m * n for m, n in small) / 3 / 8
    assert layout_of("gpu", small).rank_multiple == 16


def test_storage_changes_forms_and_costs_and_nothing_else(tmp_path: Path) -> None:
    how: dict[str, Any] = {"threshold": 0.5, "min_ratio": 0.5}
    plan = allocate(spectra({"a": (7, 5), "b": (50, 60)}), **how)
    assert set(plan.forms.values()) == {"factored"}
    pivoted = allocate(spectra({"a": (7, 5), "b": (50, 60)}), **how, storage="pivoted")
    assert pivoted.ranks == plan.ranks
    assert set(pivoted.forms) == set(plan.forms)
    assert set(pivoted.forms.values()) == {"pivoted"}
    for old, new in zip(plan.allocations, pivoted.allocations, strict=True):
        assert new.stored_parameters == old.stored_parameters - (old.rank**2 if old.factored else 0)
    assert pivoted.parameter_ratio < plan.parameter_ratio
    pivoted.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == pivoted


def test_plan_from_before_there_were_forms_is_factored(tmp_path: Path) -> None:
    plan = allocate(spectra(), threshold=0.5, min_ratio=0.3)
    plan.save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    for entry in content["matrices"]:
        del entry["form"]
    (tmp_path / "plan.json").write_text(json.dumps(content))
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "pivot"}, "unknown form"),
        ({"form": "pivoted", "kept": 5}, "a has full rank 5; pivoted storage needs a lower one"),
    ],
)
def test_plan_with_an_impossible_form_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    allocate(spectra(), threshold=0.5, min_ratio=0.3).save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    content["matrices"][0] |= {"factored": True} | changes
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(WeLoreError, match=message):
        Plan.load(tmp_path / "plan.json")


def test_threshold_gives_the_ranks_of_the_definition() -> None:
    s = spectra()
    for t in (0.0, 0.1, 0.37, 1.0):
        plan = allocate(s, threshold=t)
        for a, x in zip(plan.allocations, s.normalised().values(), strict=True):
            assert a.rank == max(1, int((x >= t).sum()))
            assert a.factored == (
                (a.full_rank - a.rank) / a.full_rank > 0.5 and a.rank * sum(a.shape) < np.prod(a.shape)
            )


def test_half_the_rank_is_not_more_than_half() -> None:
    sigma = np.array([1.0, 0.9, 0.1, 0.0])
    s = Spectra(Identity("m", "f"), {"a": sigma, "b": sigma}, {"a": (4, 40), "b": (40, 4)})
    assert allocate(s, threshold=0.5).ranks == {}
    assert allocate(s, threshold=0.95).ranks == {"a": 1, "b": 1}


def test_uniform_removes_the_same_fraction_of_every_matrix() -> None:
    s = spectra({"a": (40, 40), "b": (40, 120), "c": (20, 60)})
    plan = allocate(s, rank_reduction=0.35, strategy="uniform", allow_growth=True)
    assert [a.reduction_ratio for a in plan.allocations] == pytest.approx([0.35] * 3)
    assert plan.rank_reduction == pytest.approx(0.35)
    square = plan.allocations[0]
    assert square.stored_parameters > square.dense_parameters  # two factors of a hardly reduced square matrix


def test_nothing_grows_unless_it_is_allowed() -> None:
    for strategy, target in itertools.product(STRATEGIES, np.linspace(0.0, 0.6, 7)):
        plan = allocate(spectra(), rank_reduction=target, strategy=strategy, min_ratio=0)
        assert all(a.stored_parameters <= a.dense_parameters for a in plan.allocations)
    grown = allocate(spectra(), rank_reduction=0.2, min_ratio=0, allow_growth=True)
    assert any(a.stored_parameters > a.dense_parameters for a in grown.allocations)


def test_flat_spectra_are_left_alone() -> None:
    flat = Spectra(Identity("m", "f"), {"a": np.ones(4), "b": np.zeros(3)}, {"a": (4, 9), "b": (3, 9)})
    assert allocate(flat, threshold=1.0, min_ratio=0).ranks == {}
    mixed = Spectra(flat.model, {**flat.values, "c": np.array([3.0, 0.2, 0.1])}, {**flat.shapes, "c": (3, 30)})
    assert allocate(mixed, rank_reduction=0.2, min_ratio=0).ranks == {"c": 1}


def test_relative_error_is_that_of_the_best_factors() -> None:
    W = np.random.default_rng(1).standard_normal((12, 9))
    U, sigma, V = np.linalg.svd(W, full_matrices=False)
    s = Spectra(Identity("m", "f"), {"a": sigma}, {"a": (12, 9)})
    (a,) = allocate(s, threshold=0.6).allocations
    best = (U[:, : a.rank] * sigma[: a.rank]) @ V[: a.rank]
    assert a.relative_error == pytest.approx(np.linalg.norm(W - best) / np.linalg.norm(W), rel=1e-12)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"rank_reduction": 1.0}, r"cannot be reached.*between 0\.0000 and 0\.\d+"),
        ({"rank_reduction": 30}, "rank_reduction is 30: it is a fraction between 0 and 1"),
        ({"rank_reduction": -0.1}, "between 0 and 1"),
        ({"keep": 0.001}, r"between 0\.\d+ and 1\.0000"),
        ({"threshold": 1.5}, "between 0 and 1"),
        ({}, "exactly one target"),
        ({"keep": 0.5, "threshold": 0.1}, "exactly one target"),
        ({"keep": 0.9, "min_ratio": 1.0}, "min_ratio is 1.0"),
        ({"keep": 0.9, "strategy": "unifrom"}, "did you mean 'uniform'"),
    ],
)
def test_impossible_wish_is_one_sentence(asked: dict[str, float], sentence: str) -> None:
    with pytest.raises(WeLoreError, match=sentence):
        allocate(spectra(), **asked)


def test_file_gives_back_the_plan(tmp_path: Path) -> None:
    for min_ratio in (0.25, "break-even"):
        plan = allocate(spectra(), keep=0.8, min_ratio=min_ratio)
        plan.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json") == plan


def test_file_with_an_impossible_rank_is_refused(tmp_path: Path) -> None:
    plan = allocate(spectra(), keep=0.8)
    plan.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text.replace(f'"kept": {plan.allocations[0].rank}', '"kept": 99', 1))
    with pytest.raises(WeLoreError, match="rank 99 of a must lie between 1 and 5"):
        Plan.load(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(WeLoreError, match="is not a plan of welore"):
        Plan.load(tmp_path / "plan.json")


def test_plan_of_version_0_1_calls_its_target_keep(tmp_path: Path) -> None:
    plan = allocate(spectra(), keep=0.8)
    plan.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text.replace('"keep": 0.8', '"params": 0.8'))
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("target", [{"keep": 0.001}, {"keep": 1.1}, {"rank_reduction": 0.99}])
def test_target_out_of_reach_is_known_from_the_shapes_alone(target: dict[str, float]) -> None:
    for scaling in ("none", "kfac"):
        with pytest.raises(WeLoreError, match="cannot be reached"):
            check_reachable(AllocationConfig(**target), scaling, list(SHAPES.values()))


@pytest.mark.parametrize("target", ["keep", "rank_reduction"])
def test_what_the_spectra_reach_the_shapes_allow(target: str) -> None:
    s = spectra()
    for strategy, storage, min_ratio in itertools.product(STRATEGIES, storages(), (0.5, "break-even")):
        for point in every_plan(s, strategy, storage, min_ratio, False):
            how: dict[str, Any] = {"strategy": strategy, "storage": storage, "min_ratio": min_ratio}
            check_reachable(AllocationConfig(**how, **{target: point[target == "keep"]}), "none", list(SHAPES.values()))
