"""5 - finetune: a checkpoint and a text or task -> a run directory with record, checkpoints and the tuned model."""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import nn
from torch.utils.data import Subset
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from welore.allocation.plan import Plan
from welore.config import Dataset, FinetuneConfig, RunOptions, as_record, settings_of
from welore.evaluation.perplexity import perplexity_of
from welore.io.atomic import atomic_directory
from welore.io.checkpoint import PLAN, RECORD
from welore.io.context import RunContext, own_modes
from welore.io.progress import silent
from welore.models.card import read_card, write_card
from welore.models.experts import fused
from welore.models.load import sizes_in, warn_if_slow
from welore.models.source import require_unwrapped
from welore.records import Record
from welore.training.arguments import check_launch, is_recorded, resolve_defaults, sequences_read
from welore.training.data import collate, reading_order
from welore.training.methods import known_warnings, state_classes, take_apart
from welore.training.objective import Objective
from welore.training.originals import borrowed, same_randomness
from welore.training.preparation import Prepared, cast, prepare
from welore.training.run_dir import MODEL, TUNED, gathered, read_checkpoint, run_directory
from welore.training.streaming import streamed
from welore.training.teacher import share_frozen
from welore.training.trainer import FinetuneTrainer, RunCallback, peak_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# transformers' callbacks, or functions that make one for the Trainer
Callbacks = Sequence[TrainerCallback | Callable[[FinetuneTrainer], TrainerCallback]]


@own_modes()
def finetune(
    model: "str | Path | PreTrainedModel",
    output_dir: str | Path,
    config: FinetuneConfig | None = None,
    *,
    dataset: Dataset | None = None,
    plan: Plan | str | Path | None = None,
    resume: bool = False,
    label: str | None = None,
    callbacks: Callbacks = (),
    **options: Unpack[RunOptions],
) -> Record:
    """Fine-tune a model by one of METHODS and write the run to a directory.

    The defaults are the paper's (section 4): continual fine-tuning takes 10,000 steps of 4 x 1024 tokens, but no more
    than three passes over rows, a task 1,000 of 8 x 512; AdamW; a cosine to a tenth of the learning rate after a
    warm-up of one step in twenty. A step reads batch_size x gradient_accumulation_steps x processes sequences. On a GPU
    the computation is in bfloat16 and what is trained stays in float32; on a CPU all is float32. In the result every
    tensor has its dtype of before, and frozen ones have every bit. With `distill` the loss is KL(teacher || model) at
    every token; evaluation is cross-entropy.

    Args:
        model: Hub id, directory, .gguf file, or a model in memory, which is trained in place.
        output_dir: Where the run is written: finetune.json, checkpoints/, model/ (see run_dir).
        config: The settings; `training_arguments` in it holds any other field of transformers' TrainingArguments.
        dataset: The text, in place of config.dataset.
        plan: For a dense model, which of its matrices count as low-rank components.
        resume: Go on after the last complete checkpoint. Losses and weights are those of a run that never stopped;
            to rounding with other processes and batches, whose steps must read as many sequences.
        label: A name for tables and figures.
        callbacks: Of transformers; or functions that take the Trainer and make one.
        **options: See config.RunOptions; `tokenizer` is needed for a model in memory.

    Returns:
        The record, as in finetune.json.

    Raises:
        WeLoreError: The settings cannot work; nothing has been written then.
        DivergedError: The loss is NaN or infinite.
    """
    context = RunContext.create(**options)
    config = resolve_defaults(settings_of(FinetuneConfig, config, dataset=dataset), context.device)
    check_launch(os.environ, config.method, context.device.type, config.distill)
    warn_if_slow(getattr(torch, config.dtype), context.device)
    if isinstance(model, nn.Module):
        require_unwrapped(model)
        take_apart(model, plan)  # and leave it so
    in_memory = borrowed(model) if isinstance(model, nn.Module) else nullcontext()
    directory = run_directory(output_dir, model, config, plan, resume=resume, overwrite=context.overwrite)
    with in_memory, directory as out, same_randomness(context.device):
        run = prepare(model, config, plan, out, context, resume=resume)
        return _finetuned(run, run.config, out, label, callbacks, context)


