"""The MLPs of a decoder, found in the model itself: whose neurons can be taken out, and layers of another size."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from welore.models.targets import Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRIAL = 8  # neurons of the small MLP on which it is tried whether they can be taken out


@dataclass(frozen=True)
class Mlp:
    """A module in which every neuron is computed by itself, and one layer reads them all.

    makers: layers (c width, d) whose outputs the neurons are computed from, c = 1 for each (gate and up), or more where
    several are stored as one, below each other; reader: the layer (d, width) that reads them (down).
    """

    name: str
    makers: tuple[Target, ...]
    reader: Target

    @property
    def width(self) -> int:
        """How many neurons it has."""
        return self.reader.shape[1]

    @property
    def numbers(self) -> int:
        """Parameters that one neuron takes, biases not counted."""
        return sum(m * n for m, n in (layer.shape for layer in (*self.makers, self.reader))) // self.width

    def copies(self, maker: Target) -> int:
        """How many outputs of a maker a neuron is computed from."""
        return maker.shape[0] // self.width

    def rows(self, maker: Target, kept: Tensor) -> Tensor:
        """The rows of a maker's matrix that belong to the neurons `kept` (count,)."""
        return _rows(self.copies(maker), self.width, kept)

    def shapes(self, count: int) -> dict[str, tuple[int, int]]:
        """Layer -> its shape when `count` neurons are left."""
        makers = {t.name: (self.copies(t) * count, t.shape[1]) for t in self.makers}
        return makers | {self.reader.name: (self.reader.shape[0], count)}


def find_mlps(model: "PreTrainedModel", targets: Sequence[Target]) -> list[Mlp]:
    """The MLPs all of whose matrices are targeted, in the model's order; model: may live on the meta device.

    What a module looks like is no proof: a small copy of it is run, with and without some of its neurons, and what
    enters its last layer has to be the same but for those.
    """
    d = model.config.get_text_config(decoder=True).hidden_size
    inside: dict[str, list[Target]] = {}
    for target in targets:
        inside.setdefault(target.name.rpartition(".")[0], []).append(target)
    tried: dict[tuple[object, ...], bool] = {}
    found = []
    for name, layers in inside.items():
        readers = [t for t in layers if t.shape[0] == d < t.shape[1]]
        makers = [t for t in layers if t not in readers]
        if len(readers) != 1 or not makers:
            continue
        mlp = Mlp(name, tuple(makers), readers[0])
        if any(m % mlp.width or n != d for m, n in (t.shape for t in makers)):
            continue
        module = model.get_submodule(name)
        kind = (type(module), *(t.shape for t in layers))
        if kind not in tried:
            tried[kind] = _neurons_are_apart(module, mlp, d)
        if tried[kind]:
            found.append(mlp)
    return found


def resize_layers(model: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Put (uninitialised) linear layers with W of these shapes (m, n) in the place of those that are there."""
    for name, (m, n) in shapes.items():
        old = model.get_submodule(name)
        weight, bias = old.weight, old.bias
        assert isinstance(weight, Tensor)
        new = copy.copy(old)  # of its class, with what else it knows
        new._parameters = dict(old._parameters)
        size = (m, n) if isinstance(old, nn.Linear) else (n, m)
        new.weight = nn.Parameter(weight.new_empty(size), requires_grad=weight.requires_grad)
        if isinstance(bias, nn.Parameter):
            new.bias = nn.Parameter(bias.new_empty(m), requires_grad=bias.requires_grad)
        names = ("in_features", "out_features") if isinstance(old, nn.Linear) else ("nx", "nf")  # GPT-2's Conv1D
        vars(new).update(zip(names, (n, m), strict=True))
        model.set_submodule(name, new)


def copies_of(model: "PreTrainedModel", targets: Sequence[Target]) -> dict[str, int]:
    """Layer -> how many of its outputs a neuron is computed from, of all makers."""
    return {maker.name: mlp.copies(maker) for mlp in find_mlps(model, targets) for maker in mlp.makers}


def with_zeros(layer: nn.Module, numbers: Tensor, copies: int) -> Tensor:
    """Weight or bias of a layer that has lost neurons, as the dense `layer` holds it: zeros stand for what is gone.

    copies: see `copies_of`; 1 for other layers. What is whole is given back as it is.
    """
    full = layer.weight if numbers.ndim > 1 else layer.bias
    assert isinstance(full, Tensor)
    if numbers.shape == full.shape:
        return numbers
    flip = numbers.ndim > 1 and not isinstance(layer, nn.Linear)  # GPT-2's Conv1D stores W^T
    found = numbers.new_zeros(full.shape[::-1] if flip else full.shape)
    some = (numbers.T if flip else numbers).unflatten(0, (copies, -1))
    found.unflatten(0, (copies, -1))[(slice(None), *(slice(size) for size in some.shape[1:]))] = some
    return found.T.contiguous() if flip else found


def take_rows(layer: nn.Module, parameter: Tensor, rows: Tensor) -> Tensor:
    """The weight or the bias of a layer for some of its outputs, as it is stored."""
    return parameter.index_select(0 if parameter.ndim == 1 or isinstance(layer, nn.Linear) else 1, rows)


def _rows(copies: int, width: int, kept: Tensor) -> Tensor:
    return (torch.arange(copies, device=kept.device)[:, None] * width + kept).flatten()


def _neurons_are_apart(module: nn.Module, mlp: Mlp, d: int) -> bool:
    """Whether a copy of the module with few neurons, random weights, gives the others the same when some are gone."""
    inside = [t.name.removeprefix(mlp.name + ".") for t in (*mlp.makers, mlp.reader)]
    known = {id(parameter) for layer in inside for parameter in module.get_submodule(layer).parameters()}
    if any(id(p) not in known for p in module.parameters()) or any(True for _ in module.buffers()):
        return False  # a norm over the neurons, say
    kept = torch.tensor([0, 2, 3, 6])
    all_of_them, some = _small(module, mlp, TRIAL), _small(module, mlp, len(kept))
    draws = torch.Generator().manual_seed(0)
    for parameter in all_of_them.parameters():
        parameter.data.normal_(std=d**-0.5, generator=draws)
    for maker, name in zip(mlp.makers, inside, strict=False):
        layer, rows = all_of_them.get_submodule(name), _rows(mlp.copies(maker), TRIAL, kept)
        for mine, whole in zip(some.get_submodule(name).parameters(), layer.parameters(), strict=True):
            mine.data = take_rows(layer, whole.data, rows)
    x = torch.randn((1, 3, d), generator=draws)
    try:
        all_read, some_read = (_entering(trial, inside[-1], x) for trial in (all_of_them, some))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError):
        return False  # it wants more than hidden states (an attention), or its size is written elsewhere, too
    return all_read.shape[-1] == TRIAL and torch.allclose(all_read[..., kept], some_read, atol=1e-4)


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
    """What enters a layer of the module when it reads x."""
    seen: list[Tensor] = []
    module.get_submodule(layer).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    module(x)
    (found,) = seen
    return found
