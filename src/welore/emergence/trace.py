"""The artefact TRACE: what is recorded while a model is pre-trained, a directory of safetensors and JSON lines.

TRACE/trace.jsonl                 a header, then a line per checkpoint: step, tokens, learning rate, held-out loss
TRACE/step-00000120.safetensors   the arrays of a checkpoint, of every matrix, float32
TRACE/work/                       gradients and bases that later checkpoints are compared with; removed at the end

numpy only. Shapes: T checkpoints, W (m, n), k = min(m, n). The arrays of a checkpoint are written before its line: an
interrupted run leaves a shorter trace, not a broken one.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from welore.allocation.plan import Plan
from welore.allocation.solver import allocate
from welore.allocation.spectra import Spectra
from welore.errors import WeLoreError
from welore.io.atomic import atomic_write
from welore.io.fields import LARGEST, parse_json, refusing, typed
from welore.layers.block_grid import read_grids
from welore.records import Identity

Array = NDArray[np.float64]
FORMAT, LINES, WORK = "welore.trace/1", "trace.jsonl", "work"
VALUES = 100  # singular values of a gradient that are recorded
RANKS = (4, 16)  # of the subspaces that are compared
ERR = 0.5  # the rank reduction whose threshold separates LRCs from N-LRCs
COSINE, OVERLAPS = "cosine", {rank: f"overlap{rank}" for rank in RANKS}
COMPARED = (COSINE, *OVERLAPS.values())
SAME, OTHER = "same", "other"
COLUMNS = {"steps": "step", "tokens": "tokens", "learning_rate": "learning_rate", "held_out_loss": "held_out_loss"}


@dataclass(frozen=True)
class Matrix:
    """The record of one matrix; T checkpoints, k its full rank.

    gradient: (T, min(k, 100)) largest singular values; gradient_energy: (T,) squared sum of all k of them.
    weight, change: (T, k) singular values of W and of W - W_0.
    same, other: each of COMPARED -> (T, T), symmetric. `same` compares the gradients of one batch at two steps, so its
    diagonal is 1; `other` those of two batches. The diagonal of `other`, two batches at one step, is the noise ceiling.
    """

    shape: tuple[int, int]
    gradient: Array
    gradient_energy: Array
    weight: Array
    change: Array
    same: Mapping[str, Array]
    other: Mapping[str, Array]

    @property
    def full_rank(self) -> int:
        """k = min(m, n)."""
        return min(self.shape)

    @cached_property
    def top1_energy(self) -> Array:
        """Share of the gradient's squared norm in its largest singular value, (T,); 0 of a gradient that is zero."""
        return np.divide(1, self.stable_rank, out=np.zeros_like(self.stable_rank), where=self.stable_rank > 0)

    @cached_property
    def stable_rank(self) -> Array:
        """Of the gradient, (T,): its squared norm over its squared largest singular value."""
        return self.gradient_energy / np.maximum(self.gradient[:, 0] ** 2, 1e-300)


@dataclass(frozen=True)
class Trace:
    """A whole trace; steps, tokens, learning_rate, held_out_loss: (T,); matrices in the model's order.

    header: name of the run, fingerprint of the initial model, shapes.
    """

    header: Mapping[str, Any]
    steps: Array
    tokens: Array
    learning_rate: Array
    held_out_loss: Array
    matrices: Mapping[str, Matrix]

    def spectra(self, at: int = -1) -> Spectra:
        """The singular values of the weights at checkpoint number `at`."""
        step = int(self.steps[at])
        identity = Identity(f"{self.header['name']}, step {step}", f"{self.header['fingerprint']}-{step}")
        values = {name: matrix.weight[at] for name, matrix in self.matrices.items()}
        return Spectra(identity, values, {name: matrix.shape for name, matrix in self.matrices.items()})

    @cached_property
    def plans(self) -> list[Plan]:
        """The paper's plan at ERR 50 % for the weights of every checkpoint."""
        return [allocate(self.spectra(at), rank_reduction=ERR) for at in range(len(self.steps))]

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """The trace in the directory `path`, or beside the file `path`; WeLoreError if it is missing or broken."""
        directory = Path(path).parent if Path(path).name == LINES else Path(path)
        header, *lines = read_lines(directory)
        if not lines:
            raise WeLoreError(f"{directory} holds a trace without a single checkpoint")
        with refusing(f"the trace in {directory} is broken", "record it again"):
            checkpoints = [load_file(directory / file_of(line["step"])) for line in lines]
            for number, arrays in enumerate(checkpoints):
                if bad := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
                    raise WeLoreError(f"{bad[0]} of checkpoint {number} is NaN or infinite")
            shapes = read_grids(header["shapes"], "shapes", LARGEST)
            matrices = {name: _matrix(name, shape, checkpoints) for name, shape in shapes.items()}
            columns = {
                name: np.array([typed(line[key], float, key) for line in lines]) for name, key in COLUMNS.items()
            }
            trace = cls(header, **columns, matrices=matrices)
            for at in range(len(lines)):
                trace.spectra(at)  # which checks that they are singular values
            return trace


