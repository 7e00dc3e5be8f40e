"""The verbs that run or train a model: evaluate, finetune, score, pretrain."""

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from welore.cli.options import (
    Accumulation,
    AsJson,
    CacheDir,
    Device,
    GradientCheckpointing,
    Label,
    LearningRate,
    MaxGradNorm,
    Model,
    Optimizer,
    Out,
    Overwrite,
    ReadDtype,
    ReportTo,
    Resume,
    Revision,
    TaskData,
    TaskName,
    WarmUp,
)
from welore.cli.terminal import device_of, leads, plain, progress_bars, say, silence_bitsandbytes, tell
from welore.config import EvaluationConfig, RunOptions, ScoreConfig
from welore.errors import WeLoreError

if TYPE_CHECKING:
    from welore.records import Record


def evaluate(
    model: Model,
    data: Annotated[
        str | None,
        typer.Option(help="wikitext2, c4, pydoc, or a local .txt, .jsonl or .parquet file.  [default: wikitext2]"),
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a window.  [default: 2048]")] = None,
    windows: Annotated[int | None, typer.Option(help="Only the first windows.  [default: the whole text]")] = None,
    lm_eval: Annotated[
        str | None, typer.Option(help="In place of a text: tasks of lm-eval, with commas between: boolq,piqa.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first questions of each of these tasks.")] = None,
    tasks_dir: Annotated[
        Path | None, typer.Option(help="Where these tasks are defined (.yaml), in place of lm-eval's own.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows read at once; does not change the result.")] = 1,
    dtype: ReadDtype = "auto",
    label: Label = None,
    cache_dir: CacheDir = None,
    revision: Revision = None,
    device: Device = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Record to write (NAME.ppl.json).", dir_okay=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Perplexity of any checkpoint, or what it reaches on tasks of lm-eval -> record."""
    from welore.evaluation.lm_eval import evaluate_tasks
    from welore.evaluation.perplexity import evaluate
    from welore.io.atomic import require_writable

    if lm_eval is None and (limit, tasks_dir) != (None, None):
        raise WeLoreError("--limit and --tasks-dir go with --lm-eval; of a text, --windows are read")
    if lm_eval is not None and data is not None:
        raise WeLoreError("give --data or --lm-eval, not both: a text or tasks")
    if lm_eval is not None and (length, windows) != (None, None):
        raise WeLoreError("--length and --windows go with --data; of a task, --limit questions are read")
    if output is not None:
        require_writable(output)
    run: RunOptions = {"device": device_of(device) or "auto", "cache_dir": cache_dir, "revision": revision}
    with progress_bars() as progress:
        run["progress"] = progress if sys.stderr.isatty() else False
        if lm_eval is not None:
            names = [name.strip() for name in lm_eval.split(",") if name.strip()]
            record = evaluate_tasks(
                model, names, tasks_dir=tasks_dir, limit=limit, batch_size=batch_size, dtype=dtype, label=label, **run
            )
        else:
            text: dict[str, Any] = {"dataset": data or "wikitext2", "max_length": 2048 if length is None else length}
            config = EvaluationConfig(**text, num_windows=windows, batch_size=batch_size, dtype=dtype)  # type: ignore[arg-type]
            record = evaluate(model, config, label=label, **run)
    if output is not None:
        record.save(output)
    line = _measured(record) if output is None else f"{_measured(record)} -> {output}"
    tell(plain(record), as_json, line)


def finetune(
    model: Model,
    out: Out,
    method: Annotated[
        str, typer.Option(help="What is trained: lrc (the factors), nlrc (the dense matrices), full, lora, galore.")
    ] = "lrc",
    data: Annotated[
        str | None,
        typer.Option(
            help="A text: c4, wikitext2, pydoc, a .txt, .jsonl or .parquet file; self: the teacher writes it; "
            "a .safetensors file of windows, such as written.safetensors of such a run: the same again."
        ),
    ] = None,
    task: TaskName = None,
    task_data: TaskData = None,
    plan: Annotated[Path | None, typer.Option(help="Which matrices of a dense model count as low-rank.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.  [default: 10000; 1000 for a task]")] = None,
    lr: LearningRate = 5e-5,
    warmup: WarmUp = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences of a process.  [default: 4; 8 for a task]")] = None,
    accumulation: Accumulation = 1,
    length: Annotated[int | None, typer.Option(help="Tokens of a sequence.  [default: 1024; 512 for a task]")] = None,
    seed: Annotated[int, typer.Option(help="Order of the data, and where something is drawn.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="float32 or bfloat16 (what is trained stays float32); auto: bfloat16 on a GPU.")
    ] = "auto",
    save_dtype: Annotated[str | None, typer.Option(help="Of the result.  [default: that of the computation]")] = None,
    attention: Annotated[
        str | None, typer.Option(help="sdpa, eager, flash_attention_2, ...  [default: what transformers chooses]")
    ] = None,
    train_norms: Annotated[bool, typer.Option("--train-norms", help="Train the norms, too (lrc, nlrc).")] = False,
    loss_on_prompt: Annotated[bool, typer.Option("--loss-on-prompt", help="Learn the questions, too.")] = False,
    rank: Annotated[int | None, typer.Option(help="Of lora and galore.  [default: 8; 128]")] = None,
    optimizer: Optimizer = "adamw_torch_fused",
    weight_decay: Annotated[float, typer.Option(help="AdamW's; at 0 it is Adam.")] = 0.0,
    max_grad_norm: MaxGradNorm = 1.0,
    gradient_checkpointing: GradientCheckpointing = False,
    selective_checkpointing: Annotated[
        bool, typer.Option("--selective-checkpointing", help="Remember wide matrix products only; the same losses.")
    ] = False,
    whole_logits: Annotated[
        bool, typer.Option("--whole-logits", help="Compute the loss from all logits at once: more memory.")
    ] = False,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations on held-out data; 0: never.")] = 500,
    eval_items: Annotated[int, typer.Option(help="Held-out sequences to evaluate on.")] = 64,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints; 0: none.")] = 500,
    distill: Annotated[
        str | None,
        typer.Option(help="A teacher to imitate: the dense model from which MODEL was made.", metavar="TEACHER"),
    ] = None,
    distill_weight: Annotated[
        float | None, typer.Option(help="The teacher's share of the loss; the rest is the text's.  [default: 1]")
    ] = None,
    distill_temperature: Annotated[float | None, typer.Option(help="Of both models.  [default: 1]")] = None,
    self_tokens: Annotated[
        int | None, typer.Option(help="Tokens that the teacher writes for --data self.  [default: all that are read]")
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    report_to: ReportTo = "none",
    label: Label = None,
    cache_dir: CacheDir = None,
    revision: Revision = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a checkpoint on a text or a task -> run directory: record, checkpoints, model."""
    settings = dict(locals())
    as_json = settings.pop("as_json")
    silence_bitsandbytes()
    from welore.training.activations import return_large_blocks
    from welore.training.finetune import finetune

    if gradient_checkpointing:
        return_large_blocks()
    with progress_bars() as progress:
        record = finetune(**settings | {"device": device_of(device)}, progress=progress)
    n = record.numbers
    if n.get("prompts_cut") and leads():
        length = record.settings["max_length"]
        say(f"{n['prompts_cut']} prompts were longer than {length} tokens and lost their beginning")
    beside = f" (teacher {math.exp(min(n['teacher_eval_loss'], 700.0)):.4g})" if "teacher_eval_loss" in n else ""
    found = f"held-out perplexity {n['eval_perplexity']:.4g}{beside}, " if "eval_perplexity" in n else ""
    line = (
        f"{method}: {n['trainable_parameters']:,} of {n['total_parameters']:,} parameters trained, {found}"
        f"{n.get('tokens_per_second', 0):.0f} tokens/s, {n['peak_memory_bytes'] / 1e9:.2f} GB -> {out / 'model'}"
    )
    tell(plain(record), as_json, line)


def score(
    model: Model,
    task: TaskName = None,
    data: TaskData = None,
    limit: Annotated[int | None, typer.Option(help="Only the first questions.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered at once.")] = 8,
    dtype: ReadDtype = "auto",
    label: Label = None,
    cache_dir: CacheDir = None,
    revision: Revision = None,
    device: Device = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Record to write (NAME.score.json).", dir_okay=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Accuracy on a task's evaluation part -> record with every prompt, output and extracted answer."""
    from welore.evaluation.accuracy import score
    from welore.io.atomic import require_writable

    if output is not None:
        require_writable(output)
    if task is None:
        raise WeLoreError("name the task: --task commonsense_qa, svamp, boolq, coin_flip, object_tracking, strategy_qa")
    with progress_bars() as progress:
        run: RunOptions = {"device": device_of(device) or "auto", "cache_dir": cache_dir, "revision": revision}
        run["progress"] = progress
        config = ScoreConfig(task, data, limit, batch_size, dtype)  # type: ignore[arg-type]
        record = score(model, config, label=label, **run)
    if output is not None:
        record.save(output)
    n = record.numbers
    if n["truncated"]:
        say(f"{n['truncated']} prompts were longer than the model's context and lost their beginning")
    line = (
        f"accuracy {n['accuracy']:.1%} on {task} (n = {n['n']}, 95 % interval {n['ci95_low']:.1%} to "
        f"{n['ci95_high']:.1%}; always the most frequent answer: {n['majority_rate']:.1%}; {n['unparsable']} without "
        f"an answer); ERR {n['rank_reduction']:.1%}, parameters {n['parameter_ratio']:.1%}, {n['bytes'] / 1e6:.1f} MB"
    )
    tell(plain(record), as_json, line if output is None else f"{line} -> {output}")


def pretrain(
    out: Out,
    data: Annotated[
        str | None, typer.Option(help="A text: c4, wikitext2, pydoc, or a .txt, .jsonl or .parquet file.")
    ] = None,
    size: Annotated[
        str,
        typer.Option(help="2m, 9m, 20m, 60m, 130m, 350m, 1b, 7b, or HIDDEN/LAYERS/HEADS/INTERMEDIATE."),
    ] = "9m",
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 25_000,
    tokenizer: Annotated[
        str | None, typer.Option(help="Of a hub model or directory.  [default: a BPE made from the text]")
    ] = None,
    vocabulary: Annotated[int, typer.Option(help="Tokens of that BPE.")] = 32_000,
    lr: LearningRate = 1e-3,
    warmup: WarmUp = None,
    batch_size: Annotated[int, typer.Option(help="Sequences of a process.")] = 32,
    accumulation: Accumulation = 1,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the weights and of the order of the data.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16 (weights stay float32); auto: bfloat16 on a GPU.")] = (
        "auto"
    ),
    optimizer: Optimizer = "adamw_torch_fused",
    weight_decay: Annotated[float, typer.Option(help="AdamW's; at 0 it is Adam, the paper's.")] = 0.0,
    max_grad_norm: MaxGradNorm = 1.0,
    gradient_checkpointing: GradientCheckpointing = False,
    probes: Annotated[int, typer.Option(help="Checkpoints of the trace, the first and the last step among them.")] = 30,
    probe_items: Annotated[int, typer.Option(help="Held-out sequences in each of the two fixed batches.")] = 32,
    eval_items: Annotated[int, typer.Option(help="Held-out sequences for the loss, those two among them.")] = 128,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints to resume from; 0: none.")] = 500,
    resume: Resume = False,
    overwrite: Overwrite = False,
    report_to: ReportTo = "none",
    label: Label = None,
    cache_dir: CacheDir = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Pre-train a small Llama and record how its weights and gradients become low rank -> trace, record, model."""
    settings = dict(locals())
    as_json = settings.pop("as_json")
    if data is None:
        raise WeLoreError("name the text to learn from: --data c4, wikitext2, pydoc or a file")
    from welore.emergence.pretrain import pretrain

    with progress_bars() as progress:
        record = pretrain(**settings | {"device": device_of(device)}, progress=progress)
    n = record.numbers
    share = f", {n['probe_share']:.0%} of the time for the trace" if n["probe_share"] is not None else ""
    line = (
        f"{n['parameters']:,} parameters, {n['tokens']:,} tokens, held-out loss {n['held_out_loss'][0][1]:.3f} -> "
        f"{n['held_out_loss'][-1][1]:.3f}{share}; at ERR {n['rank_reduction']:.1%}, parameters "
        f"{n['parameter_ratio']:.1%}, {n['lrcs']} of {len(n['matrices'])} matrices are LRCs -> {out}"
    )
    tell(plain(record), as_json, line)


def _measured(record: "Record") -> str:
    """A line of a perplexity record; of a record of tasks a line for each."""
    n = record.numbers
    if record.kind == "lm_eval":
        return "\n".join(
            f"{name}: {', '.join(f'{m} {v:.4g}' for m, v in task['metrics'].items() if v is not None)} (n {task['n']})"
            for name, task in n["tasks"].items()
        )
    return (
        f"perplexity {n['perplexity']:.4g} on {record.settings['dataset']} ({n['tokens']:,} tokens); "
        f"ERR {n['rank_reduction']:.1%}, parameters {n['parameter_ratio']:.1%} of the targeted matrices, "
        f"{n['bytes'] / 1e6:.1f} MB"
    )
