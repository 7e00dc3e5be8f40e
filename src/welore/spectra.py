"""1 - Singular values of every targeted matrix: the artefact `spectra.safetensors` and its mathematics.

numpy only. Shapes: W (m, n) = (out_features, in_features); full_rank k = min(m, n); sigma (k,) descending.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from welore.errors import WeLoreError
from welore.files import whole_file
from welore.grids import Grid, read_grids
from welore.neurons import Neurons, as_json, read_neurons

Values = NDArray[np.float64]
FORMAT = "welore.spectra/1"
LOSSES = ".losses"  # after a name in the file
NONE, ASVD = "none", "asvd"
PLAIN = (NONE, ASVD)  # scalings whose values are not losses in a unit that all matrices share


@dataclass(frozen=True)
class Identity:
    """Which weights an artefact was made from; two models with the same fingerprint have the same weights."""

    name: str
    fingerprint: str

    def check(self, other: "Identity", what: str) -> None:
        """Raise WeLoreError when `what` (made from `self`) is about to be used on `other`."""
        if self.fingerprint != other.fingerprint:
            raise WeLoreError(
                f"the {what} was made for another model ({self.name}, fingerprint {self.fingerprint[:12]}), "
                f"not for {other.name} ({other.fingerprint[:12]}): make it again with this one"
            )


@dataclass(frozen=True)
class Spectra:
    """Singular values of the targeted matrices of one model, in the model's order.

    values: name -> sigma (k,), float64, descending; shapes: name -> (m, n).
    include, exclude: the patterns that chose the targets.
    scaling: of what matrices these are the values (scaling.SCALINGS); the weights themselves under "none".
    calibration: what the scaling rests on: inputs and settings of the calibration's record, empty without one.
    outliers: name -> share of the weights whose |W_ij| rms(x_j) exceeds five times the mean of the matrix; calibrated.
    losses: name -> what cutting each value costs, (k,), where it was measured (scaling "kfac"); the squares of the
    values only predict it.
    unreached: names of the matrices that no token of the calibration reached: nothing is known of what a cut costs.
    grids: layer -> blocks down and across of the matrices that are split; each block is a matrix of its own here.
    neurons: MLP -> the neurons that were left of it when the values were computed.
    """

    model: Identity
    values: Mapping[str, Values]
    shapes: Mapping[str, tuple[int, int]]
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    scaling: str = NONE
    calibration: Mapping[str, Any] = field(default_factory=dict)
    outliers: Mapping[str, float] = field(default_factory=dict)
    losses: Mapping[str, Values] = field(default_factory=dict)
    unreached: tuple[str, ...] = ()
    grids: Mapping[str, Grid] = field(default_factory=dict)
    neurons: Mapping[str, Neurons] = field(default_factory=dict)

    def normalised(self) -> dict[str, Values]:
        """Name -> normalised spectrum s (k,), see `normalise`."""
        return {name: normalise(sigma) for name, sigma in self.values.items()}

    def save(self, path: str | Path) -> None:
        """Write the values (float64) with the model's identity in the file's metadata."""
        about = {
            "format": FORMAT,
            "model": self.model.name,
            "fingerprint": self.model.fingerprint,
            "shapes": json.dumps({name: list(shape) for name, shape in self.shapes.items()}),
            "include": json.dumps(self.include),
            "exclude": json.dumps(self.exclude),
            "scaling": self.scaling,
            "calibration": json.dumps(dict(self.calibration)),
            "outliers": json.dumps(dict(self.outliers)),
            "unreached": json.dumps(self.unreached),
            "grids": json.dumps(dict(self.grids)),
            "neurons": json.dumps(as_json(self.neurons)),
        }
        with whole_file(path) as partial:
            arrays = {name: np.ascontiguousarray(v) for name, v in self.values.items()}
            save_file(
                arrays | {name + LOSSES: np.ascontiguousarray(v) for name, v in self.losses.items()}, partial, about
            )

    @classmethod
    def load(cls, path: str | Path) -> "Spectra":
        """The spectra at `path`; WeLoreError if the file is missing, broken or something else."""
        if not Path(path).is_file():
            raise WeLoreError(f"{path} does not exist: make it with `welore analyze MODEL -o {path}`")
        try:
            with safe_open(path, "np") as file:
                about = file.metadata() or {}
                if about.get("format") != FORMAT:
                    raise WeLoreError(f"{path} holds no spectra: make them with `welore analyze MODEL -o FILE`")
                shapes = {name: (s[0], s[1]) for name, s in json.loads(about["shapes"]).items()}
                values = {name: file.get_tensor(name) for name in shapes}
                losses = {n: file.get_tensor(n + LOSSES) for n in shapes if n + LOSSES in file.keys()}  # noqa: SIM118
            identity = Identity(about["model"], about["fingerprint"])
            include, exclude = (tuple(json.loads(about[name])) for name in ("include", "exclude"))
            calibrated = {name: json.loads(about.get(name, "{}")) for name in ("calibration", "outliers")}
            unreached = tuple(json.loads(about.get("unreached", "[]")))
            grids = read_grids(json.loads(about.get("grids", "{}")))
            neurons = read_neurons(json.loads(about.get("neurons", "{}")))
        except SafetensorError as error:
            raise WeLoreError(f"{path} is not a readable safetensors file ({error})") from error
        except (KeyError, ValueError) as error:
            raise WeLoreError(f"{path} lacks what it should say of its model ({error!r}): make it again") from error
        more: dict[str, Any] = {"losses": losses, "unreached": unreached, "grids": grids, "neurons": neurons}
        return cls(identity, values, shapes, include, exclude, about.get("scaling", NONE), **calibrated, **more)


def block_of(name: str) -> str:
    """The decoder block of a matrix, by its name up to the first number; "" outside of blocks."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    return found.group() if found else ""


def normalise(sigma: Values) -> Values:
    """Min-max normalised spectrum s = (sigma - sigma_min) / (sigma_max - sigma_min), in [0, 1].

    sigma: (k,), descending. A flat spectrum (all values equal, or k = 1) has no small values to prune: all 1.
    WeLore section 4.1.
    """
    spread = sigma[0] - sigma[-1]
    if spread <= 0:
        return np.ones_like(sigma)
    return np.asarray((sigma - sigma[-1]) / spread, dtype=np.float64)


@lru_cache(maxsize=256)
def gaussian_null(m: int, n: int) -> Values:
    """Expected normalised spectrum (k,) of an m x n matrix of independent Gaussian numbers.

    The null model beside which a reduction ratio must be read: such a matrix has no structure, yet min-max
    normalisation "prunes" 22 % of it (square) at threshold 0.175. Quantiles of the Marchenko-Pastur law.
    """
    k, long = min(m, n), max(m, n)
    ratio = k / long
    low, high = 1 - np.sqrt(ratio), 1 + np.sqrt(ratio)
    sigma = np.linspace(low, high, 20_001)
    squared = np.clip((high**2 - sigma**2) * (sigma**2 - low**2), 0, None)
    density = np.sqrt(squared) / np.maximum(sigma, 1e-12)
    mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    quantiles = (np.arange(k, 0, -1) - 0.5) / k
    return normalise(np.interp(quantiles, mass / mass[-1], sigma))
