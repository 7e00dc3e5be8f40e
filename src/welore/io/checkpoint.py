"""A Hugging Face directory from tensors that come one after another: shards, index, configuration, small files."""

import math
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
from welore.io.atomic import read_json, write_json
from welore.io.progress import Progress
from welore.io.safetensors_stream import TensorInfo, TensorReader, TensorWriter

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PLAN, RECORD = "plan.json", "compression.json"
COPIED = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
NOT_COPIED = {"config.json", INDEX, "pytorch_model.bin.index.json", PLAN, RECORD}


@dataclass(frozen=True)
class OutputTensors:
    """A piece of the output that is made at once: one copied tensor, or what replaces one matrix.

    tensors: name -> dtype and shape, known beforehand. make: name -> the numbers, as flat pieces in order. layer: the
    layer that they change; None for a tensor that is copied.
    """

    tensors: Mapping[str, TensorInfo]
    make: Callable[[], Mapping[str, Iterable[Tensor]]]
    layer: str | None = None


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


def write_config(source: Path, directory: Path, quantization: dict[str, Any] | None) -> None:
    """config.json with or without our quantization_config, and the tokenizer's and other small files."""
    config = {key: value for key, value in read_json(source / "config.json").items() if key != "quantization_config"}
    if quantization is not None:
        config["quantization_config"] = quantization
    write_json(directory / "config.json", config)
    for path in source.iterdir():
        small = path.suffix in COPIED or path.name.startswith("LICENSE")
        if path.is_file() and small and path.name not in NOT_COPIED:
            shutil.copyfile(path, directory / path.name)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint directory; WeLoreError names the first that is missing."""
    if not (directory / "config.json").is_file():
        raise WeLoreError(f"{directory} is not a Hugging Face model: it has no config.json")
    if (directory / INDEX).is_file():
        names = sorted(set(read_json(directory / INDEX)["weight_map"].values()))
    else:
        names = [SINGLE]
    for name in names:
        if not (directory / name).is_file():
            others = [p.name for p in directory.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".h5", ".msgpack"}]
            why = f" (it has {others[0]}; only safetensors are read)" if others and names == [SINGLE] else ""
            raise WeLoreError(f"{directory} lacks {name}{why}: fetch the model again or convert it to safetensors")
    return [directory / name for name in names]


class CheckpointReader:
    """All tensors of a checkpoint directory by their names in the files; WeLoreError if one of them is not there.

    entries: name -> dtype and shape.
    """

    def __init__(self, directory: Path) -> None:
        self._readers: dict[str, TensorReader] = {}
        self.entries: dict[str, TensorInfo] = {}
        for path in weight_files(directory):
            reader = TensorReader(path)
            self._readers |= dict.fromkeys(reader.entries, reader)
            self.entries |= reader.entries
        if (directory / INDEX).is_file():
            missing = set(read_json(directory / INDEX)["weight_map"]) - set(self.entries)
            if missing:
                raise WeLoreError(f"{directory}: tensor {min(missing)} of {INDEX} is in none of its files")

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self._readers[name].read(name)

    def chunks(self, name: str) -> Iterator[Tensor]:
        """One tensor in flat pieces."""
        return self._readers[name].chunks(name)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise DamagedWeightsError if a float tensor holds NaN or Inf."""
    if not tensor.is_floating_point() or tensor.dtype.itemsize == 1 or not tensor.numel():
        return
    if not all(map(math.isfinite, map(float, torch.aminmax(tensor)))):  # NaN is both; no copy as isfinite makes
        raise DamagedWeightsError(f"{name} holds NaN or Inf: the checkpoint is damaged, nothing was written")
