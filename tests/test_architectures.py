"""Odd architectures: shared weights, layers whose weight is read without a call; and a smoke of the campaign."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import welore
from campaigns.architectures import SMOKE, WRAPPERS, check, loaded, truncated
from campaigns.architectures import build as build_architecture
from conftest import build, logits
from welore.config import CalibrationConfig, CompressionConfig, EvaluationConfig
from welore.models.replace import submodule_names
from welore.models.skeleton import decoder_blocks
from welore.models.source import CheckpointSource
from welore.models.targets import find_targets


@pytest.mark.parametrize("name", SMOKE)
def test_architecture_equals_an_independent_svd(name: str, tmp_path: Path) -> None:
    check(name, 0, tmp_path)


@pytest.mark.parametrize("name", ["Falcon", "Zamba2", "Gemma3-4B", "Qwen2.5-VL", "Mistral3", "Llama4-Scout"])
def test_odd_layers_and_text_parts_go_through_the_default_job(name: str, tokenizer: Any, tmp_path: Path) -> None:
    """Statistics, pruning, compress, load, merge, evaluate; the merged model is as good as the compressed one."""
    build_architecture(name).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    draws = torch.randint(3, 90, (200,), generator=torch.Generator().manual_seed(0))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{number}" for number in draws.tolist()))
    calibration = CalibrationConfig(dataset=str(text), num_tokens=64, max_length=16)
    result = welore.compress(tmp_path / "dense", tmp_path / "small", keep=0.8, calibration=calibration, recovery=None)
    assert result.parameter_ratio == pytest.approx(0.8, abs=0.02)  # ranks in sixteens, of small matrices
    assert result.record.settings["scaling"] == "kfac"
    welore.merge(tmp_path / "small", tmp_path / "merged")
    how = EvaluationConfig(dataset=str(text), max_length=16)
    dense, small, merged = (welore.evaluate(tmp_path / name, how).numbers for name in ("dense", "small", "merged"))
    assert small["parameter_ratio"] == pytest.approx(result.parameter_ratio)
    assert dense["parameter_ratio"] == merged["parameter_ratio"] == 1
    assert small["nll"] == pytest.approx(merged["nll"], abs=1e-4)
    assert 0 < abs(small["nll"] - dense["nll"]) < 0.1


def share_weights(model: Any) -> None:
    for first, second in zip(*(layer.mlp.children() for layer in model.model.layers), strict=True):
        if isinstance(first, torch.nn.Linear):
            second.weight = first.weight


def share_a_layer(model: Any) -> None:
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj


def share_a_block(model: Any) -> None:
    model.model.layers[1] = model.model.layers[0]


@pytest.mark.parametrize("share", [share_weights, share_a_layer, share_a_block])
def test_layers_that_share_a_weight_are_compressed_once(share: Callable[[Any], None], tokens: torch.Tensor) -> None:
    model, reference = build("llama"), build("llama")
    share(model)
    share(reference)
    count = sum(p.numel() for p in model.parameters())
    config = CompressionConfig(rank_reduction=0.5, scaling="none", storage="pivoted", min_ratio=0)
    plan = welore.compress(model, config=config).plan
    names = [a.name for a in plan.allocations]
    assert "model.layers.0.mlp.up_proj" in names
    assert "model.layers.1.mlp.up_proj" not in names
    matrices = [{"name": a.name, "kept": a.rank, "factored": a.factored} for a in plan.allocations]
    truncated(reference, {"matrices": matrices, "threshold": plan.threshold})
    torch.testing.assert_close(logits(model, tokens), logits(reference, tokens), rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in model.parameters()) == count - sum(
        a.dense_parameters - a.stored_parameters for a in plan.allocations
    )
    assert {f"{a.name}.order" for a in plan.lrcs} <= set(model.state_dict())
    welore.merge(model)
    torch.testing.assert_close(logits(model, tokens), logits(reference, tokens), rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in model.parameters()) == count


def test_layers_that_share_a_weight_but_not_a_bias_stay_dense() -> None:
    model = build("qwen2")
    first, second = (layer.self_attn.q_proj for layer in model.model.layers)
    second.weight = first.weight
    assert not any("q_proj" in target.name for target in find_targets(model))


@pytest.mark.parametrize("family", ["mamba", "jamba"])
def test_layers_whose_weight_is_read_without_a_call_stay_dense(family: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](hidden_size=16, num_hidden_layers=2))
    names = {target.name.rpartition(".")[2] for target in find_targets(model)}
    assert {"in_proj", "x_proj", "out_proj"} <= names
    assert "dt_proj" not in names


def test_blocks_are_those_of_the_text_also_where_as_many_see_images() -> None:
    family, kind, changes = WRAPPERS["Qwen2.5-VL"]
    with torch.device("meta"):
        model = getattr(transformers, kind)(CONFIG_MAPPING[family](**changes))
    assert len(model.model.visual.blocks) == len(model.model.language_model.layers)
    assert decoder_blocks(model)[0] == "model.language_model.layers"


def test_names_are_those_of_the_files_and_of_each_class(tmp_path: Path) -> None:
    build_architecture("Llama4-Scout").save_pretrained(tmp_path / "dense")
    source = CheckpointSource(tmp_path / "dense")
    name, key = "model.layers.0.self_attn.q_proj", "language_model.model.layers.0.self_attn.q_proj"
    assert name in {target.name for target in source.targets}
    assert source.stored_name(f"{name}.weight") == f"{key}.weight"
    assert source.stored_name(f"{name}.0.A.weight") == f"{key}.0.A.weight"
    images = [n for n in source.names() if "vision" in n]
    assert images
    assert all(source.stored_name(n) == n for n in images)
    with torch.device("meta"):
        both = getattr(transformers, WRAPPERS["Llama4-Scout"][1])(source.config)
    for model, expected in ((source.skeleton, name), (both, key)):
        rename = submodule_names(model)
        assert rename(key) == expected
        assert rename(f"{key}.0") == f"{expected}.0"


@pytest.mark.parametrize("equal", [True, False])
def test_shared_layers_that_are_stored_twice(equal: bool, tmp_path: Path) -> None:
    """transformers ties them only where both are equal: then one of them is compressed and stored."""
    model = build_architecture("Zamba2")
    first, second = (model.model.layers[i].shared_transformer.self_attn for i in (1, 4))
    model.save_pretrained(tmp_path / "dense")
    tensors = load_file(tmp_path / "dense/model.safetensors")
    name = "model.layers.4.shared_transformer.self_attn.o_proj.weight"
    assert name not in tensors
    assert second.o_proj.weight is first.o_proj.weight
    tensors[name] = first.o_proj.weight.detach().clone() * (1 if equal else 2)
    save_file(tensors, tmp_path / "dense/model.safetensors", {"format": "pt"})
    config = CompressionConfig(rank_reduction=0.3, scaling="none", min_ratio=0)
    plan = welore.compress(tmp_path / "dense", tmp_path / "small", config).plan
    assert ("model.layers.1.shared_transformer.self_attn.o_proj" in {a.name for a in plan.allocations}) == equal
    assert (name in load_file(tmp_path / "small/model.safetensors")) == (not equal)
    loaded(tmp_path / "small")
