"""What a cut costs, won back in part: the factors learn from the dense model, for a few dozen steps.

Every matrix is cut as if the others were whole. What all the cuts do together is a small, systematic error on top of
what each costs, half of which even biases would take away (research/LOG.md): a short training is worth more than twice
the statistics. A long one is `finetune --distill`.
"""

import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from welore.allocation.neurons import as_json
from welore.allocation.plan import Plan
from welore.compression.factorize import Trained, write_checkpoint
from welore.config import MAX_LENGTH, NONE, SELF, FinetuneConfig, RunOptions
from welore.data.mixture import draw, mixed
from welore.data.text import TextOptions
from welore.data.windows import digest, write_windows
from welore.errors import DivergedError, WeLoreError
from welore.io.atomic import atomic_directory
from welore.io.checkpoint import SHARD_SIZE, weight_files
from welore.io.parallel import keep_freed_memory, team
from welore.io.progress import Progress, silent
from welore.io.resume import Workspace
from welore.layers.registry import FORMS
from welore.models.load import fastest, read_tokenizer
from welore.models.skeleton import config_of, context_length
from welore.models.source import CheckpointSource, TensorSource
from welore.records import Record
from welore.training.run_dir import MODEL, RUN, TUNED, WRITTEN

BATCH, STEPS, WARM_UP = 2, 64, 8  # windows of a step, each read once; steps at most on text of its own
RATE = 1 / 1500  # of the root mean square of the factors, times the share of parameters that was cut
LARGEST = 0.2  # of such shares that a run of more than STEPS steps may be taken to have cut instead
SHARES = (1.0, 0.25, 0.0625)  # of that rate, tried in turn until one does no harm
TEACHER = 0.5  # its share of the loss on a text that others wrote, which the model is to learn as well
HARM = 0.05  # of what the cut cost
SAVED, HELD_OUT = 16, 16  # steps between checkpoints; windows held out at most


def chosen(asked: str | None, own: int, *, alone: bool) -> str:
    """The text to heal on: what was asked for, or the model's own where `params` stand alone.

    own: windows of it that there are or will be; two are the least to train on and to hold out.
    """
    heal = asked or (SELF if alone and own > 1 else NONE)
    if heal == SELF and own < 2:
        raise WeLoreError(
            "--recovery self needs a calibration of at least two windows that the model wrote; or name another text"
        )
    if heal != NONE and team().size > 1:
        raise WeLoreError(
            "several processes cut, but do not heal: pass --recovery none, and heal by `welore finetune --distill`"
        )
    return heal


def text(data: str, directory: Path, tokens: int, seed: int, cache_dir: str | Path | None) -> Tensor:
    """Windows of the texts `data`, drawn as for a calibration: token ids (count, length), at least two.

    Those of several texts are shuffled: the tenth that is held out is of all of them.
    """
    length = min(MAX_LENGTH, context_length(config_of(directory)) or MAX_LENGTH)
    counts, found = draw(
        data, tokens, read_tokenizer(directory), length, seed=seed, options=TextOptions(cache_dir=cache_dir)
    )
    if SELF in counts:
        raise WeLoreError(f"--recovery {data}: {SELF} cannot be mixed with other texts")
    windows, _ = mixed(found, seed)
    if len(windows) < 2:
        raise WeLoreError(
            f"--recovery {data}: tokens is {tokens}, one window; two are the least to train on and hold out"
        )
    return windows


def heal(
    source: TensorSource,
    plan: Plan,
    workspace: Workspace,
    windows: Tensor,
    *,
    own: bool,
    seed: int,
    device: str | None,
    progress: Progress,
) -> tuple[Trained | None, dict[str, Any], dict[str, Any]]:
    """Let the model that is cut by `plan` learn from the dense one: its factors, settings and numbers for a record.

    No factors where it did harm, or failed: the cut is sound, and may have taken an hour. windows: token ids (count,
    length), at least two, a tenth of which is held out; the others are read once. own: whether the model wrote them;
    then the teacher alone is the loss, as such text says nothing that it does not, and STEPS are enough. All of it lies
    in the workspace: what was killed goes on, what is finished is left as it is, and what was begun with other
    settings, as on another device, begins anew.
    """
    origin: Any = source.original
    how = _training(origin.directory.resolve(), windows, own=own, device=device)
    about = json.dumps([plan.ranks, plan.forms, as_json(plan.neurons), digest(windows), own, seed, how], default=str)
    place = workspace.directory / f"healing-{hashlib.sha256(about.encode()).hexdigest()[:16]}"
    cut = place / "cut"
    if not cut.is_dir():
        with atomic_directory(cut) as unfinished:
            write_checkpoint(source, plan, workspace, unfinished, SHARD_SIZE, silent, None)
    write_windows(place / WRITTEN, windows)
    keep_freed_memory()
    config = FinetuneConfig(dataset=str(place / WRITTEN), seed=seed, **how)
    options: RunOptions = {"device": device or "auto", "progress": progress}
    try:
        run, record = _without_harm(cut, place, rate(cut, plan, how["max_steps"]), config, options)
    except WeLoreError as error:
        return None, {"failed": str(error)}, {"healed": False}
    settings, numbers = _summary(record)
    return _trained(run) if run else None, settings, numbers


