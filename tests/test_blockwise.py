"""Statistics that are used up block by block while they are collected: what stays, and that the result is the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import welore
from conftest import compress
from toys import calibrate, checkpoint
from welore.allocation.plan import Plan
from welore.allocation.solver import allocate
from welore.calibration.statistics import Statistics
from welore.compression.mlp_pruning import Search
from welore.config import CalibrationConfig, CompressionConfig
from welore.errors import DamagedWeightsError, WeLoreError
from welore.io.context import RunContext
from welore.io.resume import Workspace
from welore.models.mlp import Mlp
from welore.models.targets import Target

TEXT = {"num_tokens": 512, "max_length": 64}


class Killed(BaseException):
    pass


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "model", None, "llama", intermediate_size=128)


def ours(model: Path, out: Path, **settings: Any) -> Plan:
    """The plan of a job that collects its own statistics."""
    config, calibration = CompressionConfig(split=True, **settings), CalibrationConfig(**TEXT)
    result = welore.compress(model, out, config, calibration=calibration, recovery=None, device="cpu")
    return result.plan


def watch(patch: pytest.MonkeyPatch, see: Callable[[str], None]) -> None:
    """Tell a function the label of every stage before its workers begin, and "-LABEL" after they have ended."""

    def seen(context: RunContext, function: Any, items: Any, costs: Any, label: str, *memory: Any) -> list[Any]:
        see(label)
        results = usual(context, function, items, costs, label, *memory)
        see("-" + label)
        return results

    usual = RunContext.map
    patch.setattr(RunContext, "map", seen)


def stored(work: Path, kind: str) -> set[str]:
    return {path.name.removesuffix(f".{kind}.safetensors") for path in work.glob(f"*.{kind}.safetensors")}


def test_plan_is_that_from_a_statistics_file(model: Path, tmp_path: Path) -> None:
    calibrate(model, "self", tmp_path / "C", measure_losses=0, **TEXT)
    for pruning in (0.0, 0.2):
        how: dict[str, Any] = {"keep": 0.5, "mlp_pruning": pruning}
        given = compress(
            model, tmp_path / f"given{pruning}", split=True, **how, statistics=tmp_path / "C", recovery=None
        )
        plan = Plan.load(tmp_path / f"given{pruning}" / "plan.json")
        mine = ours(model, tmp_path / f"own{pruning}", **how)
        assert (pruning != 0) == bool(mine.neurons)
        assert mine.neurons == plan.neurons
        assert mine.statistics["settings"] == plan.statistics["settings"]
        assert given.numbers["parameter_ratio"] == pytest.approx(mine.numbers()["parameter_ratio"], abs=2e-3)
        for a, b in zip(mine.allocations, plan.allocations, strict=True):
            assert abs(a.rank - b.rank) <= 1
        if pruning == 0:  # nothing is rounded
            tensors = load_file(tmp_path / f"own{pruning}" / "model.safetensors")
            expected = load_file(tmp_path / f"given{pruning}" / "model.safetensors")
            assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_moments_last_only_where_neurons_may_go_and_no_longer_than_needed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, seen = tmp_path / "out.work", dict[str, set[str]]()

    def see(label: str) -> None:
        seen.setdefault(label, stored(work, "outputs") | stored(work, "inputs"))
        seen.setdefault(label + " decompositions", stored(work, "decomposition"))

    watch(monkeypatch, see)
    plan = ours(model, tmp_path / "out", keep=0.5, mlp_pruning=0.2)
    assert {mlp.rpartition(".")[0] for mlp in plan.neurons} == {"model.layers.0", "model.layers.1"}
    assert {name.rpartition(".")[2] for name in seen["neurons"]} == {"gate_proj", "up_proj", "down_proj"}
    assert len(seen["neurons decompositions"]) == 8  # of the attention
    # every MLP has lost neurons; decompositions are left of the matrices to be factored alone
    assert not stored(tmp_path, "outputs") | {name for name in seen["factors"] if "gate" not in name}
    assert {key.rpartition(".")[0] for key in seen["factors decompositions"]} == {a.name for a in plan.lrcs}
    assert not seen["-factors decompositions"]


def test_moments_of_an_mlp_that_keeps_its_neurons_go_with_its_factors(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, seen = tmp_path / "out.work", dict[str, set[str]]()
    monkeypatch.setattr("welore.compression.pipeline.select_neurons", lambda *_: {})
    watch(monkeypatch, lambda label: seen.update({label: stored(work, "outputs")}))
    ours(model, tmp_path / "out", keep=0.4)
    assert len(seen["factors"]) == 6
    assert not seen["-factors"]


def test_nothing_lasts_where_no_neuron_can_go(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, seen = tmp_path / "out.work", dict[str, set[str]]()
    monkeypatch.setattr("welore.compression.pipeline.select_neurons", None)  # is never called

    def see(label: str) -> None:
        seen[label] = stored(work, "outputs") | stored(work, "inputs")
        seen[label + " decompositions"] = stored(work, "decomposition")

    watch(monkeypatch, see)
    ours(model, tmp_path / "out", keep=0.98)  # of all numbers 2 % go, 5 % of the neurons have more
    assert not seen["factors"]
    assert {name.rpartition(".")[2] for name in seen["factors decompositions"]} >= {"32x32"}


def test_neurons_never_take_more_than_the_target_leaves(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("welore.compression.mlp_pruning.WORTH", 1e12)  # every neuron is too dear to stay
    monkeypatch.setattr("welore.compression.mlp_pruning.DEAREST", 1e12)
    plan = ours(model, tmp_path / "out", keep=0.8)
    assert sum(mlp.pruned for mlp in plan.neurons.values()) > 0
    assert plan.numbers()["parameter_ratio"] == pytest.approx(0.8, abs=0.01)


def test_neurons_that_put_a_rank_reduction_out_of_reach_are_given_up(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(spectra: Any, config: Any) -> Plan:
        if spectra.neurons:
            raise WeLoreError("rank_reduction 0.4 cannot be reached")
        return allocate(spectra, config)

    monkeypatch.setattr("welore.compression.mlp_pruning.WORTH", 1e12)
    monkeypatch.setattr("welore.compression.pipeline.allocate", refused)
    how: dict[str, Any] = {"rank_reduction": 0.4, "strategy": "waterfill", "preset": "fast"}
    plan = ours(model, tmp_path / "out", **how)
    assert not plan.neurons
    assert plan.rank_reduction == pytest.approx(0.4, abs=0.02)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_cheapest_neurons_go_where_not_all_can() -> None:
    mlps = [Mlp(name, (Target("up", (width, 4)),), Target("down", (4, width))) for name, width in (("a", 3), ("b", 2))]
    losses = {mlps[0]: np.array([1.0, 2.0, 9.0]), mlps[1]: np.array([3.0, 4.0])}
    assert Search(price=100.0).level(losses) == pytest.approx(40)
    for most, count in ((0, 0), (7, 0), (8, 1), (25, 3), (39, 4)):
        level = Search(price=100.0, most=most).level(losses)
        assert sum(int((values < level * 8).sum()) for values in losses.values()) == count
    assert Search(price=1e-9, most=25).level(losses) == pytest.approx(4e-10)


@pytest.mark.parametrize(("strategy", "scaling"), [("owl", "asvd"), ("uniform", "whitening")])
def test_outliers_are_counted_for_the_strategy_that_asks(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, scaling: str
) -> None:
    work, parts = tmp_path / "out.work", set[str]()

    def see(label: str) -> None:
        for path in work.glob("*.values.safetensors"):
            parts.update(load_file(path))

    watch(monkeypatch, see)
    ours(model, tmp_path / "out", keep=0.5, strategy=strategy, scaling=scaling)
    assert parts == {"sigma", *(["outliers"] if strategy == "owl" else [])}


def test_damaged_work_of_statistics_that_are_gone_is_all_made_again(model: Path, tmp_path: Path) -> None:
    factored = ours(model, tmp_path / "undisturbed", keep=0.5, mlp_pruning=0.2).lrcs

    def stop(label: str) -> None:
        if label == "factors":
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        watch(patch, stop)
        ours(model, tmp_path / "out", keep=0.5, mlp_pruning=0.2)
    path = next((tmp_path / "out.work").glob(f"{factored[0].name}.*.decomposition.safetensors"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(OSError, match="was damaged: run the same command again"):
        ours(model, tmp_path / "out", keep=0.5, mlp_pruning=0.2)
    ours(model, tmp_path / "out", keep=0.5, mlp_pruning=0.2)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_job_killed_at_any_store_goes_on_to_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, names = Workspace.store, list[str]()

    def stopping(self: Workspace, name: str, tensors: Any) -> None:
        names.append(name)
        if len(names) == limit:
            raise Killed
        usual(self, name, tensors)

    monkeypatch.setattr(Workspace, "store", stopping)
    how: dict[str, Any] = {"keep": 0.5, "mlp_pruning": 0.2}
    limit = 0
    ours(model, tmp_path / "undisturbed", **how)
    kinds, count = [name.rpartition(".")[2] for name in names], len(names)
    within_a_block = [kinds.index(kind) + 2 for kind in ("outputs", "decomposition", "values")]
    for stop in (*within_a_block, 3 * count // 4, count):  # of smaller matrices; the last of the factors
        names.clear()
        limit, out = stop, tmp_path / f"out-{stop}"
        with pytest.raises(Killed):
            ours(model, out, **how)
        limit = 0
        ours(model, out, **how)
        for name in ("model.safetensors", "plan.json"):
            assert (out / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_a_part_of_a_statistic_is_read_alone_and_checked(model: Path, tmp_path: Path) -> None:
    calibrate(model, "self", tmp_path / "C", measure_losses=0, **TEXT)
    statistics, name, part = Statistics.load(tmp_path / "C"), "model.layers.0.mlp.down_proj", slice(40, 90)
    for read in (statistics.inputs, statistics.magnitudes):
        all_of_it, some = read(name), read(name, part)
        assert all_of_it is not None
        assert some is not None
        assert torch.equal(some, all_of_it[part, part] if all_of_it.ndim == 2 else all_of_it[part])
    content = bytearray((tmp_path / "C").read_bytes())
    start = content.find(all_of_it.numpy().tobytes())  # its magnitudes
    content[start + 4 * 50 + 3] |= 0x80  # the sign of number 50
    (tmp_path / "C").write_bytes(content)
    with pytest.raises(DamagedWeightsError, match="is NaN, infinite or negative"):
        statistics.magnitudes(name, part)
    assert statistics.magnitudes(name, slice(0, 40)) is not None
