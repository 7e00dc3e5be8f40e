"""The unit of decomposition: the matrix of a layer, or one of the equal blocks that it is split in."""

from collections.abc import Iterable, Mapping
from typing import Any

from welore.errors import WeLoreError
from welore.io.fields import typed

Grid = tuple[int, int]  # blocks of a matrix, down and across
WHOLE: Grid = (1, 1)
MOST_BLOCKS = 1 << 16  # of one matrix, so that a damaged file does not fill the memory


def block_names(layer: str, grid: Grid) -> list[str]:
    """Names of the blocks of a layer, row by row."""
    return [f"{layer}.{index}" for index in range(grid[0] * grid[1])]


def block_shape(m: int, n: int, grid: Grid) -> tuple[int, int]:
    """Shape of the blocks of W (m, n) in this grid; WeLoreError if it does not divide W."""
    down, across = grid
    if down < 1 or across < 1 or m % down or n % across:
        raise WeLoreError(f"a matrix of shape {(m, n)} has no {down} x {across} equal blocks")
    return m // down, n // across


def read_grids(content: Any, name: str = "grids", most: int = MOST_BLOCKS) -> dict[str, Grid]:
    """Grids, or shapes, as JSON gives them back; WeLoreError if they are something else.

    name: of the field, for the sentence. most: blocks of a layer, or numbers of a matrix.
    """
    grids: dict[str, Grid] = typed(content, Mapping[str, Grid], name)
    for layer, (down, across) in grids.items():
        if min(down, across) < 1 or down * across > most:
            raise WeLoreError(f"{layer} has the sizes {down} and {across}, they must be 1 or more, {most} together")
    return grids


def layer_of(name: str, grids: Mapping[str, Grid]) -> str:
    """The layer of a matrix: of a block the one that it belongs to."""
    layer = name.rpartition(".")[0]
    return layer if layer in grids else name


def split_layers(grids: Mapping[str, Grid], ranks: Iterable[str]) -> dict[str, Grid]:
    """Those of the grids of which a block has a rank: the other layers stay as they are."""
    layers = {name.rpartition(".")[0] for name in ranks}
    return {layer: grid for layer, grid in grids.items() if layer in layers}
