"""The verb calibrate: text, of people or of the model itself -> statistics of every targeted matrix."""

import shutil
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor, nn

from welore.calibration.hooks import Losses
from welore.calibration.layerwise import collect_statistics
from welore.calibration.scaling import metric
from welore.calibration.statistics import GENERATED, Statistics, WorkspaceStore
from welore.config import KFAC, MAX_LENGTH, SELF, CalibrationConfig, Dataset, RunOptions, as_record
from welore.data.mixture import Source, draw, parse_mixture, seed_of
from welore.data.self_generated import generate_text
from welore.data.text import TextOptions
from welore.data.windows import digest, given_windows, require_known_tokens
from welore.io.atomic import resolved, work_directory
from welore.io.claim import claimed
from welore.io.context import RunContext
from welore.io.resume import Workspace, restart_key
from welore.layers.block_grid import Grid
from welore.linalg.svd import Factors, factorise
from welore.models.copies import generation_copy
from welore.models.load import load_model
from welore.models.mlp import long_matrices
from welore.models.skeleton import context_length, require_context_length
from welore.models.source import ModelSource, TensorSource, open_source
from welore.models.targets import Target, in_blocks
from welore.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode(False)  # gradients are needed whatever the caller's mode is
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
    config = config or CalibrationConfig()
    config = config if dataset is None else replace(config, dataset=dataset)
    if output is not None:
        path = resolved(output)
        with claimed(path, model, config):
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
    targets = weights.targets  # patterns that match nothing are refused before any work
    net, tokenizer = _load(model, config.dataset, context)
    config = _complete(config, net)
    length, texts = config.max_length or MAX_LENGTH, TextOptions.of(config, context)
    counts, sources = draw(config.dataset, config.num_tokens, tokenizer, length, seed=config.seed, options=texts)
    require_known_tokens(net, *[source.windows for source in sources])
    with _workspace(path, weights, config, context, sources) as workspace:
        job = _Job(weights, targets, net, config, context.within(workspace), workspace)
        started = time.perf_counter()
        if SELF in counts:
            sources.append(_own_text(job, tokenizer, counts[SELF]))
        seconds = time.perf_counter() - started
        ids = torch.cat([source.windows for source in sources])
        statistics = _collect(job, sources, ids, seconds)
        if SELF in counts:
            statistics = replace(statistics, generated=(counts[SELF], length))
        if config.measure_losses:
            statistics = _measure_losses(job, statistics, ids)
        statistics.save(path)


@dataclass(frozen=True)
class _Job:
    """A model, as matrices and as a network, and how it is read; config: with length and dtype filled in."""

    weights: TensorSource
    targets: Sequence[Target]
    net: Any
    config: CalibrationConfig
    context: RunContext
    workspace: Workspace


def _load(model: Any, dataset: Dataset, context: RunContext) -> tuple[Any, Any]:
    """Model and tokenizer, the model on the CPU: weights stay in their mapped file until a block is in work."""
    if isinstance(model, nn.Module) and isinstance(dataset, Tensor):
        return model, context.tokenizer
    loaded = load_model(model, replace(context, device=torch.device("cpu")))
    return loaded.model, loaded.tokenizer


def _complete(config: CalibrationConfig, net: Any) -> CalibrationConfig:
    """The settings with the length of a window and the dtype of the computation."""
    dtype: Any = str(net.dtype).removeprefix("torch.") if config.dtype == "auto" else config.dtype
    if isinstance(config.dataset, Tensor):
        ids = given_windows(config.dataset)
        return replace(config, max_length=ids.shape[1], num_tokens=ids.numel(), dtype=dtype)
    limit = context_length(net.config) or MAX_LENGTH
    if config.max_length is not None:
        require_context_length(config.max_length, limit)
    return replace(config, max_length=config.max_length or min(MAX_LENGTH, limit), dtype=dtype)


