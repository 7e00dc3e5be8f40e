"""The one door to text: a registered name, hub id, local file, list of strings or datasets.Dataset -> documents."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from welore.config import NONE, SELF, BosName
from welore.errors import WeLoreError, choose, first_line
from welore.io.context import RunContext
from welore.io.text_file import json_lines, local_path, read_plain, require_file, well_formed

C4_DOCUMENTS = 1100  # of the first validation file, as GPTQ and its successors take them
TOKENS_PER_DOCUMENT = 300  # of C4, cautiously: it has about 480
COLUMN = "text"
STREAMED = 1 << 62  # rows at most: as many as are read
FILES = (".txt", ".jsonl", ".parquet")
PARAGRAPH = "\n\n"
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")  # repository, configuration

Documents = Iterable[str]


@dataclass(frozen=True)
class TextOptions:
    """How a data set is read.

    split: of a hub data set, by default train, or test to evaluate. column: of the text. bos: see `windows.Openings`.
    """

    split: str | None = None
    column: str = COLUMN
    cache_dir: str | Path | None = None
    bos: BosName = "auto"

    @classmethod
    def of(cls, config: Any, context: RunContext) -> "TextOptions":
        """Those of a verb: `dataset_split`, `text_column` and `bos` of its config, and the cache of its context."""
        return cls(config.dataset_split, config.text_column or COLUMN, context.cache_dir, config.bos)


@dataclass(frozen=True)
class TextSource:
    """A text that can be read: the documents for an evaluation, and those to train on and to hold out.

    evaluation: documents, which `separator` joins to one text. training: documents of which so many tokens will be
    read; more need not be fetched. held_out: documents that are not among those, None where the first tenth of the
    training tokens is held out. split: how a record names the parts of so many tokens.
    """

    name: str
    evaluation: Callable[[], Documents]
    training: Callable[[int], Documents]
    held_out: Callable[[], Documents] | None = None
    separator: str = PARAGRAPH
    split: Callable[[int], str] = lambda tokens: ""


def open_text(dataset: Any, options: TextOptions = TextOptions()) -> TextSource:
    """The text of a registered name, hub id ("owner/name", "owner/name:config"), file, list or datasets.Dataset.

    Raises WeLoreError for unknown names; reading raises it for empty texts and for records without a text.
    """
    if not isinstance(dataset, str | Path):
        return _given_documents(dataset, options)
    name = str(dataset)
    path = local_path(name)
    if path.suffix in FILES:
        require_file(path)
        return _one_document(name, lambda: _file_text(path, options.column))
    if path.exists():
        raise WeLoreError(f"{name} is not one of the file kinds {', '.join(FILES)}")
    if name in RESERVED:
        raise WeLoreError(f"{name} is no text that can be read here: name a data set or a file")
    hub = HUB_ID.fullmatch(name)
    return choose("data set", name, DATASETS)(options) if hub is None else _hub(name, hub[1], hub[2], options)


def read_text(dataset: Any, options: TextOptions = TextOptions()) -> str:
    """The text of a data set for an evaluation, as one string; see open_text."""
    source = open_text(dataset, options)
    text = source.separator.join(source.evaluation())
    if not text.strip():
        raise WeLoreError(f"{source.name} holds no text")
    return text


def dataset_name(dataset: Any) -> str:
    """The name of a data set for records and messages."""
    if isinstance(dataset, str | Path):
        return str(dataset)
    return f"{type(dataset).__name__} of {len(dataset)} texts" if hasattr(dataset, "__len__") else "given texts"


def _wikitext2(options: TextOptions) -> TextSource:
    """Raw WikiText-2, rows joined by two newlines (the protocol of GPTQ and its successors); test part to evaluate."""

    def part(split: str) -> list[str]:
        rows = hub_rows("Salesforce/wikitext", "wikitext-2-raw-v1", split, None, options.cache_dir)
        return [PARAGRAPH.join(rows)]

    return TextSource(
        "wikitext2",
        evaluation=lambda: part("test"),
        training=lambda tokens: part("train"),
        held_out=lambda: part("validation"),
        split=lambda tokens: "the data set's own: train, validation",
    )


def _c4(options: TextOptions) -> TextSource:
    """The first 1100 validation documents of C4 (English), joined by a space (the protocol of GPTQ)."""

    def part(split: str, documents: int = C4_DOCUMENTS) -> list[str]:
        return list(hub_rows("allenai/c4", "en", split, documents, options.cache_dir))

    return TextSource(
        "c4",
        evaluation=lambda: part("validation"),
        training=lambda tokens: part("train", tokens // TOKENS_PER_DOCUMENT + 1),
        held_out=lambda: part("validation"),
        separator=" ",
        split=lambda tokens: (
            f"the data set's own: first {tokens // TOKENS_PER_DOCUMENT + 1} documents of train, "
            f"first {C4_DOCUMENTS} of validation"
        ),
    )


def _pydoc(options: TextOptions) -> TextSource:
    """The language reference that every Python carries: English, always there. The text varies with its version."""
    from pydoc_data.topics import topics

    return _one_document("pydoc", lambda: PARAGRAPH.join(topics[name] for name in sorted(topics)))


DATASETS: dict[str, Callable[[TextOptions], TextSource]] = {"wikitext2": _wikitext2, "c4": _c4, "pydoc": _pydoc}
RESERVED = (SELF, NONE)  # never names of data sets: text that the model writes, and no text


def _hub(name: str, repository: str, config: str | None, options: TextOptions) -> TextSource:
    """Any data set of the hub, streamed as far as it is read; the first tenth of what is trained on is held out."""

    def rows(split: str) -> Iterator[str]:
        return hub_rows(repository, config, options.split or split, STREAMED, options.cache_dir, options.column)

    return TextSource(name, evaluation=lambda: rows("test"), training=lambda tokens: rows("train"))


def hub_rows(
    name: str, config: str | None, split: str, limit: int | None, cache_dir: str | Path | None, column: str = COLUMN
) -> Iterator[str]:
    """The texts of a split of a hub data set: the first `limit` (streamed), or all (None: stored in the cache)."""
    from datasets import load_dataset

    try:
        if limit is None:
            cache = None if cache_dir is None else str(cache_dir)
            yield from texts(load_dataset(name, config, split=split, cache_dir=cache), name, column)
        else:
            yield from texts(load_dataset(name, config, split=split, streaming=True).take(limit), name, column)
    except WeLoreError:
        raise
    except Exception as error:  # datasets reads files of any kind, that anybody may have made
        raise WeLoreError(
            f"the data set {name} cannot be fetched ({first_line(error)}): connect once, or give a local "
            f"{', '.join(FILES)} file or the built-in `pydoc`"
        ) from error


def _one_document(name: str, read: Callable[[], str]) -> TextSource:
    def documents(tokens: int = 0) -> list[str]:
        text = read()
        if not text.strip():
            raise WeLoreError(f"{name} holds no text")
        return [text]

    return TextSource(name, documents, documents)


def _given_documents(dataset: Any, options: TextOptions) -> TextSource:
    """A list of strings, or a datasets.Dataset (or any iterable of records) with a column of text."""
    name = dataset_name(dataset)
    if not isinstance(dataset, Iterable) or isinstance(dataset, Mapping):
        kinds = "a name, a hub id, a file, a list of strings or a datasets.Dataset"
        raise WeLoreError(f"a dataset is {kinds}, not {type(dataset).__name__}")

    def documents(tokens: int = 0) -> Documents:
        if isinstance(dataset, Sequence) and all(isinstance(text, str) for text in dataset):
            return map(well_formed, dataset)
        return texts(dataset, name, options.column)

    return TextSource(name, documents, documents)


def texts(records: Iterable[Any], name: str | Path, column: str = COLUMN) -> Iterator[str]:
    """The text column of records; WeLoreError names the first record without a text."""
    for number, record in enumerate(records, start=1):
        text = record.get(column) if isinstance(record, Mapping) else None
        if not isinstance(text, str):
            raise WeLoreError(f"{name}, record {number}: field {column!r} is missing or not a text")
        yield well_formed(text)


def _file_text(path: Path, column: str) -> str:
    """The text of a .txt file as it is; the records of a .jsonl or .parquet file joined by two newlines."""
    if path.suffix == ".txt":
        return read_plain(path)
    records = _parquet(path, column) if path.suffix == ".parquet" else json_lines(path)
    return PARAGRAPH.join(texts(records, path, column))


def _parquet(path: Path, column: str) -> Iterator[dict[str, Any]]:
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(columns=[column]):
                yield from batch.to_pylist()
    except Exception as error:  # pyarrow reads a file that anybody may have made
        raise WeLoreError(f"{path} cannot be read as parquet: {first_line(error)}") from error
