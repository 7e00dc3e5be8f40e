"""The targeted matrices of a decoder, found in the model itself, whatever its family."""

import copy
import fnmatch
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from welore.errors import WeLoreError
from welore.layers.block_grid import WHOLE, Grid, block_names, block_shape
from welore.layers.expert_names import of_all_experts
from welore.layers.int8 import Int8Linear
from welore.layers.low_rank import CompressedLayer, LowRankLayer
from welore.models.skeleton import decoder_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# --- kinds of weights ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightKind:
    """How a kind of layer stores its matrix W (m, n) = (outputs, inputs).

    transposed: the weight is W^T (n, m). sizes: the layer's attributes that hold n and m.
    """

    transposed: bool
    sizes: tuple[str, str]

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        """(m, n) of a layer."""
        n, m = (int(getattr(layer, name)) for name in self.sizes)
        return m, n

    def stored_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the weight of W (m, n)."""
        return (shape[1], shape[0]) if self.transposed else shape

    def matrix(self, weight: Tensor) -> Tensor:
        """W (m, n) of a weight, a view."""
        return weight.T if self.transposed else weight

    def stored(self, W: Tensor) -> Tensor:
        """The weight of W (m, n)."""
        return W.T.contiguous() if self.transposed else W

    def take_rows(self, parameter: Tensor, rows: Tensor) -> Tensor:
        """The weight or the bias of a layer for some of its outputs. rows: (count,), indices."""
        return parameter.index_select(1 if self.transposed and parameter.ndim == 2 else 0, rows)

    def resized(self, layer: Any, shape: tuple[int, int]) -> Any:
        """A copy of the layer with an uninitialised W (m, n), of its class, with what else it knows."""
        (m, n), weight, bias = shape, layer.weight, layer.bias
        new = copy.copy(layer)
        new._parameters = dict(layer._parameters)
        new.weight = nn.Parameter(weight.new_empty(self.stored_shape(shape)), requires_grad=weight.requires_grad)
        if bias is not None:
            new.bias = nn.Parameter(bias.new_empty(m), requires_grad=bias.requires_grad)
        for name, size in zip(self.sizes, (n, m), strict=True):
            setattr(new, name, size)
        return new


LINEAR = WeightKind(False, ("in_features", "out_features"))
CONV1D = WeightKind(True, ("nx", "nf"))  # GPT-2's


@cache
def _kinds() -> dict[type[nn.Module], WeightKind]:
    from transformers.pytorch_utils import Conv1D

    return {Int8Linear: LINEAR, nn.Linear: LINEAR, Conv1D: CONV1D, LowRankLayer: LINEAR}


def kind_of(layer: nn.Module) -> WeightKind | None:
    """How a layer stores its matrix; None if it is no linear map. It may be a subclass of a linear layer."""
    for base, kind in _kinds().items():
        if isinstance(layer, base):
            known = base is LowRankLayer or type(layer).forward is base.forward
            return kind if known or _is_linear_map(layer, kind) else None
    return None


def known_kind(layer: nn.Module) -> WeightKind:
    """The kind of a layer that is known to be linear."""
    kind = kind_of(layer)
    assert kind is not None, f"{type(layer).__name__} is no linear layer"
    return kind


@torch.no_grad()
def _is_linear_map(layer: nn.Module, kind: WeightKind) -> bool:
    """Whether y = W x + b, tried on a small copy of a layer with a forward of its own."""
    weight = layer.weight
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        return False
    draws, cpu = torch.Generator().manual_seed(0), torch.device("cpu")  # a model that is loaded is built on meta
    W, b, x = (torch.randn(n, 3, generator=draws, dtype=torch.float32, device=cpu) for n in (4, 4, 2))
    b = b[:, 0]
    small = kind.resized(layer, (4, 3))
    small.weight = nn.Parameter(kind.stored(W), requires_grad=False)
    if small.bias is not None:
        small.bias = nn.Parameter(b, requires_grad=False)
    try:
        with cpu:
            y = small(x)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError):
        return False
    expected = nn.functional.linear(x, W, b if small.bias is not None else None)
    return isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected, atol=1e-5)


# --- targets ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """One targeted matrix W (m, n) = (out_features, in_features): that of a layer, or a block of it.

    kind: how the layer stores its matrix. grid: how many blocks its matrix is split in, down and across; a block is
    named LAYER.INDEX, row by row.
    """

    name: str
    shape: tuple[int, int]
    kind: WeightKind = LINEAR
    grid: Grid = WHOLE

    @property
    def layer(self) -> str:
        """Name of the layer."""
        return self.name if self.grid == WHOLE else self.name.rpartition(".")[0]

    @property
    def key(self) -> str:
        """Name under which its results are stored; another one when neurons were taken out."""
        return result_key(self.name, self.shape)

    @property
    def rows(self) -> slice:
        """The rows of the layer's matrix that these are: its outputs."""
        return self._share(0)

    @property
    def columns(self) -> slice:
        """The columns of the layer's matrix that these are: its inputs."""
        return self._share(1)

    def _share(self, axis: int) -> slice:
        if self.grid == WHOLE:
            return slice(None)
        position = divmod(int(self.name.rpartition(".")[2]), self.grid[1])[axis]
        return slice(position * self.shape[axis], (position + 1) * self.shape[axis])

    @property
    def cost(self) -> float:
        """Relative time of its decomposition: the Gram matrix, and its reduction at a lower speed."""
        k, long = min(self.shape), max(self.shape)
        return float(k * k * (long + 2 * k))

    def matrix(self, weight: Tensor) -> Tensor:
        """W (m, n), a view of the layer's weight as it is stored."""
        return self.kind.matrix(weight)[self.rows, self.columns]


