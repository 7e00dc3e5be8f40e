"""5 - finetune: a checkpoint and a text or task -> a run directory with record, checkpoints and the tuned model."""

import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from welore.allocation.plan import Plan
from welore.data.packing import DatasetSplit, Example
from welore.data.windows import write_windows
from welore.io.atomic import require_outside
from welore.io.hub import resolve_model
from welore.io.progress import Progress, silent
from welore.models.load import compression_of, default_device, warn_if_slow
from welore.models.replace import sizes
from welore.records import Record
from welore.training.chunked_loss import shrink_head
from welore.training.data import Batch, collate, shuffled
from welore.training.distillation import Distillation
from welore.training.methods import Marked, known_warnings
from welore.training.preparation import Prepared, cast, items_read, prepare
from welore.training.run_dir import TUNED, WRITTEN, begin, check_out, gathered, last_checkpoint, save_result, written
from welore.training.settings import ADAMW, DTYPES, SETTINGS, Settings, arguments, check, check_launch, settled
from welore.training.teacher import share_frozen
from welore.training.trainer import ClockedTrainer, StepCallback, peak_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# a Trainer, and the step after which it goes on (None: it begins) -> one more callback of it
Watch = Callable[[ClockedTrainer, int | None], TrainerCallback]


def finetune(
    model: str | Path,
    out: str | Path,
    method: str = "lrc",
    *,
    data: str | None = None,
    task: str | None = None,
    task_data: str | Path | None = None,
    plan: Plan | str | Path | None = None,
    steps: int | None = None,
    lr: float = 5e-5,
    warmup: int | None = None,
    batch_size: int | None = None,
    accumulation: int = 1,
    length: int | None = None,
    seed: int = 0,
    dtype: str = "auto",
    save_dtype: str | None = None,
    attention: str | None = None,
    train_norms: bool = False,
    loss_on_prompt: bool = False,
    rank: int | None = None,
    optimizer: str = ADAMW,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    gradient_checkpointing: bool = False,
    selective_checkpointing: bool = False,
    whole_logits: bool = False,
    eval_every: int = 500,
    eval_items: int = 64,
    save_every: int = 500,
    distill: str | Path | None = None,
    distill_weight: float | None = None,
    distill_temperature: float | None = None,
    self_tokens: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    report_to: str = "none",
    device: str | None = None,
    label: str | None = None,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
    watch: Watch | None = None,
    progress: Progress = silent,
) -> Record:
    """Fine-tune MODEL by one of METHODS and write the run to `out`; the record (also OUT/finetune.json).

    data: a text (c4, wikitext2, pydoc or a file), or task: one of TASKS, read from task_data (see tasks.items).
    plan: for a dense model, which of its matrices count as LRCs. Defaults are the paper's (section 4): continual
    10,000 steps of 4 x 1024 tokens, a task 1,000 of 8 x 512; AdamW, cosine to a tenth of `lr` after a warm-up of
    one step in twenty. batch_size is that of one process; a step reads batch_size x accumulation x processes.
    dtype: bfloat16 keeps what is frozen in bfloat16 and what is trained in float32, and computes in bfloat16;
    "auto" is that on a GPU, float32 elsewhere. save_dtype: of the result, by default `dtype`. attention: one of
    transformers' implementations instead of its choice; "eager" is the faster on a CPU in bfloat16 (method.md).
    whole_logits: do without headloss, which computes the same loss in less memory. gradient_checkpointing: of the
    activations keep the inputs of the blocks only; selective_checkpointing: also the products that cost most (see
    activations). The losses are the same.
    eval_every, save_every: steps; 0 for never. resume: go on after the last complete checkpoint in `out`; the losses
    and weights are those of a run that never stopped.
    distill: a teacher, as a rule the dense model that this one was made from. The loss is then KL(teacher || model)
    over the vocabulary at every predicted token, at distill_temperature (1); distill_weight (1) below 1 leaves the
    rest to the text's cross-entropy. With data "self" the teacher writes the text: all that the steps read and a
    tenth held out, or self_tokens, read as often as needed; it stays in OUT/written.safetensors, and another run reads
    the same if that file is its `data`. Evaluation is the text's cross-entropy in any case.
    watch: makes one more callback of the Trainer; welore.emergence records its trace by one.
    Raises WeLoreError for what cannot work, before anything is written.
    """
    given = dict(locals())
    device = device or default_device()
    settings = settled({name: given[name] for name in SETTINGS}, device)
    check(settings, save_every, report_to)
    check_launch(os.environ, method, device, distill)
    warn_if_slow(DTYPES[settings.dtype], device)
    out = Path(out)
    args = arguments(settings, out, save_every, report_to, device)
    leads = args.process_index == 0
    if leads:
        check_out(out, resume=resume, overwrite=overwrite)
    directory = resolve_model(model, cache_dir=cache_dir, revision=revision)
    require_outside(out, directory)
    kept = written(out) if resume else None
    prepared = prepare(directory, settings, plan, args, kept, cache_dir, progress if leads else silent)
    if leads:
        begin(out, _identity(prepared, settings, args.world_size), resume=resume)
        if prepared.written is not None:
            write_windows(out / WRITTEN, prepared.written)
    last = last_checkpoint(out) if resume else None

    started = time.perf_counter()
    trainer, numbers = _train(prepared, settings, args, last, watch, progress)
    tuned: Any = prepared.marked.model.merge_and_unload() if method == "lora" else prepared.marked.model
    tuned.to(DTYPES[settings.save_dtype or settings.dtype])
    state = gathered(tuned)
    if leads:
        save_result(out, tuned, state, prepared.tokenizer, directory)
    numbers |= {"seconds": time.perf_counter() - started, "resumed_at": _step_of(last)} | sizes(tuned)
    inputs = {
        "model": str(model),
        "model_fingerprint": prepared.fingerprint,
        "label": label,
        "compression": compression_of(directory),
        "teacher_fingerprint": prepared.teachers_fingerprint,
        "data_sha256": prepared.material.sha256,
        "split": prepared.material.split,
    }
    record = Record("finetune", inputs, dataclasses.asdict(settings) | {"processes": args.world_size}, numbers)
    if leads:
        record.save(out / TUNED)
    trainer.accelerator.wait_for_everyone()
    return record


