"""1 - calibrate: a mixture of texts, or text of the model's own, -> second moments of every targeted matrix."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from welore.calibration.hooks import Components, Losses
from welore.calibration.layerwise import gather, kept
from welore.calibration.scaling import metric
from welore.calibration.statistics import GENERATED, Statistics, WorkspaceStore
from welore.config import KFAC
from welore.data.mixture import SELF, Mixture, Source, draw, given, parse_mixture, seed_of
from welore.data.self_generated import LENGTH, TOKENS, generate_text
from welore.data.windows import digest
from welore.errors import WeLoreError, choose
from welore.io.progress import Progress, silent
from welore.io.resume import Workspace
from welore.layers.block_grid import Grid
from welore.linalg.svd import factorise
from welore.models.copies import writer
from welore.models.load import DTYPES, made_ready
from welore.models.mlp import long_matrices
from welore.models.skeleton import context_length, require_context_length
from welore.models.source import TensorSource, open_source
from welore.models.targets import Target, in_blocks
from welore.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEASURE = 0.25  # share of the windows on which losses are measured


def calibrate(
    model: "str | Path | PreTrainedModel",
    data: Mixture | Tensor,
    out: str | Path,
    *,
    tokenizer: Any = None,
    tokens: int = TOKENS,
    length: int | None = None,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    first: str = "vocabulary",
    batch_size: int = 4,
    dtype: str = "float32",
    whole: bool = False,
    measure: float = MEASURE,
    split: bool = True,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    device: str | None = None,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
    progress: Progress = silent,
) -> Statistics:
    """Gather the statistics of MODEL's targeted matrices and write them to the file `out`; what is returned reads it.

    data: "self" (text that the model writes: no data at all), a text that corpus.read_text knows, or several of them
    with weights ("wikitext2:1,pydoc:2", or a mapping); see mixture.drawn for the part that is read. Or windows
    (windows, length) of token ids of your own. tokens: read in all, in windows of `length` (by default 512, or
    as many as the model reads), drawn by `seed`.
    temperature, top_k, top_p, first: of "self", see generation.generate_text. batch_size: windows in work at once.
    dtype: of the computation; the model writes in its own, on a CPU in float32. whole: see sweep.gather. measure: share
    of the windows on which, when the statistics are there, the loss of cutting every component is measured; 0 leaves
    that out. split: measure along the components of blocks where `compress` cuts blocks (analysis.analyze).
    tokenizer: needed for a model in memory that reads or writes a text.

    One decoder block is in memory at a time (but a model that writes is whole). Finished steps are kept in
    `OUT.work`: the same call after a kill goes on there. Raises WeLoreError before anything is written.
    """
    path = Path(out).resolve()
    _check(path, tokens, LENGTH if length is None else length, batch_size)
    if not 0 <= measure <= 1:
        raise WeLoreError(f"measure is {measure:g}: it is a share of the windows, 0 to 1")
    torch_dtype = choose("dtype", dtype, DTYPES)
    with open_source(model, include=include, exclude=exclude, cache_dir=cache_dir, revision=revision) as weights:
        targets, identity, state = weights.targets, weights.identity, weights.state
        grids = long_matrices(weights.skeleton, targets) if split and measure else {}
    mixture: dict[str, float] = {}
    sources: list[Source] = []
    if isinstance(data, Tensor):
        sources, length, tokens = [given(data)], int(data.shape[-1]), data.numel()
    else:
        mixture = parse_mixture(data)
    net: Any = model
    if mixture or not isinstance(model, nn.Module):
        # On the CPU: the weights stay in their file until a block of them is in work.
        where: dict[str, Any] = {"device": "cpu", "cache_dir": cache_dir, "revision": revision}
        ready = made_ready(model, tokenizer, dtype="auto", label=None, **where)
        net, tokenizer = ready.model, ready.tokenizer
    length = _length(net, length)
    counts: dict[str, int] = {}
    if mixture:
        counts, sources = draw(mixture, tokens, tokenizer, length, seed=seed, cache_dir=cache_dir)
    torch_dtype = net.dtype if torch_dtype == "auto" else torch_dtype
    place = torch.device(device) if device else net.device
    writing = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "first": first}
    settings: dict[str, Any] = {
        "data": [f"{name}:{weight:g}" for name, weight in mixture.items()],
        "tokens": tokens,
        "length": length,
        "seed": seed,
        "generation": writing if SELF in counts else None,
        "batch_size": batch_size,
        "dtype": str(torch_dtype).removeprefix("torch."),
        "measure": measure,
        "split": split,
        "device": str(place),
        "include": list(include),
        "exclude": list(exclude),
    }

    workspace = Workspace(
        path.with_name(path.name + ".work"), json.dumps([state, settings, whole, [source.sha256 for source in sources]])
    )
    workspace.open()
    if isinstance(model, nn.Module):  # nothing tells whether weights in memory are those of an earlier run
        workspace.remove()
        workspace.open()
    try:
        started = time.perf_counter()
        if SELF in counts:
            size = {"tokens": counts[SELF] * length, "length": length, "seed": seed_of(seed, SELF)}
            ids = _written(net, tokenizer, workspace, place, writing | size | {"progress": progress})
            sources.append(Source(SELF, mixture[SELF], ids, digest(ids)))
        generated = time.perf_counter() - started
        ids = torch.cat([source.windows for source in sources])
        _refuse_tokens(net, ids)
        how: dict[str, Any] = {
            "batch_size": batch_size,
            "dtype": torch_dtype,
            "device": place,
            "whole": whole,
            "progress": progress,
        }
        sweep = gather(net, targets, ids, workspace, seed=seed_of(seed, "labels"), **how)
        fields = _finished(targets, workspace)
        record = Record(
            "calibration",
            inputs={
                "model": identity.name,
                "fingerprint": identity.fingerprint,
                "sources": [source.about() for source in sources],
            },
            settings=settings,
            numbers={
                "tokens": ids.numel(),
                "windows": len(ids),
                "matrices": len(targets),
                "never_reached": sum(count == 0 for count in fields["counts"].values()),
                "road": sweep.road,
                "sampled_label_nll": sweep.loss,
                "seconds_generation": generated,
                "seconds_forward": sweep.forward_seconds,
                "seconds_backward": sweep.backward_seconds,
            },
        )
        chosen: dict[str, Any] = {"include": tuple(include), "exclude": tuple(exclude)}
        if SELF in counts:
            chosen["generated"] = (counts[SELF], length)
        found = Statistics(identity, record=record, **fields, **chosen)
        if measure:
            some = ids[:: max(1, round(1 / measure))]
            losses = Workspace(workspace.directory / "measured", workspace.key)
            losses.open()
            with open_source(
                model, include=include, exclude=exclude, cache_dir=cache_dir, revision=revision
            ) as weights:
                collect = partial(Losses, components=partial(_components, weights, found, grids))
                gather(net, targets, some, losses, seed=seed_of(seed, "measured"), collect=collect, **how)
            found = replace(found, store=WorkspaceStore(workspace, losses), measured=some.numel(), grids=grids)
        found.save(path)
    except WeLoreError:
        workspace.remove()
        raise
    workspace.remove()
    return Statistics.load(path)


def _written(model: Any, tokenizer: Any, workspace: Workspace, device: torch.device, how: Mapping[str, Any]) -> Tensor:
    """What the model writes: made once, then kept in the workspace."""
    found = workspace.fetch(GENERATED)
    if found is None:
        found = {GENERATED: generate_text(writer(model, device), tokenizer, **how).int()}
        workspace.store(GENERATED, found)
    return found[GENERATED].long()


def _components(
    weights: TensorSource, statistics: Statistics, grids: Mapping[str, Grid], layer: str
) -> dict[str, Components]:
    """All components of a layer's matrix, or of its blocks, in the order in which K-FAC cuts them."""
    found = {}
    for target in in_blocks([t for t in weights.targets if t.name == layer], grids):
        norm = metric(KFAC, statistics, target)
        if norm is not None:
            factors = factorise(weights.read(target).cpu(), min(target.shape), metric=norm)
            found[target.name] = Components(factors.A, factors.B, target.rows, target.columns)
    return found


