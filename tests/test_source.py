import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from conftest import FAMILIES, MIXTURES, build, logits
from welore.errors import WeLoreError
from welore.io.checkpoint import OutputTensors
from welore.io.context import RunContext
from welore.io.hub import resolve_model
from welore.io.progress import silent
from welore.io.safetensors_stream import TensorInfo
from welore.models.quantizer import WeLoreConfig
from welore.models.sink import open_sink
from welore.models.source import CheckpointSource, ModelSource, OverlaySource, TensorSource, open_source
from welore.models.targets import CONV1D, LINEAR, census, find_targets, kind_of


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_targets_are_the_linear_layers_of_the_decoder_blocks(family: str) -> None:
    model = build(family)
    expected = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and any(part.isdigit() for part in name.split("."))
    ]
    targets = find_targets(model)
    assert [t.name for t in targets] == expected
    for t in targets:
        weight = model.get_submodule(t.name).weight
        assert t.shape == tuple(weight.T.shape if t.kind.transposed else weight.shape)
        assert t.kind.transposed == (family == "gpt2")


def test_head_and_projections_outside_the_blocks_are_not_targeted_unless_asked() -> None:
    model = build("opt")
    outside = {"lm_head", "model.decoder.project_in", "model.decoder.project_out"}
    assert not outside & {t.name for t in find_targets(model)}
    assert [t.name for t in find_targets(model, include=["project_out"])] == ["model.decoder.project_out"]


def test_patterns_match_whole_components() -> None:
    model = build("llama")
    assert [t.name for t in find_targets(model, include=["layers.0.self_attn.*"], exclude=["k_proj", "v_*"])] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.o_proj",
    ]
    assert {t.name.split(".")[-2] for t in find_targets(model, exclude=["self_attn"])} == {"mlp"}
    with pytest.raises(WeLoreError, match="'proj' matches no linear layer"):
        find_targets(model, include=["proj"])
    with pytest.raises(WeLoreError, match="nothing to compress"):
        find_targets(model, exclude=["layers"])


def test_head_that_is_tied_to_the_embeddings_cannot_be_low_rank() -> None:
    assert [t.name for t in find_targets(build("llama"), include=["lm_head"])] == ["lm_head"]
    with pytest.raises(WeLoreError, match="lm_head shares its weight with the embeddings"):
        find_targets(build("qwen2"), include=["lm_head"])


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_counted_as_left_dense(family: str) -> None:
    model = build(family)
    found = census(model, find_targets(model))
    experts = sum(p.numel() for name, p in model.named_parameters() if "expert" in name or "mlp.gate." in name)
    assert found.blocks_other == experts > found.targeted
    assert "mlp.experts" in found.blocks_other_names
    assert found.total == sum(p.numel() for p in model.parameters())


class Named(torch.nn.Linear):
    """A subclass that adds nothing to the map."""