class Writer:
    """A trace that grows by a checkpoint at a time, and continues an interrupted one.

    directory: made if it does not exist. header: name of the run, fingerprint of the initial model.
    at: keep the checkpoints up to this step; None: begin anew.
    """

    def __init__(
        self, directory: Path, header: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]], at: int | None = None
    ) -> None:
        self.directory, self.work = directory, directory / WORK
        first = {"format": FORMAT, **header, "shapes": {name: list(shape) for name, shape in shapes.items()}}
        self.lines: list[dict[str, Any]] = [first]
        if at is None:
            shutil.rmtree(directory, ignore_errors=True)
        else:
            before, *lines = read_lines(directory)
            if before != json.loads(json.dumps(first)):
                raise WeLoreError(f"the trace in {directory} is of another run: choose another directory")
            self.lines += [line for line in lines if line["step"] <= at]
        self.work.mkdir(parents=True, exist_ok=True)
        with atomic_write(directory / LINES) as partial:
            partial.write_text("".join(map(_line, self.lines)), encoding="utf-8")

    @property
    def steps(self) -> list[int]:
        """The recorded checkpoints."""
        return [line["step"] for line in self.lines[1:]]

    def append(self, line: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        """One more checkpoint: its numbers, and its arrays by "NAME:FIELD"."""
        with atomic_write(self.directory / file_of(line["step"])) as partial:
            save_file({k: np.asarray(v, dtype=np.float32, order="C") for k, v in arrays.items()}, partial)
        with (self.directory / LINES).open("a", encoding="utf-8") as file:
            file.write(_line(line))
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(dict(line))


def finish(directory: Path) -> None:
    """Remove the work directory, and arrays whose line was never written."""
    shutil.rmtree(directory / WORK, ignore_errors=True)
    _, *lines = read_lines(directory)
    for path in set(directory.glob("step-*.safetensors")) - {directory / file_of(line["step"]) for line in lines}:
        path.unlink()


def read_lines(directory: Path) -> list[dict[str, Any]]:
    """Header and checkpoints of a trace; an incomplete last line of an interrupted run is skipped."""
    path = directory / LINES
    if not path.is_file():
        raise WeLoreError(f"{directory} holds no trace: make one with `welore pretrain`")
    lines: list[dict[str, Any]] = []
    for text in path.read_bytes().decode(errors="replace").splitlines(keepends=True):
        try:
            lines.append(typed(parse_json(text), dict, "it") if text.endswith("\n") else {})
            if len(lines) > 1 and lines[-1]:
                typed(lines[-1].get("step"), int, "step")
        except ValueError as error:
            raise WeLoreError(f"{path}, line {len(lines) + 1} is not JSON ({error}): record the trace again") from error
    lines = [line for line in lines if line]
    if not lines or lines[0].get("format") != FORMAT:
        raise WeLoreError(f"{path} is no trace that this version reads ({FORMAT})")
    return lines


def file_of(step: int) -> str:
    """Name of the file with a checkpoint's arrays."""
    return f"step-{step:08d}.safetensors"


def key(name: str, field: str, pair: str = "") -> str:
    """Name of an array in the file of a checkpoint."""
    return f"{name}:{field}:{pair}" if pair else f"{name}:{field}"


def _line(content: Mapping[str, Any]) -> str:
    return json.dumps(content, allow_nan=False) + "\n"


def _matrix(name: str, shape: tuple[int, int], checkpoints: Sequence[Mapping[str, NDArray[Any]]]) -> Matrix:
    def stacked(field: str) -> Array:
        return np.stack([arrays[key(name, field)] for arrays in checkpoints]).astype(np.float64)

    def symmetric(field: str, pair: str) -> Array:
        square = np.zeros((len(checkpoints), len(checkpoints)))
        for i, arrays in enumerate(checkpoints):
            square[i, : i + 1] = square[: i + 1, i] = arrays[key(name, field, pair)]
        return square

    fields = {field: stacked(field) for field in ("gradient", "gradient_energy", "weight", "change")}
    if (
        fields["gradient"].ndim != 2
        or fields["gradient_energy"].ndim != 1
        or fields["change"].shape[1:] != (min(shape),)
    ):
        raise WeLoreError(f"{name} has arrays of other shapes than its own")
    same, other = ({field: symmetric(field, pair) for field in COMPARED} for pair in (SAME, OTHER))
    return Matrix(shape, **fields, same=same, other=other)
