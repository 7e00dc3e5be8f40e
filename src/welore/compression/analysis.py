"""analyze: the singular values of every targeted matrix of a model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from welore.allocation.spectra import Spectra
from welore.calibration.scaling import Sides, metric, outliers, scaling_of
from welore.calibration.statistics import Statistics
from welore.config import KFAC, NONE, RunOptions, current_name
from welore.errors import WeLoreError
from welore.io.atomic import work_directory
from welore.io.claim import claimed
from welore.io.context import RunContext
from welore.io.progress import Progress
from welore.io.resume import Workspace, restart_key
from welore.layers.block_grid import Grid
from welore.layers.expert_names import is_of_expert, of_all_experts
from welore.layers.remaining import Remaining
from welore.linalg.svd import decompose, working_bytes
from welore.models.mlp import long_matrices
from welore.models.source import TensorSource, open_source
from welore.models.targets import Target, decomposition_key, in_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens that the predicted losses of an expert's matrix count for: the mean of so many squared products of two Gaussian
# numbers is as wrong as it is large.
PREDICTED = 8


def analyze(
    model: "str | Path | PreTrainedModel",
    *,
    statistics: "Statistics | str | Path | None" = None,
    scaling: str | None = None,
    split: bool | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    work_dir: str | Path | None = None,
    output: str | Path | None = None,
    **options: Unpack[RunOptions],
) -> Spectra:
    """Compute the singular values of every targeted matrix, a few matrices in memory at a time.

    Args:
        model: Hub id, directory, .gguf file or a model in memory.
        statistics: Statistics of the model, or their file, from `calibrate`. Outliers are counted with them, too.
        scaling: The scaling of the matrices (none, asvd, whitening, kfac); by default kfac with statistics, else none.
        split: Whether matrices at least twice as long as wide are cut block by block; by default with scaling kfac.
        include: Target only modules that match one of these patterns.
        exclude: Leave modules that match one of these patterns dense.
        work_dir: Where finished values are stored until all are done, so that a killed run continues and several
            processes share the work.
        output: The spectra file to write. The finished values are then stored in OUTPUT.work until it is there.
        **options: Where and how to compute (config.RunOptions).

    Returns:
        The spectra: for W (m, n), min(m, n) values in float64, descending.

    Raises:
        WeLoreError: If the model cannot be read, or the statistics are those of another model.
    """
    context = RunContext.create(**options)
    if output is not None and work_dir is None:
        work_dir = work_directory(Path(output))
    with claimed(output, model, statistics, leads=context.processes.is_main, overwrite=context.overwrite):
        source = open_source(model, context, include=include, exclude=exclude)
        known = open_statistics(statistics, source)
        scaling = current_name(scaling or (NONE if known is None else KFAC))
        grids = grids_of(source, scaling_of(scaling).block_split if split is None else split)
        key = scaling, grids, known and known.state
        shared = nullcontext(context) if work_dir is None else shared_workspace(work_dir, source, context, *key)
        with shared as context:
            spectra = Analyzer(source, known, context, scaling, outliers=known is not None).spectra(grids)
            if output is not None and context.processes.is_main:
                spectra.save(output)
            return spectra


def grids_of(source: TensorSource, split: bool) -> dict[str, Grid]:
    """Layer -> grid of the long matrices, if matrices are split into blocks."""
    return long_matrices(source.skeleton, source.targets) if split else {}


def open_statistics(statistics: "Statistics | str | Path | None", source: TensorSource) -> Statistics | None:
    """The statistics, read from their file if they are a path; WeLoreError if they are another model's."""
    known = Statistics.load(statistics) if isinstance(statistics, str | Path) else statistics
    if known is not None:
        known.model.check(source.identity, "statistics")
        for target in source.targets:
            if known.shapes.get(target.name) != target.shape:
                raise WeLoreError(f"the statistics have no {target.name} of shape {target.shape}: make them again")
    return known


@contextmanager
def shared_workspace(
    directory: str | Path, source: TensorSource, context: RunContext, *key: Any, once: bool = False
) -> Iterator[RunContext]:
    """The context with a workspace, which all processes share (see Workspace.session).

    key: what else its content depends on, as JSON, beside the weights, the device and the versions of the packages.
    once: no later run continues there: weights in memory need not be digested for a key.
    """
    workspace = Workspace(directory, None if once else restart_key(source.state, context.device.type, *key))
    with workspace.session(context.processes):
        yield context.within(workspace)


