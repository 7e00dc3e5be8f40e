"""1 - analyze: the singular values of every targeted matrix of a model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from welore.allocation.neurons import Neurons
from welore.allocation.plan import Plan
from welore.allocation.spectra import Spectra
from welore.calibration.scaling import metric, outliers
from welore.calibration.statistics import Statistics
from welore.config import KFAC, NONE
from welore.errors import WeLoreError
from welore.io.checkpoint import check_finite
from welore.io.parallel import ALONE, Processes, parallel_map, team
from welore.io.progress import Progress, silent
from welore.io.resume import Workspace
from welore.layers.block_grid import Grid
from welore.linalg.svd import reduce, singular_values
from welore.models.mlp import long_matrices
from welore.models.source import TensorSource, open_source
from welore.models.targets import Target, in_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def analyze(
    model: "str | Path | PreTrainedModel",
    *,
    scaling: str = NONE,
    calibration: "Statistics | str | Path | None" = None,
    split: bool | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    cache_dir: str | Path | None = None,
    revision: str | None = None,
    device: str | None = None,
    workers: int | None = None,
    work_dir: str | Path | None = None,
    progress: Progress = silent,
) -> Spectra:
    """Spectra of MODEL (hub id, directory, .gguf file or a model in memory), a few matrices in memory at a time.

    scaling: of the matrices scaled by the statistics of a calibration (scaling.SCALINGS); with a calibration the
    outliers are counted too. split: matrices at least twice as long as wide in blocks (targets.long_matrices), each
    for itself; by default where the scaling is kfac. include, exclude: see `targets.find_targets`. device: where the
    values are computed. workers: matrices at once, default one per core. work_dir: finished values are kept there until
    all are done, so that a killed run continues, and the processes of a launcher share it.
    """
    with open_source(model, include=include, exclude=exclude, cache_dir=cache_dir, revision=revision) as weights:
        common: dict[str, Any] = {"device": device, "workers": workers, "progress": progress}
        common |= {"scaling": scaling, "calibration": opened_calibration(calibration, weights)}
        common |= {"grids": grids_of(weights, split, scaling)}
        if work_dir is None:
            return analyze_weights(weights, **common)
        about = scaling, common["grids"], summary(common["calibration"])
        with shared_workspace(work_dir, weights, *about) as (workspace, crew):
            return analyze_weights(weights, workspace=workspace, crew=crew, **common)


def grids_of(weights: TensorSource, split: bool | None, scaling: str) -> dict[str, Grid]:
    """Layer -> grid of what is split in blocks: the long matrices, or nothing. split: as in `analyze`."""
    wanted = scaling == KFAC if split is None else split
    return long_matrices(weights.skeleton, weights.targets) if wanted else {}


def opened_calibration(calibration: "Statistics | str | Path | None", weights: TensorSource) -> Statistics | None:
    """The calibration, read from its file if it is a path; WeLoreError if it is one of another model."""
    found = Statistics.load(calibration) if isinstance(calibration, str | Path) else calibration
    if found is not None:
        found.model.check(weights.identity, "calibration")
    return found


def check_plan(plan: Plan, weights: TensorSource, calibration: Statistics | None) -> None:
    """Raise WeLoreError unless the plan was made for these weights, and its ranks from this calibration."""
    plan.model.check(weights.identity, "plan")
    if plan.scaling == NONE:
        return
    if calibration is None:
        raise WeLoreError(f"the plan has scaling {plan.scaling}: give the calibration that it was made with")
    if plan.statistics != json.loads(json.dumps(summary(calibration))):
        raise WeLoreError("the plan was made with another calibration: give that one, or make the plan again")


@contextmanager
def shared_workspace(
    directory: str | Path, weights: TensorSource, *about: Any
) -> Iterator[tuple[Workspace, Processes]]:
    """The workspace of a run over `weights`, and the processes that share it; removed when the run has ended well.

    about: what else its content depends on, as JSON. A killed run leaves it for the next one. A mistake of the user
    (WeLoreError) leaves nothing behind.
    """
    crew, workspace = team(), Workspace(directory, json.dumps([weights.state, *about]))
    if crew.is_main:
        workspace.open()
    crew.wait()  # below: only what `open` has made or found to be ours is ever removed
    try:
        yield workspace, crew
        crew.wait()
    except WeLoreError:
        workspace.remove()
        raise
    if crew.is_main:
        workspace.remove()


def analyze_weights(
    weights: TensorSource,
    *,
    scaling: str = NONE,
    calibration: Statistics | None = None,
    grids: Mapping[str, Grid] | None = None,
    neurons: Mapping[str, Neurons] | None = None,
    workspace: Workspace | None = None,
    crew: Processes = ALONE,
    keep_reductions: bool = False,
    device: str | None = None,
    workers: int | None = None,
    progress: Progress = silent,
) -> Spectra:
    """Singular values of every targeted matrix; device: where they are computed, default where the matrix is.

    workspace: finished matrices are taken from there and put there; keep_reductions: with what the factors need,
    computed on the CPU. scaling, calibration: see `analyze`. grids: of what is split in blocks. neurons: what is left
    of the MLPs in `weights`, where neurons were taken out.
    """
    grids = grids or {}
    targets = in_blocks(weights.targets, grids)

    def compute(target: Target) -> dict[str, Tensor]:
        found = workspace.fetch(f"{target.key}.values") if workspace else None
        if found is not None:
            return found
        W = weights.read(target)
        check_finite(target.name, W)
        norm = metric(scaling, calibration, target)
        if workspace and keep_reductions:
            reduction = reduce(W, norm)
            sigma = reduction.values()
            workspace.store(f"{target.key}.reduction", reduction.tensors())
        else:
            sigma = singular_values(W.to(device) if device else W, norm)
        found = {"sigma": torch.from_numpy(sigma.copy())}
        if calibration:
            found["outliers"] = torch.tensor(outliers(W, calibration, target), dtype=torch.float64)
        if workspace:
            workspace.store(f"{target.key}.values", found)
        return found

    mine = crew.share(targets)
    found = parallel_map(
        compute, mine, [t.cost for t in mine], workers=workers, progress=progress, label="singular values"
    )
    mine_by_name = {target.name: values for target, values in zip(mine, found, strict=True)}
    crew.wait()
    every = {t.name: mine_by_name[t.name] if t.name in mine_by_name else compute(t) for t in targets}
    return Spectra(
        model=weights.identity,
        values={name: values["sigma"].numpy() for name, values in every.items()},
        shapes={target.name: target.shape for target in targets},
        include=weights.include,
        exclude=weights.exclude,
        scaling=scaling,
        statistics=summary(calibration),
        losses=_losses(scaling, calibration, targets),
        outliers={name: float(values["outliers"]) for name, values in every.items()} if calibration else {},
        unreached=tuple(t.name for t in targets if not calibration.counts.get(t.layer)) if calibration else (),
        grids=grids,
        neurons=neurons or {},
    )


def _losses(scaling: str, calibration: Statistics | None, targets: Sequence[Target]) -> dict[str, NDArray[np.float64]]:
    """The losses that the calibration measured: of all matrices that it reached, or of none, for they are no measure
    of predicted ones; {} too where it measured along other directions than those that are cut (another split).
    """
    if calibration is None or scaling != KFAC:
        return {}
    reached = [t.name for t in targets if calibration.counts.get(t.layer)]
    found = {name: losses for name in reached if (losses := calibration.losses(name)) is not None}
    return {name: losses.double().numpy() for name, losses in found.items()} if len(found) == len(reached) else {}


def summary(calibration: Statistics | None) -> dict[str, Any]:
    """What a calibration rests on, without its statistics; {} for none."""
    if calibration is None:
        return {}
    return {"inputs": dict(calibration.record.inputs), "settings": dict(calibration.record.settings)}
