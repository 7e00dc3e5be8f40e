import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import welore
from conftest import build, compress, logits
from toys import checkpoint
from welore.compression import needs
from welore.compression.estimate import estimate
from welore.compression.export import export
from welore.compression.info import info
from welore.config import CalibrationConfig, CompressionConfig
from welore.errors import WeLoreError

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_a_checkpoint_says_what_it_is_and_how_it_was_made(version: int) -> None:
    directory = FIXTURES / f"format{version}"
    found = info(directory)
    plan = welore.Plan.load(directory / "plan.json")
    assert found.format == version
    assert found.target == dict(plan.target)
    assert (found.rank_reduction, found.parameter_ratio) == (plan.rank_reduction, plan.parameter_ratio)
    assert sum(summary.matrices for summary in found.ranks.values()) == len(plan.ranks)
    assert found.versions["welore"] == "0.1.0"
    text = str(found)
    for part in (f"format {version}", f"{plan.parameter_ratio:.1%}", plan.strategy, "down_proj: "):
        assert part in text
    assert json.loads(json.dumps(found.to_dict()))["format"] == version


def test_sizes_are_those_of_the_record(saved, tmp_path: Path) -> None:
    record = compress(saved("gpt2"), tmp_path / "small", rank_reduction=0.4, storage="pivoted")
    assert info(tmp_path / "small").parameters == record.numbers["parameters"]


def test_a_dense_checkpoint_has_a_size_and_no_target(saved) -> None:
    found = info(saved("llama"))
    assert found.parameters == sum(p.numel() for p in build("llama").parameters())
    assert (found.format, found.bytes, found.ranks) == (None, 4 * found.parameters, {})
    assert "llama, dense" in str(found)


def test_a_checkpoint_of_another_quantizer_is_refused(saved) -> None:
    directory = saved("llama")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(WeLoreError, match="quantized by gptq"):
        info(directory)


def test_dense_is_a_format_of_export(tmp_path: Path, tokens: torch.Tensor) -> None:
    assert export(FIXTURES / "format2", tmp_path / "dense") == tmp_path / "dense"
    welore.merge(FIXTURES / "format2", tmp_path / "merged")
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("dense", "merged"))
    assert torch.equal(logits(one, tokens), logits(other, tokens))
    with pytest.raises(WeLoreError, match="unknown format 'dens'; did you mean 'dense'"):
        export(FIXTURES / "format2", tmp_path / "other", "dens")


def test_the_estimate_of_a_size_is_that_of_the_result(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "dense", None, intermediate_size=128)
    numbers = compress(source, tmp_path / "small", keep=0.7, scaling="none", strategy="waterfill").numbers
    found = estimate(source, keep=0.7, device="cpu")
    assert found.parameters == pytest.approx(numbers["parameters"], rel=0.01)
    assert found.dense_parameters == numbers["parameters_dense"]
    assert found.bytes == pytest.approx(numbers["bytes"], rel=0.05)


def test_a_disk_with_too_little_room_is_refused_before_any_work(saved, tmp_path: Path, monkeypatch) -> None:
    model, text = checkpoint(tmp_path / "dense", None), CalibrationConfig(num_tokens=64, max_length=32)
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(WeLoreError, match=r"needs .* of room at .*small.work, and 0 MB are free: write to another"):
        welore.compress(model, tmp_path / "small", keep=0.8, calibration=text, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_an_estimate_refuses_a_text_or_a_tokenizer_that_the_compression_cannot_read(saved, tmp_path: Path) -> None:
    source, gone = checkpoint(tmp_path / "dense", None), str(tmp_path / "gone.txt")
    for settings in ({"calibration": CalibrationConfig(gone)}, {"recovery": welore.RecoveryConfig(gone)}):
        with pytest.raises(WeLoreError, match=r"gone\.txt"):
            estimate(source, keep=0.8, device="cpu", **settings)
    with pytest.raises(WeLoreError, match="has no tokenizer"):
        estimate(saved("llama"), keep=0.8, device="cpu")


def test_stages_of_an_estimate_are_those_that_the_settings_ask_for(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "dense", None)
    found = estimate(source, keep=0.8, device="cpu")
    assert [stage.name for stage in found.stages] == [
        "text",
        "statistics",
        "decompositions",
        "mlp pruning",
        "factors",
        "recovery",
        "writing",
    ]
    assert all(stage.seconds > 0 and stage.host_bytes > 0 for stage in found.stages)
    plain = estimate(build("llama"), CompressionConfig(preset="paper", rank_reduction=0.3), device="cpu")
    assert [stage.name for stage in plain.stages] == ["decompositions", "factors", "writing"]
    assert (plain.parameters, plain.bytes) == (None, None)
    text = str(found)
    for part in ("GFLOP/s float32", "recovery", "keep 0.8", "all"):
        assert part in text
    assert json.loads(json.dumps(found.to_dict()))["target"] == {"keep": 0.8}
    with pytest.raises(WeLoreError, match="cannot be reached"):
        estimate(source, keep=0.001, device="cpu")
