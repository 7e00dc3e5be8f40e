"""What a model is trained on: a text in packed blocks, or the questions of a task; and what is held out of it."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from welore.corpus import C4_DOCUMENTS, digest, hub_rows, read_text
from welore.errors import WeLoreError, choose
from welore.tasks import TASKS, Item, items

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a token that is not predicted: the prompt, padding
HELD_OUT = 10  # one part in ten
TOKENS_PER_DOCUMENT = 300  # of C4, cautiously: it has about 480
Sequence_ = dict[str, Tensor]  # input_ids and labels, (length,) each
Batch = dict[str, Tensor]  # input_ids, labels and, where there is padding, attention_mask: (b, length) each


@dataclass(frozen=True)
class Material:
    """Sequences to train on and sequences to evaluate on, which have nothing in common.

    split: how they were told apart. counts: what was left over, cut or held out. sha256: of what was read.
    """

    train: Sequence[Sequence_]
    evaluation: Sequence[Sequence_]
    split: str
    counts: dict[str, int]
    sha256: str


# --- continual: a text ----------------------------------------------------------------------------------------------


def blocks_of_text(
    data: str,
    tokenizer: "PreTrainedTokenizerBase",
    length: int,
    *,
    tokens: int,
    eval_items: int,
    cache_dir: str | Path | None = None,
) -> Material:
    """A text as blocks of exactly `length` tokens, documents one after the other, no padding.

    data: c4 or wikitext2 (trained on their training part, evaluated on their validation part), or anything that
    corpus.read_text knows: the first tenth of its blocks is held out (`welore evaluate --windows` reads from the
    beginning, too). tokens: how many will be read in training (C4 is fetched no further). What does not fill a
    block at the end is left out and counted.
    """
    if data in PARTS:
        train_texts, held_texts, split = PARTS[data](tokens, cache_dir)
        train, unused = _packed(tokenizer, train_texts, length)
        held, _ = _packed(tokenizer, held_texts, length)
        texts = [*held_texts, *train_texts]
    else:
        texts = [read_text(data, cache_dir=cache_dir)]
        found, unused = _packed(tokenizer, texts, length)
        held, train, split = _first_tenth(found)
    if not train or not held:
        raise WeLoreError(
            f"{data} gives {len(train) + len(held)} blocks of {length} tokens, training and evaluation need one each: "
            "take a longer text or a smaller --length"
        )
    counts = {"train_blocks": len(train), "held_out_blocks": len(held), "tokens_unused": unused}
    return Material(_labelled(train), _labelled(held[:eval_items]), split, counts, _digest(texts))


def training_texts(data: str, tokens: int, cache_dir: str | Path | None = None) -> list[str]:
    """What `blocks_of_text` trains on, as text: the training part of a named data set, all but the first tenth of any
    other.
    """
    if data in PARTS:
        return PARTS[data](tokens, cache_dir)[0]
    text = read_text(data, cache_dir=cache_dir)
    return [text[len(text) // HELD_OUT :]]


def blocks_of_windows(windows: Tensor, name: str, *, eval_items: int) -> Material:
    """Windows (count, length) of token ids that a model has written, as material; the first tenth is held out."""
    held, train, split = _first_tenth(list(windows.long()))
    counts = {"train_blocks": len(train), "held_out_blocks": len(held), "tokens_unused": 0}
    sha256 = digest(windows.long())
    return Material(_labelled(train), _labelled(held[:eval_items]), f"{name}: {split}", counts, sha256)


def blocks_to_write(train_blocks: int) -> int:
    """How many blocks leave `train_blocks` or more when the first tenth is held out."""
    return train_blocks + max(1, (train_blocks - 1) // (HELD_OUT - 1))


def _first_tenth(blocks: list[Tensor]) -> tuple[list[Tensor], list[Tensor], str]:
    """Blocks held out, blocks to train on, and how they were told apart."""
    border = max(1, len(blocks) // HELD_OUT)
    return blocks[:border], blocks[border:], f"the first {border} of {len(blocks)} blocks are held out"


def _wikitext2(tokens: int, cache_dir: str | Path | None) -> tuple[list[str], list[str], str]:
    train, held = (
        ["\n\n".join(hub_rows("Salesforce/wikitext", "wikitext-2-raw-v1", part, None, cache_dir))]
        for part in ("train", "validation")
    )
    return train, held, "the data set's own: train, validation"


def _c4(tokens: int, cache_dir: str | Path | None) -> tuple[list[str], list[str], str]:
    documents = tokens // TOKENS_PER_DOCUMENT + 1
    train = hub_rows("allenai/c4", "en", "train", documents, cache_dir)
    held = hub_rows("allenai/c4", "en", "validation", C4_DOCUMENTS, cache_dir)
    return train, held, f"the data set's own: first {documents} documents of train, first {C4_DOCUMENTS} of validation"


PARTS: dict[str, Callable[[int, str | Path | None], tuple[list[str], list[str], str]]] = {
    "wikitext2": _wikitext2,
    "c4": _c4,
}


def _packed(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], length: int) -> tuple[list[Tensor], int]:
    """Blocks (length,) of the documents' tokens, an end token between documents; and the tokens left over."""
    if length < 2:
        raise WeLoreError(
            f"length is {length}: a block needs at least 2 tokens, one to predict from and one to predict"
        )
    ids: list[Tensor] = []
    for text in texts:
        if ids and tokenizer.eos_token_id is not None:
            ids.append(torch.tensor([tokenizer.eos_token_id]))
        ids.append(tokenizer(text, return_tensors="pt", verbose=False).input_ids[0])
    stream = torch.cat(ids).long()
    whole = len(stream) // length
    return list(stream[: whole * length].view(whole, length)), len(stream) - whole * length


