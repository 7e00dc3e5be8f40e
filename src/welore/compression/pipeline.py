"""compress: a model -> a smaller model, in six steps (docs/concepts).

Memory is bounded by the matrices in work, never by the model, but for statistics and recovery. Nothing is written under
its final name before it is complete. A killed run continues where it was.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

import torch
from torch import Tensor, nn

from welore.allocation.plan import Plan
from welore.allocation.solver import allocate, check_reachable
from welore.calibration.collect import Text, collect, draw_text, measure_losses
from welore.calibration.statistics import Statistics
from welore.compression.analysis import Analyzer, grids_of, open_statistics, shared_workspace, summary
from welore.compression.blockwise import BlockAnalyzer, LastingMoments
from welore.compression.expert_pruning import (
    any_experts,
    require_experts,
    require_same_experts,
    select_experts,
    without_experts,
)
from welore.compression.factorize import factor_matrices, factors_key, stored_factors
from welore.compression.mlp_pruning import Search, is_worth_it, prune, pruned_shapes, require_neurons, select_neurons
from welore.compression.needs import require_room
from welore.compression.plain import plain_plan, plain_width, with_trained
from welore.compression.presets import PRESETS, resolve, resolve_calibration
from welore.compression.recovery import Recovery, failed_recovery, recover, recovery_text, resolve_recovery
from welore.compression.result import CompressionResult
from welore.compression.writing import write_compressed
from welore.config import (
    ANYWHERE,
    AUTO,
    KFAC,
    MAX_LENGTH,
    NONE,
    SELF,
    CalibrationConfig,
    CompressionConfig,
    RecoveryConfig,
    RunOptions,
    as_record,
    settings_of,
)
from welore.data.text import TextOptions
from welore.data.windows import TopK, require_known_tokens
from welore.errors import DamagedWeightsError, WeLoreError
from welore.io.atomic import atomic_directory, hidden, remove, resolved, work_directory
from welore.io.checkpoint import PLAN, RECORD
from welore.io.claim import claimed, require_unread
from welore.io.context import RunContext, own_modes
from welore.layers.block_grid import Grid, layer_of
from welore.layers.remaining import Remaining
from welore.models.card import read_card, write_card
from welore.models.expert_pruning import ExpertPruning
from welore.models.load import load_model, read_tokenizer
from welore.models.mlp import Mlp, find_mlps
from welore.models.saving import remember_companions
from welore.models.sink import open_sink
from welore.models.source import CheckpointSource, TensorSource, open_source
from welore.models.targets import Target, in_blocks
from welore.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Directory = str | Path


@dataclass(frozen=True)
class Job:
    """The weights, and everything that was asked for, complete: no None stands for a default any more.

    width: neurons that are left of every MLP of a plain result; None for others, and for one by a plan. experts: how
    many are left of every layer of a mixture; None if all.
    """

    source: TensorSource
    context: RunContext
    config: CompressionConfig
    calibration: CalibrationConfig
    recovery: RecoveryConfig | None
    plan: Plan | None
    statistics: Statistics | None
    grids: dict[str, Grid]
    width: int | None = None
    experts: ExpertPruning | None = None
    text: Text | None = None
    recovery_text: Tensor | None = None

    @property
    def scaling(self) -> str:
        """The scaling of the plan, or of the config."""
        return self.plan.scaling if self.plan else str(self.config.scaling)

    @property
    def collects(self) -> bool:
        """Whether statistics have to be collected."""
        return self.statistics is None and self.plan is None and self.scaling != NONE

    @property
    def counts_outliers(self) -> bool:
        """Whether the strategy asks for outliers."""
        return self.config.strategy == "owl"

    @property
    def prunable(self) -> list[Mlp]:
        """The MLPs that may lose neurons."""
        return find_mlps(self.source.skeleton, self.source.targets) if self.config.mlp_pruning else []

    @property
    def removed(self) -> int | None:
        """The numbers that the target removes from the targeted matrices; None if it does not tell."""
        if self.width is not None:
            return sum((mlp.width - self.width) * mlp.numbers for mlp in self.prunable)
        if self.plain:
            return self.in_experts
        return None if self.config.keep is None else int((1 - self.config.keep) * _numel(self.source.targets))

    @property
    def target(self) -> tuple[str, float]:
        """Name and value of what was asked for."""
        alone = self.plain and self.experts is not None
        return ("expert_pruning", self.config.expert_pruning) if alone else self.config.target

    @property
    def in_experts(self) -> int:
        """The numbers of the targeted matrices of experts that are taken out."""
        return _numel(self.source.targets) - _numel(self.fewer.targets)

    @cached_property
    def fewer(self) -> TensorSource:
        """The source without as many experts as are taken out, though perhaps not these: all have the same shapes."""
        return without_experts(self.source, self.experts, any_experts(self.experts))

    @property
    def plain(self) -> bool:
        """Whether the result is an ordinary checkpoint, in which every matrix stays dense."""
        return self.config.optimize_for == ANYWHERE if self.plan is None else self.plan.plain


@own_modes()
def compress(
    model: "Directory | PreTrainedModel",
    output_dir: Directory | None = None,
    config: CompressionConfig | None = None,
    *,
    keep: float | None = None,
    calibration: CalibrationConfig | None = None,
    recovery: RecoveryConfig | Literal["auto"] | None = "auto",
    plan: Plan | Directory | None = None,
    statistics: Statistics | Directory | None = None,
    **options: Unpack[RunOptions],
) -> CompressionResult:
    """Make a model smaller: factorise its matrices, and write a checkpoint that loads with `from_pretrained`.

    A size alone (`keep=0.8`) takes the preset best. The model then writes the text for its statistics, so no data is
    needed; a model in memory needs `tokenizer=` for that. A model in memory is changed in place; the result is that of
    the same model in a directory.

    Args:
        model: Hub id, directory, .gguf file or a model in memory.
        output_dir: The directory to write. A model in memory is saved there if it is given.
        config: Target and method. A field that is None follows the preset.
        keep: The target, in place of one in the config: share of the parameters of the targeted matrices to keep, 0..1.
        calibration: How statistics are collected, if the scaling needs them and none are given.
        recovery: How the factors are trained at the end; None: not at all; "auto": as the preset says.
        plan: A plan in place of a target, from `allocate`; it has its own method.
        statistics: Statistics of this model, from `calibrate`, or their file.
        **options: Where and how to compute (config.RunOptions). Several processes share the matrices.

    Returns:
        The sizes, the plan and the record, which lie in the output directory, too.

    Raises:
        WeLoreError: If the settings cannot work or the model cannot be read. Unfinished work of hours is not deleted:
            it lies in OUTPUT_DIR.work, and the same call continues there, to the same bytes.

    Source: WeLore (arXiv 2407.11239); docs/method.md says what is different.
    """
    started = time.perf_counter()
    context = RunContext.create(**options)
    config = settings_of(CompressionConfig, config, keep=keep)
    reads = model, plan, statistics, calibration, recovery
    plan = Plan.load(plan) if isinstance(plan, str | Path) else plan
    if plan is not None:
        config = _config_of_plan(plan, config)
    with ExitStack() as stack:
        leads = context.processes.is_main
        claim = claimed(output_dir, *reads, overwrite=context.overwrite, marker="config.json", leads=leads)
        stack.enter_context(claim)
        source = _source(model, output_dir, config, context)
        job = with_texts(make_job(source, config, calibration, recovery, plan, statistics, context))
        job = replace(job, context=stack.enter_context(_workspace(job, output_dir)))
        plan, smaller, known = _plan(job, _statistics(job))
        made = {factors_key(a): layer_of(a.name, plan.grids) for a in plan.lrcs}
        moments = LastingMoments(job.context.work, job.prunable if job.collects else [], made)
        numbers = factor_matrices(smaller, plan, known, job.context, moments.release)
        recovered = _recovery(job, smaller, plan, known)
        return _result(job, smaller, plan, recovered, numbers, output_dir, started)


# --- before the work ------------------------------------------------------------------------------------------------


def _config_of_plan(plan: Plan, config: CompressionConfig) -> CompressionConfig:
    default = CompressionConfig()
    if replace(config, max_shard_size=default.max_shard_size, weights=default.weights) != default:
        raise WeLoreError(
            "a plan has its own target, preset, strategy, scaling, storage, split, pruning and patterns: "
            "leave those out"
        )
    if plan.plain and config.weights != AUTO:
        raise WeLoreError(f"the plan is for {ANYWHERE}, an ordinary checkpoint: leave weights out")
    return replace(config, include=plan.include, exclude=plan.exclude)


def _source(model: Any, output_dir: Directory | None, config: CompressionConfig, context: RunContext) -> TensorSource:
    if isinstance(model, nn.Module):
        if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            raise WeLoreError("this model is spread over several devices: load it on one to compress it in memory")
    elif output_dir is None:
        raise WeLoreError("name the directory to write: compress(model, output_dir, ...)")
    source = open_source(model, context, include=config.include, exclude=config.exclude)
    if isinstance(source, CheckpointSource) and output_dir is not None:
        require_unread(output_dir, source.directory)
    return source


def make_job(
    source: TensorSource,
    config: CompressionConfig,
    calibration: CalibrationConfig | None,
    recovery: RecoveryConfig | str | None,
    plan: Plan | None,
    statistics: Statistics | Directory | None,
    context: RunContext,
) -> Job:
    """The complete settings of a compression; WeLoreError for those that cannot work."""
    known, width = open_statistics(statistics, source), None
    experts = None if config.expert_pruning == 0 else require_experts(source, config.expert_pruning)
    fewer = without_experts(source, experts, any_experts(experts))
    if plan is None:
        alone = experts is not None and config.optimize_for == ANYWHERE
        if alone:
            if config.keep is not None:
                raise WeLoreError(f"for {ANYWHERE} take out neurons by keep, or experts by expert_pruning: not both")
            config = replace(config, keep=_numel(fewer.targets) / _numel(source.targets))
        config = resolve(config, has_statistics=known is not None, device=context.device.type)
        grids = grids_of(source, bool(config.split))
        if alone:
            config = replace(config, mlp_pruning=0.0)
        elif config.optimize_for == ANYWHERE:
            width = plain_width(source, config)
        else:
            _check_target(fewer, config, grids, known, _numel(source.targets))
    else:
        experts = _check_plan(plan, source, known)
        grids = dict(plan.grids)
    calibration = resolve_calibration(calibration, config)
    job = Job(source, context, config, calibration, None, plan, known, grids, width, experts)
    removed = None if job.plain or job.removed is None else job.removed - job.in_experts
    mlps = find_mlps(fewer.skeleton, fewer.targets) if config.mlp_pruning == AUTO else []
    if config.mlp_pruning == AUTO and removed is not None and not is_worth_it(mlps, removed):
        job = replace(job, config=replace(config, mlp_pruning=0.0))
    windows = known.generated[0] if known and known.generated else 0
    if job.collects and calibration.dataset == SELF:
        windows = -(-calibration.tokens // (calibration.max_length or MAX_LENGTH))
    preset = PRESETS.get(config.preset or "")
    training = resolve_recovery(recovery, windows, preset=preset is not None and preset.recovery)
    if training is not None:
        training = replace(training, num_tokens=training.num_tokens or calibration.tokens)
    job = replace(job, recovery=training)
    _refuse_unread(job, calibration.dataset)
    return job


def _refuse_unread(job: Job, dataset: Any) -> None:
    """Raise WeLoreError for statistics that nothing reads, and for a text of statistics where none are collected."""
    reads = job.plan or job.recovery or job.counts_outliers or job.config.mlp_pruning or job.config.expert_pruning
    if job.statistics is not None and job.scaling == NONE and not reads:
        raise WeLoreError("nothing here reads the statistics: leave them out, or give scaling kfac")
    if not (job.collects or (isinstance(dataset, str) and dataset == SELF)):
        why = "they are given" if job.statistics is not None else f"scaling {job.scaling} needs none"
        raise WeLoreError(f"dataset is the text for statistics, and {why}: leave it out")


def _numel(targets: Sequence[Target]) -> int:
    return sum(m * n for m, n in (target.shape for target in targets))


def with_texts(job: Job) -> Job:
    """The job with the texts that people wrote; WeLoreError for those, or a tokenizer, that it cannot read."""
    skeleton = job.source.skeleton
    if job.collects:
        job = replace(job, text=draw_text(job.calibration, skeleton, _tokenizer(job), job.context))
    if job.recovery is None or job.recovery.dataset == SELF:
        return job
    options = TextOptions.of(job.calibration, job.context)
    windows = recovery_text(job.recovery, skeleton.config, _tokenizer(job), job.calibration.seed, options)
    require_known_tokens(skeleton, windows)
    return replace(job, recovery_text=windows)


def _check_target(
    source: TensorSource, config: CompressionConfig, grids: Any, known: Statistics | None, dense: int
) -> None:
    """Raise WeLoreError for a target that the shapes do not allow, and for pruning without statistics.

    source: without as many experts as are taken out. dense: parameters of the targeted matrices with them.
    """
    if config.strategy == "owl" and known is None and config.scaling == NONE:
        raise WeLoreError("strategy owl counts outliers by statistics: give statistics, or a scaling that needs them")
    pruning = 0.0 if config.mlp_pruning == AUTO else float(config.mlp_pruning or 0)
    for name, what, share in (("mlp", "neurons", pruning), ("expert", "experts", config.expert_pruning)):
        if share and known is None and config.scaling == NONE:
            raise WeLoreError(
                f"{name}_pruning: {what} are chosen by statistics: give statistics, or a scaling that needs them"
            )
    shapes = [target.shape for target in in_blocks(source.targets, grids)]
    gone = require_neurons(source.name, find_mlps(source.skeleton, source.targets), pruning)
    check_reachable(config, str(config.scaling), shapes, pruned=5 / 6 if pruning else 0, gone=gone, dense=dense)


def _check_plan(plan: Plan, source: TensorSource, statistics: Statistics | None) -> ExpertPruning | None:
    """How the plan takes experts out; WeLoreError unless it was made for these weights, from these statistics."""
    plan.model.check(source.identity, "plan")
    experts = require_same_experts(source, plan.experts) if plan.experts else None
    fewer = without_experts(source, experts, plan.experts)
    shapes = pruned_shapes(fewer, plan.neurons)
    smaller = [replace(target, shape=shapes.get(target.name, target.shape)) for target in fewer.targets]
    plan.check_shapes({target.name: target.shape for target in in_blocks(smaller, plan.grids)})
    if plan.neurons and statistics is None:
        raise WeLoreError("the plan takes neurons out: give the statistics that they were chosen by")
    if plan.scaling != NONE and statistics is None:
        raise WeLoreError(f"the plan has scaling {plan.scaling}: give the statistics that it was made with")
    if plan.scaling != NONE and plan.statistics != json.loads(json.dumps(summary(statistics))):
        raise WeLoreError("the plan was made with other statistics: give those, or make the plan again")
    return experts


def _tokenizer(job: Job) -> Any:
    if job.context.tokenizer is None and isinstance(job.source, CheckpointSource):
        return read_tokenizer(job.source.directory, trust_remote_code=job.context.trust_remote_code)
    if job.context.tokenizer is None:
        raise WeLoreError("a model in memory needs its tokenizer to read or write a text: pass it as tokenizer=...")
    return job.context.tokenizer


@contextmanager
def _workspace(job: Job, output_dir: Directory | None) -> Iterator[RunContext]:
    """The context with a workspace: OUTPUT_DIR.work, or for a model in memory a hidden directory beside the output.

    Nothing tells whether weights in memory are those of an earlier run, so their work never continues.
    """
    rests_on = job.statistics.state if job.statistics else []
    if job.text is not None:  # its statistics are used up for this target
        rests_on = [*job.text.state, as_record(job.config)]
    key = job.scaling, job.grids, job.counts_outliers, rests_on
    output = None if output_dir is None else resolved(output_dir)  # it may be "." or end in a slash
    with ExitStack() as stack:
        lasting = output is not None and isinstance(job.source, CheckpointSource)
        if output is not None and lasting:
            directory = work_directory(output)
            if job.collects:
                require_room(job, directory)
        else:
            directory = Path(tempfile.mkdtemp(prefix="welore-")) if output is None else hidden(output, "memory")
            stack.callback(remove, directory)
        yield stack.enter_context(shared_workspace(directory, job.source, job.context, *key, once=not lasting))


# --- the six steps --------------------------------------------------------------------------------------------------


def _statistics(job: Job) -> Statistics | None:
    """1. The statistics that are given, or collected; of these only what the next steps need is there afterwards."""
    if job.text is None:
        return job.statistics
    context, original, mlps = job.context, job.source.original, job.prunable
    model: Any = original.directory if isinstance(original, CheckpointSource) else original.skeleton

    def load() -> Any:
        return load_model(model, replace(context, device=torch.device("cpu"), tokenizer=tokenizer), apart=True).model

    tokenizer = job.text.tokenizer
    with context.stage("statistics"):
        how: dict[str, Any] = {"plain": job.plain, "width": job.width, "experts": job.experts}
        finish = BlockAnalyzer(original, context, job.scaling, job.grids, mlps, job.counts_outliers, **how)
        statistics = collect(original, job.text, context, load, finish)
        if not job.text.config.measure_losses or job.scaling != KFAC or job.plain:
            return statistics
        return measure_losses(_fewer_experts(job, statistics)[0], load(), job.text, statistics, context)


def _fewer_experts(job: Job, statistics: Statistics | None) -> tuple[TensorSource, dict[str, Remaining]]:
    """The weights without the experts that are taken out, and those that are left."""
    if job.experts is None:
        return job.source, {}
    if job.plan is not None:
        left = dict(job.plan.experts)
    else:
        assert statistics is not None
        left = select_experts(job.source, statistics, job.context, job.experts)
    return without_experts(job.source, job.experts, left), left


def _plan(job: Job, statistics: Statistics | None) -> tuple[Plan, TensorSource, Statistics | None]:
    """2 and 3. The plan, from spectra; the weights and the statistics without the neurons that it prunes."""
    context = job.context
    source, experts = _fewer_experts(job, statistics)
    if job.plan is not None:
        if not job.plan.neurons:
            return job.plan, source, statistics
        assert statistics is not None
        smaller, statistics = prune(source, statistics, job.plan.neurons, context)
        return job.plan, smaller, statistics
    if job.width is not None:
        assert statistics is not None
        with context.stage("mlp pruning"):
            neurons = select_neurons(source, statistics, context, Search(width=job.width))
            smaller, fewer = prune(source, statistics, neurons, context)
            return plain_plan(smaller, job.target, neurons, {}, job.config, summary(statistics)), smaller, fewer
    if job.plain:
        return plain_plan(source, job.target, {}, experts, job.config, summary(statistics)), source, statistics
    pruning = job.config.mlp_pruning
    plan = _allocated(job, source, statistics, {}, experts) if pruning in (0, AUTO) else None
    if statistics is None or pruning == 0:
        assert plan is not None
        return plan, source, statistics
    if plan is None:
        search = Search(float(pruning or 0), multiple=job.config.rank_multiple or 1)
    else:
        most = None if job.removed is None else job.removed - job.in_experts
        search = Search(price=plan.threshold, most=most, multiple=plan.rank_multiple)
    with context.stage("mlp pruning"):
        neurons = select_neurons(source, statistics, context, search)
        if plan is not None and not neurons:
            return plan, source, statistics
        smaller, fewer = prune(source, statistics, neurons, context)
    try:
        return _allocated(job, smaller, fewer, neurons, experts), smaller, fewer
    except WeLoreError as error:
        if plan is None or isinstance(error, DamagedWeightsError):
            raise
        return plan, source, statistics  # without these neurons the target is out of reach


def _allocated(
    job: Job,
    source: TensorSource,
    statistics: Statistics | None,
    neurons: dict[str, Remaining],
    experts: dict[str, Remaining],
) -> Plan:
    """The plan for these weights. Their decompositions are stored for the factors, if they fit beside the result."""
    workspace, grids = job.context.work, grids_of(source, bool(job.config.split))
    targets = in_blocks(source.targets, grids)
    needed = sum(4 * min(shape) ** 2 + 4 * shape[0] * shape[1] for shape in (target.shape for target in targets))
    fit = shutil.disk_usage(workspace.directory).free > 1.2 * needed
    # Neurons are limited so that a number of parameters stays within reach; another target may yet want them all.
    final = fit and job.collects and job.config.keep is not None
    pruned = [mlp for mlp in job.prunable if mlp.name in neurons] if final else []
    moments = LastingMoments(workspace, pruned, {f"{target.key}.values": target.layer for target in targets})
    analyzer = Analyzer(
        source, statistics, job.context, job.scaling, job.counts_outliers, lambda _: fit, moments.release
    )
    with job.context.stage("decompositions"):
        return allocate(analyzer.spectra(grids, neurons, experts), job.config)


def _recovery(job: Job, source: TensorSource, plan: Plan, statistics: Statistics | None) -> Recovery:
    """5. The training of the factors, by all processes."""
    if job.recovery is None or not (plan.ranks or plan.plain):
        return Recovery()
    try:
        windows, predictions = job.recovery_text, None
        if windows is None and statistics is not None:
            windows, predictions = statistics.generated_text(), statistics.teacher()
        assert windows is not None
        known = None if predictions is None else TopK(*predictions)
        options: dict[str, Any] = {"seed": job.calibration.seed, "teacher": _dense_directory(job), "predictions": known}
        with job.context.stage("recovery"):
            return recover(source, plan, windows, job.recovery, job.context, **options)
    except Exception as error:  # whatever it is, the cut is finished and is written; the record tells the reason
        if job.context.processes.size > 1 and not isinstance(error, WeLoreError):
            raise  # the other processes wait for this one
        return failed_recovery(job.recovery, error)


def _dense_directory(job: Job) -> Path:
    """The directory of the dense model; one in memory is saved with the unfinished work."""
    source: Any = job.source
    if isinstance(source, CheckpointSource):
        return source.directory.resolve()
    directory = job.context.work.directory / "dense"
    if not directory.is_dir() and job.context.processes.is_main:
        with atomic_directory(directory) as unfinished:
            source.model.save_pretrained(unfinished)
            _tokenizer(job).save_pretrained(unfinished)
    return directory


def _result(
    job: Job,
    source: TensorSource,
    plan: Plan,
    recovered: Recovery,
    numbers: dict[str, Any],
    output_dir: Directory | None,
    started: float,
) -> CompressionResult:
    """6. The checkpoint, or the model with other layers, written by the process that leads."""
    context = job.context
    record, written = None, None if output_dir is None else resolved(output_dir)  # "." is another directory afterwards
    if context.processes.is_main:
        size = job.config.max_shard_size
        with (
            context.stage("writing"),
            open_sink(source, output_dir, max_shard_size=size, overwrite=context.overwrite) as sink,
        ):
            trained = None if recovered.directory is None else CheckpointSource(recovered.directory)
            factors = stored_factors(context.work, trained, plan.name_in_result)
            if plan.plain and trained is not None:
                source = with_trained(source, plan, trained)
            numbers |= recovered.numbers
            numbers |= write_compressed(source, plan, factors, sink, context.progress, job.config.weights)
            numbers |= {"seconds": time.perf_counter() - started, "stages": context.stages}
            record = _record(plan, job, recovered, numbers)
            _write_companions(source.original, plan, record, sink.directory, context.work.directory)
            context.work.retire()
    context.processes.wait()
    if written is not None:
        record = Record.load(written / RECORD)
    assert record is not None
    return CompressionResult(plan, record, None if output_dir is None else Path(output_dir))


def _write_companions(origin: Any, plan: Plan, record: Record, directory: Path | None, spare: Path) -> None:
    """Record and card beside the weights, and on a model in memory what it writes itself when it is saved.

    spare: a directory for the time of writing, where the result has none.
    """
    record.save((directory or spare) / RECORD)
    if directory is None:
        plan.save(spare / PLAN)
    else:
        write_card(directory, plan.model.name, read_card(origin.directory) if hasattr(origin, "directory") else "")
    compression = None if isinstance(origin, CheckpointSource) else vars(origin.model.config).get("quantization_config")
    if compression is not None:
        remember_companions(compression, directory or spare)


def _record(plan: Plan, job: Job, recovered: Recovery, numbers: dict[str, Any]) -> Record:
    names = "strategy", "scaling", "min_ratio", "allow_growth", "optimize_for", "rank_multiple"
    settings = {name: getattr(plan, name) for name in names} | {
        "preset": job.config.preset,
        "target": dict(plan.target),
        "storage": sorted(set(plan.forms.values())),
        "statistics": dict(plan.statistics),
        "split": len(plan.grids),
        "mlp_pruning": sum(mlp.pruned for mlp in plan.neurons.values()),
        "expert_pruning": next((left.pruned / left.width for left in plan.experts.values()), 0.0),
        "include": list(plan.include),
        "exclude": list(plan.exclude),
        "recovery": recovered.settings,
        "weights": job.config.weights,
    }
    inputs = {"model": plan.model.name, "targets_fingerprint": plan.model.fingerprint}
    return Record("compression", inputs, settings, plan.numbers() | numbers)
