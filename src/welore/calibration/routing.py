"""Tokens that are routed to the experts of a layer, kept so that each expert can be run by itself.

A block computes them together, batch by batch. Their inputs, and the gradients of their outputs, go to disk; an expert
is then run by itself, so that the moments of the others need no memory.
"""

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from welore.io.resume import Workspace
from welore.layers.experts import Expert, Experts


class RoutedTokens:
    """The tokens that enter the experts of a layer while its block runs, and the gradients of what leaves them.

    name: of the module of all experts. layers: name of a target -> its layer, of the experts only. Run forward and
    backward, then `store`, for every batch; then `run` for every expert.
    """

    def __init__(self, name: str, experts: Experts, layers: Mapping[str, nn.Module], workspace: Workspace) -> None:
        self.name, self.layers, self._workspace = name, layers, workspace
        self._experts = experts
        self._calls: list[dict[str, Tensor]] = []
        experts.register_forward_hook(self._leave, with_kwargs=True)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        rows, arguments = self._experts.routing(**arguments)
        call = {name: tensor.detach() for name, tensor in arguments.items()}
        call["gradient"] = torch.zeros_like(y[rows])
        if y.requires_grad:
            y.register_hook(lambda gradient: call.update(gradient=gradient[rows]))
        self._calls.append(call)

    def store(self, batch: slice) -> None:
        """Put what the experts have seen since the last call into the workspace."""
        parts = {name: torch.cat([call[name] for call in self._calls]) for name in self._calls[0]}
        self._workspace.store(self._file(batch), parts)
        self._calls.clear()

    def run(self, number: str, batch: slice, precision: AbstractContextManager[Any]) -> None:
        """Run an expert forward and backward over its tokens of a batch, in the precision of the block."""
        expert = self._experts.get_submodule(number)
        assert isinstance(expert, Expert)
        device = next(expert.parameters()).device
        stored = self._workspace.mapped(self._file(batch))
        token, choice = (stored["top_k_index"] == int(number)).nonzero(as_tuple=True)
        if not len(token):
            return
        hidden, gradient = (stored[name][token].to(device) for name in ("hidden_states", "gradient"))
        weights = stored["top_k_weights"][token, choice].to(device)
        with precision:
            y = expert(hidden.requires_grad_())
        torch.autograd.backward(y, (gradient * weights[:, None]).to(y.dtype))

    def drop(self, batch: slice) -> None:
        """Delete what was stored of a batch."""
        self._workspace.drop(self._file(batch))

    def _file(self, batch: slice) -> str:
        return f"{self.name}.routed-{batch.start}"


def routed_tokens(block: nn.Module, prefix: str, layers: Mapping[str, str], workspace: Workspace) -> list[RoutedTokens]:
    """Of every module of experts in a block that has targets.

    prefix: begins the names of the block's modules. layers: name of a target -> its name in the block.
    """
    routed = []
    for name, module in block.named_modules():
        if isinstance(module, Experts):
            own = {target: block.get_submodule(n) for target, n in layers.items() if n.startswith(name + ".")}
            if own:
                routed.append(RoutedTokens(prefix + name, module, own, workspace))
    return routed
