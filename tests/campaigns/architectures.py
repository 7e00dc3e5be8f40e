"""Every architecture: compress, load, merge, and an SVD of our own that says whether the numbers are right.

    python tests/campaigns/architectures.py [--seed N] [--budget SECONDS] [--only NAME,NAME]

A tiny random model of each architecture is made here, saved, and compressed to a rank reduction by plain SVD. Its
logits have to equal those of the dense model whose matrices are replaced by the products of a float64 SVD (numpy's), at
the ranks that the paper's rule gives for the threshold in the plan. The compressed directory has to load, to merge to
the same logits, and to be what a compression in memory gives. One line for each; status 1 after a failure.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import zygote  # noqa: F401 - finds conftest, also where this file is a script
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import welore
from conftest import COMMON as D
from conftest import GPT2
from welore.config import CompressionConfig
from welore.models.skeleton import auto_class, decoder_blocks

TOLERANCE = 2e-5  # of the largest logit
REDUCTION = 0.4
VOCABULARY = D["vocab_size"]

GPT = GPT2 | {"n_inner": 56, "pad_token_id": 0}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_ssm": 64}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1}
ROUTED |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
TEXT = D | {"head_dim": 8, "sliding_window": 16}

# Name -> model type, and what its configuration has beside its defaults.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral": ("mixtral", D | {"num_local_experts": 4}),
    "Qwen2-MoE": ("qwen2_moe", D | MOE | {"shared_expert_intermediate_size": 40}),
    "Qwen3-MoE": ("qwen3_moe", D | MOE | {"head_dim": 8}),
    "Qwen3-Next": (
        "qwen3_next",
        D
        | MOE
        | {"head_dim": 8, "shared_expert_intermediate_size": 40, "layer_types": ["linear_attention", "full_attention"]}
        | {
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "OLMoE": ("olmoe", D | {"num_experts": 4, "num_experts_per_tok": 2}),
    "DeepSeek-V3": (
        "deepseek_v3",
        D
        | ROUTED
        | {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8}
        | {"qk_rope_head_dim": 8, "v_head_dim": 8},
    ),
    "Jamba": (
        "jamba",
        D
        | {"num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
        | {"expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False},
    ),
    "Falcon": ("falcon", {k: v for k, v in D.items() if k not in ("intermediate_size", "num_key_value_heads")}),
    "Falcon-H1": ("falcon_h1", TEXT | MAMBA),
    "LFM2": ("lfm2", D | {"full_attn_idxs": [1], "block_auto_adjust_ff_dim": False}),
    "Mamba2": (
        "mamba2",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8}
        | {"state_size": 8, "n_groups": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "Bamba": ("bamba", D | MAMBA | {"attn_layer_indices": [1]}),
    "Zamba2": (
        "zamba2",
        D
        | {"num_hidden_layers": 5, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "hybrid"]}
        | {"num_mem_blocks": 2, "mamba_d_state": 8, "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 1}
        | {"use_shared_attention_adapter": True, "adapter_rank": 4, "num_key_value_heads": 4, "attention_head_dim": 16},
    ),
    "GraniteMoeHybrid": (
        "granitemoehybrid",
        D
        | MAMBA
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 40}
        | {"layer_types": ["mamba", "attention"]},
    ),
    "Granite": ("granite", D),
    "Cohere": ("cohere", D),
    "Cohere2": ("cohere2", D | {"sliding_window": 16}),
    "GPT-OSS": ("gpt_oss", TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Phi": ("phi", D),
    "Phi-3": ("phi3", D | {"original_max_position_embeddings": 64}),
    "PhiMoE": ("phimoe", D | {"num_local_experts": 4}),
    "MPT": (
        "mpt",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "expansion_ratio": 2},
    ),
    "Bloom": (
        "bloom",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0},
    ),
    "GPTBigCode": ("gpt_bigcode", GPT),
    "GPT-J": ("gptj", GPT | {"rotary_dim": 4}),
    "GPT-Neo": (
        "gpt_neo",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 56}
        | {"max_position_embeddings": 64, "attention_types": [[["global", "local"], 1]], "window_size": 16}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "CodeGen": ("codegen", GPT | {"rotary_dim": 4, "n_ctx": 64}),
    "OPT": ("opt", D | {"ffn_dim": 56, "word_embed_proj_dim": 24}),
    "Gemma3": ("gemma3_text", TEXT | {"query_pre_attn_scalar": 8}),
    "Gemma3n": (
        "gemma3n_text",
        TEXT
        | {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
        | {"vocab_size_per_layer_input": VOCABULARY, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2, "intermediate_size": [56] * 4},
    ),
    "Gemma4": (
        "gemma4_text",
        TEXT
        | {"global_head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "Llama4": (
        "llama4_text",
        D | {"head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 56, "interleave_moe_layer_step": 2},
    ),
    "OLMo2": ("olmo2", D),
    "OLMo3": ("olmo3", D | {"sliding_window": 16}),
    "GLM-4": ("glm4", D | {"head_dim": 8}),
    "GLM-4-MoE": ("glm4_moe", D | ROUTED | {"head_dim": 8}),
    "EXAONE4": ("exaone4", D | {"sliding_window": 16}),
    "SmolLM3": ("smollm3", D),
    "Nemotron": ("nemotron", D | {"head_dim": 8}),
    "Persimmon": ("persimmon", D),
    "StableLM": ("stablelm", D | {"use_qkv_bias": True}),
    "RecurrentGemma": (
        "recurrent_gemma",
        D | {"num_hidden_layers": 3, "lru_width": 40, "head_dim": 8, "attention_window_size": 16},
    ),
    "Apertus": ("apertus", D),
    "MiniMax": ("minimax", D | {"num_local_experts": 4, "head_dim": 8, "block_size": 8}),
    "HunYuan": ("hunyuan_v1_dense", D | {"head_dim": 8}),
    "Ernie4.5": ("ernie4_5", D | {"head_dim": 8}),
    "Seed-OSS": ("seed_oss", D | {"head_dim": 8}),
    "XGLM": (
        "xglm",
        {"vocab_size": VOCABULARY, "d_model": 32, "ffn_dim": 56, "num_layers": 2, "attention_heads": 4},
    ),
    "BioGPT": ("biogpt", D),
    "nanochat": ("nanochat", D),
    "Qwen3.5": (
        "qwen3_5_text",
        D
        | {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
        | {
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
QWEN_VISION = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
LLAMA4_VISION = VISION | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 32}

# Decoders inside a multimodal model -> also the class for all of it. What loads the text is found as the package does.
WRAPPERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Gemma3-4B": (
        "gemma3",
        "Gemma3ForConditionalGeneration",
        {"text_config": TEXT | {"query_pre_attn_scalar": 8}, "vision_config": VISION, "mm_tokens_per_image": 4}
        | {"image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92},
    ),
    "Llama4-Scout": (
        "llama4",
        "Llama4ForConditionalGeneration",
        {"text_config": ARCHITECTURES["Llama4"][1], "vision_config": LLAMA4_VISION},
    ),
    "Qwen2.5-VL": (
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        {"text_config": D | {"rope_parameters": ROPE}, "vision_config": QWEN_VISION},
    ),
    "Qwen3-VL-MoE": (
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        {
            "text_config": D | MOE | {"head_dim": 8, "rope_parameters": ROPE},
            "vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        },
    ),
    "Mistral3": (
        "mistral3",
        "Mistral3ForConditionalGeneration",
        {"text_config": D | {"model_type": "mistral"}, "vision_config": VISION | {"model_type": "pixtral"}},
    ),
}
NAMES = [*ARCHITECTURES, *WRAPPERS]
SMOKE = ("Qwen2-MoE", "Zamba2", "Falcon", "Gemma3-4B", "Llama4-Scout", "Qwen2.5-VL", "Mistral3")


# --- models ----------------------------------------------------------------------------------------------------------


def build(name: str, seed: int = 0) -> Any:
    """A tiny random model, each of whose matrices has a spectrum that decays at a pace of its own."""
    torch.manual_seed(seed)
    if name in WRAPPERS:
        family, kind, changes = WRAPPERS[name]
        model = getattr(transformers, kind)(CONFIG_MAPPING[family](**changes)).eval()
    else:
        family, changes = ARCHITECTURES[name]
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim in (2, 3) and min(parameter.shape) > 1:  # in three axes are the matrices of all experts
                U, S, V = torch.linalg.svd(torch.randn_like(parameter), full_matrices=False)
                k = S.shape[-1]
                decay = torch.exp(-torch.arange(k) * (1 + 2 * torch.rand(S.shape[:-1]))[..., None] / k)
                parameter.copy_(U @ torch.diag_embed(S * decay) @ V / (2 * k**0.5))
    return model


@torch.no_grad()
def logits(model: Any, seed: int) -> Tensor:
    """Logits of a few random tokens."""
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(seed))
    out: Tensor = model.eval()(ids, use_cache=False).logits
    return out.double()


def loaded(directory: Path, kind: Any = None) -> Any:
    """The model of a directory, of which nothing may be missing; kind: the class that loads it."""
    kind = kind or auto_class(AutoConfig.from_pretrained(directory))
    model, report = kind.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"], f"{directory.name} lacks {sorted(report['missing_keys'])[:3]}"
    unread = [key for key in report["unexpected_keys"] if "vision" not in key and "multi_modal" not in key]
    assert not unread, f"{directory.name} has {unread[:3]} too many"
    return model


def matrix_of(model: Any, name: str) -> Tensor:
    """W (m, n) of a layer, a view; that of one expert is a part of a 3-D parameter."""
    head, of_experts, rest = name.partition(".experts.")
    if not of_experts or isinstance(model.get_submodule(f"{head}.experts"), nn.ModuleList):
        layer = model.get_submodule(name)
        return layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data
    experts, (number, own) = model.get_submodule(f"{head}.experts"), rest.split(".")
    whole = getattr(experts, own, None)
    W = (experts.gate_up_proj if whole is None else whole).data[int(number)]
    W = W.T if getattr(experts, "is_transposed", True) else W  # Llama 4 says nothing and has them so
    return W if whole is not None else W.chunk(2)[own == "up_proj"]


# --- the check -------------------------------------------------------------------------------------------------------


def truncated(model: Any, plan: dict[str, Any]) -> None:
    """Replace the matrices of a dense model by their best approximations, by numpy's SVD; check the plan's ranks."""
    for matrix in plan["matrices"]:
        W = matrix_of(model, matrix["name"])
        U, sigma, V = np.linalg.svd(W.double().numpy(), full_matrices=False)
        share, rank, level = sigma - sigma[-1], matrix["kept"], plan["threshold"]
        share = share / share[0] if share[0] > 0 else np.ones_like(share)
        least, most = (max(1, int((share >= level + slack).sum())) for slack in (1e-6, -1e-6))
        assert least <= rank <= most, f"{matrix['name']} has rank {rank}, the threshold gives {least} to {most}"
        if matrix["factored"]:
            product = (U[:, :rank] * sigma[:rank]) @ V[:rank]
            W.copy_(torch.from_numpy(product))


def require_close(actual: Tensor, expected: Tensor, words: str) -> float:
    """The largest difference, relative to the largest logit; AssertionError beyond the tolerance."""
    difference = float((actual - expected).abs().max() / expected.abs().max())
    assert difference <= TOLERANCE, f"{words}: logits differ by {difference:.1e} of the largest"
    return difference


def check(name: str, seed: int, directory: Path) -> str:
    """Compress, load and merge one architecture; what was seen. AssertionError or WeLoreError if it is not right."""
    config = CompressionConfig(rank_reduction=REDUCTION, scaling="none", storage="factored", min_ratio=0)
    dense, small, merged = (directory / part for part in ("dense", "small", "merged"))
    built = build(name, seed)
    built.save_pretrained(dense)
    before = logits(loaded(dense), seed)
    result = welore.compress(dense, small, config, recovery=None, progress=False)

    plan = json.loads((small / "plan.json").read_text("utf-8"))
    reference = loaded(dense)
    inside = {id(p) for p in decoder_blocks(reference)[1].parameters()}
    linear = [(n, m.weight) for n, m in reference.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    truncated(reference, plan)
    expected = logits(reference, seed)
    model = loaded(small)
    worst = require_close(logits(model, seed), expected, "loaded")
    assert not torch.allclose(before, expected), "nothing was changed"

    welore.merge(small, merged, progress=False)
    require_close(logits(loaded(merged), seed), logits(model, seed), "merged")
    if name in WRAPPERS:
        for made in (small, merged):
            require_close(logits(loaded(made, type(built)), seed), logits(model, seed), "loaded as it was")
    in_memory = loaded(dense)
    welore.compress(in_memory, directory / "saved", config, recovery=None, progress=False)
    require_close(logits(in_memory, seed), expected, "in memory")
    require_close(logits(loaded(directory / "saved"), seed), expected, "saved from memory")
    welore.merge(in_memory, progress=False)
    require_close(logits(in_memory, seed), expected, "merged in memory")
    targeted = {matrix["name"] for matrix in plan["matrices"]}
    chosen = {id(w) for n, w in linear if n in targeted}
    left = sorted({".".join(n.split(".")[-2:]) for n, w in linear if id(w) in inside - chosen})
    factored = sum(matrix["factored"] for matrix in plan["matrices"])
    words = f"{factored} of {len(targeted)} factored, ERR {result.plan.rank_reduction:.2f}, logits to {worst:.0e}"
    return words + (f", left dense: {', '.join(left)}" if left else "")


def run(names: Sequence[str], seed: int, budget: float = 0, say: Callable[[str], object] = print) -> list[str]:
    """Check the architectures, none after `budget` seconds (0: all of them); those that failed."""
    failed, began = [], time.perf_counter()
    for name in names:
        started = time.perf_counter()
        if budget and started - began > budget:
            say(f"{name}: not reached")
            continue
        try:
            with tempfile.TemporaryDirectory() as directory:
                words = "ok: " + check(name, seed, Path(directory))
        except Exception as error:  # whatever a library raises is a failure of this architecture, not of the campaign
            where = traceback.extract_tb(error.__traceback__)[-1]
            words = f"FAILED: {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            failed.append(name)
        say(f"{name}: {words} ({time.perf_counter() - started:.1f} s)")
    return failed


def main() -> int:
    """Check all architectures, or some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=0, metavar="SECONDS")
    parser.add_argument("--only", default=",".join(NAMES), metavar="NAME,NAME")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := set(names) - set(NAMES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    failed = run(names, arguments.seed, arguments.budget, partial(print, flush=True))
    print(f"{len(failed)} of {len(names)} architectures failed", *failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
