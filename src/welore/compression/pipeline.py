"""3 - compress: a model -> a smaller Hugging Face directory, all steps on the way included.

Memory of the cut is bounded by the matrices in work, never by the model (one that writes its own text, or heals, is
whole); nothing is written under its final name before it is complete; a killed run continues where it was.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from welore.allocation.neurons import Neurons
from welore.allocation.plan import Plan
from welore.allocation.solver import allocate, resolve
from welore.calibration.collect import calibrate
from welore.calibration.scaling import SCALINGS
from welore.calibration.statistics import Statistics
from welore.compression import recovery as healing
from welore.compression.analysis import (
    analyze_weights,
    check_plan,
    grids_of,
    opened_calibration,
    shared_workspace,
    summary,
)
from welore.compression.factorize import factor_matrices, write_checkpoint
from welore.compression.in_memory import compress_model
from welore.compression.mlp_pruning import without, worth_taking_out
from welore.config import KFAC, MAX_LENGTH, NONE, NUM_TOKENS, SELF, AllocationConfig, CalibrationConfig, MinRatio
from welore.errors import WeLoreError, choose
from welore.io.atomic import atomic_directory, require_free, require_outside
from welore.io.checkpoint import PLAN, RECORD, SHARD_SIZE
from welore.io.hub import resolve_model
from welore.io.parallel import Processes
from welore.io.progress import Progress, silent
from welore.io.resume import Workspace
from welore.layers.registry import FACTORED
from welore.models.quantizer import WeLoreConfig
from welore.models.replace import sizes
from welore.models.source import CheckpointSource, TensorSource
from welore.models.targets import Target, in_blocks
from welore.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compress(
    model: "str | Path | PreTrainedModel",
    out: str | Path | None = None,
    *,
    plan: Plan | None = None,
    rank_reduction: float | None = None,
    keep: float | None = None,
    threshold: float | None = None,
    strategy: str | None = None,
    scaling: str | None = None,
    storage: str | None = None,
    min_ratio: MinRatio | None = None,
    allow_growth: bool = False,
    rank_multiple: int = 1,
    split: bool | None = None,
    neurons: float | None = None,
    paper: bool = False,
    calibration: "Statistics | str | Path" = SELF,
    tokens: int = NUM_TOKENS,
    seed: int = 0,
    heal: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    cache_dir: str | Path | None = None,
    revision: str | None = None,
    device: str | None = None,
    workers: int | None = None,
    max_shard_size: str = SHARD_SIZE,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Record:
    """Factor the LRCs of MODEL and write a checkpoint to `out`; or, for a model in memory, exchange its layers.

    Give a plan, or one target (rank_reduction, keep, threshold) with the settings of `allocate`. scaling: one of
    scaling.SCALINGS; by default kfac for `keep` alone, which is the best we have, and none for the paper's targets
    and for a named strategy. calibration: what a scaling rests on, made by `calibrate`; "self" makes one from `tokens`
    tokens that the model itself writes, so that no data is needed. split: matrices at least twice as long as wide are
    cut block by block (mlp.long_matrices); by default where the scaling is kfac. neurons: the share of the
    MLPs' neurons that is taken out before the cut (mlp_pruning); by default none, but for `keep` alone those that
    cost less than the numbers that they take. paper: WeLore as published, which is strategy welore, scaling none,
    storage factored and nothing split.

    heal: the text on which the factors then learn from the dense model (tuning.healing): "self", what the model wrote
    for the calibration, for at most 64 steps; texts as `calibrate` takes them, of which `tokens` are read, each once,
    and whose own words are half of the loss; or "none". By default "self" for `keep` alone where there is such a
    text. It needs model and teacher whole in memory.

    The directory holds plan.json and the returned record (compression.json) beside the weights. A model in memory is
    changed in place, and saved when `out` is given. Raises WeLoreError before anything is written.

    workers: matrices at once, default one per core. Finished matrices are kept in `OUT.work` until all are done:
    the same call after a kill continues there, to the same bytes, and the processes of torchrun or accelerate share
    the matrices through it.
    """
    if out is not None:
        require_free(out, overwrite=overwrite)
    target = {"rank_reduction": rank_reduction, "keep": keep, "threshold": threshold}
    settings: dict[str, Any] = {
        **target,
        "strategy": strategy,
        "storage": storage,
        "min_ratio": min_ratio,
        "allow_growth": allow_growth,
        "rank_multiple": rank_multiple,
    }
    alone = keep is not None and strategy is None and scaling in (None, KFAC)  # the best we have is asked for
    if plan is None:
        settings, scaling = _method(settings, scaling, split=split, neurons=neurons, paper=paper)
        config = AllocationConfig(**settings)
        resolve(config, scaling)
        assert config.target
    elif (
        AllocationConfig(**settings) != AllocationConfig() or scaling or split or neurons or paper or include or exclude
    ):
        raise WeLoreError(
            "a plan has its own target, strategy, scaling, storage, split, neurons and patterns: leave those out"
        )
    else:
        include, exclude, scaling = plan.include, plan.exclude, plan.scaling

    started = time.perf_counter()
    patterns: dict[str, Any] = {"include": include, "exclude": exclude}
    if isinstance(model, nn.Module):
        if heal not in (None, NONE) or neurons:
            raise WeLoreError(
                "a model in memory is cut, not healed, and keeps its neurons: give a directory to read and one to write"
            )
        how: dict[str, Any] = {"scaling": scaling, "split": split, "workers": workers, "progress": progress}
        plan, record = _in_memory(model, plan, calibration, started, **how, **patterns, **settings)
        if out is not None:
            with atomic_directory(out, overwrite=overwrite) as unfinished:
                model.save_pretrained(unfinished, max_shard_size=max_shard_size)
                plan.save(unfinished / PLAN)
                record.save(unfinished / RECORD)
        return record

    if out is None:
        raise WeLoreError("name the directory to write: compress(model, out, ...)")
    directory = resolve_model(model, cache_dir=cache_dir, revision=revision)
    require_outside(out, directory)
    windows = None if heal in (None, NONE, SELF) else healing.text(heal, directory, tokens, seed, cache_dir)
    with CheckpointSource(directory, str(model), include, exclude) as checkpoint:
        source: TensorSource = checkpoint
        found = None if calibration == SELF else opened_calibration(calibration, source)
        own = (-(-tokens // MAX_LENGTH) if scaling != NONE else 0) if found is None else (found.generated or (0,))[0]
        heal = healing.chosen(heal, own, alone=alone)
        if neurons and (found is None and scaling == NONE):
            raise WeLoreError("neurons are chosen by a calibration: give --statistics, or a scaling that needs one")
        rests_on = [tokens, seed] if found is None else summary(found)
        grids = grids_of(source, split, scaling) if plan is None else plan.grids
        with shared_workspace(_beside(out), source, scaling, grids, rests_on) as (workspace, crew):
            place = None if device == "cpu" else device  # where the tensors of a checkpoint come in anyway
            how = {"device": place, "workers": workers, "progress": progress}
            if plan is None:
                if found is None and scaling != NONE:
                    text = {"num_tokens": tokens, "seed": seed, "device": device or "auto", "progress": progress}
                    found = _own_calibration(directory, workspace, crew, **text, **patterns)
                keep = place is None and _fits_on_disk(in_blocks(source.targets, grids), Path(out))
                kept: dict[str, Any] = {"workspace": workspace, "crew": crew, "keep_reductions": keep, **how}
                share = neurons if neurons is not None or alone else 0
                plan, source, found = _planned(source, scaling, found, split, share, settings, kept)
            else:
                check_plan(plan, source, found)
                source, found = _as_planned(plan, source, found, workspace, crew, workers, progress)
            quality = factor_matrices(source, plan, found, workspace, crew, **how)
            if crew.is_main:
                trained, about = None, None
                if heal != NONE and plan.ranks:
                    if windows is None and found is not None:
                        windows = found.generated_text()
                    assert windows is not None
                    here: dict[str, Any] = {"own": heal == SELF, "seed": seed, "device": device, "progress": progress}
                    trained, about, numbers = healing.heal(source, plan, workspace, windows, **here)
                    about, quality = {"text": heal} | about, quality | numbers
                with atomic_directory(out, overwrite=overwrite) as unfinished:
                    quality |= write_checkpoint(source, plan, workspace, unfinished, max_shard_size, progress, trained)
                    _record(plan, started, quality, about).save(unfinished / RECORD)
    return Record.load(Path(out) / RECORD)


def _in_memory(
    model: "PreTrainedModel", plan: Plan | None, calibration: Any, started: float, *, scaling: str, **how: Any
) -> tuple[Plan, Record]:
    """Exchange the layers of a model, which then says so in its config: by the plan, or by one that is made."""
    if calibration == SELF and scaling != NONE:
        raise WeLoreError(
            f"scaling {scaling} of a model in memory needs calibration=, made by `calibrate`; or scaling='none'"
        )
    known = None if calibration == SELF else calibration
    plan = compress_model(model, plan=plan, scaling=scaling, calibration=known, **how)
    model.config.quantization_config = WeLoreConfig.of(plan)
    return plan, _record(plan, started, sizes(model))


def _method(
    settings: Mapping[str, Any], scaling: str | None, *, split: bool | None, neurons: float | None, paper: bool
) -> tuple[dict[str, Any], str]:
    """Settings of `allocate` and the scaling: what was asked for, and what goes with it."""
    found = dict(settings)
    if paper:
        if found["strategy"] or scaling or found["storage"] or split or neurons:
            raise WeLoreError(
                "--paper is strategy welore, scaling none, storage factored, no split, all neurons: leave those out"
            )
        found |= {"strategy": "welore", "storage": FACTORED}
    best = found["keep"] is not None and found["strategy"] is None
    scaling = scaling or (KFAC if best else NONE)
    choose("scaling", scaling, SCALINGS)
    if neurons is not None and not 0 <= neurons < 1:
        raise WeLoreError(f"neurons is {neurons:g}: it is the share that is taken out, from 0 to below 1")
    return found, scaling


def _planned(
    source: TensorSource,
    scaling: str,
    calibration: Statistics | None,
    split: bool | None,
    share: float | None,
    settings: Mapping[str, Any],
    how: dict[str, Any],
) -> tuple[Plan, TensorSource, Statistics | None]:
    """The plan, and what it is for: the matrices as they came, or with neurons taken out, where that is worth it.

    share: of the neurons; None: as many as are worth less than what a number costs in a plan with all of them.
    how: settings of `analyze_weights` that both plans have.
    """

    def planned(weights: TensorSource, known: Statistics | None, neurons: Mapping[str, Neurons]) -> Plan:
        about: dict[str, Any] = {"scaling": scaling, "calibration": known, "neurons": neurons}
        return allocate(
            analyze_weights(weights, grids=grids_of(weights, split, scaling), **about, **how),
            AllocationConfig(**settings),
        )

    if share == 0 or calibration is None:
        return planned(source, calibration, {}), source, calibration
    whole = None if share else planned(source, calibration, {})
    shared = {name: how[name] for name in ("workspace", "crew", "workers", "progress")}
    price = None if whole is None else whole.threshold
    neurons = worth_taking_out(source, calibration, share=share, price=price, **shared)
    if whole is not None and not neurons:
        return whole, source, calibration
    source, calibration = without(source, calibration, neurons, **shared)
    return planned(source, calibration, neurons), source, calibration


def _as_planned(
    plan: Plan,
    source: TensorSource,
    calibration: Statistics | None,
    workspace: Workspace,
    crew: Processes,
    workers: int | None,
    progress: Progress,
) -> tuple[TensorSource, Statistics | None]:
    """What a plan that was given is for: the checkpoint and its calibration, without the neurons that it takes out."""
    if not plan.neurons:
        return source, calibration
    if calibration is None:
        raise WeLoreError("the plan takes neurons out: give the calibration that they were chosen by")
    source, calibration = without(
        source, calibration, plan.neurons, workspace, crew, workers=workers, progress=progress
    )
    left = {target.name: target.shape for target in in_blocks(source.targets, plan.grids)}
    if left != {a.name: a.shape for a in plan.allocations}:
        raise WeLoreError("the plan's matrices are not those that its neurons leave: make it again")
    return source, calibration


def _own_calibration(directory: Path, workspace: Workspace, crew: Processes, **how: Any) -> Statistics:
    """From text that the model writes, made by the process that leads, kept with the unfinished work.

    Without measured losses: on a quarter of such text they make the result worse (research/LOG.md).
    """
    made = workspace.directory / "calibration.safetensors"
    if crew.is_main and not made.is_file():
        names = ("num_tokens", "seed", "include", "exclude")
        config = CalibrationConfig(measure_losses=0, **{name: how.pop(name) for name in names})
        calibrate(directory, config, made, **how)
    crew.wait()
    return Statistics.load(made)


def _beside(out: str | Path) -> Path:
    """Where unfinished work lies: OUT.work, also when `out` is "." or ends in a slash."""
    path = Path(out).resolve()
    return path.with_name(path.name + ".work")


def _fits_on_disk(targets: Sequence[Target], out: Path) -> bool:
    """Whether the reductions of all matrices, 4 k^2 bytes each, fit beside the result; else they are made again."""
    needed = sum(4 * min(t.shape) ** 2 + 4 * t.shape[0] * t.shape[1] for t in targets)
    there = next(parent for parent in out.resolve().parents if parent.is_dir())
    return shutil.disk_usage(there).free > 1.2 * needed


def _record(plan: Plan, started: float, sizes: dict[str, Any], healing: dict[str, Any] | None = None) -> Record:
    settings = {
        "target": dict(plan.target),
        "strategy": plan.strategy,
        "scaling": plan.scaling,
        "storage": sorted(set(plan.forms.values())),
        "statistics": dict(plan.statistics),
        "min_ratio": plan.min_ratio,
        "allow_growth": plan.allow_growth,
        "rank_multiple": plan.rank_multiple,
        "split": len(plan.grids),
        "mlp_pruning": sum(n.pruned for n in plan.neurons.values()),
        "include": list(plan.include),
        "exclude": list(plan.exclude),
        "recovery": healing,
    }
    inputs = {"model": plan.model.name, "targets_fingerprint": plan.model.fingerprint}
    numbers = plan.numbers() | sizes | {"seconds": time.perf_counter() - started}
    return Record("compression", inputs, settings, numbers)
