"""transformers' Trainer with our loss, exact evaluation, the order of items as given, and a callback that measures."""

import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback

from welore.data.packing import IGNORED, Batch
from welore.errors import DivergedError, WeLoreError
from welore.evaluation.perplexity import negative_log_likelihood, perplexity_of
from welore.io.context import finest_dtype
from welore.io.memory import tensor_memory
from welore.io.progress import Progress, counted
from welore.training.methods import optimizer_groups
from welore.training.objective import Objective
from welore.training.run_dir import seal

WARM_UP = 2  # steps that are not timed: memory is allocated and caches are filled then


class FinetuneTrainer(Trainer):
    """A Trainer that takes its items in the given order, and evaluates exactly.

    evaluation: batches on the CPU. Their loss is summed over all tokens in float64 and divided once, so that it
    depends neither on the batches nor on the number of processes. objective: the training loss; None for the model's
    own. resumed_at: the step after which the run goes on; None for a new one.
    """

    def __init__(
        self,
        *,
        evaluation: Sequence[Batch],
        objective: Objective | None = None,
        resumed_at: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.evaluation, self.resumed_at = evaluation, resumed_at
        self.objective: Objective | None = objective
        super().__init__(compute_loss_func=objective, **kwargs)  # which says that the loss is divided here
        if self.is_fsdp_enabled and self.args.ddp_find_unused_parameters:
            raise WeLoreError("a mixture whose experts are apart does not run under FSDP: use torchrun, which is DDP")
        if self.is_fsdp_enabled and self.args.bf16:  # accelerate would add up gradients, and give the loss, in bfloat16
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = policy

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)  # type: ignore[arg-type]

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Those that have weight decay in `optimizer_groups`: no factor has."""
        if not self.args.weight_decay:  # the same to the Trainer, whose older checkpoints have its own groups
            return super().get_decay_parameter_names(model)
        decayed = {id(p) for group in optimizer_groups(model, 1.0) if group["weight_decay"] for p in group["params"]}
        return [name for name, parameter in model.named_parameters() if id(parameter) in decayed]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """Mean over the predicted tokens, or the sum divided by those of the whole step."""
        if self.objective is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)
        total, outputs = self.objective(model, inputs)
        count = (inputs["labels"][:, 1:] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        loss = total / (count.to(total.device) if isinstance(count, Tensor) else count)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over them
        if getattr(outputs, "aux_loss", None) is not None:  # of a mixture of experts, which balances them by it
            loss = loss + self.accelerator.unwrap_model(model).router_aux_loss_coef * outputs.aux_loss.to(loss.device)
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Mean negative log-likelihood over all tokens held out, and its exponential."""
        mean = self.held_out_loss(self.model)
        if not math.isfinite(mean):
            raise DivergedError(
                "the model computes NaN or Inf on the held-out part: try a smaller learning_rate, or dtype float32"
            )
        metrics = {"eval_loss": mean, "eval_perplexity": perplexity_of(mean)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def held_out_loss(self, model: Any) -> float:
        """Mean negative log-likelihood of a model over all tokens held out."""
        device = self.args.device
        mine = share(self.evaluation, self.args.process_index, self.args.world_size)
        sums = torch.tensor(negative_log_likelihood(model, mine, device), dtype=finest_dtype(device), device=device)
        total, tokens = self.accelerator.reduce(sums, "sum").tolist()
        return float(total / tokens)


class RunCallback(TrainerCallback):
    """Moves the progress bar, stops a run whose loss is not a number, and measures the speed between two losses.

    tokens: how many a step reads, in all processes. A loss is read when everything asked of a GPU before is done, so
    nothing has to wait for the measurement. Evaluating and saving are outside.
    """

    def __init__(self, tokens: Callable[[int], int], steps: int, progress: Progress) -> None:
        self.tokens = tokens
        self.bar = iter(counted(progress, range(steps), "finetune"))
        self.began: tuple[int, float] | None = None  # the number of the step, and when
        self.intervals: list[tuple[int, int, float]] = []  # steps, tokens, seconds

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The bar begins where the run goes on."""
        for _step in range(state.global_step + 1):
            next(self.bar, None)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An interval begins, unless one is open."""
        self.began = self.began or (state.global_step, time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The bar moves on."""
        next(self.bar, None)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """An interval ends; without a loss there is no sense in going on."""
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if self.began is not None:
            first, started = self.began
            tokens = sum(map(self.tokens, range(first, state.global_step)))
            self.intervals.append((state.global_step - first, tokens, time.perf_counter() - started))
            self.began = None
        if not math.isfinite(loss):
            raise DivergedError(
                f"the training loss is {loss} at step {state.global_step}: try a smaller learning_rate, more "
                "warmup_steps or dtype float32; earlier checkpoints are kept"
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An open interval is not measured."""
        self.began = None

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An open interval is not measured; a checkpoint to which all processes have written is sealed."""
        self.began = None
        args.distributed_state.wait_for_everyone()
        if args.process_index == 0:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def numbers(self) -> dict[str, Any]:
        """Tokens per second, of all processes, and seconds of a step, without the first steps."""
        timed = list(self.intervals)
        skipped = 0
        while len(timed) > 1 and skipped < WARM_UP:
            skipped += timed.pop(0)[0]
        if not timed:
            return {"timed_steps": 0}
        steps, tokens, seconds = (sum(column) for column in zip(*timed, strict=True))
        return {"timed_steps": steps, "tokens_per_second": tokens / seconds, "seconds_per_step": seconds / steps}


def share(batches: Sequence[Batch], process: int, processes: int) -> list[Batch]:
    """Every `processes`-th batch from number `process` on, as many for each process: the last may have no labels.

    Where parameters are cut over the processes, every call of the model gathers them: all must call equally often.
    """
    mine = list(batches[process::processes])
    if len(mine) * processes < len(batches):
        mine.append(batches[0] | {"labels": torch.full_like(batches[0]["labels"], IGNORED)})
    return mine


def peak_memory(device: torch.device) -> dict[str, Any]:
    """The largest memory so far: of tensors on a GPU, of the whole process on a CPU."""
    if device.type not in ("cpu", "mps"):
        return {"peak_memory_bytes": tensor_memory(device)[1], "peak_memory_of": "tensors on the GPU"}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak_memory_bytes": peak, "peak_memory_of": "the process"}
