"""The verb `pretrain`: a text and a size -> a small Llama, trained from nothing, and the trace of its training.

OUT/run.json        the identity of the run; a resumed run must have the same
OUT/start/          the untrained model with its tokenizer
OUT/training/       the run directory of its training (training.run_dir); training/model is the result
OUT/trace/          the record of the way (emergence.trace)
OUT/pretrain.json   the record; written last: a finished run has it
"""

import dataclasses
import importlib.util
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from welore.config import Dataset, PretrainConfig, RunOptions, as_record, settings_of
from welore.data.packing import HELD_OUT, blocks_of_text, training_texts
from welore.data.text import TextOptions
from welore.emergence.claims import measured
from welore.emergence.init_model import init_model, make_tokenizer, save_model, size_of
from welore.emergence.probe import Probe, probed_steps
from welore.emergence.trace import ERR, RANKS, Trace, Writer, finish
from welore.errors import WeLoreError
from welore.io.context import RunContext
from welore.io.progress import silent
from welore.models.load import read_tokenizer
from welore.models.targets import find_targets
from welore.records import MODEL_FINGERPRINT, Record
from welore.training.arguments import FSDP, is_on, resolve_defaults
from welore.training.finetune import finetune
from welore.training.run_dir import MODEL, RUN, TUNED, begin, fingerprint, run_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START, TRAINING, TRACE, PRETRAINED = "start", "training", "trace", "pretrain.json"
WEIGHTS = "model.safetensors"


def pretrain(
    output_dir: str | Path,
    config: PretrainConfig | None = None,
    *,
    dataset: Dataset | None = None,
    resume: bool = False,
    label: str | None = None,
    **options: Unpack[RunOptions],
) -> Record:
    """Pre-train a small Llama and record how its weights and gradients become low rank.

    The held-out part of the text gives the loss and the two batches of `probe_items` sequences whose gradients are
    recorded. Defaults are the paper's steps and GaLore's schedule (WeLore, section 3); weight decay 0 is Adam.

    Args:
        output_dir: Where model, trace and record are written.
        config: The settings.
        dataset: The text, in place of config.dataset.
        resume: Continue after the last checkpoint. The trace is that of an uninterrupted run, byte for byte.
        label: A name for tables and figures.
        **options: See config.RunOptions.

    Returns:
        The record, as in pretrain.json.

    Raises:
        WeLoreError: The settings cannot work.
    """
    context = RunContext.create(**options)
    config = settings_of(PretrainConfig, config, dataset=dataset)
    if config.dataset is None:
        raise WeLoreError("name the text to learn from by dataset: c4, wikitext2, pydoc or a file")
    resolve_defaults(config.training(), context.device)
    processes = _processes(context)
    settings = as_record(config)
    identity = {name: settings[name] for name in ("tokenizer", "dataset", "seed", "probes", "probe_items")}
    identity |= {"size": asdict(size_of(config.size)), "vocab_size": None if config.tokenizer else config.vocab_size}
    overwrite = context.overwrite
    with run_directory(output_dir, config, resume=resume, overwrite=overwrite, record=PRETRAINED) as directory:
        if processes.is_main_process:
            _begin(directory, config, identity, context, processes=processes.num_processes, resume=resume)
        processes.wait_for_everyone()
        tuned, probe = _train(directory, config, context, resume=resume, label=label or config.size)
        processes.wait_for_everyone()
        record = _record(directory, identity, label, tuned, probe)
        record.inputs["model"] = str(Path(output_dir) / TRAINING / MODEL)
        if processes.is_main_process:
            finish(directory / TRACE)
            record.save(directory / PRETRAINED)
        processes.wait_for_everyone()
    return record


def _processes(context: RunContext) -> Any:
    """All processes of this run, as accelerate knows them; the Trainer will ask for the same."""
    if importlib.util.find_spec("accelerate") is None:
        raise WeLoreError("pretrain needs accelerate: pip install 'welore[train]'")
    if is_on(os.environ, FSDP):
        raise WeLoreError("pretrain reads whole gradients, which FSDP cuts: use torchrun, which is DDP")
    from accelerate import PartialState  # type: ignore[import-untyped]

    return PartialState(cpu=context.device.type == "cpu")


