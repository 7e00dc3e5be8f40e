"""Recovery: the factors learn from the dense model for a few dozen steps. A longer training is `finetune --distill`."""

import dataclasses
import gc
import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from welore.allocation.plan import Allocation, Plan
from welore.compression.factorize import stored_factors
from welore.compression.writing import write_compressed
from welore.config import AUTO, MAX_LENGTH, SELF, FinetuneConfig, MethodName, RecoveryConfig, settings_of
from welore.data.mixture import draw, mixed
from welore.data.text import TextOptions
from welore.data.windows import TopK, digest, write_windows
from welore.errors import DivergedError, WeLoreError, first_line
from welore.io.atomic import atomic_directory
from welore.io.context import RunContext
from welore.io.memory import free_memory
from welore.io.progress import silent
from welore.layers.remaining import as_json
from welore.layers.storage_forms import FORMS
from welore.models.load import fastest
from welore.models.sink import DirectorySink
from welore.models.skeleton import context_length
from welore.models.source import TensorSource
from welore.records import Record
from welore.training.memory import LOGIT_IN_PIECES, activation_bytes, itemsize, met
from welore.training.objective import chunk_of
from welore.training.run_dir import MODEL, RUN, TUNED, WRITTEN
from welore.training.teacher import recorded_predictions


@dataclass(frozen=True)
class Recovery:
    """The outcome of the training. directory: a checkpoint with better factors, None if there are none."""

    directory: Path | None = None
    settings: dict[str, Any] | None = None
    numbers: dict[str, Any] = field(default_factory=dict)


def resolve_recovery(recovery: RecoveryConfig | str | None, own_windows: int, *, preset: bool) -> RecoveryConfig | None:
    """The config of the training, or None for no training.

    "auto": on the model's own text, if the preset has a recovery and there is such a text. own_windows: windows that
    the model wrote or will write; two are the least to train on and to hold out.
    """
    if recovery == AUTO:
        recovery = RecoveryConfig() if preset and own_windows > 1 else None
    if recovery is None:
        return None
    config = settings_of(RecoveryConfig, cast(Any, recovery))
    if config.dataset == SELF and own_windows < 2:
        raise WeLoreError("recovery on self needs at least two windows that the model wrote: name another text")
    return config


def recovery_text(config: RecoveryConfig, model_config: Any, tokenizer: Any, seed: int, options: TextOptions) -> Tensor:
    """At least two windows, token ids (count, length), shuffled: the tenth that is held out is of all texts."""
    length = min(MAX_LENGTH, context_length(model_config) or MAX_LENGTH)
    assert config.num_tokens is not None
    counts, texts = draw(config.dataset, config.num_tokens, tokenizer, length, seed=seed, options=options)
    if SELF in counts:
        raise WeLoreError(f"recovery on {config.dataset}: {SELF} cannot be mixed with other texts")
    windows, _ = mixed(texts, seed)
    if len(windows) < 2:
        raise WeLoreError(
            f"recovery on {config.dataset}: num_tokens is {config.num_tokens}, one window; two are the least to train "
            "on and to hold out"
        )
    return windows


@dataclass(frozen=True)
class Trainable:
    """Numbers that a recovery can train.

    method: of fine-tuning. checkpointing: whether activations are computed again for the backward pass. streaming:
    whether the frozen weights stay on the host, in the dtype of their file.
    """

    name: str
    method: MethodName
    checkpointing: bool = False
    streaming: bool = False


FACTORS = Trainable("factors", "lrc")
UPDATES = Trainable("updates", "updates")
# Of a plain result, which has no factors.
MATRICES: dict[MethodName, MethodName] = {"lrc": "nlrc", "updates": "lora"}
MATRICES_RATE = 3.0  # times the learning rate of factors; 1, 3 and 10 were tried (docs/concepts/recovery.md)
SMALLEST = replace(UPDATES, checkpointing=True), replace(UPDATES, checkpointing=True, streaming=True)
CHOICES = {  # in the order in which they are taken, the first that fits
    "auto": (FACTORS, UPDATES, *SMALLEST),
    "factors": (FACTORS, replace(FACTORS, checkpointing=True)),
    "updates": (UPDATES, *SMALLEST),
}


def choose_trainable(
    source: TensorSource, plan: Plan, config: RecoveryConfig, training: FinetuneConfig, context: RunContext
) -> tuple[str, FinetuneConfig]:
    """The name of what is trained, and the settings for it: the first choice that fits into the free memory."""
    free = context.processes.agreed(free_memory(context.device))
    if free is not None and context.device.type == "cpu":  # all of them are on one host
        free //= context.processes.size
    name, chosen, needed = first_that_fits(
        source, plan.allocations, config, training, context.device, free, context.processes.size == 1
    )
    if free is not None and needed > free:
        raise WeLoreError(
            f"recovery needs {needed / 1e9:.1f} GB on {context.device}, {free / 1e9:.1f} GB are free: take another "
            "device, or --recovery none"
        )
    return name, chosen


