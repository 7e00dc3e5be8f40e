"""Statistics of every targeted matrix of a decoder, with one block of it in memory at a time.

Three steps, each stored in a workspace so that a killed run goes on: forward, block after block, the hidden states at
every boundary go to disk; at the top the loss, with labels sampled from the model, gives the gradient there;
backward, block after block, each is run again with hooks on its targeted matrices. A decoder whose blocks cannot be
run one by one (see block_runner) runs as a whole model.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from welore.calibration.block_runner import BlockRunner, block_runner
from welore.calibration.hooks import Collector, Moments
from welore.config import CalibrationConfig
from welore.errors import WeLoreError
from welore.io.context import RunContext, finest_dtype
from welore.io.progress import Progress, counted
from welore.io.resume import Workspace
from welore.models.copies import frozen_copy
from welore.models.skeleton import decoder_blocks
from welore.models.targets import Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEACHER = "teacher"  # the group of the model's largest log-probabilities
TRIAL = 16  # tokens on which single blocks are compared with the model

MakeCollector = Callable[[Mapping[str, nn.Module]], Collector]
Finish = Callable[[Sequence[str], Collector, int], None]  # names of targets, their sums, over how many tokens


@dataclass(frozen=True)
class LabelledText:
    """ids (windows, length) and the uniform numbers that choose their labels, on the device; batches of windows."""

    ids: Tensor
    uniform: Tensor
    batches: list[slice]

    @classmethod
    def create(cls, ids: Tensor, seed: int, batch_size: int, device: torch.device) -> "LabelledText":
        """The text with the random numbers of a seed, which depend on neither device nor batch size."""
        uniform = torch.rand(ids.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        uniform = uniform.to(finest_dtype(device))
        batches = [slice(start, start + batch_size) for start in range(0, len(ids), batch_size)]
        return cls(ids.to(device), uniform.to(device), batches)


def collect_statistics(
    model: "PreTrainedModel",
    targets: Sequence[Target],
    ids: Tensor,
    config: CalibrationConfig,
    context: RunContext,
    *,
    collector: MakeCollector = Moments,
    finish: Finish | None = None,
    top_k: int = 0,
) -> dict[str, Any]:
    """Put the statistics of every targeted matrix into the context's workspace, each as "NAME.KIND".

    KIND is inputs, magnitudes, outputs or losses; or "about", which holds `count`, the tokens that reached the matrix,
    and `kept_as`, the bytes of the name under which its inputs lie (none if it was never reached).

    config.seed: of the labels. collector: makes what collects the statistics, for the layers of a block. finish: gets
    them, block by block, in place of the workspace; called again for a block if a run was killed in it. top_k: how many
    of the model's largest log-probabilities at every position are stored, too, for a student that learns from them:
    group "teacher" with "logprobs" (windows, length, k), float16, and "ids", int32 (see Teacher). The model runs whole
    if its blocks cannot be run one by one or a target lies outside them. Returns the numbers for the record.
    """
    assert context.workspace is not None
    dtype = getattr(torch, config.dtype)
    finish = finish or partial(_store, context.workspace)
    text = LabelledText.create(ids, config.seed, config.batch_size, context.device)
    teacher = Teacher(top_k) if top_k else None
    inside = decoder_blocks(model)[0] + "."
    if not config.whole_model and all(target.name.startswith(inside) for target in targets):
        runner = block_runner(model, text.ids[:1, :TRIAL], context.device, dtype)
        if runner is not None:
            layers: list[dict[str, str]] = [{} for _ in range(len(runner))]
            for target in targets:
                index, _, layer = target.name.removeprefix(inside).partition(".")
                layers[int(index)][target.name] = layer
            blocks = _BlockwisePass(runner, layers, text, teacher, context.workspace, collector, finish)
            return blocks.run(context.progress)
    model = frozen_copy(model, context.device, dtype)
    return _whole_pass(model, targets, text, teacher, context, collector, finish)


class Teacher:
    """The k largest log-probabilities of a model at the positions of a text, in their order.

    The last of them is that of the token which comes next in the text, where that is not among the others: so the
    model's loss on the text can be told. float16 changes a probability p by at most |log p| / 2048 of it.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self._logprobs: list[Tensor] = []
        self._ids: list[Tensor] = []

    @torch.no_grad()
    def read(self, logits: Tensor, following: Tensor) -> None:
        """Take those of the logits (tokens, vocabulary) of the next positions; following: (tokens,), the next ids."""
        scores = logits.float()
        ids = scores.topk(min(self.k, scores.shape[-1])).indices
        listed = (ids == following[:, None]).any(-1)
        ids[:, -1] = torch.where(listed, ids[:, -1], following)
        self._logprobs.append((scores.gather(-1, ids) - scores.logsumexp(-1, keepdim=True)).half())
        self._ids.append(ids.int())

    def tensors(self, windows: int) -> dict[str, Tensor]:
        """Of all positions (windows, length, k), on the CPU."""
        parts = {"logprobs": self._logprobs, "ids": self._ids}
        return {name: torch.cat(part).unflatten(0, (windows, -1)).cpu() for name, part in parts.items()}


