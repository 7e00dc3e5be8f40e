"""5 - score: how many questions of a task a language model answers right."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from scipy.stats import binomtest

from welore.errors import WeLoreError, choose
from welore.evaluation.tasks import TASKS, Item, Task, items, majority_rate
from welore.io.progress import Progress, counted, silent
from welore.models.load import DTYPES, made_ready, warn_if_slow
from welore.models.replace import sizes
from welore.models.skeleton import context_length
from welore.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEW_TOKENS = 8  # enough for every answer: " True.", " 1200."


def score(
    model: "str | Path | PreTrainedModel",
    task: str,
    data: str | Path | None = None,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    limit: int | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str | None = None,
    seed: int = 0,
    label: str | None = None,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
    progress: Progress = silent,
) -> Record:
    """Accuracy record of MODEL on the evaluation items of a task: training items cannot be scored.

    Greedy decoding of 8 new tokens; an answer that does not complete the answer sentence is wrong and is counted
    apart. data: see tasks.items. limit: only the first questions. seed: of generated items. The record holds
    every prompt, output and extracted answer, n, the 95 % interval (Wilson) and the rate of the most frequent
    answer, beside ERR, parameter ratio and bytes. batch_size does not change the result, but for the rounding of
    the model's arithmetic. tokenizer: needed for a model in memory. label: a name for tables.
    """
    the_task = choose("task", task, TASKS)
    choose("dtype", dtype, DTYPES)
    for name, value in (("batch_size", batch_size), ("limit", 1 if limit is None else limit)):
        if value < 1:
            raise WeLoreError(f"{name} is {value}: it must be at least 1")
    found = items(the_task, "evaluation", data, seed=seed, cache_dir=cache_dir)[:limit]
    ready = made_ready(
        model, tokenizer, dtype=dtype, device=device, cache_dir=cache_dir, revision=revision, label=label
    )
    warn_if_slow(ready.model.dtype, ready.model.device)
    model = ready.model

    started = time.perf_counter()
    outputs, truncated = answers(model, ready.tokenizer, [item.prompt for item in found], batch_size, progress)
    numbers = grade(the_task, found, outputs) | {"truncated": truncated, "seconds": time.perf_counter() - started}
    settings = {
        "task": task,
        "data": None if data is None else str(data),
        "part": "evaluation",
        "limit": limit,
        "seed": seed,
        "batch_size": batch_size,
        "new_tokens": NEW_TOKENS,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
    }
    return Record("accuracy", ready.inputs, settings, numbers | sizes(model))


def grade(task: Task, found: Sequence[Item], outputs: Sequence[str]) -> dict[str, Any]:
    """Accuracy, its 95 % interval and what it stands on; every item with output and extracted answer."""
    graded = [
        {
            "prompt": item.prompt,
            "output": output,
            "extracted": task.extract(output),
            "answer": item.answer,
            "correct": task.extract(output) == item.answer,
        }
        for item, output in zip(found, outputs, strict=True)
    ]
    n, correct = len(graded), sum(bool(g["correct"]) for g in graded)
    interval = binomtest(correct, n).proportion_ci(confidence_level=0.95, method="wilson")
    return {
        "accuracy": correct / n,
        "n": n,
        "ci95_low": float(interval.low),
        "ci95_high": float(interval.high),
        "majority_rate": majority_rate(found),
        "unparsable": sum(g["extracted"] is None for g in graded),
        "items": graded,
    }


@torch.inference_mode()
def answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    batch_size: int,
    progress: Progress = silent,
) -> tuple[list[str], int]:
    """What the model writes after each prompt, greedily; and how many prompts lost their beginning.

    Prompts are padded on the left and batched by length. One that leaves no room for the answer in the model's
    context keeps its end.
    """
    room = context_length(model.config)
    encoded: list[list[int]] = [tokenizer(prompt, verbose=False).input_ids for prompt in prompts]
    kept = [ids if room is None else ids[-(room - NEW_TOKENS) :] for ids in encoded]
    longest_first = sorted(range(len(kept)), key=lambda index: -len(kept[index]))
    batches = [longest_first[start : start + batch_size] for start in range(0, len(kept), batch_size)]
    outputs = [""] * len(kept)
    training = model.training
    model.eval()
    for batch in counted(progress, batches, "answers"):
        for index, text in zip(batch, _write(model, tokenizer, [kept[index] for index in batch]), strict=True):
            outputs[index] = text
    model.train(training)
    return outputs, sum(len(a) > len(b) for a, b in zip(encoded, kept, strict=True))


def _write(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompts: list[list[int]]) -> list[str]:
    """The continuations of one batch of token ids."""
    from transformers import GenerationConfig

    length = max(map(len, prompts))
    end = model.generation_config.eos_token_id if model.generation_config else None
    end = tokenizer.eos_token_id if end is None else end
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (end[0] if isinstance(end, list) else end)
    pad = 0 if pad is None else pad  # masked out; any token will do
    ids = torch.tensor([[pad] * (length - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    greedy = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=NEW_TOKENS, eos_token_id=end, pad_token_id=pad
    )
    written: Any = model.generate(ids, attention_mask=mask, generation_config=greedy)  # type: ignore[operator]
    return tokenizer.batch_decode(written[:, length:], skip_special_tokens=True)
