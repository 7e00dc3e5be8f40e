"""export --format onnx: a model -> a directory for ONNX Runtime, made by transformers' own exporter.

One graph reads prompts, continues them and holds a cache of keys and values, so that the weights lie on the disk once.
"""

import contextlib
import dataclasses
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import nn

from welore.config import AUTO, CPU, OutType, RunOptions
from welore.errors import WeLoreError, first_line
from welore.io.atomic import atomic_directory, read_json, storage_reason, write_json
from welore.io.checkpoint import CONFIG, OWN_FIELDS, write_config
from welore.io.claim import claimed
from welore.io.context import RunContext
from welore.models.load import evaluating, load_model
from welore.models.replace import sizes
from welore.models.skeleton import reason

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {AUTO: AUTO, "f32": "float32", "f16": "float16", "bf16": "bfloat16"}
SAMPLE = (2, 5)  # token ids of the traced run: every size that it shows may be another one later


def export_onnx(
    model: "str | Path | PreTrainedModel", output: str | Path, outtype: OutType = AUTO, **options: Unpack[RunOptions]
) -> dict[str, Any]:
    """Write a model, compressed or not, as ONNX with its weights beside it; its sizes and notes.

    outtype: dtype of the weights; auto is that of the checkpoint. A directory is loaded into the memory of the host; a
    model in memory is exported as it is.
    """
    if outtype not in DTYPES:
        raise WeLoreError(f"outtype {outtype} is one of gguf: quantize the ONNX result with onnxruntime.quantization")
    context = dataclasses.replace(RunContext.create(**options), device=torch.device(CPU))
    with _silent():
        exporter, decompose, config = _exporter()
    with claimed(output, model, overwrite=context.overwrite, marker=CONFIG):
        loaded, source = model, None
        if not isinstance(loaded, nn.Module):
            ready = load_model(loaded, context, DTYPES[outtype])
            loaded, source = ready.model, ready.directory
        sample = torch.ones(SAMPLE, dtype=torch.int64, device=loaded.device)
        with atomic_directory(output, overwrite=context.overwrite) as directory:
            try:
                with evaluating(loaded), _silent():
                    inputs = {"input_ids": sample, "attention_mask": torch.ones_like(sample)}
                    parts = decompose(loaded, inputs, multi_token_decode=True)
                    exporter.export(*parts["decode"], config).save_pretrained(directory)
            except Exception as error:  # of models that they cannot trace two libraries make any error
                if isinstance(error, WeLoreError | MemoryError) or storage_reason(error):
                    raise
                raise WeLoreError(f"{model} cannot be exported to ONNX: {reason(error)}") from error
            if source is not None:
                write_config(source, directory, None)
            else:
                fields = read_json(directory / CONFIG)
                fields = {name: value for name, value in fields.items() if name not in OWN_FIELDS}
                write_json(directory / CONFIG, fields)
            size = sum(file.stat().st_size for file in directory.glob("model.onnx*"))
    note = "the graph reads input_ids, position_ids and a cache, which is empty for a prompt; low-rank products stay"
    return {"parameters": sizes(loaded)["parameters"], "bytes": size, "notes": [note]}


def _exporter() -> tuple[Any, Any, Any]:
    """The exporter of transformers, its function that separates reading from writing, and its settings."""
    try:
        from transformers.exporters import OnnxConfig, OnnxExporter
        from transformers.exporters.utils import decompose_for_generation

        return OnnxExporter(), decompose_for_generation, OnnxConfig(dynamic=True)
    except ImportError as error:
        raise WeLoreError(f"ONNX needs the packages of pip install 'welore[onnx]': {first_line(error)}") from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Nothing of what torch prints, warns and logs while it exports."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
