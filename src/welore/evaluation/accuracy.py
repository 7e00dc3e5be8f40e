"""How many questions of a task a language model answers correctly."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from scipy.stats import binomtest
from torch import Tensor

from welore.config import RunOptions, ScoreConfig, TaskName, as_record, settings_of
from welore.data.self_generated import configured_ends
from welore.data.windows import opening_tokens, require_known_tokens
from welore.errors import WeLoreError
from welore.evaluation.tasks import TASKS, Item, Task, items, majority_rate
from welore.io.context import RunContext
from welore.io.progress import Progress, counted, silent
from welore.models.load import evaluating, input_device, load_model, warn_if_slow
from welore.models.skeleton import context_length
from welore.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEW_TOKENS = 8  # enough for every answer: " True.", " 1200."


def score(
    model: "str | Path | PreTrainedModel",
    config: ScoreConfig | None = None,
    *,
    task: TaskName | None = None,
    label: str | None = None,
    **options: Unpack[RunOptions],
) -> Record:
    """Measure how many evaluation questions of a task a model answers correctly.

    The model writes 8 tokens after each prompt by greedy decoding. An answer that does not complete the answer
    sentence is wrong, and is counted apart. Training questions cannot be scored. The batch size changes the result
    only by the rounding of the model's arithmetic.

    Args:
        model: hub id, directory, .gguf file or model in memory; the last one needs the option `tokenizer`.
        config: the task, its data, how many questions, batch size and dtype of the weights.
        task: the task, in place of config.task.
        label: a name for tables.
        **options: device, progress, cache_dir, revision, tokenizer.

    Returns:
        A record of kind "accuracy": accuracy, n, its 95 % interval (Wilson), the rate of the most frequent answer,
        every prompt with its output and extracted answer, effective rank reduction, parameter ratio and bytes.

    Raises:
        WeLoreError: the model or the data of the task cannot be read.
    """
    context = RunContext.create(**options)
    config = settings_of(ScoreConfig, config, task=task)
    if config.task is None:
        raise WeLoreError(f"name the task: --task {', '.join(TASKS)}")
    the_task = TASKS[config.task]
    questions = items(the_task, "evaluation", config.dataset, config.seed, context.cache_dir)[: config.limit]
    loaded = load_model(model, context, config.dtype, label, device_map=config.device_map)
    net = loaded.model
    warn_if_slow(net.dtype, net.device)
    started = time.perf_counter()
    prompts = [item.prompt for item in questions]
    outputs, truncated = answers(net, loaded.tokenizer, prompts, config.batch_size, context.progress)
    numbers = grade(the_task, questions, outputs) | {"truncated": truncated, "seconds": time.perf_counter() - started}
    settings = as_record(config) | {"part": "evaluation", "new_tokens": NEW_TOKENS}
    return loaded.record("accuracy", settings, numbers)


def grade(task: Task, questions: Sequence[Item], outputs: Sequence[str]) -> dict[str, Any]:
    """Accuracy, its 95 % interval, and every question with its output and extracted answer."""
    graded = [
        {
            "prompt": item.prompt,
            "output": output,
            "extracted": task.extract(output),
            "answer": item.answer,
            "correct": task.extract(output) == item.answer,
        }
        for item, output in zip(questions, outputs, strict=True)
    ]
    n, correct = len(graded), sum(bool(g["correct"]) for g in graded)
    interval = binomtest(correct, n).proportion_ci(confidence_level=0.95, method="wilson")
    return {
        "accuracy": correct / n,
        "n": n,
        "ci95_low": float(interval.low),
        "ci95_high": float(interval.high),
        "majority_rate": majority_rate(questions),
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
    """Greedy continuations of the prompts, and how many prompts lost their beginning.

    Prompts are padded on the left and batched by length. One that leaves no room for the answer in the model's
    context keeps its end.
    """
    room = context_length(model.config)
    if room is not None and room <= NEW_TOKENS:
        raise WeLoreError(f"this model reads at most {room} tokens at once: a question and its answer need more")
    encoded: list[list[int]] = [tokenizer(prompt, verbose=False).input_ids for prompt in prompts]
    require_known_tokens(model, *map(torch.tensor, encoded))
    space = max(map(len, encoded)) if room is None else room - NEW_TOKENS
    first = min(len(opening_tokens(tokenizer)), space - 1)  # a text that loses its beginning keeps what opens it
    inputs = [ids if len(ids) <= space else [*ids[:first], *ids[first - space :]] for ids in encoded]
    longest_first = sorted(range(len(inputs)), key=lambda index: -len(inputs[index]))
    batches = [longest_first[start : start + batch_size] for start in range(0, len(inputs), batch_size)]
    outputs = [""] * len(inputs)
    with evaluating(model):
        for batch in counted(progress, batches, "answers"):
            for index, text in zip(batch, _write(model, tokenizer, [inputs[i] for i in batch]), strict=True):
                outputs[index] = text
    return outputs, sum(len(a) > len(b) for a, b in zip(encoded, inputs, strict=True))


def refuse_nan(scores: Tensor) -> Tensor:
    """The scores; WeLoreError if one is NaN, of which the largest would be a token like any other."""
    if bool(scores.isnan().any()):
        raise WeLoreError("the model computes NaN or Inf: try --dtype float32, or look for damaged weights")
    return scores


def _write(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompts: list[list[int]]) -> list[str]:
    """The continuations of one batch of token ids."""
    from transformers import GenerationConfig, LogitsProcessorList

    length = max(map(len, prompts))
    end = configured_ends(model) or ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
    known = range(len(model.get_input_embeddings().weight))  # type: ignore[arg-type]
    pad = next((token for token in (tokenizer.pad_token_id, *end) if token in known), 0)  # masked out
    device = input_device(model)
    ids = torch.tensor([[pad] * (length - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=device)
    greedy = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=NEW_TOKENS, eos_token_id=end or None, pad_token_id=pad
    )
    checks = LogitsProcessorList([lambda _, scores: refuse_nan(scores)])
    anything: Any = model
    written = anything.generate(ids, attention_mask=mask, generation_config=greedy, logits_processor=checks)
    return tokenizer.batch_decode(written[:, length:], skip_special_tokens=True)
