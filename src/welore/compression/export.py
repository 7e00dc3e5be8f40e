"""export: a model in a format that other programs read, or that takes fewer bytes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from welore.compression.export_gguf import export_gguf
from welore.compression.export_int8 import export_int8
from welore.compression.export_onnx import export_onnx
from welore.compression.info import stored_size
from welore.compression.merge import merge
from welore.config import AUTO, OutType, RunOptions, require_choice
from welore.errors import WeLoreError, choose
from welore.io.context import RunContext, own_modes
from welore.models.source import open_source
from welore.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def export_dense(
    model: "str | Path | PreTrainedModel", output: str | Path, **options: Unpack[RunOptions]
) -> dict[str, Any]:
    """Multiply the factors back, W = A B, as `merge` does; the sizes before and after."""
    context = RunContext.create(**options)
    before = stored_size(open_source(model, context))
    merge(model, output, **options)
    after = stored_size(open_source(output, context))
    note = (
        f"as the dense model; compressed it has {before['parameters']:,} parameters, {before['bytes'] / 1e6:,.1f} MB: "
        "nothing of the saving is left"
    )
    return after | {f"{name}_compressed": value for name, value in before.items()} | {"notes": [note]}


# Format -> a function (model, output, **options) that writes it; it gives the numbers of the record, among them
# "notes": sentences that the user has to read.
EXPORTS: dict[str, Callable[..., Mapping[str, Any]]] = {
    "dense": export_dense,
    "int8": export_int8,
    "gguf": export_gguf,
    "onnx": export_onnx,
}
WITH_OUTTYPE = ("gguf", "onnx")


def export(
    model: "str | Path | PreTrainedModel",
    output: str | Path,
    format: str = "dense",
    outtype: OutType = AUTO,
    **options: Unpack[RunOptions],
) -> Path:
    """Write a model in another format.

    Args:
        model: Hub id, directory or a model in memory (not for gguf), which dense and int8 change in place.
        output: The directory to write; for gguf the file.
        format: One of EXPORTS. dense: a plain checkpoint, W = A B, as `merge` makes it. int8: the same compressed
            model with its weights in 8 bits. gguf: for llama.cpp; low-rank matrices are multiplied back. onnx: for
            ONNX Runtime; low-rank matrices stay products of their factors.
        outtype: Type of the matrices in a gguf or onnx result.
        **options: Where downloads lie and what may be replaced (config.RunOptions).

    Returns:
        The output.

    Raises:
        WeLoreError: If the format is unknown, a package is absent, or the model cannot be written in this format.
    """
    exported(model, output, format, outtype, **options)
    return Path(output)


@own_modes()
def exported(
    model: "str | Path | PreTrainedModel",
    output: str | Path,
    format: str,
    outtype: OutType = AUTO,
    **options: Unpack[RunOptions],
) -> Record:
    """`export`, and its record: the sizes of the result, and the notes that a user has to read."""
    write = choose("format", format, EXPORTS)
    require_choice("outtype", outtype, OutType)
    if outtype != AUTO and format not in WITH_OUTTYPE:
        raise WeLoreError(f"outtype is {outtype}, which is for {' and '.join(WITH_OUTTYPE)}: leave it out for {format}")
    how: Any = {"outtype": outtype} if format in WITH_OUTTYPE else {}
    numbers = write(model, output, **how, **options)
    return Record("export", {"model": str(model)}, {"format": format, "outtype": outtype}, dict(numbers))
