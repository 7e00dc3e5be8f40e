"""Singular values of every targeted matrix of a model: the artefact `spectra.safetensors`.

numpy only. Shapes: W (m, n) = (out_features, in_features); full_rank k = min(m, n); sigma (k,) descending.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from welore.config import NONE, PLAIN, ScalingName, current_name
from welore.errors import WeLoreError
from welore.io.atomic import atomic_write
from welore.io.fields import LARGEST, parse_json, refusing, typed
from welore.layers.block_grid import Grid, block_names, read_grids
from welore.layers.remaining import Remaining, as_json, read_remaining
from welore.linalg.spectrum import Values, normalise
from welore.records import Identity

FORMAT = "welore.spectra/1"
LOSSES = ".losses"  # after a name in the file
LOSS, RELATIVE = "loss", "relative"  # units of squared values


@dataclass(frozen=True)
class Spectra:
    """Singular values of the targeted matrices of one model, in the model's order.

    values: name -> sigma (k,), float64, descending; shapes: name -> (m, n).
    include, exclude: the patterns that chose the targets.
    scaling: the scaling of the matrices (calibration.scaling.SCALINGS); "none" is the weights themselves.
    unit: "loss" if the squares of the values are losses in one unit for the whole model, else "relative": they compare
    values of one matrix only. By default that of the scaling.
    statistics: inputs and settings of the record of the statistics; empty without them.
    outliers: name -> share of the weights whose |W_ij| rms(x_j) exceeds five times the mean of the matrix.
    losses: name -> measured loss of removing each value, (k,); the squares of the values only predict it.
    unreached: names of the matrices that no token of the statistics reached: the loss of removing a value is unknown.
    grids: layer -> blocks down and across of the matrices that are split; each block is a matrix of its own here.
    neurons, experts: MLP or mixture -> those that were left of it when the values were computed.
    """

    model: Identity
    values: Mapping[str, Values]
    shapes: Mapping[str, tuple[int, int]]
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    scaling: str = NONE
    statistics: Mapping[str, Any] = field(default_factory=dict)
    outliers: Mapping[str, float] = field(default_factory=dict)
    losses: Mapping[str, Values] = field(default_factory=dict)
    unreached: tuple[str, ...] = ()
    grids: Mapping[str, Grid] = field(default_factory=dict)
    neurons: Mapping[str, Remaining] = field(default_factory=dict)
    experts: Mapping[str, Remaining] = field(default_factory=dict)
    unit: str = ""

    def __post_init__(self) -> None:
        if not self.unit:
            object.__setattr__(self, "unit", RELATIVE if self.scaling in PLAIN else LOSS)

        for name, values in (*self.values.items(), *self.losses.items()):
            if name not in self.shapes or values.shape != (min(self.shapes[name]),):
                raise WeLoreError(f"{name} has {values.size} values, not as many as its shape says")
            with np.errstate(over="ignore"):  # the squares are summed up by every strategy
                if not np.isfinite((values**2).sum()) or (values < 0).any():
                    raise WeLoreError(f"{name} has values that are NaN, infinite or negative")
        for name, values in self.values.items():
            if (np.diff(values) > 0).any():
                raise WeLoreError(f"the singular values of {name} ascend")
        blocks = [name for layer, grid in self.grids.items() for name in block_names(layer, grid)]
        if lost := {*self.unreached, *self.outliers, *blocks} - set(self.values):
            raise WeLoreError(f"the spectra name {min(lost)} and have no values of it")
        shares = self.outliers.values()
        if (shares and len(shares) < len(self.values)) or not all(0 <= share <= 1 for share in shares):
            raise WeLoreError("the spectra have no share of outliers, from 0 to 1, of some matrices")

    def normalised(self) -> dict[str, Values]:
        """Name -> normalised spectrum s (k,), see `normalise`."""
        return {name: normalise(sigma) for name, sigma in self.values.items()}

    def save(self, path: str | Path) -> None:
        """Write the values (float64) with the model's identity in the file's metadata."""
        metadata = {
            "format": FORMAT,
            "model": self.model.name,
            "fingerprint": self.model.fingerprint,
            "shapes": json.dumps({name: list(shape) for name, shape in self.shapes.items()}),
            "include": json.dumps(self.include),
            "exclude": json.dumps(self.exclude),
            "scaling": self.scaling,
            "unit": self.unit,
            "calibration": json.dumps(dict(self.statistics)),
            "outliers": json.dumps(dict(self.outliers)),
            "unreached": json.dumps(self.unreached),
            "grids": json.dumps(dict(self.grids)),
            "neurons": json.dumps(as_json(self.neurons)),
            "experts": json.dumps(as_json(self.experts)),
        }
        arrays = {**self.values, **{name + LOSSES: losses for name, losses in self.losses.items()}}
        with atomic_write(path) as partial:
            content = save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata)
            partial.write_bytes(_ordered(content))

    @classmethod
    def load(cls, path: str | Path) -> "Spectra":
        """The spectra at `path`; WeLoreError if the file is missing, broken or something else."""
        if not Path(path).is_file():
            raise WeLoreError(f"{path} does not exist: make it with `welore analyze MODEL -o {path}`")
        sentence, advice = f"{path} is not a readable safetensors file of spectra", "make it with `welore analyze`"
        with refusing(sentence, advice), safe_open(path, "np") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
            if metadata.get("format") != FORMAT:
                raise WeLoreError("it holds no spectra")
            fields = _read(metadata)
            losses = [name for name in fields["shapes"] if name + LOSSES in names]
            if not names or names != {*fields["shapes"], *(name + LOSSES for name in losses)}:
                raise WeLoreError("its matrices are not those that it names")
            values = {name: _read_array(file, name) for name in fields["shapes"]}
            measured = {name: _read_array(file, name + LOSSES) for name in losses}
            return cls(values=values, losses=measured, **fields)


def _read(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The fields of spectra in the metadata of a file; KeyError or WeLoreError for one that is not as it must be."""

    def value(name: str, kind: Any, default: str) -> Any:
        return typed(parse_json(metadata.get(name, default)), kind, name)

    return {
        "model": Identity(metadata["model"], metadata["fingerprint"]),
        "shapes": read_grids(parse_json(metadata["shapes"]), "shapes", LARGEST),
        **{name: value(name, tuple[str, ...], "[]") for name in ("include", "exclude", "unreached")},
        "scaling": typed(current_name(metadata.get("scaling", NONE)), ScalingName, "scaling"),
        "unit": typed(metadata.get("unit", ""), Literal["", LOSS, RELATIVE], "unit"),
        "statistics": value("calibration", Mapping[str, Any], "{}"),
        "outliers": value("outliers", Mapping[str, float], "{}"),
        "grids": read_grids(value("grids", Any, "{}")),
        **{name: read_remaining(value(name, Any, "{}"), name) for name in ("neurons", "experts")},
    }


def _read_array(file: Any, name: str) -> Values:
    array = file.get_tensor(name)
    if array.dtype.kind != "f":
        raise WeLoreError(f"{name} has the dtype {array.dtype}, it must be floating point")
    return np.asarray(array, dtype=np.float64)


def _ordered(content: bytes) -> bytes:
    """A safetensors file with its metadata in order: the library writes them in another one each time."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[start:]


def block_of(name: str) -> str:
    """The decoder block of a matrix, by its name up to the first number; "" outside of blocks."""
    match = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    return match.group() if match else ""
