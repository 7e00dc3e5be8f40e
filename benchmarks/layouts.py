"""Is a compressed model faster than the dense one where it will run? A record of every layout of `--for`.

SmolLM2, compressed for a CPU, for size and for a GPU to the same number of parameters; and one decoder block of the
shape of Llama-2-7B, with random weights and ranks as for spectra of SmolLM2 at that width. Processor time of one
thread, each model in turn; the median of the ratios to the dense model. Decoding is one token at a time after the
prompt. A kernel is an ATen call that is no view: what a GPU would launch for a token. No GPU is needed, and none is
timed.

    python benchmarks/layouts.py            # both; SmolLM2 takes ten minutes
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import welore
from welore.allocation.plan import Plan
from welore.allocation.spectra import Spectra
from welore.config import AllocationConfig, CalibrationConfig, CompressionConfig, Goal
from welore.io.hub import resolve_model
from welore.layers.low_rank import PivotedLinear
from welore.models.embedded import embedded_model
from welore.models.mlp import long_matrices
from welore.models.quantizer import WeLoreConfig
from welore.models.replace import build_layer
from welore.models.targets import find_targets, in_blocks
from welore.records import Identity, Record

HERE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
GOALS: tuple[Goal, ...] = ("cpu", "size", "gpu")
KEEP, CALIBRATION_TOKENS = 0.8, 4096
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT, READ, NEW_TOKENS, REPEATS = 256, 512, 16, 5
H100 = {"bytes_per_second": 0.85 * 3.35e12, "seconds_per_kernel": 2.5e-6}  # decoding in bfloat16 in a CUDA graph
BLOCK: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}


class Kernels(TorchDispatchMode):
    """Counts the ATen calls that are no views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or func is torch.ops.aten._unsafe_view.default)
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def read(model: Any, tokens: int) -> Any:
    """The cache and the next token after a prompt."""
    out = model(torch.arange(tokens)[None] % model.config.vocab_size, use_cache=True, logits_to_keep=1)
    return out.past_key_values, out.logits[:, -1].argmax(-1)[None]


@torch.inference_mode()
def decode(model: Any, cache: Any, token: Any, count: int) -> None:
    """Greedy tokens after the prompt."""
    for _ in range(count):
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1)[None]


def prefill_seconds(model: Any) -> float:
    """Processor time of a prompt."""
    started = time.process_time()
    read(model, READ)
    return time.process_time() - started


def decode_seconds(model: Any) -> float:
    """Processor time of a token."""
    cache, token = read(model, PROMPT)
    started = time.process_time()
    decode(model, cache, token, NEW_TOKENS)
    return (time.process_time() - started) / NEW_TOKENS


def kernels_per_block(model: Any) -> float:
    """Kernels of one token inside the decoder blocks, their mean."""
    cache, token = read(model, 8)
    counts: list[int] = []
    blocks, seen = model.model.layers, Kernels()
    hooks = [block.register_forward_pre_hook(lambda *_: counts.append(-seen.count)) for block in blocks]
    hooks += [block.register_forward_hook(lambda *_: counts.append(seen.count)) for block in blocks]
    with seen:
        decode(model, cache, token, 1)
    for hook in hooks:
        hook.remove()
    return sum(counts) / len(blocks)


def ratios(models: Mapping[str, Any]) -> dict[str, Any]:
    """Phase -> model -> processor time over that of `dense`, and in seconds; the first round warms up."""
    phases: dict[str, Callable[[Any], float]] = {"prefill": prefill_seconds, "decode": decode_seconds}
    measured: dict[str, Any] = {}
    for phase, run in phases.items():
        rounds = [{name: run(model) for name, model in models.items()} for _ in range(REPEATS + 1)][1:]
        measured[phase] = {
            name: {
                "to_dense": statistics.median(r[name] / r["dense"] for r in rounds),
                "seconds": statistics.median(r[name] for r in rounds),
            }
            for name in models
        }
    return measured


def described(plan: Plan, model: Any) -> dict[str, Any]:
    """What a plan makes of a model: sizes, and its kernels."""
    forms, blocks = list(plan.forms.values()), int(model.config.num_hidden_layers)
    return {
        "parameter_ratio": plan.parameter_ratio,
        "predicted_loss": plan_loss(plan),
        "factored_per_block": forms.count("factored") / blocks,
        "pivoted_per_block": forms.count("pivoted") / blocks,
        "neurons_pruned": sum(mlp.pruned for mlp in plan.neurons.values()),
        "kernels_per_block": kernels_per_block(model),
    }


def plan_loss(plan: Plan) -> float:
    """Mean square of the relative errors of the matrices, by their numbers."""
    weights = [a.dense_parameters for a in plan.allocations]
    errors = [a.relative_error**2 if a.factored else 0.0 for a in plan.allocations]
    return float(np.average(errors, weights=weights))