def first_that_fits(
    source: TensorSource,
    allocations: Sequence[Allocation],
    config: RecoveryConfig,
    training: FinetuneConfig,
    device: torch.device,
    free: int | None,
    alone: bool = True,
) -> tuple[str, FinetuneConfig, float]:
    """The first choice that fits into so many bytes of a device, or the smallest: its name, the settings, its bytes.

    alone: whether one process trains; several cannot leave weights on the host.
    """
    limit, on_cpu = math.inf if free is None else free, device.type == "cpu"
    plain = not any(a.factored for a in allocations)
    # Weights that would grow stay mapped where memory counts: to convert them for each product takes a few per cent.
    grow = on_cpu and alone and source.dtype(source.targets[0]).itemsize < itemsize(training)
    if on_cpu:  # a host has other things to hold
        limit = min(limit, config.host_memory)
    for choice in CHOICES[config.trainable]:
        if choice.streaming and (on_cpu or not alone):
            continue
        chosen = replace(
            training,
            method=MATRICES[choice.method] if plain else choice.method,
            rank=None if choice.name == FACTORS.name else config.rank,
            gradient_checkpointing=choice.checkpointing,
            stream_weights=choice.streaming or (grow and choice.checkpointing),
        )
        needed = memory_needed(source, allocations, chosen)
        if needed <= limit:
            break
    return "matrices" if plain and choice.name == FACTORS.name else choice.name, chosen, needed


def memory_needed(source: TensorSource, allocations: Sequence[Allocation], training: FinetuneConfig) -> float:
    """Bytes on the device at the peak of a recovery, an upper bound (docs/concepts/recovery.md)."""
    text = source.original.skeleton.config.get_text_config(decoder=True)
    item = itemsize(training)
    dense = sum(p.numel() for p in source.original.skeleton.parameters())
    stored = dense - sum(math.prod(t.shape) for t in source.original.targets)
    stored += sum(a.stored_parameters for a in allocations)
    shapes = trained_shapes(allocations)
    if training.rank is None:
        weights = item * stored + (16 if item == 2 else 12) * sum(map(math.prod, shapes))
    else:
        if training.stream_weights:  # two matrices, and what is no matrix of a block
            stored += 2 * max(a.stored_parameters for a in allocations) - sum(a.stored_parameters for a in allocations)
        weights = item * stored + 16 * (training.rank or 0) * sum(map(sum, shapes))
    width = met({a.name: sum(a.shape) + a.rank for a in allocations}, text)  # of all that enters or leaves a matrix
    logits = LOGIT_IN_PIECES * chunk_of(text.vocab_size) * text.vocab_size
    return weights + activation_bytes(training, text, width) + logits


def trained_shapes(allocations: Sequence[Allocation]) -> list[tuple[int, ...]]:
    """Shapes of the matrices that a recovery changes: the factors of the LRCs, all matrices where there are none."""
    factors = [FORMS[a.form].shapes(*a.shape, a.rank) for a in allocations if a.factored]
    return [s for shapes in factors for s in shapes.values() if len(s) == 2] or [a.shape for a in allocations]


def failed_recovery(config: RecoveryConfig, error: Exception) -> Recovery:
    """The outcome of a training that ended in an error: factors that stay as they are, and the reason."""
    known = isinstance(error, WeLoreError | torch.OutOfMemoryError)
    reason = first_line(error) if known else f"{type(error).__name__}: {first_line(error)}"
    return Recovery(settings={"text": _text(config), "failed": reason}, numbers={"healed": False})


def recover(
    source: TensorSource,
    plan: Plan,
    windows: Tensor,
    config: RecoveryConfig,
    context: RunContext,
    *,
    seed: int,
    teacher: Path,
    predictions: TopK | None = None,
) -> Recovery:
    """The outcome of a training of the factors that `plan` makes of `source`; they stay as they are if it does harm.

    A killed training continues in the workspace; one that was begun with other settings begins anew. All processes of
    the context train, the first of them writes. windows: token ids (count, length), at least two. teacher: the
    directory of the dense model. predictions: its own, at every position of the windows; None: they are computed first.
    Raises WeLoreError if the device has too little memory for any training.
    """
    training = _training(windows, plan, config, seed, context)
    trainable, training = choose_trainable(source, plan, config, training, context)
    pruned = as_json({**plan.neurons, **plan.experts})
    key = [plan.ranks, plan.forms, pruned, digest(windows), config.learning_rate, config.fallbacks]
    key += [config.relative_learning_rate, config.largest_share, dataclasses.asdict(training), context.processes.size]
    name = hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()[:16]
    directory = context.work.directory / f"recovery-{name}"
    compressed = directory / "compressed"
    if context.processes.is_main:
        if not compressed.is_dir():
            with atomic_directory(compressed) as unfinished:
                original = source.original
                sink = DirectorySink(teacher, unfinished, rename=original.stored_name, skeleton=original.skeleton)
                write_compressed(source, plan, stored_factors(context.work), sink, silent)
        if not (directory / WRITTEN).is_file():
            predictions = predictions or recorded_predictions(teacher, windows, context)
            write_windows(directory / WRITTEN, windows, predictions)
    context.processes.wait()
    training = replace(training, distill=str(directory / WRITTEN))
    run, record = _without_harm(compressed, plan.in_result, training, config, context)
    settings, losses = record.settings, _losses(record)
    names = ["max_steps", "batch_size", "max_length", "learning_rate", "warmup_steps", "dtype", "seed"]
    names += ["distill_weight", "rank", "gradient_checkpointing", "stream_weights"]
    numbers = {
        "healed": is_sound(losses, config.tolerance),
        "healing_tokens": math.prod(settings[name] for name in ("max_steps", "batch_size", "max_length", "processes")),
        "healing_seconds": record.numbers["seconds"],
        "held_out_loss": losses,
    }
    return Recovery(
        run / MODEL if run else None,
        {"text": _text(config), "trained": trainable} | {name: settings[name] for name in names},
        numbers | {"healing_parameters": record.numbers["trainable_parameters"]},
    )