def _identity(prepared: Prepared, settings: Settings, processes: int) -> dict[str, Any]:
    """What a resumed run must have in common with the run that it goes on with."""
    trained = "\n".join(name for name, p in prepared.marked.model.named_parameters() if p.requires_grad)
    return dataclasses.asdict(settings) | {
        "fingerprint": prepared.fingerprint,
        "data_sha256": prepared.material.sha256,
        "teacher_fingerprint": prepared.teachers_fingerprint,
        "trained_sha256": hashlib.sha256(trained.encode()).hexdigest(),  # a plan can change it
        "processes": processes,
    }


def _train(
    prepared: Prepared,
    settings: Settings,
    args: TrainingArguments,
    last: Path | None,
    watch: Watch | None,
    progress: Progress,
) -> tuple[ClockedTrainer, dict[str, Any]]:
    """Run the Trainer; it, and what was measured."""
    model, material, tokenizer = prepared.marked.model, prepared.material, prepared.tokenizer
    cast(model, DTYPES[settings.dtype])
    base = model.get_base_model() if settings.method == "lora" else model
    distillation = None if prepared.teacher is None else _distillation(base, prepared.teacher, settings, args.device)
    in_pieces = distillation.in_pieces if distillation else not settings.whole_logits and shrink_head(base)
    cache, model.config.use_cache = model.config.use_cache, False
    args.eval_on_start = bool(settings.eval_every) and last is None
    steps = StepCallback(settings.steps, progress if args.process_index == 0 else silent)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    steps.trainer = trainer = ClockedTrainer(
        model=model,
        args=args,
        train_dataset=shuffled(material.train, items_read(settings, args.world_size), settings.seed),
        eval_dataset=material.evaluation,
        data_collator=partial(collate, pad=pad),
        callbacks=[steps],
        evaluation=_batches(material.evaluation, settings.batch_size, pad),
        show=distillation.show if distillation else None,
    )
    trainer.remove_callback(PrinterCallback)
    # Tied weights are in no checkpoint; told so, a Trainer that resumes does not miss them.
    base._keys_to_ignore_on_save = {*(base._keys_to_ignore_on_save or ()), *base.all_tied_weights_keys}
    if watch is not None:
        trainer.add_callback(watch(trainer, None if last is None else _step_of(last)))
    with known_warnings(), torch.serialization.safe_globals(_saved_with_galore(settings.method)):
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    model.config.use_cache = cache
    numbers = _numbers(prepared.marked, material, trainer) | {"logits_in_pieces": in_pieces}
    if prepared.teacher is not None:
        numbers |= _numbers_of_teacher(prepared.teacher, base, settings.eval_every, trainer)
    return trainer, numbers


