"""The one number of a configuration that sets the width of every MLP, found by trial."""

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

from welore.errors import WeLoreError
from welore.models.skeleton import dense_skeleton
from welore.models.source import OverlaySource, TensorSource

UNSET = re.compile("inner|intermediate|ffn")  # in names of numbers that may be null: GPT-2's n_inner


@dataclass(frozen=True)
class Resizing:
    """A change of config.json that makes the MLPs narrower.

    path: keys of the number, such as ("text_config", "intermediate_size"); width: its new value; shapes: layer -> shape
    (m, n) of the layers that it changes.
    """

    path: tuple[str, ...]
    width: int
    shapes: Mapping[str, tuple[int, int]]

    def changed(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """The content of config.json with the new number."""
        config = copy.deepcopy(dict(content))
        reduce(lambda inner, key: inner.setdefault(key, {}), self.path[:-1], config)[self.path[-1]] = self.width
        return config

    def apply(self, config: Any) -> None:
        """Set the number in a configuration in memory."""
        setattr(reduce(getattr, self.path[:-1], config), self.path[-1], self.width)


def find_resizing(source: TensorSource, shapes: Mapping[str, tuple[int, int]], old: int, new: int) -> Resizing:
    """The change that gives the layers of a model these shapes (m, n), and leaves all others as they are.

    old, new: neurons of an MLP. Every number of the configuration that is `old` is tried: the model is built on the
    meta device with the new one, and its shapes are compared. Raises WeLoreError if none makes these shapes.
    """
    model, wanted = source.skeleton, _parameter_shapes(OverlaySource(source, shapes, {}).skeleton)
    content = model.config.to_dict()
    for path in _candidates(content, old):
        change = Resizing(path, new, shapes)
        if _shapes_by(change.changed(content), model) == wanted:
            return change
    raise WeLoreError(
        f"{source.name}: no single number of its configuration sets the width of all its MLPs, so that no ordinary "
        "checkpoint can have narrower ones: leave out --for anywhere"
    )


def _candidates(content: Mapping[str, Any], width: int, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _candidates(value, width, (*before, key))
        elif (type(value) is int and value == width) or (value is None and UNSET.search(key)):
            yield (*before, key)


def _shapes_by(content: Mapping[str, Any], model: Any) -> dict[str, tuple[int, ...]] | None:
    """The shapes of a model of the same class with this configuration; None if the class refuses it."""
    try:
        config = type(model.config).from_dict(content)
        config.name_or_path = model.config.name_or_path
        return _parameter_shapes(dense_skeleton(config, type(model)))
    except Exception:  # a number that means something else fails in any way of any family
        return None


def _parameter_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
