"""The verbs that make a model smaller, or dense again: analyze, allocate, calibrate, compress, merge, export, info."""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from welore.cli.from_config import Model, OutputDir, OutputFile, StatisticsFile
from welore.cli.output import achieved, log, print_result, quiet_libraries
from welore.config import (
    SHARD_SIZE,
    AllocationConfig,
    AnalysisConfig,
    CalibrationConfig,
    CompressionConfig,
    ExportFormat,
    OutType,
    RecoveryConfig,
    RunConfig,
    RunOptions,
)
from welore.errors import WeLoreError

if TYPE_CHECKING:
    from welore.records import Record

PlanFile = Annotated[
    Path | None, typer.Option(help="A plan made by `welore allocate`, in place of a target.", rich_help_panel="Target")
]
RecoveryText = Annotated[
    str | None,
    typer.Option(
        "--recovery",
        help="Train the factors on: self (what the model wrote), a text as for calibration, or none. "
        "[default: self for preset best]",
        rich_help_panel="Recovery",
    ),
]
Paper = Annotated[bool, typer.Option("--paper", help="Short for --preset paper.", rich_help_panel="Target")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print targets, sizes, time, memory and disk, and stop.", rich_help_panel="Target"),
]
GivenStatistics = Annotated[
    Path | None, typer.Option(help="File made by `welore calibrate`.", rich_help_panel="Calibration")
]
ReferenceCheckpoint = Annotated[
    Path | None,
    typer.Option(
        help="Take weights and factors from this state dict of the reference scripts.", rich_help_panel="Method"
    ),
]
RECOVERY_FAILED = 3  # exit status of a compression that is there, but without the recovery that was asked for
ShardSize = Annotated[str, typer.Option(help="Largest size of one weight file.")]


def join(run: RunConfig) -> RunOptions:
    """The options of a verb whose work the processes of torchrun or accelerate share."""
    from welore.io.parallel import join_processes

    return {**run.options, "processes": join_processes()}


def analyze(
    model: Model,
    output: OutputFile,
    config: AnalysisConfig,
    run: RunConfig,
    as_json: bool,
    statistics: StatisticsFile = None,
    reference_values: Annotated[
        Path | None, typer.Option(help="Take the values from this .pt file of the reference scripts instead.")
    ] = None,
) -> None:
    """Compute the singular values of every targeted matrix and write a spectra file."""
    quiet_libraries()
    from welore.compression.analysis import analyze
    from welore.compression.reference_import import import_singular_values
    from welore.io.claim import claimed

    if reference_values is not None:
        if config.scaling not in (None, "none") or statistics or config.split:
            raise WeLoreError("--reference-values are those of the weights: leave scaling, statistics and split out")
        with claimed(output, model, reference_values, overwrite=run.overwrite):
            spectra = import_singular_values(
                reference_values, model, include=config.include, exclude=config.exclude, **run.options
            )
            spectra.save(output)
    else:
        spectra = analyze(
            model,
            statistics=statistics,
            scaling=config.scaling,
            split=config.split,
            include=config.include,
            exclude=config.exclude,
            output=output,
            **join(run),
        )
    facts = {
        "model": spectra.model.name,
        "fingerprint": spectra.model.fingerprint,
        "scaling": spectra.scaling,
        "matrices": len(spectra.values),
        "values": sum(map(len, spectra.values.values())),
        "output": str(output),
    }
    print_result(facts, as_json, f"{facts['values']:,} singular values of {facts['matrices']} matrices -> {output}")


def allocate(
    spectra: Annotated[Path, typer.Argument(help="File made by `welore analyze`.", show_default=False)],
    output: OutputFile,
    config: AllocationConfig,
    as_json: bool,
) -> None:
    """Choose the rank of every matrix for a target and write plan.json."""
    from welore.allocation.solver import allocate
    from welore.allocation.spectra import Spectra
    from welore.io.claim import claimed

    with claimed(output, spectra):
        plan = allocate(Spectra.load(spectra), config)
        plan.save(output)
    numbers = plan.numbers()
    print_result(numbers | {"target": dict(plan.target)}, as_json, f"{achieved(plan.target, numbers)} -> {output}")


def calibrate(model: Model, output: OutputFile, config: CalibrationConfig, run: RunConfig, as_json: bool) -> None:
    """Collect second moments of inputs and output gradients of every targeted matrix."""
    quiet_libraries()
    from welore.calibration.collect import calibrate
    from welore.io.parallel import join_processes

    if join_processes().size > 1:
        raise WeLoreError("calibrate works in one process: start it without torchrun or accelerate")
    record = calibrate(model, config, output, **run.options).record
    numbers = record.numbers
    if numbers["never_reached"]:
        log(
            f"{numbers['never_reached']} of {numbers['matrices']} matrices were reached by no token: their statistics "
            "are zero"
        )
    line = f"second moments of {numbers['matrices']} matrices over {numbers['tokens']:,} tokens -> {output}"
    print_result(record, as_json, line)


