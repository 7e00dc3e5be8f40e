"""The MLPs of a decoder, found in the model itself: whose neurons can be taken out, and layers of another size."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from welore.layers.block_grid import Grid
from welore.models.targets import Target, find_targets, known_kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRIAL = 8  # neurons of the small MLP on which it is tried whether they can be taken out


@dataclass(frozen=True)
class Mlp:
    """A module in which every neuron is computed by itself, and one layer reads them all.

    up_layers: layers (c width, d) whose outputs the neurons are computed from, c = 1 for each (gate and up), or more
    where several are stored as one, below each other. down_layer: the layer (d, width) that reads them.
    """

    name: str
    up_layers: tuple[Target, ...]
    down_layer: Target

    @property
    def layers(self) -> tuple[Target, ...]:
        """All of its layers."""
        return (*self.up_layers, self.down_layer)

    @property
    def width(self) -> int:
        """How many neurons it has."""
        return self.down_layer.shape[1]

    @property
    def numbers(self) -> int:
        """Parameters that one neuron takes, biases not counted."""
        return sum(m * n for m, n in (layer.shape for layer in self.layers)) // self.width

    def copies(self, up_layer: Target) -> int:
        """How many outputs of an up layer a neuron is computed from."""
        return up_layer.shape[0] // self.width

    def rows(self, up_layer: Target, neurons: Tensor) -> Tensor:
        """The rows of an up layer's matrix that belong to the neurons (count,)."""
        return _rows(self.copies(up_layer), self.width, neurons)

    def shapes(self, count: int) -> dict[str, tuple[int, int]]:
        """Layer -> its shape when `count` neurons are left."""
        up = {t.name: (self.copies(t) * count, t.shape[1]) for t in self.up_layers}
        return up | {self.down_layer.name: (self.down_layer.shape[0], count)}


def find_mlps(model: "PreTrainedModel", targets: Sequence[Target]) -> list[Mlp]:
    """The MLPs all of whose matrices are targeted, in the model's order; model: may live on the meta device.

    A small copy of each is run, with and without some of its neurons: what enters its last layer has to be the same
    but for those.
    """
    d = model.config.get_text_config(decoder=True).hidden_size
    tried: dict[tuple[object, ...], bool] = {}
    mlps = []
    for mlp in _candidates(model, targets):
        module = model.get_submodule(mlp.name)
        kind = (type(module), *(t.shape for t in mlp.layers))
        if kind not in tried:
            tried[kind] = _neurons_are_apart(module, mlp, d)
        if tried[kind]:
            mlps.append(mlp)
    return mlps


def _candidates(model: "PreTrainedModel", targets: Sequence[Target]) -> Iterator[Mlp]:
    """Modules whose matrices have the shapes of an MLP's."""
    d = model.config.get_text_config(decoder=True).hidden_size
    inside: dict[str, list[Target]] = {}
    for target in targets:
        inside.setdefault(target.name.rpartition(".")[0], []).append(target)
    for name, layers in inside.items():
        down = [t for t in layers if t.shape[0] == d < t.shape[1]]
        up = [t for t in layers if t not in down]
        if len(down) == 1 and up:
            mlp = Mlp(name, tuple(up), down[0])
            if all(m % mlp.width == 0 and n == d for m, n in (t.shape for t in up)):
                yield mlp


