"""What a fine-tuning run needs, in memory: the model with its method's marks, a teacher, the material."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainingArguments, set_seed

from welore.allocation.plan import Plan
from welore.data.mixture import SELF, seed_of
from welore.data.packing import DatasetSplit, blocks_of_text, blocks_of_windows, blocks_to_write
from welore.data.text import TextOptions
from welore.data.windows import WINDOWS, read_windows
from welore.errors import WeLoreError, first_line
from welore.io.progress import Progress
from welore.layers.low_rank import LowRankLayer, SplitLinear
from welore.models.load import load
from welore.models.skeleton import context_length, require_context_length
from welore.training.activations import keep_wide_products
from welore.training.data import questions_of_task
from welore.training.methods import METHODS, Marked, known_warnings, matrices
from welore.training.run_dir import fingerprint
from welore.training.settings import DTYPES, Settings
from welore.training.teacher import load_teacher, write_text
from welore.training.trainer import ClockedTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prepared:
    """All that a run needs; fingerprint: of the model as it was read. written: what the teacher wrote."""

    marked: Marked
    tokenizer: "PreTrainedTokenizerBase"
    material: DatasetSplit
    fingerprint: str
    teacher: "PreTrainedModel | None" = None
    teachers_fingerprint: str | None = None
    written: Tensor | None = None


def prepare(
    directory: Path,
    settings: Settings,
    plan: Plan | str | Path | None,
    args: TrainingArguments,
    kept: Tensor | None,
    cache_dir: str | Path | None,
    progress: Progress,
) -> Prepared:
    """Model, teacher and material in memory; the method has marked what it trains and told `args` its optimiser.

    kept: what the teacher wrote for this run before it was stopped.
    """
    chosen = Plan.load(plan) if isinstance(plan, str | Path) else plan
    model, tokenizer = load(directory, "auto", "cpu", settings.attention)
    require_context_length(settings.length, context_length(model.config))
    teacher, teachers_fingerprint = None, None
    if settings.distill is not None:
        alone = settings.distill_weight == 1
        how: dict[str, Any] = {"alone": alone, "attention": settings.attention, "cache_dir": cache_dir}
        teacher = load_teacher(settings.distill, model, tokenizer, directory, **how)
        require_context_length(settings.length, context_length(teacher.config))
        teachers_fingerprint = fingerprint(teacher)
    text = None if settings.data == SELF else _material(settings, tokenizer, args.world_size, cache_dir)
    set_seed(settings.seed)
    known = fingerprint(model)
    marked = METHODS[settings.method](model, matrices(model, chosen), settings.train_norms, settings.rank)
    if settings.selective_checkpointing:
        keep_wide_products(model)
    for name, value in marked.training.items():
        setattr(args, name, value)
    _refuse_optimizer(marked.model, args)
    if teacher is not None:
        cast(teacher, DTYPES[settings.dtype])
    if text is not None:
        return Prepared(marked, tokenizer, text, known, teacher, teachers_fingerprint)
    if kept is None:
        blocks = blocks_to_write(items_read(settings, args.world_size))
        tokens = blocks * settings.length if settings.self_tokens is None else settings.self_tokens
        size: dict[str, Any] = {"tokens": tokens, "length": settings.length, "seed": seed_of(settings.seed, SELF)}
        kept = write_text(teacher, tokenizer, args.device, progress=progress, **size)
    material = blocks_of_windows(kept, "the teacher's own text", eval_items=settings.eval_items)
    return Prepared(marked, tokenizer, material, known, teacher, teachers_fingerprint, kept)


def _refuse_optimizer(model: Any, args: TrainingArguments) -> None:
    """Raise WeLoreError for an optimiser that needs a package that is not there, or settings that we do not give."""
    try:
        with known_warnings():
            ClockedTrainer.get_optimizer_cls_and_kwargs(args, model)
    except (ImportError, ValueError) as error:
        name = getattr(args.optim, "value", args.optim)
        raise WeLoreError(f"optimizer {name} cannot be used: {first_line(error)}") from error


def _material(
    settings: Settings, tokenizer: "PreTrainedTokenizerBase", processes: int, cache_dir: str | Path | None
) -> DatasetSplit:
    if settings.task is not None:
        return questions_of_task(
            settings.task,
            settings.task_data,
            tokenizer,
            settings.length,
            seed=settings.seed,
            loss_on_prompt=settings.loss_on_prompt,
            eval_items=settings.eval_items,
            cache_dir=cache_dir,
        )
    assert settings.data is not None
    if settings.data.endswith(WINDOWS):
        windows = read_windows(settings.data, settings.length, len(tokenizer))
        return blocks_of_windows(windows, "a file of windows", eval_items=settings.eval_items)
    tokens = items_read(settings, processes) * settings.length
    return blocks_of_text(
        settings.data,
        tokenizer,
        settings.length,
        tokens=tokens,
        eval_items=settings.eval_items,
        options=TextOptions(cache_dir=cache_dir),
    )


def items_read(settings: Settings, processes: int) -> int:
    """How many sequences a run reads, in all its processes."""
    return settings.steps * settings.batch_size * settings.accumulation * processes


def cast(model: Any, dtype: torch.dtype) -> None:
    """What is trained in float32, what is frozen in `dtype`; tied weights stay tied.

    Where dtypes are mixed everything is copied, the empty tombstones and the orders too: one tensor that still lies
    in the mapped file keeps all of the file in memory.
    """
    copy = dtype is not torch.float32
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype, copy=copy)
    for module in model.modules():
        if isinstance(module, LowRankLayer | SplitLinear):
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.clone())
