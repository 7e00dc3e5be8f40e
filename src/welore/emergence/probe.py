"""6 - At chosen steps of a training: the gradients of two fixed batches, the weights, and what they have in common.

The gradients are of the mean loss over a batch's tokens, by torch.autograd.grad: nothing of the training's own state
(its gradients, its random numbers) is touched.
"""

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
from transformers import TrainerCallback

from welore.data.packing import Example
from welore.emergence.subspace import leading, overlaps, unit_rows
from welore.emergence.trace import COSINE, OTHER, OVERLAPS, RANKS, SAME, VALUES, Writer, key
from welore.errors import WeLoreError
from welore.io.atomic import atomic_write
from welore.io.parallel import parallel_map
from welore.io.progress import silent
from welore.linalg.svd import singular_values
from welore.models.targets import Target
from welore.training.data import collate

GRADIENTS, BASES = "gradients", "bases"
Kept = dict[str, Tensor]  # of both batches, "NAME:gradients": (2, m n), length 1, bfloat16; "NAME:bases": (2, k, 16)
Arrays = dict[str, NDArray[Any]]  # by trace.key


class Probe(TrainerCallback):
    """Records a checkpoint of the trace before the first step and after each of the steps it is given.

    trainer: a FinetuneTrainer; its first 2 x `items` held-out sequences are the two batches. writer: None in all
    processes but the first, which compute the same. start: file of the weights that the training began with.
    seconds: what it has taken so far; work_bytes: what was on disk for it at most.
    """

    def __init__(
        self,
        trainer: Any,
        writer: Writer | None,
        targets: Sequence[Target],
        steps: Sequence[int],
        *,
        items: int,
        tokens_per_step: int,
        start: Path,
    ) -> None:
        self.trainer, self.writer, self.targets, self.steps = trainer, writer, targets, frozenset(steps)
        self.tokens_per_step, self.start = tokens_per_step, start
        self.seconds, self.work_bytes = 0.0, 0
        held_out: Sequence[Example] = trainer.eval_dataset
        if len(held_out) < 2 * items:
            raise WeLoreError(
                f"{len(held_out)} sequences are held out, the two batches of the probe need {2 * items}: take a longer "
                "text, a smaller --max-length or fewer --probe-items"
            )
        size = trainer.args.per_device_train_batch_size
        self.batches = [
            [collate(held_out[at : min(at + size, last)]) for at in range(last - items, last, size)]
            for last in (items, 2 * items)
        ]

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any) -> None:
        """The model as it was made."""
        if state.global_step == 0:
            self._take(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any) -> None:
        """The model after the optimiser's step."""
        if state.global_step in self.steps:
            self._take(model, state.global_step)

    def _take(self, wrapped: Any, step: int) -> None:
        started = time.perf_counter()
        model = self.trainer.accelerator.unwrap_model(wrapped)
        gradients = [self._gradients(model, batches) for batches in self.batches]
        line = {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "learning_rate": float(self.trainer.lr_scheduler.get_last_lr()[0]),
            "held_out_loss": self.trainer.held_out_loss(model),
        }
        if self.writer is not None:
            self.writer.append(line, self._found(self.writer, step, model, gradients))
        self.seconds += time.perf_counter() - started

    def _gradients(self, model: Any, batches: Sequence[dict[str, Tensor]]) -> list[Tensor]:
        """Of the mean loss over all tokens of the batches, (m, n) for every target, float32, where the model is."""
        weights = [model.get_submodule(target.name).weight for target in self.targets]
        sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        rows = sum(len(batch["input_ids"]) for batch in batches)
        training = model.training
        model.train()  # a fresh Llama has no dropout
        for batch in batches:
            inputs = {name: values.to(weights[0].device) for name, values in batch.items()}
            share = len(batch["input_ids"]) / rows
            for total, found in zip(
                sums, torch.autograd.grad(self.trainer.compute_loss(model, inputs), weights), strict=True
            ):
                total.add_(found, alpha=share)
        model.train(training)
        return sums

    def _found(self, writer: Writer, step: int, model: Any, gradients: Sequence[Sequence[Tensor]]) -> Arrays:
        """The arrays of a checkpoint; what later checkpoints need is put into the work directory."""
        earlier = [writer.work / _work_file(before) for before in writer.steps]

        def one(of: tuple[Target, Sequence[Tensor]]) -> tuple[Arrays, Kept]:
            target, both = of
            weight = model.get_submodule(target.name).weight.detach()
            with safe_open(self.start, "pt") as start:
                change = weight.float() - start.get_tensor(f"{target.name}.weight").to(weight.device)
            found, kept = _of_gradients(target.name, both)
            found[key(target.name, "weight")] = singular_values(weight)
            found[key(target.name, "change")] = singular_values(change)
            return found | _compared(target.name, earlier, kept), kept

        work = [(target, both) for target, *both in zip(self.targets, *gradients, strict=True)]
        on_gpu = gradients[0][0].is_cuda
        costs = [target.cost for target in self.targets]
        parts = parallel_map(one, work, costs, workers=1 if on_gpu else None, progress=silent, label="probe")
        with atomic_write(writer.work / _work_file(step)) as partial:
            save_file({name: tensor for _, kept in parts for name, tensor in kept.items()}, partial)
        self.work_bytes = sum(path.stat().st_size for path in writer.work.iterdir())
        return {name: values for found, _ in parts for name, values in found.items()}


def _of_gradients(name: str, both: Sequence[Tensor]) -> tuple[Arrays, Kept]:
    """What is recorded of one matrix's gradients (of the first batch), and what is kept of both."""
    led = [leading(gradient, max(RANKS)) for gradient in both]
    values = led[0][0]
    found = {
        key(name, "gradient"): values[:VALUES].cpu().numpy(),
        key(name, "gradient_energy"): values.square().sum().cpu().numpy(),
    }
    directions = unit_rows(torch.stack([gradient.flatten() for gradient in both]))
    kept = {
        key(name, GRADIENTS): directions.to("cpu", torch.bfloat16),
        key(name, BASES): torch.stack([basis for _, basis in led]).to("cpu", torch.float32),
    }
    return found, kept


def _compared(name: str, earlier: Sequence[Path], kept: Kept) -> Arrays:
    """The rows of trace.COMPARED of one matrix: with every earlier checkpoint in turn, then with itself."""
    rows: dict[str, list[float]] = {}
    now = unit_rows(kept[key(name, GRADIENTS)].float())  # the length again, after rounding
    for path in [*earlier, None]:
        U, V = kept[key(name, BASES)], kept[key(name, BASES)]
        before = now
        if path is not None:
            with safe_open(path, "pt") as file:
                before, U = (file.get_tensor(key(name, part)) for part in (GRADIENTS, BASES))
            before = unit_rows(before.float())
        tables = {COSINE: before @ now.T}
        tables |= {field: overlaps(U[..., :rank], V[..., :rank]) for rank, field in OVERLAPS.items()}
        for field, table in tables.items():
            rows.setdefault(key(name, field, SAME), []).append(float(table[0, 0]))
            # of two batches there are two ways round, then and now
            rows.setdefault(key(name, field, OTHER), []).append(float(table[0, 1] + table[1, 0]) / 2)
    return {field: np.array(values) for field, values in rows.items()}


def _work_file(step: int) -> str:
    return f"gradients-{step:08d}.safetensors"


def probed_steps(steps: int, count: int) -> list[int]:
    """`count` steps from 0 to `steps`, dense in the beginning, where most happens: squares of even distances."""
    return sorted({round(steps * (i / (count - 1)) ** 2) for i in range(count)})
