"""Windows of token ids: cut from a text, written to a file, read back."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from welore.config import BosName, choices
from welore.data.text import TextOptions, read_text
from welore.errors import WeLoreError, choose, first_line
from welore.io.atomic import atomic_write
from welore.io.text_file import local_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOWS = ".safetensors"  # a file of windows: tokens, not text


@dataclass(frozen=True)
class TopK:
    """A teacher's prediction of the next token: k different tokens and their log-probabilities over the vocabulary.

    logprobs (..., k), floating; ids (..., k). The k likeliest tell most; any others are as true.
    """

    logprobs: Tensor
    ids: Tensor

    def __getitem__(self, index: Any) -> "TopK":
        return TopK(self.logprobs[index], self.ids[index])

    @torch.no_grad()
    def rest(self) -> Tensor:
        """The probability (...,) of all other tokens together."""
        return -torch.expm1(self.logprobs.float().logsumexp(-1).clamp(max=0))

    def loss(self, windows: Tensor) -> float:
        """Mean -log p of the next tokens in windows (count, length), of the predictions (count, length, k) there.

        A token that is not listed counts as likely as the least likely one that is: a bound from below.
        """
        logprobs, next_ids = self.logprobs[:, :-1].double(), windows[:, 1:, None]
        listed = self.ids[:, :-1] == next_ids
        own = logprobs.masked_fill(~listed, -torch.inf).amax(-1)
        return -float(torch.where(listed.any(-1), own, logprobs.amin(-1)).mean())


def evaluation_text(dataset: Any, options: TextOptions) -> tuple[str | Tensor, str]:
    """A text to evaluate on, or windows (count, length) of token ids that are given; and the SHA-256 of it."""
    if is_windows(dataset):
        ids = given_windows(dataset)
        return ids, digest(ids)
    text = read_text(dataset, options)
    return text, hashlib.sha256(text.encode()).hexdigest()


def windows(
    tokenizer: "PreTrainedTokenizerBase",
    text: str | Tensor,
    length: int,
    limit: int | None = None,
    bos: BosName = "auto",
) -> list[Tensor]:
    """Non-overlapping windows (length,) of the token ids of the whole text; the last one may be shorter.

    text: windows that are given stay as they are. limit: take only the first windows. bos: see `Openings`. A rest of
    one token predicts nothing and is left out.
    """
    if isinstance(text, Tensor):
        return list(text[:limit])
    if limit is not None and limit < 1:
        raise WeLoreError(f"windows is {limit}: it must be at least 1")
    openings = Openings.of(tokenizer, bos, length)
    ids = torch.tensor(openings.without(tokenizer(text, verbose=False).input_ids, first=True))
    opening = torch.tensor(openings.of_window, dtype=ids.dtype)
    pieces = [torch.cat([opening, piece]) for piece in ids.split(length - len(opening))]
    pieces = [window for window in pieces if len(window) > 1][:limit]
    if not pieces:
        raise WeLoreError("the text is shorter than two tokens")
    return pieces


def opening_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens that a tokenizer itself puts in front of a text: Llama's <s>, Gemma's <bos>; for many models none."""
    ids: list[int] = tokenizer("a").input_ids
    plain = tokenizer("a", add_special_tokens=False).input_ids
    return next((ids[:at] for at in range(len(ids)) if ids[at : at + len(plain)] == plain), [])


@dataclass(frozen=True)
class Openings:
    """Where texts that are cut into windows have the token (BOS) that some models expect in front of all they read.

    bos: "window", "never", or "text", which is also that of a tokenizer that puts nothing in front of a text. of_text:
    the tokenizer's own opening of a text. of_window: the tokens with which every window begins.
    """

    bos: BosName
    of_text: list[int]
    of_window: list[int]

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase", bos: BosName, length: int) -> "Openings":
        """The openings for windows of `length` tokens.

        bos: "window": every window begins with BOS; "text": a text does if its tokenizer says so; "never"; "auto":
        "window" if the tokenizer opens texts itself, as those of Llama and Gemma do.
        """
        choose("bos", bos, dict.fromkeys(choices(BosName)))
        own, token = opening_tokens(tokenizer), tokenizer.bos_token_id
        opening = own if bos in ("auto", "window") else []
        if bos == "window" and not own:
            if token is None:
                raise WeLoreError("bos is 'window', but this tokenizer has no BOS token: take 'auto' or 'never'")
            opening = [int(token)]
        if length < max(2, len(opening) + 1):
            raise WeLoreError(
                f"length is {length}: a window needs at least {max(2, len(opening) + 1)} tokens, one to predict from "
                "and one to predict"
            )
        return cls("window" if opening else "never" if bos == "never" and own else "text", own, opening)

    def without(self, ids: list[int], *, first: bool) -> list[int]:
        """The tokens of a text without the opening that it is not to have; first: whether a window begins with it."""
        removed = self.bos == "never" or (first and bool(self.of_window))
        return ids[len(self.of_text) :] if removed and ids[: len(self.of_text)] == self.of_text else ids


