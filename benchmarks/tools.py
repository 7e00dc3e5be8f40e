"""Which tools run which compressed checkpoints? Every tool on a tiny model in every form: docs/benchmarks/tools.json.

A row is a tool, a column a form. A cell really runs the tool, and compares with what transformers computes from the
dense checkpoint that `welore merge` makes of the same model. Rows that run here replace those of the record and the
others stay, so that a tool can have its own environment:

    python benchmarks/tools.py                     # every row whose package is installed
    python benchmarks/tools.py --rows vLLM --forms factored pivoted --traceback
    python benchmarks/tools.py --rows vLLM --forms "SmolLM2" --result DIRECTORY   # what `welore compress` made of it
    python benchmarks/tables.py                    # then the tables of the pages
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import welore
from welore.config import CalibrationConfig, CompressionConfig
from welore.errors import first_line
from welore.records import Record

HERE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
OK, NOT_RUN = "ok", "not run"
PROMPTS, NEW_TOKENS = ("the quick brown fox", "one and one is", "a small model of"), 16
REAL = "SmolLM2"  # the form of a result that is given
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32}


TRAINING: dict[str, Any] = {"use_cpu": True, "report_to": [], "logging_steps": 1, "disable_tqdm": True}


TRUSTED = """
import sys
from transformers import AutoModelForCausalLM, pipeline
assert "welore" not in sys.modules
AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
write = pipeline("text-generation", model=sys.argv[1], trust_remote_code=True, dtype="float32", device="cpu")
count = int(sys.argv[3])
answer = write(sys.argv[2], max_new_tokens=count, min_new_tokens=count, do_sample=False)
print(repr(answer[0]["generated_text"]))
"""
LM_EVAL = """
import sys
from lm_eval.__main__ import cli_evaluate
assert "welore" not in sys.modules
cli_evaluate()
"""
TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {work}/sums.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{c}}}}"
doc_to_target: "{{{{a}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


class UnsupportedError(Exception):
    """The tool does not run this form: a short reason, for the table."""


@dataclass(frozen=True)
class Case:
    """A checkpoint in one form, and what must come out of it."""

    form: str
    directory: Path

    @cached_property
    def tokenizer(self) -> Any:
        """Of the checkpoint."""
        return PreTrainedTokenizerFast.from_pretrained(self.directory)

    @cached_property
    def prompts(self) -> list[torch.Tensor]:
        """The prompts: (1, tokens) each."""
        return [self.tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]

    @property
    def ids(self) -> torch.Tensor:
        """The first prompt: (1, tokens)."""
        return self.prompts[0]

    @cached_property
    def dense(self) -> Any:
        """The reference: the model as transformers loads it when `merge` has made it dense; float32, on the CPU."""
        directory = self.directory
        if "quantization_config" in (directory / "config.json").read_text("utf-8"):
            directory = self.directory.with_name(f"{self.form}-dense")
            if not directory.is_dir():
                welore.merge(self.directory, directory, progress=False)
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    @cached_property
    def logits(self) -> torch.Tensor:
        """Of the reference for the first prompt: (1, tokens, vocabulary)."""
        with torch.no_grad():
            logits: torch.Tensor = self.dense(self.ids).logits
        return logits

    @cached_property
    def tokens(self) -> list[list[int]]:
        """The first greedy tokens of the reference after every prompt."""
        return self.generated(self.dense)

    def model(self, **options: Any) -> Any:
        """The checkpoint as transformers loads it."""
        return AutoModelForCausalLM.from_pretrained(self.directory, **options)

    def generated(self, model: Any, **options: Any) -> list[list[int]]:
        """The first greedy tokens of a model after every prompt."""
        how = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False} | options
        return [model.generate(ids, **how)[0, ids.shape[1] :].tolist() for ids in self.prompts]

    def check(self, model: Any, tolerance: float = 1e-3) -> None:
        """Raise AssertionError unless a model computes the logits of the reference."""
        with torch.no_grad():
            torch.testing.assert_close(model(self.ids).logits.float(), self.logits, rtol=tolerance, atol=tolerance)


# --- forms: name -> function (dense directory, directory to write) ---------------------------------------------------


def compressed(**settings: Any) -> Callable[[Path, Path], object]:
    """The function that compresses with these settings; statistics only where neurons are chosen by them."""

    def make(source: Path, out: Path) -> object:
        options: dict[str, Any] = {"keep": 0.7, "optimize_for": "size"} | settings
        if settings.keys().isdisjoint({"mlp_pruning", "optimize_for"}):
            options["scaling"] = "none"
        config = CompressionConfig(**options)
        calibration = CalibrationConfig(num_tokens=2048, max_length=128)
        return welore.compress(source, out, config, calibration=calibration, recovery=None, progress=False)

    return make


FORMS: dict[str, Callable[[Path, Path], object]] = {
    "factored": compressed(storage="factored", split=False),
    "pivoted": compressed(storage="pivoted", split=False),
    "split": compressed(storage="pivoted", split=True),
    "narrower MLPs": compressed(storage="auto", mlp_pruning=0.25),
    "int8": compressed(storage="auto", weights="int8"),
    "anywhere": compressed(optimize_for="anywhere"),
}


def dense_model(directory: Path) -> Path:
    """A small random llama whose matrices have decaying spectra, and a tokenizer of bytes."""
    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "</s>": 1} | {letter: i for i, letter in enumerate(alphabet, start=2)}
    letters = Tokenizer(models.BPE(vocabulary, []))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special: Any = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    counts: Any = {"vocab_size": 320, "num_hidden_layers": 2, "num_key_value_heads": 2, "max_position_embeddings": 512}
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **counts, **special))
    with torch.no_grad():
        for matrix in (p for p in model.parameters() if p.ndim == 2):
            U, S, V = torch.linalg.svd(matrix, full_matrices=False)
            matrix.copy_(U * (4 * S[0] * torch.exp(-torch.arange(len(S)) / 24)) @ V)
    model.save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="</s>").save_pretrained(directory)
    return directory


# --- tools: a function raises UnsupportedError, or any error, unless the tool does what it should ---------------------


def python(code: str, *arguments: object) -> str:
    """Output of a script in a new process, which has imported nothing; RuntimeError with its last line if it fails."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=dict(os.environ))
    if run.returncode:
        raise RuntimeError((run.stderr.strip().splitlines() or ["no output"])[-1])
    return run.stdout


