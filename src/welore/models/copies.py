"""Frozen copies of a model, or of a part of it, on another device or in another dtype."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from welore.errors import WeLoreError


def frozen_copy(module: Any, device: torch.device, dtype: torch.dtype, omitted: Iterable[nn.Module] = ()) -> Any:
    """A frozen copy on a device, floating parameters in dtype; it shares what is in place already.

    omitted: parts that are not needed; their tensors are on the meta device.
    """
    for name, part in module.named_modules():
        if "forward" in vars(part):  # it would go on to work for the original
            raise WeLoreError(f"{name or 'the model'} has been given a forward by another library: load the model anew")
    empty = {id(t) for part in omitted for t in (*part.parameters(), *part.buffers())}

    def moved(t: Tensor, to: torch.dtype) -> Tensor:
        return torch.empty_like(t, device="meta") if id(t) in empty else t.detach().to(device, to)

    copies: dict[int, Any] = {}
    for parameter in module.parameters():
        to = dtype if parameter.is_floating_point() else parameter.dtype
        copies[id(parameter)] = nn.Parameter(moved(parameter, to), requires_grad=False)
    for buffer in module.buffers():
        copies[id(buffer)] = moved(buffer, buffer.dtype)
    return copy.deepcopy(module, copies).eval()


def generation_copy(model: "PreTrainedModel", device: torch.device) -> Any:
    """A frozen copy that writes on a device: in the model's own dtype, on a CPU in float32.

    There products of a few rows in half precision take several times as long, even with instructions for them.
    """
    return frozen_copy(model, device, torch.float32 if device.type == "cpu" else model.dtype)
