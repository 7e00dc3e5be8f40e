"""The verbs that make a model smaller: analyze, allocate, calibrate, compress, merge."""

import math
from collections.abc import Mapping
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
    Output,
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
)
from welore.cli.terminal import device_of, leads, plain, progress_bars, say, silence_bitsandbytes, tell
from welore.errors import WeLoreError


def analyze(
    model: Model,
    output: Output,
    scaling: Annotated[str, typer.Option(help="Values of what: none (the weights), asvd, input, kfac.")] = "none",
    calibration: Annotated[
        Path | None, typer.Option(help="File made by `welore calibrate`: for a scaling, and for strategy owl.")
    ] = None,
    split: Split = None,
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
        if scaling != "none" or calibration or split:
            raise WeLoreError("--reference-values are those of the weights: leave scaling, calibration and split out")
        spectra = import_singular_values(reference_values, model, **common)
    else:
        with progress_bars() as progress:
            spectra = analyze(
                model,
                scaling=scaling,
                calibration=calibration,
                split=split,
                device=device_of(device),
                workers=workers,
                work_dir=output.with_name(output.name + ".work"),
                progress=progress,
                **common,
            )
    if leads():
        spectra.save(output)
    facts = {
        "model": spectra.model.name,
        "fingerprint": spectra.model.fingerprint,
        "scaling": spectra.scaling,
        "matrices": len(spectra.values),
        "values": sum(map(len, spectra.values.values())),
        "output": str(output),
    }
    tell(facts, as_json, f"{facts['values']:,} singular values of {facts['matrices']} matrices -> {output}")


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
    from welore.allocation import allocate
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
    tell(numbers | {"asked": dict(plan.asked)}, as_json, f"{_achieved(plan.asked, numbers)} -> {output}")


def calibrate(
    model: Model,
    output: Output,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="self (the model writes), texts with weights: wikitext2:1,pydoc:1,my.txt:2, or a file of windows "
            "(.safetensors).  [default: self]"
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
    split: Annotated[
        bool, typer.Option("--split/--no-split", help="Measure as matrices are cut with or without --split.")
    ] = True,
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
    with progress_bars() as progress:
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
            split=split,
            dtype=dtype,
            include=include or (),
            exclude=exclude or (),
            cache_dir=cache_dir,
            revision=revision,
            device=device_of(device),
            progress=progress,
        )
    n = found.record.numbers
    if n["never_reached"]:
        say(f"{n['never_reached']} of {n['matrices']} matrices were reached by no token: their statistics are zero")
    line = f"second moments of {n['matrices']} matrices over {n['tokens']:,} tokens -> {output}"
    tell(plain(found.record), as_json, line)


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
    from welore.checkpoint import compress
    from welore.parallel import return_freed_memory
    from welore.plan import Plan
    from welore.reference import import_checkpoint

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
                params=params,
                threshold=threshold,
                strategy=strategy,
                scaling=scaling,
                storage=storage,
                min_ratio=_ratio(min_ratio),
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
    if record.settings.get("neurons"):
        say(f"{record.settings['neurons']:,} neurons of the MLPs were taken out before the cut")
    if "held_out_loss" in numbers:
        losses = {name: math.exp(min(loss, 700.0)) for name, loss in numbers["held_out_loss"].items()}
        say(
            f"healed on {numbers['healing_tokens']:,} tokens: held-out perplexity {losses['cut']:.4g} -> "
            f"{losses['healed']:.4g} (dense {losses['dense']:.4g})" + ("" if numbers["healed"] else "; kept as cut")
        )
    elif record.settings.get("healing"):
        say(f"kept as cut, healing failed: {record.settings['healing']['failed']}")
    line = f"{_achieved(record.settings['asked'], numbers)}, {numbers['bytes'] / 1e6:.1f} MB -> {out}"
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
    from welore.merging import merge

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


def _achieved(asked: Mapping[str, Any], numbers: dict[str, Any]) -> str:
    wish = ", ".join(f"asked {name} {value:g}" for name, value in asked.items()) or "imported"
    return (
        f"{wish}; achieved ERR {numbers['rank_reduction']:.2%}, parameters {numbers['parameter_ratio']:.2%} "
        f"of the targeted matrices, {numbers['lrcs']} of {numbers['matrices']} factored"
    )


def _ratio(text: str | None) -> Any:
    if text is None or text == "break-even":
        return text
    try:
        return float(text)
    except ValueError as error:
        raise WeLoreError(f"min-ratio is {text!r}: it is a fraction such as 0.5, or break-even") from error
