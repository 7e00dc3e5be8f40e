"""Statistics of every targeted matrix of a decoder, with one block of it in memory at a time.

Three steps, each stored in a workspace so that a killed run goes on: forward, block after block, the hidden states at
every boundary go to disk, batch by batch; at the top the loss, with labels sampled from the model, gives the gradient
there; backward, block after block, each is run again with hooks on its targeted matrices. A decoder whose blocks cannot
be run one by one (see block_runner) runs as a whole model.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from welore.calibration.block_runner import BlockRunner, block_runner, exact_logits
from welore.calibration.borrowing import Pool
from welore.calibration.hooks import Collector, Moments
from welore.calibration.routing import RoutedTokens, routed_tokens
from welore.config import AUTO, CalibrationConfig, DtypeName
from welore.errors import WeLoreError
from welore.io.context import RunContext
from welore.io.memory import free_memory
from welore.io.parallel import Processes
from welore.io.progress import counted
from welore.io.resume import Workspace
from welore.models.copies import frozen_copy
from welore.models.experts import experts_of
from welore.models.load import multiplies
from welore.models.skeleton import decoder_blocks
from welore.models.targets import Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEACHER = "teacher"  # the group of the model's largest log-probabilities
LOG = logging.getLogger(__name__)
LARGEST, GOLDEN = 0x7FFFFFFF, -0x61C88647  # of int32; 2^32 by the golden ratio
SHORT = 2e13  # parameters times tokens of a pass that a kill may lose
TRIAL = 16  # tokens on which single blocks are compared with the model

MakeCollector = Callable[[Mapping[str, nn.Module]], Collector]
Finish = Callable[[Sequence[str], Collector, int], None]  # names of targets, their sums, over how many tokens


@dataclass(frozen=True)
class LabelledText:
    """ids (windows, length) and the numbers that choose their labels, on the device; batches of windows.

    Several processes share the batches, so that a product is that of one process.
    """

    ids: Tensor
    numbers: Tensor
    all_batches: list[slice]
    processes: Processes

    @property
    def batches(self) -> list[slice]:
        """Those of this process."""
        return self.all_batches[self.processes.rank :: self.processes.size]

    @classmethod
    def create(cls, ids: Tensor, config: CalibrationConfig, context: RunContext) -> "LabelledText":
        """The text with the numbers of config.seed, which depend on neither device nor batches nor processes."""
        generator = torch.Generator().manual_seed(config.seed)
        numbers = torch.randint(-LARGEST - 1, LARGEST + 1, ids.shape, dtype=torch.int32, generator=generator)
        batches = [slice(start, start + config.batch_size) for start in range(0, len(ids), config.batch_size)]
        return cls(ids.to(context.device), numbers.to(context.device), batches, context.processes)


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
    them, block by block, in place of the workspace; called again for a block if a run was killed in it. Its `compare`,
    if any, gets those of all experts of a layer before. top_k: how many of the model's largest log-probabilities at
    every position are stored, too, for a student that learns from them: group "teacher" with "logprobs" (windows,
    length, k), float16, and "ids", int32 (see Teacher). The model runs whole if that is wanted, or short and easy
    (`is_small`), or if its blocks cannot be run one by one or a target lies outside. Returns numbers for the record.
    """
    dtype, products = precision(config.dtype, context.device)
    finish = finish or partial(_store, context)
    text, teacher = LabelledText.create(ids, config, context), Teacher(top_k) if top_k else None
    layers = _by_block(decoder_blocks(model)[0] + ".", targets)
    if "" not in layers and not _runs_whole(model, targets, text, config, context):
        runner = block_runner(model, ids[:1, :TRIAL], context.device, dtype, products)
        if runner is not None:
            return _BlockwisePass(runner, layers, text, teacher, context, collector, finish).run()
        LOG.warning("the blocks of this decoder cannot be run one by one: it runs as a whole")
    if collector is Moments:
        collector = partial(Moments, experts=experts_of(model))
    _require_memory(model, targets, min(config.batch_size, len(ids)) * ids.shape[1], context.device)
    model = mixed(frozen_copy(model, context.device, dtype), context.device, products)
    return _whole_pass(model, layers, text, teacher, context, collector, finish)