def compress(
    model: Model,
    output_dir: OutputDir,
    config: CompressionConfig,
    calibration: CalibrationConfig,
    recovery: RecoveryConfig,
    run: RunConfig,
    as_json: bool,
    plan: PlanFile = None,
    paper: Paper = False,
    statistics: GivenStatistics = None,
    recovery_text: RecoveryText = None,
    dry_run: DryRun = False,
    reference_checkpoint: ReferenceCheckpoint = None,
) -> None:
    """Compress a model into a Hugging Face directory that loads with from_pretrained.

    The exit status is 3 if the model was compressed and written, but its recovery failed.
    """
    quiet_libraries()
    from welore.compression.pipeline import compress
    from welore.compression.presets import preset_of
    from welore.compression.reference_import import import_checkpoint
    from welore.io._malloc import return_freed_memory

    if paper and config.preset not in (None, "paper"):
        raise WeLoreError("give --paper or --preset, not both")
    config = dataclasses.replace(config, preset="paper") if paper else config
    wanted = _recovery(recovery, recovery_text)
    if dry_run:
        from welore.compression.estimate import estimate

        prediction = estimate(
            model, config, calibration=calibration, recovery=wanted, statistics=statistics, **run.options
        )
        print_result(prediction.to_dict(), as_json, str(prediction))
        return
    if reference_checkpoint is not None:
        if plan is not None or any(v is not None for v in (config.keep, config.rank_reduction, config.threshold)):
            raise WeLoreError("give --reference-checkpoint or a plan or target, not both: it has its own ranks")
        record = import_checkpoint(
            reference_checkpoint, model, output_dir, max_shard_size=config.max_shard_size, **run.options
        )
    else:
        if preset_of(config) in (None, "paper"):  # no model is run, which would want its blocks again
            return_freed_memory()
        record = compress(
            model,
            output_dir,
            config,
            calibration=calibration,
            recovery=wanted,
            plan=plan,
            statistics=statistics,
            **join(run),
        ).record
    _report_compression(record, output_dir, as_json)


def _recovery(config: RecoveryConfig, text: str | None) -> "RecoveryConfig | Literal['auto'] | None":
    """The recovery that `--recovery` and the options beside it ask for."""
    if text == "none":
        return None
    if text is None:
        return "auto" if config == RecoveryConfig() else config
    return dataclasses.replace(config, dataset=text)


def _report_compression(record: "Record", output_dir: Path, as_json: bool) -> None:
    """Say what stayed dense, how many neurons went, how the recovery ended, and the result."""
    numbers: dict[str, Any] = record.numbers
    if numbers.get("left_dense_in_blocks"):
        log(
            f"left dense inside the blocks: {numbers['left_dense_in_blocks'] / 1e6:.1f} M parameters "
            f"({', '.join(numbers['left_dense_names'])})"
        )
        if together := [name for name in numbers["left_dense_names"] if name.endswith(".experts")]:
            log(f"their files hold all experts of a layer in a way of their own: {', '.join(together)}")
    if record.settings.get("expert_pruning"):
        log(f"{record.settings['expert_pruning']:.1%} of the experts were taken out")
    if record.settings.get("mlp_pruning"):
        before = " before the factorisation" * bool(numbers["lrcs"])
        log(f"{record.settings['mlp_pruning']:,} neurons of the MLPs were taken out{before}")
    if "held_out_loss" in numbers:
        losses = {name: math.exp(min(loss, 700.0)) for name, loss in numbers["held_out_loss"].items()}
        log(
            f"recovery on {numbers['healing_tokens']:,} tokens: held-out perplexity {losses['cut']:.4g} -> "
            f"{losses['healed']:.4g} (dense {losses['dense']:.4g})"
            + ("" if numbers["healed"] else "; kept as it was compressed")
        )
    elif (record.settings.get("recovery") or {}).get("failed"):
        log(f"kept as it was compressed, recovery failed: {record.settings['recovery']['failed']}")
    line = f"{achieved(record.settings['target'], numbers)}, {numbers['bytes'] / 1e6:.1f} MB"
    print_result(record, as_json, f"{line} -> {output_dir}")
    if (record.settings.get("recovery") or {}).get("failed"):
        raise typer.Exit(RECOVERY_FAILED)


def merge(
    model: Model, output_dir: OutputDir, run: RunConfig, as_json: bool, max_shard_size: ShardSize = SHARD_SIZE
) -> None:
    """Turn a compressed checkpoint into a dense one, W = A B, that needs nothing of welore."""
    quiet_libraries()
    from welore.compression.merge import merge

    merge(model, output_dir, max_shard_size=max_shard_size, **run.options)
    print_result({"output": str(output_dir)}, as_json, f"dense checkpoint -> {output_dir}")


def export(
    model: Model,
    output: Annotated[Path, typer.Argument(help="Directory to write; for gguf a file.", show_default=False)],
    run: RunConfig,
    as_json: bool,
    format: Annotated[
        ExportFormat,
        typer.Option(
            help="dense: W = A B; nothing of the saving is left. int8: still compressed, weights in 8 bits. gguf: for "
            "llama.cpp; low-rank matrices are multiplied back, narrower MLPs stay narrow. onnx: for ONNX Runtime; "
            "low-rank products stay."
        ),
    ] = "dense",
    outtype: Annotated[
        OutType,
        typer.Option(help="Type of the matrices in gguf or onnx. auto: that of the checkpoint; q8_0: gguf alone."),
    ] = "auto",
) -> None:
    """Write a checkpoint for engines that do not know welore."""
    quiet_libraries()
    from welore.compression.export import exported

    numbers = exported(model, output, format, outtype, **run.options).numbers
    notes = "; ".join([f"{numbers['parameters']:,} parameters, {numbers['bytes'] / 1e6:,.1f} MB", *numbers["notes"]])
    facts = {"output": str(output), "format": format} | numbers
    print_result(facts, as_json, f"{format}: {notes} -> {output}")


def info(
    directory: Annotated[Path, typer.Argument(help="Checkpoint directory.", show_default=False)], as_json: bool
) -> None:
    """Say what a checkpoint is and how it was made."""
    quiet_libraries()
    from welore.compression.info import info

    facts = info(directory)
    print_result(facts.to_dict(), as_json, str(facts))
