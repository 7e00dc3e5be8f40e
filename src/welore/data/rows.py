"""A data set with columns, of the hub, of files or in memory -> tables of datasets, in one of TRL's formats."""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from welore.config import FinetuneConfig
from welore.data.text import HUB_ID, dataset_name
from welore.errors import WeLoreError, choose, first_line
from welore.io.text_file import json_lines, local_path, require_file

# Shape -> the columns that tell it, in the order in which they are looked for. Texts are packed: see packing.
SHAPES = {
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
OPTIONAL = ("input", "tools", "chat_template_kwargs")  # columns that are read where there are any
READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}  # kind of file -> of datasets
AT_ONCE = 1000  # rows
OF_ROWS = "loss_on_prompt", "packing", "eval_dataset", "eval_split"  # settings


@dataclass(frozen=True)
class Rows:
    """A data set with the columns of a shape, under the shape's own names.

    train, held_out: datasets.Dataset; held_out None: the last tenth of train.
    """

    name: str
    shape: str
    train: Any
    held_out: Any = None


def open_rows(config: FinetuneConfig, limit: int | None, cache_dir: str | Path | None = None) -> Any:
    """The Rows of config.dataset; for a text, the data set as `text.open_text` takes it.

    A hub id, a .json, .jsonl, .parquet or .csv file, a datasets.Dataset, IterableDataset or DatasetDict, or any
    iterable of records. Files and the hub's data are memory-mapped by datasets in `cache_dir`. limit: so many rows are
    read of an iterable without length; None: all. Raises WeLoreError for what cannot be read, and for other columns.
    """
    split, own = config.dataset_split, config.eval_split
    first, dataset = _first_row(config.dataset, split or "train")
    if first is None:
        return dataset
    columns = ("text", "messages", "prompt", "completion")
    names = {name: given for name in columns if (given := getattr(config, f"{name}_column")) is not None}
    shape = _shape(dataset_name(dataset), list(first), names)
    if shape == "text":  # of which the other door reads all but these kinds of files
        others = isinstance(dataset, Mapping) or Path(str(dataset)).suffix in (".json", ".csv")
        return _table(dataset, split, limit, cache_dir) if others else dataset
    tables = [_table(dataset, split, limit, cache_dir)]
    if config.eval_dataset is not None:
        theirs = own or ("validation" if "validation" in _splits(config.eval_dataset) else None)
        tables.append(_table(config.eval_dataset, theirs, limit, cache_dir))
    elif own or (config.dataset_split is None and "validation" in _splits(dataset)):
        tables.append(_table(dataset, own or "validation", limit, cache_dir))
    needed = [names.get(column, column) for column in SHAPES[shape]]
    for part, table in zip(("", "held-out "), tables, strict=False):
        if not len(table):
            raise WeLoreError(f"{dataset_name(dataset)} has no {part}rows")
        if table.format["type"] == "custom":  # which `_select` takes away
            raise WeLoreError("rows with a transform are read without it: apply it by map")
        if not {*needed}.issubset(table.column_names):
            given, wanted = ", ".join(table.column_names), " and ".join(needed)
            raise WeLoreError(f"the {part}rows have the columns {given}: needed are {wanted}")
    return Rows(dataset_name(dataset), shape, *(_select(table, shape, names) for table in tables))


def refuse_of_rows(config: FinetuneConfig, why: str, names: Sequence[str] = OF_ROWS) -> None:
    """Raise WeLoreError for settings of rows that are given where there are none."""
    given = [name for name in names if getattr(config, name) is not None and getattr(config, name) is not False]
    if given:
        go = "go" if len(given) > 1 else "goes"
        raise WeLoreError(f"{' and '.join(given)} {go} with conversations, or prompts and completions; {why}")


def _shape(name: str, columns: Sequence[str], names: Mapping[str, str]) -> str:
    """The shape that the given names decide, or else the first whose columns are there."""
    for shape, needed in SHAPES.items():
        if (not names or names.keys() & {*needed}) and all(names.get(column, column) in columns for column in needed):
            return shape
    raise WeLoreError(
        f"{name} has the columns {', '.join(map(str, columns))}: needed are text, messages, prompt and completion, or "
        "instruction and output; text_column, messages_column, prompt_column and completion_column give other names"
    )


