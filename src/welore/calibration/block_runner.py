"""A decoder in parts: what lies around its blocks, and one block at a time.

A block is taken out of the model by its call: the model runs with its blocks replaced by doors that hand the hidden
states on, and the arguments that a door is given (masks, rotary embeddings) are those of its block. Decoders whose
blocks see more of each other than hidden states and arguments show it in a short trial.
"""

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from welore.errors import WeLoreError
from welore.models.copies import frozen_copy
from welore.models.skeleton import decoder_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-5  # of the logits of blocks alone, relative to the largest of the whole model


class _Reached(Exception):  # noqa: N818 - not an error: how a door stops the model
    """A door was reached, with these arguments."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.given = args, kwargs


class Parts:
    """What lies around the blocks of a decoder, and its blocks one at a time, as frozen copies.

    form: how many things a block returns in a tuple, None for the hidden states alone; learnt by running the first.
    """

    def __init__(
        self, model: "PreTrainedModel", device: torch.device, dtype: torch.dtype, form: int | None = None
    ) -> None:
        self.name, self._blocks = decoder_blocks(model)
        self.device, self.dtype, self.form = device, dtype, form
        self._shell: Any = frozen_copy(model, device, dtype, omitted=self._blocks)
        self._stop: int | None = None
        self._top = torch.empty(0)
        for index, block in enumerate(self._shell.get_submodule(self.name)):
            block.forward = lambda *args, index=index, **kwargs: self._door(index, args, kwargs)

    def __len__(self) -> int:
        return len(self._blocks)

    def block(self, index: int) -> nn.Module:
        """A block, in memory as long as it is held."""
        return frozen_copy(self._blocks[index], self.device, self.dtype)

    def first(self, ids: Tensor) -> Tensor:
        """The hidden states (b, length, width) that enter the first block."""
        args, kwargs = self._call(0, ids)
        return _hidden(args, kwargs)

    def through(self, index: int, block: nn.Module, ids: Tensor, hidden: Tensor) -> Tensor:
        """What the block makes of the hidden states of these tokens."""
        args, kwargs = self._call(index, ids)
        result = block(hidden, *args[1:], **kwargs) if args else block(**(kwargs | {"hidden_states": hidden}))
        if index == 0:
            self.form = None if isinstance(result, Tensor) else len(result)
        return result if isinstance(result, Tensor) else result[0]

    def logits(self, ids: Tensor, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits of hidden states that leave the last block, at these positions where the model can choose."""
        self._stop, self._top = None, hidden
        choice = {} if positions is None or not self.chooses else {"logits_to_keep": positions}
        return self._shell(ids, use_cache=False, **choice).logits

    @property
    def vocabulary(self) -> int:
        """How many logits a token has."""
        return int(self._shell.get_output_embeddings().weight.shape[0])

    @property
    def chooses(self) -> bool:
        """Whether the model computes the logits of chosen positions."""
        return "logits_to_keep" in inspect.signature(self._shell.forward).parameters

    @torch.no_grad()
    def _call(self, index: int, ids: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._stop = index
        try:
            self._shell(ids, use_cache=False)
        except _Reached as reached:
            return reached.given
        raise WeLoreError(f"{type(self._shell).__name__} never calls its decoder block {index}: it is not supported")

    def _door(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if index == self._stop:
            raise _Reached(args, kwargs)
        last = self._stop is None and index == len(self._blocks) - 1
        hidden = self._top if last else _hidden(args, kwargs)
        return hidden if self.form is None else (hidden, *[None] * (self.form - 1))


def parts_of(model: "PreTrainedModel", ids: Tensor) -> Parts | None:
    """The model in parts, if they make the same of a few tokens as the whole; else None."""
    parts, ids = Parts(model, model.device, model.dtype), ids.to(model.device)
    frozen: Any = frozen_copy(model, model.device, model.dtype)
    with torch.no_grad():
        expected = frozen(ids, use_cache=False).logits.float()
        try:
            hidden = parts.first(ids)
            for index in range(len(parts)):
                block, entered = parts.block(index), hidden
                hidden = parts.through(index, block, ids, entered)
                parts.through(index, block, ids, entered.flip(1))  # what it leaves behind is now that of other tokens
            found = parts.logits(ids, hidden).float()
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, WeLoreError):
            return None  # a block missed something that an earlier one leaves behind
    if not bool(torch.isfinite(expected).all()):
        raise WeLoreError("the model computes NaN or Inf: try --dtype float32, or look for damaged weights")
    same = float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())
    return parts if same else None


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    found = args[0] if args else kwargs["hidden_states"]
    assert isinstance(found, Tensor)
    return found