def require_floats(case: Case) -> None:
    """Raise UnsupportedError for a form whose weights are integers, which cannot be trained or quantized again."""
    if case.form == "int8":
        raise UnsupportedError("integers")


def from_pretrained(case: Case) -> None:
    """`import welore`, from_pretrained, logits, generate."""
    model = case.model(dtype=torch.float32)
    case.check(model)
    assert case.generated(model) == case.tokens


def trusted(case: Case) -> None:
    """A process that never imported welore: AutoConfig, AutoModelForCausalLM and pipeline with trust_remote_code."""
    answer = python(TRUSTED, case.directory, PROMPTS[0], NEW_TOKENS)
    expected = case.tokenizer.decode(case.ids[0].tolist() + case.tokens[0], skip_special_tokens=True)
    assert answer.strip().splitlines()[-1] == repr(expected), answer


def save_and_reload(case: Case) -> None:
    """save_pretrained in shards, from_pretrained, logits."""
    with tempfile.TemporaryDirectory() as out:
        case.model(dtype=torch.float32).save_pretrained(out, max_shard_size="400KB")
        case.check(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32))


def lora(case: Case, **options: Any) -> None:
    """Adapters by the usual names: a step, saved, loaded, merged."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model = case.model(dtype=torch.float32)
    names = welore.lora_targets(model, ["q_proj", "up_proj"])
    adapted = get_peft_model(model, LoraConfig(target_modules=names, task_type="CAUSAL_LM", **options))
    case.check(adapted)
    step(adapted, case)
    with torch.no_grad(), tempfile.TemporaryDirectory() as out:
        expected = adapted.eval()(case.ids).logits
        adapted.save_pretrained(out)
        again: Any = PeftModel.from_pretrained(case.model(dtype=torch.float32), out)
        torch.testing.assert_close(again(case.ids).logits, expected, rtol=1e-4, atol=1e-4)
        if case.form == "int8":
            raise UnsupportedError("not merged into integers")
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(case.ids).logits, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(expected, case.logits, atol=1e-3)


def dora(case: Case) -> None:
    """The same with DoRA."""
    lora(case, use_dora=True)


def step(model: Any, case: Case) -> None:
    """Three steps of training on the prompt, after which its loss is lower."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-4), []
    for _ in range(3):
        loss = model(case.ids, labels=case.ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0], losses


