"""Moments of every targeted matrix of a decoder, with one block of it in work at a time.

Three steps, each kept in a workspace so that a killed run goes on: forward, block after block, the hidden states at
every boundary go to disk; at the top the loss, with labels sampled from the model, gives the gradient there;
backward, block after block, each is run again with hooks on its targeted matrices. A decoder whose blocks cannot be
run alone (see parts) runs whole.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from welore.calibration.block_runner import Parts, parts_of
from welore.calibration.hooks import Collector, Moments
from welore.errors import WeLoreError
from welore.io.progress import Progress, counted, silent
from welore.io.resume import Workspace
from welore.models.copies import frozen_copy
from welore.models.skeleton import decoder_blocks
from welore.models.targets import Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRIAL = 16  # tokens on which blocks alone are compared with the whole model
LOGITS = 1 << 23  # numbers of the logits in memory at once

Collect = Callable[[Mapping[str, nn.Module]], Collector]


@dataclass(frozen=True)
class Sweep:
    """What was gathered: by blocks or whole; seconds forward and backward; the mean loss of the sampled labels."""

    road: str
    forward_seconds: float
    backward_seconds: float
    loss: float


def gather(
    model: "PreTrainedModel",
    targets: Sequence[Target],
    ids: Tensor,
    workspace: Workspace,
    *,
    seed: int = 0,
    batch_size: int = 4,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    whole: bool = False,
    collect: Collect = Moments,
    progress: Progress = silent,
) -> Sweep:
    """Put the statistics of every targeted matrix into the workspace, each under the name that `kept` gives.

    ids: (windows, length). batch_size: windows in work at once. dtype: of the computation. whole: run the model in
    one piece, as happens anyway if its blocks cannot be run alone or a target lies outside them. collect: what gathers
    them, made for the layers of a block. The model may lie
    in a mapped file: of a checkpoint on disk only the block in work is in memory.
    """
    place = torch.device(device) if device is not None else model.device
    uniform = torch.rand(ids.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    batches = list(range(0, len(ids), batch_size))
    text = _Text(ids.to(place), uniform.to(place), [slice(start, start + batch_size) for start in batches])
    inside = decoder_blocks(model)[0] + "."
    whole = whole or not all(target.name.startswith(inside) for target in targets)
    parts = None if whole else parts_of(model, ids[:1, :TRIAL])
    if parts is None:
        return _whole(frozen_copy(model, place, dtype), targets, text, workspace, collect, progress)
    return _Blocks(Parts(model, place, dtype, parts.form), targets, text, workspace, collect).gather(progress)


def kept(name: str, kind: str) -> str:
    """Name in the workspace of a statistic of a matrix; kind: inputs, magnitudes, outputs, losses.

    "about" holds `count`, the tokens that reached the matrix, and `kept_as`, the bytes of the name under which its
    inputs are kept (none if it was never reached).
    """
    return f"{name}.{kind}"


@dataclass(frozen=True)
class _Text:
    """ids, uniform: (windows, length), tokens and the uniform numbers that choose labels; batches of windows."""

    ids: Tensor
    uniform: Tensor
    batches: list[slice]


# --- labels sampled from the model ----------------------------------------------------------------------------------


@torch.no_grad()
def sampled_gradient(logits: Tensor, uniform: Tensor) -> tuple[Tensor, float]:
    """Gradient (tokens, vocabulary) of the summed cross-entropy at the logits, and that sum; labels from the model.

    uniform: (tokens,) in [0, 1): the label is where the cumulated probabilities pass it, on any device.
    """
    scores = logits.float()
    gradient = scores.softmax(-1)
    cumulated = gradient.cumsum(-1, dtype=torch.float64)
    labels = torch.searchsorted(cumulated, uniform[:, None] * cumulated[:, -1:], right=True)
    labels = labels.clamp_(max=logits.shape[-1] - 1).squeeze(1)
    loss = cross_entropy(scores, labels, reduction="sum")
    if not bool(torch.isfinite(loss)):
        raise WeLoreError("the model computes NaN or Inf: try --dtype float32, or look for damaged weights")
    gradient[torch.arange(len(labels), device=labels.device), labels] -= 1
    return gradient.to(logits.dtype), float(loss)


def _pieces(length: int, vocabulary: int) -> list[slice]:
    step = max(1, LOGITS // vocabulary)
    return [slice(start, start + step) for start in range(0, length, step)]


# --- the two roads --------------------------------------------------------------------------------------------------


class _Blocks:
    """One block at a time. Everything that was computed is in the workspace, or is computed when it is asked for."""

    def __init__(
        self, parts: Parts, targets: Sequence[Target], text: _Text, workspace: Workspace, collect: Collect
    ) -> None:
        self.parts, self.text, self.workspace, self.collect = parts, text, workspace, collect
        self.targets: list[dict[str, str]] = [{} for _ in range(len(parts))]
        for target in targets:
            index, _, rest = target.name.removeprefix(parts.name + ".").partition(".")
            self.targets[int(index)][target.name] = rest

    def gather(self, progress: Progress) -> Sweep:
        """All statistics, from wherever an earlier run has left off."""
        count = len(self.parts)
        begun = next((i for i in range(count + 1) if self.workspace.holds(f"gradient-{i}")), count + 1)
        started = time.perf_counter()
        if begun > count:
            for index in counted(progress, range(count + 1), "blocks, forward"):
                self.boundary(index)
        forward = time.perf_counter()
        for index in counted(progress, range(begun - 1, -1, -1), "blocks, backward"):
            self.gradient(index)
        done = time.perf_counter()
        loss = self.workspace.fetch("loss")
        return Sweep("blocks", forward - started, done - forward, float(loss["mean"]) if loss else float("nan"))

    @torch.no_grad()
    def boundary(self, index: int) -> Tensor:
        """Hidden states (windows, length, width) that enter block `index`, or leave the last one."""
        found = self.workspace.fetch(f"boundary-{index}")
        if found is not None:
            return found["hidden"]
        ids, batches, device = self.text.ids, self.text.batches, self.parts.device
        if index == 0:
            pieces = [self.parts.first(ids[batch]).cpu() for batch in batches]
        else:
            below, block = self.boundary(index - 1), self.parts.block(index - 1)
            pieces = [
                self.parts.through(index - 1, block, ids[batch], below[batch].to(device)).cpu() for batch in batches
            ]
        hidden = torch.cat(pieces)
        self.workspace.store(f"boundary-{index}", {"hidden": hidden})
        return hidden

    def gradient(self, index: int) -> Tensor:
        """Gradient of the summed loss at that boundary; the statistics of the block above it are kept on the way."""
        found = self.workspace.fetch(f"gradient-{index}")
        if found is not None:
            return found["gradient"]
        if index == len(self.parts):
            gradient = self._top()
        else:
            above = self.gradient(index + 1)
            gradient = self._block(index, self.boundary(index), above)
        self.workspace.store(f"gradient-{index}", {"gradient": gradient})
        for name in (f"gradient-{index + 1}", f"boundary-{index + 1}"):
            self.workspace.drop(name)
        return gradient

    def _top(self) -> Tensor:
        hidden, gradients, total = self.boundary(len(self.parts)), [], 0.0
        for ids, uniform, window in zip(self.text.ids, self.text.uniform, hidden, strict=True):
            leaf = window[None].to(self.parts.device).requires_grad_()
            pieces = _pieces(len(ids), self.parts.vocabulary) if self.parts.chooses else [slice(None)]
            for piece in pieces:
                positions = torch.arange(len(ids), device=ids.device)[piece]
                logits = self.parts.logits(ids[None], leaf, positions)
                gradient, loss = sampled_gradient(logits[0], uniform[piece])
                torch.autograd.backward(logits, gradient[None])
                total += loss
            assert leaf.grad is not None
            gradients.append(leaf.grad.cpu())
        self.workspace.store("loss", {"mean": torch.tensor(total / self.text.ids.numel(), dtype=torch.float64)})
        return torch.cat(gradients)

    def _block(self, index: int, hidden: Tensor, above: Tensor) -> Tensor:
        block, device = self.parts.block(index), self.parts.device
        collector = self.collect({name: block.get_submodule(rest) for name, rest in self.targets[index].items()})
        gradients = []
        for batch in self.text.batches:
            leaf = hidden[batch].to(device).requires_grad_()
            result = self.parts.through(index, block, self.text.ids[batch], leaf)
            torch.autograd.backward(result, above[batch].to(device))
            collector.end_batch()
            assert leaf.grad is not None
            gradients.append(leaf.grad.cpu())
        _store(collector, list(self.targets[index]), self.text.ids.numel(), self.workspace)
        return torch.cat(gradients)


def _whole(
    model: Any,
    targets: Sequence[Target],
    text: _Text,
    workspace: Workspace,
    collect: Collect,
    progress: Progress,
) -> Sweep:
    """The whole model at once, forward and backward, all statistics in memory: what the other road must equal."""
    names = [target.name for target in targets]
    collector = collect({name: model.get_submodule(name) for name in names})
    model.get_input_embeddings().register_forward_hook(lambda _, __, embedded: embedded.requires_grad_())
    forward = backward = total = 0.0
    for batch in counted(progress, text.batches, "windows"):
        started = time.perf_counter()
        logits = model(text.ids[batch], use_cache=False).logits
        found = [sampled_gradient(*window) for window in zip(logits, text.uniform[batch], strict=True)]
        total += sum(loss for _, loss in found)
        reached = time.perf_counter()
        torch.autograd.backward(logits, torch.stack([gradient for gradient, _ in found]))
        collector.end_batch()
        forward, backward = forward + reached - started, backward + time.perf_counter() - reached
    _store(collector, names, text.ids.numel(), workspace)
    return Sweep("whole", forward, backward, total / text.ids.numel())


def _store(collector: Collector, names: Sequence[str], tokens: int, workspace: Workspace) -> None:
    for name in names:
        for kind, group in collector.statistics(name, tokens):
            workspace.store(kept(name, kind), group)