def _by_block(inside: str, targets: Sequence[Target]) -> dict[str, dict[str, str]]:
    """Number of a block -> name of a target -> its name in the block; "" for targets outside of the blocks."""
    layers: dict[str, dict[str, str]] = {}
    for name in (target.name for target in targets):
        index, _, layer = name.removeprefix(inside).partition(".") if name.startswith(inside) else ("", "", name)
        layers.setdefault(index, {})[name] = layer
    return layers


def _runs_whole(
    model: Any, targets: Sequence[Target], text: LabelledText, config: CalibrationConfig, context: RunContext
) -> bool:
    """Whether the model runs whole; a killed run does not change its mind."""
    if config.whole_model is not None:
        return config.whole_model
    stored = context.work.fetch("whole")
    if stored is None:
        at_once = context.processes.size if context.device.type == "cpu" else 1
        free = (free_memory(context.device) or 0) // at_once
        small = is_small(model, targets, text.ids.shape, config.batch_size, free)
        stored = {"whole": torch.tensor(context.processes.agreed(small))}
        if context.processes.is_main:
            context.work.store("whole", stored)
    return bool(stored["whole"])


def is_small(model: Any, targets: Sequence[Target], text: tuple[int, ...], batch_size: int, free: int | None) -> bool:
    """Whether statistics of a whole model take half of the free memory at most, and minutes: a kill begins anew.

    text: windows, and tokens of each. free: bytes, None where nothing tells.
    """
    windows, length = text
    short = windows * length * sum(parameter.numel() for parameter in model.parameters()) < SHORT
    return short and whole_bytes(model, targets, min(batch_size, windows) * length) < (free or 0) / 2


def whole_bytes(model: Any, targets: Sequence[Target], tokens: int) -> int:
    """Memory of a whole model in a pass: parameters in float32 and bfloat16, all sums, a batch of so many tokens."""
    shapes = [target.shape for target in targets]
    moments = sum(4 * (m * m + n * n) for m, n in shapes)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    a_token = 6 * sum(m + n for m, n in shapes) + 16 * int(model.get_input_embeddings().weight.shape[0])
    return 6 * parameters + moments + tokens * a_token


def _require_memory(model: Any, targets: Sequence[Target], tokens: int, device: torch.device) -> None:
    """Raise WeLoreError if a device cannot hold a whole model in a pass with batches of so many tokens."""
    needed, free = whole_bytes(model, targets, tokens), free_memory(device)
    if free is not None and needed > free:
        raise WeLoreError(
            f"the statistics of the whole model take {needed / 1e9:.1f} GB at once, and {device} has "
            f"{free / 1e9:.1f} GB free: leave out --whole-model, target fewer matrices with --include, or take another "
            "device"
        )


def fast_dtype(name: DtypeName, device: torch.device) -> DtypeName:
    """The name of a dtype; of "auto" bfloat16 where the device multiplies it, else float32."""
    if name != AUTO:
        return name
    return "bfloat16" if multiplies(torch.bfloat16, device) else "float32"


def precision(name: DtypeName, device: torch.device) -> tuple[torch.dtype, torch.dtype | None]:
    """The dtype of the computation, and that of the products in its blocks where it is another one.

    With bfloat16 only the products are that: hidden states, logits and sums are float32.
    """
    name = fast_dtype(name, device)
    return (torch.float32, torch.bfloat16) if name == "bfloat16" else (getattr(torch, name), None)


def mixed(model: Any, device: torch.device, products: torch.dtype | None) -> Any:
    """The model, which computes its products, but for the logits, in another dtype."""
    if products is not None:
        exact_logits(model, products)
        model.forward = torch.autocast(device.type, products)(model.forward)
    return model


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

    def tensors(self, length: int) -> dict[str, Tensor]:
        """Of all positions (windows, length, k), on the CPU; nothing if there are none."""
        parts = {"logprobs": self._logprobs, "ids": self._ids}
        return {name: torch.cat(part).unflatten(0, (-1, length)).cpu() for name, part in parts.items() if part}


