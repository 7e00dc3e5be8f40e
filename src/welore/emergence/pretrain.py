"""6 - pretrain: a text and a size -> a small Llama, trained from nothing, and the trace of how it became low rank.

OUT/run.json        what the run is; a resumed run must be the same
OUT/start/          the model that has learned nothing, with its tokenizer
OUT/training/       the run directory of its training (rundir); training/model is the result
OUT/trace/          what was recorded on the way (trace)
OUT/pretrain.json   the record; written last, so that it stands for a finished run
"""

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from welore.config import FinetuneConfig, MethodName
from welore.data.packing import training_texts
from welore.data.text import TextOptions
from welore.emergence.claims import measured
from welore.emergence.init_model import Size, about, fresh_model, known_tokenizer, save_fresh, size_of, vocabulary
from welore.emergence.probe import Probe, probed_steps
from welore.emergence.trace import ERR, RANKS, Trace, Writer, finish
from welore.errors import WeLoreError
from welore.io.progress import Progress, silent
from welore.models.load import default_device
from welore.models.targets import find_targets
from welore.records import Record
from welore.training.arguments import FSDP, is_on, resolve_defaults
from welore.training.finetune import finetune
from welore.training.run_dir import MODEL, RUN, TUNED, begin, check_out, fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START, TRAINING, TRACE, PRETRAINED = "start", "training", "trace", "pretrain.json"
VOCABULARY = 32_000
METHOD: MethodName = "full"
LEAST = 4  # checkpoints, to speak of a course
WEIGHTS = "model.safetensors"


def pretrain(
    out: str | Path,
    size: str = "9m",
    *,
    data: str,
    steps: int = 25_000,
    tokenizer: str | None = None,
    vocabulary: int = VOCABULARY,
    lr: float = 1e-3,
    warmup: int | None = None,
    batch_size: int = 32,
    accumulation: int = 1,
    length: int = 256,
    seed: int = 0,
    dtype: str = "auto",
    optimizer: str = FinetuneConfig.optimizer,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    gradient_checkpointing: bool = False,
    probes: int = 30,
    probe_items: int = 32,
    eval_items: int = 128,
    save_every: int = 500,
    resume: bool = False,
    overwrite: bool = False,
    report_to: str = "none",
    device: str | None = None,
    label: str | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress = silent,
) -> Record:
    """Pre-train a Llama of a size (fresh.SIZES, or "hidden/layers/heads/intermediate") and record its trace.

    data: as for `finetune`; its held-out part gives the loss and the two batches, of `probe_items` sequences each,
    whose gradients are recorded at `probes` steps, the first and the last among them. tokenizer: a hub model or
    directory to take it from; without one a BPE of `vocabulary` tokens is made from the training text. The other
    settings are those of `finetune`, on whose engine this runs; weight_decay 0 is Adam, the paper's. Defaults are the
    paper's steps and GaLore's schedule (WeLore, section 3).
    resume: go on after the last checkpoint; the trace is the one of a run that never stopped, byte for byte.
    Raises WeLoreError for what cannot work.
    """
    out, wanted = Path(out), size_of(size)
    training = FinetuneConfig(
        method=METHOD,
        dataset=data,
        max_steps=steps,
        learning_rate=lr,
        warmup_steps=warmup,
        batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_length=length,
        seed=seed,
        dtype=dtype,  # type: ignore[arg-type]
        optimizer=optimizer,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        gradient_checkpointing=gradient_checkpointing,
        eval_steps=steps,
        max_eval_samples=eval_items,
        save_steps=save_every,
        report_to=report_to,  # type: ignore[arg-type]
    )
    asked: dict[str, Any] = {"tokenizer": tokenizer, "data": data, "seed": seed, "probes": probes}
    asked |= {"probe_items": probe_items, "size": about(wanted), "vocabulary": None if tokenizer else vocabulary}
    where = device or default_device()
    resolve_defaults(training, torch.device(where))
    _check(steps, probes, probe_items, eval_items)
    processes = _processes(where)
    if processes.is_main_process:
        tokens = steps * batch_size * accumulation * length * processes.num_processes
        _begin(out, asked, wanted, tokens, length, resume=resume, overwrite=overwrite, cache_dir=cache_dir)
    processes.wait_for_everyone()

    found: list[Probe] = []

    def watch(trainer: Any) -> Probe:
        at = trainer.resumed_at
        per_step = batch_size * accumulation * length * trainer.args.world_size
        found.append(
            _probe(trainer, at, out, f"{size}, seed {seed}", probed_steps(steps, probes), probe_items, per_step)
        )
        return found[-1]

    place = out / TRAINING
    if resume and (place / TUNED).is_file():
        tuned = Record.load(place / TUNED)
    else:
        tuned = finetune(
            out / START,
            place,
            training,
            resume=resume and (place / RUN).is_file(),
            label=label or size,
            callbacks=[watch],
            device=where,
            cache_dir=cache_dir,
            progress=progress,
        )
    processes.wait_for_everyone()
    record = _record(out, asked, label, tuned, found[0] if found else None)
    if processes.is_main_process:
        finish(out / TRACE)
        record.save(out / PRETRAINED)
    processes.wait_for_everyone()
    return record


