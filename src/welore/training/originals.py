"""The model before its training: frozen tensors stay so bit for bit, and a model in memory gets all else back."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from welore.errors import DivergedError, WeLoreError
from welore.io.atomic import read_json, write_json
from welore.io.checkpoint import CheckpointReader, OutputTensors, weight_files, write_config, write_weights
from welore.io.pages import give_back
from welore.io.progress import silent
from welore.io.resume import file_states
from welore.io.safetensors_stream import TensorInfo
from welore.models.experts import experts_of, fused_outputs
from welore.models.remote_code import add_bootstrap
from welore.models.source import CheckpointSource

if TYPE_CHECKING:
    from welore.training.methods import MarkedModel


@dataclass(frozen=True)
class Originals:
    """The parameters of a model before its training.

    directory: of its checkpoint; None for a model in memory, of which `data` holds the tensors. names: of the
    parameters, by their id. dtypes: by their names. state: of the checkpoint's files.
    """

    directory: Path | None
    names: Mapping[int, str]
    dtypes: Mapping[str, torch.dtype]
    data: Mapping[str, Tensor]
    state: Sequence[Any] = ()

    @classmethod
    def of(cls, model: nn.Module, directory: Path | None) -> "Originals":
        """Those of a model that nothing has been done to yet."""
        named = dict(model.named_parameters())
        data = {name: p.data for name, p in named.items()} if directory is None else {}
        names, dtypes = {id(p): name for name, p in named.items()}, {name: p.dtype for name, p in named.items()}
        return cls(directory, names, dtypes, data, () if directory is None else _files(directory))

    def readable(self, *, exact: bool) -> bool:
        """Whether the checkpoint is as it was; if not, its frozen tensors are those in memory if these are `exact`."""
        try:
            same = self.directory is not None and _files(self.directory) == self.state
        except (OSError, WeLoreError):
            same = False
        if not same and self.directory is not None and not exact:
            raise WeLoreError(f"{self.directory} was changed while its model was trained: put it back and resume")
        return same

    def trained(self, marked: "MarkedModel") -> set[str]:
        """The names of the parameters that a training changes: those it trains, and those that get adapters."""
        named = marked.model.named_parameters()
        changed = {id(p) for name, p in named if p.requires_grad or name.endswith(".base_layer.weight")}
        return {self.names[key] for key in changed & self.names.keys()}

    def merged(self, marked: "MarkedModel", dtype: torch.dtype | None) -> Any:
        """The ordinary model: adapters are merged into the weights as they were, in float32, whatever was computed in.

        dtype: of the result, None for that of before. One matrix at a time is in float32, where it is.
        """
        for layer in marked.model.modules():
            if hasattr(layer, "merged_adapters"):
                weight = layer.get_base_layer().weight
                name, frozen, device = self.names[id(weight)], weight.data, weight.device
                layer.to(device)  # the adapters, of a weight that stays on the host
                weight.data = self._original(name, frozen).to(device, torch.float32, copy=True)
                layer.merge()
                weight.data = weight.data.to(dtype or self.dtypes[name])
                give_back([frozen])  # of its file, which nobody reads again
                weight.requires_grad_()  # it has been trained
        return marked.model.unload() if hasattr(marked.model, "unload") else marked.model

    def restored(self, name: str, now: Tensor, trained: set[str], dtype: torch.dtype | None) -> Tensor:
        """A parameter after the training, in `dtype` or its own; a frozen one of a model in memory as it was."""
        if name not in self.dtypes:
            return now  # a buffer
        before = now if name in trained else self.data.get(name, now)
        after = before.to(now.device, dtype or self.dtypes[name])
        if name in trained and not isinstance(after, DTensor) and not bool(after.isfinite().all()):
            raise DivergedError(
                f"{name} has become NaN or too large for {str(after.dtype).removeprefix('torch.')}: try a smaller "
                "learning_rate, or save_dtype float32; earlier checkpoints are kept"
            )
        return after

    def write(self, directory: Path, model: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
        """Write the checkpoint of a model from a directory: `tensors` are new, all others are copied.

        tensors: the trained ones by all their names in the model. dtype: of all of them; None: of each as it was.
        """
        from transformers.core_model_loading import revert_weight_conversion

        assert self.directory is not None
        files = CheckpointSource(self.directory)
        compression = read_json(self.directory / "config.json").get("quantization_config")
        if compression is None and experts_of(model):  # as of a plan
            outputs = [_output(name, files.info(name), tensors.get(name), files, dtype) for name in files.names()]
            outputs = [output.renamed(files.stored_name) for output in fused_outputs(outputs, files.skeleton)]
        else:
            new, source = dict(revert_weight_conversion(model, dict(tensors))), CheckpointReader(self.directory)
            names = {key: key if key in new else files.prefix + key for key in source.entries}
            outputs = [_output(key, info, new.get(names[key]), source, dtype) for key, info in source.entries.items()]
        write_weights(directory, outputs, "50GB", silent)
        change = partial(add_bootstrap, self.directory, directory) if compression else dict
        write_config(self.directory, directory, compression, change)
        if dtype is not None:
            config = read_json(directory / "config.json")
            config.pop("torch_dtype", None)  # its older name
            write_json(directory / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})

    def _original(self, name: str, now: Tensor) -> Tensor:
        """A frozen parameter as it was before the training rounded it."""
        if self.directory is None:
            return self.data[name]
        source = CheckpointSource(self.directory)
        return source.tensor(name) if name in set(source.names()) else now


def _files(directory: Path) -> Sequence[Any]:
    """Sizes and times of the weight files and config.json."""
    return file_states([*weight_files(directory), directory / "config.json"])


def _output(
    key: str,
    stored: TensorInfo,
    new: Tensor | None,
    source: CheckpointReader | CheckpointSource,
    dtype: torch.dtype | None,
) -> OutputTensors:
    """A tensor of a file, or the new one in its place, in `dtype` or its own."""
    kind = dtype if dtype is not None and stored.dtype.is_floating_point else stored.dtype
    info = TensorInfo(kind, stored.shape)
    if new is None:
        return OutputTensors({key: info}, lambda: {key: (chunk.to(info.dtype) for chunk in source.chunks(key))})
    return OutputTensors({key: info}, lambda: {key: [new.detach().to(info.dtype).flatten()]})


def is_checkpointing(model: Any) -> bool:
    """Whether a model computes activations again in the backward pass; its attribute has an older and a newer name."""
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    return bool(next((getattr(model, name) for name in names if hasattr(type(model), name)), False))


@contextmanager
def same_randomness(device: torch.device) -> Iterator[None]:
    """The generators of torch, NumPy and Python, which the Trainer seeds, go on afterwards as if it had not."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def borrowed(model: Any) -> Iterator[None]:
    """A model in memory, whose trained parameters alone are changed afterwards, also by an error or Ctrl-C.

    Modules, their modes, dtypes, gradients, what requires them and how the model is called are again what they were.
    """
    modules = [(m, dict(m._modules), m.training, set(m._forward_hooks)) for m in model.modules()]
    parameters = [(p, p.data, p.requires_grad, p.grad) for p in model.parameters()]
    attributes, checkpointing = dict(model.__dict__), is_checkpointing(model)
    for parameter, *_ in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        if is_checkpointing(model) and not checkpointing:
            (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()
        for module, children, training, hooks in modules:
            module._modules.update(children)
            for key in module._forward_hooks.keys() - hooks:
                del module._forward_hooks[key]
            module.training = training
        for name in ("forward", "_original_forward", "peft_config"):  # of accelerate's mixed precision, of peft
            model.__dict__.pop(name, None)
            model.__dict__.update({name: attributes[name]} if name in attributes else {})
        for parameter, data, required, gradient in parameters:
            parameter.grad = None
            parameter.data = (parameter.data if parameter.requires_grad else data).to(parameter.device, data.dtype)
            parameter.requires_grad_(required)
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
