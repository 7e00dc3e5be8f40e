"""Where matrices come from, one at a time: a checkpoint directory, a model in memory, either with other tensors."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from welore.errors import WeLoreError
from welore.io.checkpoint import CheckpointReader, OutputTensors, check_finite, small_files, weight_files
from welore.io.context import RunContext
from welore.io.hub import resolve_model
from welore.io.resume import file_states
from welore.io.safetensors_stream import FLOATS, TensorInfo, raw_bytes
from welore.layers.expert_names import is_of_expert
from welore.layers.int8 import SCALE, dequantize
from welore.models.completeness import require_complete
from welore.models.experts import FusedTensor, Slice, fused_names, slices_of, unfused, with_turned
from welore.models.key_names import Rename, loaded_name, saved_name
from welore.models.mlp import resize_layers
from welore.models.replace import has_module
from welore.models.skeleton import config_of, dense_skeleton, skeleton_of
from welore.models.targets import Target, find_targets, kind_of, shared_layers
from welore.records import Identity

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

FINGERPRINTED = 1024  # numbers of every matrix


class TensorSource(ABC):
    """The tensors of one model, under the names of its parameters.

    name: what the user called the model. skeleton: its tree of modules. targets: its targeted matrices. identity: its
    name and a fingerprint of the targeted weights. state: another text after any change of the weights.
    """

    name: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    skeleton: "PreTrainedModel"
    targets: list[Target]
    identity: Identity
    state: str

    @property
    def original(self) -> "TensorSource":
        """The source without the tensors that others stand for."""
        return self

    @abstractmethod
    def empty_skeleton(self) -> "PreTrainedModel":
        """A dense model of its own on the meta device: every module and shape, no memory."""

    @abstractmethod
    def names(self) -> Iterable[str]:
        """All tensors."""

    @abstractmethod
    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor."""

    @abstractmethod
    def chunks(self, name: str) -> Iterator[Tensor]:
        """A tensor in flat pieces, in order; WeLoreError if it holds NaN or Inf."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """A tensor as it is stored."""

    @abstractmethod
    def stored_name(self, name: str) -> str:
        """The name under which the files of a result hold a tensor of the model."""

    def read(self, target: Target) -> Tensor:
        """W (m, n) in its own dtype; WeLoreError if it holds NaN or Inf."""
        name = target.layer + ".weight"
        weight = self.tensor(name)
        check_finite(name, weight)
        return target.matrix(weight)

    def copied(self, name: str) -> OutputTensors:
        """A tensor as an output that is copied as it is."""
        return OutputTensors({name: self.info(name)}, lambda: {name: self.chunks(name)})

    def dtype(self, target: Target) -> torch.dtype:
        """The dtype in which a matrix is stored."""
        return self.info(target.layer + ".weight").dtype


def require_unwrapped(model: nn.Module) -> None:
    """Raise WeLoreError for anything but a model of transformers whose weights are its own."""
    from transformers import PreTrainedModel

    parts = {name.rpartition(".")[2] for name, _ in (*model.named_modules(), *model.named_parameters())}
    if not isinstance(model, PreTrainedModel) or parts & {"base_layer", "parametrizations", "weight_orig", "weight_v"}:
        raise WeLoreError(
            f"{type(model).__name__} is wrapped, or has adapters or parametrizations: give the model of "
            "transformers inside it, with adapters merged (merge_and_unload of peft)"
        )


class ModelSource(TensorSource):
    """A model in memory, whose tensors are read as they are at that time."""

    def __init__(self, model: "PreTrainedModel", include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        require_unwrapped(model)
        self.model = model
        self.name = model.config.name_or_path or type(model).__name__
        self.include, self.exclude = tuple(include), tuple(exclude)

    @cached_property
    def skeleton(self) -> "PreTrainedModel":  # type: ignore[override]
        """The model, or another one with its tensors whose experts are apart."""
        model: PreTrainedModel = unfused(self.model)
        return model

    @cached_property
    def targets(self) -> list[Target]:  # type: ignore[override]
        """The targeted matrices."""
        require_dense(self.model.config)
        targets = find_targets(self.skeleton, self.include, self.exclude)
        for target in targets:
            _require_float(f"{target.layer}.weight", self.skeleton.get_submodule(target.layer).weight.dtype)
        return targets

    @cached_property
    def identity(self) -> Identity:  # type: ignore[override]
        """Name and fingerprint of the weights."""
        weights = ((t, self.tensor(t.layer + ".weight").reshape(-1)) for t in self.targets)
        return Identity(self.name, _fingerprint(weights))

    @property
    def state(self) -> str:  # type: ignore[override]
        """A digest of all targeted weights: weights in memory have no files to look at."""
        digest = hashlib.sha256(self.identity.fingerprint.encode())
        for target in self.targets:
            digest.update(raw_bytes(self.tensor(target.layer + ".weight")))
        return digest.hexdigest()

    def empty_skeleton(self) -> "PreTrainedModel":
        """A dense model of its own on the meta device."""
        return dense_skeleton(self.model.config, type(self.model))

    def names(self) -> Iterator[str]:
        """Parameters, tied ones once, and the buffers that a checkpoint holds."""
        model = self.skeleton
        stored = model.state_dict()
        yield from (name for name, _ in (*model.named_parameters(), *model.named_buffers()) if name in stored)

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor."""
        tensor = self.tensor(name)
        return TensorInfo(tensor.dtype, tuple(tensor.shape))

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The tensor as one flat piece."""
        tensor = self.tensor(name)
        check_finite(name, tensor)
        yield tensor.flatten()

    def tensor(self, name: str) -> Tensor:
        """A tensor, a view; WeLoreError if it is offloaded."""
        layer, _, part = name.rpartition(".")
        tensor = getattr(self.skeleton.get_submodule(layer), part)
        assert isinstance(tensor, Tensor)
        if tensor.is_meta:
            raise WeLoreError(f"{name} is not in memory (offloaded?): load the model on one device")
        return tensor.detach()

    def stored_name(self, name: str) -> str:
        """As `save_pretrained` would write it."""
        return self._saved_name(name)

    @cached_property
    def _saved_name(self) -> Rename:
        return saved_name(self.skeleton)


class CheckpointSource(TensorSource):
    """A directory with config.json and safetensors, read one tensor at a time.

    targets: those that lie in the files under their own name; the others stay as they are.
    """

    def __init__(
        self,
        directory: Path,
        name: str | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self.directory, self.name = Path(directory), name or str(directory)
        self.include, self.exclude = tuple(include), tuple(exclude)
        self.trust_remote_code = trust_remote_code
        self._files = CheckpointReader(self.directory)

    @cached_property
    def config(self) -> "PretrainedConfig":
        """The configuration; WeLoreError if transformers does not know the architecture."""
        return config_of(self.directory, trust_remote_code=self.trust_remote_code)

    @cached_property
    def skeleton(self) -> "PreTrainedModel":  # type: ignore[override]
        """The dense model on the meta device."""
        return self.empty_skeleton()

    def empty_skeleton(self) -> "PreTrainedModel":
        """A dense model of its own on the meta device."""
        return skeleton_of(self.directory, self.name, trust_remote_code=self.trust_remote_code)

    def require_complete(self) -> "CheckpointSource":
        """Raise WeLoreError unless `from_pretrained` finds every tensor in the files; returns the source."""
        quantization: Any = getattr(self.config, "quantization_config", None)
        require_complete(self.directory, self.skeleton, quantization, self._files)
        return self

    @cached_property
    def targets(self) -> list[Target]:  # type: ignore[override]
        """The targeted matrices that lie in the files under their own name; the others stay as they are."""
        require_dense(self.config)
        targets = []
        names, shared = set(self.names()), shared_layers(self.skeleton)
        for target in find_targets(self.skeleton, self.include, self.exclude):
            name = target.name + ".weight"
            if name not in names:
                continue  # stored under another name or fused: counted by `census` as left dense
            shape, expected = self.info(name).shape, target.kind.stored_shape(target.shape)
            if shape != expected:
                raise WeLoreError(f"{name} has shape {shape}, config.json says {expected}")
            _require_float(name, self.info(name).dtype)
            stored = [other for layer in shared.get(target.name, ()) if (other := f"{layer}.weight") in names]
            if all(torch.equal(self.tensor(name), self.tensor(other)) for other in stored):  # else nothing ties them
                targets.append(target)
        if not targets:
            raise WeLoreError(f"{self.name}: none of the model's linear layers is stored under its own name")
        return targets

    @cached_property
    def identity(self) -> Identity:  # type: ignore[override]
        """Name and fingerprint of the weights."""
        return Identity(self.name, _fingerprint((t, self._beginning(t)) for t in self.targets))

    def _beginning(self, target: Target) -> Tensor:
        """The first numbers of a weight, flat."""
        name = f"{target.layer}.weight"
        if name in self._slices:
            return self._slices[name].read(self._files, -(-FINGERPRINTED // target.shape[1])).flatten()
        return next(self._files.chunks(self._key(name)))

    @property
    def state(self) -> str:  # type: ignore[override]
        """The fingerprint with the weight files' sizes and times, and the bytes of configuration and tokenizer."""
        small = [(path.name, path.read_bytes()) for path in small_files(self.directory)]
        digest = hashlib.sha256(repr(small).encode()).hexdigest()
        return f"{self.identity.fingerprint} {file_states(weight_files(self.directory))} {digest}"

    @cached_property
    def prefix(self) -> str:
        """The prefix that the files leave out of every name ("transformer." in old GPT-2 files), mostly ""."""
        prefix = getattr(self.skeleton, "base_model_prefix", "") + "."
        names = [name for name, _ in self.skeleton.named_parameters() if name.startswith(prefix)]
        stripped = any(name.removeprefix(prefix) in self._files.entries for name in names)
        return prefix if stripped and not any(name in self._files.entries for name in names) else ""

    @cached_property
    def _keys(self) -> dict[str, str]:
        """Name in the model -> name in the files; of experts that lie in 3-D tensors the names of those."""
        rename, keys = loaded_name(self.skeleton), dict[str, str]()
        for key in self._files.entries:
            name = rename(key)
            keys[key if name in keys else name] = key
        return keys

    @cached_property
    def _fused(self) -> dict[str, dict[str, Slice]]:
        """Name of a 3-D tensor of experts -> the tensors of single experts that it holds."""
        fused, keys, entries = with_turned(self._fused_names, self.turned), self._keys, self._files.entries
        return {n: slices_of(keys[n], n, fused[n], entries[keys[n]].shape[0]) for n in fused if n in keys}

    @cached_property
    def turned(self) -> list[str]:
        """The 3-D tensors of experts whose matrices lie the other way in the files (Qwen3-VL-MoE)."""
        first = {n: next(iter(slices_of("", n, tensor, 1).items())) for n, tensor in self._fused_names.items()}
        shapes = {n: self._files.entries[self._keys[n]].shape for n in first if n in self._keys}
        return [n for n in shapes if first[n][1].shape(shapes[n]) != self.skeleton.get_parameter(first[n][0]).shape]

    @cached_property
    def _fused_names(self) -> dict[str, FusedTensor]:
        return fused_names(self.skeleton)

    @property
    def single_experts(self) -> bool:
        """Whether the model is a dense mixture whose files hold every matrix of an expert by itself."""
        dense = getattr(self.config, "quantization_config", None) is None
        return dense and bool(self._fused_names) and not self._fused

    @cached_property
    def _saved_name(self) -> Rename:
        return saved_name(self.skeleton)

    @cached_property
    def _around_experts(self) -> str:
        """The prefix that only the files' names of experts have: the class for the text of Llama 4 drops it."""
        names = (name for name in self._keys if name in self._fused_names or is_of_expert(name))
        key, saved = next(((self._keys[name], self._saved_name(name)) for name in names), ("", ""))
        return key.removesuffix(saved) if key.endswith(saved) else ""

    @cached_property
    def _slices(self) -> dict[str, Slice]:
        return {name: part for parts in self._fused.values() for name, part in parts.items()}

    def stored_name(self, name: str) -> str:
        """As these files hold it; a factor where its layer is."""
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            own = name if end == len(parts) else ".".join([*parts[:end], "weight"])
            if own in self._slices or (own not in self._keys and own in self._fused_names):
                return self._around_experts + self._saved_name(name)
            key = self._keys.get(own)
            if key is not None and self.prefix + key != own:
                return key if end == len(parts) else ".".join([key.removesuffix(".weight"), *parts[end:]])
        return name

    def names(self) -> Iterator[str]:
        """All tensors of the files, in their order."""
        for name, key in self._keys.items():
            if key.removesuffix(f".{SCALE}") not in self.int8:
                yield from self._fused.get(name, (name,))

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor, from the header; of an int8 weight those of the matrix that it stands for."""
        key, entries = self._key(name), self._files.entries
        if name in self._slices:
            return TensorInfo(entries[key].dtype, self._slices[name].shape(entries[key].shape))
        if (layer := key.removesuffix(".weight")) not in self.int8:
            return entries[key]
        shape = entries[key].shape
        return TensorInfo(entries[f"{layer}.{SCALE}"].dtype, shape[::-1] if self._transposed(name) else shape)

    def chunks(self, name: str) -> Iterator[Tensor]:
        """A tensor in flat pieces of a few MiB; one that is made is one piece."""
        key = self._key(name)
        made = key.removesuffix(".weight") in self.int8 or name in self._slices
        for chunk in [self.tensor(name).flatten()] if made else self._files.chunks(key):
            check_finite(name, chunk)
            yield chunk

    def tensor(self, name: str) -> Tensor:
        """A tensor, read from its file; an int8 weight times its scales."""
        if name in self._slices:
            return self._slices[name].read(self._files)
        key = self._key(name)
        if (layer := key.removesuffix(".weight")) not in self.int8:
            return self._files.read(key)
        W = dequantize(self._files.read(key), self._files.read(f"{layer}.{SCALE}"))
        return W.T.contiguous() if self._transposed(name) else W

    @cached_property
    def int8(self) -> set[str]:
        """The layers, as the files name them, whose weight is stored in 8 bits with a scale beside it."""
        entries = self._files.entries
        layers = {key.removesuffix(f".{SCALE}") for key in entries if key.endswith(f".{SCALE}")}
        return {layer for layer in layers if (info := entries.get(f"{layer}.weight")) and info.dtype == torch.int8}

    def _transposed(self, name: str) -> bool:
        """Whether the dense model stores the weight W^T: int8 is stored row by row of W."""
        layer = name.removesuffix(".weight")
        kind = kind_of(self.skeleton.get_submodule(layer)) if has_module(self.skeleton, layer) else None
        return kind is not None and kind.transposed

    def _key(self, name: str) -> str:
        return self._slices[name].key if name in self._slices else self._keys.get(name, name)


class OverlaySource(TensorSource):
    """A source of which some layers have another size, and some tensors are made when they are read.

    shapes: layer -> shape (m, n) of its matrix. overrides: name of a tensor -> a function that makes it, as it is
    stored. The identity is that of the base.
    """

    def __init__(
        self, base: TensorSource, shapes: Mapping[str, tuple[int, int]], overrides: Mapping[str, Callable[[], Tensor]]
    ) -> None:
        self.base, self.overrides = base, dict(overrides)
        self.name, self.include, self.exclude = base.name, base.include, base.exclude
        self.identity, self.state = base.identity, base.state
        self.targets = [replace(target, shape=shapes.get(target.name, target.shape)) for target in base.targets]
        self.skeleton = self.empty_skeleton()
        resize_layers(self.skeleton, shapes)

    @property
    def original(self) -> TensorSource:
        """The base."""
        return self.base.original

    def empty_skeleton(self) -> "PreTrainedModel":
        """The dense model of the base."""
        return self.base.empty_skeleton()

    def names(self) -> Iterable[str]:
        """All tensors, those of the base."""
        return self.base.names()

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor."""
        info = self.base.info(name)
        if name not in self.overrides:
            return info
        return TensorInfo(info.dtype, tuple(attrgetter(name)(self.skeleton).shape))

    def stored_name(self, name: str) -> str:
        """As of the base."""
        return self.base.stored_name(name)

    def chunks(self, name: str) -> Iterator[Tensor]:
        """A tensor in flat pieces; one that is made is one piece."""
        return iter([self.overrides[name]().flatten()]) if name in self.overrides else self.base.chunks(name)

    def tensor(self, name: str) -> Tensor:
        """A tensor, made or read."""
        return self.overrides[name]() if name in self.overrides else self.base.tensor(name)


