"""Weights in 8 bits: stored, loaded, saved, merged and refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig

import welore
from conftest import Command, build, compress, done, logits
from test_checkpoint import equal, weights_of
from welore.compression.estimate import estimate
from welore.config import CompressionConfig
from welore.errors import WeLoreError
from welore.layers.int8 import KERNEL_STEP, Int8Embedding, Int8Linear, dequantize, quantize_rows

FORMS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"storage": "factored"}),
    ("qwen2", {"storage": "pivoted"}),  # a tied head
    ("gpt2", {"storage": "factored"}),  # W^T
    ("gemma3_text", {"storage": "factored"}),  # an embedding with a forward of its own
    ("phi3", {"storage": "pivoted", "split": True}),
    ("mixtral", {"storage": "factored"}),
]
STAY = ("wpe", ".gate.", ".experts.")  # matrices in the dtype of the model: positions, routers, fused experts


@pytest.fixture
def small(saved: Callable[..., Path], tmp_path: Path) -> Path:
    """A compressed model in 8 bits."""
    compress(saved("llama"), tmp_path / "small", rank_reduction=0.4, weights="int8")
    return tmp_path / "small"


@pytest.mark.parametrize(("family", "how"), FORMS)
def test_round_trip(saved, tmp_path: Path, tokens: torch.Tensor, family: str, how: dict[str, Any]) -> None:
    """compress -> load -> save -> load gives equal bits; a model in memory and `export` give the same ones."""
    source, how = saved(family), how | {"rank_reduction": 0.4}
    record = compress(source, tmp_path / "small", **how, weights="int8")
    files = weights_of(tmp_path / "small")
    size = sum(path.stat().st_size for path in (tmp_path / "small").glob("*.safetensors"))
    assert record.numbers["bytes"] == size

    compress(source, tmp_path / "float", **how)
    welore.export(tmp_path / "float", tmp_path / "exported", "int8")
    assert equal(weights_of(tmp_path / "exported"), files)
    assert all("--weights int8" in (tmp_path / name / "README.md").read_text("utf-8") for name in ("small", "exported"))
    exported = welore.Record.load(tmp_path / "exported" / "compression.json")
    assert (exported.settings["weights"], exported.numbers["bytes"]) == ("int8", size)
    for name, tensor in weights_of(tmp_path / "float").items():
        if f"{name}_scale" not in files:
            assert torch.equal(files[name], tensor)
            assert tensor.ndim != 2 or any(part in name for part in STAY), name
            continue
        W = tensor.T if family == "gpt2" and ".c_" in name and not name[:-7].endswith((".A", ".B")) else tensor
        weight, scale = files[name], files[f"{name}_scale"]
        assert (weight.dtype, weight.shape, scale.shape) == (torch.int8, W.shape, (len(W), 1))
        assert bool(((dequantize(weight, scale) - W).abs() <= 0.5001 * scale).all())

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith("weight_scale"))
    in_memory = build(family)
    compress(in_memory, **how, weights="int8")
    assert torch.equal(logits(in_memory, tokens), logits(model, tokens))
    for name, again in (("again", model), ("from-memory", in_memory)):
        again.save_pretrained(tmp_path / name)
        assert equal(weights_of(tmp_path / name), files)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    generated = model.generate(tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape[1] == tokens.shape[1] + 4

    welore.merge(tmp_path / "small", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert all(t.is_floating_point() and "scale" not in n for n, t in weights_of(tmp_path / "dense").items())
    torch.testing.assert_close(logits(dense, tokens), logits(model, tokens), rtol=1e-3, atol=1e-3)


def test_command_says_what_the_integers_save(saved, tmp_path: Path, command: Command) -> None:
    compress(saved("llama"), tmp_path / "float", rank_reduction=0.4)
    line = done(command("export", tmp_path / "float", tmp_path / "again", "--format", "int8"))
    answer = command("export", tmp_path / "float", tmp_path / "small", "--format", "int8", "--json")
    facts, before = json.loads(answer.out), welore.info(tmp_path / "float")
    assert line.startswith(f"int8: {before.parameters:,} parameters, {facts['bytes'] / 1e6:,.1f} MB")
    assert facts["parameters"] == before.parameters
    assert facts["bytes"] == welore.info(tmp_path / "small").bytes < before.bytes
    assert f"{before.bytes / 1e6:,.1f} MB" in facts["notes"][0]


def test_sizes_tell_the_stored_bytes(small: Path, saved, monkeypatch: pytest.MonkeyPatch) -> None:
    told, files = welore.info(small), weights_of(small)
    model = AutoModelForCausalLM.from_pretrained(small)
    assert told.weights == "int8"
    assert told.format == 5
    assert told.bytes == sum(tensor.nbytes for tensor in files.values())
    assert told.bytes == sum(tensor.nbytes for tensor in model.state_dict().values())  # nothing is larger in memory
    assert told.parameters == sum(p.numel() for n, p in model.named_parameters() if not n.endswith("weight_scale"))
    assert "weights in int8" in str(told)
    rates = dict.fromkeys(("float64", "float32", "bfloat16"), 1e9)
    monkeypatch.setattr("welore.compression.estimate.measured_rates", lambda device: rates)
    predicted = estimate(saved("llama"), CompressionConfig(keep=0.8, weights="int8", scaling="none"))
    compressed = compress(saved("llama"), small.parent / "kept", keep=0.8, weights="int8", scaling="none")
    assert predicted.bytes == pytest.approx(compressed.numbers["bytes"], rel=0.25)


def test_dtype_and_shards_do_not_change_the_integers(saved, tmp_path: Path, tokens: torch.Tensor) -> None:
    source = saved("qwen2", torch.bfloat16)
    compress(source, tmp_path / "one", rank_reduction=0.3, weights="int8")
    compress(source, tmp_path / "many", rank_reduction=0.3, weights="int8", max_shard_size="6KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    assert equal(weights_of(tmp_path / "one"), weights_of(tmp_path / "many"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "many")
    assert model.dtype == torch.bfloat16
    layers = [layer for layer in model.modules() if isinstance(layer, Int8Linear)]
    assert {layer.weight.data_ptr() % KERNEL_STEP for layer in layers} == {0}  # wherever it lies in its file
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "many", dtype=torch.float32)
    assert wide.lm_head.weight is wide.model.embed_tokens.weight
    assert wide.lm_head.weight_scale is wide.model.embed_tokens.weight_scale
    assert wide.lm_head.weight_scale.dtype == torch.float32
    torch.testing.assert_close(logits(model, tokens).float(), logits(wide, tokens), rtol=0.1, atol=0.1)
    assert equal(wide.to(torch.bfloat16).state_dict(), model.state_dict())


def test_other_classes_and_places_compute_the_same(small: Path, tmp_path: Path, tokens: torch.Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(small)
    bare = AutoModel.from_pretrained(small)  # which has no head
    assert torch.equal(bare(tokens).last_hidden_state, model.model(tokens).last_hidden_state)
    bare.save_pretrained(tmp_path / "bare")
    assert equal(AutoModel.from_pretrained(tmp_path / "bare").state_dict(), bare.state_dict())
    places = {"model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    spread = AutoModelForCausalLM.from_pretrained(small, device_map=places, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(spread, tokens), logits(model, tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(7, 5), (33, 48), (1, 16), (20, 31)])
def test_a_layer_multiplies_by_the_dequantized_weight(dtype: torch.dtype, rows: int, columns: int) -> None:
    torch.manual_seed(0)
    W = torch.randn(rows, columns).to(dtype)
    W[rows // 2] = 0  # such a row has no scale of its own
    weight, scale = quantize_rows(W)
    assert scale.dtype == dtype
    layer = Int8Linear(columns, rows, dtype=dtype)
    layer.load_state_dict({"weight": weight, "weight_scale": scale})
    layer.bias = nn.Parameter(torch.randn(rows).to(dtype))
    for shape in ((1, 1, columns), (2, 3, columns), (20, columns)):
        x = torch.randn(shape).to(dtype)
        exact = nn.functional.linear(x.double(), weight.double() * scale.double(), layer.bias.double())
        assert (layer(x).double() - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()
    x.requires_grad_()
    layer(x).sum().backward()  # as under adapters
    assert x.grad is not None
    layer.weight.data = W  # as adapters do when they are merged
    with pytest.raises(WeLoreError, match="merge adapters before"):
        layer(x)


def test_an_embedding_reads_rows_and_calls_the_forward_of_its_family() -> None:
    class Positions(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * torch.tensor(2.5).to(self.weight.dtype)

    layer = Positions(9, 4, padding_idx=8)
    quantized = Int8Embedding.of(layer)
    weight, scale = quantize_rows(layer.weight.detach())
    quantized.load_state_dict({"weight": weight, "weight_scale": scale})
    ids = torch.tensor([[8, 1], [0, 8]])
    assert isinstance(quantized, Positions)
    assert torch.equal(quantized(ids), dequantize(weight, scale)[ids] * 2.5)


def _without(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


DAMAGE: dict[str, Callable[[dict[str, torch.Tensor], str], dict[str, torch.Tensor]]] = {
    "has lost the tensor": lambda t, name: _without(t, f"{name}_scale"),
    "is int8, its tensors are": lambda t, name: t | {name: t[name].float()},
    "it is damaged": lambda t, name: t | {f"{name}_scale": t[f"{name}_scale"].flatten()},
    "NaN or Inf": lambda t, name: t | {f"{name}_scale": torch.full_like(t[f"{name}_scale"], torch.nan)},
}


@pytest.mark.parametrize("message", DAMAGE)
@pytest.mark.parametrize("kind", ["factor", "embedding"])
def test_damaged_scales_are_refused(small: Path, message: str, kind: str) -> None:
    names = [name.removesuffix("_scale") for name in weights_of(small) if name.endswith("weight_scale")]
    name = next(name for name in names if (kind == "factor") == name.endswith(".A.weight") and "lm_head" not in name)
    tensors = DAMAGE[message](weights_of(small), name)
    save_file(tensors, small / "model.safetensors", {"format": "pt"})
    for read in (AutoModelForCausalLM.from_pretrained, welore.info):
        with pytest.raises(WeLoreError, match=message):
            read(small)


def test_integers_that_the_configuration_does_not_name_are_refused(small: Path) -> None:
    config = json.loads((small / "config.json").read_text())
    config["quantization_config"]["int8"].remove("lm_head")
    (small / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeLoreError, match=r"lm_head.weight has dtype torch.int8"):
        welore.info(small)


def test_what_needs_floating_point_weights_is_refused(small: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(small)
    with pytest.raises(WeLoreError, match="cannot be trained"):
        welore.mark_trainable(model, "lrc")
    with pytest.raises(WeLoreError, match="merge its directory"):
        welore.merge(model)
    with pytest.raises(WeLoreError, match="in 8 bits already"):
        welore.export(small, tmp_path / "again", "int8")
    with pytest.raises(WeLoreError, match="compressed already"):
        compress(small, tmp_path / "again", rank_reduction=0.5)
    with pytest.raises(WeLoreError, match="weights"):
        CompressionConfig(weights="int4")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
def test_adapters_are_trained_beside_integers(small: Path, tokens: torch.Tensor) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(small)
    before = logits(model, tokens)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    assert not torch.equal(logits(adapted, tokens), before)
    adapted(tokens, labels=tokens).loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)


LOADING = """
import sys, torch, welore
from transformers import AutoModelForCausalLM
def peak(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) << 10
AutoModelForCausalLM.from_pretrained(sys.argv[1])
before = peak()
model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs the peak of the resident set")
def test_loading_needs_no_more_memory_than_the_integers(small: Path, tmp_path: Path) -> None:
    """The pages of the file count in the peak beside the tensors; in float32 the tensors alone take four files."""
    shape = {"vocab_size": 60_000, "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 1}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, num_attention_heads=8, tie_word_embeddings=True))
    compress(model, tmp_path / "large", rank_reduction=0.4, include=["q_proj"], weights="int8")
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", LOADING, str(small), str(tmp_path / "large")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < 2.3 * size


def test_the_scheme_is_that_of_compressed_tensors() -> None:
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    arguments = pytest.importorskip("compressed_tensors.quantization").QuantizationArgs(num_bits=8, strategy="channel")
    torch.manual_seed(0)
    W = torch.randn(12, 20)
    weight, scale = quantize_rows(W)
    theirs = forward.quantize(W, scale, torch.zeros_like(scale), arguments, dtype=torch.int8)
    assert torch.equal(theirs, weight)
    assert torch.equal(forward.dequantize(weight, scale, args=arguments), dequantize(weight, scale))


# --- other libraries, after loading -----------------------------------------------------------------------------------

MODELS: dict[str, dict[str, Any]] = {
    "factored": {"storage": "factored"},
    "pivoted": {"storage": "pivoted"},
    "split": {"storage": "pivoted", "split": True},
}


def _torchao(model: Any) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())


