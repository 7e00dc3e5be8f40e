"""The questions of a task as training examples; batches, and the order in which examples are read."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from welore.config import FinetuneConfig
from welore.data.examples import examples_of_rows
from welore.data.packing import IGNORED, Batch, DatasetSplit, Example, digest_of_texts
from welore.data.rows import Rows
from welore.errors import WeLoreError, first_line
from welore.evaluation.tasks import TASKS, items
from welore.models.load import evaluating, input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def questions_of_task(
    config: FinetuneConfig, tokenizer: "PreTrainedTokenizerBase", cache_dir: str | Path | None = None
) -> DatasetSplit:
    """The training items of the task; the last tenth of them is held out, the evaluation items are not touched.

    Loss on the answer and the end token only, unless loss_on_prompt. A question longer than max_length tokens loses
    the beginning of its prompt and is counted.
    """
    assert config.task is not None
    from datasets import Dataset

    questions = items(TASKS[config.task], "train", config.task_dataset, config.seed, cache_dir)
    rows = Dataset.from_list([{"prompt": item.prompt, "completion": item.completion} for item in questions])
    split = examples_of_rows(Rows(config.task, "completion", rows), tokenizer, config)
    if split.counts["items_dropped"]:
        raise WeLoreError(f"max_length is {config.max_length}: an answer of {config.task} alone is as long")
    held_out = split.counts["held_out_items"]
    return replace(
        split,
        split=f"the last {held_out} of {len(rows)} training items are held out; the evaluation part is not read",
        sha256=digest_of_texts([json.dumps([item.prompt, item.answer]) for item in questions]),
    )


def collate(sequences: Sequence[Example], pad: int = 0) -> Batch:
    """One batch; sequences of different length are padded on the right to the longest of them.

    Behind packed rows the padding is a row of its own: a mask would hide from transformers where rows begin.
    """

    def padded(tensors: list[Tensor], fill: int) -> Tensor:
        return pad_sequence(tensors, batch_first=True, padding_value=fill)

    ids = [sequence["input_ids"] for sequence in sequences]
    batch = {"input_ids": padded(ids, pad), "labels": padded([s["labels"] for s in sequences], IGNORED)}
    length = batch["input_ids"].shape[1]
    if "position_ids" in sequences[0]:
        positions = [torch.cat([s["position_ids"], torch.arange(length - len(s["position_ids"]))]) for s in sequences]
        batch["position_ids"] = torch.stack(positions)
    elif any(len(row) < length for row in ids):
        batch["attention_mask"] = padded([torch.ones_like(row) for row in ids], 0)
    taught = [name for name in ("logprobs", "ids") if name in sequences[0]]  # of windows, which are equally long
    return batch | {name: torch.stack([sequence[name] for sequence in sequences]) for name in taught}


@torch.no_grad()
def require_packing(model: "PreTrainedModel") -> None:
    """Raise WeLoreError unless a packed row gets the logits that it gets alone: state spaces carry one into the next.

    Two rows of a few tokens are read, in the model's own dtype.
    """
    generator, attention = torch.Generator().manual_seed(0), model.config._attn_implementation
    refusal = f"rows cannot be packed for {type(model).__name__}"
    if attention not in ("sdpa", "eager"):  # flash kernels cut rows in batches of one sequence alone
        raise WeLoreError(f"{refusal} with attention {attention}: choose sdpa or eager, or leave packing out")
    device, known = input_device(model), len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    rows = [torch.randint(known, (1, length), generator=generator).to(device) for length in (9, 11)]
    positions = torch.cat([torch.arange(row.shape[1], device=device) for row in rows])[None]
    anything: Any = model
    with evaluating(model):
        alone = anything(rows[1], use_cache=False).logits
        try:
            packed = anything(torch.cat(rows, 1), position_ids=positions, use_cache=False).logits[:, rows[0].shape[1] :]
        except (TypeError, ValueError) as error:
            raise WeLoreError(f"{refusal} ({first_line(error)}): leave packing out") from error
    far = (packed - alone).abs().max() / alone.abs().max()
    if not far <= torch.finfo(alone.dtype).eps ** 0.5:
        raise WeLoreError(f"{refusal}: there a row changes the one behind it; leave packing out")


def reading_order(count: int, reads: int, seed: int) -> list[int]:
    """Numbers of `reads` of `count` items in an order that depends on the seed alone; each once before any comes again.

    Made before the run, so that a resumed run goes on with the very next item.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < reads:
        order.extend(torch.randperm(count, generator=generator).tolist())
    return order[:reads]
