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
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from welore.batches import Sequence_, collate
from welore.errors import WeLoreError
from welore.factors import singular_values
from welore.files import whole_file
from welore.study.subspace import cosines, leading, overlaps
from welore.study.trace import COSINE, OTHER, OVERLAPS, RANKS, SAME, VALUES, Writer, key
from welore.targets import Target

GRADIENTS, BASES = "gradients", "bases"
Kept = dict[str, Tensor]  # of both batches, "NAME:gradients": (2, m n), bfloat16; "NAME:bases": (2, k, 16)


class Probe(TrainerCallback):
    """Records a checkpoint of the trace before the first step and after each of the steps it is given.

    trainer: a ClockedTrainer; its first 2 x `items` held-out sequences are the two batches. writer: None in all
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
        held_out: Sequence[Sequence_] = trainer.eval_dataset
        if len(held_out) < 2 * items:
            raise WeLoreError(
                f"{len(held_out)} sequences are held out, the two batches of the probe need {2 * items}: take a longer "
                "text, a smaller --length or fewer --probe-items"
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
        model.train()  # the loss is then computed in pieces (headloss); a fresh Llama has no dropout
        for batch in batches:
            inputs = {name: values.to(weights[0].device) for name, values in batch.items()}
            share = len(batch["input_ids"]) / rows
            for total, found in zip(sums, torch.autograd.grad(model(**inputs).loss, weights), strict=True):
                total.add_(found, alpha=share)
        model.train(training)
        return sums

    @torch.no_grad()
    def _found(
        self, writer: Writer, step: int, model: Any, gradients: Sequence[Sequence[Tensor]]
    ) -> dict[str, NDArray[Any]]:
        """The arrays of a checkpoint, by trace.key; what later checkpoints need is put into the work directory."""
        found: dict[str, NDArray[Any]] = {}
        kept: Kept = {}
        earlier = [writer.work / _work_file(before) for before in writer.steps]
        with safe_open(self.start, "pt") as start:
            for target, *both in zip(self.targets, *gradients, strict=True):
                name, weight = target.name, model.get_submodule(target.name).weight
                led = [leading(gradient, max(RANKS)) for gradient in both]
                values = led[0][0]
                found[key(name, "gradient")] = values[:VALUES].cpu().numpy()
                found[key(name, "gradient_energy")] = values.square().sum().cpu().numpy()
                kept[key(name, GRADIENTS)] = torch.stack([g.flatten() for g in both]).to("cpu", torch.bfloat16)
                kept[key(name, BASES)] = torch.stack([basis for _, basis in led]).to("cpu", torch.float32)
                change = weight.float() - start.get_tensor(f"{name}.weight").to(weight.device)
                found[key(name, "weight")] = singular_values(weight)
                found[key(name, "change")] = singular_values(change)
        self._compare(earlier, kept, found)
        with whole_file(writer.work / _work_file(step)) as partial:
            save_file(kept, partial)
        self.work_bytes = sum(path.stat().st_size for path in writer.work.iterdir())
        return found

    def _compare(self, earlier: Sequence[Path], kept: Kept, found: dict[str, NDArray[Any]]) -> None:
        """Add the rows of trace.COMPARED to `found`: one earlier checkpoint in memory at a time, then this one."""
        rows: dict[str, list[float]] = {}
        for path in [*earlier, None]:
            before = kept if path is None else load_file(path)
            for target in self.targets:
                for field, kind, value in _likeness(target.name, before, kept):
                    rows.setdefault(key(target.name, field, kind), []).append(value)
        found |= {name: np.array(values) for name, values in rows.items()}


def _likeness(name: str, before: Kept, now: Kept) -> list[tuple[str, str, float]]:
    """Every comparison of one matrix's gradients at two checkpoints: field, kind, value."""
    U, V = (kept[key(name, BASES)] for kept in (before, now))
    found = {COSINE: cosines(*(kept[key(name, GRADIENTS)] for kept in (before, now)))}
    for rank, field in OVERLAPS.items():
        found[field] = overlaps(U[..., :rank], V[..., :rank])
    both = [(field, SAME, float(table[0, 0])) for field, table in found.items()]
    # of two batches there are two ways round, then and now
    return both + [(field, OTHER, float(table[0, 1] + table[1, 0]) / 2) for field, table in found.items()]


def _work_file(step: int) -> str:
    return f"gradients-{step:08d}.safetensors"


def probed_steps(steps: int, count: int) -> list[int]:
    """`count` steps from 0 to `steps`, dense in the beginning, where most happens: squares of even distances."""
    return sorted({round(steps * (i / (count - 1)) ** 2) for i in range(count)})
