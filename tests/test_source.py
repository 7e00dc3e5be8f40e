import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune, weight_norm
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import welore
from conftest import COMMON, FAMILIES, MIXTURES, build, compress, logits
from toys import characters
from welore.errors import WeLoreError
from welore.io.checkpoint import CheckpointReader, OutputTensors
from welore.io.context import RunContext
from welore.io.hub import resolve_model
from welore.io.progress import silent
from welore.io.safetensors_stream import DTYPES, TensorInfo
from welore.models.load import load, read_tokenizer
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
def test_experts_are_targets_and_routers_are_counted_as_left_dense(family: str) -> None:
    model = build(family)
    source = ModelSource(model)
    found = census(source.skeleton, source.targets)
    routers = {
        name: p.numel() for name, p in model.named_parameters() if name.endswith(("gate.weight", "router.weight"))
    }
    assert found.blocks_other == sum(routers.values()) > 0
    assert found.blocks_other_names == tuple({".".join(name.split(".")[-3:-1]) for name in routers})
    matrices = {
        n: p.numel() for n, p in model.named_parameters() if ".layers." in n and n.endswith(("weight", "_proj"))
    }
    norms = sum(numel for name, numel in matrices.items() if "norm" in name)
    assert found.targeted == sum(matrices.values()) - norms - found.blocks_other
    assert found.total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("family", "changes", "routers"),
    [
        ("mixtral", {"num_local_experts": 8}, set()),  # its router is no linear layer; k_proj and v_proj are 8 wide
        ("afmoe", {"num_experts": 8, "head_dim": 8, "moe_intermediate_size": 8, "num_dense_layers": 0}, {"gate"}),
        ("jetmoe", {"num_local_experts": 8, "kv_channels": 8}, {"layer"}),
    ],
)
def test_routers_are_told_by_their_place_not_by_their_width(
    family: str, changes: dict[str, int], routers: set[str]
) -> None:
    config = CONFIG_MAPPING[family](**COMMON | {"num_key_value_heads": 1} | changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = {name for name, module in model.model.layers.named_modules(prefix="model.layers") if kind_of(module)}
    left = linear - {target.name for target in find_targets(model)}
    assert {name.rpartition(".")[2] for name in left} == routers
    assert all("router" in name for name in left)


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


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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


def test_the_single_file_is_read_beside_an_older_index(saved) -> None:
    directory = saved("llama", shard="20KB")
    build("llama").float().save_pretrained(directory / "other")
    new = {name: tensor + 1 for name, tensor in load_file(directory / "other" / "model.safetensors").items()}
    save_file(new, directory / "model.safetensors", {"format": "pt"})
    name = "model.layers.0.mlp.up_proj.weight"
    read = AutoModelForCausalLM.from_pretrained(directory).get_parameter(name)
    assert torch.equal(CheckpointSource(directory).tensor(name), read)
    assert torch.equal(read, new[name])


def test_weights_under_the_name_that_the_configuration_gives_are_read(saved, tmp_path: Path) -> None:
    directory = saved("llama")
    (directory / "model.safetensors").rename(directory / "other.safetensors")
    edit_config(directory, transformers_weights="other.safetensors")
    compress(directory, tmp_path / "small", rank_reduction=0.4)
    AutoModelForCausalLM.from_pretrained(tmp_path / "small")


LOST = ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.input_layernorm.weight"]


@pytest.mark.parametrize("name", LOST)
@pytest.mark.parametrize("shape", [None, (3, 3)])
def test_checkpoint_without_a_tensor_is_refused_before_any_work(
    saved, name: str, shape: tuple[int, int] | None
) -> None:
    directory = saved("llama", tie_word_embeddings=False)
    tensors = load_file(directory / "model.safetensors")
    del tensors[name]
    save_file(tensors | ({name: torch.ones(shape)} if shape else {}), directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeLoreError, match=f"lacks {name}|has {name} in another shape"):
        open_source(directory, RunContext.create())
    with pytest.raises(WeLoreError, match=f"lacks {name}|has {name} in another shape"):
        load(directory, torch.float32, "cpu")


@pytest.mark.parametrize(
    ("layers", "sentence"), [(3, r"lacks model\.layers\.2"), (1, r"holds model\.layers\.1.* 1 layers")]
)
def test_other_layers_than_the_configuration_counts_are_refused(saved, layers: int, sentence: str) -> None:
    directory = saved("llama")
    edit_config(directory, num_hidden_layers=layers)
    with pytest.raises(WeLoreError, match=sentence):
        open_source(directory, RunContext.create())


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_whole_checkpoints_of_every_family_are_read(saved, family: str, capfd: pytest.CaptureFixture[str]) -> None:
    directory = saved(family)
    capfd.readouterr()
    open_source(directory, RunContext.create())
    assert "REPORT" not in capfd.readouterr().err


def test_expert_that_is_lost_is_missed(saved) -> None:
    """It is stored under another name than the model's, and is one of many that make one tensor."""
    directory = saved("mixtral")
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.0.block_sparse_moe.experts.1.w2.weight"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeLoreError, match=r"experts\.down_proj in another shape"):
        open_source(directory, RunContext.create())


@pytest.mark.parametrize(
    "verb", [lambda d: open_source(d, RunContext.create()), lambda d: load(d, "auto", "cpu"), welore.info]
)
def test_adapter_beside_the_weights_is_refused(saved, verb: Callable[[Path], object]) -> None:
    directory = saved("llama")
    (directory / "adapter_config.json").write_text("{}")
    with pytest.raises(WeLoreError, match=r"holds a LoRA adapter .*merge_and_unload"):
        verb(directory)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "x"},
        {"num_hidden_layers": "2"},
        {"num_hidden_layers": 1 << 40},
        {"vocab_size": [1]},
        {"vocab_size": 1 << 50},
        {"head_dim": 1 << 40},
        {"max_position_embeddings": {"a": 1}},
        {"hidden_act": "nosuch"},
        {"num_attention_heads": 0},
        {"dtype": "float99"},
        {"model_type": [1]},
        {"model_type": "nosuch"},
        {"rms_norm_eps": None},
        {"rope_parameters": {"rope_type": "nosuch"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "1"}},
        {"pad_token_id": 1 << 40},
        {"quantization_config": 5},
        {"num_labels": 1 << 40},
        {"num_hidden_layers": 5000},
        {"auto_map": 5},
        {"more": json.loads("[" * 900 + "]" * 900)},
        {"transformers_weights": 5},
        {"tie_word_embeddings": {}},
        {"attention_bias": "yes"},
    ],
    ids=str,
)
def test_damaged_configuration_is_one_sentence(saved, change: dict[str, object]) -> None:
    directory = saved("llama")
    edit_config(directory, **change)
    with pytest.raises(WeLoreError) as refusal:
        open_source(directory, RunContext.create())
    assert "\n" not in str(refusal.value)
    with pytest.raises(WeLoreError):
        load(directory, "auto", "cpu")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("text", ["5", "[]", "null", "[" * 100_000, '{"a": ' + "1" * 5000 + "}", "{"])