def result_key(name: str, shape: tuple[int, int]) -> str:
    """Name under which the results of a matrix of this shape are stored."""
    return f"{name}.{shape[0]}x{shape[1]}"


def decomposition_key(name: str, shape: tuple[int, int]) -> str:
    """Name under which the decomposition of a matrix is stored."""
    return f"{result_key(name, shape)}.decomposition"


def in_blocks(targets: Iterable[Target], grids: Mapping[str, Grid]) -> list[Target]:
    """The targets, those with a grid in blocks; WeLoreError for a grid that does not fit."""
    blocks = []
    for target in targets:
        grid = grids.get(target.name, WHOLE)
        if grid == WHOLE:
            blocks.append(target)
            continue
        try:
            shape = block_shape(*target.shape, grid)
        except WeLoreError as error:
            raise WeLoreError(f"{target.name}: {error}") from error
        blocks += [replace(target, name=name, shape=shape, grid=grid) for name in block_names(target.name, grid)]
    return blocks


def find_targets(model: "PreTrainedModel", include: Iterable[str] = (), exclude: Iterable[str] = ()) -> list[Target]:
    """Every linear layer inside the decoder blocks, in the model's order; routers of experts are left out.

    Of layers that share one weight the first is a target, and stands for all of them.

    include: only modules that match one of these patterns, anywhere in the model. exclude: none that match.
    A pattern is a glob over whole components of a module's name: "q_proj", "layers.0", "layers.*.mlp".
    model: may live on the meta device, and may be compressed already.
    """
    include, exclude = tuple(include), tuple(exclude)
    blocks, _ = decoder_blocks(model)
    shared = shared_layers(model)
    repeated = {other: first for first, others in shared.items() for other in others}
    names, targets, factors = [], list[Target](), "."
    for name, module in model.named_modules():
        kind, parent = kind_of(module), name.rpartition(".")[0]
        if isinstance(module, LowRankLayer):
            factors = f"{name}."
        if kind is None or name.startswith(factors) or ".lora_" in name:  # a factor, or of an adapter of peft
            continue
        names.append(name)
        same = [name, *shared.get(name, ())]
        if include:
            wanted = any(_matches(n, pattern) for n in same for pattern in include)
        else:
            wanted = name.startswith(blocks + ".") and not _is_router(model, name)
        if not wanted or any(_matches(n, pattern) for n in same for pattern in exclude) or parent in repeated:
            continue
        if include and not _are_one_layer(model, [*same, repeated.get(name, name)]):
            raise WeLoreError(f"{name} shares its weight with the embeddings and cannot be low rank: exclude it")
        multiplied = reads_weight(model, name, " @")  # without a call of the layer, as Mamba does by dt_proj
        if name not in repeated and _are_one_layer(model, same) and not multiplied:
            targets.append(Target(name, kind.shape(module), kind))
    for pattern in (*include, *exclude):
        if not any(_matches(name, pattern) for name in names):
            raise WeLoreError(f"the pattern {pattern!r} matches no linear layer; one is called {names[0]!r}")
    if not targets:
        raise WeLoreError("no linear layer is targeted: the patterns leave nothing to compress")
    return targets


