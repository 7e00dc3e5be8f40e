"""Decoding at the cost of its arithmetic: no step copies what the steps before it have cached.

DynamicCache of transformers joins all keys and values anew for every token, and on a CPU the attention of torch reads
the keys of a group of heads once for every head: together half of the time of a batch of windows.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class ReservedLayer(DynamicLayer):
    """The keys and values of a layer in memory that is reserved once, for `length` positions."""

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._reserved = [t.new_empty((*t.shape[:2], length, t.shape[3])) for t in (keys, values)]
        self.update(keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the keys and values (b, heads, new, width) of new positions; those of all positions so far."""
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        for reserved, new in zip(self._reserved, (key_states, value_states), strict=True):
            reserved[:, :, begin:end] = new
        self.keys, self.values = (reserved[:, :, :end] for reserved in self._reserved)
        return self.keys, self.values


def reserve(cache: Any, length: int) -> Any:
    """A cache that a model has begun, with memory for `length` positions where its layers keep that many.

    Layers of other kinds (states of linear attention, windows shorter than the text) stay as they are.
    """
    for at, layer in enumerate(getattr(cache, "layers", ())):
        plain = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and layer.get_seq_length() > 0
        if plain and getattr(layer, "sliding_window", length) >= length:
            cache.layers[at] = ReservedLayer(layer.keys, layer.values, length)
    return cache


class GroupedAttention(TorchFunctionMode):
    """On a CPU the heads that share keys are the rows of one product, while one new token attends to all before it.

    torch's own kernel for shared keys gives the same numbers in several times the time (2.13, one row, bfloat16).
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call `func`, an attention with shared keys in another shape."""
        kwargs = dict(kwargs or {})
        if func is not scaled_dot_product_attention or not kwargs.get("enable_gqa"):
            return func(*args, **kwargs)
        query, key, value = args
        if query.shape[-2] != 1 or query.device.type != "cpu" or kwargs.get("attn_mask") is not None:
            return func(*args, **kwargs)
        rows = query.reshape(len(query), key.shape[1], -1, query.shape[-1])
        return func(rows, key, value, **kwargs | {"enable_gqa": False}).reshape(*query.shape[:-1], -1)
