"""A Hugging Face directory from tensors that come one after another: shards, index, configuration, small files."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from welore.errors import DamagedWeightsError, WeLoreError
from welore.io.atomic import atomic_write, read_json, write_json
from welore.io.fields import typed
from welore.io.progress import Progress
from welore.io.safetensors_stream import TensorInfo, TensorWriter, readers_of

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PLAN, RECORD, CONFIG, CARD = "plan.json", "compression.json", "config.json", "README.md"
BOOTSTRAP = "modeling_welore.py"  # models/remote_code.py
ADAPTER = "adapter_config.json"
# Fetched from the hub beside the weights, and copied beside those of a result.
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*")
NOT_COPIED = (CONFIG, "*.index.json", "adapter_*", "trainer_state.json", PLAN, RECORD, BOOTSTRAP)
OWN_FIELDS = ("quantization_config", "transformers_weights")  # of config.json: they say how the weights are stored


@dataclass(frozen=True)
class OutputTensors:
    """A piece of the output that is made at once: one copied tensor, or what replaces one matrix.

    tensors: name -> dtype and shape, known beforehand. make: name -> the numbers, as flat pieces in order. layer: the
    layer that they change; None for a tensor that is copied.
    """

    tensors: Mapping[str, TensorInfo]
    make: Callable[[], Mapping[str, Iterable[Tensor]]]
    layer: str | None = None

    def renamed(self, rename: Callable[[str], str]) -> "OutputTensors":
        """The same under other names."""
        infos = {rename(name): info for name, info in self.tensors.items()}
        return OutputTensors(infos, lambda: {rename(n): chunks for n, chunks in self.make().items()}, self.layer)


def write_weights(directory: Path, steps: Sequence[OutputTensors], max_shard_size: str, progress: Progress) -> int:
    """Write all tensors into as many shards as save_pretrained would make; returns their bytes."""
    announced = {name: kind for step in steps for name, kind in step.tensors.items()}
    try:
        split = split_torch_state_dict_into_shards(
            {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in announced.items()},
            max_shard_size=max_shard_size,
            filename_pattern="model{suffix}.safetensors",
        )
    except ValueError as error:
        raise WeLoreError(f"max_shard_size is {max_shard_size!r}: write it like '500MB' or '5GB'") from error
    with ExitStack() as stack:
        writer_of: dict[str, TensorWriter] = {}
        for filename, names in split.filename_to_tensors.items():
            writer = TensorWriter(directory / filename, {name: announced[name] for name in names})
            writer_of |= dict.fromkeys(names, stack.enter_context(writer))
        sizes = [sum(info.bytes for info in step.tensors.values()) for step in steps]
        for step in progress(zip(steps, map(float, sizes), strict=True), "writing", float(sum(sizes))):
            for name, chunks in step.make().items():
                writer_of[name].write(name, chunks)
    if split.is_sharded:
        index = {"metadata": {"total_size": split.metadata["total_size"]}, "weight_map": split.tensor_to_filename}
        write_json(directory / INDEX, index)
    return sum((directory / filename).stat().st_size for filename in split.filename_to_tensors)


def write_config(
    source: Path,
    directory: Path,
    quantization: dict[str, Any] | None,
    change: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> None:
    """config.json with or without our quantization_config, and the tokenizer's and other small files.

    change: of the other content of config.json. Python files are copied where a configuration names them (auto_map):
    others load the result with them.
    """
    config = {key: value for key, value in read_config(source).items() if key not in OWN_FIELDS}
    if not (own := own_auto_map(config)):
        config.pop("auto_map", None)
    config = change(config)
    if quantization is not None:
        config["quantization_config"] = quantization
    with atomic_write(directory / CONFIG) as partial:  # JSON as Python writes it: families say Infinity
        partial.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    others = (path for path in source.glob("*config.json") if path.name != CONFIG)
    has_code = bool(own) or any(b'"auto_map"' in path.read_bytes() for path in others)
    for path in small_files(source):
        if (has_code or path.suffix != ".py") and not any(path.match(pattern) for pattern in NOT_COPIED):
            copy = directory / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def own_auto_map(config: Mapping[str, Any]) -> dict[str, Any]:
    """The classes that a model brings in files of its own: all but those of our file. config: of config.json."""
    auto_map: dict[str, Any] = typed(config.get("auto_map"), Mapping | None, "auto_map") or {}
    return {kind: path for kind, path in auto_map.items() if not str(path).startswith(BOOTSTRAP.removesuffix("py"))}


def small_files(directory: Path) -> list[Path]:
    """All files of a model but its weights, sorted."""
    paths = sorted((*directory.iterdir(), *directory.glob("additional_chat_templates/*")))
    return [path for path in paths if path.is_file() and any(path.match(pattern) for pattern in SMALL_FILES)]


def read_config(directory: Path) -> dict[str, Any]:
    """The content of config.json; WeLoreError without one, and for a LoRA adapter beside the model.

    transformers adds such an adapter to the weights when it loads a model, other libraries do not.
    """
    if (directory / ADAPTER).exists():
        raise WeLoreError(
            f"{directory} holds a LoRA adapter ({ADAPTER}): merge it into the model (merge_and_unload of peft) and "
            "save that elsewhere, or move the adapter's files away to leave it out"
        )
    if not (directory / CONFIG).is_file():
        hint = f"; {directory / 'model'} is one" if (directory / "model" / CONFIG).is_file() else ""  # of a run
        raise WeLoreError(f"{directory} is not a Hugging Face model: it has no {CONFIG}{hint}")
    config: dict[str, Any] = typed(read_json(directory / CONFIG), Mapping, str(directory / CONFIG))
    typed(config.get("quantization_config"), Mapping | None, f"quantization_config of {directory / CONFIG}")
    return config


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that `from_pretrained` reads of a directory; WeLoreError names one that is missing."""
    names = weight_names(directory)
    for name in names:
        if not os.path.isfile(directory / name):  # noqa: PTH113 - Path.is_file raises for a name of 300 letters
            others = [p.name for p in directory.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".h5", ".msgpack"}]
            why = f" (it has {others[0]}; only safetensors are read)" if others and names == [SINGLE] else ""
            raise WeLoreError(f"{directory} lacks {name}{why}: fetch the model again or convert it to safetensors")
    return [directory / name for name in names]


