"""The command line: parse, call one function, save one artefact, print one line. The only module that prints."""

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from welore.errors import WeLoreError

if TYPE_CHECKING:
    from welore.records import Record

app = typer.Typer(
    name="welore",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(metadata.version("welore"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Compress any Hugging Face decoder by non-uniform low rank, and load it anywhere transformers does."""


Model = Annotated[str, typer.Argument(help="Hub id, local directory or .gguf file.", show_default=False)]
Out = Annotated[Path, typer.Argument(help="Directory to write.", show_default=False)]
Output = Annotated[Path, typer.Option("--output", "-o", help="File to write.", show_default=False, dir_okay=False)]
Include = Annotated[list[str] | None, typer.Option(help="Target only modules that match: q_proj, 'layers.*.mlp'.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Leave modules that match dense.")]
CacheDir = Annotated[Path | None, typer.Option(help="Where downloads and converted .gguf files are kept.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Workers = Annotated[int | None, typer.Option(help="Matrices in work at once. [default: one per core]")]
Device = Annotated[
    str | None, typer.Option(help="Where to compute: cpu, cuda, cuda:1. [default: a GPU if there is one]")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing result.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the whole record as JSON.")]
RankReduction = Annotated[float | None, typer.Option(help="Target: effective rank reduction (ERR), 0..1.")]
Params = Annotated[float | None, typer.Option(help="Target: parameters kept in the targeted matrices, 0..1.")]
Threshold = Annotated[float | None, typer.Option(help="Target: the threshold on normalised singular values itself.")]
StrategyName = Annotated[
    str | None,
    typer.Option(
        help="How values are compared across matrices: welore, uniform, owl, energy, waterfill. "
        "[default: waterfill; welore where nothing is scaled]"
    ),
]
ScalingName = Annotated[
    str | None,
    typer.Option(
        help="What is cut: none (the weights), or scaled by a calibration: asvd, input, kfac. "
        "[default: kfac for --params alone, else none]"
    ),
]
StorageName = Annotated[
    str | None,
    typer.Option(
        help="How low-rank matrices are stored: factored, pivoted (smaller), auto (the smaller). "
        "[default: auto; factored where nothing is scaled]"
    ),
]
MinRatio = Annotated[
    str | None,
    typer.Option(
        help="Factor a matrix iff it loses more than this share of its rank; or 'break-even': iff factors are smaller. "
        "[default: 0.5 for welore, break-even for waterfill, else 0]"
    ),
]
RankMultiple = Annotated[int, typer.Option(help="Make ranks multiples of this; 16 suits most kernels.")]
AllowGrowth = Annotated[bool, typer.Option("--allow-growth", help="Also factor matrices that become larger by it.")]
TaskName = Annotated[
    str | None, typer.Option(help="commonsense_qa, svamp, boolq, coin_flip, object_tracking or strategy_qa.")
]
ShardSize = Annotated[str, typer.Option(help="Largest size of one weight file.")]


@app.command(epilog="Example: `welore analyze HuggingFaceTB/SmolLM2-135M -o spectra.safetensors`")
def analyze(
    model: Model,
    output: Output,
    scaling: Annotated[str, typer.Option(help="Values of what: none (the weights), asvd, input, kfac.")] = "none",
    calibration: Annotated[
        Path | None, typer.Option(help="File made by `welore calibrate`: for a scaling, and for strategy owl.")
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    cache_dir: CacheDir = None,
    revision: Revision = None,
    device: Device = None,
    workers: Workers = None,
    reference_values: Annotated[
        Path | None, typer.Option(help="Take the values from this .pt file of the reference scripts instead.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Singular values of every targeted matrix -> spectra file."""
    from welore.analysis import analyze
    from welore.parallel import return_freed_memory
    from welore.reference import import_singular_values

    return_freed_memory()
    common: dict[str, Any] = {
        "include": include or (),
        "exclude": exclude or (),
        "cache_dir": cache_dir,
        "revision": revision,
    }
    if reference_values is not None:
        if scaling != "none" or calibration:
            raise WeLoreError("--reference-values are those of the weights: leave --scaling and --calibration out")
        spectra = import_singular_values(reference_values, model, **common)
    else:
        with _progress() as progress:
            spectra = analyze(
                model,
                scaling=scaling,
                calibration=calibration,
                device=_device(device),
                workers=workers,
                work_dir=output.with_name(output.name + ".work"),
                progress=progress,
                **common,
            )
    if _leads():
        spectra.save(output)
    facts = {
        "model": spectra.model.name,
        "fingerprint": spectra.model.fingerprint,
        "scaling": spectra.scaling,
        "matrices": len(spectra.values),
        "values": sum(map(len, spectra.values.values())),
        "output": str(output),
    }
    _tell(facts, as_json, f"{facts['values']:,} singular values of {facts['matrices']} matrices -> {output}")


@app.command(epilog="Example: `welore calibrate HuggingFaceTB/SmolLM2-135M --data self -o calibration.safetensors`")
def calibrate(
    model: Model,
    output: Output,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="self (the model writes), or texts with weights: wikitext2:1,pydoc:1,my.txt:2.  [default: self]"
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to read, rounded up to whole windows.")] = 65536,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a window.  [default: 512, or what the model reads]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws windows, what the model writes, and labels.")] = 0,
    temperature: Annotated[float, typer.Option(help="Of what the model writes.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="The model writes one of the k likeliest tokens; 0: any.")] = 0,
    top_p: Annotated[float, typer.Option(help="The model writes the likeliest tokens up to this sum.")] = 1.0,
    first: Annotated[str, typer.Option(help="What the model's texts begin with: vocabulary, word, nothing, chat.")] = (
        "vocabulary"
    ),
    batch_size: Annotated[int, typer.Option(help="Windows in work at once.")] = 4,
    measure: Annotated[
        float, typer.Option(help="Share of the windows on which the loss of every cut is measured; 0: none.")
    ] = 0.25,
    dtype: Annotated[str, typer.Option(help="Of the computation: float32, bfloat16, float16 or auto.")] = "float32",
    include: Include = None,
    exclude: Exclude = None,
    cache_dir: CacheDir = None,
    revision: Revision = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Second moments of inputs and output gradients of every targeted matrix -> calibration file."""
    from welore.calibration.collection import calibrate
    from welore.parallel import team

    if team().size > 1:
        raise WeLoreError("calibrate works in one process: start it without torchrun or accelerate")
    with _progress() as progress:
        found = calibrate(
            model,
            data or ["self"],
            output,
            tokens=tokens,
            length=length,
            seed=seed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            first=first,
            batch_size=batch_size,
            measure=measure,
            dtype=dtype,
            include=include or (),
            exclude=exclude or (),
            cache_dir=cache_dir,
            revision=revision,
            device=_device(device),
            progress=progress,
        )
    n = found.record.numbers
    if n["never_reached"]:
        _say(f"{n['never_reached']} of {n['matrices']} matrices were reached by no token: their statistics are zero")
    line = f"second moments of {n['matrices']} matrices over {n['tokens']:,} tokens -> {output}"
    _tell(_plain(found.record), as_json, line)


@app.command(epilog="Example: `welore allocate spectra.safetensors --rank-reduction 0.3 -o plan.json`")
def allocate(
    spectra: Annotated[Path, typer.Argument(help="File made by `welore analyze`.", show_default=False)],
    output: Output,
    rank_reduction: RankReduction = None,
    params: Params = None,
    threshold: Threshold = None,
    strategy: StrategyName = None,
    storage: StorageName = None,
    min_ratio: MinRatio = None,
    allow_growth: AllowGrowth = False,
    rank_multiple: RankMultiple = 1,
    as_json: AsJson = False,
) -> None:
    """Spectra and a target -> the rank of every matrix, plan.json."""
    from welore.plan import allocate
    from welore.spectra import Spectra

    plan = allocate(
        Spectra.load(spectra),
        rank_reduction=rank_reduction,
        params=params,
        threshold=threshold,
        strategy=strategy,
        storage=storage,
        min_ratio=_ratio(min_ratio),
        allow_growth=allow_growth,
        rank_multiple=rank_multiple,
    )
    plan.save(output)
    numbers = plan.numbers()
    _tell(numbers | {"asked": dict(plan.asked)}, as_json, f"{_achieved(plan.asked, numbers)} -> {output}")


@app.command(epilog="Example: `welore compress HuggingFaceTB/SmolLM2-135M small --params 0.8`")
def compress(
    model: Model,
    out: Out,
    plan: Annotated[Path | None, typer.Option(help="A plan made by `welore allocate`, in place of a target.")] = None,
    rank_reduction: RankReduction = None,
    params: Params = None,
    threshold: Threshold = None,
    strategy: StrategyName = None,
    scaling: ScalingName = None,
    storage: StorageName = None,
    min_ratio: MinRatio = None,
    allow_growth: AllowGrowth = False,
    rank_multiple: RankMultiple = 1,
    paper: Annotated[
        bool,
        typer.Option("--paper", help="WeLore as published: strategy welore, scaling none, storage factored."),
    ] = False,
    calibration: Annotated[
        str, typer.Option(help="File made by `welore calibrate`; self: text that the model writes, no data.")
    ] = "self",
    tokens: Annotated[int, typer.Option(help="Of that text, and of texts to heal on.")] = 65536,
    seed: Annotated[int, typer.Option(help="Of the texts and their order.")] = 0,
    heal: Annotated[
        str | None,
        typer.Option(
            help="Text on which the factors then learn from the dense model: self, what the model wrote to be cut by; "
            "texts as in calibrate; or none.  [default: self for --params alone]"
        ),
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    cache_dir: CacheDir = None,
    revision: Revision = None,
    device: Device = None,
    workers: Workers = None,
    max_shard_size: ShardSize = "5GB",
    overwrite: Overwrite = False,
    reference_checkpoint: Annotated[
        Path | None, typer.Option(help="Take weights and factors from this state dict of the reference scripts.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Analyze, allocate and factor -> a Hugging Face directory that loads with from_pretrained."""
    from welore.checkpoint import compress
    from welore.parallel import return_freed_memory
    from welore.plan import Plan
    from welore.reference import import_checkpoint

    _silence_bitsandbytes()
    return_freed_memory()
    common: dict[str, Any] = {
        "cache_dir": cache_dir,
        "revision": revision,
        "max_shard_size": max_shard_size,
        "overwrite": overwrite,
    }
    with _progress() as progress:
        if reference_checkpoint is not None:
            if (plan, rank_reduction, params, threshold) != (None, None, None, None):
                raise WeLoreError("give --reference-checkpoint or a plan or target, not both: it has its own ranks")
            record = import_checkpoint(reference_checkpoint, model, out, progress=progress, **common)
        else:
            record = compress(
                model,
                out,
                plan=None if plan is None else Plan.load(plan),
                rank_reduction=rank_reduction,
                params=params,
                threshold=threshold,
                strategy=strategy,
                scaling=scaling,
                storage=storage,
                min_ratio=_ratio(min_ratio),
                allow_growth=allow_growth,
                rank_multiple=rank_multiple,
                paper=paper,
                calibration=calibration,
                tokens=tokens,
                seed=seed,
                heal=heal,
                include=include or (),
                exclude=exclude or (),
                device=_device(device),
                workers=workers,
                progress=progress,
                **common,
            )
    numbers = record.numbers
    if numbers.get("left_dense_in_blocks"):
        _say(
            f"left dense inside the blocks: {numbers['left_dense_in_blocks'] / 1e6:.1f} M parameters "
            f"({', '.join(numbers['left_dense_names'])})"
        )
    if "held_out_loss" in numbers:
        losses = {name: math.exp(min(loss, 700.0)) for name, loss in numbers["held_out_loss"].items()}
        _say(
            f"healed on {numbers['healing_tokens']:,} tokens: held-out perplexity {losses['cut']:.4g} -> "
            f"{losses['healed']:.4g} (dense {losses['dense']:.4g})" + ("" if numbers["healed"] else "; kept as cut")
        )
    elif record.settings.get("healing"):
        _say(f"kept as cut, healing failed: {record.settings['healing']['failed']}")
    line = f"{_achieved(record.settings['asked'], numbers)}, {numbers['bytes'] / 1e6:.1f} MB -> {out}"
    _tell(_plain(record), as_json, line)


@app.command(epilog="Example: `welore merge small dense-again`")
def merge(
    model: Model,
    out: Out,
    cache_dir: CacheDir = None,
    revision: Revision = None,
    max_shard_size: ShardSize = "5GB",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """A compressed checkpoint -> a dense one, W = A B, that needs nothing of ours."""
    from welore.merging import merge

    with _progress() as progress:
        merge(
            model,
            out,
            cache_dir=cache_dir,
            revision=revision,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            progress=progress,
        )
    _tell({"output": str(out)}, as_json, f"dense checkpoint -> {out}")


@app.command(epilog="Example: `welore evaluate small --data pydoc --length 512 --windows 16`")
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
    dtype: Annotated[str, typer.Option(help="auto (that of the checkpoint), float32, float16 or bfloat16.")] = "auto",
    label: Annotated[str | None, typer.Option(help="A name for tables and figures.")] = None,
    cache_dir: CacheDir = None,
    revision: Revision = None,
    device: Device = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Record to write (NAME.ppl.json).", dir_okay=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Perplexity of any checkpoint, or what it reaches on tasks of lm-eval -> record."""
    from welore.files import refuse_unwritable
    from welore.harness import evaluate_tasks
    from welore.perplexity import evaluate

    if lm_eval is None and (limit, tasks_dir) != (None, None):
        raise WeLoreError("--limit and --tasks-dir go with --lm-eval; of a text, --windows are read")
    if lm_eval is not None and data is not None:
        raise WeLoreError("give --data or --lm-eval, not both: a text or tasks")
    if lm_eval is not None and (length, windows) != (None, None):
        raise WeLoreError("--length and --windows go with --data; of a task, --limit questions are read")
    if output is not None:
        refuse_unwritable(output)
    common: dict[str, Any] = {
        "batch_size": batch_size,
        "dtype": dtype,
        "device": _device(device),
        "label": label,
        "cache_dir": cache_dir,
        "revision": revision,
    }
    with _progress() as progress:
        if lm_eval is not None:
            names = [name.strip() for name in lm_eval.split(",") if name.strip()]
            quiet = not sys.stderr.isatty()
            record = evaluate_tasks(model, names, tasks_dir=tasks_dir, limit=limit, quiet=quiet, **common)
        else:
            data, length = data or "wikitext2", 2048 if length is None else length
            record = evaluate(model, data, length=length, limit=windows, progress=progress, **common)
    if output is not None:
        record.save(output)
    line = _measured(record) if output is None else f"{_measured(record)} -> {output}"
    _tell(_plain(record), as_json, line)


def _measured(record: "Record") -> str:
    """A line of a perplexity record; of a record of tasks a line for each."""
    n = record.numbers
    if record.kind == "lm_eval":
        return "\n".join(
            f"{name}: {', '.join(f'{m} {v:.4g}' for m, v in task['metrics'].items() if v is not None)} (n {task['n']})"
            for name, task in n["tasks"].items()
        )
    return (
        f"perplexity {n['perplexity']:.4g} on {record.settings['data']} ({n['tokens']:,} tokens); "
        f"ERR {n['rank_reduction']:.1%}, parameters {n['parameter_ratio']:.1%} of the targeted matrices, "
        f"{n['bytes'] / 1e6:.1f} MB"
    )


@app.command(epilog="Example: `welore report runs/ -o report`")
def report(
    directories: Annotated[list[Path], typer.Argument(help="Where to look for records.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Every record under the directories -> one HTML page and its figures."""
    from welore.page import report

    page = report(directories, output)
    _tell({"output": str(page)}, as_json, f"report -> {page}")


@app.command(epilog="Example: `welore demo`")
def demo(
    out: Annotated[Path, typer.Argument(help="Directory for everything the demo makes.")] = Path("demo"),
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """The whole pipeline on a real 135M model: analyze, allocate, compress, load back, evaluate, fine-tune, report."""
    from welore.embedded import demo

    with _progress() as progress:
        results = demo(out, cache_dir=cache_dir, tell=_say, progress=progress)
    if not as_json:
        Console().print(_table(results.records))
        for sentence in results.findings:
            print(sentence)
    _tell(
        {"output": str(results.page), "records": [_plain(r) for r in results.records]},
        as_json,
        f"report -> {results.page}",
    )


@app.command(epilog="Example: `welore finetune small tuned --data pydoc --steps 100 --length 256`")
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
            "written.safetensors of such a run: the same again."
        ),
    ] = None,
    task: TaskName = None,
    task_data: Annotated[
        str | None, typer.Option(help="The task's original file, or 'generated'.  [default: the hub's data set]")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Which matrices of a dense model count as low-rank.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.  [default: 10000; 1000 for a task]")] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate; a cosine brings it down to a tenth.")] = 5e-5,
    warmup: Annotated[int | None, typer.Option(help="Steps up to the peak.  [default: one in twenty]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences of a process.  [default: 4; 8 for a task]")] = None,
    accumulation: Annotated[int, typer.Option(help="Batches added up to one step.")] = 1,
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
    optimizer: Annotated[str, typer.Option(help="Any optimiser of transformers' Trainer.")] = "adamw_torch_fused",
    weight_decay: Annotated[float, typer.Option(help="AdamW's; at 0 it is Adam.")] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are clipped to this norm; 0: not at all.")] = 1.0,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute twice, remember less; the same losses.")
    ] = False,
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
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last checkpoint in OUT.")] = False,
    overwrite: Overwrite = False,
    report_to: Annotated[str, typer.Option(help="none, tensorboard, trackio or wandb.")] = "none",
    label: Annotated[str | None, typer.Option(help="A name for tables and figures.")] = None,
    cache_dir: CacheDir = None,
    revision: Revision = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a checkpoint on a text or a task -> run directory: record, checkpoints, model."""
    settings = dict(locals())
    as_json = settings.pop("as_json")
    _silence_bitsandbytes()
    from welore.tuning import finetune
    from welore.tuning.activations import return_large_blocks

    if gradient_checkpointing:
        return_large_blocks()
    with _progress() as progress:
        record = finetune(**settings | {"device": _device(device)}, progress=progress)
    n = record.numbers
    if n.get("prompts_cut") and _leads():
        _say(f"{n['prompts_cut']} prompts were longer than {record.settings['length']} tokens and lost their beginning")
    beside = f" (teacher {math.exp(min(n['teacher_eval_loss'], 700.0)):.4g})" if "teacher_eval_loss" in n else ""
    found = f"held-out perplexity {n['eval_perplexity']:.4g}{beside}, " if "eval_perplexity" in n else ""
    line = (
        f"{method}: {n['trainable_parameters']:,} of {n['total_parameters']:,} parameters trained, {found}"
        f"{n.get('tokens_per_second', 0):.0f} tokens/s, {n['peak_memory_bytes'] / 1e9:.2f} GB -> {out / 'model'}"
    )
    _tell(_plain(record), as_json, line)


@app.command(epilog="Example: `welore pretrain study --size 2m --vocabulary 4096 --data wikitext2 --steps 1500`")
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
    lr: Annotated[float, typer.Option(help="Peak learning rate; a cosine brings it down to a tenth.")] = 1e-3,
    warmup: Annotated[int | None, typer.Option(help="Steps up to the peak.  [default: one in twenty]")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences of a process.")] = 32,
    accumulation: Annotated[int, typer.Option(help="Batches added up to one step.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the weights and of the order of the data.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16 (weights stay float32); auto: bfloat16 on a GPU.")] = (
        "auto"
    ),
    optimizer: Annotated[str, typer.Option(help="Any optimiser of transformers' Trainer.")] = "adamw_torch_fused",
    weight_decay: Annotated[float, typer.Option(help="AdamW's; at 0 it is Adam, the paper's.")] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are clipped to this norm; 0: not at all.")] = 1.0,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute twice, remember less; the same losses.")
    ] = False,
    probes: Annotated[int, typer.Option(help="Checkpoints of the trace, the first and the last step among them.")] = 30,
    probe_items: Annotated[int, typer.Option(help="Held-out sequences in each of the two fixed batches.")] = 32,
    eval_items: Annotated[int, typer.Option(help="Held-out sequences for the loss, those two among them.")] = 128,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints to resume from; 0: none.")] = 500,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last checkpoint in OUT.")] = False,
    overwrite: Overwrite = False,
    report_to: Annotated[str, typer.Option(help="none, tensorboard, trackio or wandb.")] = "none",
    label: Annotated[str | None, typer.Option(help="A name for tables and figures.")] = None,
    cache_dir: CacheDir = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Pre-train a small Llama and record how its weights and gradients become low rank -> trace, record, model."""
    settings = dict(locals())
    as_json = settings.pop("as_json")
    if data is None:
        raise WeLoreError("name the text to learn from: --data c4, wikitext2, pydoc or a file")
    from welore.study.emergence import pretrain

    with _progress() as progress:
        record = pretrain(**settings | {"device": _device(device)}, progress=progress)
    n = record.numbers
    share = f", {n['probe_share']:.0%} of the time for the trace" if n["probe_share"] is not None else ""
    line = (
        f"{n['parameters']:,} parameters, {n['tokens']:,} tokens, held-out loss {n['held_out_loss'][0][1]:.3f} -> "
        f"{n['held_out_loss'][-1][1]:.3f}{share}; at ERR {n['rank_reduction']:.1%}, parameters "
        f"{n['parameter_ratio']:.1%}, {n['lrcs']} of {len(n['matrices'])} matrices are LRCs -> {out}"
    )
    _tell(_plain(record), as_json, line)


@app.command(epilog="Example: `welore score tuned/model --task coin_flip --data generated`")
def score(
    model: Model,
    task: TaskName = None,
    data: Annotated[
        str | None, typer.Option(help="The task's original file, or 'generated'.  [default: the hub's data set]")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first questions.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered at once.")] = 8,
    dtype: Annotated[str, typer.Option(help="auto (that of the checkpoint), float32, float16 or bfloat16.")] = "auto",
    label: Annotated[str | None, typer.Option(help="A name for tables and figures.")] = None,
    cache_dir: CacheDir = None,
    revision: Revision = None,
    device: Device = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Record to write (NAME.score.json).", dir_okay=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Accuracy on a task's evaluation part -> record with every prompt, output and extracted answer."""
    from welore.accuracy import score
    from welore.files import refuse_unwritable

    if output is not None:
        refuse_unwritable(output)
    if task is None:
        raise WeLoreError("name the task: --task commonsense_qa, svamp, boolq, coin_flip, object_tracking, strategy_qa")
    with _progress() as progress:
        record = score(
            model,
            task,
            data,
            limit=limit,
            batch_size=batch_size,
            dtype=dtype,
            device=_device(device),
            label=label,
            cache_dir=cache_dir,
            revision=revision,
            progress=progress,
        )
    if output is not None:
        record.save(output)
    n = record.numbers
    if n["truncated"]:
        _say(f"{n['truncated']} prompts were longer than the model's context and lost their beginning")
    line = (
        f"accuracy {n['accuracy']:.1%} on {task} (n = {n['n']}, 95 % interval {n['ci95_low']:.1%} to "
        f"{n['ci95_high']:.1%}; always the most frequent answer: {n['majority_rate']:.1%}; {n['unparsable']} without "
        f"an answer); ERR {n['rank_reduction']:.1%}, parameters {n['parameter_ratio']:.1%}, {n['bytes'] / 1e6:.1f} MB"
    )
    _tell(_plain(record), as_json, line if output is None else f"{line} -> {output}")


def _table(records: "Sequence[Record]") -> Table:
    table = Table(title="SmolLM2-135M on the Python reference: equal rank reduction, equal parameters")
    for heading in ("", "ERR", "parameters", "MB", "perplexity"):
        table.add_column(heading, justify="left" if not heading else "right")
    for record in records:
        n = record.numbers
        table.add_row(
            record.inputs["label"],
            f"{n['rank_reduction']:.1%}",
            f"{n['parameter_ratio']:.1%}",
            f"{n['bytes'] / 1e6:.1f}",
            f"{n['perplexity']:.4g}" if n["perplexity"] < 1e4 else f"{n['perplexity']:.1e}",
        )
    return table


def _achieved(asked: Mapping[str, Any], numbers: dict[str, Any]) -> str:
    wish = ", ".join(f"asked {name} {value:g}" for name, value in asked.items()) or "imported"
    return (
        f"{wish}; achieved ERR {numbers['rank_reduction']:.2%}, parameters {numbers['parameter_ratio']:.2%} "
        f"of the targeted matrices, {numbers['lrcs']} of {numbers['matrices']} factored"
    )


def _plain(record: "Record") -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(record)


def _tell(facts: dict[str, Any], as_json: bool, line: str) -> None:
    if _leads():
        print(json.dumps(facts) if as_json else line)


def _leads() -> bool:
    """Whether this is the only process, or the first of those that torchrun or accelerate started."""
    return int(os.environ.get("RANK", "0")) == 0


def _silence_bitsandbytes() -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it regrets kernels nobody asked for


def _say(line: str) -> None:
    """Things worth knowing while work goes on: to the standard error."""
    print(line, file=sys.stderr)


def _ratio(text: str | None) -> Any:
    if text is None or text == "break-even":
        return text
    try:
        return float(text)
    except ValueError as error:
        raise WeLoreError(f"min-ratio is {text!r}: it is a fraction such as 0.5, or break-even") from error


def _device(name: str | None) -> str | None:
    """The device asked for, a GPU if there is one, else None."""
    import torch

    if name is None:
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else None
    try:
        torch.empty(0, device=name).cpu()  # "meta" is a device, too, but nothing comes back from it
    except (RuntimeError, AssertionError) as error:
        raise WeLoreError(f"device {name!r} is not there: use cpu, or a GPU that torch knows") from error
    return name


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    """Bars on the standard error where that is a terminal; silence, ours and the libraries', where it is not."""
    console = Console(stderr=True)
    shown = console.is_terminal and _leads()
    if not shown:
        from huggingface_hub.utils import disable_progress_bars
        from transformers.utils import logging

        logging.disable_progress_bar()
        disable_progress_bars()
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # read by datasets, which is not imported yet
    columns = (
        TextColumn("{task.description:>24}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, disable=not shown) as bars:

        def progress(items: Iterable[tuple[Any, float]], label: str, total: float) -> Iterator[Any]:
            task = bars.add_task(label, total=total)
            for item, cost in items:
                yield item
                bars.advance(task, cost)

        yield progress


def main() -> None:
    """Run the command line; a mistake of the user is one sentence and exit status 2."""
    try:
        app()
    except WeLoreError as error:
        print(f"welore: {error}", file=sys.stderr)
        sys.exit(2)
