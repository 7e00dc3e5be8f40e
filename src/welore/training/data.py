"""The questions of a task as training examples; batches, and the order in which examples are read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from welore.config import FinetuneConfig
from welore.data.packing import HELD_OUT, IGNORED, Batch, DatasetSplit, Example, digest_of_texts
from welore.data.windows import opening_tokens
from welore.errors import WeLoreError
from welore.evaluation.tasks import TASKS, Item, items
from welore.training.arguments import length_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def questions_of_task(
    config: FinetuneConfig, tokenizer: "PreTrainedTokenizerBase", cache_dir: str | Path | None = None
) -> DatasetSplit:
    """The training items of the task; the last tenth of them is held out, the evaluation items are not touched.

    Loss on the answer and the end token only, unless loss_on_prompt. A question longer than max_length tokens loses
    the beginning of its prompt and is counted.
    """
    assert config.task is not None
    length = length_of(config)
    questions = items(TASKS[config.task], "train", config.task_dataset, config.seed, cache_dir)
    if len(questions) == 1:
        raise WeLoreError(f"{config.task} has 1 training item: two are needed, one of them to evaluate on")
    encoded = [_encoded(item, tokenizer, config.loss_on_prompt) for item in questions]
    too_long = sum(len(sequence["input_ids"]) > length for sequence in encoded)
    answers = [] if config.loss_on_prompt else [int((each["labels"] != IGNORED).sum()) for each in encoded]
    if min(answers, default=1) < 1:
        raise WeLoreError(f"the tokenizer gives no tokens for an answer of {config.task}: it is damaged")
    longest, first = max(answers, default=2), len(opening_tokens(tokenizer))
    if longest + first >= length:
        raise WeLoreError(f"max_length is {length}: an answer of {config.task} alone has {longest} tokens")
    cut = [_cut(sequence, length, first) for sequence in encoded]
    border = len(cut) - max(1, len(cut) // HELD_OUT)
    counts = {"train_items": border, "held_out_items": len(cut) - border, "prompts_cut": too_long}
    return DatasetSplit(
        cut[:border],
        cut[border:][: config.max_eval_samples],
        f"the last {len(cut) - border} of {len(cut)} training items are held out; the evaluation part is not read",
        counts,
        digest_of_texts([json.dumps([item.prompt, item.answer]) for item in questions]),
    )


def _encoded(item: Item, tokenizer: "PreTrainedTokenizerBase", loss_on_prompt: bool) -> Example:
    """Tokens of prompt, answer and end. Labels begin where the tokens with and without the answer part."""
    prompt: list[int] = tokenizer(item.prompt, verbose=False).input_ids
    ids: list[int] = tokenizer(item.prompt + item.completion, verbose=False).input_ids
    same = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), min(len(prompt), len(ids)))
    if tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    labels = torch.tensor(ids)
    if not loss_on_prompt:
        labels[:same] = IGNORED
    return {"input_ids": torch.tensor(ids), "labels": labels}


def _cut(sequence: Example, length: int, first: int) -> Example:
    """The last tokens of an example that is too long, after its `first`, which open every text."""
    if len(sequence["input_ids"]) <= length:
        return sequence
    return {name: torch.cat([values[:first], values[first - length :]]) for name, values in sequence.items()}


def collate(sequences: Sequence[Example], pad: int = 0) -> Batch:
    """One batch; sequences of different length are padded on the right to the longest of them."""

    def padded(tensors: list[Tensor], fill: int) -> Tensor:
        return pad_sequence(tensors, batch_first=True, padding_value=fill)

    ids = [sequence["input_ids"] for sequence in sequences]
    batch = {"input_ids": padded(ids, pad), "labels": padded([s["labels"] for s in sequences], IGNORED)}
    if len({len(row) for row in ids}) > 1:
        batch["attention_mask"] = padded([torch.ones_like(row) for row in ids], 0)
    taught = [name for name in ("logprobs", "ids") if name in sequences[0]]  # of windows, which are equally long
    return batch | {name: torch.stack([sequence[name] for sequence in sequences]) for name in taught}


def shuffled(sequences: Sequence[Any], count: int, seed: int) -> list[Any]:
    """`count` items in an order that depends on the seed alone; every item once before any comes again.

    Made before the run, so that a resumed run goes on with the very next item.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < count:
        order.extend(torch.randperm(len(sequences), generator=generator).tolist())
    return [sequences[index] for index in order[:count]]
