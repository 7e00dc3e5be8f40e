from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import welore
from conftest import build, compress, logits
from toys import calibrate
from welore.calibration.scaling import SCALINGS, metric
from welore.calibration.statistics import SHRINKAGE, Statistics, usual_shrinkage
from welore.config import AllocationConfig, CompressionConfig, Goal
from welore.errors import WeLoreError
from welore.linalg.svd import Side
from welore.models.source import CheckpointSource
from welore.models.targets import Target
from welore.records import Identity, Record

SCALED = sorted(SCALINGS.keys() - {"none"})
WINDOWS = torch.randint(0, 96, (6, 32), generator=torch.Generator().manual_seed(0))


def calibrated(family: str, out: Path) -> Statistics:
    return calibrate(build(family), WINDOWS, out / "c.safetensors")


@pytest.mark.parametrize("scaling", SCALED)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_streamed_and_in_memory_give_the_same_checkpoint(
    saved: Callable[..., Path], tmp_path: Path, scaling: str, family: str
) -> None:
    source = saved(family)
    c = calibrated(family, tmp_path)
    how: dict[str, Any] = {"keep": 0.7, "scaling": scaling, "statistics": c}
    record = compress(source, tmp_path / "stream", **how)
    model = build(family)
    compress(model, tmp_path / "memory", **how)
    streamed, in_memory = (tmp_path / name / "model.safetensors" for name in ("stream", "memory"))
    assert streamed.read_bytes() == in_memory.read_bytes()
    assert record.numbers["lrcs"] > 0
    assert record.numbers["largest_excess"] < 1e-6
    assert record.settings["scaling"] == scaling
    assert record.settings["statistics"]["settings"]["num_tokens"] == WINDOWS.numel()