def _labelled(blocks: Sequence[Tensor]) -> list[Sequence_]:
    return [{"input_ids": block, "labels": block} for block in blocks]


# --- downstream: a task ---------------------------------------------------------------------------------------------


def questions_of_task(
    task: str,
    data: str | Path | None,
    tokenizer: "PreTrainedTokenizerBase",
    length: int,
    *,
    seed: int,
    loss_on_prompt: bool,
    eval_items: int,
    cache_dir: str | Path | None = None,
) -> Material:
    """The training items of a task; the last tenth of them is held out, the evaluation items are not touched.

    Loss on the answer and the end token only, unless loss_on_prompt. A question longer than `length` tokens loses
    the beginning of its prompt and is counted.
    """
    found = items(choose("task", task, TASKS), "train", data, seed=seed, cache_dir=cache_dir)
    if len(found) < 2:
        raise WeLoreError(f"{task} has {len(found)} training item: two are needed, one of them to evaluate on")
    encoded = [_encoded(item, tokenizer, loss_on_prompt) for item in found]
    too_long = sum(len(sequence["input_ids"]) > length for sequence in encoded)
    longest = max(int((sequence["labels"] != IGNORED).sum()) for sequence in encoded) if not loss_on_prompt else 2
    if longest >= length:
        raise WeLoreError(f"length is {length}: an answer of {task} alone has {longest} tokens")
    cut = [{name: values[-length:] for name, values in sequence.items()} for sequence in encoded]
    border = len(cut) - max(1, len(cut) // HELD_OUT)
    counts = {"train_items": border, "held_out_items": len(cut) - border, "prompts_cut": too_long}
    return Material(
        cut[:border],
        cut[border:][:eval_items],
        f"the last {len(cut) - border} of {len(cut)} training items are held out; the evaluation part is not read",
        counts,
        _digest([json.dumps([item.prompt, item.answer]) for item in found]),
    )


def _encoded(item: Item, tokenizer: "PreTrainedTokenizerBase", loss_on_prompt: bool) -> Sequence_:
    """Tokens of prompt, answer and end. Labels begin where the tokens with and without the answer part."""
    prompt: list[int] = tokenizer(item.prompt, verbose=False).input_ids
    whole: list[int] = tokenizer(item.prompt + item.completion, verbose=False).input_ids
    same = next(
        (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole))
    )
    if tokenizer.eos_token_id is not None and whole[-1] != tokenizer.eos_token_id:
        whole = [*whole, tokenizer.eos_token_id]
    ids = torch.tensor(whole)
    labels = ids.clone()
    if not loss_on_prompt:
        labels[:same] = IGNORED
    return {"input_ids": ids, "labels": labels}


# --- batches --------------------------------------------------------------------------------------------------------


def collate(sequences: Sequence[Sequence_], pad: int = 0) -> Batch:
    """One batch; sequences of different length are padded on the right to the longest of them."""
    longest = max(len(sequence["input_ids"]) for sequence in sequences)
    padding = [longest - len(sequence["input_ids"]) for sequence in sequences]
    if not any(padding):
        return {name: torch.stack([s[name] for s in sequences]) for name in ("input_ids", "labels")}

    def padded(name: str, fill: int) -> Tensor:
        return torch.stack(
            [torch.nn.functional.pad(s[name], (0, n), value=fill) for s, n in zip(sequences, padding, strict=True)]
        )

    masks = [torch.arange(longest) < longest - n for n in padding]
    return {
        "input_ids": padded("input_ids", pad),
        "labels": padded("labels", IGNORED),
        "attention_mask": torch.stack(masks).long(),
    }


def shuffled(found: Sequence[Any], count: int, seed: int) -> list[Any]:
    """`count` items in an order that depends on the seed alone; every item once before any comes again.

    Made before the run, so that a resumed run goes on with the very next item.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < count:
        order.extend(torch.randperm(len(found), generator=generator).tolist())
    return [found[index] for index in order[:count]]


def _digest(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
        digest.update(b"\0")
    return digest.hexdigest()
