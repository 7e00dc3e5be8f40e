"""The verbs before a cut: analyze, allocate, calibrate."""

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
    Output,
    Params,
    RankMultiple,
    RankReduction,
    Revision,
    Split,
    StorageName,
    StrategyName,
    Threshold,
    Workers,
    ratio_of,
)
from welore.cli.terminal import achieved, device_of, leads, plain, progress_bars, say, tell
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
    from welore.compression.analysis import analyze
    from welore.compression.reference_import import import_singular_values
    from welore.io.parallel import return_freed_memory

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
    from welore.allocation.solver import allocate
    from welore.allocation.spectra import Spectra
    from welore.config import AllocationConfig

    config = AllocationConfig(
        keep=params,
        rank_reduction=rank_reduction,
        threshold=threshold,
        strategy=strategy,  # type: ignore[arg-type]
        storage=storage,  # type: ignore[arg-type]
        min_ratio=ratio_of(min_ratio),
        allow_growth=allow_growth,
        rank_multiple=rank_multiple,
    )
    plan = allocate(Spectra.load(spectra), config)
    plan.save(output)
    numbers = plan.numbers()
    tell(numbers | {"asked": dict(plan.target)}, as_json, f"{achieved(plan.target, numbers)} -> {output}")


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
    from welore.calibration.collect import calibrate
    from welore.io.parallel import team

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
