"""What a fine-tuning run needs, in memory: the model with its method's marks, a teacher, the data."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments, set_seed

from welore.allocation.plan import Plan
from welore.config import SELF, FinetuneConfig
from welore.data.mixture import seed_of
from welore.data.packing import DatasetSplit, blocks_of_text, blocks_of_windows, blocks_to_write
from welore.data.text import TextOptions
from welore.data.windows import WINDOWS, read_windows
from welore.errors import WeLoreError, first_line
from welore.io.atomic import require_outside
from welore.io.context import RunContext
from welore.io.hub import resolve_model
from welore.layers.low_rank import LowRankLayer, SplitLinear
from welore.models.load import load
from welore.models.skeleton import context_length, require_context_length
from welore.training.activations import keep_wide_products
from welore.training.arguments import length_of, sequences_read
from welore.training.data import questions_of_task
from welore.training.methods import MarkedModel, known_warnings, mark_trainable
from welore.training.run_dir import fingerprint, read_written
from welore.training.teacher import load_teacher, write_text
from welore.training.trainer import FinetuneTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prepared:
    """All that a run needs.

    inputs: the model's name and the digests of model, teacher and data. directory: of the model; None if it was in
    memory. written: the text of the teacher.
    """

    marked: MarkedModel
    tokenizer: "PreTrainedTokenizerBase"
    data: DatasetSplit
    inputs: dict[str, Any]
    directory: Path | None
    teacher: "PreTrainedModel | None"
    written: Tensor | None

    @property
    def trained_sha256(self) -> str:
        """Digest of the names of what is trained, which a plan can change."""
        names = "\n".join(name for name, p in self.marked.model.named_parameters() if p.requires_grad)
        return hashlib.sha256(names.encode()).hexdigest()


def prepare(
    source: "str | Path | PreTrainedModel",
    config: FinetuneConfig,
    plan: Plan | str | Path | None,
    args: TrainingArguments,
    out: Path,
    context: RunContext,
    *,
    resume: bool,
) -> Prepared:
    """Model, teacher and data; the method has marked what it trains and told `args` its optimiser."""
    model, tokenizer, directory = _loaded(source, out, config, context)
    teacher = None
    if config.distill is not None:
        alone = config.distill_weight == 1
        teacher = load_teacher(config.distill, model, tokenizer, directory, alone, config.attention, context)
        require_context_length(length_of(config), context_length(teacher.config))
    own_text = isinstance(config.dataset, str) and config.dataset == SELF
    data = None if own_text else _data(config, tokenizer, args.world_size, context)
    set_seed(config.seed)
    digests = {"model_fingerprint": fingerprint(model), "teacher_fingerprint": teacher and fingerprint(teacher)}
    marked = mark_trainable(model, config.method, plan=plan, train_norms=config.train_norms, rank=config.rank)
    if config.selective_checkpointing:
        keep_wide_products(model)
    for name, value in marked.training_arguments.items():
        setattr(args, name, value)
    _refuse_optimizer(marked.model, args)
    if teacher is not None:
        cast(teacher, getattr(torch, config.dtype))
    written = None
    if data is None:
        written = read_written(out) if resume else None
        if written is None:
            written = _written(teacher, tokenizer, config, args, context)
        data = blocks_of_windows(written, "the teacher's own text", eval_items=config.max_eval_samples)
    name = str(source) if directory else model.config.name_or_path or "model in memory"
    inputs = {"model": name} | digests | {"data_sha256": data.sha256}
    return Prepared(marked, tokenizer, data, inputs, directory, teacher, written)


def _loaded(
    source: "str | Path | PreTrainedModel", out: Path, config: FinetuneConfig, context: RunContext
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase, Path | None]":
    """Model, tokenizer and directory of what is to be trained; the directory of a model in memory is None."""
    if isinstance(source, nn.Module):
        if context.tokenizer is None:
            raise WeLoreError("a model in memory needs its tokenizer: pass it as tokenizer=...")
        if config.attention is not None:
            raise WeLoreError("attention is chosen where a model is loaded: leave it out for a model in memory")
        model, tokenizer, directory = source, context.tokenizer, None
    else:
        directory = resolve_model(source, cache_dir=context.cache_dir, revision=context.revision)
        require_outside(out, directory)
        model, tokenizer = load(directory, "auto", "cpu", config.attention)
    require_context_length(length_of(config), context_length(model.config))
    return model, tokenizer, directory


def _written(
    teacher: Any, tokenizer: Any, config: FinetuneConfig, args: TrainingArguments, context: RunContext
) -> Tensor:
    """The text that the teacher writes: all that the steps read and a tenth held out, or self_tokens."""
    length = length_of(config)
    blocks = blocks_to_write(sequences_read(config, args.world_size))
    tokens = blocks * length if config.self_tokens is None else config.self_tokens
    seed = seed_of(config.seed, SELF)
    return write_text(
        teacher, tokenizer, args.device, tokens=tokens, length=length, seed=seed, progress=context.progress
    )


def _refuse_optimizer(model: Any, args: TrainingArguments) -> None:
    """Raise WeLoreError for an optimiser that needs a package that is not there, or settings that we do not give."""
    try:
        with known_warnings():
            FinetuneTrainer.get_optimizer_cls_and_kwargs(args, model)
    except (ImportError, ValueError) as error:
        name = getattr(args.optim, "value", args.optim)
        raise WeLoreError(f"optimizer {name} cannot be used: {first_line(error)}") from error


def _data(
    config: FinetuneConfig, tokenizer: "PreTrainedTokenizerBase", processes: int, context: RunContext
) -> DatasetSplit:
    """What is trained and evaluated on: the questions of a task, windows of tokens, or a text."""
    length = length_of(config)
    if config.task is not None:
        return questions_of_task(
            config.task,
            config.task_dataset,
            tokenizer,
            length,
            seed=config.seed,
            loss_on_prompt=config.loss_on_prompt,
            eval_items=config.max_eval_samples,
            cache_dir=context.cache_dir,
        )
    dataset: Any = str(config.dataset) if isinstance(config.dataset, Path) else config.dataset
    if isinstance(dataset, str) and dataset.endswith(WINDOWS):
        windows = read_windows(dataset, length, len(tokenizer))
        return blocks_of_windows(windows, "a file of windows", eval_items=config.max_eval_samples)
    return blocks_of_text(
        dataset,
        tokenizer,
        length,
        tokens=sequences_read(config, processes) * length,
        eval_items=config.max_eval_samples,
        options=TextOptions.of(config, context),
    )


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