def _own_text(job: _Job, tokenizer: Any, count: int) -> Source:
    """Text that the model writes: made once, then stored in the workspace."""
    config, context = job.config, job.context
    stored = job.workspace.fetch(GENERATED)
    if stored is None:
        tokens, seed = count * (config.max_length or MAX_LENGTH), seed_of(config.seed, SELF)
        size, net = replace(config, num_tokens=tokens, seed=seed), generation_copy(job.net, context.device)
        stored = {GENERATED: generate_text(net, tokenizer, size, progress=context.progress).int()}
        job.workspace.store(GENERATED, stored)
    ids = stored[GENERATED].long()
    assert isinstance(config.dataset, str | Mapping)
    return Source(SELF, parse_mixture(config.dataset)[SELF], ids, digest(ids))


@contextmanager
def _workspace(
    path: Path, weights: TensorSource, config: CalibrationConfig, context: RunContext, sources: Sequence[Source]
) -> Iterator[Workspace]:
    """`PATH.work`, which is removed at the end; a killed run leaves it for the next one."""
    read = [source.sha256 for source in sources]
    in_memory = isinstance(weights, ModelSource)  # nothing tells whether such weights are those of an earlier run
    key = None if in_memory else restart_key(weights.state, as_record(config), str(context.device), read)
    workspace = Workspace(work_directory(path), key)
    with workspace.session():
        yield workspace


def _collect(job: _Job, sources: Sequence[Source], ids: Tensor, seconds: float) -> Statistics:
    """Second moments of every targeted matrix, in the workspace; seconds: that the model wrote its text."""
    labelled = replace(job.config, seed=seed_of(job.config.seed, "labels"))
    numbers = collect_statistics(job.net, job.targets, ids, labelled, job.context)
    store = WorkspaceStore(job.workspace)
    counts, shared = {}, {}
    for target in job.targets:
        reached = store.group(f"{target.name}.about")
        counts[target.name] = int(reached["count"])
        if len(reached["kept_as"]):
            shared[target.name] = bytes(reached["kept_as"].tolist()).decode()
    settings = as_record(job.config) | {"device": str(job.context.device)}
    if isinstance(job.config.dataset, str | Path | Mapping):
        mixture = parse_mixture(job.config.dataset)
        settings["dataset"] = [f"{name}:{weight:g}" for name, weight in mixture.items()]
    identity = job.weights.identity
    record = Record(
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
            "matrices": len(job.targets),
            "never_reached": sum(count == 0 for count in counts.values()),
            "seconds_generation": seconds,
            **numbers,
        },
    )
    shapes = {target.name: target.shape for target in job.targets}
    include, exclude = tuple(job.config.include), tuple(job.config.exclude)
    return Statistics(identity, shapes, counts, shared, store, record, include, exclude)


def _measure_losses(job: _Job, statistics: Statistics, ids: Tensor) -> Statistics:
    """The statistics with the losses of all components, measured on a share of the windows."""
    config = job.config
    some = ids[:: max(1, round(1 / config.measure_losses))]
    losses = Workspace(job.workspace.directory / "measured", job.workspace.key)
    losses.open()
    grids = long_matrices(job.weights.skeleton, job.targets) if config.split else {}
    collector = partial(Losses, components=partial(_components, job, statistics, grids))
    context, labelled = job.context.within(losses), replace(config, seed=seed_of(config.seed, "measured"))
    collect_statistics(job.net, job.targets, some, labelled, context, collector=collector)
    return replace(statistics, store=WorkspaceStore(job.workspace, losses), measured=some.numel(), grids=grids)


def _components(
    job: _Job, statistics: Statistics, grids: Mapping[str, Grid], layer: str
) -> Iterable[tuple[Target, Factors]]:
    """All components of a layer's matrix, or of its blocks, in the order in which K-FAC removes them."""
    for target in in_blocks([t for t in job.targets if t.name == layer], grids):
        norm = metric(KFAC, statistics, target)
        if norm is not None:
            W = job.weights.read(target).to(job.context.float64_device)
            factors, device = factorise(W, min(target.shape), metric=norm), job.context.device
            yield target, replace(factors, A=factors.A.to(device), B=factors.B.to(device))
