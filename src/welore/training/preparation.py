"""All that a fine-tuning run needs, in memory: the model with its method's marks, a teacher, the data."""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainingArguments, get_scheduler, set_seed

from welore.allocation.plan import Plan
from welore.config import SELF, FinetuneConfig, as_record
from welore.data.examples import examples_of_rows
from welore.data.packing import Blocks, DatasetSplit, blocks_of_text, blocks_of_windows, blocks_to_write
from welore.data.rows import Rows, open_rows, refuse_of_rows
from welore.data.text import COLUMN, TextOptions, open_text
from welore.data.windows import given_predictions, given_windows, is_windows, require_known_tokens, write_windows
from welore.errors import WeLoreError, first_line
from welore.io.checkpoint import check_finite
from welore.io.claim import require_unread
from welore.io.context import RunContext
from welore.io.pages import give_back
from welore.io.progress import silent
from welore.layers.low_rank import CompressedLayer
from welore.models.experts import experts_of
from welore.models.load import LoadedModel, load_model
from welore.models.skeleton import context_length, require_context_length
from welore.training.activations import keep_wide_products
from welore.training.arguments import is_recorded, length_of, resolve_steps, sequences_read, training_arguments
from welore.training.data import questions_of_task, require_packing
from welore.training.methods import MarkedModel, known_warnings, mark_trainable, take_apart
from welore.training.originals import Originals
from welore.training.run_dir import CHECKPOINTS, WRITTEN, begin, config_digest, fingerprint, last_checkpoint, seal
from welore.training.teacher import load_teacher, write_text
from welore.training.trainer import FinetuneTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


NOT_IDENTITY = ("save_steps", "report_to")  # settings that a resumed run may change


@dataclass(frozen=True)
class Prepared:
    """A run that can begin, or go on after the checkpoint `last`.

    inputs: of the record: the model's name, the settings of its compression, the digests of model, teacher and data.
    originals: the model before its training; trained: names of the parameters that it changes. config: with its rate.
    """

    arguments: TrainingArguments
    marked: MarkedModel
    tokenizer: "PreTrainedTokenizerBase"
    data: DatasetSplit
    inputs: dict[str, Any]
    originals: Originals
    trained: set[str]
    teacher: "PreTrainedModel | None"
    last: Path | None
    config: FinetuneConfig

    @property
    def leads(self) -> bool:
        """Whether this process writes the results."""
        return self.arguments.process_index == 0

    @property
    def resumed_at(self) -> int | None:
        """The step after which the run goes on; None for a new one."""
        return None if self.last is None else int(self.last.name.split("-")[1])


def prepare(
    source: "str | Path | PreTrainedModel",
    config: FinetuneConfig,
    plan: Plan | str | Path | None,
    out: Path,
    context: RunContext,
    *,
    resume: bool,
) -> Prepared:
    """Model, teacher and data in memory, what is trained marked; the directory of the run, `out`, made or checked."""
    last = last_checkpoint(out) if resume else None
    args = training_arguments(config, out / CHECKPOINTS, context.device)
    leads, args.eval_on_start = args.process_index == 0, args.eval_on_start and last is None
    loaded = _loaded(source, out, config, context)
    model, tokenizer = loaded.model, loaded.tokenizer
    take_apart(model, plan)  # before anything names its parameters
    originals = Originals.of(model, loaded.directory)
    teacher = None
    if config.distill is not None and not is_recorded(config.distill):
        teacher = load_teacher(config, loaded, context)
        require_context_length(length_of(config), context_length(teacher.config))
    configs = {"model_settings_sha256": [config_digest(net.config) for net in (model, teacher) if net is not None]}
    for net in (model, teacher) if config.packing else ():
        if net is not None:
            require_packing(net)
    own_text = isinstance(config.dataset, str) and config.dataset == SELF
    data = None if own_text else _data(config, tokenizer, args.world_size, context)
    set_seed(config.seed)
    digests = {"model_fingerprint": fingerprint(model), "teacher_fingerprint": teacher and fingerprint(teacher)}
    marked = mark_trainable(model, config.method, plan=plan, train_norms=config.train_norms, rank=config.rank)
    args.learning_rate = config.learning_rate or marked.learning_rate(config.relative_learning_rate)
    config = replace(config, learning_rate=args.learning_rate, relative_learning_rate=None)
    if config.selective_checkpointing:
        keep_wide_products(model)
    for name, value in marked.training_arguments.items():
        setattr(args, name, value)
    args.ddp_find_unused_parameters = bool(experts_of(model))  # those that no token of a process chooses
    _refuse_optimizer(marked.model, args)
    if teacher is not None:
        cast(teacher, getattr(torch, config.dtype))
    written = None
    if data is None:
        if resume and (out / WRITTEN).is_file():
            written = given_windows(out / WRITTEN)
        else:
            progress = context.progress if leads else silent
            written = write_text(teacher, tokenizer, config, args.device, args.world_size, progress)
        data = blocks_of_windows(written, "the teacher's own text", eval_items=config.max_eval_samples)
    config = _with_steps(config, args, data)
    require_known_tokens(model, data.train.extremes, data.evaluation.extremes)
    digests["data_sha256"] = data.sha256
    if leads or resume:
        begin(out, _identity(config, marked, digests | configs, args.world_size), resume=resume)
    if leads and written is not None:
        write_windows(out / WRITTEN, written)
    if leads and last is not None:  # the run was perhaps killed before it sealed it
        seal(last)
    inputs, trained = loaded.inputs | digests, originals.trained(marked)
    return Prepared(args, marked, tokenizer, data, inputs, originals, trained, teacher, last, config)