# --- what is refused, and what is written down ----------------------------------------------------------------------


def _check(path: Path, tokens: int, length: int, batch_size: int) -> None:
    if path.is_dir():
        raise WeLoreError(f"{path} is a directory: name a file to write")
    for name, value, least in (("tokens", tokens, 1), ("length", length, 2), ("batch_size", batch_size, 1)):
        if value < least:
            raise WeLoreError(f"{name} is {value}: it must be at least {least}")


def _length(model: "PreTrainedModel", wanted: int | None) -> int:
    limit = context_length(model.config) or LENGTH
    if wanted is None:
        return min(LENGTH, limit)
    require_context_length(wanted, limit)
    return wanted


def _refuse_tokens(model: "PreTrainedModel", ids: Tensor) -> None:
    embeddings: Any = model.get_input_embeddings()
    largest, size = int(ids.max()), len(embeddings.weight)
    if largest >= size:
        raise WeLoreError(f"the tokenizer is another model's: it gives token {largest}, this model knows {size}")


def _finished(targets: Sequence[Target], workspace: Workspace) -> dict[str, Any]:
    """What the workspace holds, as fields of Statistics; tensors stay on disk."""
    finished = WorkspaceStore(workspace)
    counts, shared = {}, {}
    for target in targets:
        about = finished.group(kept(target.name, "about"))
        counts[target.name] = int(about["count"])
        if len(about["kept_as"]):
            shared[target.name] = bytes(about["kept_as"].tolist()).decode()
    shapes = {target.name: target.shape for target in targets}
    return {"shapes": shapes, "counts": counts, "shared": shared, "store": finished}
