"""The statistics by which a cut is judged: second moments of what enters and what leaves every targeted matrix.

y = W x, W (m, n). Inputs A = E[x x^T] (n, n), magnitudes E[|x_j|] (n,), output gradients G = E[g g^T] (m, m), where g
is the gradient at y of the sum over positions of the cross-entropy, with labels sampled from the model. All means
are over all tokens that were read, so that a matrix which few of them reach (an expert) weighs little.

A file holds 4 (n^2 + n) bytes for every different input and 4 (m^2 + k) for every matrix; it is read one tensor at a
time.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from welore.errors import WeLoreError
from welore.io.atomic import whole_file
from welore.io.safetensors_stream import TensorReader, TensorWriter
from welore.layers.block_grid import Grid, read_grids
from welore.models.targets import Target, in_blocks
from welore.records import Identity, Record

WRITTEN = "written"
FORMAT = "welore.calibration/2"  # 1 had losses along other directions (scaling.DAMPING_OUTPUTS was 0.01)


@dataclass(frozen=True)
class Calibration:
    """Statistics of the targeted matrices of one model, in the model's order.

    shapes: name -> (m, n). counts: name -> tokens that reached the matrix. shared: name -> the matrix under whose
    name the inputs are kept (itself, or the first that reads the same tensor); without an entry it was not reached.
    measured: tokens on which the losses of all components were measured, 0 if they were not.
    written: windows and length of the text that the model wrote for it, None where it read other texts only.
    tensors: "NAME.inputs", "NAME.magnitudes", "NAME.outputs" and "NAME.losses", float32, and "written", int32; of a
    loaded calibration a view of its file.
    include, exclude: the patterns that chose the targets.
    grids: layer -> blocks down and across of the matrices whose losses were measured block by block.
    """

    model: Identity
    shapes: Mapping[str, tuple[int, int]]
    counts: Mapping[str, int]
    shared: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    record: Record
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    measured: int = 0
    written: tuple[int, int] | None = None
    grids: Mapping[str, Grid] = field(default_factory=dict)

    def inputs(self, name: str) -> Tensor | None:
        """A (n, n), symmetric; zeros if no token reached the matrix, None if it is not in this calibration."""
        n = self.shapes[name][1] if name in self.shapes else 0
        return self._statistic(name, self.shared.get(name), "inputs", (n, n))

    def magnitudes(self, name: str) -> Tensor | None:
        """E[|x_j|] (n,); zeros if no token reached the matrix, None if it is not in this calibration."""
        n = self.shapes[name][1] if name in self.shapes else 0
        return self._statistic(name, self.shared.get(name), "magnitudes", (n,))

    def outputs(self, name: str) -> Tensor | None:
        """G (m, m), symmetric; zeros if no token reached the matrix, None if it is not in this calibration."""
        m = self.shapes[name][0] if name in self.shapes else 0
        return self._statistic(name, name if name in self.shared else None, "outputs", (m, m))

    def losses(self, name: str) -> Tensor | None:
        """What cutting each component of the matrix costs, (k,), in the order of the values scaled by K-FAC, measured.

        E[(g^T a b^T x)^2] with W = sum of a b^T; None where nothing was measured. name: of a matrix, or of a block.
        """
        key = f"{name}.losses"
        return self.tensors[key] if key in self._measured_losses else None

    def own_text(self) -> Tensor | None:
        """Token ids (windows, length) that the model wrote; None where it read other texts only."""
        return None if self.written is None else self.tensors[WRITTEN].long()

    def _statistic(self, name: str, kept: str | None, kind: str, shape: tuple[int, ...]) -> Tensor | None:
        if name not in self.shapes:
            return None
        return torch.zeros(shape) if kept is None else self.tensors[f"{kept}.{kind}"]

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of every tensor of the file."""
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        if self.written is not None:
            found[WRITTEN] = (torch.int32, self.written)
        for name, kept in self.shared.items():
            m, n = self.shapes[name]
            found[f"{name}.outputs"] = (torch.float32, (m, m))
            found[f"{kept}.inputs"] = (torch.float32, (n, n))
            found[f"{kept}.magnitudes"] = (torch.float32, (n,))
        return found | self._measured_losses

    @cached_property
    def _measured_losses(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        reached = [Target(name, self.shapes[name]) for name in self.shared] if self.measured else []
        return {f"{t.name}.losses": (torch.float32, (min(t.shape),)) for t in in_blocks(reached, self.grids)}

    def save(self, path: str | Path) -> None:
        """Write everything to `path`, whole or not at all, one tensor in memory at a time."""
        about = {
            "format": FORMAT,
            "model": self.model.name,
            "fingerprint": self.model.fingerprint,
            "shapes": json.dumps({name: list(shape) for name, shape in self.shapes.items()}),
            "counts": json.dumps(dict(self.counts)),
            "shared": json.dumps(dict(self.shared)),
            "include": json.dumps(self.include),
            "exclude": json.dumps(self.exclude),
            "measured": json.dumps(self.measured),
            "grids": json.dumps(dict(self.grids)),
            "written": json.dumps(self.written),
            "record": json.dumps(dataclasses.asdict(self.record), allow_nan=False),
        }
        layout = self.layout()
        with whole_file(path) as partial, TensorWriter(partial, layout, about) as writer:
            for name in layout:
                writer.write(name, [self.tensors[name].flatten()])

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """The calibration at `path`, its tensors left in the file; WeLoreError if it is missing or something else."""
        path = Path(path)
        if not path.is_file():
            raise WeLoreError(f"{path} does not exist: make it with `welore calibrate MODEL --data self -o {path}`")
        with TensorReader(path) as reader:
            about, entries = reader.metadata, reader.entries
        if about.get("format") != FORMAT:
            raise WeLoreError(f"{path} holds no calibration: make one with `welore calibrate MODEL -o FILE`")
        try:
            found = cls(
                model=Identity(about["model"], about["fingerprint"]),
                shapes={name: (s[0], s[1]) for name, s in json.loads(about["shapes"]).items()},
                counts=json.loads(about["counts"]),
                shared=json.loads(about["shared"]),
                tensors=_Tensors(path),
                record=Record(**json.loads(about["record"])),
                include=tuple(json.loads(about["include"])),
                exclude=tuple(json.loads(about["exclude"])),
                measured=json.loads(about.get("measured", "0")),
                grids=read_grids(json.loads(about.get("grids", "{}"))),
                written=tuple(json.loads(about.get("written", "null")) or ()) or None,
            )
            expected = found.layout()
        except (KeyError, TypeError, ValueError) as error:
            raise WeLoreError(f"{path} lacks what it should say of its model ({error!r}): make it again") from error
        if expected != {name: (entry.dtype, entry.shape) for name, entry in entries.items()}:
            raise WeLoreError(f"{path} does not hold the statistics that it names: make it again")
        return found


class _Tensors(Mapping[str, Tensor]):
    """The tensors of a file, each read when it is asked for, none kept."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __getitem__(self, name: str) -> Tensor:
        with TensorReader(self.path) as reader:
            return reader.read(name)

    def __iter__(self) -> Iterator[str]:
        with TensorReader(self.path) as reader:
            return iter(list(reader.entries))

    def __len__(self) -> int:
        with TensorReader(self.path) as reader:
            return len(reader.entries)
