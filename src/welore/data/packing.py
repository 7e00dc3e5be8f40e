"""Documents -> blocks of equally many tokens to train on, and others that are held out; rows -> packed sequences."""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from welore.config import BosName
from welore.data.text import TextOptions, open_text
from welore.data.windows import Openings, TopK, digest
from welore.errors import WeLoreError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT = 10  # one part in ten
TOKENIZED_AT_ONCE = 64  # documents
CHARACTERS_PER_TOKEN = 8  # at most, of nearly all texts
# input_ids and labels, (length,) each; of packed rows position_ids; of a teacher's top k logprobs and ids, (length, k)
Example = dict[str, Tensor]
# The same and, where there is padding and nothing packed, attention_mask: (b, length) or (b, length, k) each
Batch = dict[str, Tensor]
IGNORED = -100  # label of a token that is not predicted: the prompt, padding


class Blocks(Sequence[Example]):
    """Packed blocks as examples; tokens: (count, length), int32.

    predictions: of a teacher at every position, (count, length, k); examples have them as `logprobs` and `ids`.
    """

    def __init__(self, tokens: Tensor, predictions: TopK | None = None) -> None:
        self.tokens, self.predictions = tokens, predictions

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> Tensor:
        """Tokens of every block, (count,)."""
        return torch.full((len(self),), self.tokens.shape[1])

    @property
    def extremes(self) -> Tensor:
        """The smallest and the largest token."""
        return torch.stack(self.tokens.aminmax())

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Blocks(self.tokens[index], None if self.predictions is None else self.predictions[index])
        ids = self.tokens[index].long()
        taught = {} if self.predictions is None else vars(self.predictions[index])
        return {"input_ids": ids, "labels": ids, **taught}


