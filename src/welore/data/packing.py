"""What a model is trained on: a text in packed blocks, or the questions of a task; and what is held out of it."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from welore.data.text import C4_DOCUMENTS, hub_rows, read_text
from welore.data.windows import digest
from welore.errors import WeLoreError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT = 10  # one part in ten
TOKENS_PER_DOCUMENT = 300  # of C4, cautiously: it has about 480
Example = dict[str, Tensor]  # input_ids and labels, (length,) each


@dataclass(frozen=True)
class DatasetSplit:
    """Sequences to train on and sequences to evaluate on, which have nothing in common.

    split: how they were told apart. counts: what was left over, cut or held out. sha256: of what was read.
    """

    train: Sequence[Example]
    evaluation: Sequence[Example]
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
) -> DatasetSplit:
    """A text as blocks of exactly `length` tokens, documents one after the other, no padding.

    data: c4 or wikitext2 (trained on their training part, evaluated on their validation part), or anything that
    corpus.read_text knows: the first tenth of its blocks is held out (`welore evaluate --num-windows` reads from the
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
            "take a longer text or a smaller --max-length"
        )
    counts = {"train_blocks": len(train), "held_out_blocks": len(held), "tokens_unused": unused}
    return DatasetSplit(_labelled(train), _labelled(held[:eval_items]), split, counts, digest_of_texts(texts))


def training_texts(data: str, tokens: int, cache_dir: str | Path | None = None) -> list[str]:
    """What `blocks_of_text` trains on, as text: the training part of a named data set, all but the first tenth of any
    other.
    """
    if data in PARTS:
        return PARTS[data](tokens, cache_dir)[0]
    text = read_text(data, cache_dir=cache_dir)
    return [text[len(text) // HELD_OUT :]]


def blocks_of_windows(windows: Tensor, name: str, *, eval_items: int) -> DatasetSplit:
    """Windows (count, length) of token ids that a model has written, as material; the first tenth is held out."""
    held, train, split = _first_tenth(list(windows.long()))
    counts = {"train_blocks": len(train), "held_out_blocks": len(held), "tokens_unused": 0}
    sha256 = digest(windows.long())
    return DatasetSplit(_labelled(train), _labelled(held[:eval_items]), f"{name}: {split}", counts, sha256)


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


def _labelled(blocks: Sequence[Tensor]) -> list[Example]:
    return [{"input_ids": block, "labels": block} for block in blocks]


# --- downstream: a task ---------------------------------------------------------------------------------------------


# --- batches --------------------------------------------------------------------------------------------------------


def digest_of_texts(texts: Sequence[str]) -> str:
    """SHA-256 of texts, in order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
        digest.update(b"\0")
    return digest.hexdigest()