def trainer(case: Case) -> None:
    """transformers' Trainer: its checkpoint has the logits of the trained model."""
    from transformers import Trainer, TrainingArguments

    require_floats(case)
    model = case.model(dtype=torch.float32)
    data = [{"input_ids": case.ids[0], "labels": case.ids[0]}] * 4
    with tempfile.TemporaryDirectory() as out:
        Trainer(model, TrainingArguments(out, max_steps=2, save_steps=2, **TRAINING), train_dataset=data).train()
        again = AutoModelForCausalLM.from_pretrained(Path(out) / "checkpoint-2", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again(case.ids).logits, model.eval()(case.ids).logits)


def trl_sft(case: Case) -> None:
    """TRL's SFTTrainer, by the directory's name."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    require_floats(case)
    data = Dataset.from_dict({"prompt": ["one and"] * 4, "completion": [" one is two"] * 4})
    with tempfile.TemporaryDirectory() as out:
        arguments = SFTConfig(out, max_steps=2, bf16=False, gradient_checkpointing=False, **TRAINING)
        trained: Any = SFTTrainer(str(case.directory), arguments, train_dataset=data)
        assert trained.train().training_loss > 0


def trl_dpo(case: Case) -> None:
    """TRL's DPOTrainer."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    require_floats(case)
    texts = {"prompt": ["one and"] * 4, "chosen": [" one is two"] * 4, "rejected": [" one is no"] * 4}
    with tempfile.TemporaryDirectory() as out:
        arguments = DPOConfig(out, max_steps=2, bf16=False, gradient_checkpointing=False, **TRAINING)
        model = case.model(dtype=torch.float32)
        trained: Any = DPOTrainer(
            model, args=arguments, train_dataset=Dataset.from_dict(texts), processing_class=case.tokenizer
        )
        assert trained.train().training_loss > 0


def compiled(case: Case) -> None:
    """torch.compile without a break: forward, a training step, generate with a static cache."""
    torch.compiler.reset()
    model = case.model(dtype=torch.float32)
    case.check(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert case.generated(model, cache_implementation="static") == case.tokens
    step(torch.compile(model, fullgraph=True, backend="aot_eager"), case)


def exported(case: Case) -> None:
    """torch.export before and after generate."""
    model = case.model(dtype=torch.float32)
    for _ in range(2):
        program = torch.export.export(model, (case.ids,), {"use_cache": False}, strict=False)
        case.check(partial(program.module(), use_cache=False))
        assert case.generated(model) == case.tokens


def lm_eval(case: Case) -> None:
    """The stock command of lm-eval in a process of its own."""
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "sums.jsonl").write_text('{"q": "1 + 1 =", "c": ["1", "2"], "a": 1}\n' * 4)
        (Path(work) / "sums.yaml").write_text(TASK.format(work=work))
        arguments = f"pretrained={case.directory},trust_remote_code=True,dtype=float32"
        options = ["--model", "hf", "--model_args", arguments, "--tasks", "sums", "--include_path", work]
        assert "|acc" in python(LM_EVAL, *options, "--device", "cpu", "--batch_size", "2")


