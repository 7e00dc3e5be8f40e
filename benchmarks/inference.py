"""Is a low-rank layer as fast as its parameter count promises? A record and two lines.

One linear layer, one thread: dense; factored, y = A (B x); pivoted, P and C at the same rank, so r^2 numbers less;
merged, W = A B again (a control: it must cost what dense costs). Prefill is 512 tokens at once, decode one token, both
after welore.optimize_for_decoding; training is prefill with its gradients, before it. In decode every call takes the
next of many copies of the layer, as a model does: its weights come from memory, not from the cache. Then SmolLM2.
Variants are interleaved; what counts is the median ratio of neighbouring measurements, and its product with the
parameter ratio ("reach"): 1 means that half the parameters take half the time.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from itertools import cycle, islice, pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

import welore
from welore.config import CompressionConfig
from welore.io.hub import resolve_model
from welore.layers.low_rank import LowRankLinear, PivotedLinear
from welore.layers.storage_forms import FORMS
from welore.models.embedded import embedded_model
from welore.models.replace import sizes
from welore.records import Record

HERE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
SHAPES = ((2048, 2048), (5504, 2048), (4096, 4096))
RANKS = (0.1, 0.2, 0.3, 0.4, 0.5)  # r / n
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOW_RANK = ("factored", "pivoted")
PHASES = ("prefill", "decode", "training")
PREFILL, REPEATS_PREFILL, REPEATS_DECODE = 512, 5, 15
BEYOND_CACHE_BYTES = 192e6
MUST_REACH = {"prefill": 0.8, "decode": 0.95}  # of the parameter ratio, at r = 0.3 n; decode in fp32
RANK_REDUCTION, PROMPT, NEW_TOKENS, REPEATS_MODEL = 0.5, 256, 32, 3


def variants(m: int, n: int, r: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The same rank-r matrix in every form."""
    found: dict[str, nn.Module] = {"dense": nn.Linear(n, m, bias=False, dtype=dtype)}
    found["factored"] = LowRankLinear(n, m, r, dtype=dtype)
    found["pivoted"] = pivoted = PivotedLinear(n, m, r, dtype=dtype)
    pivoted.order.copy_(torch.randperm(m))
    found["merged"] = nn.Linear(n, m, bias=False, dtype=dtype)
    return found