@torch.no_grad()
def sampled_gradient(logits: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient (tokens, vocabulary) of the summed cross-entropy at the logits, and that sum; labels from the model.

    numbers: (tokens,) int32, random. With the number of an entry of the vocabulary each gives an exponential variate
    E; the label is where p / E is largest (Gumbel-max), which happens with probability p. A small change of the
    probabilities changes few labels: about as many as the sum of all changes of p.
    """
    scores = logits.float()
    gradient = scores.softmax(-1)
    size = logits.shape[-1]
    words = _mixed(torch.arange(size, dtype=torch.int32, device=logits.device) * GOLDEN)
    uniform = (_mixed(numbers[:, None] ^ words) & LARGEST).float().add_(0.5).mul_(1 / (LARGEST + 1))
    labels = (gradient / uniform.neg_().log1p_().neg_()).argmax(-1)
    loss = cross_entropy(scores, labels, reduction="sum")
    gradient[torch.arange(len(labels), device=labels.device), labels] -= 1
    return gradient.to(logits.dtype), loss


def _mixed(x: Tensor) -> Tensor:
    """Integers (int32) whose every bit depends on all bits of those given; a bijection (lowbias32, C. Wellons)."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x.mul_(0x7FEB352D)
    x ^= (x >> 15) & 0x1FFFF
    x.mul_(0x846CA68B - (1 << 32))
    x ^= (x >> 16) & 0xFFFF
    return x


def _require_finite(loss: Tensor) -> None:
    if not math.isfinite(loss):
        raise WeLoreError("the model computes NaN or Inf: try --dtype float32, or look for damaged weights")


@dataclass(frozen=True)
class _BlockwisePass:
    """One block, and one batch of hidden states, at a time.

    Everything that was computed is in the workspace, or is computed when it is wanted. "loss" and "block-INDEX" say
    that the head and a block are done.
    """

    runner: BlockRunner
    targets: dict[str, dict[str, str]]  # number of a block: name of a target -> its name in the block
    text: LabelledText
    teacher: Teacher | None
    context: RunContext
    collector: MakeCollector
    finish: Finish

    @property
    def workspace(self) -> Workspace:
        """Where everything is stored."""
        return self.context.work

    def run(self) -> dict[str, Any]:
        """All statistics, from wherever an earlier run has left off."""
        count, progress, started = len(self.runner), self.context.progress, time.perf_counter()
        if not self.workspace.holds("loss"):
            for index in counted(progress, range(count + 1), "blocks, forward"):
                self.forward(index)
            self.head()
        forward = time.perf_counter()
        for index in counted(progress, range(count - 1, -1, -1), "blocks, backward"):
            if not self.workspace.holds(f"block-{index}"):
                self.backward(index)
        seconds = forward - started, time.perf_counter() - forward
        loss = self.workspace.fetch("loss")
        return _numbers("blocks", float(loss["mean"]) if loss else float("nan"), *seconds)

    def forward(self, index: int) -> None:
        """Hidden states that enter block `index`, or leave the last one."""
        block = self.runner.block(index - 1) if index else None
        for batch in self.text.batches:
            self.boundary(index, batch, block)

    def head(self) -> None:
        """The loss and its gradient at the last boundary, and what a student learns from."""
        count = len(self.runner)
        total = torch.zeros((), device=self.runner.device)
        for batch in self.text.batches:
            total += self.head_gradient(batch, self.teacher)
        _store_head(total, self.teacher, self.text, self.workspace)
        self.drop(boundary=count)

    def backward(self, index: int) -> None:
        """The statistics of a block, and the gradients below it."""
        block = self.runner.block(index)
        targets = self.targets.get(str(index), {})
        routed = routed_tokens(block, f"{self.runner.name}.{index}.", targets, self.workspace)
        single = {name for experts in routed for name in experts.layers}
        together = [name for name in targets if name not in single]
        collector = self.collector({name: block.get_submodule(targets[name]) for name in together})
        for batch in self.text.batches:
            self.block_gradient(index, batch, block)
            collector.end_batch()
            for experts in routed:
                experts.store(batch)
        collector.reduce(self.text.processes)
        self.finish(together, collector, self.text.ids.numel())
        del collector
        for experts in routed:
            self.experts(experts)
        if self.text.processes.is_main:
            self.workspace.store(f"block-{index}", {"done": torch.ones(1)})
        self.text.processes.wait()
        self.drop(boundary=index, gradient=index + 1)

    def experts(self, routed: RoutedTokens) -> None:
        """The statistics of the experts of a layer, of a few at a time."""
        groups: dict[str, dict[str, nn.Module]] = {}  # number of an expert -> its layers
        for name, layer in routed.layers.items():
            groups.setdefault(name.removeprefix(routed.name + ".").partition(".")[0], {})[name] = layer
        processes, tokens, pool = self.text.processes, self.text.ids.numel(), Pool()
        waiting: list[tuple[list[str], Moments]] = []
        at_once = self.context.workers * processes.size
        for start in range(0, len(groups), at_once):
            numbers = list(groups)[start : start + at_once]
            layers = {name: layer for number in numbers for name, layer in groups[number].items()}
            collector = self.collector(layers)
            for batch in self.text.batches:
                for number in numbers:
                    routed.run(number, batch, self.runner.precision())
                collector.end_batch()
            collector.reduce(processes)
            if isinstance(collector, Moments):  # they borrow from each other
                pool.add(collector)
                collector.set_aside(self.workspace, processes)
                waiting.append((list(layers), collector))
            else:
                self.finish(list(layers), collector, tokens)
        for batch in self.text.batches:
            routed.drop(batch)
        processes.wait()
        compare = getattr(self.finish, "compare", None)  # all experts of the layer, before any is used up
        for names, moments in waiting:
            moments.take_back(self.workspace, processes)
            pool.lend(moments)
            (compare or self.finish)(names, moments, tokens)
            if compare:
                moments.set_aside(self.workspace, processes)
        processes.wait()
        for names, moments in waiting if compare else ():
            moments.take_back(self.workspace, processes)
            self.finish(names, moments, tokens)

    def drop(self, **names: int) -> None:
        """Delete hidden states or gradients of all batches."""
        for kind, index in names.items():
            for batch in self.text.batches:
                self.workspace.drop(_name(kind, index, batch))

    @torch.no_grad()
    def boundary(self, index: int, batch: slice, block: nn.Module | None = None) -> Tensor:
        """Hidden states (batch, length, width) that enter block `index`; block: the one below, if it is in memory."""
        name, runner, ids = _name("boundary", index, batch), self.runner, self.text.ids[batch]
        stored = self.workspace.fetch(name)
        if stored is not None:
            return stored["hidden"].to(runner.device, runner.dtype)
        if index == 0:
            hidden = runner.embed(ids)
        else:
            below = self.boundary(index - 1, batch)
            hidden = runner.run(index - 1, block or runner.block(index - 1), ids, below)
        hidden = hidden.to(runner.products or hidden.dtype)
        self.workspace.store(name, {"hidden": hidden})
        return hidden.to(runner.dtype)

    def gradient(self, index: int, batch: slice) -> Tensor:
        """Gradient of the summed loss at a boundary."""
        stored = self.workspace.fetch(_name("gradient", index, batch))
        if stored is not None:
            return stored["gradient"].to(self.runner.device, self.runner.dtype)
        if index == len(self.runner):
            self.head_gradient(batch)
        else:
            self.block_gradient(index, batch, self.runner.block(index))
        return self.gradient(index, batch)

    def block_gradient(self, index: int, batch: slice, block: nn.Module) -> None:
        """Run a block forward and backward, and store the gradient at the boundary below."""
        leaf = self.boundary(index, batch).requires_grad_()
        result = self.runner.run(index, block, self.text.ids[batch], leaf)
        torch.autograd.backward(result, self.gradient(index + 1, batch))
        assert leaf.grad is not None
        if index:
            self.store_gradient(index, batch, leaf.grad)

    def store_gradient(self, index: int, batch: slice, gradient: Tensor) -> None:
        """Put the gradient at a boundary into the workspace."""
        kind = self.runner.products or gradient.dtype
        self.workspace.store(_name("gradient", index, batch), {"gradient": gradient.to(kind)})

    def head_gradient(self, batch: slice, teacher: Teacher | None = None) -> Tensor:
        """The summed loss; its gradient at the last boundary is stored."""
        runner, loss, gradients = self.runner, torch.zeros((), device=self.runner.device), []
        windows = self.boundary(len(runner), batch).split(1)
        for ids, numbers, window in zip(self.text.ids[batch], self.text.numbers[batch], windows, strict=True):
            leaf = window.requires_grad_()
            for piece in runner.pieces(len(ids)):
                logits = runner.logits(ids[None], leaf, piece)
                if teacher is not None:
                    teacher.read(logits[0], ids.roll(-1)[piece])
                gradient, summed = sampled_gradient(logits[0], numbers[piece])
                torch.autograd.backward(logits, gradient[None])
                loss += summed
            assert leaf.grad is not None
            gradients.append(leaf.grad)
        _require_finite(loss)
        self.store_gradient(len(runner), batch, torch.cat(gradients))
        return loss


def _whole_pass(
    model: Any,
    layers: Mapping[str, Mapping[str, str]],
    text: LabelledText,
    teacher: Teacher | None,
    context: RunContext,
    make: MakeCollector,
    finish: Finish,
) -> dict[str, Any]:
    """The model at once, forward and backward, all statistics in memory; equal to the blockwise pass."""
    collector = make({name: model.get_submodule(name) for block in layers.values() for name in block})
    model.get_input_embeddings().register_forward_hook(lambda _, __, embedded: embedded.requires_grad_())
    total, forward, backward = torch.zeros((), device=text.ids.device), 0.0, 0.0
    for batch in counted(context.progress, text.batches, "windows"):
        started = time.perf_counter()
        logits = model(text.ids[batch], use_cache=False).logits
        if teacher is not None:
            teacher.read(logits.flatten(0, 1), text.ids[batch].roll(-1, 1).flatten())
        sampled = [sampled_gradient(*window) for window in zip(logits, text.numbers[batch], strict=True)]
        total += torch.stack([loss for _, loss in sampled]).sum()
        _require_finite(total)
        computed = time.perf_counter()
        torch.autograd.backward(logits, torch.stack([gradient for gradient, _ in sampled]))
        collector.end_batch()
        forward, backward = forward + computed - started, backward + time.perf_counter() - computed
    loss = _store_head(total, teacher, text, context.work)
    collector.reduce(text.processes)
    for block in layers.values():
        finish(list(block), collector, text.ids.numel())
    text.processes.wait()
    return _numbers("whole", loss, forward, backward)


def _numbers(mode: str, loss: float, forward: float, backward: float) -> dict[str, Any]:
    return {"mode": mode, "sampled_label_nll": loss, "seconds_forward": forward, "seconds_backward": backward}


def _name(kind: str, index: int, batch: slice) -> str:
    return f"{kind}-{index}-{batch.start}"


def _store_head(total: Tensor, teacher: Teacher | None, text: LabelledText, workspace: Workspace) -> float:
    """Store what all processes have seen at the head; the mean loss."""
    parts = text.processes.gather((float(total), teacher.tensors(text.ids.shape[1]) if teacher else {}))
    mean = sum(loss for loss, _ in parts) / text.ids.numel()
    if not text.processes.is_main:
        return mean
    if teacher is not None:
        stacked = {name: part.new_empty((len(text.ids), *part.shape[1:])) for name, part in parts[0][1].items()}
        for rank, (_, part) in enumerate(parts):
            for name, tensor in part.items():
                mine = [torch.arange(len(text.ids))[batch] for batch in text.all_batches[rank :: len(parts)]]
                stacked[name][torch.cat(mine)] = tensor
        workspace.store(TEACHER, stacked)
    workspace.store("loss", {"mean": torch.tensor(mean, dtype=torch.float64)})
    return mean


def _store(context: RunContext, names: Sequence[str], collector: Collector, tokens: int) -> None:
    for name in names:
        for kind, group in collector.statistics(name, tokens):
            if context.processes.is_main:
                context.work.store(f"{name}.{kind}", group)
