"""How fast does vLLM serve a compressed model? Tokens/s and time to first token, over the dense model: a record.

    python benchmarks/serving.py DENSE NAME=DIRECTORY ... [--dtype float32]

The offline engine, one for every model, each in a process of its own. They take turns at every measurement, and the
median of the ratios to the dense model counts. `requests` requests come at once, every one with a prompt of random
tokens, and all get the same number of new tokens. Time to first token: of one request that is alone.
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import welore
from welore.layers.int8 import INT8
from welore.records import Record

HERE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
REQUESTS = (1, 4, 16, 64)
PROMPT, FIRST_PROMPT, NEW_TOKENS, REPEATS = 32, 256, 16, 3


def seconds(engine: Any, requests: int, prompt: int, new_tokens: int) -> float:
    """Of so many requests at once."""
    from vllm import SamplingParams

    draws = torch.Generator().manual_seed(requests)
    prompts = torch.randint(100, 10_000, (requests, prompt), generator=draws).tolist()
    how = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    started = time.perf_counter()
    engine.generate([{"prompt_token_ids": ids} for ids in prompts], how, use_tqdm=False)
    return time.perf_counter() - started


def interleaved(engines: dict[str, Any], requests: int, prompt: int, new_tokens: int) -> dict[str, dict[str, float]]:
    """Model -> median of seconds, and of the ratio to the first model; the first round warms up."""
    times = [
        {name: seconds(e, requests, prompt, new_tokens) for name, e in engines.items()} for _ in range(REPEATS + 1)
    ]
    first = next(iter(engines))
    medians = {
        name: {
            "seconds": statistics.median(taken[name] for taken in times[1:]),
            "to_dense": statistics.median(taken[name] / taken[first] for taken in times[1:]),
        }
        for name in engines
    }
    told = ", ".join(f"{name} {m['seconds']:.2f} s (x {m['to_dense']:.2f})" for name, m in medians.items())
    print(f"{requests} at once, {prompt} + {new_tokens} tokens: {told}", flush=True)
    return medians


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("models", nargs="+", metavar="NAME=DIRECTORY")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    parser.add_argument("--requests", nargs="+", type=int, default=REQUESTS)
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    import vllm

    directories = {"dense": arguments.dense} | {n: Path(d) for n, d in (text.split("=") for text in arguments.models)}
    limits = {"max_model_len": 512, "max_num_seqs": max(arguments.requests), "enable_prefix_caching": False}
    how = limits | {"kv_cache_memory_bytes": 1 << 30, "dtype": arguments.dtype, "enforce_eager": arguments.eager}
    engines = {name: vllm.LLM(str(d), generation_config="vllm", **how) for name, d in directories.items()}
    models, item = (
        {name: welore.info(directory) for name, directory in directories.items()},
        getattr(torch, arguments.dtype).itemsize,
    )
    numbers = {
        "bytes": {name: m.bytes if m.weights == INT8 else m.parameters * item for name, m in models.items()},
        "first_token": interleaved(engines, 1, FIRST_PROMPT, 1),
        "requests": {str(n): interleaved(engines, n, PROMPT, NEW_TOKENS) for n in arguments.requests},
    }
    settings = {"prompt": PROMPT, "first_prompt": FIRST_PROMPT, "new_tokens": NEW_TOKENS, "repeats": REPEATS} | how
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    inputs = {"model": arguments.dense.name, "device": device, "vllm": vllm.__version__}
    Record("serving", inputs, settings, numbers).save(HERE / "serving.json")


if __name__ == "__main__":
    main()