def interleaved(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median of seconds of the first run over seconds of each, measured side by side; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    first = next(iter(seconds.values()))
    ratios = {name: [a / b for a, b in zip(first, taken, strict=True)] for name, taken in seconds.items()}
    return {name: statistics.median(found[1:]) for name, found in ratios.items()}


def measure_layer(m: int, n: int, share: float, name: str) -> dict[str, Any]:
    """Speed-up over dense and reach of every variant of one layer at one rank."""
    dtype, r = DTYPES[name], round(share * n)
    layers = variants(m, n, r, dtype)
    ratio = {kind: FORMS[kind].cost(m, n, r) / (m * n) if kind in FORMS else 1.0 for kind in layers}
    count = max(1, math.ceil(BEYOND_CACHE_BYTES / (m * n * dtype.itemsize)))
    copies = {kind: [deepcopy(layer).eval() for _ in range(count)] for kind, layer in layers.items()}
    trained = deepcopy(layers)
    for layer in (*layers.values(), *(copy for kind in copies.values() for copy in kind)):
        welore.optimize_for_decoding(layer)
    copied = {kind: cycle(same) for kind, same in copies.items()}
    prompt, token = torch.randn(PREFILL, n, dtype=dtype), torch.randn(1, n, dtype=dtype)

    def decode(kind: str) -> None:
        for layer in islice(copied[kind], count):
            layer(token)

    def train(layer: nn.Module) -> None:
        layer(prompt).backward(torch.ones(PREFILL, m, dtype=dtype))

    with torch.inference_mode():
        speedups = {
            "prefill": interleaved({kind: partial(layer, prompt) for kind, layer in layers.items()}, REPEATS_PREFILL),
            "decode": interleaved({kind: partial(decode, kind) for kind in layers}, REPEATS_DECODE),
        }
    prompt.requires_grad_()
    training = {kind: partial(train, layer) for kind, layer in trained.items()}
    speedups["training"] = interleaved(training, REPEATS_PREFILL)
    return {
        "shape": [m, n],
        "dtype": name,
        "rank": r,
        "rank_over_n": share,
        "parameter_ratio": ratio,
        "weight_bytes": {kind: bytes_of(layer) for kind, layer in layers.items()},
        "speedup": speedups,
        "reach": {phase: {kind: x * ratio[kind] for kind, x in found.items()} for phase, found in speedups.items()},
    }


def bytes_of(module: nn.Module) -> int:
    """Of its parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def break_even(rows: list[dict[str, Any]], phase: str, kind: str) -> float | None:
    """The r / n at which a variant is as fast as dense, between the two measured ranks around it; None beyond them."""
    points = [(row["rank_over_n"], row["speedup"][phase][kind]) for row in rows]
    for (x0, y0), (x1, y1) in pairwise(points):
        if y0 >= 1 > y1:
            return x0 + (y0 - 1) / (y0 - y1) * (x1 - x0)
    return None


def break_evens(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per shape, dtype, phase and variant."""
    found = []
    for shape, name, phase in product(SHAPES, DTYPES, PHASES):
        same = [row for row in rows if row["shape"] == list(shape) and row["dtype"] == name]
        at = {kind: break_even(same, phase, kind) for kind in LOW_RANK}
        found.append({"shape": list(shape), "dtype": name, "phase": phase, "rank_over_n": at})
    return found


def worst_reach(rows: list[dict[str, Any]], phase: str, kind: str, name: str) -> float:
    """The least reach over the shapes at r = 0.3 n."""
    chosen = [row for row in rows if row["rank_over_n"] == 0.3 and row["dtype"] == name]
    return min(row["reach"][phase][kind] for row in chosen)


def load_models() -> tuple[dict[str, Any], dict[str, Any]]:
    """SmolLM2 dense and in every form of its compression; and how large they are."""
    with tempfile.TemporaryDirectory() as directory:
        small = Path(directory) / "small"
        source = resolve_model(embedded_model())
        welore.compress(source, small, CompressionConfig(rank_reduction=RANK_REDUCTION))
        pivoted = Path(directory) / "pivoted"
        welore.compress(source, pivoted, CompressionConfig(rank_reduction=RANK_REDUCTION, storage="pivoted"))
        places = {"dense": source, "factored": small, "pivoted": pivoted, "merged": small}
        models = {name: AutoModelForCausalLM.from_pretrained(place) for name, place in places.items()}
    about = {name: sizes(model) for name, model in models.items()}
    welore.merge(models["merged"])
    for model in models.values():
        welore.optimize_for_decoding(model)
    forms, dense = ("factored", "pivoted"), about["dense"]["parameters"]
    return models, {
        "targeted_parameter_ratio": {form: about[form]["parameter_ratio"] for form in forms},
        "model_parameter_ratio": {form: about[form]["parameters"] / dense for form in forms},
        "weight_bytes": {name: bytes_of(model) for name, model in models.items()},
    }


@torch.inference_mode()
def generate(model: Any) -> tuple[float, float]:
    """Seconds of the prompt, and of greedy decoding after it."""
    started = time.perf_counter()
    out = model(torch.arange(1000, 1000 + PROMPT)[None], use_cache=True, logits_to_keep=1)
    prefilled = time.perf_counter()
    for _ in range(NEW_TOKENS):
        out = model(out.logits[:, -1].argmax(-1)[None], past_key_values=out.past_key_values, use_cache=True)
    return prefilled - started, time.perf_counter() - prefilled


def measure_model(models: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """Tokens per second of every model, and the median ratio to dense."""
    torch.set_num_threads(threads)
    rounds = [{name: generate(model) for name, model in models.items()} for _ in range(REPEATS_MODEL + 1)][1:]
    found: dict[str, Any] = {"threads": threads}
    for position, (phase, tokens) in enumerate((("prefill", PROMPT), ("decode", NEW_TOKENS))):
        found[phase] = {
            name: {
                "tokens_per_second": tokens / statistics.median(r[name][position] for r in rounds),
                "speedup": statistics.median(r["dense"][position] / r[name][position] for r in rounds),
            }
            for name in models
        }
    return found


def main() -> None:
    """Measure, write docs/benchmarks/inference.json, print two lines."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = [measure_layer(m, n, share, name) for name in DTYPES for m, n in SHAPES for share in RANKS]
    models, about = load_models()
    whole = [measure_model(models, threads) for threads in (1, 2)]
    keys = product(DTYPES, PHASES)
    worst = {f"{p}, {d}": {kind: worst_reach(rows, p, kind, d) for kind in LOW_RANK} for d, p in keys}
    numbers = {"worst_reach_at_0.3": worst, "must_reach": MUST_REACH, "model": about | {"speed": whole}}
    numbers |= {"break_even": break_evens(rows), "layers": rows}
    settings: dict[str, Any] = {
        "layer_threads": 1,
        "prefill_tokens": PREFILL,
        "prompt_tokens": PROMPT,
        "new_tokens": NEW_TOKENS,
    }
    settings |= {"rank_reduction": RANK_REDUCTION}
    Record("inference", {"model": embedded_model().stem}, settings, numbers).save(HERE / "inference.json")
    told = "; ".join(
        f"{key}: " + ", ".join(f"{kind} {x:.2f}" for kind, x in found.items()) for key, found in worst.items()
    )
    print(f"layer at r = 0.3 n, speed-up x parameter ratio, worst of {len(SHAPES)} shapes: {told}")
    speeds = "; ".join(
        f"{w['threads']} thread(s) {phase}: "
        + ", ".join(f"{name} {w[phase][name]['speedup']:.2f}x" for name in list(models)[1:])
        for w in whole
        for phase in ("prefill", "decode")
    )
    print(
        f"SmolLM2, block parameters of dense {about['targeted_parameter_ratio']}, all parameters "
        f"{about['model_parameter_ratio']}: {speeds}"
    )


if __name__ == "__main__":
    main()