def _with_steps(config: FinetuneConfig, args: TrainingArguments, data: DatasetSplit) -> FinetuneConfig:
    """The settings with the steps that follow from the data, which the arguments get, too."""
    has_passes = bool(config.num_train_epochs) or (config.task is None and not isinstance(data.train, Blocks))
    config = resolve_steps(config, len(data.train) if has_passes else None, args.world_size)
    for name in ("max_steps", "warmup_steps"):
        setattr(args, name, getattr(config, name))
    return config


def _identity(config: FinetuneConfig, marked: MarkedModel, digests: dict[str, Any], processes: int) -> dict[str, Any]:
    """Settings and digests that a resumed run must share with the run that it continues."""
    settings = {name: value for name, value in as_record(config).items() if name not in NOT_IDENTITY}
    settings["text_column"] = config.text_column or COLUMN  # as runs of before have it
    settings["packing"] = config.packing or None  # which these have not
    names = "\n".join(name for name, p in marked.model.named_parameters() if p.requires_grad)  # a plan can change them
    settings = {"model_fingerprint": digests["model_fingerprint"]} | settings  # another model has another rate, too
    return settings | digests | {"trained_sha256": hashlib.sha256(names.encode()).hexdigest(), "processes": processes}


def _loaded(
    source: "str | Path | PreTrainedModel", out: Path, config: FinetuneConfig, context: RunContext
) -> LoadedModel:
    """The model that is to be trained, on the CPU, or in memory where it lies."""
    if isinstance(source, nn.Module) and config.attention is not None:
        raise WeLoreError("attention is chosen where a model is loaded: leave it out for a model in memory")
    loaded = load_model(source, replace(context, device=torch.device("cpu")), attention=config.attention)
    if loaded.directory is not None:
        require_unread(out, loaded.directory)
    for name, parameter in loaded.model.named_parameters():
        check_finite(name, parameter.detach())
    require_context_length(length_of(config), context_length(loaded.model.config))
    return loaded


def _refuse_optimizer(model: Any, args: TrainingArguments) -> None:
    """Raise WeLoreError for an optimiser that needs a package that is not there, or settings that we do not give."""
    what, schedule = f"optimizer {getattr(args.optim, 'value', args.optim)}", args.lr_scheduler_type
    how: Any = {"scheduler_specific_kwargs": args.lr_scheduler_kwargs}
    try:
        with known_warnings():
            FinetuneTrainer.get_optimizer_cls_and_kwargs(args, model)
            what = f"lr_scheduler_kwargs {args.lr_scheduler_kwargs}"
            get_scheduler(schedule, torch.optim.SGD([torch.zeros(1)]), 0, args.max_steps, **how)
    except (ImportError, ValueError, TypeError) as error:
        raise WeLoreError(f"{what} cannot be used: {first_line(error)}") from error


def _data(
    config: FinetuneConfig, tokenizer: "PreTrainedTokenizerBase", processes: int, context: RunContext
) -> DatasetSplit:
    """Answers to learn, windows of tokens, or a text in blocks: a part to train on, a part to evaluate on."""
    if config.task is not None:
        return questions_of_task(config, tokenizer, context.cache_dir)
    length, sequences, count = length_of(config), sequences_read(config, processes), config.max_eval_samples
    if is_windows(config.dataset):
        windows = given_windows(config.dataset, length)  # type: ignore[arg-type]
        if windows.shape[1] != length:
            raise WeLoreError(f"the dataset has windows of {windows.shape[1]} tokens: give that as max_length")
        predictions = given_predictions(config.dataset) if is_recorded(config.distill) else None  # type: ignore[arg-type]
        return blocks_of_windows(windows, "windows of token ids", eval_items=count, predictions=predictions)
    rows = open_rows(config, None if config.num_train_epochs else blocks_to_write(sequences), context.cache_dir)
    if isinstance(rows, Rows):
        return examples_of_rows(rows, tokenizer, config)
    options = TextOptions.of(config, context)
    name = open_text(rows, options).name  # an error for what is no text either
    refuse_of_rows(config, f"{name} is a text")
    refuse_of_rows(config, f"{name} is a text: give max_steps", ("num_train_epochs",))
    return blocks_of_text(rows, tokenizer, length, tokens=sequences * length, eval_items=count, options=options)


def cast(model: Any, dtype: torch.dtype, *, mapped: bool = True, streamed: Collection[nn.Module] = ()) -> None:
    """Put trained parameters in float32 and frozen ones in `dtype`; tied weights stay tied.

    Frozen parameters that have the dtype stay in the mapped file. If any of them is converted, everything is copied,
    the empty tombstones and the orders too: one tensor that still lies in the file keeps all of it in memory. mapped:
    whether there is such a file. streamed: layers that convert their weights themselves, which are never made larger.
    """
    left = {id(p) for layer in streamed for p in layer.parameters() if p.dtype.itemsize < dtype.itemsize}
    converted = any(p.dtype is not dtype for p in model.parameters() if not p.requires_grad)
    copy = mapped and converted and dtype is not torch.float32
    for parameter in model.parameters():
        if id(parameter) not in left:
            before = parameter.data
            parameter.data = before.to(torch.float32 if parameter.requires_grad else dtype, copy=copy)
            if parameter.dtype is not before.dtype:
                give_back([before])  # other tensors keep its file open
    for module in model.modules():
        if isinstance(module, CompressedLayer) and copy:
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.clone())
