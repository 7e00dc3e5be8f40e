"""Text: a data set of the hub, a local file or the built-in reference -> windows of tokens."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from welore.errors import WeLoreError, choose

if TYPE_CHECKING:
    pass

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
