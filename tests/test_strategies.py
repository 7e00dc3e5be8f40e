import itertools
from typing import Any

import numpy as np
import pytest

from conftest import allocate
from welore.allocation.plan import Plan
from welore.allocation.rule import Rule
from welore.allocation.spectra import Spectra, block_of
from welore.allocation.strategies import OWL_SPREAD, STRATEGIES
from welore.config import ASVD
from welore.errors import WeLoreError
from welore.layers.storage_forms import FACTORED, PIVOTED, cost, storages
from welore.linalg.spectrum import Values
from welore.records import Identity

SHAPES = {"model.layers.0.q": (6, 4), "model.layers.0.up": (9, 5), "model.layers.1.q": (5, 5)}


def spectra(seed: int = 0, shapes: dict[str, tuple[int, int]] = SHAPES, **about: Any) -> Spectra:
    random = np.random.default_rng(seed)
    values: dict[str, Values] = {n: np.sort(random.gamma(0.5, size=min(s)))[::-1].copy() for n, s in shapes.items()}
    return Spectra(Identity("m", "f"), values, shapes, **about)


def loss(sigma: Values, rank: int) -> float:
    return float((sigma[rank:] ** 2).sum())


@pytest.mark.parametrize("storage", sorted(storages()))
@pytest.mark.parametrize("seed", range(4))
def test_waterfill_is_the_best_of_all_choices_of_ranks(storage: str, seed: int) -> None:
    s = spectra(seed, scaling="kfac")
    choices = []
    for (m, n), sigma in zip(s.shapes.values(), s.values.values(), strict=True):
        ranks = np.arange(1, len(sigma) + 1)
        choices.append(
            [(int(c), loss(sigma, r)) for r, c in zip(ranks, Rule(storage).counted(ranks, (m, n)), strict=True)]
        )
    every = [(sum(c for c, _ in each), sum(x for _, x in each)) for each in itertools.product(*choices)]
    for wanted in (0.6, 0.75, 0.9):
        plan = allocate(s, keep=wanted, storage=storage)
        ranks = {a.name: a.rank if a.factored else a.full_rank for a in plan.allocations}
        size = sum(a.stored_parameters for a in plan.allocations)
        mine = sum(loss(sigma, ranks[name]) for name, sigma in s.values.items())
        assert mine <= min(x for c, x in every if c <= size) + 1e-12


def test_waterfill_of_plain_spectra_weighs_shares_of_each_matrix() -> None:
    s = spectra(1)
    louder = {name: sigma * (100 if "up" in name else 1) for name, sigma in s.values.items()}
    for scaling in ("none", ASVD):
        how: dict[str, Any] = {"strategy": "waterfill", "storage": PIVOTED, "keep": 0.7}
        quiet = allocate(Spectra(s.model, s.values, s.shapes, scaling=scaling), **how)
        loud = allocate(Spectra(s.model, louder, s.shapes, scaling=scaling), **how)
        assert quiet.ranks == loud.ranks
    assert allocate(Spectra(s.model, louder, s.shapes, scaling="kfac"), keep=0.7).ranks != quiet.ranks


def test_waterfill_of_flat_and_zero_spectra_is_finite() -> None:
    shapes = {"a": (6, 6), "b": (1, 4), "c": (8, 6)}
    s = Spectra(Identity("m", "f"), {"a": np.ones(6), "b": np.ones(1), "c": np.zeros(6)}, shapes, scaling="kfac")
    for name in STRATEGIES.keys() - {"owl"}:
        for scores, sigma in zip(STRATEGIES[name].scores(s, Rule("auto")), s.values.values(), strict=True):
            assert np.isfinite(scores).all()
            assert scores.shape == sigma.shape
            assert (np.diff(scores) <= 0).all()
    assert {a.name for a in allocate(s, keep=0.7).allocations if a.factored} >= {"c"}  # it costs no loss at all


def test_energy_keeps_the_same_share_of_every_squared_norm() -> None:
    s = spectra(2, {f"layers.{i}.x": (40 + i, 60) for i in range(4)})
    plan = allocate(s, threshold=0.1, strategy="energy", allow_growth=True)
    for a in plan.allocations:
        assert loss(s.values[a.name], a.rank) <= 0.1 * loss(s.values[a.name], 0) < loss(s.values[a.name], a.rank - 1)


def test_owl_keeps_more_where_outliers_are_and_its_mean_is_the_target() -> None:
    shapes = {f"model.layers.{i}.{kind}": (50, 50) for i in range(4) for kind in "qk"}
    shares = {name: 0.01 * int(block_of(name).split(".")[-1]) ** 2 for name in shapes}
    plan = allocate(spectra(0, shapes, outliers=shares), threshold=0.4, strategy="owl", allow_growth=True)
    removed = [a.reduction_ratio for a in plan.allocations]
    assert removed[0] == removed[1]
    assert removed[::2] == sorted(removed[::2], reverse=True)
    assert max(abs(x - 0.4) for x in removed) == pytest.approx(OWL_SPREAD, abs=0.011)
    assert np.mean(removed) == pytest.approx(0.4, abs=0.011)


def test_owl_without_a_calibration_is_one_sentence() -> None:
    with pytest.raises(WeLoreError, match="owl needs outliers.*--statistics"):
        allocate(spectra(), keep=0.8, strategy="owl")


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_a_matrix_that_no_token_reached_stays_dense(strategy: str) -> None:
    name = "model.layers.0.up"
    shapes = {n: (10 * m, 10 * n_) for n, (m, n_) in SHAPES.items()}
    about: dict[str, Any] = {"scaling": "kfac", "outliers": dict.fromkeys(shapes, 0.1), "unreached": (name,)}
    plan = allocate(spectra(3, shapes, **about), keep=0.8, strategy=strategy, min_ratio=0)
    assert plan.ranks
    assert name not in plan.ranks


def test_defaults_are_the_papers_for_weights_and_ours_for_scaled_ones() -> None:
    plain, scaled = (allocate(spectra(0, scaling=scaling), keep=0.8) for scaling in ("none", "kfac"))
    assert (plain.strategy, plain.min_ratio, set(plain.forms.values()) - {FACTORED}) == ("welore", 0.5, set())
    assert (scaled.strategy, scaled.min_ratio) == ("waterfill", "break-even")
    assert scaled.scaling == "kfac"


def test_a_plan_remembers_scaling_and_calibration(tmp_path: Any) -> None:
    about = {"settings": {"tokens": 5}, "inputs": {}}
    plan = allocate(spectra(0, scaling="kfac", statistics=about), keep=0.8)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_stored_numbers_of_auto_are_the_smaller_form_with_its_order() -> None:
    ranks = np.arange(1, 31)
    found = Rule("auto").counted(ranks, (40, 30))
    for r, numbers in zip(ranks[:-1].tolist(), found[:-1].tolist(), strict=True):
        pivoted = 2 * cost(40, 30, r, PIVOTED) + 4 * 40 < 2 * cost(40, 30, r, FACTORED)
        assert numbers == cost(40, 30, r, PIVOTED if pivoted else FACTORED)
    assert found[-1] == 40 * 30


def test_the_block_of_a_matrix_is_its_name_up_to_the_first_number() -> None:
    assert block_of("model.layers.12.mlp.up_proj") == "model.layers.12"
    assert block_of("h.3.attn.c_attn") == "h.3"
    assert block_of("lm_head") == ""