def _distillation(
    student: "PreTrainedModel", teacher: "PreTrainedModel", settings: Settings, device: torch.device
) -> Distillation:
    assert settings.distill_weight is not None
    assert settings.distill_temperature is not None
    share_frozen(student, teacher)
    for model in (teacher, student):  # what they share moves once
        nn.Module.to(model, device)
    return Distillation(
        student,
        teacher,
        weight=settings.distill_weight,
        temperature=settings.distill_temperature,
        in_pieces=not settings.whole_logits,
    )


def _numbers_of_teacher(
    teacher: "PreTrainedModel", student: "PreTrainedModel", eval_every: int, trainer: ClockedTrainer
) -> dict[str, Any]:
    """What it costs (bytes that nobody else holds), and its loss on what is held out."""
    students = {id(p) for p in student.parameters()}
    own = [p for p in teacher.parameters() if id(p) not in students]
    return {
        "teacher_parameters": sum(p.numel() for p in teacher.parameters()),
        "teacher_bytes": sum(p.numel() * p.element_size() for p in own),
    } | ({"teacher_eval_loss": trainer.held_out_loss(teacher)} if eval_every else {})


def _numbers(marked: Marked, material: DatasetSplit, trainer: ClockedTrainer) -> dict[str, Any]:
    history = trainer.state.log_history
    own = sum(trainer.clock.tokens)
    everywhere = trainer.accelerator.reduce(torch.tensor(float(own), device=trainer.args.device), "sum").item()
    evaluation = [[h["step"], h["eval_loss"], h["eval_perplexity"]] for h in history if "eval_loss" in h]
    final = {"eval_loss": evaluation[-1][1], "eval_perplexity": evaluation[-1][2]} if evaluation else {}
    return {
        "trains": marked.trains,
        "trainable_parameters": sum(p.numel() for p in marked.model.parameters() if p.requires_grad),
        "total_parameters": sum(p.numel() for p in marked.model.parameters()),
        "tokens": int(everywhere),
        **trainer.clock.numbers(everywhere / own if own else 1.0),
        **peak_memory(trainer.args.device),
        "memory_before_bytes": trainer.clock.memory_before_bytes,
        **material.counts,
        **final,
        "train_loss": [[h["step"], h["loss"]] for h in history if "loss" in h],
        "evaluation": evaluation,
    }


def _batches(found: Sequence[Example], batch_size: int, pad: int) -> list[Batch]:
    return [collate(found[start : start + batch_size], pad) for start in range(0, len(found), batch_size)]


def _saved_with_galore(method: str) -> list[Any]:
    """What is in GaLore's optimiser state besides tensors, so that it can be read back."""
    if method != "galore":
        return []
    from galore_torch.galore_projector import GaLoreProjector

    return [GaLoreProjector]


def _step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.split("-")[1])
