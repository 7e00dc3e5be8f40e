"""The verb calibrate: text, of people or of the model itself -> statistics of every targeted matrix."""

import dataclasses
import gc
import json
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor, nn

from welore.calibration.hooks import Losses
from welore.calibration.layerwise import TEACHER, Finish, collect_statistics, fast_dtype
from welore.calibration.scaling import metric
from welore.calibration.statistics import GENERATED, Statistics, WorkspaceStore, reached, usual_shrinkage
from welore.config import KFAC, MAX_LENGTH, SELF, CalibrationConfig, Dataset, RunOptions, as_record, settings_of
from welore.data.mixture import Source, draw, parse_mixture, seed_of
from welore.data.self_generated import Texts, generate_text
from welore.data.text import TextOptions
from welore.data.vllm_writer import write_with_vllm
from welore.data.windows import digest, given_windows, require_known_tokens
from welore.errors import WeLoreError
from welore.io.atomic import resolved, work_directory
from welore.io.claim import claimed
from welore.io.context import RunContext, own_modes
from welore.io.pages import give_back
from welore.io.resume import Workspace, restart_key
from welore.layers.block_grid import Grid
from welore.linalg.svd import Decomposition, Factors, decompose
from welore.models.copies import generation_copy
from welore.models.experts import unfused
from welore.models.load import load_model
from welore.models.mlp import long_matrices
from welore.models.skeleton import context_length, require_context_length
from welore.models.source import CheckpointSource, ModelSource, TensorSource, open_source
from welore.models.targets import Target, decomposition_key, in_blocks
from welore.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel


TEACHER_SIZE = 64  # log-probabilities after every token of a text that the model wrote
COLLECTED = "collected"  # in the workspace: all statistics are there, and this is their record


@own_modes()
def calibrate(
    model: "str | Path | PreTrainedModel",
    config: CalibrationConfig | None = None,
    output: str | Path | None = None,
    *,
    dataset: Dataset | None = None,
    **options: Unpack[RunOptions],
) -> Statistics:
    """Collect second moments of the inputs and output gradients of every targeted matrix.

    One decoder block is in memory at a time; a model that writes its own text is in memory as a whole. Finished steps
    are stored in `OUTPUT.work`: the same call after a kill goes on there.

    Args:
        model: hub id, directory, .gguf file or model in memory; the last one needs the option `tokenizer` to read or
            write a text.
        config: text, its length, and the computation.
        output: the file to write. None: a temporary file that lives as long as the returned object.
        dataset: in place of config.dataset: "self" (text that the model writes), a registered name, hub id or file,
            several of them with weights ("wikitext2:1,my.txt:2" or a mapping), a list of strings, a datasets.Dataset,
            or token ids (windows, length), a tensor or a .safetensors file.
        **options: device, progress, cache_dir, revision, tokenizer.

    Returns:
        The statistics, read from the file when they are used: 4 (n^2 + n) bytes for every different input of n
        features, 4 m^2 for every matrix (m, n).

    Raises:
        WeLoreError: the model or the text cannot be read, or the model computes NaN or Inf. Nothing is written.
    """
    context = RunContext.create(**options)
    config = settings_of(CalibrationConfig, config, dataset=dataset)
    if output is not None:
        path = resolved(output)
        with claimed(path, model, config, overwrite=context.overwrite):
            _calibrate(model, config, path, context)
        return Statistics.load(path)
    directory = tempfile.mkdtemp(prefix="welore-")
    try:
        _calibrate(model, config, Path(directory, "statistics.safetensors"), context)
        statistics = Statistics.load(Path(directory, "statistics.safetensors"))
    except BaseException:
        shutil.rmtree(directory)
        raise
    weakref.finalize(statistics.store, shutil.rmtree, directory, ignore_errors=True)
    return statistics


def _calibrate(model: Any, config: CalibrationConfig, path: Path, context: RunContext) -> None:
    """Write the statistics of a model to the file `path`."""
    weights = open_source(model, context, include=config.include, exclude=config.exclude)
    _ = weights.targets  # patterns that match nothing are refused before any work
    net, tokenizer = _load(model, config.dataset, context)
    text = draw_text(config, net, tokenizer, context)
    with _workspace(path, weights, text, context) as context:
        statistics = collect(weights, text, context, lambda: net)
        if config.measure_losses:
            statistics = measure_losses(weights, net, text, statistics, context)
        statistics.save(path)


@dataclass(frozen=True)
class Text:
    """The text of statistics: windows of texts that are there, and how many windows the model writes itself.

    config: with the length of a window and the number of tokens filled in. tokenizer: with which the model writes.
    """

    config: CalibrationConfig
    tokenizer: Any
    sources: tuple[Source, ...]
    own: int

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.config.max_length or MAX_LENGTH

    @property
    def state(self) -> list[Any]:
        """Another value for another text, for the key of a workspace."""
        return [as_record(self.config), [source.sha256 for source in self.sources]]


