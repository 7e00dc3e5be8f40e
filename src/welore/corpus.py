"""Text: a data set of the hub, a local file or the built-in reference -> windows of tokens."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from welore.errors import WeLoreError, choose, first_line
from welore.files import whole_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

C4_DOCUMENTS = 1100  # of the first validation file, as GPTQ and its successors take them
FIELD = "text"


def wikitext2(cache_dir: str | Path | None = None) -> str:
    """Raw test part of WikiText-2, its rows joined by two newlines (the protocol of GPTQ and its successors)."""
    return "\n\n".join(hub_rows("Salesforce/wikitext", "wikitext-2-raw-v1", "test", None, cache_dir))


def c4(cache_dir: str | Path | None = None) -> str:
    """The first 1100 validation documents of C4 (English), joined by a space (the protocol of GPTQ)."""
    return " ".join(hub_rows("allenai/c4", "en", "validation", C4_DOCUMENTS, cache_dir))


def pydoc(cache_dir: str | Path | None = None) -> str:
    """The language reference that every Python carries: English, always there. The text varies with its version."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


CORPORA: dict[str, Callable[[str | Path | None], str]] = {"wikitext2": wikitext2, "c4": c4, "pydoc": pydoc}
FILES = (".txt", ".jsonl", ".parquet")
WINDOWS = ".safetensors"  # a file of windows: tokens, not text


def read_text(data: str, *, cache_dir: str | Path | None = None) -> str:
    """The text called `data`: a name of CORPORA or a local file.

    .txt is taken as it is; the records of a .jsonl or .parquet file are joined by two newlines, field "text".
    Raises WeLoreError for unknown names, empty texts, and records without that field (file, record, field).
    """
    path = Path(data).expanduser()
    if path.suffix in FILES:
        text = _read_file(path)
    elif path.exists():
        raise WeLoreError(f"{data} is not one of the file kinds {', '.join(FILES)}")
    else:
        text = choose("data set", data, CORPORA)(cache_dir)
    if not text.strip():
        raise WeLoreError(f"{data} holds no text")
    return text


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


def keep_windows(path: Path, found: Tensor) -> None:
    """Keep windows (count, length) of token ids in a file, so that several read the same; one that is there stays."""
    if not path.is_file():
        with whole_file(path) as partial:
            save_file({"windows": found.to(torch.int32)}, partial)


def kept_windows(path: str | Path, length: int | None = None, vocabulary: int | None = None) -> Tensor:
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


def _read_file(path: Path) -> str:
    if not path.is_file():
        raise WeLoreError(f"{path} does not exist")
    if path.suffix == ".txt":
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise WeLoreError(f"{path} is not UTF-8 text ({error})") from error
    records = _parquet(path) if path.suffix == ".parquet" else _jsonl(path)
    return "\n\n".join(_texts(records, path))


def _texts(records: Iterable[Any], path: Path) -> Iterator[str]:
    for number, record in enumerate(records, start=1):
        text = record.get(FIELD) if isinstance(record, Mapping) else None
        if not isinstance(text, str):
            raise WeLoreError(f"{path}, record {number}: field {FIELD!r} is missing or not a text")
        yield text


def _jsonl(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except ValueError as error:
                raise WeLoreError(f"{path}, line {number} is not JSON in UTF-8") from error


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(columns=[FIELD]):
                yield from batch.to_pylist()
    except (ValueError, OSError) as error:
        raise WeLoreError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from error


def hub_rows(name: str, subset: str, split: str, limit: int | None, cache_dir: str | Path | None) -> list[str]:
    """The texts of a split of a hub data set, the first `limit` of them (streamed) or all (kept in the cache)."""
    from datasets import load_dataset

    try:
        if limit is None:
            return list(load_dataset(name, subset, split=split, cache_dir=_text(cache_dir))[FIELD])
        rows = load_dataset(name, subset, split=split, streaming=True).take(limit)
        return [row[FIELD] for row in rows]
    except (OSError, ValueError) as error:
        raise WeLoreError(
            f"the data set {name} cannot be fetched ({str(error).splitlines()[0]}): connect once, or give a local "
            f"{', '.join(FILES)} file or the built-in `pydoc`"
        ) from error


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


def stack(found: list[Tensor], batch_size: int) -> list[Tensor]:
    """Batches (b, length) of equally long windows, in order; b <= batch_size."""
    batches: list[list[Tensor]] = []
    for window in found:
        if batches and len(batches[-1]) < batch_size and len(batches[-1][0]) == len(window):
            batches[-1].append(window)
        else:
            batches.append([window])
    return [torch.stack(batch) for batch in batches]