def weight_names(directory: Path) -> list[str]:
    """Names of the files in which `from_pretrained` looks for weights: a single file goes before an index."""
    index = _index(directory)
    return [index] if isinstance(index, str) else sorted(set(index.values()))


def _index(directory: Path) -> str | dict[str, str]:
    """The single file that is read, or tensor -> file of the index that is."""
    name = read_config(directory).get("transformers_weights")
    if name is None:
        name = SINGLE if (directory / SINGLE).is_file() or not (directory / INDEX).is_file() else INDEX
    if not typed(name, str, "transformers_weights").endswith(".index.json"):
        return str(name)
    path = directory / name
    index = typed(read_json(path), Mapping, str(path))
    typed(index.get("metadata"), Mapping, f"metadata of {path}")  # transformers reads no index without
    files: dict[str, str] = typed(index.get("weight_map"), dict[str, str], f"weight_map of {path}")
    if not files:
        raise WeLoreError(f"{path} names no file: fetch it again")
    return files


class CheckpointReader:
    """All tensors of a checkpoint directory by their names in the files; WeLoreError if one of them is not there.

    readers: name -> the reader of its file. entries: name -> dtype and shape.
    """

    def __init__(self, directory: Path) -> None:
        self.readers = readers_of(weight_files(directory))
        self.entries = {name: reader.entries[name] for name, reader in self.readers.items()}
        index = _index(directory)
        if missing := set(index if isinstance(index, dict) else ()) - set(self.entries):
            raise WeLoreError(f"{directory}: tensor {min(missing)} of its index is in none of its files")

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self.readers[name].read(name)

    def chunks(self, name: str) -> Iterator[Tensor]:
        """One tensor in flat pieces."""
        return self.readers[name].chunks(name)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise DamagedWeightsError if a float tensor holds NaN or Inf."""
    if not tensor.is_floating_point() or tensor.dtype.itemsize == 1 or not tensor.numel():
        return
    if not all(map(math.isfinite, map(float, torch.aminmax(tensor)))):  # NaN is both; no copy as isfinite makes
        raise DamagedWeightsError(f"{name} holds NaN or Inf: the checkpoint is damaged, nothing was written")
