"""At chosen steps of a training: the gradients of two fixed batches, the weights, and their similarities.

The gradients are of the mean loss over a batch's tokens, by torch.autograd.grad: the training's own state (its
gradients, its random numbers) is not changed.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import TrainerCallback

from welore.emergence.subspace import leading, overlaps
from welore.emergence.trace import COSINE, OTHER, OVERLAPS, RANKS, SAME, VALUES, Writer, key
from welore.errors import DivergedError
from welore.io.atomic import atomic_write
from welore.io.context import RunContext
from welore.io.fields import refusing
from welore.linalg.svd import singular_values
from welore.models.targets import Target
from welore.training.data import collate

TINY = 1e-30  # keeps a zero gradient from dividing by zero
GRADIENTS, BASES = "gradients", "bases"
# Of both batches: "NAME:gradients" (2, m n), rows of length 1, bfloat16; "NAME:bases" (2, k, 16), float32.
Directions = dict[str, Tensor]
Arrays = dict[str, NDArray[Any]]  # by trace.key


class Probe(TrainerCallback):
    """Records a checkpoint of the trace before the first step and after each of the given steps.

    trainer: a FinetuneTrainer; its first 2 x `items` held-out sequences are the two batches. writer: None in all
    processes but the first, which compute the same. start: file of the initial weights.
    seconds: the time taken so far; work_bytes: the largest size of the work directory.
    """

    def __init__(
        self,
        trainer: Any,
        writer: Writer | None,
        targets: Sequence[Target],
        steps: Sequence[int],
        *,
        items: int,
        start: Path,
        context: RunContext,
    ) -> None:
        self.trainer, self.writer, self.targets, self.steps = trainer, writer, targets, frozenset(steps)
        self.start, self.context = start, context
        self.seconds, self.work_bytes = 0.0, 0
        held_out, args = trainer.eval_dataset, trainer.args
        size = args.per_device_train_batch_size
        sequences = size * args.gradient_accumulation_steps * args.world_size
        self.tokens_per_step = sequences * len(held_out[0]["input_ids"])
        self.batches = [
            [collate(held_out[at : min(at + size, last)]) for at in range(last - items, last, size)]
            for last in (items, 2 * items)
        ]

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any) -> None:
        """Record the initial model."""
        if state.global_step == 0:
            self._record(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any) -> None:
        """Record the model after the optimiser's step."""
        if state.global_step in self.steps:
            self._record(model, state.global_step)

    def _record(self, wrapped: Any, step: int) -> None:
        started = time.perf_counter()
        model = self.trainer.accelerator.unwrap_model(wrapped)
        gradients = [self._gradients(model, batches) for batches in self.batches]
        line = {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "learning_rate": float(self.trainer.lr_scheduler.get_last_lr()[0]),
            "held_out_loss": self.trainer.held_out_loss(model),
        }
        numbers = [line["held_out_loss"], *(float(total.sum()) for both in gradients for total in both)]
        if not all(map(math.isfinite, numbers)):
            raise DivergedError(
                f"the model computes NaN or Inf at step {step}: begin again with --overwrite and a smaller "
                "learning_rate, more warmup_steps or dtype float32"
            )
        if self.writer is not None:
            self.writer.append(line, self._arrays(self.writer, step, model, gradients))
        self.seconds += time.perf_counter() - started

    def _gradients(self, model: Any, batches: Sequence[dict[str, Tensor]]) -> list[Tensor]:
        """Of the mean loss over all tokens of the batches, (m, n) for every target, float32, on the model's device."""
        weights = [model.get_submodule(target.name).weight for target in self.targets]
        sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        rows = sum(len(batch["input_ids"]) for batch in batches)
        training = model.training
        model.train()  # the untrained Llama has no dropout
        for batch in batches:
            inputs = {name: values.to(weights[0].device) for name, values in batch.items()}
            share = len(batch["input_ids"]) / rows
            loss = self.trainer.compute_loss(model, inputs)
            for total, gradient in zip(sums, torch.autograd.grad(loss, weights), strict=True):
                total.add_(gradient, alpha=share)
        model.train(training)
        return sums

    def _arrays(self, writer: Writer, step: int, model: Any, gradients: Sequence[Sequence[Tensor]]) -> Arrays:
        """The arrays of a checkpoint; the directions that later checkpoints need go to the work directory."""
        earlier = [writer.work / _work_file(before) for before in writer.steps]

        def one(of: tuple[Target, Sequence[Tensor]]) -> tuple[Arrays, Directions]:
            target, both = of
            device = self.context.float64_device
            both = [gradient.to(device) for gradient in both]
            weight = model.get_submodule(target.name).weight.detach().to(device)
            with safe_open(self.start, "pt") as start:
                change = weight.float() - start.get_tensor(f"{target.name}.weight").to(device)
            arrays, directions = _of_gradients(target.name, both)
            arrays[key(target.name, "weight")] = singular_values(weight)
            arrays[key(target.name, "change")] = singular_values(change)
            return arrays | _compared(target.name, earlier, directions), directions

        work = [(target, both) for target, *both in zip(self.targets, *gradients, strict=True)]
        parts = self.context.map(one, work, [target.cost for target in self.targets], "probe")
        with atomic_write(writer.work / _work_file(step)) as partial:
            save_file({name: tensor for _, directions in parts for name, tensor in directions.items()}, partial)
        self.work_bytes = sum(path.stat().st_size for path in writer.work.iterdir())
        return {name: values for arrays, _ in parts for name, values in arrays.items()}


