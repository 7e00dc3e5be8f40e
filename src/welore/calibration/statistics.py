"""The statistics by which a truncation is judged: second moments of what enters and leaves every targeted matrix.

y = W x, W (m, n). Inputs A = E[x x^T] (n, n), magnitudes E[|x_j|] (n,), output gradients G = E[g g^T] (m, m), where g
is the gradient at y of the sum over positions of the cross-entropy, with labels sampled from the model. The means of
the inputs are over all tokens that were read, so that a matrix which few of them reach (an expert) weighs little; that
of the gradients is over those that reached it.

A file holds 4 (n^2 + n) bytes for every different input and 4 (m^2 + k) for every matrix; it is read one tensor at a
time, or the part of one that a block of a matrix needs.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from welore.errors import DamagedWeightsError, WeLoreError
from welore.io.atomic import atomic_write
from welore.io.fields import LARGEST, parse_json, refusing, typed
from welore.io.resume import Workspace, file_states
from welore.io.safetensors_stream import TensorInfo, TensorReader, TensorWriter
from welore.layers.block_grid import Grid, read_grids
from welore.layers.expert_names import is_of_expert
from welore.linalg.triangles import ALL, unpack
from welore.models.targets import Target, in_blocks
from welore.records import Identity, Record

GENERATED = "written"  # the tensor of the token ids that the model generated
TEACHER = "teacher.logprobs", "teacher.ids"  # what the model thinks of the text that it generated
TEACHER_DTYPES = torch.float16, torch.int32
# As the file names them.
JSON_FIELDS = "shapes", "counts", "shared", "include", "exclude", "measured", "teacher_size", "grids", "shrinkage"
FORMAT, OLDER = "welore.calibration/3", "welore.calibration/2"  # whose moments are not shrunk
SHRINKAGE, FEW_TOKENS = 0.2, 16_384


def usual_shrinkage(tokens: int) -> float:
    """The shrinkage of moments over so many tokens: a fifth for few, less by the root of their number for more."""
    return SHRINKAGE * min(1.0, (FEW_TOKENS / max(tokens, 1)) ** 0.5)


class StatisticsStore(Protocol):
    """Where the tensors of statistics lie, such as a TensorReader. None stays in memory."""

    def read(self, name: str, part: slice = ALL) -> Tensor:
        """The tensor "LAYER.inputs", "LAYER.magnitudes", "LAYER.outputs", "MATRIX.losses", "written" or "teacher.KIND".

        part: the rows of it that are read; of second moments the columns, too.
        """
        ...


class FileStore(TensorReader):
    """The tensors of a file, each checked when it is read."""

    def read(self, name: str, part: slice = ALL) -> Tensor:
        """The tensor, or a part of it; DamagedWeightsError if it cannot be the mean of what its name says."""
        square = name.endswith((".inputs", ".outputs"))
        tensor = super().read(name) if part == ALL else super().part(name, *((part, part) if square else (part,)))
        diagonal = tensor.diagonal() if square else tensor
        if not bool(torch.isfinite(tensor).all()) or (name != TEACHER[0] and bool((diagonal < 0).any())):
            raise DamagedWeightsError(f"{self.path}: {name} is NaN, infinite or negative: make the statistics again")
        if square and not torch.equal(tensor, tensor.T):
            raise DamagedWeightsError(f"{self.path}: {name} is not symmetric: make the statistics again")
        return tensor


class MemoryStore:
    """Tensors in memory, second moments as `pack` gives them: group -> its tensors."""

    def __init__(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.groups = groups

    def group(self, name: str) -> Mapping[str, Tensor]:
        """A group of tensors."""
        return self.groups[name]

    def read(self, name: str, part: slice = ALL) -> Tensor:
        """One tensor, or a part of it; it lies in the group of its name, those of the text beside each other."""
        head, _, kind = name.rpartition(".")
        group = self.group(head if name in TEACHER else name)
        if "upper" in group:
            return unpack(group, part)
        tensor = group[kind]
        return tensor[part, part] if kind in ("inputs", "outputs") else tensor[part]


class WorkspaceStore(MemoryStore):
    """The tensors of an unfinished run; all of its workspaces lie in the directory of the first."""

    def __init__(self, *workspaces: Workspace) -> None:
        self.workspaces = workspaces

    def group(self, name: str) -> Mapping[str, Tensor]:
        """A group of tensors; OSError if it is damaged: the next run starts anew."""
        for workspace in self.workspaces:
            tensors = workspace.fetch(name)
            if tensors is not None:
                return tensors
        self.workspaces[0].abandon()
        raise OSError(f"{name} in {self.workspaces[0].directory} was damaged: run the same command again")


def reached(
    names: Iterable[str], group: Callable[[str], Mapping[str, Tensor]]
) -> tuple[dict[str, int], dict[str, str]]:
    """Name -> tokens that reached the matrix; and, if anything is known of it, the name under which its inputs lie.

    group: gives the tensors of "NAME.about" (see collect_statistics).
    """
    groups = {name: group(f"{name}.about") for name in names}
    counts = {name: int(tensors["count"]) for name, tensors in groups.items()}
    owners = {name: bytes(tensors["kept_as"].tolist()).decode() for name, tensors in groups.items()}
    return counts, {name: owner for name, owner in owners.items() if owner}


@dataclass(frozen=True)
class Selection:
    """The rows and columns of a statistic that are left, and what they are multiplied by on both sides."""

    indices: Tensor
    weights: Tensor | None = None


@dataclass(frozen=True)
class OverlayStore:
    """Another store, of which some tensors are reduced to a selection of their rows and columns."""

    base: StatisticsStore
    selections: Mapping[str, Selection]

    def read(self, name: str, part: slice = ALL) -> Tensor:
        """One tensor, reduced if it has a selection."""
        selection = self.selections.get(name)
        if selection is None:
            return self.base.read(name, part)
        indices, tensor = selection.indices[part], self.base.read(name)
        tensor = tensor[indices] if tensor.ndim < 2 else tensor[indices][:, indices]
        if selection.weights is None:
            return tensor
        weights = selection.weights[part]
        return (tensor * weights[:, None] * weights).to(tensor.dtype)


@dataclass(frozen=True)
class Statistics:
    """Statistics of the targeted matrices of one model, in the model's order.

    shapes: name -> (m, n). counts: name -> tokens that reached the matrix. shared: name -> the matrix under whose
    name the inputs are stored (itself, or the first that reads the same tensor); without an entry nothing is known of
    it. An expert that no token reached has the average of its layer.
    store: "NAME.inputs", "NAME.magnitudes", "NAME.outputs" and "NAME.losses", float32; "written", int32; "teacher.*".
    include, exclude: the patterns that chose the targets.
    measured: tokens on which the losses of all components were measured, 0 if they were not.
    generated: windows and length of the text that the model generated for it, None where it read other texts only.
    teacher_size: how many log-probabilities of the model are stored after each token of that text.
    grids: layer -> blocks down and across of the matrices whose losses were measured block by block.
    shrinkage: how much less the moments of two different inputs count, where K-FAC and the pruning of neurons use them:
    how inputs go together is the text's, and the sample's chance. Ledoit and Wolf, 2004, with the diagonal as target.
    """

    model: Identity
    shapes: Mapping[str, tuple[int, int]]
    counts: Mapping[str, int]
    shared: Mapping[str, str]
    store: StatisticsStore
    record: Record
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    measured: int = 0
    generated: tuple[int, int] | None = None
    teacher_size: int = 0
    grids: Mapping[str, Grid] = field(default_factory=dict)
    shrinkage: float = 0.0

    def inputs(self, name: str, part: slice = ALL) -> Tensor | None:
        """A (n, n), symmetric, or that of some inputs; zeros if no token reached the matrix, None if it is unknown."""
        return self._statistic(name, "inputs", part)

    def magnitudes(self, name: str, part: slice = ALL) -> Tensor | None:
        """E[|x_j|] (n,), or that of some inputs; zeros if no token reached the matrix, None if it is unknown."""
        return self._statistic(name, "magnitudes", part)

    def outputs(self, name: str, part: slice = ALL) -> Tensor | None:
        """G (m, m), symmetric, or that of some outputs; zeros if no token reached the matrix, None if it is unknown."""
        return self._statistic(name, "outputs", part)

    def knows(self, name: str) -> bool:
        """Whether anything is known of a matrix."""
        return name in self.shared

    def losses(self, name: str) -> Tensor | None:
        """The measured loss of removing each component, (k,), in the order of the values scaled by K-FAC.

        E[(g^T a b^T x)^2] with W = sum of a b^T; None where nothing was measured. name: of a matrix, or of a block.
        """
        key = f"{name}.losses"
        return self.store.read(key) if key in self._measured_losses else None

    def generated_text(self) -> Tensor | None:
        """Token ids (windows, length) that the model generated; None where it read other texts only."""
        return None if self.generated is None else self.store.read(GENERATED).long()

    def teacher(self) -> tuple[Tensor, Tensor] | None:
        """The model's k largest log-probabilities after every token of the generated text, and their ids.

        (windows, length, k) each, float and int32; None where they were not stored.
        """
        if not self.teacher_size or self.generated is None:
            return None
        logprobs, ids = (self.store.read(name) for name in TEACHER)
        return logprobs, ids

    @property
    def state(self) -> list[Any]:
        """Another value after any change of the file, for the key of a workspace."""
        files = [self.store.path] if isinstance(self.store, FileStore) else []
        return [self.record.inputs, self.record.settings, file_states(files)]

    def select(self, shapes: Mapping[str, tuple[int, int]], selections: Mapping[str, Selection]) -> "Statistics":
        """Statistics of smaller matrices: a view, without measured losses, which are those of the original ones.

        shapes: of the matrices that are smaller. selections: name of a tensor of the store -> what is left of it.
        """
        store = OverlayStore(self.store, selections)
        return dataclasses.replace(self, shapes={**self.shapes, **shapes}, store=store, measured=0, grids={})

    def _statistic(self, name: str, kind: str, part: slice) -> Tensor | None:
        if name not in self.shapes:
            return None
        if name not in self.shared:
            return torch.zeros([len(range(size)[part]) for size in self._shape(name, kind)])
        return self.store.read(f"{name if kind == 'outputs' else self.shared[name]}.{kind}", part)

    def _shape(self, name: str, kind: str) -> tuple[int, ...]:
        m, n = self.shapes[name]
        return {"inputs": (n, n), "magnitudes": (n,), "outputs": (m, m)}[kind]

    def layout(self) -> dict[str, TensorInfo]:
        """Name, dtype and shape of every tensor of the file."""
        tensors = {} if self.generated is None else {GENERATED: TensorInfo(torch.int32, self.generated)}
        if self.generated is not None and self.teacher_size:
            shape = (*self.generated, self.teacher_size)
            tensors |= {n: TensorInfo(dtype, shape) for n, dtype in zip(TEACHER, TEACHER_DTYPES, strict=True)}
        for name, owner in self.shared.items():
            for layer, kind in ((name, "outputs"), (owner, "inputs"), (owner, "magnitudes")):
                tensors[f"{layer}.{kind}"] = TensorInfo(torch.float32, self._shape(name, kind))
        return tensors | self._measured_losses

    @cached_property
    def _measured_losses(self) -> dict[str, TensorInfo]:
        reached = [Target(name, self.shapes[name]) for name in self.shared if self.counts[name] and self.measured]
        return {f"{t.name}.losses": TensorInfo(torch.float32, (min(t.shape),)) for t in in_blocks(reached, self.grids)}

    # --- the file ---

    def save(self, path: str | Path) -> None:
        """Write everything to `path`, whole or not at all, one tensor in memory at a time."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in JSON_FIELDS}
        fields |= {GENERATED: self.generated, "record": dataclasses.asdict(self.record)}
        metadata = {"format": FORMAT, "model": self.model.name, "fingerprint": self.model.fingerprint}
        for name, value in fields.items():
            metadata[name] = json.dumps(dict(value) if isinstance(value, Mapping) else value, allow_nan=False)
        layout = self.layout()
        with atomic_write(path) as partial, TensorWriter(partial, layout, metadata) as writer:
            for name in layout:
                writer.write(name, [self.store.read(name).flatten()])

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        """The statistics at `path`, their tensors left in the file; WeLoreError if it is missing or something else."""
        path = Path(path)
        if not path.is_file():
            raise WeLoreError(f"{path} does not exist: make it with `welore calibrate MODEL -o {path}`")
        store = FileStore(path)
        if store.metadata.get("format") not in (FORMAT, OLDER):
            raise WeLoreError(f"{path} holds no statistics: make them with `welore calibrate MODEL -o FILE`")
        with refusing(f"{path} holds no statistics that can be", "make it again"):
            statistics = cls(store=store, **_fields(store.metadata))
            if statistics.layout() != store.entries:
                raise WeLoreError("its tensors are not those that it names")
        return statistics


