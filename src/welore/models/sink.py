"""Where the tensors of a result go: a checkpoint directory, or the model in memory whose layers are exchanged."""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from welore.config import SHARD_SIZE
from welore.errors import WeLoreError
from welore.io.atomic import atomic_directory
from welore.io.checkpoint import OutputTensors, write_config, write_weights
from welore.io.progress import Progress
from welore.layers.remaining import Remaining
from welore.models.expert_pruning import ExpertPruning
from welore.models.experts import fuse, fused_outputs, unfuse
from welore.models.int8 import quantize_layers, quantized_tensors
from welore.models.key_names import Rename, of_layer, saved_name
from welore.models.quantizer import WeLoreConfig
from welore.models.remote_code import add_bootstrap
from welore.models.replace import build_layer, has_module, restore_layer, share_layer, sizes
from welore.models.resizing import Resizing
from welore.models.saving import forget_compression, remember_companions
from welore.models.skeleton import dense_skeleton
from welore.models.source import CheckpointSource, TensorSource
from welore.models.targets import shared_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Change = WeLoreConfig | Resizing | None  # of config.json; None: of a dense result


class DirectorySink:
    """A checkpoint directory, written one tensor at a time.

    source: the directory of the original model. rename: name in the model -> name in the files. skeleton: the dense
    model, needed for weights in 8 bits and for experts. turned: names of experts' 3-D tensors for `fused_outputs`.
    """

    def __init__(
        self,
        source: Path,
        directory: Path,
        max_shard_size: str = SHARD_SIZE,
        rename: Rename = str,
        skeleton: "PreTrainedModel | None" = None,
        turned: Collection[str] = (),
    ) -> None:
        self.source, self.directory, self.max_shard_size = source, directory, max_shard_size
        self.rename, self.skeleton, self.turned = rename, skeleton, turned
        self.pruning: ExpertPruning | None = None

    def take_out(self, pruning: ExpertPruning, experts: Mapping[str, Remaining]) -> None:
        """Write a model with these experts alone, numbered anew."""
        assert self.skeleton is not None
        self.pruning, self.skeleton = pruning, copy.deepcopy(self.skeleton)
        pruning.apply(self.skeleton, experts)

    def write(self, outputs: Sequence[OutputTensors], config: Change, progress: Progress) -> int:
        """Write the weights, config.json (config: None for a dense result) and the small files; returns their bytes."""
        content: dict[str, Any] | None = None
        change: Callable[..., dict[str, Any]] = dict
        if isinstance(config, Resizing):
            change = config.changed
        elif config is not None:
            content = config.renamed(partial(of_layer, self.rename)).to_dict()
            change = partial(add_bootstrap, self.source, self.directory)
            if config.int8:
                assert self.skeleton is not None
                outputs = quantized_tensors(outputs, self.skeleton, config.int8)
        if self.skeleton is not None and not (isinstance(config, WeLoreConfig) and config.has_experts):
            outputs = fused_outputs(outputs, self.skeleton, self.turned)
        outputs = [output.renamed(self.rename) for output in outputs]
        size = write_weights(self.directory, outputs, self.max_shard_size, progress)
        pruned: Callable[..., dict[str, Any]] = self.pruning.resizing.changed if self.pruning else dict
        write_config(self.source, self.directory, content, lambda config: change(pruned(config)))
        return size


class ModelSink:
    """A model in memory, changed in place one layer at a time; saved, too, if there is a directory."""

    def __init__(
        self, model: "PreTrainedModel", directory: Path | None = None, max_shard_size: str = SHARD_SIZE
    ) -> None:
        self.model, self.directory, self.max_shard_size = model, directory, max_shard_size

    def take_out(self, pruning: ExpertPruning, experts: Mapping[str, Remaining]) -> None:
        """Leave these experts of the model alone, numbered anew."""
        pruning.apply(self.model, experts)

    def write(self, outputs: Sequence[OutputTensors], config: Change, progress: Progress) -> int:
        """Exchange the layers that the outputs change; tensors that are copied stay where they are."""
        layers: dict[str, list[OutputTensors]] = {}
        for output in outputs:
            if output.layer is not None:
                layers.setdefault(output.layer, []).append(output)
        single = isinstance(config, WeLoreConfig) and config.has_experts
        if single or not all(has_module(self.model, layer) for layer in layers):
            unfuse(self.model)
        dense = dense_skeleton(self.model.config, type(self.model)) if config is None else None
        shared = shared_layers(self.model)
        costs = [float(sum(info.bytes for o in pieces for info in o.tensors.values())) for pieces in layers.values()]
        for layer, pieces in progress(zip(layers.items(), costs, strict=True), "writing", sum(costs)):
            tensors = {name: list(chunks) for piece in pieces for name, chunks in piece.make().items()}
            if dense is not None:
                for name in (layer, *shared.get(layer, ())):
                    restore_layer(self.model, name, dense.get_submodule(name))
                    share_layer(self.model, layer, name)
            elif config is not None:
                built = WeLoreConfig({}, shapes=config.shapes) if isinstance(config, Resizing) else config
                build_layer(self.model, layer, built, shared.get(layer, ()))
            for name, chunks in tensors.items():
                if chunks:
                    self._load(name, torch.cat(chunks))
        if not isinstance(config, WeLoreConfig):
            fuse(self.model)
        settings: Any = self.model.config
        if isinstance(config, Resizing):
            config.apply(settings)
        elif config is not None:
            quantize_layers(self.model, config.int8)
            settings.quantization_config = config.renamed(partial(of_layer, saved_name(self.model)))
            remember_companions(settings.quantization_config)
        elif dense is not None and hasattr(settings, "quantization_config"):
            forget_compression(settings)
            self.model.all_tied_weights_keys = dense.all_tied_weights_keys
        if self.directory is not None:
            self.model.save_pretrained(self.directory, max_shard_size=self.max_shard_size)
        return int(sizes(self.model)["bytes"])

    @torch.no_grad()
    def _load(self, name: str, flat: Tensor) -> None:
        layer, _, part = name.rpartition(".")
        tensor = getattr(self.model.get_submodule(layer), part)
        tensor.copy_(flat.reshape(tensor.shape))


TensorSink = DirectorySink | ModelSink  # directory: where other files of the result go, None where nothing is written


@contextmanager
def open_sink(
    source: TensorSource, output_dir: str | Path | None, *, max_shard_size: str = SHARD_SIZE, overwrite: bool = False
) -> Iterator[TensorSink]:
    """The sink for what is made from a source: a directory that appears whole, or the model itself.

    A model in memory is changed in place, and saved to `output_dir` if there is one.
    """
    origin: Any = source.original
    on_disk = isinstance(origin, CheckpointSource)
    if output_dir is None and on_disk:
        raise WeLoreError("name the directory to write: output_dir")
    with nullcontext() if output_dir is None else atomic_directory(output_dir, overwrite=overwrite) as directory:
        if directory is None or not on_disk:
            yield ModelSink(origin.model, directory, max_shard_size)
        else:
            rename, skeleton, turned = origin.stored_name, origin.skeleton, origin.turned
            yield DirectorySink(origin.directory, directory, max_shard_size, rename, skeleton, turned)