def draw_text(config: CalibrationConfig, net: Any, tokenizer: Any, context: RunContext) -> Text:
    """The text of statistics; net: the model, which may be on the meta device. WeLoreError if it cannot read it."""
    config = _complete(config, net, context.device)
    length, texts = config.max_length or MAX_LENGTH, TextOptions.of(config, context)
    counts, sources = draw(config.dataset, config.tokens, tokenizer, length, seed=config.seed, options=texts)
    require_known_tokens(net, *[source.windows for source in sources])
    return Text(config, tokenizer, tuple(sources), counts.get(SELF, 0))


def collect(
    weights: TensorSource, text: Text, context: RunContext, load: Callable[[], Any], finish: Finish | None = None
) -> Statistics:
    """Statistics of a model, in the context's workspace; an earlier run with the same key has perhaps left them there.

    load: gives the model, on the CPU. finish: see `collect_statistics`; it stores what is wanted of second moments.
    """
    workspace = context.work
    stored = workspace.fetch(COLLECTED)
    if stored is None:
        job, started = _Job(weights, unfused(load()), text.config, context, workspace), time.perf_counter()
        with context.stage("text"):
            sources = [*text.sources, *([_own_text(job, text.tokenizer, text.own)] if text.own else [])]
            give_back(job.net.parameters())
        record = context.processes.agreed(_collect(job, sources, time.perf_counter() - started, finish))
        stored = {"record": torch.tensor(list(json.dumps(dataclasses.asdict(record)).encode()), dtype=torch.uint8)}
        if context.processes.is_main:
            workspace.store(COLLECTED, stored)
        del job
        gc.collect()  # the model's parts refer to each other
    store = WorkspaceStore(workspace)
    counts, shared = reached([target.name for target in weights.targets], store.group)
    record = Record.of(json.loads(bytes(stored["record"].tolist())))
    return Statistics(
        model=weights.identity,
        shapes={target.name: target.shape for target in weights.targets},
        counts=counts,
        shared=shared,
        store=store,
        record=record,
        shrinkage=usual_shrinkage(record.numbers["tokens"]),
        include=tuple(text.config.include),
        exclude=tuple(text.config.exclude),
        generated=(text.own, text.length) if text.own else None,
        teacher_size=store.group(TEACHER)["ids"].shape[-1] if text.own else 0,
    )


@dataclass(frozen=True)
class _Job:
    """A model, as matrices and as a network, and how it is read; config: with length and dtype filled in."""

    weights: TensorSource
    net: Any
    config: CalibrationConfig
    context: RunContext
    workspace: Workspace


def _load(model: Any, dataset: Dataset, context: RunContext) -> tuple[Any, Any]:
    """Model and tokenizer, the model on the CPU: weights stay in their mapped file until a block is in work."""
    if isinstance(model, nn.Module) and isinstance(dataset, Tensor):
        return model, context.tokenizer
    loaded = load_model(model, replace(context, device=torch.device("cpu")), apart=True)
    return loaded.model, loaded.tokenizer


def _complete(config: CalibrationConfig, net: Any, device: torch.device) -> CalibrationConfig:
    """The settings with the length of a window and the dtype of the computation."""
    dtype = fast_dtype(config.dtype, device)
    if isinstance(config.dataset, Tensor):
        ids = given_windows(config.dataset)
        return replace(config, max_length=ids.shape[1], num_tokens=ids.numel(), dtype=dtype)
    limit = context_length(net.config) or MAX_LENGTH
    if config.max_length is not None:
        require_context_length(config.max_length, limit)
    length = config.max_length or min(MAX_LENGTH, limit)
    return replace(config, max_length=length, num_tokens=config.tokens, dtype=dtype)


def _own_text(job: _Job, tokenizer: Any, count: int) -> Source:
    """Text that the model writes: made once, then stored in the workspace."""
    config, context = job.config, job.context
    stored = job.workspace.fetch(GENERATED)
    if stored is None:
        tokens, seed = count * (config.max_length or MAX_LENGTH), seed_of(config.seed, SELF)
        stored = {GENERATED: _write(job, tokenizer, replace(config, num_tokens=tokens, seed=seed)).int()}
        if context.processes.is_main:
            job.workspace.store(GENERATED, stored)
    ids = stored[GENERATED].long()
    assert isinstance(config.dataset, str | Mapping)
    return Source(SELF, parse_mixture(config.dataset)[SELF], ids, digest(ids))