def shared_layers(model: nn.Module) -> dict[str, list[str]]:
    """First name of a layer -> its other names, and those of other layers with the same weight, where there are any."""
    names: dict[int, list[str]] = {}
    tied = getattr(model, "all_tied_weights_keys", {})
    low_rank = "."
    for name, module in model.named_modules(remove_duplicate=False):
        if name.startswith(low_rank):  # a factor or a block
            continue
        weight = module._parameters.get("weight")
        if isinstance(module, CompressedLayer):
            low_rank = name + "."
            weight = next(parameter for part, parameter in module.named_parameters() if part != "bias")
        elif weight is not None and weight.is_meta and name + ".weight" in tied:  # from_pretrained ties in the end
            weight = model.get_parameter(tied[name + ".weight"])
        if weight is not None:
            names.setdefault(id(weight), []).append(name)
    return {first: others for first, *others in names.values() if others}


def _are_one_layer(model: nn.Module, names: Sequence[str]) -> bool:
    """Whether these are linear layers that share all of their parameters."""
    layers = [model.get_submodule(name) for name in names]
    tensors = {tuple(map(id, layer.parameters())) for layer in layers}
    return len(tensors) == 1 and all(kind_of(layer) for layer in layers)


def reads_weight(model: nn.Module, name: str, then: str = "") -> bool:
    """Whether the code of the module around a layer reads its weight itself, and goes on with `then`."""
    parent, _, child = name.rpartition(".")
    around: Any = type(model.get_submodule(parent))
    return child in _read_layers(around, then)


@cache
def _read_layers(module: Any, then: str) -> set[str]:
    """Layers whose weight the code of a module reads."""
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):  # made at run time
        return set()
    return set(re.findall(rf"self\.(\w+)\.weight\b{then}", source))


def _is_router(model: nn.Module, name: str) -> bool:
    """Whether a layer chooses experts: it is, or lies in, what is called gate or router beside the experts."""
    parent, _, child = name.rpartition(".")
    while child:
        module = model.get_submodule(parent)
        router = child in ("gate", "router") or "Router" in type(module.get_submodule(child)).__name__
        beside = (other + type(part).__name__ for other, part in module.named_children() if other != child)
        if router and any("expert" in words.lower() for words in beside):
            return True
        parent, _, child = parent.rpartition(".")
    return False


def _matches(name: str, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(f".{name}.", f"{head}.{pattern}.{tail}") for head in ("", "*") for tail in ("", "*"))


# --- counting --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Census:
    """Parameters of a model by what becomes of them."""

    targeted: int
    blocks_other: int  # in matrices of the decoder blocks that are not targeted: experts, routers, excluded ones
    blocks_other_names: tuple[str, ...]
    total: int


def census(model: "PreTrainedModel", targets: Sequence[Target]) -> Census:
    """How many parameters are targeted, and what else lies in the blocks; model: dense, may be on meta."""
    blocks, _ = decoder_blocks(model)
    chosen = {target.name + ".weight" for target in targets}
    other = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if name.startswith(blocks + ".") and parameter.ndim > 1 and name not in chosen
    }
    return Census(
        targeted=sum(m * n for m, n in (target.shape for target in targets)),
        blocks_other=sum(other.values()),
        blocks_other_names=tuple(sorted({".".join(of_all_experts(n).split(".")[-3:-1]) for n in other})),
        total=sum(p.numel() for p in model.parameters()),
    )
