"""What is decomposed: the matrix of a layer, or one of the equal blocks that it is split in."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from welore.errors import WeLoreError

Grid = tuple[int, int]  # blocks of a matrix, down and across
WHOLE: Grid = (1, 1)


@dataclass(frozen=True)
class Target:
    """One targeted matrix W (m, n) = (out_features, in_features): that of a layer, or a block of it.

    transposed: the checkpoint stores the layer's W^T (GPT-2's Conv1D). grid: how many blocks its matrix is split in,
    down and across; a block is named LAYER.INDEX, row by row.
    """

    name: str
    shape: tuple[int, int]
    transposed: bool = False
    grid: Grid = WHOLE

    @property
    def layer(self) -> str:
        """Name of the layer."""
        return self.name if self.grid == WHOLE else self.name.rpartition(".")[0]

    @property
    def key(self) -> str:
        """What its results are kept under; another one when neurons were taken out."""
        return kept_as(self.name, self.shape)

    @property
    def rows(self) -> slice:
        """Which rows of the layer's matrix these are: which of its outputs."""
        return self._share(0)

    @property
    def columns(self) -> slice:
        """Which columns of the layer's matrix these are: which of its inputs."""
        return self._share(1)

    def _share(self, axis: int) -> slice:
        if self.grid == WHOLE:
            return slice(None)
        place = divmod(int(self.name.rpartition(".")[2]), self.grid[1])[axis]
        return slice(place * self.shape[axis], (place + 1) * self.shape[axis])

    @property
    def cost(self) -> float:
        """Relative time of its decomposition: the Gram matrix, and its reduction at a lower speed."""
        k, long = min(self.shape), max(self.shape)
        return float(k * k * (long + 2 * k))


def in_blocks(targets: Iterable[Target], grids: Mapping[str, Grid]) -> list[Target]:
    """The targets, those with a grid in blocks; WeLoreError for a grid that does not fit."""
    found = []
    for target in targets:
        grid = grids.get(target.name, WHOLE)
        if grid == WHOLE:
            found.append(target)
            continue
        m, n = target.shape
        try:
            shape = block_shape(m, n, grid)
        except WeLoreError as error:
            raise WeLoreError(f"{target.name}: {error}") from error
        found += [Target(name, shape, target.transposed, grid) for name in block_names(target.name, grid)]
    return found


def kept_as(name: str, shape: tuple[int, int]) -> str:
    """What the results for a matrix of this shape are kept under."""
    return f"{name}.{shape[0]}x{shape[1]}"


def block_names(layer: str, grid: Grid) -> list[str]:
    """Names of the blocks of a layer, row by row."""
    return [f"{layer}.{index}" for index in range(grid[0] * grid[1])]


def block_shape(m: int, n: int, grid: Grid) -> tuple[int, int]:
    """Shape of the blocks of W (m, n) in this grid; WeLoreError if it does not divide W."""
    down, across = grid
    if down < 1 or across < 1 or m % down or n % across:
        raise WeLoreError(f"a matrix of shape {(m, n)} has no {down} x {across} equal blocks")
    return m // down, n // across


def read_grids(content: Mapping[str, Sequence[int]]) -> dict[str, Grid]:
    """Grids as JSON gives them back; ValueError or TypeError if they are something else."""
    return {layer: (down, across) for layer, (down, across) in content.items()}


def layer_of(name: str, grids: Mapping[str, Grid]) -> str:
    """The layer of a matrix: of a block the one that it belongs to."""
    layer = name.rpartition(".")[0]
    return layer if layer in grids else name


def split_layers(grids: Mapping[str, Grid], ranks: Iterable[str]) -> dict[str, Grid]:
    """Those of the grids of which a block has a rank: the other layers stay as they are."""
    layers = {name.rpartition(".")[0] for name in ranks}
    return {layer: grid for layer, grid in grids.items() if layer in layers}