@torch.no_grad()
def sampled_gradient(logits: Tensor, uniform: Tensor) -> tuple[Tensor, float]:
    """Gradient (tokens, vocabulary) of the summed cross-entropy at the logits, and that sum; labels from the model.

    uniform: (tokens,) in [0, 1): the label is where the cumulated probabilities pass it, on any device.
    """
    scores = logits.float()
    gradient = scores.softmax(-1)
    cumulated = gradient.cumsum(-1, dtype=uniform.dtype)
    labels = torch.searchsorted(cumulated, uniform[:, None] * cumulated[:, -1:], right=True)
    labels = labels.clamp_(max=logits.shape[-1] - 1).squeeze(1)
    loss = float(cross_entropy(scores, labels, reduction="sum"))
    if not math.isfinite(loss):
        raise WeLoreError("the model computes NaN or Inf: try --dtype float32, or look for damaged weights")
    gradient[torch.arange(len(labels), device=labels.device), labels] -= 1
    return gradient.to(logits.dtype), loss


@dataclass(frozen=True)
class _BlockwisePass:
    """One block at a time. Everything that was computed is in the workspace, or is computed when it is wanted."""

    runner: BlockRunner
    targets: list[dict[str, str]]  # of every block: name of a target -> its name in the block
    text: LabelledText
    teacher: Teacher | None
    workspace: Workspace
    collector: MakeCollector
    finish: Finish

    def run(self, progress: Progress) -> dict[str, Any]:
        """All statistics, from wherever an earlier run has left off."""
        count = len(self.runner)
        begun = next((i for i in range(count + 1) if self.workspace.holds(f"gradient-{i}")), count + 1)
        started = time.perf_counter()
        if begun > count:
            for index in counted(progress, range(count + 1), "blocks, forward"):
                self.boundary(index)
        forward = time.perf_counter()
        for index in counted(progress, range(begun - 1, -1, -1), "blocks, backward"):
            self.gradient(index)
        seconds = forward - started, time.perf_counter() - forward
        loss = self.workspace.fetch("loss")
        return _numbers("blocks", float(loss["mean"]) if loss else float("nan"), *seconds)

    @torch.no_grad()
    def boundary(self, index: int) -> Tensor:
        """Hidden states (windows, length, width) that enter block `index`, or leave the last one."""
        stored = self.workspace.fetch(f"boundary-{index}")
        if stored is not None:
            return stored["hidden"]
        runner, ids, batches = self.runner, self.text.ids, self.text.batches
        if index == 0:
            pieces = [runner.embed(ids[batch]).cpu() for batch in batches]
        else:
            below, block = self.boundary(index - 1), runner.block(index - 1)
            pieces = [
                runner.run(index - 1, block, ids[batch], below[batch].to(runner.device)).cpu() for batch in batches
            ]
        hidden = torch.cat(pieces)
        self.workspace.store(f"boundary-{index}", {"hidden": hidden})
        return hidden

    def gradient(self, index: int) -> Tensor:
        """Gradient of the summed loss at that boundary; the statistics of the block above it are stored on the way."""
        stored = self.workspace.fetch(f"gradient-{index}")
        if stored is not None:
            return stored["gradient"]
        gradient = self._head_gradient() if index == len(self.runner) else self._block_gradient(index)
        self.workspace.store(f"gradient-{index}", {"gradient": gradient})
        for name in (f"gradient-{index + 1}", f"boundary-{index + 1}"):
            self.workspace.drop(name)
        return gradient

    def _head_gradient(self) -> Tensor:
        runner = self.runner
        hidden, gradients, total = self.boundary(len(runner)), [], 0.0
        for ids, uniform, window in zip(self.text.ids, self.text.uniform, hidden, strict=True):
            leaf = window[None].to(runner.device).requires_grad_()
            for piece in runner.pieces(len(ids)):
                logits = runner.logits(ids[None], leaf, piece)
                if self.teacher is not None:
                    self.teacher.read(logits[0], ids.roll(-1)[piece])
                gradient, loss = sampled_gradient(logits[0], uniform[piece])
                torch.autograd.backward(logits, gradient[None])
                total += loss
            assert leaf.grad is not None
            gradients.append(leaf.grad.cpu())
        if self.teacher is not None:
            self.workspace.store(TEACHER, self.teacher.tensors(len(self.text.ids)))
        self.workspace.store("loss", {"mean": torch.tensor(total / self.text.ids.numel(), dtype=torch.float64)})
        return torch.cat(gradients)

    def _block_gradient(self, index: int) -> Tensor:
        above, hidden = self.gradient(index + 1), self.boundary(index)
        block, device = self.runner.block(index), self.runner.device
        collector = self.collector({name: block.get_submodule(layer) for name, layer in self.targets[index].items()})
        gradients = []
        for batch in self.text.batches:
            leaf = hidden[batch].to(device).requires_grad_()
            result = self.runner.run(index, block, self.text.ids[batch], leaf)
            torch.autograd.backward(result, above[batch].to(device))
            collector.end_batch()
            assert leaf.grad is not None
            gradients.append(leaf.grad.cpu())
        self.finish(list(self.targets[index]), collector, self.text.ids.numel())
        return torch.cat(gradients)


