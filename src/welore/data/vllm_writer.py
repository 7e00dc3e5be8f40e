"""Text that the model itself writes in vLLM, for models that no single device holds.

The offline interface of vLLM 0.32: `LLM`, `SamplingParams`, `TokensPrompt`. A window is filled by one request after
another: its text so far and the next opening are the prompt, and the model goes on until a text ends.
"""

import gc
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from welore.config import CalibrationConfig
from welore.data.self_generated import Texts, uniform_numbers
from welore.errors import WeLoreError, first_line


def write_with_vllm(
    directory: Path, model_config: Any, texts: Texts, config: CalibrationConfig, *, trust_remote_code: bool = False
) -> Tensor:
    """Windows (count, length) of token ids that the model of a checkpoint wrote, on all devices that vLLM has.

    The same distribution, openings and ends as in `generate_text`; the random numbers, and so the words, are vLLM's.
    model_config: of transformers. WeLoreError if vLLM is not installed or cannot run the model.
    """
    try:
        import vllm
    except ImportError as error:
        raise WeLoreError("the writer vllm needs vLLM, on Linux: pip install 'welore[vllm]'") from error
    uniform = uniform_numbers(config)
    sizes = model_config.get_text_config(decoder=True)
    heads, devices = sizes.num_attention_heads, max(1, torch.accelerator.device_count())
    try:
        engine = vllm.LLM(
            model=str(directory),
            trust_remote_code=trust_remote_code,
            tensor_parallel_size=max(n for n in range(1, devices + 1) if heads % n == 0),
            seed=config.seed,
            max_model_len=uniform.shape[1],
            generation_config="vllm",  # its own neutral settings, not those of generation_config.json
        )
        allowed = list(range(texts.size)) if texts.size < sizes.vocab_size else None
        windows = _filled(engine, vllm, uniform, texts, _sampling(config, texts, allowed))
    except WeLoreError:
        raise
    except Exception as error:  # of a library that checks models, drivers and memory in ways of its own
        raise WeLoreError(f"vLLM cannot write with {directory}: {first_line(error)}") from error
    del engine
    gc.collect()  # its processes end with it, and leave the memory of the devices
    return windows


def _sampling(config: CalibrationConfig, texts: Texts, allowed: list[int] | None) -> dict[str, Any]:
    """The arguments of SamplingParams that all requests share."""
    return {
        "temperature": float(config.temperature),
        "top_k": config.top_k,
        "top_p": float(config.top_p),
        "stop_token_ids": sorted(texts.ends),
        "allowed_token_ids": allowed,
        "detokenize": False,
    }


def _filled(engine: Any, vllm: Any, uniform: Tensor, texts: Texts, sampling: dict[str, Any]) -> Tensor:
    """Windows filled in rounds: each round goes on with all that are not full yet."""
    count, length = uniform.shape
    windows: list[list[int]] = [[] for _ in range(count)]
    ended = [texts.turns] * count
    while True:
        for window, numbers, row in zip(windows, uniform, range(count), strict=True):
            if len(window) < length and ended[row] == texts.turns:
                window += texts.begin(float(numbers[len(window)]))
                ended[row] = 0
        rows = [row for row, window in enumerate(windows) if len(window) < length]
        if not rows:
            return torch.tensor([window[:length] for window in windows])
        prompts = [vllm.TokensPrompt(prompt_token_ids=list(windows[row])) for row in rows]
        left = [length - len(windows[row]) for row in rows]
        seeds = [int(uniform[row, len(windows[row])] * (1 << 31)) for row in rows]
        requests = [
            vllm.SamplingParams(max_tokens=most, seed=seed, **sampling) for most, seed in zip(left, seeds, strict=True)
        ]
        for row, output in zip(rows, engine.generate(prompts, requests, use_tqdm=False), strict=True):
            tokens = list(output.outputs[0].token_ids)
            if not tokens:
                raise WeLoreError("vLLM gave no token for a window that is not full")
            windows[row] += tokens
            ended[row] += tokens[-1] in texts.ends