def _write(job: _Job, tokenizer: Any, size: CalibrationConfig) -> Tensor:
    """Windows that the model writes, by the engine of the settings."""
    context, original = job.context, job.weights.original
    if size.writer != "vllm":
        shared: dict[str, Any] = {"processes": context.processes, "workspace": job.workspace}
        net = generation_copy(job.net, context.device)
        return generate_text(net, tokenizer, size, progress=context.progress, **shared)
    if context.processes.size > 1:
        raise WeLoreError("the writer vllm takes all devices from one process: run this command without a launcher")
    if not isinstance(original, CheckpointSource):
        raise WeLoreError("the writer vllm reads a checkpoint: save the model in memory and name its directory")
    texts, trust = Texts.of(job.net, tokenizer, size), context.trust_remote_code
    return write_with_vllm(original.directory, job.net.config, texts, size, trust_remote_code=trust)


@contextmanager
def _workspace(path: Path, weights: TensorSource, text: Text, context: RunContext) -> Iterator[RunContext]:
    """The context with `PATH.work`, which is removed at the end; a killed run leaves it for the next one."""
    in_memory = isinstance(weights, ModelSource)  # nothing tells whether such weights are those of an earlier run
    key = None if in_memory else restart_key(weights.state, str(context.device), *text.state)
    workspace = Workspace(work_directory(path), key)
    with workspace.session():
        yield context.within(workspace)


def _collect(job: _Job, sources: Sequence[Source], seconds: float, finish: Finish | None) -> Record:
    """Put the second moments of every targeted matrix into the workspace; seconds: that the model wrote its text."""
    ids, targets = torch.cat([source.windows for source in sources]), job.weights.targets
    labelled = replace(job.config, seed=seed_of(job.config.seed, "labels"))
    own = len(sources[-1].windows) if sources[-1].name == SELF else 0
    top_k = TEACHER_SIZE if own else 0
    numbers = collect_statistics(job.net, targets, ids, labelled, job.context, finish=finish, top_k=top_k)
    if 0 < own < len(ids) and job.context.processes.is_main:
        teacher = WorkspaceStore(job.workspace).group(TEACHER)
        job.workspace.store(TEACHER, {name: tensor[-own:] for name, tensor in teacher.items()})
    store = WorkspaceStore(job.workspace)
    never_reached = sum(not store.group(f"{target.name}.about")["count"] for target in targets)
    settings = as_record(job.config) | {"device": str(job.context.device)}
    if isinstance(job.config.dataset, str | Path | Mapping):
        mixture = parse_mixture(job.config.dataset)
        settings["dataset"] = [f"{name}:{weight:g}" for name, weight in mixture.items()]
    identity = job.weights.identity
    return Record(
        "calibration",
        inputs={
            "model": identity.name,
            "fingerprint": identity.fingerprint,
            "sources": [source.to_dict() for source in sources],
        },
        settings=settings,
        numbers={
            "tokens": ids.numel(),
            "windows": len(ids),
            "matrices": len(targets),
            "never_reached": never_reached,
            "seconds_generation": seconds,
            **numbers,
        },
    )


def measure_losses(
    weights: TensorSource, net: Any, text: Text, statistics: Statistics, context: RunContext
) -> Statistics:
    """The statistics with the losses of all components, measured on a share of the windows."""
    config, workspace = text.config, context.work
    own = [statistics.generated_text()] if text.own else []
    ids = torch.cat([*(source.windows for source in text.sources), *(t for t in own if t is not None)])
    some = ids[:: max(1, round(1 / config.measure_losses))]
    losses = Workspace(workspace.directory / "measured", workspace.key)
    if context.processes.is_main:
        losses.open()
    context.processes.wait()
    grids = long_matrices(weights.skeleton, weights.targets) if config.split else {}
    job = _Job(weights, unfused(net), config, context.within(losses), losses)
    collector = partial(Losses, components=partial(_components, job, statistics, workspace, grids))
    labelled = replace(config, seed=seed_of(config.seed, "measured"))
    collect_statistics(job.net, weights.targets, some, labelled, job.context, collector=collector)
    return replace(statistics, store=WorkspaceStore(workspace, losses), measured=some.numel(), grids=grids)


def _components(
    job: _Job, statistics: Statistics, workspace: Workspace, grids: Mapping[str, Grid], layer: str
) -> Iterable[tuple[Target, Factors]]:
    """All components of a layer's matrix, or of its blocks, in the order in which K-FAC removes them.

    workspace: where decompositions may lie, of matrices whose statistics are used up.
    """
    for target in in_blocks([t for t in job.weights.targets if t.name == layer], grids):
        if statistics.counts[layer]:
            W, device = job.weights.read(target).to(job.context.float64_device), job.context.device
            stored = workspace.fetch(decomposition_key(target.name, target.shape))
            known = Decomposition.from_tensors(stored) if stored else decompose(W, metric(KFAC, statistics, target))
            factors = known.factors(W, min(target.shape))
            yield target, replace(factors, A=factors.A.to(device), B=factors.B.to(device))