def _bitsandbytes(model: Any) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and name != "lm_head":
            n, m = layer.in_features, layer.out_features
            new = bitsandbytes.nn.Linear8bitLt(n, m, bias=layer.bias is not None, has_fp16_weights=False)
            new.load_state_dict(layer.state_dict())
            model.set_submodule(name, new.to("cpu"))


@pytest.mark.filterwarnings("ignore")  # of these libraries, at import and where they change the dtype of inputs
@pytest.mark.parametrize("quantize", [_torchao, _bitsandbytes])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", MODELS)
def test_quantize_after_loading(
    tokens: torch.Tensor, form: str, dtype: torch.dtype, quantize: Callable[[Any], None]
) -> None:
    """Many tokens, one token and `generate`: all as without, up to the rounding of 8 bits."""
    model = build("llama", intermediate_size=64)
    compress(model, rank_reduction=0.4, **MODELS[form])
    model.to(dtype)
    before = logits(model, tokens)
    welore.optimize_for_decoding(model)
    quantize(model)
    assert any("8" in type(p).__name__ for p in model.parameters())
    for length in (tokens.shape[1], 1):
        now = logits(model, tokens[:, :length])
        assert (now - before[:, :length]).norm() < 0.1 * before[:, :length].norm()
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert model.generate(tokens, **settings).shape[1] == tokens.shape[1] + 4