def small_model() -> tuple[dict[str, Any], dict[Goal, Spectra]]:
    """SmolLM2 in every layout; and its spectra, split for size."""
    with tempfile.TemporaryDirectory() as directory:
        source, calibration = resolve_model(embedded_model()), Path(directory) / "statistics.safetensors"
        settings = CalibrationConfig(num_tokens=CALIBRATION_TOKENS, measure_losses=0)
        welore.calibrate(source, settings, calibration, device="cpu")
        plans = {}
        for goal in GOALS:
            config = CompressionConfig(keep=KEEP, optimize_for=goal)
            small = Path(directory) / goal
            plans[goal] = welore.compress(source, small, config, statistics=calibration, recovery=None).plan
        measured: dict[str, Any] = {}
        for name, dtype in DTYPES.items():
            places = {"dense": source} | {goal: Path(directory) / goal for goal in GOALS}
            models = {label: AutoModelForCausalLM.from_pretrained(path, dtype=dtype) for label, path in places.items()}
            measured[name] = ratios(models)
            if dtype == torch.float32:
                layouts: dict[str, Any] = {goal: described(plan, models[goal]) for goal, plan in plans.items()}
                layouts["dense"] = {"kernels_per_block": kernels_per_block(models["dense"])}
                for model in models.values():
                    welore.optimize_for_decoding(model)
                measured["fp32, optimize_for_decoding"] = ratios(models)
        plain, blocks = (welore.analyze(source, statistics=calibration, split=s) for s in (False, True))
        return {"layouts": layouts, "time": measured}, {"cpu": plain, "size": blocks, "gpu": plain}


def block_plan(goal: Goal, small: Spectra) -> Plan:
    """Ranks of a block of 7B shape by the stretched spectra of SmolLM2: of all blocks, the one nearest to the target.

    small: of SmolLM2, by blocks for size.
    """
    model = block_skeleton()
    targets = find_targets(model)
    grids = long_matrices(model, targets) if small.grids else {}
    matrices = {t.name: t.shape for t in in_blocks(targets, grids)}
    values, shapes = {}, {}
    every: dict[str, Any] = {}
    blocks = sorted({int(name.split(".")[2]) for name in small.values})
    for index in blocks:
        every |= {layer.replace(".0.", f".{index}.", 1): grid for layer, grid in grids.items()}
        for name, shape in matrices.items():
            own = name.replace(".0.", f".{index}.", 1)
            sigma = small.values[own if own in small.values else own.rpartition(".")[0]]
            positions = np.linspace(0, len(sigma) - 1, min(shape))
            values[own], shapes[own] = np.interp(positions, np.arange(len(sigma)), sigma), shape
    spectra = Spectra(Identity("block", "0" * 64), values, shapes, scaling="kfac", grids=every)
    plan = welore.allocate(spectra, AllocationConfig(keep=KEEP, optimize_for=goal))
    chosen = [plan.allocations[start : start + len(matrices)] for start in range(0, len(values), len(matrices))]
    plans = [
        replace(plan, grids=grids, allocations=tuple(replace(a, name=n) for a, n in zip(block, matrices, strict=True)))
        for block in chosen
    ]
    return min(plans, key=lambda plan: abs(plan.parameter_ratio - KEEP))


def block_skeleton() -> Any:
    """A decoder of one dense block, without numbers."""
    heads = BLOCK["num_attention_heads"]
    config = LlamaConfig(**BLOCK, num_hidden_layers=1, num_key_value_heads=heads, vocab_size=512)
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def block_model(plan: Plan | None, dtype: torch.dtype) -> Any:
    """A decoder of one block with random weights; plan: its low-rank layers."""
    model = block_skeleton().to(dtype)
    if plan is not None:
        config = WeLoreConfig.of(plan)
        for layer in config.layers:
            build_layer(model, layer, config)
    model = model.to_empty(device="cpu").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    for layer in model.modules():
        if isinstance(layer, PivotedLinear):
            layer.order.copy_(torch.randperm(layer.out_features))
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model


def large_block(spectra: Mapping[Goal, Spectra]) -> dict[str, Any]:
    """A decoder block of the shape of Llama-2-7B in every layout."""
    plans = {goal: block_plan(goal, spectra[goal]) for goal in GOALS}
    measured: dict[str, Any] = {}
    layouts: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        models = {"dense": block_model(None, dtype)} | {goal: block_model(plan, dtype) for goal, plan in plans.items()}
        measured[name] = ratios(models)
        layouts = {goal: described(plan, models[goal]) for goal, plan in plans.items()}
        layouts["dense"] = {"parameter_ratio": 1.0, "kernels_per_block": kernels_per_block(models["dense"])}
    numel = sum(a.dense_parameters for a in plans["cpu"].allocations)
    seconds = {
        label: 2 * numel * part["parameter_ratio"] / H100["bytes_per_second"]
        + part["kernels_per_block"] * H100["seconds_per_kernel"]
        for label, part in layouts.items()
    }
    for label, part in layouts.items():
        part["h100_to_dense_by_arithmetic"] = seconds[label] / seconds["dense"]
    return {"layouts": layouts, "time": measured}


def main() -> None:
    """Measure, write docs/benchmarks/layouts.json, print a line for each."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    small, spectra = small_model()
    numbers = {"SmolLM2": small, "block of 7B": large_block(spectra)}
    settings = {
        "keep": KEEP,
        "prompt_tokens": PROMPT,
        "prefill_tokens": READ,
        "new_tokens": NEW_TOKENS,
        "threads": 1,
        "calibration_tokens": CALIBRATION_TOKENS,
        "block": BLOCK,
        "h100": H100,
    }
    Record("layouts", {"model": embedded_model().stem}, settings, numbers).save(HERE / "layouts.json")
    for name, part in numbers.items():
        for kind, phases in part["time"].items():
            for phase, models in phases.items():
                told = ", ".join(f"{goal} x {models[goal]['to_dense']:.2f}" for goal in GOALS)
                print(f"{name}, {kind}, {phase}: {told}")


if __name__ == "__main__":
    main()
