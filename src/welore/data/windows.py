"""Windows of token ids: cut from a text, kept in a file, read back."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from welore.errors import WeLoreError, first_line
from welore.io.atomic import atomic_write

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOWS = ".safetensors"  # a file of windows: tokens, not text


def windows(tokenizer: "PreTrainedTokenizerBase", text: str, length: int, limit: int | None = None) -> list[Tensor]:
    """Non-overlapping windows (length,) of the token ids of the whole text; the last one may be shorter.

    limit: take only the first windows. A rest of one token predicts nothing and is left out.
    """
    if length < 2:
        raise WeLoreError(
            f"length is {length}: a window needs at least 2 tokens, one to predict from and one to predict"
        )
    if limit is not None and limit < 1:
        raise WeLoreError(f"windows is {limit}: it must be at least 1")
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    found = [window for window in ids.split(length) if len(window) > 1][:limit]
    if not found:
        raise WeLoreError("the text is shorter than two tokens")
    return found


def write_windows(path: Path, found: Tensor) -> None:
    """Keep windows (count, length) of token ids in a file, so that several read the same; one that is there stays."""
    if not path.is_file():
        with atomic_write(path) as partial:
            save_file({"windows": found.to(torch.int32)}, partial)


def read_windows(path: str | Path, length: int | None = None, vocabulary: int | None = None) -> Tensor:
    """Windows (count, length) of such a file; WeLoreError for another file, another length or another model's tokens.

    length, vocabulary: of who is to read them.
    """
    try:
        found = load_file(path)["windows"].long()
    except (OSError, KeyError, SafetensorError) as error:
        raise WeLoreError(f"{path} is no file of windows: {first_line(error)}") from error
    if found.dim() != 2 or not found.numel():
        raise WeLoreError(f"{path} is no file of windows: its tensor has the shape {tuple(found.shape)}")
    if length not in (None, found.shape[1]):
        raise WeLoreError(f"{path} has windows of {found.shape[-1]} tokens, not of {length}")
    if vocabulary is not None and not 0 <= int(found.min()) <= int(found.max()) < vocabulary:
        raise WeLoreError(f"{path} has token {int(found.max())}, this model knows {vocabulary}: another model wrote it")
    return found


def digest(ids: Tensor) -> str:
    """SHA-256 of token ids, int64."""
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()


def stack(found: list[Tensor], batch_size: int) -> list[Tensor]:
    """Batches (b, length) of equally long windows, in order; b <= batch_size."""
    batches: list[list[Tensor]] = []
    for window in found:
        if batches and len(batches[-1]) < batch_size and len(batches[-1][0]) == len(window):
            batches[-1].append(window)
        else:
            batches.append([window])
    return [torch.stack(batch) for batch in batches]
