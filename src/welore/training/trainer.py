"""transformers' Trainer with a clock: the same numbers, and where time and memory went."""

import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.functional import cross_entropy
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback

from welore.errors import DivergedError
from welore.io.progress import Progress, counted
from welore.training.data import IGNORED, Batch

WARM_UP = 2  # steps that are not timed: memory is allocated and caches are filled then
CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass
class Clock:
    """Seconds and tokens of every optimiser step, in this process; padding is not a token.

    step: from the first forward pass to the end of the optimiser's step. forward and backward are parts of it;
    the rest is clipping and the optimiser. Evaluating, saving and reading data are outside.
    """

    step: list[float] = field(default_factory=list)
    forward: list[float] = field(default_factory=list)
    compute: list[float] = field(default_factory=list)  # forward and backward
    teacher: list[float] = field(default_factory=list)  # its forward pass, where a model is distilled
    tokens: list[int] = field(default_factory=list)
    memory_before_bytes: int = 0  # in use before the first step: the model, and on a CPU the program

    def numbers(self, tokens_elsewhere: float = 1.0) -> dict[str, Any]:
        """Tokens per second and seconds of a step, without the first steps.

        tokens_elsewhere: tokens of all processes, as a multiple of this one's.
        """
        skip = WARM_UP if len(self.step) > WARM_UP else 0
        steps = len(self.step) - skip
        if not steps:
            return {"timed_steps": 0}
        books = (self.step, self.forward, self.compute, self.teacher)
        wall, forward, compute, teacher = (sum(values[skip:]) for values in books)
        return {
            "timed_steps": steps,
            "tokens_per_second": sum(self.tokens[skip:]) * tokens_elsewhere / wall,
            "seconds_per_step": wall / steps,
            "seconds_forward": forward / steps,
            "seconds_backward": (compute - forward - teacher) / steps,
            "seconds_optimizer": (wall - compute) / steps,
        } | ({"seconds_teacher": teacher / steps} if teacher else {})


class ClockedTrainer(Trainer):
    """A Trainer that takes its items in the given order, and evaluates exactly.

    evaluation: batches on the CPU. Their loss is summed over all tokens in float64 and divided once, so that it
    depends neither on the batches nor on the number of processes. show: what a teacher does with a batch before the
    model reads it.
    """

    def __init__(
        self, *args: Any, evaluation: Sequence[Batch], show: Callable[[Batch], None] | None = None, **kwargs: Any
    ) -> None:
        self.clock = Clock()
        self.evaluation, self.show = evaluation, show
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled and self.args.bf16:  # accelerate would add up gradients, and give the loss, in bfloat16
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = policy

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)  # type: ignore[arg-type]

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's, timed."""
        mask = inputs.get("attention_mask")
        self.clock.tokens[-1] += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        started = self.now()
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.clock.compute[-1] += self.now() - started
        return loss

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, timed; the teacher reads first."""
        started = self.now()
        if self.show is not None:
            self.show(inputs)
            self.clock.teacher[-1] += self.now() - started
            started = self.now()
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.clock.forward[-1] += self.now() - started
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Mean negative log-likelihood over all tokens held out, and its exponential."""
        mean = self.held_out_loss(self.model)
        if not math.isfinite(mean):
            raise DivergedError(
                "the model computes NaN or Inf on the held-out part: try a smaller --learning-rate, or float32"
            )
        metrics = {"eval_loss": mean, "eval_perplexity": math.exp(min(mean, 700.0))}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def held_out_loss(self, model: Any) -> float:
        """Mean negative log-likelihood of a model over all tokens held out."""
        device = self.args.device
        mine = share(self.evaluation, self.args.process_index, self.args.world_size)
        sums = torch.tensor(_loss_of(model, mine, device), dtype=torch.float64, device=device)
        total, tokens = self.accelerator.reduce(sums, "sum").tolist()
        return float(total / tokens)

    def now(self) -> float:
        """Seconds, when everything asked of the GPU so far is done."""
        if self.args.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class StepCallback(TrainerCallback):
    """Starts and stops the clock of each step, moves the progress bar, and stops a run whose loss is not a number."""

    def __init__(self, steps: int, progress: Progress) -> None:
        self.trainer: Any = None
        self.bar = iter(counted(progress, range(steps), "finetune"))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Memory is counted from here on."""
        self.trainer.clock.memory_before_bytes = forget_peak_memory(args.device)
        for _step in range(state.global_step + 1):
            next(self.bar, None)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A new line in the clock's books."""
        clock = self.trainer.clock
        for values in (clock.forward, clock.compute, clock.teacher, clock.tokens):
            values.append(0)
        clock.step.append(self.trainer.now())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """What the step took."""
        clock = self.trainer.clock
        clock.step[-1] = self.trainer.now() - clock.step[-1]
        next(self.bar, None)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """No sense in going on without a loss."""
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise DivergedError(
                f"the training loss is {loss} at step {state.global_step}: try a smaller --learning-rate, longer "
                "--warmup-steps or --dtype float32; earlier checkpoints are kept"
            )


def share(batches: Sequence[Batch], process: int, processes: int) -> list[Batch]:
    """Every `processes`-th batch from number `process` on, as many for each process: the last may have no labels.

    Where parameters are cut over the processes, every call of the model gathers them: all must call equally often.
    """
    mine = list(batches[process::processes])
    if len(mine) * processes < len(batches):
        mine.append(batches[0] | {"labels": torch.full_like(batches[0]["labels"], IGNORED)})
    return mine


@torch.no_grad()
def _loss_of(model: Any, batches: Sequence[Batch], device: torch.device) -> tuple[float, float]:
    """Sum of -log p over the labelled tokens, and their number; float32 logits, float64 sums."""
    total, tokens = 0.0, 0
    training = model.training
    model.eval()
    for batch in batches:
        labels = batch["labels"].to(device)
        inputs = {name: values.to(device) for name, values in batch.items() if name != "labels"}
        logits = model(**inputs, use_cache=False).logits
        for scores, wanted in zip(logits, labels, strict=True):
            losses = cross_entropy(scores[:-1].float(), wanted[1:], reduction="none", ignore_index=IGNORED)
            total += float(losses.sum(dtype=torch.float64))
        tokens += int((labels[:, 1:] != IGNORED).sum())
    model.train(training)
    return total, float(tokens)


def forget_peak_memory(device: torch.device) -> int:
    """Begin to count anew, where the system allows it; bytes in use now, 0 where they are not known."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5")  # Linux: the high-water mark becomes what is used now
    return _status("VmRSS") if STATUS.exists() else 0


def peak_memory(device: torch.device) -> dict[str, Any]:
    """Largest memory since `forget_peak_memory`: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(device), "peak_memory_of": "tensors on the GPU"}
    if STATUS.exists():
        return {"peak_memory_bytes": _status("VmHWM"), "peak_memory_of": "the process"}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak_memory_bytes": peak, "peak_memory_of": "the process, loading included"}


def _status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