def is_windows(dataset: Any) -> bool:
    """Whether a data set is token ids, a tensor or a file, and no text."""
    return isinstance(dataset, Tensor) or (isinstance(dataset, str | Path) and str(dataset).endswith(WINDOWS))


def given_windows(dataset: Tensor | str | Path, length: int | None = None) -> Tensor:
    """Windows (count, length) of token ids, int64, of a tensor or a file of them; length: that a file must have."""
    name = "the dataset" if isinstance(dataset, Tensor) else str(dataset)
    ids = dataset if isinstance(dataset, Tensor) else _read_file(local_path(dataset))["windows"]
    no_ids = ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2 or no_ids:
        raise WeLoreError(
            f"{name} is a tensor of shape {tuple(ids.shape)}: give token ids (windows, length), whole numbers, length "
            ">= 2"
        )
    if length not in (None, ids.shape[1]) and not isinstance(dataset, Tensor):
        raise WeLoreError(f"{name} has windows of {ids.shape[1]} tokens, not of {length}")
    return ids.cpu().long()


def write_windows(path: Path, ids: Tensor, predictions: TopK | None = None) -> None:
    """Write windows (count, length) of token ids, so that several verbs read the same; a file that exists stays.

    predictions: of a teacher at every position, (count, length, k).
    """
    if path.is_file():
        return
    tensors = {"windows": ids.to(torch.int32)}
    if predictions is not None:
        tensors |= {"logprobs": predictions.logprobs.contiguous(), "ids": predictions.ids.to(torch.int32).contiguous()}
    with atomic_write(path) as partial:
        save_file(tensors, partial)


def given_predictions(path: str | Path) -> TopK:
    """The predictions of a teacher that a file of windows holds; WeLoreError if it has none that fit its windows."""
    tensors = _read_file(local_path(path))
    shape = tuple(tensors["windows"].shape)
    if {"logprobs", "ids"} - tensors.keys():
        raise WeLoreError(f"{path} holds windows without a teacher's predictions: name the teacher's directory")
    predictions = TopK(tensors["logprobs"], tensors["ids"])
    if predictions.ids.shape[:2] != shape or predictions.ids.shape != predictions.logprobs.shape:
        raise WeLoreError(f"{path}: its predictions are not those of its windows")
    return predictions


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
        return {"windows": tensors["windows"]} | tensors
    except Exception as error:  # safetensors reads a file that anybody may have made
        raise WeLoreError(f"{path} is no file of windows: {first_line(error)}") from error


def digest(ids: Tensor) -> str:
    """SHA-256 of token ids, int64, or of other numbers."""
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()


def require_known_tokens(model: Any, *texts: Tensor) -> None:
    """Raise WeLoreError for a token that the model's embedding does not have, and for a text without tokens."""
    size = len(model.get_input_embeddings().weight)
    for ids in texts:
        if not ids.numel():
            raise WeLoreError("the tokenizer gives no tokens for a text: copy the original model's tokenizer files")
        for token in map(int, ids.aminmax()):
            if not 0 <= token < size:
                raise WeLoreError(f"the tokenizer is another model's: it gives token {token}, this model knows {size}")


def stack(pieces: list[Tensor], batch_size: int) -> list[Tensor]:
    """Batches (b, length) of equally long windows, in order; b <= batch_size."""
    batches: list[list[Tensor]] = []
    for window in pieces:
        if batches and len(batches[-1]) < batch_size and len(batches[-1][0]) == len(window):
            batches[-1].append(window)
        else:
            batches.append([window])
    return [torch.stack(batch) for batch in batches]