def serve(case: Case) -> None:
    """`transformers serve` in a process of its own, asked over HTTP: greedy text."""
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(case.directory)]
    options = ["--trust-remote-code", "--device", "cpu", "--dtype", "float32", "--port", port]
    address = f"http://localhost:{port}/v1/completions"
    answers: list[dict[str, Any]] = []
    wanted = {"model": str(case.directory), "max_tokens": NEW_TOKENS, "temperature": 0}
    with subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            while len(answers) < len(PROMPTS):
                body = json.dumps(wanted | {"prompt": PROMPTS[len(answers)]}).encode()
                try:
                    answers.append(json.load(urlopen(Request(address, body, {"Content-Type": "application/json"}))))
                except HTTPError:
                    raise
                except URLError:  # it has not begun
                    if server.poll() is not None:
                        raise RuntimeError(f"the server ended with status {server.returncode}") from None
                    time.sleep(1)
        finally:
            server.terminate()
    texts = [answer["choices"][0]["text"] for answer in answers]
    assert texts == [case.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in case.tokens], texts


def llama_cpp(case: Case) -> None:
    """`welore export --format gguf`, loaded by llama.cpp: greedy tokens."""
    import xllamacpp

    with tempfile.TemporaryDirectory() as work:
        directory, file = case.directory, Path(work) / "model.gguf"
        if case.form != REAL:
            directory = shutil.copytree(case.directory, Path(work) / case.form)
            known_tokenizer(case.dense.config.vocab_size).save_pretrained(directory)
        welore.export(directory, file, "gguf", "f32", progress=False)
        settings = xllamacpp.CommonParams()
        settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = str(file), 64, 1, False
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        server, how = xllamacpp.Server(settings), {"n_predict": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
        prompts = [how | {"prompt": ids[0].tolist(), "logprobs": 1} for ids in case.prompts]
        answers = [server.handle_completions(prompt)["choices"][0]["logprobs"]["content"] for prompt in prompts]
    assert [[token["id"] for token in answer] for answer in answers] == case.tokens


def known_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of letters, of a kind that llama.cpp's converter knows."""
    pieces = ["<unk>", "<s>", "</s>", "▁", *(chr(97 + i) for i in range(size - 4))]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def onnx_runtime(case: Case) -> None:
    """`export --format onnx` in ONNX Runtime, with its cache: logits of a prompt in two pieces, greedy tokens."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as work:
        welore.export(case.directory, Path(work) / "onnx", "onnx", "f32", progress=False)
        session = onnxruntime.InferenceSession(Path(work) / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    names, config = [value.name for value in session.get_inputs() if "past" in value.name], case.dense.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    empty = torch.zeros(1, config.num_key_value_heads, 0, width).numpy()
    for number, (ids, tokens) in enumerate(zip(case.prompts, case.tokens, strict=True)):
        past, outputs, start, half = dict.fromkeys(names, empty), [], 0, ids.shape[1] // 2
        pieces = [ids[:, :half], ids[:, half:], *(torch.tensor([[token]]) for token in tokens[:-1])]
        for piece in pieces:
            places = torch.arange(start, start + piece.shape[1])[None]
            logits, *cache = session.run(None, {"input_ids": piece.numpy(), "position_ids": places.numpy()} | past)
            past, start = dict(zip(past, cache, strict=True)), start + piece.shape[1]
            outputs.append(torch.from_numpy(logits))
        assert [int(logits[0, -1].argmax()) for logits in outputs[1:]] == tokens
        if number == 0:
            torch.testing.assert_close(torch.cat(outputs[:2], 1), case.logits, rtol=1e-3, atol=1e-3)


def int8(case: Case) -> None:
    """`export --format int8`, loaded: the logits of its own merged model, which are close to the reference."""
    require_floats(case)
    if "quantization_config" not in (case.directory / "config.json").read_text("utf-8"):
        raise UnsupportedError("an ordinary checkpoint")
    directory = case.directory.with_name(f"{case.form}-int8")
    if not directory.is_dir():
        welore.export(case.directory, directory, "int8", progress=False)
    small = Case(directory.name, directory)
    model = small.model(dtype=torch.float32)
    small.check(model)
    close(case, model)


def torchao(case: Case) -> None:
    """torchao's int8 weights, put in place after loading."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    require_floats(case)
    model = case.model(dtype=torch.float32)
    quantize_(model, Int8WeightOnlyConfig())
    close(case, model)


def bitsandbytes(case: Case) -> None:
    """LLM.int8 layers of bitsandbytes, put in place after loading; the head stays."""
    from bitsandbytes.nn import Linear8bitLt

    require_floats(case)
    model = case.model(dtype=torch.float32)
    for name, layer in list(model.named_modules()):
        if type(layer) is torch.nn.Linear and name != "lm_head":
            bias = layer.bias is not None
            new = Linear8bitLt(layer.in_features, layer.out_features, bias=bias, has_fp16_weights=False)
            new.load_state_dict(layer.state_dict())
            model.set_submodule(name, new.to("cpu"))
    close(case, model)


def close(case: Case, model: Any) -> None:
    """Raise AssertionError unless prompt, one token and generation are the reference's up to the rounding of 8 bits."""
    tolerance = 0.15 if case.form == REAL else 0.1  # the logits of a real model move by 0.11 to 0.12
    with torch.no_grad():
        for length in (case.ids.shape[1], 1):
            expected = case.logits[:, :length]
            error = (model(case.ids[:, :length]).logits.float() - expected).norm() / expected.norm()
            assert error < tolerance, f"the logits of {length} tokens are {float(error):.2f} away"
    assert all(len(tokens) == NEW_TOKENS for tokens in case.generated(model))


VLLM = """
import json, sys
from vllm import LLM, SamplingParams

limits = {"max_model_len": 128, "max_num_seqs": 4, "kv_cache_memory_bytes": 1 << 26}
engine = LLM(sys.argv[1], dtype="float32", enforce_eager=True, **limits)
greedy = SamplingParams(temperature=0, max_tokens=int(sys.argv[3]), ignore_eos=True)
outputs = engine.generate([{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])], greedy)
print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


def vllm(case: Case) -> None:
    """vLLM's offline engine, with the plug-in that the package brings; greedy tokens."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    output = python(VLLM, case.directory, json.dumps([ids[0].tolist() for ids in case.prompts]), NEW_TOKENS)
    assert json.loads(output.splitlines()[-1]) == case.tokens


@dataclass(frozen=True)
class Tool:
    """A row. package: the distribution whose version is shown; without it the row is not run."""

    package: str
    run: Callable[[Case], None]


TOOLS: dict[str, Tool] = {
    "transformers, `import welore`": Tool("transformers", from_pretrained),
    "transformers and `pipeline`, `trust_remote_code=True`": Tool("transformers", trusted),
    "`save_pretrained` and reload": Tool("transformers", save_and_reload),
    "lm-eval, `--model hf`, `trust_remote_code=True`": Tool("lm_eval", lm_eval),
    "`transformers serve`": Tool("transformers" if find_spec("uvicorn") else "uvicorn", serve),
    "`Trainer`": Tool("transformers", trainer),
    "TRL `SFTTrainer`": Tool("trl", trl_sft),
    "TRL `DPOTrainer`": Tool("trl", trl_dpo),
    "peft LoRA, `welore.lora_targets`": Tool("peft", lora),
    "peft DoRA, `welore.lora_targets`": Tool("peft", dora),
    "`torch.compile`": Tool("torch", compiled),
    "`torch.export`, before and after `generate`": Tool("torch", exported),
    "ONNX, `export --format onnx`": Tool("onnxruntime", onnx_runtime),
    "llama.cpp, `export --format gguf`": Tool("xllamacpp", llama_cpp),
    "`export --format int8`": Tool("transformers", int8),
    "torchao int8, after loading": Tool("torchao", torchao),
    "bitsandbytes int8, after loading": Tool("bitsandbytes", bitsandbytes),
    "vLLM": Tool(metadata.packages_distributions().get("vllm", ["vllm"])[0], vllm),
}


def version(package: str) -> str | None:
    """Of an installed package; None without it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cell(tool: Tool, case: Case, *, show: bool) -> str:
    """What a tool does with a checkpoint: OK, or a short reason."""
    try:
        tool.run(case)
    except (UnsupportedError, welore.WeLoreError) as reason:
        return f"no: {first_line(reason)[:100]}"
    except Exception as error:
        if show:
            traceback.print_exc()
        return f"fails: {type(error).__name__}: {first_line(error)[:100]}"
    return OK


def measured(rows: Sequence[str], forms: Sequence[str], work: Path, *, show: bool) -> dict[str, Any]:
    """Row -> package, its version, those of Python, torch and transformers, and a cell for each form.

    work: of the models, made where they are not there.
    """
    results: dict[str, Any] = {}
    source = work / "dense"
    if not source.is_dir():
        dense_model(source)
    for row in rows:
        tool = TOOLS[row]
        if version(tool.package) is None:
            print(f"{row}: {NOT_RUN}, {tool.package} is absent")
            continue
        cells = {}
        for form in forms:
            if not (work / form).is_dir():
                FORMS[form](source, work / form)
            cells[form] = cell(tool, Case(form, work / form), show=show)
            print(f"{row}, {form}: {cells[form]}", flush=True)
        versions = {name: version(name) for name in ("torch", "transformers")}
        environment = {"python": sys.version.split()[0], "device": "cuda" if torch.cuda.is_available() else "cpu"}
        results[row] = {"package": tool.package, "version": version(tool.package), "cells": cells}
        results[row]["environment"] = environment | versions
    return results


def merged(path: Path, results: dict[str, Any]) -> Record:
    """The record with these rows in place of its own; a form that was not run stays as it is, if the versions do."""
    rows: dict[str, Any] = Record.load(path).numbers["rows"] if path.is_file() else {}
    for name, row in results.items():
        old = rows.get(name, {})
        same = all(old.get(key) == row[key] for key in ("version", "environment"))
        rows[name] = row | {"cells": (old["cells"] if same else {}) | row["cells"]}
    ordered = {name: rows[name] for name in TOOLS if name in rows}
    return Record("tools", {"model": "a random llama"}, SIZES, {"forms": list(FORMS), "rows": ordered})


def main() -> None:
    """Run the rows and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=TOOLS, default=list(TOOLS), metavar="ROW", help=", ".join(TOOLS))
    parser.add_argument(
        "--forms",
        nargs="+",
        choices=[*FORMS, REAL],
        default=list(FORMS),
        metavar="FORM",
        help=", ".join([*FORMS, REAL]),
    )
    parser.add_argument("--result", type=Path, metavar="DIRECTORY", help=f"for the form {REAL}")
    parser.add_argument("--work", type=Path, help="directory in which the models stay; default: a temporary one")
    parser.add_argument("--traceback", action="store_true", help="print the error of a cell that fails")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        if arguments.result and not (work / REAL).is_dir():
            work.mkdir(parents=True, exist_ok=True)
            (work / REAL).symlink_to(arguments.result.resolve())
        results = measured(arguments.rows, arguments.forms, work, show=arguments.traceback)
    merged(HERE / "tools.json", results).save(HERE / "tools.json")


if __name__ == "__main__":
    main()