def _finetuned(
    run: Prepared, config: FinetuneConfig, out: Path, label: str | None, callbacks: Callbacks, context: RunContext
) -> Record:
    """Train, and write the result and the record."""
    started = time.perf_counter()
    dtype = getattr(torch, config.dtype)
    with streamed(run.marked.base, dtype) if config.stream_weights else nullcontext(()) as streaming:
        cast(run.marked.model, dtype, mapped=run.originals.directory is not None, streamed=streaming)
        numbers = _train(run, config, callbacks, context)
    made = f"Fine-tuned by `welore finetune` with the method {config.method}, {numbers['tokens']:,} tokens."
    numbers |= _save(run, out, config.save_dtype and getattr(torch, config.save_dtype), made)
    numbers |= {"seconds": time.perf_counter() - started, "resumed_at": run.resumed_at or 0}
    inputs = run.inputs | {"label": label, "split": run.data.split}
    record = Record("finetune", inputs, as_record(config) | {"processes": run.arguments.world_size}, numbers)
    if run.leads:
        record.save(out / TUNED)
    run.arguments.distributed_state.wait_for_everyone()
    return record


def _train(run: Prepared, config: FinetuneConfig, callbacks: Callbacks, context: RunContext) -> dict[str, Any]:
    """Run the Trainer; the numbers of the record."""
    args, base = run.arguments, run.marked.base
    objective = _objective(base, run.teacher, config, args)
    pad = min(run.tokenizer.pad_token_id or 0, len(base.get_input_embeddings().weight) - 1)  # never read
    order = reading_order(len(run.data.train), sequences_read(config, args.world_size), config.seed)
    tokens = run.data.train.lengths[order].view(args.max_steps, -1).sum(1).tolist()
    size = args.per_device_train_batch_size
    measure = RunCallback(tokens.__getitem__, args.max_steps, context.progress if run.leads else silent)
    held_out = run.data.evaluation
    trainer = FinetuneTrainer(
        model=run.marked.model,
        args=args,
        train_dataset=Subset(run.data.train, order),
        eval_dataset=held_out,
        data_collator=partial(collate, pad=pad),
        callbacks=[measure],
        evaluation=[collate(held_out[i : i + size], pad) for i in range(0, len(held_out), size)],
        objective=objective,
        resumed_at=run.resumed_at,
    )
    trainer.remove_callback(PrinterCallback)
    for callback in callbacks:
        trainer.add_callback(callback if isinstance(callback, TrainerCallback) else callback(trainer))
    other_gpu = args.device.type == "cuda" and args.device.index != torch.cuda.current_device()
    with (
        torch.cuda.device(args.device) if other_gpu else nullcontext(),
        known_warnings(),
        torch.serialization.safe_globals(state_classes(config.method)),
        _set_up(base),
        read_checkpoint(run.last, sharded=trainer.is_fsdp_enabled),
    ):
        trainer.train(resume_from_checkpoint=None if run.last is None else str(run.last))
    steps = trainer.state.global_step  # of the run, also of what was resumed
    epochs = steps * len(order) / args.max_steps / len(run.data.train)
    numbers = _numbers(run, trainer) | measure.numbers() | {"tokens": sum(tokens[:steps]), "epochs": epochs}
    numbers["logits_in_pieces"] = objective is not None and objective.chunked
    if run.teacher is not None:
        numbers |= _numbers_of_teacher(run.teacher, base, trainer if config.eval_steps else None)
    if run.data.teacher_loss is not None and config.eval_steps:
        numbers["teacher_eval_loss"] = run.data.teacher_loss
    return numbers


