import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from toys import trace
from welore.emergence.claims import (
    CLAIMS,
    claims_table,
    effective_rank,
    load_pretraining,
    measured,
    noise_stable_rank,
    overlap_with_last,
    rank_correlation,
    settling,
    verdict,
)
from welore.emergence.trace import OVERLAPS, Trace
from welore.errors import WeLoreError
from welore.records import Record


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return Trace.load(trace(tmp_path_factory.mktemp("traces") / "trace"))


def record(seed: int, claims: dict[str, list[float]], rows: list[dict[str, Any]]) -> Record:
    return Record("pretrain", {"label": None}, {"seed": seed}, {"claims": claims, "matrices": rows})


def test_every_claim_has_a_value_inside_its_interval(found: Trace) -> None:
    numbers = measured(found)
    assert numbers["claims"].keys() == CLAIMS.keys()
    for value, low, high in numbers["claims"].values():
        assert low <= value <= high
    assert [row["name"] for row in numbers["matrices"]] == list(found.matrices)
    assert measured(found) == numbers  # the bootstrap draws the same every time


def test_what_was_planted_is_found(found: Trace) -> None:
    low_kinds = ("q_proj", "k_proj", "o_proj", "gate_proj")
    rows = measured(found)["matrices"]
    low = [row["reduction_ratio"] for row in rows if row["kind"] in low_kinds]
    others = [row["reduction_ratio"] for row in rows if row["kind"] not in low_kinds]
    value, least, _ = measured(found)["claims"]["C1"]
    assert value == pytest.approx(np.mean(low) - np.mean(others))
    assert 0 < least < value


def test_rank_correlation_is_spearmans() -> None:
    draws = np.random.default_rng(0)
    x, y = draws.integers(0, 6, 30).astype(float), draws.random(30)
    value, low, high = rank_correlation(x, y)
    assert value == pytest.approx(spearmanr(x, y).statistic)
    assert -1 <= low < value < high <= 1
    assert rank_correlation(x, x) == [pytest.approx(1)] * 3
    assert rank_correlation(x, np.ones(30)) == [0, 0, 0]


def planted(found: Trace, with_last: list[float], ceiling: float) -> tuple[Any, np.ndarray]:
    """A matrix whose chance-corrected overlaps with the end are `with_last`, and two batches agree on `ceiling`."""
    matrix = found.matrices["model.layers.0.mlp.up_proj"]
    rank = 4
    chance = rank / matrix.full_rank
    count = len(with_last)
    square = np.full((count, count), 0.0)
    square[:, -1] = square[-1, :] = np.array(with_last)
    np.fill_diagonal(square, ceiling)
    table = {OVERLAPS[16]: chance + (1 - chance) * square, OVERLAPS[4]: chance + (1 - chance) * square}
    return dataclasses.replace(matrix, other=table), np.arange(count) * 10.0


def test_noise_is_taken_out_of_overlaps(found: Trace) -> None:
    matrix, _ = planted(found, [0.0, 0.2, 0.4, 0.4], ceiling=0.4)
    assert overlap_with_last(matrix, 4) == pytest.approx([0, 0.5, 1, 1])


def test_a_matrix_settles_after_it_was_unlike_the_end_for_the_last_time(
    found: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("welore.emergence.claims.overlap_with_last", lambda matrix: np.array(matrix))
    steps = np.array([0.0, 10, 20, 30, 40])
    assert settling(np.array([0.9, 0.9, 0.9, 0.9, 1.0]), steps) == 0  # type: ignore[arg-type]
    assert settling(np.array([0.1, 0.9, 0.4, 0.6, 1.0]), steps) == 0.75  # type: ignore[arg-type]
    assert settling(np.array([0.1, 0.1, 0.1, 0.1, 1.0]), steps) == 1  # type: ignore[arg-type]


def test_ranks_of_known_matrices() -> None:
    assert effective_rank(np.ones(8)) == pytest.approx(8)
    assert effective_rank(np.array([1.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(np.zeros(3)) == 0
    G = np.random.default_rng(0).standard_normal((300, 500))
    assert noise_stable_rank(300, 500) == pytest.approx((G**2).sum() / np.linalg.norm(G, 2) ** 2, rel=0.05)


def test_a_claim_holds_or_fails_only_if_every_run_says_so() -> None:
    above, below, across = [0.5, 0.1, 0.9], [-0.5, -0.9, -0.1], [0.5, -0.1, 0.9]
    assert verdict([above, above]) == "holds"
    assert verdict([below, below]) == "does not hold"
    assert verdict([above, across]) == verdict([above, below]) == verdict([across]) == "cannot be told"


def test_the_table_has_a_column_for_every_run_and_a_verdict(found: Trace) -> None:
    numbers = measured(found)
    table = claims_table([record(seed, numbers["claims"], numbers["matrices"]) for seed in (0, 1)])
    assert table.headings[3:] == ["seed 0", "seed 1", "verdict"]
    assert [row[0] for row in table.rows] == list(CLAIMS)
    assert table.rows[0][3].startswith(f"{numbers['claims']['C1'][0]:+.2f} [")
    assert table.rows[0][-1] == "holds"


def test_a_record_without_its_claims_is_refused(found: Trace, tmp_path: Path) -> None:
    numbers = measured(found)
    record(0, numbers["claims"], numbers["matrices"]).save(tmp_path / "pretrain.json")
    assert load_pretraining(tmp_path / "pretrain.json").kind == "pretrain"
    rows = numbers["matrices"]
    for claims, damaged in (
        (numbers["claims"] | {"C1": [0.0, None, 0.0]}, rows),
        (numbers["claims"], [{**rows[0], "settles_at": "late"}, *rows[1:]]),
        (numbers["claims"], [{**rows[0], "kind": 3}, *rows[1:]]),
        (numbers["claims"], [rows[0], 7]),
    ):
        record(0, claims, damaged).save(tmp_path / "pretrain.json")
        with pytest.raises(WeLoreError, match="lacks claims or matrices"):
            load_pretraining(tmp_path / "pretrain.json")
    record(0, {"C1": [0.0, 0.0, 0.0]}, numbers["matrices"]).save(tmp_path / "pretrain.json")
    with pytest.raises(WeLoreError, match="lacks claims or matrices"):
        load_pretraining(tmp_path / "pretrain.json")
