"""The statistics of a decoder block, used up as soon as they are complete.

Second moments are large: those of all blocks would take several times the size of the model. Those of one block are in
memory when its matrices are decomposed, and are let go. In the workspace stay the values of every matrix, and what a
plan may ask for later: decompositions, from which factors of any rank are made; of an MLP that may lose neurons second
moments, packed, until it is known how many go.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from welore.calibration.hooks import Collector, Moments
from welore.calibration.statistics import MemoryStore, Statistics, reached, usual_shrinkage
from welore.compression.analysis import Analyzer
from welore.compression.expert_pruning import select_experts, store_losses
from welore.compression.mlp_pruning import Search, refit_layers, select_neurons
from welore.io.context import RunContext
from welore.io.progress import silent
from welore.io.resume import Workspace
from welore.layers.block_grid import Grid
from welore.layers.experts import DOWN
from welore.layers.remaining import is_left
from welore.linalg.triangles import pack
from welore.models.expert_pruning import ExpertPruning
from welore.models.mlp import Mlp
from welore.models.source import TensorSource
from welore.models.targets import Target, in_blocks
from welore.records import Record


@dataclass(frozen=True)
class BlockAnalyzer:
    """Decomposes the matrices of a block by its statistics: `finish` of `collect_statistics`.

    mlps: those that may lose neurons, whose second moments last. outliers: see Analyzer. experts: how many are left of
    every layer; the losses of all are stored, and the others are not decomposed. plain: nothing lasts, and nothing is
    decomposed. width: neurons that are left of every MLP of a plain result; the others are taken out at once.
    """

    source: TensorSource
    context: RunContext
    scaling: str
    grids: Mapping[str, Grid]
    mlps: Sequence[Mlp]
    outliers: bool
    plain: bool = False
    width: int | None = None
    experts: ExpertPruning | None = None

    def __call__(self, names: Sequence[str], collector: Collector, tokens: int) -> None:
        """Use up the sums of the layers of a block."""
        workspace, quiet = self.context.work, replace(self.context, progress=silent)
        statistics, groups = self._statistics(names, collector, tokens)
        left = {} if self.experts is None else select_experts(self.source, statistics, quiet, self.experts)
        targets = [t for t in self.source.targets if t.name in statistics.shapes and is_left(t.name, left)]
        shared, lasting = statistics.shared, self._lasting & {t.name for t in targets} & statistics.shared.keys()
        if self.context.processes.is_main:
            reads = {f"{shared[name]}.{kind}" for name in lasting for kind in ("inputs", "magnitudes")}
            needed = reads | {f"{name}.outputs" for name in lasting}
            for name in sorted(needed) + [f"{name}.about" for name in names]:
                workspace.store(name, groups[name])
        if self.width is not None:
            with self.context.stage("mlp pruning"):
                neurons = select_neurons(self.source, statistics, self.context, Search(width=self.width))
                refit_layers(self.source, statistics, neurons, self.context)
        if self.plain:
            return
        common = self.source, statistics, self.context, self.scaling, self.outliers
        with self.context.stage("decompositions"):
            analyzer = Analyzer(*common, keep=lambda target: target.layer not in self._lasting)
            analyzer.share(in_blocks(targets, self.grids), silent)

    @property
    def compare(self) -> Callable[[Sequence[str], Moments, int], None] | None:
        """Stores the losses of some experts of a layer, whose sums stay; None if no experts are compared."""
        return None if self.experts is None or self.plain else self._compare

    def _compare(self, names: Sequence[str], moments: Moments, tokens: int) -> None:
        assert self.experts is not None
        downs, copied = [name for name in names if name.endswith(f".{DOWN}")], copy.copy(moments)
        copied.sums = {key: total.clone() for key, total in moments.sums.items() if key[0] in downs}
        statistics, _ = self._statistics(downs, copied, tokens)
        store_losses(self.source, statistics, replace(self.context, progress=silent), self.experts)

    @cached_property
    def _lasting(self) -> set[str]:
        """The layers whose second moments last."""
        return set() if self.plain else {layer.name for mlp in self.mlps for layer in mlp.layers}

    def _statistics(
        self, names: Sequence[str], collector: Collector, tokens: int
    ) -> tuple[Statistics, dict[str, dict[str, Tensor]]]:
        """Those of some layers, and the groups that they are made of; the sums are used up."""
        groups: dict[str, dict[str, Tensor]] = {}
        for name in names:
            for kind, group in collector.statistics(name, tokens):
                if kind in ("inputs", "outputs"):
                    # What is stored of gradients may be rounded: they are damped by a tenth of their mean.
                    group = pack(group[kind], rounded=kind == "outputs" and name in self._lasting)
                groups[f"{name}.{kind}"] = group
        counts, shared = reached(names, groups.__getitem__)
        shapes = {target.name: target.shape for target in self.source.targets if target.name in counts}
        record = Record("calibration", {}, {}, {})
        known, shrinkage = MemoryStore(groups), usual_shrinkage(tokens)
        statistics = Statistics(self.source.identity, shapes, counts, shared, known, record, shrinkage=shrinkage)
        return statistics, groups


@dataclass(frozen=True)
class LastingMoments:
    """The second moments of MLPs in the workspace, which are deleted when all that is made of them is stored.

    made: group that is made of moments -> the layer whose matrix, or block of it, it is of.
    """

    workspace: Workspace
    mlps: Sequence[Mlp]
    made: Mapping[str, str]

    @cached_property
    def _around(self) -> dict[str, tuple[Mlp, list[str]]]:
        """Layer -> the MLP around it, and the groups that are made of the moments of that."""
        mlps = {layer.name: mlp for mlp in self.mlps for layer in mlp.layers}
        groups: dict[str, list[str]] = {mlp.name: [] for mlp in self.mlps}
        for group, layer in self.made.items():
            if layer in mlps:
                groups[mlps[layer].name].append(group)
        return {layer: (mlp, groups[mlp.name]) for layer, mlp in mlps.items()}

    def release(self, target: Target) -> None:
        """Delete the moments of the MLP around a matrix if nothing needs them any more."""
        if target.layer not in self._around:
            return
        mlp, groups = self._around[target.layer]
        if all(map(self.workspace.holds, groups)):
            for layer in mlp.layers:
                self.workspace.drop(f"{layer.name}.outputs")
            for kind in ("inputs", "magnitudes"):  # what the other layers read is small, and perhaps not theirs alone
                self.workspace.drop(f"{mlp.down_layer.name}.{kind}")
