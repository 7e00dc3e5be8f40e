"""The verbs that write a smaller model, or a dense one again: compress, merge."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from welore.cli.options import (
    AllowGrowth,
    AsJson,
    CacheDir,
    Device,
    Exclude,
    Include,
    MinRatio,
    Model,
    Out,
    Overwrite,
    Params,
    RankMultiple,
    RankReduction,
    Revision,
    ShardSize,
    Split,
    StorageName,
    StrategyName,
    Threshold,
    Workers,
    ratio_of,
)
from welore.cli.terminal import achieved, device_of, plain, progress_bars, say, silence_bitsandbytes, tell
from welore.errors import WeLoreError


def compress(
    model: Model,
    out: Out,
    plan: Annotated[Path | None, typer.Option(help="A plan made by `welore allocate`, in place of a target.")] = None,
    rank_reduction: RankReduction = None,
    params: Params = None,
    threshold: Threshold = None,
    strategy: StrategyName = None,
    scaling: Annotated[
        str | None,
        typer.Option(
            help="What is cut: none (the weights), or scaled by a calibration: asvd, input, kfac. "
            "[default: kfac for --params alone, else none]"
        ),
    ] = None,
    storage: StorageName = None,
    min_ratio: MinRatio = None,
    allow_growth: AllowGrowth = False,
    rank_multiple: RankMultiple = 1,
    split: Split = None,
    neurons: Annotated[
        float | None,
        typer.Option(
            help="Share of the MLPs' neurons that is taken out before the cut. [default: for --params alone as many "
            "as are worth less than the numbers they take, else 0]"
        ),
    ] = None,
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
    from welore.allocation.plan import Plan
    from welore.compression.pipeline import compress
    from welore.compression.reference_import import import_checkpoint
    from welore.io.parallel import return_freed_memory

    silence_bitsandbytes()
    return_freed_memory()
    common: dict[str, Any] = {
        "cache_dir": cache_dir,
        "revision": revision,
        "max_shard_size": max_shard_size,
        "overwrite": overwrite,
    }
    with progress_bars() as progress:
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
                keep=params,
                threshold=threshold,
                strategy=strategy,
                scaling=scaling,
                storage=storage,
                min_ratio=ratio_of(min_ratio),
                allow_growth=allow_growth,
                rank_multiple=rank_multiple,
                split=split,
                neurons=neurons,
                paper=paper,
                calibration=calibration,
                tokens=tokens,
                seed=seed,
                heal=heal,
                include=include or (),
                exclude=exclude or (),
                device=device_of(device),
                workers=workers,
                progress=progress,
                **common,
            )
    numbers = record.numbers
    if numbers.get("left_dense_in_blocks"):
        say(
            f"left dense inside the blocks: {numbers['left_dense_in_blocks'] / 1e6:.1f} M parameters "
            f"({', '.join(numbers['left_dense_names'])})"
        )
    if record.settings.get("mlp_pruning"):
        say(f"{record.settings['mlp_pruning']:,} neurons of the MLPs were taken out before the cut")
    if "held_out_loss" in numbers:
        losses = {name: math.exp(min(loss, 700.0)) for name, loss in numbers["held_out_loss"].items()}
        say(
            f"healed on {numbers['healing_tokens']:,} tokens: held-out perplexity {losses['cut']:.4g} -> "
            f"{losses['healed']:.4g} (dense {losses['dense']:.4g})" + ("" if numbers["healed"] else "; kept as cut")
        )
    elif record.settings.get("recovery"):
        say(f"kept as cut, healing failed: {record.settings['recovery']['failed']}")
    line = f"{achieved(record.settings['target'], numbers)}, {numbers['bytes'] / 1e6:.1f} MB -> {out}"
    tell(plain(record), as_json, line)


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
    from welore.compression.merge import merge

    with progress_bars() as progress:
        merge(
            model,
            out,
            cache_dir=cache_dir,
            revision=revision,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            progress=progress,
        )
    tell({"output": str(out)}, as_json, f"dense checkpoint -> {out}")