def _select(table: Any, shape: str, names: Mapping[str, str]) -> Any:
    """The columns of the shape alone, under its own names."""
    columns = {names.get(column, column): column for column in (*SHAPES[shape], *OPTIONAL)}
    table = table.with_format(None).select_columns([name for name in table.column_names if name in columns])
    return table.rename_columns({column: columns[column] for column in table.column_names})


def _source(dataset: Any) -> dict[str, Any]:
    """The arguments of datasets.load_dataset for a file or a hub id; none for anything else."""
    if not isinstance(dataset, str | Path):
        return {}
    path = local_path(dataset)
    if path.suffix in READERS:
        require_file(path)
        return {"path": READERS[path.suffix], "data_files": str(path)} | (
            _all_text(path) if path.suffix == ".csv" else {}
        )
    hub = HUB_ID.fullmatch(str(dataset))
    return {} if hub is None or path.exists() else {"path": hub[1], "name": hub[2]}


def _all_text(path: Path) -> dict[str, Any]:
    """Options by which a .csv file is read as it is written: "1." and "NA" are answers, too."""
    from datasets import Features, Value

    with path.open(newline="", encoding="utf-8-sig") as file:
        columns = next(csv.reader(file), [])
    return {"features": Features(dict.fromkeys(columns, Value("string"))), "keep_default_na": False}


def _first_row(dataset: Any, split: str) -> tuple[Mapping[str, Any] | None, Any]:
    """The first row, None for what has no columns; and the data set, from which nothing is missing."""
    from datasets import load_dataset

    with _readable(dataset):
        source = _source(dataset)
        if str(dataset).endswith(".jsonl") and source:
            rows = json_lines(local_path(dataset))
        elif "features" in source:
            rows = iter([source["features"]])
        elif source:  # nothing is fetched yet but this row
            rows = iter(load_dataset(**source, split=split.partition("[")[0], streaming=True))
        elif isinstance(dataset, str | Path) or not isinstance(dataset, Iterable):
            return None, dataset
        else:
            rows = iter(choose("split", split, dataset) if isinstance(dataset, Mapping) else dataset)
        row = next(rows, None)
    return row if isinstance(row, Mapping) else None, chain([row], rows) if rows is dataset else dataset


def _table(dataset: Any, split: str | None, limit: int | None, cache_dir: str | Path | None) -> Any:
    """A split, train for None, as a datasets.Dataset: mapped from a file or the hub, in memory from an iterable."""
    from datasets import Dataset, concatenate_datasets, load_dataset

    with _readable(dataset):
        source = _source(dataset)
        if source:
            cache = None if cache_dir is None else str(cache_dir)
            return load_dataset(**source, split=split or "train", cache_dir=cache)
        if isinstance(dataset, Mapping):
            dataset = choose("split", split or "train", dataset)
        elif split is not None:
            raise WeLoreError(f"{dataset_name(dataset)} has no splits, but rows: leave split {split} out")
        if isinstance(dataset, Dataset):
            return dataset
        rows = islice(dataset, None if hasattr(dataset, "__len__") else limit)
        return concatenate_datasets([Dataset.from_list(part) for part in iter(lambda: [*islice(rows, AT_ONCE)], [])])


def _splits(dataset: Any) -> Iterable[str]:
    """The names of the splits of a hub data set or a datasets.DatasetDict."""
    from datasets import get_dataset_split_names

    with _readable(dataset):
        source = _source(dataset)
        own = get_dataset_split_names(source["path"], source["name"]) if "name" in source else ()
    return dataset if isinstance(dataset, Mapping) else own


@contextmanager
def _readable(dataset: Any) -> Iterator[None]:
    """Any error of a reader as one sentence: datasets reads files of any kind, that anybody may have made."""
    try:
        yield
    except WeLoreError:
        raise
    except Exception as error:
        remote = isinstance(dataset, str) and not local_path(dataset).exists()
        how = ": connect once, or give a local file" if remote else ""
        why = first_line(error.__cause__ or error)
        raise WeLoreError(f"the data set {dataset_name(dataset)} cannot be read ({why}){how}") from error