class Rewritten(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y = input @ self.weight.T
        return y if self.bias is None else y + self.bias


class Rounded(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.round())


class Doubled(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class NamedConv1D(Conv1D):
    pass


def test_subclasses_of_linear_layers_are_targeted_if_they_are_linear_maps() -> None:
    for bias in (True, False):
        assert kind_of(Named(5, 7, bias=bias)) is kind_of(Rewritten(5, 7, bias=bias)) is LINEAR
        assert kind_of(Rounded(5, 7, bias=bias)) is kind_of(Doubled(5, 7, bias=bias)) is None
    assert kind_of(NamedConv1D(7, 5)) is CONV1D
    assert kind_of(torch.nn.Embedding(5, 7)) is None
    before = torch.get_rng_state()
    assert kind_of(Rewritten(5, 7, device="meta")) is LINEAR
    assert torch.equal(torch.get_rng_state(), before)
    model = build("llama")
    for name, kind in (("q_proj", Named), ("k_proj", Rewritten), ("v_proj", Rounded)):
        layer = model.model.layers[0].self_attn.get_submodule(name)
        layer.__class__ = kind
    names = {t.name for t in find_targets(model)}
    assert {n for n in ("q_proj", "k_proj", "v_proj") if f"model.layers.0.self_attn.{n}" in names} == {
        "q_proj",
        "k_proj",
    }


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_checkpoint_and_model_in_memory_read_the_same(saved, family: str, shard: str) -> None:
    model = build(family)
    memory = ModelSource(model)
    disk = CheckpointSource(saved(family, shard=shard))
    assert disk.targets == memory.targets
    assert disk.identity.fingerprint == memory.identity.fingerprint
    for target in disk.targets:
        assert disk.read(target).shape == target.shape
        assert torch.equal(disk.read(target), memory.read(target))


def halved(source: TensorSource, mlp: str, down: str) -> OverlaySource:
    """The source with half the columns of a down projection."""
    (target,) = (t for t in source.targets if t.name == f"{mlp}.{down}")
    shape = (target.shape[0], target.shape[1] // 2)
    name = f"{target.name}.weight"
    W = target.kind.stored(source.read(target)[:, : shape[1]].contiguous())
    return OverlaySource(source, {target.name: shape}, {name: lambda: W})


@pytest.mark.parametrize(
    ("family", "mlp", "down"), [("llama", "model.layers.0.mlp", "down_proj"), ("gpt2", "transformer.h.0.mlp", "c_proj")]
)
def test_overlay_is_the_source_but_for_what_it_says(saved, family: str, mlp: str, down: str) -> None:
    disk = CheckpointSource(saved(family))
    for source in (disk, ModelSource(build(family))):
        overlay = halved(source, mlp, down)
        assert overlay.original is source
        assert overlay.identity == source.identity
        assert list(overlay.names()) == list(source.names())
        for before, after in zip(source.targets, overlay.targets, strict=True):
            W = source.read(before)
            expected = W[:, : W.shape[1] // 2] if before.name == f"{mlp}.{down}" else W
            assert torch.equal(overlay.read(after), expected)
            assert after.shape == overlay.read(after).shape
            assert (
                tuple(overlay.skeleton.get_parameter(f"{after.name}.weight").shape)
                == overlay.info(f"{after.name}.weight").shape
            )
            assert overlay.dtype(after) == source.dtype(before)
            assert torch.equal(
                torch.cat(list(overlay.chunks(f"{after.name}.weight"))),
                overlay.tensor(f"{after.name}.weight").flatten(),
            )


def zeroed(source: TensorSource, name: str) -> list[OutputTensors]:
    """Everything as it is, but for one matrix, which is stored as factors of zeros of rank 3."""
    (target,) = (t for t in source.targets if t.name == name)
    (m, n), dtype = target.shape, source.dtype(target)
    parts = {f"{name}.A.weight": TensorInfo(dtype, (m, 3)), f"{name}.B.weight": TensorInfo(dtype, (3, n))}
    made = {part: [torch.zeros(info.shape).flatten()] for part, info in parts.items()}
    low_rank = OutputTensors(
        parts | {f"{name}.weight": TensorInfo(dtype, (0,))}, lambda: made | {f"{name}.weight": []}, name
    )
    return [low_rank if key == f"{name}.weight" else source.copied(key) for key in source.names()]


@pytest.mark.parametrize(
    ("family", "name"), [("llama", "model.layers.0.mlp.up_proj"), ("gpt2", "transformer.h.0.mlp.c_fc")]
)
def test_directory_and_model_take_the_same_outputs(
    saved, tmp_path: Path, tokens: torch.Tensor, family: str, name: str
) -> None:
    config, model = WeLoreConfig({name: 3}), build(family)
    disk = CheckpointSource(saved(family))
    with open_sink(disk, tmp_path / "small") as sink:
        sink.write(zeroed(disk, name), config, silent)
    memory = ModelSource(model)
    with open_sink(memory, tmp_path / "saved") as sink:
        sink.write(zeroed(memory, name), config, silent)
    loaded = [AutoModelForCausalLM.from_pretrained(tmp_path / out) for out in ("small", "saved")]
    assert torch.equal(logits(loaded[0], tokens), logits(model, tokens))
    assert torch.equal(logits(loaded[1], tokens), logits(model, tokens))
    assert model.get_submodule(name).rank == 3
    dense = OutputTensors(
        {f"{name}.weight": memory.info(f"{name}.A.weight")},
        lambda: {f"{name}.weight": [torch.ones(build(family).get_submodule(name).weight.shape).flatten()]},
        name,
    )
    with open_sink(memory, None) as sink:
        sink.write([dense], None, silent)
    assert type(model.get_submodule(name)) is type(build(family).get_submodule(name))
    assert bool((model.get_submodule(name).weight == 1).all())
    assert not hasattr(model.config, "quantization_config")
    disk = CheckpointSource(saved(family))
    with pytest.raises(WeLoreError, match="name the directory"), open_sink(disk, None):
        pass


def test_fingerprint_tells_other_weights(saved) -> None:
    model = build("llama")
    before = ModelSource(model).identity.fingerprint
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    assert ModelSource(model).identity.fingerprint != before


def test_files_without_the_first_component_of_names_are_read(saved) -> None:
    """Old GPT-2 files say h.0.attn... where the model says transformer.h.0.attn..."""
    directory = saved("gpt2")
    tensors = load_file(directory / "model.safetensors")
    stripped = {name.removeprefix("transformer."): t.clone() for name, t in tensors.items()}
    save_file(stripped, directory / "model.safetensors", {"format": "pt"})
    checkpoint = CheckpointSource(directory)
    assert checkpoint.prefix == "transformer."
    assert len(checkpoint.targets) == 8


def break_weight(directory: Path, value: float) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_matrix_with_nan_or_inf_is_named(saved, value: float) -> None:
    directory = saved("llama")
    break_weight(directory, value)
    checkpoint = CheckpointSource(directory)
    with pytest.raises(WeLoreError, match="layers.1.mlp.up_proj.weight holds NaN"):
        for target in checkpoint.targets:
            checkpoint.read(target)


def test_missing_shard_is_named(saved) -> None:
    directory = saved("llama", shard="20KB")
    lost = sorted(directory.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(WeLoreError, match=f"lacks {lost.name}"):
        CheckpointSource(directory)


def test_shard_without_a_tensor_of_the_index_is_refused(saved) -> None:
    directory = saved("llama", shard="20KB")
    shard = sorted(directory.glob("*.safetensors"))[1]
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, shard)
    with pytest.raises(WeLoreError, match=name):
        CheckpointSource(directory)


def test_config_that_contradicts_the_weights_is_refused(saved) -> None:
    directory = saved("llama")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    checkpoint = CheckpointSource(directory)
    with pytest.raises(WeLoreError, match=r"has shape .* config.json says"):
        _ = checkpoint.targets


def test_pickled_weights_are_not_read(saved) -> None:
    directory = saved("llama")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(WeLoreError, match="only safetensors are read"):
        CheckpointSource(directory)


def test_quantized_model_is_refused(saved) -> None:
    directory = saved("llama")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    checkpoint = CheckpointSource(directory)
    with pytest.raises(WeLoreError, match=r"compressed already \(gptq\)"):
        _ = checkpoint.targets


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("./nowhere", "neither a model directory"),
        ("a/b/c", "neither a model directory"),
        ("none.gguf", "does not exist"),
        ("someone/some-model", "not in the local cache and the hub cannot be reached"),
        ("no such id!", "neither a local directory nor a hub id"),
    ],
)
def test_model_that_is_not_there_is_one_sentence(tmp_path: Path, model: str, sentence: str) -> None:
    with pytest.raises(WeLoreError, match=sentence):
        resolve_model(model, cache_dir=tmp_path)


def test_directory_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeLoreError, match="has no config.json"):
        CheckpointSource(tmp_path)


def test_hub_snapshot_in_the_cache_is_used_offline(saved, tmp_path: Path) -> None:
    """The layout of the hub's cache, made by hand: models--OWNER--NAME/{refs,snapshots}."""
    repository = tmp_path / "cache" / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    saved("llama").rename(repository / "snapshots" / ("0" * 40))
    weights = open_source("owner/tiny", RunContext.create(cache_dir=tmp_path / "cache"))
    assert weights.name == "owner/tiny"
    assert len(weights.targets) == 14


def test_gguf_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(WeLoreError, match=r"pip install 'welore\[gguf\]'"):
        resolve_model(tmp_path / "m.gguf", cache_dir=tmp_path)


def test_broken_gguf_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF, or so it says" * 10)
    with pytest.raises(WeLoreError, match=r"m\.gguf cannot be read"):
        resolve_model(tmp_path / "m.gguf", cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("config.json"))