def long_matrices(model: "PreTrainedModel", targets: Sequence[Target]) -> dict[str, Grid]:
    """Layer -> grid of the MLPs' matrices that are at least twice as long as wide: equal blocks, no taller than wide.

    They are split by their neurons. Other matrices stay whole, because splitting an attention loses (docs/method.md);
    one with as many neurons looks like an MLP with three outputs to a neuron, an MLP has one or two. A state space
    (Zamba's) has matrices of its own beside its layers.
    """
    mlps = [
        mlp
        for mlp in _candidates(model, find_targets(model))
        if sum(map(mlp.copies, mlp.up_layers)) <= 2
        and all(own.ndim < 2 for own in model.get_submodule(mlp.name).parameters(recurse=False))
    ]
    neurons = {t.name: 0 for mlp in mlps for t in mlp.up_layers} | {mlp.down_layer.name: 1 for mlp in mlps}
    grids: dict[str, Grid] = {}
    for target in targets:
        axis = neurons.get(target.name)
        long, short = max(target.shape), min(target.shape)
        count = max(c for c in range(1, long // short + 1) if long % c == 0)
        if axis is not None and count > 1 and target.shape[axis] == long:
            grids[target.name] = (1, count) if axis else (count, 1)
    return grids


def resize_layers(model: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Put (uninitialised) linear layers with W of these shapes (m, n) in the place of those that are there."""
    for name, shape in shapes.items():
        layer = model.get_submodule(name)
        model.set_submodule(name, known_kind(layer).resized(layer, shape))


def outputs_per_neuron(model: "PreTrainedModel") -> dict[str, int]:
    """Layer -> how many of its outputs a neuron is computed from, of the up layers of all MLPs."""
    return {up.name: mlp.copies(up) for mlp in find_mlps(model, find_targets(model)) for up in mlp.up_layers}


def pad_neurons(layer: Any, values: Tensor, copies: int) -> Tensor:
    """Weight or bias of a layer that has lost neurons, as the dense `layer` holds it: zeros stand for what is gone.

    copies: see `outputs_per_neuron`; 1 for other layers. A tensor of the dense shape is returned as it is.
    """
    matrix, kind = values.ndim > 1, known_kind(layer)
    dense = layer.weight if matrix else layer.bias
    if values.shape == dense.shape:
        return values
    padded = values.new_zeros(kind.shape(layer) if matrix else dense.shape)
    some = (kind.matrix(values) if matrix else values).unflatten(0, (copies, -1))
    padded.unflatten(0, (copies, -1))[(slice(None), *(slice(size) for size in some.shape[1:]))] = some
    return kind.stored(padded) if matrix else padded


def _rows(copies: int, width: int, neurons: Tensor) -> Tensor:
    return (torch.arange(copies, device=neurons.device)[:, None] * width + neurons).flatten()


def _neurons_are_apart(module: nn.Module, mlp: Mlp, d: int) -> bool:
    """Whether a copy of the module with few neurons, random weights, gives the others the same when some are gone."""
    inside = [t.name.removeprefix(mlp.name + ".") for t in mlp.layers]
    known = {id(parameter) for layer in inside for parameter in module.get_submodule(layer).parameters()}
    if any(id(p) not in known for p in module.parameters()) or any(True for _ in module.buffers()):
        return False  # a norm over the neurons, say
    neurons = torch.tensor([0, 2, 3, 6])
    large, small = _small(module, mlp, TRIAL), _small(module, mlp, len(neurons))
    draws = torch.Generator().manual_seed(0)
    for parameter in large.parameters():
        parameter.data.normal_(std=d**-0.5, generator=draws)
    for up, name in zip(mlp.up_layers, inside, strict=False):
        layer, rows = large.get_submodule(name), _rows(mlp.copies(up), TRIAL, neurons)
        for mine, theirs in zip(small.get_submodule(name).parameters(), layer.parameters(), strict=True):
            mine.data = up.kind.take_rows(theirs.data, rows)
    x = torch.randn((1, 3, d), generator=draws)
    try:
        all_read, some_read = (_entering(trial, inside[-1], x) for trial in (large, small))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError):
        return False  # it wants more than hidden states (an attention), or its size is written elsewhere, too
    return all_read.shape[-1] == TRIAL and torch.allclose(all_read[..., neurons], some_read, atol=1e-4)


def _small(module: nn.Module, mlp: Mlp, count: int) -> nn.Module:
    """A copy of the module with `count` neurons, uninitialised, float32 on the CPU."""
    with torch.device("meta"):
        holder = nn.Module()
        holder.mlp = copy.deepcopy(module).to("meta")
    shapes = {"mlp" + name.removeprefix(mlp.name): shape for name, shape in mlp.shapes(count).items()}
    resize_layers(holder, shapes)
    return holder.mlp.to_empty(device="cpu").float().eval()


@torch.no_grad()
def _entering(module: nn.Module, layer: str, x: Tensor) -> Tensor:
    """The input of a layer of the module when it reads x."""
    seen: list[Tensor] = []
    module.get_submodule(layer).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    module(x)
    (entering,) = seen
    return entering