def _text(config: RecoveryConfig) -> str:
    return str(config.dataset) if isinstance(config.dataset, str | Path) else type(config.dataset).__name__


def _training(windows: Tensor, plan: Plan, config: RecoveryConfig, seed: int, context: RunContext) -> FinetuneConfig:
    """Settings of the fine-tuning, but for its text, its learning rate and what it trains."""
    batch_size = -(-config.batch_size // context.processes.size)
    each = batch_size * context.processes.size
    steps = number_of_steps(config, len(windows), each, plan.parameter_ratio, plain=plan.plain)
    return FinetuneConfig(
        distill=WRITTEN,
        distill_weight=1.0 if config.dataset == SELF else config.teacher_weight,
        max_steps=steps,
        warmup_steps=min(config.warmup_steps, steps // 4),
        batch_size=batch_size,
        max_length=windows.shape[1],
        eval_steps=steps,
        max_eval_samples=config.max_eval_samples,
        save_steps=config.save_steps,
        seed=seed,
        **fastest(context.device),
    )


def number_of_steps(config: RecoveryConfig, windows: int, each: int, parameter_ratio: float, *, plain: bool) -> int:
    """Steps of `each` windows in one pass over the nine tenths that are not held out, or the limit for own text.

    The less was removed, the sooner its own text has given factors all it can. A plain result loses more at the same
    size and takes all.
    """
    steps = max(1, (windows - max(1, windows // 10)) // each)
    if config.dataset != SELF:
        return steps
    limit = math.inf if plain else math.ceil(config.steps_per_share * _removed(parameter_ratio))
    return int(min(config.max_steps, limit, steps))


def _without_harm(
    compressed: Path, plan: Plan, training: FinetuneConfig, config: RecoveryConfig, context: RunContext
) -> tuple[Path | None, Record]:
    """The run and its record. If the learning rate does harm or diverges, smaller ones are tried; None if all do."""
    from welore.training.finetune import finetune  # the Trainer: seconds of imports that factorisation does not need

    for share in config.fallbacks:
        run = compressed.with_name(f"run-{share:g}")
        try:
            if (run / TUNED).is_file():
                record = Record.load(run / TUNED)
            else:
                given = config.learning_rate and config.learning_rate * share
                rate = None if given else relative_rate(plan, training, config) * share
                settings = replace(training, learning_rate=given, relative_learning_rate=rate)
                resume, device = (run / RUN).is_file(), str(context.device)
                context.processes.wait()  # until all have looked
                options: dict[str, Any] = {"plan": plan if plan.plain else None, "progress": context.progress}
                record = finetune(compressed, run, settings, resume=resume, device=device, **options)
        except DivergedError:
            if share == config.fallbacks[-1]:
                raise
        else:
            if is_sound(_losses(record), config.tolerance):
                return run, record
        if context.processes.is_main:
            shutil.rmtree(run / MODEL, ignore_errors=True)
        context.processes.wait()
        gc.collect()  # the model of this trial, before the next one is loaded
    return None, record


def relative_rate(plan: Plan, training: FinetuneConfig, config: RecoveryConfig) -> float:
    """The peak learning rate over the size of what is trained, by the parameters removed and the steps."""
    rate, removed = config.relative_learning_rate, _removed(plan.parameter_ratio)
    longer = min(config.largest_share, removed * math.sqrt((training.max_steps or 1) / config.max_steps))
    return rate * (MATRICES_RATE if plan.plain and training.rank is None else 1) * max(removed, longer)


def _removed(parameter_ratio: float) -> float:
    """The share of the parameters of the targeted matrices that is gone."""
    return max(1 - parameter_ratio, 0.01)


def is_sound(losses: dict[str, float], tolerance: float) -> bool:
    """Whether the training did no harm: the held-out loss has not grown by more than a share of what was lost."""
    return losses["healed"] <= losses["cut"] + tolerance * max(0.0, losses["cut"] - losses["dense"])


def _losses(record: Record) -> dict[str, float]:
    """Losses on the held-out text: of the compressed model, of the recovered one, of the dense one."""
    evaluation = record.numbers["evaluation"]
    return {"cut": evaluation[0][1], "healed": evaluation[-1][1], "dense": record.numbers["teacher_eval_loss"]}