def _save(run: Prepared, out: Path, dtype: torch.dtype | None, made: str) -> dict[str, Any]:
    """Write the tuned model, whole or not at all; plan and compression record come along. Returns its sizes.

    made: how, for the model card.
    """
    copied = run.originals.readable(exact=not (run.arguments.bf16 or run.arguments.fp16))
    tuned, source = run.originals.merged(run.marked, dtype), run.originals.directory
    state = gathered(tuned)
    own = dict(tuned.named_parameters())
    first = {id(parameter): name for name, parameter in own.items()}
    names = {name: first[id(parameter)] for name, parameter in tuned.named_parameters(remove_duplicate=False)}
    now = state or {name: parameter.data for name, parameter in own.items()}
    trained = {name: now[once] for name, once in names.items() if once in run.trained and run.leads}
    for name, parameter in own.items():
        parameter.data = run.originals.restored(name, parameter.data, run.trained, dtype)
    if state is not None:
        state = {n: run.originals.restored(n, tensor, run.trained, dtype) for n, tensor in state.items()}
    if run.leads:
        with atomic_directory(out / MODEL, overwrite=True) as unfinished:
            if not copied:
                (tuned if state else fused(tuned)).save_pretrained(unfinished, state_dict=state)
                run.tokenizer.save_pretrained(unfinished)
            else:
                run.originals.write(unfinished, tuned, trained, dtype)
            for name in (PLAN, RECORD):
                if source is not None and (source / name).is_file():
                    shutil.copyfile(source / name, unfinished / name)
            origin = "" if source is None else read_card(source)
            write_card(unfinished, str(run.inputs.get("model") or ""), origin, relation="finetune", made=made)
    return sizes_in(source, tuned)


def _objective(
    student: "PreTrainedModel", teacher: "PreTrainedModel | None", config: FinetuneConfig, args: TrainingArguments
) -> Objective | None:
    """The training loss; None for the model's own, which knows its head best."""
    weights: dict[str, Any] = {"weight": config.distill_weight, "temperature": config.distill_temperature}
    if is_recorded(config.distill):
        nn.Module.to(student, args.device)
        return Objective(student, taught=True, **weights, whole_logits=config.whole_logits)
    if teacher is None:
        objective = Objective(student, whole_logits=config.whole_logits or args.use_liger_kernel)
        return objective if objective.chunked and not args.label_smoothing_factor else None
    share_frozen(student, teacher)
    for model in (teacher, student):  # what they share moves once
        nn.Module.to(model, args.device)
    return Objective(student, teacher, **weights, whole_logits=config.whole_logits)


@contextmanager
def _set_up(model: "PreTrainedModel") -> Iterator[None]:
    """No cache of keys and values; checkpoints hold what is trained alone, and the rest is not missed on resuming."""
    anything: Any = model
    before = anything.config.use_cache, anything._keys_to_ignore_on_save
    trained = {id(p) for p in anything.parameters() if p.requires_grad}
    named = anything.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in named if id(parameter) not in trained}
    anything.config.use_cache = False
    anything._keys_to_ignore_on_save = {*(before[1] or ()), *anything.all_tied_weights_keys, *frozen}
    try:
        yield
    finally:
        anything.config.use_cache, anything._keys_to_ignore_on_save = before


def _numbers(run: Prepared, trainer: FinetuneTrainer) -> dict[str, Any]:
    history = trainer.state.log_history
    evaluation = [[h["step"], h["eval_loss"], h["eval_perplexity"]] for h in history if "eval_loss" in h]
    if evaluation and (trainer.args.load_best_model_at_end or evaluation[-1][0] != trainer.state.global_step):
        loss = trainer.held_out_loss(trainer.model)  # of the best model, or where a callback has stopped
        evaluation.append([trainer.state.global_step, loss, perplexity_of(loss)])
    final = {"eval_loss": evaluation[-1][1], "eval_perplexity": evaluation[-1][2]} if evaluation else {}
    parameters = list(run.marked.model.parameters())
    return {
        "trains": run.marked.description,
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "total_parameters": sum(p.numel() for p in parameters),
        **peak_memory(trainer.args.device),
        **run.data.counts,
        **final,
        "train_loss": [[h["step"], h["loss"]] for h in history if "loss" in h],
        "evaluation": evaluation,
    }


def _numbers_of_teacher(
    teacher: "PreTrainedModel", student: "PreTrainedModel", evaluator: FinetuneTrainer | None
) -> dict[str, Any]:
    """The teacher's size, the bytes that only it holds, and its loss on what is held out."""
    shared = {id(p) for p in student.parameters()}
    own = [p for p in teacher.parameters() if id(p) not in shared]
    return {
        "teacher_parameters": sum(p.numel() for p in teacher.parameters()),
        "teacher_bytes": sum(p.numel() * p.element_size() for p in own),
    } | ({"teacher_eval_loss": evaluator.held_out_loss(teacher)} if evaluator else {})