def _of_gradients(name: str, both: Sequence[Tensor]) -> tuple[Arrays, Directions]:
    """The arrays of one matrix's gradients (of the first batch), and the directions of both."""
    led = [leading(gradient, max(RANKS)) for gradient in both]
    values = led[0][0]
    arrays = {
        key(name, "gradient"): values[:VALUES].cpu().numpy(),
        key(name, "gradient_energy"): values.square().sum().cpu().numpy(),
    }
    gradients = normalize(torch.stack([gradient.flatten() for gradient in both]), eps=TINY)
    directions = {
        key(name, GRADIENTS): gradients.to("cpu", torch.bfloat16),
        key(name, BASES): torch.stack([basis for _, basis in led]).to("cpu", torch.float32),
    }
    return arrays, directions


def _compared(name: str, earlier: Sequence[Path], directions: Directions) -> Arrays:
    """The rows of trace.COMPARED of one matrix: with every earlier checkpoint in turn, then with itself."""
    rows: dict[str, list[float]] = {}
    now = normalize(directions[key(name, GRADIENTS)].float(), eps=TINY)  # the length again, after rounding
    for path in [*earlier, None]:
        U, V = directions[key(name, BASES)], directions[key(name, BASES)]
        before = now
        if path is not None:
            with refusing(f"{path} is damaged", "begin again with --overwrite"), safe_open(path, "pt") as file:
                before, U = (file.get_tensor(key(name, part)) for part in (GRADIENTS, BASES))
            before = normalize(before.float(), eps=TINY)
        tables = {COSINE: before @ now.T}
        tables |= {field: overlaps(U[..., :rank], V[..., :rank]) for rank, field in OVERLAPS.items()}
        for field, table in tables.items():
            rows.setdefault(key(name, field, SAME), []).append(float(table[0, 0]))
            # Two batches are compared both ways: the first then with the second now, and the reverse.
            rows.setdefault(key(name, field, OTHER), []).append(float(table[0, 1] + table[1, 0]) / 2)
    return {field: np.array(values) for field, values in rows.items()}


def _work_file(step: int) -> str:
    return f"gradients-{step:08d}.safetensors"


def probed_steps(steps: int, count: int) -> list[int]:
    """`count` steps from 0 to `steps` at squares of even distances: dense in the beginning, where most happens."""
    return sorted({round(steps * (i / (count - 1)) ** 2) for i in range(count)})
