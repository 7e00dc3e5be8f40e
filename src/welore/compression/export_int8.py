"""export --format int8: a compressed model with its weights in 8 bits, one tensor after the other."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from welore.compression.info import size_of, stored_size
from welore.compression.merge import welore_config
from welore.config import SHARD_SIZE, RunOptions
from welore.errors import WeLoreError
from welore.io.checkpoint import PLAN, RECORD, CheckpointReader
from welore.io.claim import claimed, require_unread
from welore.io.context import RunContext
from welore.layers.int8 import INT8
from welore.models.card import read_card, write_card
from welore.models.int8 import with_int8
from welore.models.sink import open_sink
from welore.models.source import CheckpointSource, open_source
from welore.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def export_int8(
    model: "str | Path | PreTrainedModel", output: str | Path, **options: Unpack[RunOptions]
) -> dict[str, Any]:
    """Write a compressed model with its weights in 8 bits (layers.int8); the sizes of the result.

    Its plan and record are copied. A model in memory is changed in place.
    """
    context = RunContext.create(**options)
    with claimed(output, model, overwrite=context.overwrite, marker="config.json"):
        source = open_source(model, context)
        config = welore_config(source)
        if config is None:
            raise WeLoreError(f"{source.name} has no low-rank layers of welore: compress it with weights int8")
        if config.int8:
            raise WeLoreError(f"{source.name} is stored in 8 bits already: there is nothing to do")
        if isinstance(source, CheckpointSource):
            require_unread(output, source.directory)
        before = stored_size(source)
        outputs = [source.copied(name) for name in source.names()]
        config = with_int8(config, source.empty_skeleton(), outputs)
        with open_sink(source, output, max_shard_size=SHARD_SIZE, overwrite=context.overwrite) as sink:
            size = sink.write(outputs, config, context.progress)
            if isinstance(source, CheckpointSource) and sink.directory is not None:
                _copy_records(source.directory, sink.directory, size)
                write_card(sink.directory, source.name, read_card(source.directory))
    after = size_of(CheckpointReader(Path(output)).entries)
    return after | {"notes": [f"before its weights were int8 it took {before['bytes'] / 1e6:,.1f} MB"]}


def _copy_records(source: Path, directory: Path, size: int) -> None:
    if (source / PLAN).is_file():
        shutil.copyfile(source / PLAN, directory / PLAN)
    if (record := Record.load_if_there(source / RECORD)) is not None:
        settings, numbers = record.settings | {"weights": INT8}, record.numbers | {"bytes": size}
        replace(record, settings=settings, numbers=numbers).save(directory / RECORD)
