"""The one number of a configuration that sets the width of every MLP, or how many experts there are, found by trial."""

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import TYPE_CHECKING, Any

from torch import nn

from welore.errors import WeLoreError
from welore.models.skeleton import dense_skeleton
from welore.models.source import OverlaySource, TensorSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNSET = re.compile("inner|intermediate|ffn")  # in names of numbers that may be null: GPT-2's n_inner


@dataclass(frozen=True)
class Resizing:
    """A change of one number of config.json, which makes layers smaller, or fewer.

    path: keys of the number, such as ("text_config", "intermediate_size"); value: its new value; shapes: layer -> shape
    (m, n) of the layers that it makes smaller; aliases: other names that files may have for the last key.
    """

    path: tuple[str, ...]
    value: int
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()

    def changed(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """The content of config.json with the new number, which a class for the text alone looks for further out."""
        config = copy.deepcopy(dict(content))
        start = config if {self.path[0], *self.aliases} & config.keys() else config.get("text_config", config)
        inner = reduce(lambda inner, key: inner.setdefault(key, {}), self.path[:-1], start)
        names = [name for name in (self.path[-1], *self.aliases) if name in inner]
        inner |= dict.fromkeys(names or self.path[-1:], self.value)
        return config

    def apply(self, config: Any) -> None:
        """Set the number in a configuration in memory."""
        setattr(reduce(getattr, self.path[:-1], config), self.path[-1], self.value)


def find_resizing(source: TensorSource, shapes: Mapping[str, tuple[int, int]], old: int, new: int) -> Resizing:
    """The change that gives the layers of a model these shapes (m, n), and leaves all others as they are.

    old, new: neurons of an MLP. Raises WeLoreError if no number makes these shapes.
    """
    wanted = tensor_shapes(OverlaySource(source, shapes, {}).skeleton)
    for change, smaller in resized(source.skeleton, old, new):
        if tensor_shapes(smaller) == wanted:
            return replace(change, shapes=shapes)
    raise WeLoreError(
        f"{source.name}: no single number of its configuration sets the width of all its MLPs, so that no ordinary "
        "checkpoint can have narrower ones: leave out --for anywhere"
    )


def resized(model: "PreTrainedModel", old: int, new: int) -> Iterator[tuple[Resizing, "PreTrainedModel"]]:
    """Every change of a number of a model's configuration from `old` to `new`, and a model that is built with it.

    Both models lie on the meta device; their shapes tell which change is the one that is looked for.
    """
    content = model.config.to_dict()
    for path in _candidates(content, old):
        known = getattr(reduce(getattr, path[:-1], model.config), "attribute_map", {})
        change = Resizing(path, new, aliases=tuple(alias for alias, name in known.items() if name == path[-1]))
        try:
            config = type(model.config).from_dict(change.changed(content))
            config.name_or_path = model.config.name_or_path
            smaller = dense_skeleton(config, type(model))
        except Exception:  # a number that means something else fails in any way of any family
            continue
        yield change, smaller


def tensor_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all tensors that a checkpoint of the model holds."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _candidates(content: Mapping[str, Any], width: int, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _candidates(value, width, (*before, key))
        elif (type(value) is int and value == width) or (value is None and UNSET.search(key)):
            yield (*before, key)