@pytest.mark.parametrize(("goal", "split"), [("cpu", False), ("size", True)])
def test_three_commands_make_what_one_makes(
    saved: Callable[..., Path], tmp_path: Path, goal: Goal, *, split: bool
) -> None:
    source = saved("llama")
    c = calibrated("llama", tmp_path)
    spectra = welore.analyze(source, scaling="kfac", statistics=c, split=split)
    spectra.save(tmp_path / "s.safetensors")
    config = AllocationConfig(keep=0.7, optimize_for=goal)
    plan = welore.allocate(welore.Spectra.load(tmp_path / "s.safetensors"), config)
    plan.save(tmp_path / "plan.json")
    plan = welore.Plan.load(tmp_path / "plan.json")
    compress(source, tmp_path / "three", plan=plan, statistics=tmp_path / "c.safetensors")
    compress(source, tmp_path / "one", keep=0.7, statistics=c, optimize_for=goal, mlp_pruning=0)
    for name in ("model.safetensors", "plan.json"):
        assert (tmp_path / "three" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_the_loss_of_outputs_is_smaller_than_with_plain_truncation(tmp_path: Path) -> None:
    dense = logits(build("llama"), WINDOWS)
    c = calibrated("llama", tmp_path)

    def error(**how: Any) -> float:
        model = build("llama")
        compress(model, keep=0.75, storage="factored", **how)
        return float((logits(model, WINDOWS) - dense).norm())

    plain = error(scaling="none", strategy="uniform")
    scaled = {name: error(scaling=name, strategy="uniform", statistics=c) for name in ("whitening", "kfac")}
    assert max(scaled.values()) < plain


@pytest.mark.parametrize("shrinkage", [None, 0.0, 0.6])
def test_moments_of_two_different_inputs_count_less_where_k_fac_uses_them(
    saved: Callable[..., Path], tmp_path: Path, shrinkage: float | None
) -> None:
    made = calibrated("llama", tmp_path)
    share = SHRINKAGE if shrinkage is None else shrinkage
    (made if shrinkage is None else replace(made, shrinkage=share)).save(tmp_path / "again.safetensors")
    statistics = Statistics.load(tmp_path / "again.safetensors")
    assert statistics.shrinkage == share
    assert [usual_shrinkage(tokens) for tokens in (1, 16_384, 65_536)] == [SHRINKAGE, SHRINKAGE, SHRINKAGE / 2]
    for target in CheckpointSource(saved("llama")).targets[:7]:
        H = statistics.inputs(target.name)
        assert H is not None
        H = H.double()
        damping = 1e-3 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
        for scaling, shrunk in (("kfac", (1 - share) * H + share * H.diagonal().diag()), ("whitening", H)):
            norm = metric(scaling, statistics, target)
            assert norm is not None
            assert isinstance(norm.inputs, Side)
            L, e = norm.inputs.root(torch.device("cpu"), torch.float64)
            torch.testing.assert_close(4.0**e * L @ L.T, shrunk + damping)


def test_a_matrix_that_no_token_reached_is_kept(saved: Callable[..., Path], tmp_path: Path) -> None:
    source = saved("llama")
    c = calibrated("llama", tmp_path)
    name = "model.layers.0.self_attn.o_proj"
    target = Target(name, c.shapes[name])
    assert metric("kfac", c, target) is not None
    shared = {other: owner for other, owner in c.shared.items() if other != name}
    unreached = Statistics(c.model, c.shapes, {**c.counts, name: 0}, shared, c.store, c.record)
    assert metric("kfac", unreached, target) is None
    compress(source, tmp_path / "small", keep=0.6, statistics=unreached)
    assert name not in welore.Plan.load(tmp_path / "small" / "plan.json").ranks


def test_calibrations_that_do_not_fit_are_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    source = saved("llama")
    c = calibrated("llama", tmp_path)
    plan = welore.allocate(welore.analyze(source, scaling="kfac", statistics=c), keep=0.7)
    with pytest.raises(WeLoreError, match="plan has scaling kfac: give the statistics"):
        compress(source, tmp_path / "out", plan=plan)
    other = Statistics(c.model, c.shapes, c.counts, c.shared, c.store, Record("calibration", {}, {"tokens": 1}, {}))
    with pytest.raises(WeLoreError, match="other statistics"):
        compress(source, tmp_path / "out", plan=plan, statistics=other)
    stranger = Statistics(Identity("x", "0" * 64), c.shapes, c.counts, c.shared, c.store, c.record)
    with pytest.raises(WeLoreError, match="statistics was made for another model"):
        compress(source, tmp_path / "out", keep=0.7, statistics=stranger)
    with pytest.raises(WeLoreError, match="scaling whitening needs statistics"):
        welore.analyze(source, scaling="whitening")
    with pytest.raises(WeLoreError, match="model in memory needs its tokenizer"):
        compress(build("llama"), keep=0.7)
    with pytest.raises(WeLoreError, match="unknown scaling 'kfca'; did you mean 'kfac'"):
        compress(source, tmp_path / "out", keep=0.7, scaling="kfca")
    with pytest.raises(WeLoreError, match="unknown preset 'papre'; did you mean 'paper'"):
        compress(source, tmp_path / "out", keep=0.7, preset="papre")
    assert not (tmp_path / "out").exists()


def test_params_alone_needs_no_data(
    saved: Callable[..., Path], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved("llama")
    tokenizer.save_pretrained(source)
    record = compress(source, tmp_path / "small", keep=0.7, num_tokens=64)
    assert record.settings["scaling"] == "kfac"
    assert record.settings["strategy"] == "waterfill"
    assert record.settings["statistics"]["settings"]["dataset"] == ["self:1"]
    assert not list(tmp_path.glob("*.work"))
    assert compress(source, tmp_path / "again", keep=0.7, num_tokens=64).numbers["lrcs"]
    for name in ("model.safetensors", "plan.json"):
        assert (tmp_path / "small" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_paper_is_welore_as_published(saved: Callable[..., Path], tmp_path: Path) -> None:
    source = saved("llama")
    compress(source, tmp_path / "paper", keep=0.8, preset="paper")
    compress(source, tmp_path / "said", keep=0.8, strategy="welore", scaling="none", storage="factored")
    assert (tmp_path / "paper" / "plan.json").read_bytes() == (tmp_path / "said" / "plan.json").read_bytes()
    assert welore.Plan.load(tmp_path / "paper" / "plan.json").strategy == "welore"


def test_the_name_of_whitening_in_version_0_1_is_understood(tmp_path: Path) -> None:
    c = calibrated("llama", tmp_path)
    target = Target("model.layers.0.mlp.up_proj", c.shapes["model.layers.0.mlp.up_proj"])
    old, new = (metric(name, c, target) for name in ("input", "whitening"))
    assert old is not None
    assert new is not None
    roots = [side.root(torch.device("cpu"), torch.float64)[0] for side in (old.inputs, new.inputs)]  # type: ignore[union-attr]
    assert torch.equal(*roots)
    assert CompressionConfig(scaling="input").scaling == "whitening"  # type: ignore[arg-type]
    assert {name: scaling.unit for name, scaling in SCALINGS.items()} == {
        "none": "relative",
        "asvd": "relative",
        "whitening": "loss",
        "kfac": "loss",
    }