@dataclass(frozen=True)
class Analyzer:
    """Singular values of targeted matrices; those in the context's workspace are not computed again.

    outliers: whether they are counted, too. keep: whether all that the factors of a matrix need is stored in the
    workspace. stored: is told of every matrix whose results are stored.
    """

    source: TensorSource
    statistics: Statistics | None
    context: RunContext
    scaling: str
    outliers: bool = False
    keep: Callable[[Target], bool] = lambda target: False
    stored: Callable[[Target], None] = lambda target: None
    sides: Sides = field(default_factory=Sides)

    def compute(self, target: Target) -> dict[str, Tensor]:
        """The values of one matrix, "sigma", and its share of "outliers"."""
        workspace = self.context.workspace
        values = workspace.fetch(f"{target.key}.values") if workspace else None
        if values is not None:
            return values
        W = self.source.read(target)
        norm = metric(self.scaling, self.statistics, target, self.sides)
        decomposition = decompose(W.to(self.context.float64_device), norm)
        values = {"sigma": torch.from_numpy(decomposition.values().copy())}
        if self.outliers and self.statistics is not None:
            values["outliers"] = torch.tensor(outliers(W, self.statistics, target), dtype=torch.float64)
        if workspace:
            if self.keep(target):
                workspace.store(decomposition_key(target.name, target.shape), decomposition.tensors())
            workspace.store(f"{target.key}.values", values)
            self.stored(target)
        return values

    def share(self, targets: Sequence[Target], progress: Progress | None = None) -> dict[str, dict[str, Tensor]]:
        """The values of the matrices that are this process's part; the others compute theirs."""
        context = self.context if progress is None else replace(self.context, progress=progress)
        mine = context.processes.share(targets, [t.cost for t in targets])
        memory = [working_bytes(t.shape, scaled=self.scaling != NONE) for t in mine]
        computed = context.map(self.compute, mine, [t.cost for t in mine], "singular values", memory)
        context.processes.wait()
        return {target.name: result for target, result in zip(mine, computed, strict=True)}

    def spectra(
        self,
        grids: Mapping[str, Grid],
        neurons: Mapping[str, Remaining] | None = None,
        experts: Mapping[str, Remaining] | None = None,
    ) -> Spectra:
        """The spectra of all targeted matrices, those with a grid in blocks; neurons, experts: that are left."""
        source, statistics, targets = self.source, self.statistics, in_blocks(self.source.targets, grids)
        values = self.share(targets)
        values = {t.name: values[t.name] if t.name in values else self.compute(t) for t in targets}
        losses = _losses(self.scaling, statistics, targets, values)
        return Spectra(
            model=source.identity,
            values={name: result["sigma"].numpy() for name, result in values.items()},
            shapes={target.name: target.shape for target in targets},
            include=source.include,
            exclude=source.exclude,
            scaling=self.scaling,
            statistics=summary(statistics),
            losses=losses,
            outliers={n: float(result["outliers"]) for n, result in values.items()} if self.outliers else {},
            unreached=tuple(t.name for t in targets if statistics and not statistics.knows(t.layer)),
            grids=grids,
            neurons=neurons or {},
            experts=experts or {},
            unit=scaling_of(self.scaling).unit,
        )


def _losses(
    scaling: str, statistics: Statistics | None, targets: Sequence[Target], values: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, NDArray[np.float64]]:
    """The measured losses of all matrices that were reached, or of none: predicted ones do not compare with them.

    values: of every matrix, "sigma". An expert of which few tokens were measured has partly, one of which none were has
    only the predicted losses, times the ratio of what was measured to what was predicted for all experts of its layer.
    """
    if statistics is None or not scaling_of(scaling).measured:
        return {}
    reached = [t.name for t in targets if statistics.counts.get(t.layer)]
    measured = {name: tensor for name in reached if (tensor := statistics.losses(name)) is not None}
    if not measured or len(measured) < len(reached):
        return {}
    losses = {name: tensor.double().numpy() for name, tensor in measured.items()}
    share = statistics.measured / statistics.record.numbers["tokens"]
    groups: dict[str, list[Target]] = {}
    for target in targets:
        if is_of_expert(target.layer) and statistics.knows(target.layer):
            groups.setdefault(of_all_experts(target.layer), []).append(target)
    for group in groups.values():
        predicted = {t.name: values[t.name]["sigma"].numpy() ** 2 for t in group}
        seen = [t.name for t in group if t.name in losses]
        ratio = sum(losses[n].sum() for n in seen) / (sum(predicted[n].sum() for n in seen) or 1.0)
        for t in group:
            count = share * statistics.counts[t.layer]
            own = count * losses.get(t.name, np.zeros_like(predicted[t.name]))
            losses[t.name] = (own + PREDICTED * ratio * predicted[t.name]) / (count + PREDICTED)
    return losses


def summary(statistics: Statistics | None) -> dict[str, Any]:
    """Inputs and settings of the record of statistics; {} without any."""
    if statistics is None:
        return {}
    return {"inputs": dict(statistics.record.inputs), "settings": dict(statistics.record.settings)}