def _fields(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The fields of Statistics in the metadata of a file; KeyError or WeLoreError for one that is not as it must be."""

    def value(name: str, kind: Any, default: str | None = None) -> Any:
        return typed(parse_json(metadata[name] if default is None else metadata.get(name, default)), kind, name)

    shapes, counts = read_grids(value("shapes", Any), "shapes", LARGEST), value("counts", Mapping[str, int])
    shared, measured = value("shared", Mapping[str, str]), value("measured", int, "0")
    teacher_size = value("teacher_size", int, "0")
    if counts.keys() != shapes.keys() or min([measured, teacher_size, *counts.values()]) < 0:
        raise WeLoreError("its counts are not those of its matrices")
    reached = {name for name, count in counts.items() if count}
    if reached - shared.keys() or not all(map(is_of_expert, shared.keys() - reached)):
        raise WeLoreError("a matrix that tokens reached has no inputs, or one that none reached has some")
    for name, owner in shared.items():
        if owner not in shared or shapes[owner][1] != shapes[name][1]:
            raise WeLoreError(f"{name} has the inputs of {owner}, which are none of its size")
    return {
        "model": Identity(metadata["model"], metadata["fingerprint"]),
        "record": Record.of(value("record", Any)),
        "generated": value(GENERATED, tuple[int, int] | None, "null"),
        "grids": read_grids(value("grids", Any, "{}")),
        "shrinkage": value("shrinkage", float, "0.0" if metadata["format"] == OLDER else None),
        **{"shapes": shapes, "counts": counts, "shared": shared, "measured": measured, "teacher_size": teacher_size},
        **{name: value(name, tuple[str, ...]) for name in ("include", "exclude")},
    }
