"""`--for anywhere`: an ordinary smaller checkpoint, which loads and runs without this package."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import welore
from conftest import Command, build, compress, logits
from toys import calibrate, characters, checkpoint, weights
from welore.allocation.plan import Plan
from welore.compression.plain import default_multiple
from welore.compression.recovery import MATRICES_RATE, relative_rate
from welore.config import CalibrationConfig, CompressionConfig, FinetuneConfig, RecoveryConfig
from welore.errors import WeLoreError
from welore.layers.remaining import Remaining
from welore.models.resizing import find_resizing
from welore.models.source import ModelSource

ANYWHERE: dict[str, Any] = {"keep": 0.8, "optimize_for": "anywhere"}
STOCK = """
import sys, torch
sys.modules["welore"] = None  # whoever imports it fails
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = torch.arange(3, 19)[None]
assert model.generate(ids, max_new_tokens=4, min_new_tokens=4).shape == (1, 20)
torch.save(model(ids).logits.detach(), sys.argv[2])
"""


def calibrated(directory: Path, family: str = "llama", **changes: Any) -> tuple[Path, Path]:
    """A small model with MLPs of 128 neurons, and its statistics on text of its own."""
    sizes = {} if family == "gpt2" else {"intermediate_size": 128}
    model, statistics = checkpoint(directory / "model", None, family, **sizes, **changes), directory / "C.safetensors"
    calibrate(model, "self", statistics, num_tokens=512, max_length=64, measure_losses=0)
    return model, statistics


def widths(model: PreTrainedModel) -> set[int]:
    """Inputs of the down layers."""
    down = [m for n, m in model.named_modules() if n.endswith(("down_proj", "mlp.c_proj", "dense_4h_to_h"))]
    return {getattr(layer, "in_features", None) or layer.nx for layer in down}


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("llama", ["intermediate_size"]),
        ("qwen2", ["intermediate_size"]),
        ("phi3", ["intermediate_size"]),
        ("gemma3_text", ["intermediate_size"]),
        ("gpt2", ["n_inner"]),
    ],
)
def test_the_result_is_an_ordinary_smaller_model(tmp_path: Path, family: str, path: list[str], tokens: Tensor) -> None:
    source, statistics = calibrated(tmp_path, family)
    small = tmp_path / "small"
    record = compress(source, small, statistics=statistics, recovery=None, rank_multiple=16, **ANYWHERE)
    plan = Plan.load(small / "plan.json")
    (width,) = {len(mlp.indices) for mlp in plan.neurons.values()}
    assert plan.plain
    assert not plan.lrcs
    assert width % 16 == 0
    dense = AutoModelForCausalLM.from_pretrained(source)
    before, after = (json.loads((directory / "config.json").read_text()) for directory in (source, small))
    assert after == before | {path[-1]: width}

    model = AutoModelForCausalLM.from_pretrained(small)
    assert type(model) is type(dense)
    assert widths(model) == {width}
    assert record.numbers["parameters"] == sum(p.numel() for p in model.parameters())
    numel = {name: t.numel() for name, t in weights(source).items() if "layers." in name or ".h." in name}
    matrices = {name for name in numel if name.removesuffix(".weight") in {a.name for a in plan.allocations}}
    left = sum(weights(small)[name].numel() for name in matrices)
    assert record.numbers["parameter_ratio"] == pytest.approx(left / sum(numel[name] for name in matrices))
    assert record.numbers["parameter_ratio"] == pytest.approx(0.8, abs=0.05)
    for name, tensor in weights(small).items():  # only the MLPs have changed
        if tensor.shape == weights(source)[name].shape and "mlp.down" not in name:
            assert torch.equal(tensor, weights(source)[name])

    compress(dense, None, plan=plan, statistics=statistics)  # in memory
    assert widths(dense) == {width}
    assert not hasattr(dense.config, "quantization_config")
    assert dense.all_tied_weights_keys == model.all_tied_weights_keys
    dense.save_pretrained(tmp_path / "again")
    for other in (dense, AutoModelForCausalLM.from_pretrained(tmp_path / "again")):
        assert torch.equal(logits(other, tokens), logits(model, tokens))
    assert "made smaller by welore" in str(welore.info(small))


def test_it_runs_in_a_process_without_this_package(tmp_path: Path) -> None:
    source, statistics = calibrated(tmp_path)
    compress(source, tmp_path / "small", statistics=statistics, recovery=None, **ANYWHERE)
    out = tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", STOCK, tmp_path / "small", out], check=True, env={"HF_HUB_OFFLINE": "1"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(torch.load(out), logits(model, torch.arange(3, 19)[None]))


def test_statistics_that_are_used_up_block_by_block_give_the_same_model(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model", None, "llama", intermediate_size=128)
    text = CalibrationConfig(num_tokens=512, max_length=64, measure_losses=0)
    statistics = welore.calibrate(source, text, tmp_path / "C.safetensors")
    compress(source, tmp_path / "given", statistics=statistics, recovery=None, **ANYWHERE)
    compress(source, tmp_path / "collected", calibration=text, recovery=None, **ANYWHERE)
    given, collected = (weights(tmp_path / name) for name in ("given", "collected"))
    assert given.keys() == collected.keys()
    for name, tensor in given.items():
        torch.testing.assert_close(collected[name], tensor)


@pytest.mark.parametrize(("trainable", "trained"), [("factors", "matrices"), ("updates", "updates")])
def test_recovery_trains_matrices_and_a_killed_run_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainable: Any, trained: str
) -> None:
    source = checkpoint(tmp_path / "model", None, "llama", intermediate_size=128, initializer_range=0.3)
    text = CalibrationConfig(num_tokens=1536, max_length=32)
    recovery = RecoveryConfig(trainable=trainable, learning_rate=5e-4, warmup_steps=1)
    how: dict[str, Any] = {"calibration": text, "recovery": recovery} | ANYWHERE | {"keep": 0.5}
    record = compress(source, tmp_path / "small", **how)
    assert record.settings["recovery"]["trained"] == trained
    assert record.numbers["healed"]
    assert record.numbers["held_out_loss"]["healed"] != record.numbers["held_out_loss"]["cut"]
    attention = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(weights(tmp_path / "small")[attention], weights(source)[attention])
    embeddings = "model.embed_tokens.weight"
    assert torch.equal(weights(tmp_path / "small")[embeddings], weights(source)[embeddings])

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for stage in ("select_neurons", "recover", "write_compressed"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"welore.compression.pipeline.{stage}", killed)
            compress(source, tmp_path / "again", **how)
    compress(source, tmp_path / "again", **how)
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "small" / name).read_bytes()
    assert not (tmp_path / "again.work").exists()


def test_matrices_learn_faster_than_factors(tmp_path: Path) -> None:
    source, statistics = calibrated(tmp_path)
    compress(source, tmp_path / "cut", statistics=statistics, recovery=None, **ANYWHERE)
    plan, config = Plan.load(tmp_path / "cut" / "plan.json"), RecoveryConfig()
    usual = config.relative_learning_rate * (1 - plan.parameter_ratio)
    assert relative_rate(plan, FinetuneConfig(max_steps=8), config) == pytest.approx(MATRICES_RATE * usual)
    assert relative_rate(plan, FinetuneConfig(max_steps=8, rank=8), config) == pytest.approx(usual)


def test_the_commands_read_the_result(tmp_path: Path, command: Command) -> None:
    source, statistics = calibrated(tmp_path)
    how = ("--for", "anywhere", "--keep", 0.8, "--statistics", statistics, "--recovery", "none")
    plan = command("compress", source, tmp_path / "small", *how, "--dry-run", "--json")
    answer = command("compress", source, tmp_path / "small", *how, "--json")
    assert answer.status == plan.status == 0
    made = json.loads(answer.out)
    assert json.loads(plan.out)["parameters"] == made["numbers"]["parameters"]
    assert [s["name"] for s in json.loads(plan.out)["stages"]] == ["mlp pruning", "writing"]
    assert "neurons of the MLPs were taken out\n" in answer.err
    text = tmp_path / "text.txt"
    text.write_text("neurons are taken out, and nothing else. " * 64)
    limits = ("--dataset", text, "--max-length", 32)
    evaluated = json.loads(command("evaluate", tmp_path / "small", *limits, "--num-windows", 2, "--json").out)
    for name in ("parameter_ratio", "parameters"):
        assert evaluated["numbers"][name] == made["numbers"][name]
    assert command("info", tmp_path / "small").status == 0
    tuned = command("finetune", tmp_path / "small", tmp_path / "tuned", *limits, "--method", "full", "--max-steps", 1)
    assert tuned.status == 0, tuned.err
    assert command("report", tmp_path, "-o", tmp_path / "page.html").status == 0


def test_what_no_ordinary_checkpoint_can_be_is_refused(tmp_path: Path, saved: Callable[..., Path]) -> None:
    source, statistics = calibrated(tmp_path)
    out, given = tmp_path / "out", {"statistics": statistics, "recovery": None}
    for match, how in {
        "keep 0.3 cannot be reached by narrower MLPs alone": {"keep": 0.3},
        "keep 0.99 cannot be reached .* multiples of 8": {"keep": 0.99},
        "leave mlp_pruning out": {"mlp_pruning": 0.2},
        "leave preset paper out": {"preset": "paper"},
        "leave scaling whitening out": {"scaling": "whitening", "preset": "best"},
        "leave rank_reduction out": {"keep": None, "rank_reduction": 0.2},
        "no single number of its configuration": {"exclude": ("layers.0.mlp",), "statistics": None},
    }.items():
        with pytest.raises(WeLoreError, match=match):
            compress(source, out, **(ANYWHERE | given | how))
    assert not out.exists()

    opt = saved("opt", vocab_size=98)
    characters().save_pretrained(opt)
    with pytest.raises(WeLoreError, match="all MLPs must have one width, .* has none that can be resized"):
        compress(opt, tmp_path / "x", **ANYWHERE)
    with pytest.raises(WeLoreError, match="spectra do not describe"):
        welore.allocate(welore.analyze(source), CompressionConfig(**ANYWHERE))

    compress(source, out, **ANYWHERE, **given)
    plan = Plan.load(out / "plan.json")
    first, mlp = next(iter(plan.neurons.items()))
    odd = replace(plan, neurons=plan.neurons | {first: Remaining(mlp.width, mlp.indices[1:])})
    odd.save(tmp_path / "plan.json")
    with pytest.raises(WeLoreError, match="all MLPs have one width"):
        Plan.load(tmp_path / "plan.json")


def test_the_number_is_searched_by_the_shapes_that_it_makes() -> None:
    # the vocabulary and the context are as large as the MLPs are wide: they make other shapes, or none
    model = build("llama", vocab_size=128, intermediate_size=128, max_position_embeddings=128)
    source = ModelSource(model)
    shapes = {
        f"model.layers.{i}.mlp.{name}": shape
        for i in range(2)
        for name, shape in (("gate_proj", (96, 32)), ("up_proj", (96, 32)), ("down_proj", (32, 96)))
    }
    assert find_resizing(source, shapes, 128, 96).path == ("intermediate_size",)
    with pytest.raises(WeLoreError, match="no single number"):
        find_resizing(source, {"model.layers.0.mlp.up_proj": (96, 32)}, 128, 96)


def test_widths_suit_quantizers() -> None:
    assert {width: default_multiple(width) for width in (12, 128, 1536, 2048, 4096, 14336)} == {
        12: 1,
        128: 8,
        1536: 64,
        2048: 128,
        4096: 256,
        14336: 256,
    }


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_text_of_people_and_experts_give_an_ordinary_narrower_checkpoint(
    family: str, saved: Callable[..., Path], tokenizer: Any, tmp_path: Path, tokens: Tensor
) -> None:
    """Losses that are measured on a text of one's own are not needed; every expert has lost as many neurons."""
    source = saved(family, intermediate_size=128)
    tokenizer.save_pretrained(source)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{3 + 7 * i % 90}" for i in range(200)))
    how, calibration = CompressionConfig(**ANYWHERE), CalibrationConfig(str(text), num_tokens=64, max_length=16)
    welore.compress(source, tmp_path / "small", how, calibration=calibration, recovery=None)
    config = json.loads((tmp_path / "small/config.json").read_text())
    assert config["intermediate_size"] < 128
    assert "quantization_config" not in config
    assert weights(tmp_path / "small").keys() == weights(source).keys()
    model = build(family, intermediate_size=128)
    welore.compress(model, config=how, calibration=calibration, recovery=None, tokenizer=tokenizer)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}
    torch.testing.assert_close(logits(model, tokens), logits(small, tokens), rtol=1e-5, atol=1e-6)