def _fingerprint(weights: Iterable[tuple[Target, Tensor]]) -> str:
    """SHA-256 over name, shape and the first numbers of every targeted weight as it is stored, as float32."""
    digest = hashlib.sha256()
    for target, flat in weights:
        digest.update(f"{target.name} {target.shape}".encode())
        digest.update(flat[:FINGERPRINTED].to(torch.float32).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _require_float(name: str, dtype: Any) -> None:
    if dtype not in FLOATS:
        raise WeLoreError(f"{name} has dtype {dtype}, which cannot be factored: give the model before it was quantized")


def require_dense(config: "PretrainedConfig") -> None:
    """Raise WeLoreError if a model is compressed or quantized."""
    quantization: Any = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    advice = "merge it first (`welore merge`)" if method == "welore" else "give the unquantized model"
    raise WeLoreError(f"this model is compressed already ({method}): {advice}")


def open_source(
    model: "str | Path | PreTrainedModel",
    context: RunContext,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> TensorSource:
    """The tensors of a model in memory, or of anything that `resolve_model` finds."""
    if isinstance(model, nn.Module):
        return ModelSource(model, include, exclude)
    directory = resolve_model(model, cache_dir=context.cache_dir, revision=context.revision)
    trust = context.trust_remote_code
    return CheckpointSource(directory, str(model), include, exclude, trust_remote_code=trust).require_complete()
