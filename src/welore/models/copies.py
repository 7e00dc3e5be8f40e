"""Frozen copies of a model, or of a part of it, on another device or in another dtype."""

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from welore.errors import WeLoreError
from welore.io.memory import free_memory
from welore.models.load import multiplies

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def frozen_copy(
    module: Any,
    device: torch.device,
    dtype: torch.dtype,
    omitted: Iterable[nn.Module] = (),
    unchanged: Iterable[nn.Module] = (),
) -> Any:
    """A frozen copy on a device, floating parameters in dtype; it shares what is in place already.

    omitted: parts that are not needed; their tensors are on the meta device. unchanged: parts that keep their dtype.
    """
    for name, part in module.named_modules():
        if "forward" in vars(part):  # it would go on to work for the original
            raise WeLoreError(f"{name or 'the model'} has been given a forward by another library: load the model anew")
    empty = {id(t) for part in omitted for t in (*part.parameters(), *part.buffers())}
    same = {id(t) for part in unchanged for t in part.parameters()}

    def moved(t: Tensor, to: torch.dtype) -> Tensor:
        return torch.empty_like(t, device="meta") if id(t) in empty else t.detach().to(device, to)

    copies: dict[int, Any] = {}
    for parameter in module.parameters():
        to = dtype if parameter.is_floating_point() and id(parameter) not in same else parameter.dtype
        copies[id(parameter)] = nn.Parameter(moved(parameter, to), requires_grad=False)
    for buffer in module.buffers():
        copies[id(buffer)] = moved(buffer, buffer.dtype)
    return copy.deepcopy(module, copies).eval()


def generation_copy(model: "PreTrainedModel", device: torch.device) -> Any:
    """A frozen copy that writes on a device: in bfloat16 where that multiplies it, on another CPU in float32.

    Without such instructions products in half precision take several times as long; still, a model of which the CPU
    cannot hold a copy in float32 writes with the weights that are there. WeLoreError if a device cannot hold the model.
    """
    dtype = writing_dtype(model.dtype, device)
    tensors = [*model.parameters(), *model.buffers()]
    moved = [t for t in tensors if t.device.type != device.type or (t.is_floating_point() and t.dtype != dtype)]
    needed, free = sum(t.numel() for t in moved) * dtype.itemsize, free_memory(device)
    if free is not None and needed > free:
        if device.type != "cpu":
            sizes = f"{needed / 1e9:.1f} GB and {device} has {free / 1e9:.1f} GB free"
            raise WeLoreError(
                f"the model takes {sizes}, so it cannot write a text there: name another device or the writer vllm, or "
                "give a text (a file of people's words, or of windows as .safetensors)"
            )
        dtype = model.dtype
    return frozen_copy(model, device, dtype)


def writing_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which a model of this one writes on a device."""
    if multiplies(torch.bfloat16, device) and (device.type == "cpu" or dtype.itemsize > 2):
        return torch.bfloat16
    return torch.float32 if device.type == "cpu" else dtype
