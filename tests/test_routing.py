"""Experts one after the other: the same statistics, plan and factors as with all experts of a layer together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import welore
from campaigns.architectures import build as build_architecture
from campaigns.architectures import loaded
from conftest import logits
from toys import calibrate
from welore.calibration.hooks import Moments
from welore.calibration.statistics import Statistics
from welore.compression.blockwise import BlockAnalyzer
from welore.compression.needs import Needs
from welore.compression.pipeline import make_job
from welore.config import CalibrationConfig, CompressionConfig
from welore.data.windows import write_windows
from welore.io.context import RunContext
from welore.io.pages import MAPS, _mapped_files
from welore.io.parallel import ALONE
from welore.io.resume import Workspace
from welore.layers.experts import Experts
from welore.layers.frozen_linear import leave_weights
from welore.models.experts import unfused
from welore.models.load import load
from welore.models.source import CheckpointSource, open_source

# GPT-OSS has biases, and 3-D tensors in its files; Llama 4 repeats all tokens for every expert.
KINDS = ["Mixtral", "Qwen3-MoE", "GPT-OSS", "Llama4"]
WINDOWS = torch.randint(3, 90, (6, 16), generator=torch.Generator().manual_seed(0))


class Killed(BaseException):
    pass


@pytest.fixture(params=KINDS)
def dense(request: pytest.FixtureRequest, tmp_path: Path, tokenizer: Any) -> Path:
    build_architecture(request.param).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def groups(statistics: Statistics) -> dict[str, torch.Tensor]:
    return {name: statistics.store.read(name) for name in statistics.layout()}


def small(dense: Path, out: Path, **settings: Any) -> welore.CompressionResult:
    """A job that collects its own statistics, of windows in a file."""
    windows = write_windows(dense.parent / "windows.safetensors", WINDOWS) or dense.parent / "windows.safetensors"
    names = ("dtype", "whole_model", "batch_size")
    text = {name: settings.pop(name) for name in names if name in settings}
    calibration = CalibrationConfig(
        dataset=str(windows), num_tokens=WINDOWS.numel(), max_length=16, measure_losses=0, **text
    )
    config = CompressionConfig(keep=0.6, scaling="kfac", strategy="waterfill", storage="factored", **settings)
    return welore.compress(dense, out, config, calibration=calibration, recovery=None, device="cpu", workers=1)


def test_statistics_are_those_of_all_experts_together(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how: dict[str, Any] = {"dtype": "float32", "batch_size": 2, "measure_losses": 1.0}
    together = calibrate(loaded(dense), WINDOWS, whole_model=True, **how)
    held = set[int]()
    reduce = Moments.reduce

    def seen(moments: Moments, processes: Any) -> None:
        numbers = {name.split(".experts.")[1].split(".")[0] for name in moments.counts if ".experts." in name}
        held.add(len(numbers))
        reduce(moments, processes)

    monkeypatch.setattr(Moments, "reduce", seen)
    model = loaded(dense)
    apart = welore.calibrate(model, CalibrationConfig(whole_model=False, **how), dataset=WINDOWS, workers=1)
    assert held == {0, 1}  # the layers outside of experts, and one expert at a time
    assert apart.counts == together.counts
    assert apart.shared == together.shared
    expected = groups(together)
    for name, tensor in groups(apart).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5 * float(expected[name].abs().max()))


def test_plan_and_factors_are_those_of_all_experts_together(dense: Path, tmp_path: Path) -> None:
    pruning = 0.2 if CheckpointSource(dense).config.model_type == "mixtral" else 0.0  # the others are too narrow
    plans = [
        small(dense, tmp_path / str(whole), dtype="float32", whole_model=whole, mlp_pruning=pruning).plan
        for whole in (True, False)
    ]
    assert plans[0].neurons == plans[1].neurons
    assert bool(pruning) == bool(plans[0].neurons)
    assert plans[0].ranks == plans[1].ranks
    expected, found = (load_file(tmp_path / str(whole) / "model.safetensors") for whole in (True, False))
    products = 0
    for name in expected:
        if name.endswith(".A.weight"):
            layer = name.removesuffix("A.weight")
            one, other = (tensors[name] @ tensors[layer + "B.weight"] for tensors in (expected, found))
            torch.testing.assert_close(other, one, rtol=1e-2, atol=1e-3 * float(one.abs().max()))
            products += ".experts." in name
    assert products


def test_a_job_that_was_killed_between_two_experts_ends_with_the_same_bytes(dense: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"whole_model": False, "mlp_pruning": 0.0}
    small(dense, tmp_path / "undisturbed", **how)
    calls, usual = list[Any](), BlockAnalyzer.__call__

    def killed(self: BlockAnalyzer, *arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) > 3:  # the layers outside of experts, and two experts
            raise Killed
        usual(self, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(BlockAnalyzer, "__call__", killed)
        small(dense, tmp_path / "out", **how)
    assert list((tmp_path / "out.work").glob("*.experts.*-sum.safetensors"))
    small(dense, tmp_path / "out", **how)
    assert not (tmp_path / "out.work").exists()
    names = [file.name for file in (tmp_path / "undisturbed").glob("*.safetensors")]
    assert names
    for name in [*names, "plan.json"]:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_experts_that_are_excluded_need_no_pass_of_their_own(tmp_path: Path) -> None:
    build_architecture("Mixtral").save_pretrained(tmp_path / "dense")
    statistics = welore.calibrate(
        loaded(tmp_path / "dense"), CalibrationConfig(whole_model=False, exclude=("experts",)), dataset=WINDOWS
    )
    assert statistics.counts
    assert not any(".experts." in name for name in statistics.counts)


def test_estimated_memory_of_statistics_does_not_grow_with_the_experts(saved: Callable[..., Path]) -> None:
    needs = []
    for count in (4, 16):
        context = RunContext.create(device="cpu", workers=1)
        source = open_source(saved("qwen3_moe", num_experts=count), context)
        text = CalibrationConfig(num_tokens=128, whole_model=False)
        job = make_job(source, CompressionConfig(keep=0.6), text, None, None, None, context)
        needs += [stage for stage in Needs(job).stages() if stage.name == "statistics"]
    few, many = needs
    assert many.host_bytes == pytest.approx(few.host_bytes, rel=1e-6)
    assert many.mapped_bytes > 2 * few.mapped_bytes
    assert many.disk_bytes > few.disk_bytes


@pytest.mark.parametrize(("name", "single"), [("Mixtral", True), ("Qwen3-MoE", True), ("GPT-OSS", False)])
def test_experts_stay_in_the_mapped_file(
    name: str, single: bool, tmp_path: Path, tokenizer: Any, tokens: torch.Tensor
) -> None:
    directory = tmp_path / "dense"
    build_architecture(name).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    assert CheckpointSource(directory).single_experts == single
    model, _ = load(directory, "auto", "cpu", apart=True)
    apart = unfused(model)
    assert (apart is model) == single
    experts = [module for module in apart.modules() if isinstance(module, Experts)]
    assert experts
    together = loaded(directory)
    torch.testing.assert_close(logits(apart, tokens), logits(together, tokens), rtol=1e-5, atol=1e-6)
    assert getattr(model.config, "quantization_config", None) is None
    if MAPS.exists():
        files = _mapped_files()
        for parameter in (p for module in experts for p in module.parameters()):
            assert any(low <= parameter.data_ptr() < high for low, high in files)
    model.save_pretrained(tmp_path / "again")
    together.save_pretrained(tmp_path / "whole")
    one, other = (load_file(tmp_path / where / "model.safetensors") for where in ("again", "whole"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("bias", [True, False])
def test_weights_that_stay_compute_what_converted_ones_do(bias: bool) -> None:
    layers = [torch.nn.Linear(5, 7, bias=bias, dtype=torch.bfloat16).requires_grad_(False) for _ in range(2)]
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    results = []
    for stays in (False, True):
        if stays:
            leave_weights(layers, torch.float32)
        leaf = x.clone().requires_grad_()
        y = sum(layer(leaf) if stays else layer.float()(leaf) for layer in layers)
        assert isinstance(y, torch.Tensor)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad))
        for layer in layers:
            layer.bfloat16()
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_sums_that_are_set_aside_come_back(tmp_path: Path) -> None:
    layer = torch.nn.Linear(5, 7)
    moments, workspace = Moments({"layer": layer}), Workspace(tmp_path / "work", "key")
    workspace.open()
    layer(torch.randn(4, 5)).sum().backward()
    moments.end_batch()
    before = {key: total.clone() for key, total in moments.sums.items()}
    moments.set_aside(workspace, ALONE)
    assert not any(total.numel() for total in moments.sums.values())
    moments.take_back(workspace, ALONE)
    assert before.keys() == moments.sums.keys()
    assert all(torch.equal(before[key], moments.sums[key]) for key in before)
    assert not list((tmp_path / "work").glob("*-sum*"))
    moments.set_aside(workspace, ALONE)
    next((tmp_path / "work").glob("layer.inputs-sum*")).write_bytes(b"damaged")
    with pytest.raises(OSError, match="run the same command again"):
        moments.take_back(workspace, ALONE)