def _check(steps: int, probes: int, probe_items: int, eval_items: int) -> None:
    if probes < LEAST or probes > steps:
        raise WeLoreError(f"probes is {probes}: give at least {LEAST}, and no more than the {steps} steps of the run")
    if probe_items < 1 or 2 * probe_items > eval_items:
        raise WeLoreError(
            f"probe_items is {probe_items}, eval_items {eval_items}: the two batches of the probe, a sequence or more "
            "each, are part of the held-out sequences"
        )
    if is_on(os.environ, FSDP):
        raise WeLoreError("pretrain reads whole gradients, which FSDP cuts: use torchrun, which is DDP")


def _processes(device: str) -> Any:
    """All processes of this run, as accelerate knows them; the Trainer will ask for the same."""
    if importlib.util.find_spec("accelerate") is None:
        raise WeLoreError("pretrain needs accelerate: pip install 'welore[train]'")
    from accelerate import PartialState  # type: ignore[import-untyped]

    return PartialState(cpu=device == "cpu")


def _begin(
    out: Path,
    asked: dict[str, Any],
    size: Size,
    tokens: int,
    length: int,
    *,
    resume: bool,
    overwrite: bool,
    cache_dir: str | Path | None,
) -> None:
    """Make the directory and the model that has learned nothing, or check that a resumed run is the same.

    tokens: how many will be read. Nothing is deleted before the new model is made.
    """
    check_out(out, resume=resume, overwrite=overwrite)
    if resume and (out / PRETRAINED).is_file():
        raise WeLoreError(f"the run in {out} is finished (see {PRETRAINED}): there is nothing to resume")
    if resume and (out / START / WEIGHTS).is_file():
        begin(out, asked, resume=True)
        return
    tokenizer: PreTrainedTokenizerBase
    if asked["tokenizer"] is None:
        tokenizer = vocabulary(
            training_texts(asked["data"], tokens, TextOptions(cache_dir=cache_dir)), asked["vocabulary"]
        )
    else:
        tokenizer = known_tokenizer(asked["tokenizer"], cache_dir)
    model = fresh_model(size, tokenizer, length, asked["seed"])
    begin(out, asked, resume=resume)
    save_fresh(model, tokenizer, out / START)


def _probe(
    trainer: Any, at: int | None, out: Path, name: str, steps: list[int], items: int, tokens_per_step: int
) -> Probe:
    """The callback, and its trace: begun anew, or cut back to the checkpoint from which the training goes on."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    targets = find_targets(model)
    writer = None
    if trainer.args.process_index == 0:
        header = {"name": name, "fingerprint": fingerprint(model), "err": ERR, "ranks": list(RANKS)}
        writer = Writer(out / TRACE, header, {target.name: target.shape for target in targets}, at)
        missing = [step for step in steps if at is not None and step <= at and step not in writer.steps]
        if missing:
            raise WeLoreError(f"the trace in {out / TRACE} lacks step {missing[0]}: begin the run again (--overwrite)")
    start = out / START / WEIGHTS
    return Probe(trainer, writer, targets, steps, items=items, tokens_per_step=tokens_per_step, start=start)


def _record(out: Path, asked: dict[str, Any], label: str | None, tuned: Record, probe: Probe | None) -> Record:
    """What the trace says, and what it cost: the part of a resumed run that this process has seen."""
    trace, n = Trace.load(out / TRACE), tuned.numbers
    taken = n.get("tokens_per_second", 0.0)
    numbers = {
        "parameters": n["total_parameters"],
        "held_out_loss": [[int(s), float(x)] for s, x in zip(trace.steps, trace.held_out_loss, strict=True)],
        "tokens": int(trace.tokens[-1]),
        "tokens_per_second": taken,
        "peak_memory_bytes": n["peak_memory_bytes"],
        "trace_bytes": sum(path.stat().st_size for path in (out / TRACE).glob("*.*")),
        "probe_seconds": probe.seconds if probe else None,
        "probe_share": probe.seconds / n["seconds"] if probe else None,
        "work_bytes": probe.work_bytes if probe else None,
    }
    inputs = {"label": label, "model": str(out / TRAINING / MODEL)}
    inputs |= {name: tuned.inputs[name] for name in ("data_sha256", "split", "model_fingerprint")}
    return Record("pretrain", inputs, tuned.settings | asked, numbers | measured(trace))
