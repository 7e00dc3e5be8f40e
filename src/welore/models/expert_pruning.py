"""Mixtures with fewer experts: an ordinary smaller model of the family, found by trial and made of another one."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from operator import eq
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from welore.errors import WeLoreError
from welore.layers.experts import Experts
from welore.layers.remaining import Remaining, is_left
from welore.models.experts import experts_of, unfuse
from welore.models.resizing import Resizing, resized, tensor_shapes
from welore.models.source import OverlaySource, TensorSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ExpertPruning:
    """A change that takes as many experts out of every layer of a mixture.

    resizing: the number of experts in the configuration. before: the number of the dense model. routers: name of a
    tensor with an entry for every expert -> the mixture that it chooses for, and the axis of the entries. groups: the
    experts of a layer lie in so many groups of one size, side by side.
    """

    resizing: Resizing
    before: int
    routers: Mapping[str, tuple[str, int]]
    groups: int = 1

    @property
    def count(self) -> int:
        """How many experts are left in every layer."""
        return self.resizing.value

    @property
    def mixtures(self) -> list[str]:
        """The modules of experts."""
        return list(dict.fromkeys(mixture for mixture, _ in self.routers.values()))

    def select(self, losses: Tensor) -> Remaining:
        """The experts of a layer that are left: of every group those that lose most. losses: (before,)."""
        order = losses.view(self.groups, -1).argsort(descending=True, stable=True)[:, : self.count // self.groups]
        first = torch.arange(self.groups)[:, None] * (self.before // self.groups)
        return Remaining(self.before, tuple((first + order).flatten().sort().values.tolist()))

    @torch.no_grad()
    def take_out(self, model: Any, experts: Mapping[str, Remaining]) -> None:
        """Leave these experts of a model, in place, with the numbers that they have; their layers lie apart."""
        for mixture, left in experts.items():
            modules = model.get_submodule(mixture)._modules
            for number in set(range(left.width)) - set(left.indices):
                del modules[str(number)]
        for name, (mixture, axis) in self.routers.items():
            owner, _, part = name.rpartition(".")
            module, indices = model.get_submodule(owner), torch.tensor(experts[mixture].indices)
            tensor = getattr(module, part)
            fewer = tensor.detach().index_select(axis, indices.to(tensor.device))
            if isinstance(tensor, nn.Parameter):
                fewer = nn.Parameter(fewer, requires_grad=tensor.requires_grad)
            setattr(module, part, fewer)

    def apply(self, model: Any, experts: Mapping[str, Remaining]) -> None:
        """Make a dense model one with these experts alone, numbered anew, in place; they are apart afterwards."""
        unfuse(model)
        smaller = next(made for change, made in resized(model, self.before, self.count) if change == self.resizing)
        self.take_out(model, experts)
        for mixture in experts:
            modules = model.get_submodule(mixture)._modules
            left = list(modules.values())
            modules.clear()
            modules.update({str(number): expert for number, expert in enumerate(left)})
        for name, like in smaller.named_modules():
            for mine, new in _pairs(model.get_submodule(name), like):
                for key, value in vars(new).items():  # numbers that modules have taken from the configuration
                    if type(value) is int and (vars(mine).get(key), value) == (self.before, self.count):
                        setattr(mine, key, value)
        self.resizing.apply(model.config)


def _pairs(module: Any, like: Any) -> Iterator[tuple[Any, Any]]:
    """Objects with settings, and those of the other model: modules, and what is left of fused experts."""
    yield module, like
    if isinstance(module, Experts):
        yield module.gate.fused, like.gate.fused


class FewerExperts(OverlaySource):
    """A source without some experts. Those that are left have the names of the base; the identity is that of the base.

    experts: mixture -> the experts that are left.
    """

    def __init__(self, base: TensorSource, pruning: ExpertPruning, experts: Mapping[str, Remaining]) -> None:
        self.pruning, self.experts = pruning, experts
        super().__init__(base, {}, {name: partial(self._router, name) for name in pruning.routers})
        self.targets = [target for target in base.targets if is_left(target.name, experts)]
        self._names = [name for name in base.names() if is_left(name, experts)]

    def empty_skeleton(self) -> "PreTrainedModel":
        """A model without the experts, on the meta device."""
        model = super().empty_skeleton()
        self.pruning.take_out(model, self.experts)
        return model

    def names(self) -> Iterable[str]:
        """All tensors that are left."""
        return self._names

    def _router(self, name: str) -> Tensor:
        tensor, (mixture, axis) = self.base.tensor(name), self.pruning.routers[name]
        return tensor.index_select(axis, torch.tensor(self.experts[mixture].indices, device=tensor.device))


def find_expert_pruning(source: TensorSource, count: int) -> ExpertPruning:
    """The change that leaves so many experts in every layer; WeLoreError if the family has none, or allows none."""
    model = source.skeleton
    experts = {name: Remaining(width, tuple(range(count))) for name, width in experts_of(model).items()}
    before = next(iter(experts.values())).width
    shapes = tensor_shapes(model)
    for change, smaller in resized(model, before, count):
        routers = _routers(shapes, tensor_shapes(smaller), experts)
        if routers is not None:
            return ExpertPruning(change, before, routers, _groups(model, change, before, count))
    raise WeLoreError(
        f"{source.name}: no single number of its configuration sets how many experts all its layers have: leave "
        "expert_pruning out"
    )


def _routers(
    before: Mapping[str, tuple[int, ...]], after: Mapping[str, tuple[int, ...]], experts: Mapping[str, Remaining]
) -> dict[str, tuple[str, int]] | None:
    """Routers of ExpertPruning, by the shapes of two models; None if the second is not the first with fewer experts."""
    if set(after) != {name for name in before if is_left(name, experts)}:
        return None
    routers = {}
    for name, shape in after.items():
        if shape == before[name]:
            continue
        if len(shape) != len(before[name]):
            return None
        differ = [axis for axis, sizes in enumerate(zip(before[name], shape, strict=True)) if sizes[0] != sizes[1]]
        mixture = max(experts, key=lambda other: sum(map(eq, name.split("."), other.split("."))))  # that of its layer
        left = experts[mixture]
        if len(differ) != 1 or (before[name][differ[0]], shape[differ[0]]) != (left.width, len(left.indices)):
            return None
        routers[name] = (mixture, differ[0])
    return routers if {mixture for mixture, _ in routers.values()} == set(experts) else None


def _groups(model: Any, change: Resizing, before: int, count: int) -> int:
    """Into how many groups the experts are parted of which a token chooses some; WeLoreError if they do not fit."""
    config = model.config
    for key in change.path[:-1]:
        config = getattr(config, key)
    each, groups = (getattr(config, name, None) or 1 for name in ("num_experts_per_tok", "n_group"))
    if count < each:
        raise WeLoreError(
            f"expert_pruning leaves {count} of {before} experts in a layer, and every token chooses {each}: at most "
            f"{1 - each / before:g} can be taken out"
        )
    reachable = count // groups * (getattr(config, "topk_group", None) or groups)
    if groups > 1 and (count % groups or count < 2 * groups or reachable < each):
        raise WeLoreError(
            f"expert_pruning leaves {count} of {before} experts in a layer, which lie in {groups} groups: every group "
            f"must keep as many, at least 2, and {each} in the groups that a token chooses"
        )
    return groups