def _whole_pass(
    model: Any,
    targets: Sequence[Target],
    text: LabelledText,
    teacher: Teacher | None,
    context: RunContext,
    make: MakeCollector,
    finish: Finish,
) -> dict[str, Any]:
    """The model at once, forward and backward, all statistics in memory; equal to the blockwise pass."""
    assert context.workspace is not None
    names = [target.name for target in targets]
    collector = make({name: model.get_submodule(name) for name in names})
    model.get_input_embeddings().register_forward_hook(lambda _, __, embedded: embedded.requires_grad_())
    forward = backward = total = 0.0
    for batch in counted(context.progress, text.batches, "windows"):
        started = time.perf_counter()
        logits = model(text.ids[batch], use_cache=False).logits
        if teacher is not None:
            teacher.read(logits.flatten(0, 1), text.ids[batch].roll(-1, 1).flatten())
        sampled = [sampled_gradient(*window) for window in zip(logits, text.uniform[batch], strict=True)]
        total += sum(loss for _, loss in sampled)
        computed = time.perf_counter()
        torch.autograd.backward(logits, torch.stack([gradient for gradient, _ in sampled]))
        collector.end_batch()
        forward, backward = forward + computed - started, backward + time.perf_counter() - computed
    if teacher is not None:
        context.workspace.store(TEACHER, teacher.tensors(len(text.ids)))
    finish(names, collector, text.ids.numel())
    return _numbers("whole", total / text.ids.numel(), forward, backward)


def _numbers(mode: str, loss: float, forward: float, backward: float) -> dict[str, Any]:
    return {"mode": mode, "sampled_label_nll": loss, "seconds_forward": forward, "seconds_backward": backward}


def _store(workspace: Workspace, names: Sequence[str], collector: Collector, tokens: int) -> None:
    for name in names:
        for kind, group in collector.statistics(name, tokens):
            workspace.store(f"{name}.{kind}", group)