class PackedRows(Sequence[Example]):
    """Several examples one after the other as one, of at most `size` tokens.

    position_ids begin at 0 in each: from them transformers knows that each sees itself alone. The first token of each
    is not predicted.
    """

    def __init__(self, rows: Any, size: int) -> None:
        self.rows, lengths = rows, rows.lengths
        self.packs = best_fit(lengths.tolist(), size)
        self.lengths = torch.tensor([int(lengths[pack].sum()) for pack in self.packs])
        self.extremes = rows.extremes

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: Any) -> Any:
        rows = [self.rows[at] for at in self.packs[index]]
        labels = [row["labels"].index_fill(0, torch.tensor([0]), IGNORED) for row in rows]
        ids = [row["input_ids"] for row in rows]
        positions = [torch.arange(len(row)) for row in ids]
        return {"input_ids": torch.cat(ids), "labels": torch.cat(labels), "position_ids": torch.cat(positions)}


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of items in bins of at most `size`: the longest first, each into the fullest bin that has room for it.

    The strategy of TRL's `pack_dataset` (bfd; Ding et al., arXiv 2404.10830). No length is above `size`.
    """
    bins: list[list[int]] = []
    by_space: dict[int, list[list[int]]] = {}  # of bins that are not full
    spaces: list[int] = []  # its keys with bins, in order
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        at = bisect_left(spaces, lengths[item])
        if at < len(spaces):
            space = spaces[at]
            chosen = by_space[space].pop()
            if not by_space[space]:
                del spaces[at]
        else:
            space, chosen = size, []
            bins.append(chosen)
        chosen.append(item)
        rest = space - lengths[item]
        if rest and not by_space.setdefault(rest, []):
            insort(spaces, rest)
        if rest:
            by_space[rest].append(chosen)
    return bins


@dataclass(frozen=True)
class DatasetSplit:
    """Examples to train on, perhaps packed, and examples to evaluate on, which have nothing in common.

    split: how they were told apart. counts: of what was left over, cut or held out. sha256: of what was read.
    teacher_loss: of recorded predictions, on what is held out.
    """

    train: Any
    evaluation: Any
    split: str
    counts: dict[str, int]
    sha256: str
    teacher_loss: float | None = None


def blocks_of_text(
    dataset: Any,
    tokenizer: "PreTrainedTokenizerBase",
    length: int,
    *,
    tokens: int,
    eval_items: int,
    options: TextOptions = TextOptions(),
) -> DatasetSplit:
    """A text as blocks of exactly `length` tokens, documents one after the other, no padding.

    The held-out part is that of the data set (c4, wikitext2: validation), or else the first tenth of the blocks:
    `welore evaluate --num-windows` reads from the beginning, too. tokens: how many will be read in training; further
    documents are not fetched. Tokens that do not fill a block at the end are left out and counted.
    """
    source, sha = open_text(dataset, options), hashlib.sha256()
    bos = Openings.of(tokenizer, options.bos, length).bos
    if bos != "text":  # other blocks of the same text
        sha.update(f"bos {bos}\0".encode())
    documents = source.training(tokens)
    if source.held_out is not None:
        held_out, _ = pack(tokenizer, _digested(source.held_out(), sha), length, bos=options.bos)
        train, unused = pack(tokenizer, _digested(documents, sha), length, bos=options.bos)
        split = source.split(tokens)
    else:
        enough = blocks_to_write(-(-tokens // length)) * length if tokens else None
        blocks, unused = pack(tokenizer, _digested(documents, sha), length, enough, options.bos)
        held_out, train, split = _first_tenth(blocks)
    if not len(train) or not len(held_out):
        raise WeLoreError(
            f"{source.name} gives {len(train) + len(held_out)} blocks of {length} tokens, training and evaluation need "
            "one each: take a longer text or a smaller --max-length"
        )
    counts = {"train_blocks": len(train), "held_out_blocks": len(held_out), "tokens_unused": unused}
    return DatasetSplit(Blocks(train), Blocks(held_out[:eval_items]), split, counts, sha.hexdigest())


def training_texts(dataset: Any, tokens: int, options: TextOptions = TextOptions()) -> list[str]:
    """The training part of `blocks_of_text` as text: that of the data set, or all but the first tenth."""
    source = open_text(dataset, options)
    if source.held_out is not None:
        return list(source.training(tokens))
    documents: list[str] = []
    characters = CHARACTERS_PER_TOKEN * tokens
    for document in source.training(tokens):
        documents.append(document)
        characters -= len(document)
        if characters <= 0:
            break
    text = source.separator.join(documents)
    return [text[len(text) // HELD_OUT :]]


def blocks_of_windows(windows: Tensor, name: str, *, eval_items: int, predictions: TopK | None = None) -> DatasetSplit:
    """Windows (count, length) of token ids as a dataset; the first tenth is held out.

    predictions: of a teacher at every position of the windows, (count, length, k).
    """
    held_out, train, split = _first_tenth(windows)
    counts = {"train_blocks": len(train), "held_out_blocks": len(held_out), "tokens_unused": 0}
    evaluation, border, sha256 = Blocks(held_out[:eval_items]), len(held_out), digest(windows.long())
    loss = None
    if predictions is not None:
        sha256 = hashlib.sha256(
            f"{sha256} {digest(predictions.ids)} {digest(predictions.logprobs)}".encode()
        ).hexdigest()
        loss = predictions[: len(evaluation)].loss(evaluation.tokens)
    taught = Blocks(windows, predictions)[border:]
    return DatasetSplit(taught, evaluation, f"{name}: {split}", counts, sha256, loss)


def blocks_to_write(train_blocks: int) -> int:
    """How many blocks leave `train_blocks` or more when the first tenth is held out."""
    return train_blocks + max(1, (train_blocks - 1) // (HELD_OUT - 1))


def pack(
    tokenizer: "PreTrainedTokenizerBase",
    documents: Iterable[str],
    length: int,
    enough: int | None = None,
    bos: BosName = "auto",
) -> tuple[Tensor, int]:
    """Blocks (count, length), int32, of the documents' tokens, an end token between documents; tokens left over.

    enough: documents after so many tokens are not read. bos: see `windows.Openings`.
    """
    openings = Openings.of(tokenizer, bos, length)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces: list[Tensor] = []
    total = 0
    for tokens in _token_ids(tokenizer, documents):
        ids = openings.without(tokens, first=not pieces)
        pieces.append(torch.tensor([*end, *ids] if pieces else ids, dtype=torch.int32))
        total += len(pieces[-1])
        if enough is not None and total >= enough:
            break
    stream = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32)
    opening = torch.tensor(openings.of_window, dtype=torch.int32)
    own = length - len(opening)
    count = len(stream) // own
    blocks = stream[: count * own].view(count, own)
    if len(opening):
        blocks = torch.cat([opening.expand(count, -1), blocks], dim=1)
    return blocks, len(stream) - count * own


def digest_of_texts(texts: Iterable[str]) -> str:
    """SHA-256 of texts, in order."""
    return hashlib.sha256(b"".join(text.encode() + b"\0" for text in texts)).hexdigest()


def _token_ids(tokenizer: "PreTrainedTokenizerBase", documents: Iterable[str]) -> Iterator[list[int]]:
    remaining = iter(documents)
    while texts := list(islice(remaining, TOKENIZED_AT_ONCE)):
        yield from tokenizer(texts, verbose=False).input_ids


def _digested(texts: Iterable[str], sha: Any) -> Iterator[str]:
    """The texts, added to a digest when they are read."""
    for text in texts:
        sha.update(text.encode() + b"\0")
        yield text


def _first_tenth(blocks: Tensor) -> tuple[Tensor, Tensor, str]:
    """Blocks held out, blocks to train on, and how they were told apart."""
    border = max(1, len(blocks) // HELD_OUT)
    return blocks[:border], blocks[border:], f"the first {border} of {len(blocks)} blocks are held out"
