"""A decoder run one block at a time: what lies around its blocks, and the blocks as frozen copies.

The model runs with the forward of every block replaced: it hands the hidden states on, or stops the run and shows the
arguments (masks, rotary embeddings) with which its block is called. A short trial tells decoders whose blocks share
more than hidden states and arguments.
"""

import inspect
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from welore.errors import WeLoreError
from welore.io.memory import free_memory
from welore.io.pages import give_back
from welore.layers.experts import Experts
from welore.layers.frozen_linear import leave_weights
from welore.layers.head import pieces_of
from welore.models.copies import frozen_copy
from welore.models.skeleton import decoder_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS = 1 << 23  # numbers of the logits in memory at once
TOLERANCE = 1e-5  # of the logits of single blocks, relative to the largest logit of the model


class _BlockCalledError(Exception):
    """Stops the model at a block, with the arguments of its call."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.arguments = args, kwargs


class _Logits(torch.autograd.Function):
    """A float32 product with a weight (V, width) in its own dtype, whose backward pass multiplies in a lower dtype."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor) -> Tensor:
        ctx.low = low
        logits = torch.cat([linear(hidden, piece.float()) for piece in pieces_of(weight)], dim=-1)
        return logits if bias is None else logits.add_(bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (gradients[0].to(ctx.low.dtype) @ ctx.low).to(gradients[0].dtype), None, None, None


def exact_logits(model: Any, products: torch.dtype) -> None:
    """Make the head of a frozen copy compute float32 logits under autocast, and their gradient in a lower dtype.

    A logit of 20, rounded to bfloat16, changes its probability by up to 6 %.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return
    low = head.weight.to(products)

    @torch.autocast(low.device.type, enabled=False)
    def forward(hidden: Tensor) -> Any:
        return _Logits.apply(hidden.float(), head.weight, head.bias, low)

    head.forward = forward  # type: ignore[method-assign]


class BlockRunner:
    """Runs single blocks of a decoder. The backbone, all but the blocks, stays on the device.

    products: dtype of the products in the blocks, where it is not that of everything else. outputs: how many values a
    block returns as a tuple, None for the hidden states alone; learnt from the first block.
    """

    def __init__(
        self, model: "PreTrainedModel", device: torch.device, dtype: torch.dtype, products: torch.dtype | None = None
    ) -> None:
        self.name, self._blocks = decoder_blocks(model)
        self.device, self.dtype, self.products = device, dtype, products
        self.outputs: int | None = None
        tables = [model.get_input_embeddings(), model.get_output_embeddings()] if products is not None else []
        exact = [table for table in tables if isinstance(table, nn.Embedding | nn.Linear)]
        self._backbone: Any = frozen_copy(model, device, dtype, omitted=self._blocks, unchanged=exact)
        if products is not None:
            self._backbone.get_input_embeddings().register_forward_hook(lambda _, __, embedded: embedded.to(dtype))
            exact_logits(self._backbone, products)
        self._in_files: list[Tensor] = []
        self._stop: int | None = None
        self._last_hidden = torch.empty(0)
        for index, block in enumerate(self._backbone.get_submodule(self.name)):
            block.forward = lambda *args, index=index, **kwargs: self._replaced_forward(index, args, kwargs)

    def __len__(self) -> int:
        return len(self._blocks)

    def block(self, index: int) -> nn.Module:
        """A block, in memory as long as it is held; the weights of its experts are converted when they multiply."""
        give_back(self._in_files)
        block, experts = self._blocks[index], _expert_layers(self._blocks[index])
        copied: nn.Module = frozen_copy(block, self.device, self.dtype, unchanged=experts)
        leave_weights(_expert_layers(copied), self.products or self.dtype)
        self._in_files = [parameter for layer in experts for parameter in layer.parameters()]
        if self.dtype != next(block.parameters()).dtype:  # the copy shares nothing else with the weights' file
            used = set(map(id, self._in_files))
            give_back(parameter for parameter in block.parameters() if id(parameter) not in used)
        return copied

    def precision(self) -> AbstractContextManager[Any]:
        """In which the products of blocks are computed."""
        return torch.autocast(self.device.type, self.products, enabled=self.products is not None)

    def embed(self, ids: Tensor) -> Tensor:
        """The hidden states (b, length, width) that enter the first block."""
        return _hidden_states(*self._arguments(0, ids))

    def run(self, index: int, block: nn.Module, ids: Tensor, hidden: Tensor) -> Tensor:
        """The hidden states that leave the block, of those that enter it for these tokens."""
        args, kwargs = self._arguments(index, ids)
        with self.precision():
            result = block(hidden, *args[1:], **kwargs) if args else block(**(kwargs | {"hidden_states": hidden}))
        if index == 0:
            self.outputs = None if isinstance(result, Tensor) else len(result)
        return result if isinstance(result, Tensor) else result[0]

    def logits(self, ids: Tensor, hidden: Tensor, piece: slice = slice(None)) -> Tensor:
        """Logits of hidden states that leave the last block, at the positions of a piece."""
        self._stop, self._last_hidden = None, hidden
        positions = torch.arange(ids.shape[1], device=ids.device)[piece]
        choice = {} if len(positions) == ids.shape[1] else {"logits_to_keep": positions}
        return self._backbone(ids, use_cache=False, **choice).logits

    def pieces(self, length: int) -> list[slice]:
        """The positions whose logits are in memory at once: all of them if the model cannot choose."""
        if "logits_to_keep" not in inspect.signature(self._backbone.forward).parameters:
            return [slice(0, length)]
        step = max(1, LOGITS // int(self._backbone.get_output_embeddings().weight.shape[0]))
        return [slice(start, start + step) for start in range(0, length, step)]

    @torch.no_grad()
    def _arguments(self, index: int, ids: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._stop = index
        try:
            self._backbone(ids, use_cache=False)
        except _BlockCalledError as called:
            return called.arguments
        raise WeLoreError(f"{type(self._backbone).__name__} never calls its decoder block {index}: it is not supported")

    def _replaced_forward(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if index == self._stop:
            raise _BlockCalledError(args, kwargs)
        last = self._stop is None and index == len(self._blocks) - 1
        hidden = self._last_hidden if last else _hidden_states(args, kwargs)
        return hidden if self.outputs is None else (hidden, *[None] * (self.outputs - 1))


def block_runner(
    model: "PreTrainedModel", ids: Tensor, device: torch.device, dtype: torch.dtype, products: torch.dtype | None
) -> BlockRunner | None:
    """A runner of the model's blocks; None unless they agree with the model on a few tokens (1, length).

    A model that is too large for the device is tried where it lies.
    """
    free = free_memory(device)
    size = sum(tensor.numel() * tensor.itemsize for tensor in model.parameters())
    where = model.device if free is not None and size > free / 2 else device
    trial, tokens = BlockRunner(model, where, model.dtype), ids.to(where)
    frozen: Any = frozen_copy(model, where, model.dtype)
    with torch.no_grad():
        expected = frozen(tokens, use_cache=False).logits.float()
        try:
            hidden = trial.embed(tokens)
            for index in range(len(trial)):
                block, entered = trial.block(index), hidden
                hidden = trial.run(index, block, tokens, entered)
                trial.run(index, block, tokens, entered.flip(1))  # anything left behind is now that of other tokens
            logits = trial.logits(tokens, hidden).float()
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, WeLoreError):
            return None  # a block missed something that an earlier one leaves behind
    if not bool(torch.isfinite(expected).all()):
        raise WeLoreError("the model computes NaN or Inf: try --dtype float32, or look for damaged weights")
    if float((logits - expected).abs().max()) > TOLERANCE * float(expected.abs().max()):
        return None
    runner = BlockRunner(model, device, dtype, products)
    runner.outputs = trial.outputs
    give_back(model.parameters())
    return runner


def _expert_layers(block: nn.Module) -> list[nn.Linear]:
    """The layers of the experts of a block."""
    experts = [module for module in block.modules() if isinstance(module, Experts)]
    return [layer for module in experts for layer in module.modules() if type(layer) is nn.Linear]


def _hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden = args[0] if args else kwargs["hidden_states"]
    assert isinstance(hidden, Tensor)
    return hidden
