"""Windows of token ids: cut from a text, written to a file, read back."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from welore.data.text import TextOptions, read_text
from welore.errors import WeLoreError, first_line
from welore.io.atomic import atomic_write

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOWS = ".safetensors"  # a file of windows: tokens, not text


def evaluation_text(dataset: Any, options: TextOptions) -> tuple[str | Tensor, str]:
    """A text to evaluate on, or windows (count, length) of token ids that are given; and the SHA-256 of it."""
    if is_windows(dataset):
        ids = given_windows(dataset)
        return ids, digest(ids)
    text = read_text(dataset, options)
    return text, hashlib.sha256(text.encode()).hexdigest()


def windows(
    tokenizer: "PreTrainedTokenizerBase", text: str | Tensor, length: int, limit: int | None = None
) -> list[Tensor]:
    """Non-overlapping windows (length,) of the token ids of the whole text; the last one may be shorter.

    text: windows that are given stay as they are. limit: take only the first windows. A rest of one token predicts
    nothing and is left out.
    """
    if isinstance(text, Tensor):
        return list(text[:limit])
    if length < 2:
        raise WeLoreError(
            f"length is {length}: a window needs at least 2 tokens, one to predict from and one to predict"
        )
    if limit is not None and limit < 1:
        raise WeLoreError(f"windows is {limit}: it must be at least 1")
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    pieces = [window for window in ids.split(length) if len(window) > 1][:limit]
    if not pieces:
        raise WeLoreError("the text is shorter than two tokens")
    return pieces


def is_windows(dataset: Any) -> bool:
    """Whether a data set is token ids, a tensor or a file, and no text."""
    return isinstance(dataset, Tensor) or (isinstance(dataset, str | Path) and str(dataset).endswith(WINDOWS))


def given_windows(dataset: Tensor | str | Path, length: int | None = None, vocabulary: int | None = None) -> Tensor:
    """Windows (count, length) of token ids, int64, of a tensor or a file of them.

    length, vocabulary: of the model that is to read a file.
    """
    if not isinstance(dataset, Tensor):
        return _read_windows(dataset, length, vocabulary)
    if dataset.ndim != 2 or dataset.shape[0] < 1 or dataset.shape[1] < 2 or dataset.is_floating_point():
        raise WeLoreError(
            f"the dataset is a tensor of shape {tuple(dataset.shape)}: give token ids (windows, length), length >= 2"
        )
    return dataset.cpu().long()


def write_windows(path: Path, ids: Tensor) -> None:
    """Write windows (count, length) of token ids, so that several verbs read the same; a file that exists stays."""
    if not path.is_file():
        with atomic_write(path) as partial:
            save_file({"windows": ids.to(torch.int32)}, partial)


def _read_windows(path: str | Path, length: int | None, vocabulary: int | None) -> Tensor:
    try:
        ids = load_file(path)["windows"].long()
    except (OSError, KeyError, SafetensorError) as error:
        raise WeLoreError(f"{path} is no file of windows: {first_line(error)}") from error
    if ids.dim() != 2 or not ids.numel():
        raise WeLoreError(f"{path} is no file of windows: its tensor has the shape {tuple(ids.shape)}")
    if length not in (None, ids.shape[1]):
        raise WeLoreError(f"{path} has windows of {ids.shape[-1]} tokens, not of {length}")
    if vocabulary is not None and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise WeLoreError(f"{path} has token {int(ids.max())}, this model knows {vocabulary}: another model wrote it")
    return ids


def digest(ids: Tensor) -> str:
    """SHA-256 of token ids, int64."""
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()


def stack(pieces: list[Tensor], batch_size: int) -> list[Tensor]:
    """Batches (b, length) of equally long windows, in order; b <= batch_size."""
    batches: list[list[Tensor]] = []
    for window in pieces:
        if batches and len(batches[-1]) < batch_size and len(batches[-1][0]) == len(window):
            batches[-1].append(window)
        else:
            batches.append([window])
    return [torch.stack(batch) for batch in batches]