def _begin(
    directory: Path,
    config: PretrainConfig,
    identity: dict[str, Any],
    context: RunContext,
    *,
    processes: int,
    resume: bool,
) -> None:
    """Make the directory and the untrained model, or check that a resumed run is the same.

    Nothing is deleted before the new model is made.
    """
    if resume and (directory / START / WEIGHTS).is_file():
        begin(directory, identity, resume=True)
        return
    tokenizer: PreTrainedTokenizerBase
    blocks = config.max_steps * config.batch_size * config.gradient_accumulation_steps * processes
    options = TextOptions.of(config, context)
    if config.tokenizer is None:
        texts = training_texts(config.dataset, blocks * config.max_length, options)
        tokenizer = make_tokenizer(texts, config.vocab_size)
    else:
        tokenizer = read_tokenizer(config.tokenizer, context.cache_dir, trust_remote_code=context.trust_remote_code)
    _require_text(config, tokenizer, blocks, options)
    model = init_model(size_of(config.size), tokenizer, config.max_length, config.seed)
    begin(directory, identity, resume=resume)
    save_model(model, tokenizer, directory / START)


def _require_text(
    config: PretrainConfig, tokenizer: "PreTrainedTokenizerBase", blocks: int, options: TextOptions
) -> None:
    """Raise WeLoreError for a text too short for the batches of the probe; no more of it is read than that takes."""
    needed = 2 * config.probe_items
    tokens = min(blocks, HELD_OUT * needed) * config.max_length
    settings: dict[str, Any] = {"tokens": tokens, "eval_items": config.max_eval_samples, "options": options}
    held_out = len(blocks_of_text(config.dataset, tokenizer, config.max_length, **settings).evaluation)
    if held_out < needed:
        raise WeLoreError(
            f"{held_out} sequences are held out, the two batches of the probe need {needed}: take a longer text, a "
            "smaller max_length or fewer probe_items"
        )


def _train(
    directory: Path, config: PretrainConfig, context: RunContext, *, resume: bool, label: str
) -> tuple[Record, Probe | None]:
    """Train the model, or find it trained; the record of the training, and the probe, which has then not run."""
    run, probes = directory / TRAINING, []
    if resume and (run / TUNED).is_file():
        return Record.load(run / TUNED), None

    def probe(trainer: Any) -> Probe:
        probes.append(_probe(trainer, directory, config, context))
        return probes[-1]

    record = finetune(
        *(directory / START, run, config.training()),
        resume=resume and (run / RUN).is_file(),
        label=label,
        callbacks=[probe],
        **dataclasses.replace(context, overwrite=False).options,
    )
    return record, probes[0]


def _probe(trainer: Any, directory: Path, config: PretrainConfig, context: RunContext) -> Probe:
    """The callback; its trace begins anew, or is cut back to the checkpoint from which the training continues."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    targets = find_targets(model)
    steps, at = probed_steps(config.max_steps, config.probes), trainer.resumed_at
    writer = None
    if trainer.args.process_index == 0:
        name = f"{config.size}, seed {config.seed}"
        header = {"name": name, "fingerprint": fingerprint(model), "err": ERR, "ranks": list(RANKS)}
        writer = Writer(directory / TRACE, header, {target.name: target.shape for target in targets}, at)
        missing = [step for step in steps if at is not None and step <= at and step not in writer.steps]
        if missing:
            raise WeLoreError(f"the trace in {directory / TRACE} lacks step {missing[0]}: overwrite the run")
    start, quiet = directory / START / WEIGHTS, dataclasses.replace(context, progress=silent)
    return Probe(trainer, writer, targets, steps, items=config.probe_items, start=start, context=quiet)


def _record(directory: Path, identity: dict[str, Any], label: str | None, tuned: Record, probe: Probe | None) -> Record:
    """Numbers of the trace, and the cost of the part of the run that this process has seen."""
    trace, n = Trace.load(directory / TRACE), tuned.numbers
    numbers = {
        "parameters": n["total_parameters"],
        "held_out_loss": [[int(s), float(x)] for s, x in zip(trace.steps, trace.held_out_loss, strict=True)],
        "tokens": int(trace.tokens[-1]),
        "tokens_per_second": n.get("tokens_per_second", 0.0),
        "peak_memory_bytes": n["peak_memory_bytes"],
        "trace_bytes": sum(path.stat().st_size for path in (directory / TRACE).glob("*.*")),
        "probe_seconds": probe.seconds if probe else None,
        "probe_share": probe.seconds / n["seconds"] if probe else None,
        "work_bytes": probe.work_bytes if probe else None,
    }
    inputs = {"label": label, "model": str(directory / TRAINING / MODEL)}
    inputs |= {name: tuned.inputs[name] for name in ("data_sha256", "split", MODEL_FINGERPRINT)}
    return Record("pretrain", inputs, tuned.settings | identity, numbers | measured(trace))