def _training(teacher: Path, windows: Tensor, *, own: bool, device: str | None) -> dict[str, Any]:
    """Settings of `finetune`, but for the text, its seed, the rate and the device itself."""
    steps = max(1, (len(windows) - max(1, len(windows) // 10)) // BATCH)
    steps = min(STEPS, steps) if own else steps
    return {
        "distill": teacher,
        "distill_weight": 1.0 if own else TEACHER,
        "max_steps": steps,
        "warmup_steps": min(WARM_UP, steps // 4),
        "batch_size": BATCH,
        "max_length": windows.shape[1],
        "save_dtype": "float32",
        "eval_steps": steps,
        "max_eval_samples": HELD_OUT,
        "save_steps": SAVED,
    } | fastest(device)


def _without_harm(
    cut: Path, place: Path, usual: float, config: FinetuneConfig, options: RunOptions
) -> tuple[Path | None, Record]:
    """The run and its record; where the usual rate does harm (see `sound`) or diverges, smaller ones are tried."""
    from welore.training.finetune import finetune  # the Trainer: seconds of imports that a cut alone does not need

    for share in SHARES:
        lr = float(f"{share * usual:.9g}")  # the last digits depend on the number of threads that summed
        run = place / f"run-{lr}"  # not the share: another version may have left a run at another rate
        try:
            if (run / TUNED).is_file():
                record = Record.load(run / TUNED)
            else:
                config = dataclasses.replace(config, learning_rate=lr)
                record = finetune(cut, run, config, resume=(run / RUN).is_file(), **options)
        except DivergedError:
            if share == SHARES[-1]:
                raise
        else:
            if sound(record):
                return run, record
        shutil.rmtree(run / MODEL, ignore_errors=True)
    return None, record


def rate(cut: Path, plan: Plan, steps: int) -> float:
    """The peak learning rate: the more is cut and the larger the numbers, the larger.

    A small cut, which bears a small rate, bears more in a run of more than STEPS steps: with the square root of their
    number, up to the rate of LARGEST (research/LOG.md).
    """
    squares, count = 0.0, 0
    with CheckpointSource(cut) as source:
        for name in _factors(plan):
            factor = source.tensor(name).float()
            squares, count = squares + float(factor.square().sum(dtype=torch.float64)), count + factor.numel()
    removed = max(1 - plan.numbers()["parameter_ratio"], 0.01)
    longer = min(LARGEST, removed * math.sqrt(steps / STEPS))
    return RATE * max(removed, longer) * math.sqrt(squares / count)


def _trained(run: Path) -> Trained:
    """Name of a factor -> its numbers after the training, float32."""
    files: dict[str, Any] = {}
    for path in weight_files(run / MODEL):
        opened = safe_open(path, "pt")
        files |= dict.fromkeys(opened.keys(), opened)
    return lambda name: files[name].get_tensor(name)


def sound(record: Record) -> bool:
    """Whether healing did no harm: the loss on the text held out grew by a twentieth of what the cut cost at most.

    Not whether it fell: what a matrix was cut by includes that text, and flatters the cut there by as much as a model
    that has lost little can win.
    """
    losses = _losses(record)
    return losses["healed"] <= losses["cut"] + HARM * max(0.0, losses["cut"] - losses["dense"])


def _summary(record: Record) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and numbers of a healing, for the record of what was healed."""
    settings, numbers = record.settings, record.numbers
    names = ("max_steps", "batch_size", "max_length", "learning_rate", "warmup_steps", "dtype", "seed")
    return {name: settings[name] for name in (*names, "distill_weight")}, {
        "healed": sound(record),
        "healing_tokens": settings["max_steps"] * settings["batch_size"] * settings["max_length"],  # before a kill, too
        "healing_seconds": numbers["seconds"],
        "held_out_loss": _losses(record),
    }


def _losses(record: Record) -> dict[str, float]:
    """On the text held out: of the model as it was cut, after healing, and of the dense one."""
    found = record.numbers["evaluation"]
    return {"cut": found[0][1], "healed": found[-1][1], "dense": record.numbers["teacher_eval_loss"]}


def _factors(plan: Plan) -> list[str]:
    """Names of the tensors that are trained."""
    return [f"{name}.{part}" for name, form in plan.forms.items() for part in FORMS[form].numbers]
