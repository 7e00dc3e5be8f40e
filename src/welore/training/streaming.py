"""A model that is trained while its frozen weights stay on the host, as they are in their file."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from welore.layers.frozen_linear import leave_weights
from welore.models.skeleton import decoder_blocks


@contextmanager
def streamed(model: Any, dtype: torch.dtype) -> Iterator[list[nn.Linear]]:
    """Keep the frozen linear layers of the decoder blocks where they are, whatever moves the model to a device.

    They compute in `dtype`; the device holds one of their weights at a time. Yields the layers.
    """
    blocks = decoder_blocks(model)[1]
    layers = [layer for block in blocks for layer in block.modules() if type(layer) is nn.Linear]
    layers = [layer for layer in layers if not any(p.requires_grad for p in layer.parameters())]
    leave_weights(layers, dtype)
    for layer in layers:
        layer._apply = lambda *_, stays=layer, **__: stays  # type: ignore[method-assign]
    try:
        yield layers
    finally:
        for layer in layers:
            for name in ("forward", "_apply"):
                del vars(layer)[name]