def test_damaged_json_is_one_sentence_that_names_the_file(saved, name: str, text: str) -> None:
    directory = saved("llama", shard="20KB")
    (directory / name).write_text(text)
    with pytest.raises(WeLoreError, match=name):
        open_source(directory, RunContext.create())


@pytest.mark.parametrize(
    "change",
    [
        *({"eos_token_id": "x"}, {"eos_token_id": [[1]]}, {"pad_token_id": 0.5}, {"bos_token_id": 1 << 63}),
        *({"temperature": []}, {"top_k": "5"}, {"output_hidden_states": 0.5}, {"use_cache": "no"}),
    ],
)
def test_damaged_generation_settings_are_one_sentence(saved, change: dict[str, object]) -> None:
    directory = saved("llama")
    path = directory / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(WeLoreError, match=f"{next(iter(change))} of .*generation_config.json"):
        open_source(directory, RunContext.create())


@pytest.mark.parametrize("value", [5, None, [], "a" * 300, "config.json", "nowhere.safetensors"])
def test_damaged_index_is_one_sentence(saved, value: object) -> None:
    directory = saved("llama", shard="20KB")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = value
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeLoreError, match=r"weight_map|lacks|cannot be read"):
        open_source(directory, RunContext.create())


def test_infinity_in_a_configuration_stays(saved, tmp_path: Path) -> None:
    """Families of state space models have one: "time_step_limit": [0.0, Infinity]."""
    directory = saved("llama")
    edit_config(directory, limit=[0.0, float("inf")])
    compress(directory, tmp_path / "small", rank_reduction=0.4)
    assert json.loads((tmp_path / "small" / "config.json").read_text())["limit"] == [0.0, float("inf")]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "text", ["5", "[]", "{", "[" * 100_000, '{"tokenizer_class": 5}', '{"added_tokens_decoder": 5}']
)
def test_damaged_tokenizer_is_one_sentence(tmp_path: Path, name: str, text: str) -> None:
    characters().save_pretrained(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(WeLoreError, match=r"has no tokenizer that can be read \(.+\): copy") as refusal:
        read_tokenizer(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_matrix_of_a_dtype_that_nobody_multiplies_is_refused(saved, dtype: torch.dtype) -> None:
    directory, name = saved("llama"), "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {name: tensors[name].to(dtype)}, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeLoreError, match=f"{name} has dtype"):
        open_source(directory, RunContext.create())
    with pytest.raises(WeLoreError, match=f"{name} has dtype"):
        load(directory, "auto", "cpu")
    with pytest.raises(WeLoreError, match=f"{name} has dtype"):
        _ = CheckpointSource(directory).targets
    model = build("llama")
    model.get_submodule(name.removesuffix(".weight")).weight = nn.Parameter(
        tensors[name].to(dtype), requires_grad=False
    )
    with pytest.raises(WeLoreError, match=f"{name} has dtype"):
        _ = open_source(model, RunContext.create()).targets


def test_tensor_of_an_odd_dtype_that_no_layer_uses_is_copied(saved, tmp_path: Path) -> None:
    directory = saved("llama")
    odd = {
        f"odd.{name}": torch.arange(8, dtype=torch.uint8).view(dtype)
        for name, dtype in DTYPES.items()
        if name != "BOOL"
    }
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | odd, directory / "model.safetensors", {"format": "pt"})
    compress(directory, tmp_path / "small", rank_reduction=0.4)
    welore.merge(tmp_path / "small", tmp_path / "dense")
    reader = CheckpointReader(tmp_path / "dense")
    for name, tensor in odd.items():
        assert reader.entries[name].dtype == tensor.dtype
        assert torch.equal(reader.read(name).view(torch.uint8), tensor.view(torch.uint8))


# --- code beside a model ---------------------------------------------------------------------------------------------

CODE = """
import pathlib
pathlib.Path(__file__).with_name("ran").touch()
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def coded(saved) -> Path:
    """A model of a type of its own, whose classes lie beside it."""
    directory = saved("llama")
    (directory / "own_code.py").write_text(CODE)
    edit_config(
        directory,
        model_type="own",
        auto_map={"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.Own"},
    )
    return directory


def test_code_of_a_model_is_not_run_and_nobody_is_asked(coded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked"))
    for verb in (lambda: open_source(coded, RunContext.create()), lambda: load(coded, "auto", "cpu")):
        with pytest.raises(WeLoreError, match="Python code, which is not run.*--trust-remote-code"):
            verb()


def test_code_of_a_model_is_run_where_it_is_trusted_and_copied_to_the_result(
    coded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: torch.Tensor
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (coded / "additional_chat_templates").mkdir()
    (coded / "additional_chat_templates" / "tool.jinja").write_text("{}")
    compress(coded, tmp_path / "small", threshold=0.0, trust_remote_code=True)
    welore.merge(tmp_path / "small", tmp_path / "dense", trust_remote_code=True)
    expected = logits(AutoModelForCausalLM.from_pretrained(coded, trust_remote_code=True), tokens)
    for result in ("small", "dense"):
        assert (tmp_path / result / "additional_chat_templates" / "tool.jinja").is_file()
        again = AutoModelForCausalLM.from_pretrained(tmp_path / result, trust_remote_code=True)
        assert torch.allclose(logits(again, tokens), expected, atol=1e-5)


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
        ("a" * 300, "neither a local directory nor a hub id"),
        ("a" * 300 + ".gguf", "does not exist"),
        ("~nobody/model", "neither a model directory"),
        ("a\0b", "neither a local directory nor a hub id"),
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


def test_from_the_hub_come_the_files_that_are_read(saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of any name, code and templates; no weights that from_pretrained does not read."""
    directory, shard = saved("llama", shard="20KB"), "model-00001-of-"
    for path in list(directory.glob("*.safetensors")):
        path.rename(directory / path.name.replace(shard, "first-of-"))
    index = directory / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shard, "first-of-"))
    (directory / "additional_chat_templates").mkdir()
    more = ("own_code.py", "qwen.tiktoken", "additional_chat_templates/tool.jinja", "consolidated.safetensors", "x.bin")
    for name in more:
        (directory / name).write_text("")

    def fetch(name: str, *, allow_patterns: list[str], **_: object) -> str:
        paths = [path.relative_to(directory) for path in directory.rglob("*") if path.is_file()]
        for path in filter_repo_objects(map(str, paths), allow_patterns=allow_patterns):
            (tmp_path / "hub" / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(directory / path, tmp_path / "hub" / path)
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    CheckpointReader(resolve_model("owner/tiny"))
    assert [(tmp_path / "hub" / name).exists() for name in more] == [True, True, True, False, False]


@pytest.fixture
def write_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a small model as a .gguf file; lost: a tensor that is left out."""
    pytest.importorskip("gguf")
    monkeypatch.syspath_prepend(Path(__file__).parent / "campaigns")
    from materials import _gguf

    def write(lost: str | None = None) -> Path:
        model = build("llama")
        state = {name: tensor for name, tensor in model.state_dict().items() if name != lost}
        _gguf(tmp_path / "m.gguf", SimpleNamespace(config=model.config, state_dict=lambda: state))
        return tmp_path / "m.gguf"

    return write


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_gguf_that_lost_a_tensor_is_refused(write_gguf: Callable[..., Path], tmp_path: Path, name: str) -> None:
    with pytest.raises(WeLoreError, match=rf"m\.gguf lacks {name}"):
        resolve_model(write_gguf(name), cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("config.json"))


@pytest.mark.parametrize("share", [0.01, 0.3, 0.999])
def test_gguf_that_is_cut_off_is_one_sentence(write_gguf: Callable[..., Path], tmp_path: Path, share: float) -> None:
    path = write_gguf()
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(WeLoreError, match=r"m\.gguf cannot be read"):
        resolve_model(path, cache_dir=tmp_path / "cache")


def test_broken_gguf_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF, or so it says" * 10)
    with pytest.raises(WeLoreError, match=r"m\.gguf cannot be read"):
        resolve_model(tmp_path / "m.gguf", cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("config.json"))


def test_parts_of_layers_that_the_configuration_does_not_know_are_refused(saved: Callable[..., Path]) -> None:
    directory = saved("llama")
    tensors = load_file(directory / "model.safetensors")
    layer = "model.layers.0.self_attn.q_proj"
    for more in (f"{layer}.bias", f"{layer}.lora_A.weight", f"{layer}.lora_B.default.weight"):
        save_file(tensors | {more: torch.ones(4, 4)}, directory / "model.safetensors", {"format": "pt"})
        with pytest.raises(WeLoreError, match=rf"holds {more}, a part that no layer of config.json has"):
            CheckpointSource(directory).require_complete()
    leftovers = {f"{layer}.bias": torch.zeros(32), f"{layer}.k_scale": torch.ones(1), "other.bias": torch.ones(4)}
    leftovers |= {
        f"model.layers.0.self_attn.{name}": torch.ones(4) for name in ("rotary_emb.inv_freq", "q_norm.weight")
    }
    save_file(tensors | leftovers, directory / "model.safetensors", {"format": "pt"})
    compress(directory, directory.parent / "small", rank_reduction=0.4)  # nothing of these changes what is computed
    welore.merge(directory.parent / "small", directory.parent / "dense")
    merged = load_file(directory.parent / "dense" / "model.safetensors")
    assert merged.keys() == tensors.keys() | leftovers.keys()


@pytest.mark.parametrize("wrap", [weight_norm, partial(prune.random_unstructured, name="weight", amount=0.5)])
@pytest.mark.filterwarnings("ignore")  # weight_norm is old
def test_weights_that_are_computed_from_others_are_refused(wrap: Callable[..., Any]) -> None:
    model = build("llama")
    wrap(model.model.layers[0].mlp.up_proj)
    with pytest.raises(WeLoreError, match="LlamaForCausalLM is wrapped, or has adapters or parametrizations"):
        ModelSource(model)
