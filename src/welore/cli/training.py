"""The verbs that train a model: finetune, pretrain."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from welore.cli.from_config import OTHERS, Label, Model, OutputDir, Resume
from welore.cli.output import log, print_result, quiet_libraries
from welore.config import FinetuneConfig, PretrainConfig, RunConfig
from welore.errors import WeLoreError


def finetune(
    model: Model,
    output_dir: OutputDir,
    config: FinetuneConfig,
    run: RunConfig,
    context: typer.Context,
    as_json: bool,
    plan: Annotated[
        Path | None, typer.Option(help="Which matrices of a dense model count as low-rank.", rich_help_panel="Method")
    ] = None,
    resume: Resume = False,
    label: Label = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the memory of a step, and stop.", rich_help_panel="Memory")
    ] = False,
) -> None:
    """Fine-tune a checkpoint on a text or a task; any other field of TrainingArguments goes by its own name."""
    quiet_libraries()
    from welore.io._malloc import return_freed_memory
    from welore.training.finetune import finetune

    if (word := next((word for word in (model, str(output_dir)) if word.startswith("--")), None)) is not None:
        raise WeLoreError(f"{word} is in the place of MODEL or OUTPUT_DIR: give these first, without names")
    config = dataclasses.replace(config, training_arguments=_training_arguments(context.args, context.meta.get(OTHERS)))
    if dry_run:
        from welore.training.memory import estimate_step

        needed = estimate_step(model, config, plan=plan, **run.options)
        print_result(needed.to_dict(), as_json, str(needed))
        return
    if config.gradient_checkpointing:  # most activations are freed soon, between those that stay
        return_freed_memory(large=1 << 20)
    record = finetune(model, output_dir, config, plan=plan, resume=resume, label=label, **run.options)
    n = record.numbers
    if n.get("items_cut") or n.get("items_dropped"):
        log(
            f"{n['items_cut']} items were longer than {record.settings['max_length']} tokens: their prompts lost the "
            f"beginning, conversations the end; {n['items_dropped']} without an answer left were dropped"
        )
    teacher = f" (teacher {math.exp(min(n['teacher_eval_loss'], 700.0)):.4g})" if "teacher_eval_loss" in n else ""
    held_out = f"held-out perplexity {n['eval_perplexity']:.4g}{teacher}, " if "eval_perplexity" in n else ""
    line = (
        f"{config.method}: {n['trainable_parameters']:,} of {n['total_parameters']:,} parameters trained, {held_out}"
        f"{n.get('tokens_per_second', 0):.0f} tokens/s, {n['peak_memory_bytes'] / 1e9:.2f} GB -> {output_dir / 'model'}"
    )
    print_result(record, as_json, line)


def _training_arguments(words: Sequence[str], file: Mapping[str, Any] | None) -> dict[str, Any]:
    """Values of TrainingArguments from a file, and from `--name value`, `--name=value`, or `--name`, which is true."""
    from welore.training.arguments import training_argument

    given = {name: value for name, value in (file or {}).items() if value is not None}
    texts = {name: value if isinstance(value, str) else json.dumps(value, default=str) for name, value in given.items()}
    values = {name: training_argument(name, text) for name, text in texts.items()}
    rest = list(words)
    while rest:
        option, _, text = rest.pop(0).partition("=")
        if not option.startswith("--"):
            raise WeLoreError(f"finetune takes MODEL and OUTPUT_DIR; {option!r} belongs to no option")
        if not text:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        name = option.removeprefix("--").replace("-", "_")
        values[name] = training_argument(name, text)
    return values


def pretrain(
    output_dir: OutputDir,
    config: PretrainConfig,
    run: RunConfig,
    as_json: bool,
    resume: Resume = False,
    label: Label = None,
) -> None:
    """Pre-train a small Llama and record how its weights and gradients become low rank."""
    quiet_libraries()
    if config.dataset is None:
        raise WeLoreError("name the text to learn from: --dataset c4, wikitext2, pydoc or a file")
    from welore.emergence.pretrain import pretrain

    record = pretrain(output_dir, config, resume=resume, label=label, **run.options)
    n = record.numbers
    share = f", {n['probe_share']:.0%} of the time for the trace" if n["probe_share"] is not None else ""
    line = (
        f"{n['parameters']:,} parameters, {n['tokens']:,} tokens, held-out loss {n['held_out_loss'][0][1]:.3f} -> "
        f"{n['held_out_loss'][-1][1]:.3f}{share}; at ERR {n['rank_reduction']:.1%}, parameters "
        f"{n['parameter_ratio']:.1%}, {n['lrcs']} of {len(n['matrices'])} matrices are LRCs -> {output_dir}"
    )
    print_result(record, as_json, line)
