"""Which matrices of a decoder are targeted: found in the model itself, whatever its family."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from welore.errors import WeLoreError
from welore.layers.block_grid import WHOLE, Grid, block_names, block_shape
from welore.layers.low_rank import LowRankLayer
from welore.models.skeleton import decoder_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Census:
    """Parameters of a model by what becomes of them."""

    targeted: int
    blocks_other: int  # in matrices of the decoder blocks that are not targeted: experts, routers, excluded ones
    blocks_other_names: tuple[str, ...]
    total: int


def find_targets(model: "PreTrainedModel", include: Iterable[str] = (), exclude: Iterable[str] = ()) -> list[Target]:
    """Every linear layer inside the decoder blocks, in the model's order; routers of experts are left out.

    include: only modules that match one of these patterns, anywhere in the model. exclude: none that match.
    A pattern is a glob over whole components of a module's name: "q_proj", "layers.0", "layers.*.mlp".
    model: may live on the meta device, and may be compressed already.
    """
    from transformers.pytorch_utils import Conv1D

    include, exclude = tuple(include), tuple(exclude)
    blocks, _ = decoder_blocks(model)
    tied = model.get_output_embeddings() if model.config.tie_word_embeddings else None
    names = []
    targets = []
    for name, module in model.named_modules():
        if not (type(module) in (nn.Linear, Conv1D) or isinstance(module, LowRankLayer)):
            continue
        if isinstance(model.get_submodule(name.rpartition(".")[0]), LowRankLayer):  # A and B, or P and C
            continue
        names.append(name)
        m, n = _shape(module)
        if include:
            wanted = any(_matches(name, pattern) for pattern in include)
        else:
            wanted = name.startswith(blocks + ".") and m not in _expert_counts(model)
        if not wanted or any(_matches(name, pattern) for pattern in exclude):
            continue
        if module is tied:
            raise WeLoreError(f"{name} shares its weight with the embeddings and cannot be low rank: exclude it")
        targets.append(Target(name, (m, n), type(module) is Conv1D))
    for pattern in (*include, *exclude):
        if not any(_matches(name, pattern) for name in names):
            raise WeLoreError(f"the pattern {pattern!r} matches no linear layer; one is called {names[0]!r}")
    if not targets:
        raise WeLoreError("no linear layer is targeted: the patterns leave nothing to compress")
    return targets


def long_matrices(model: "PreTrainedModel", targets: Sequence[Target]) -> dict[str, Grid]:
    """Layer -> grid of the matrices that are at least twice as long as wide: as many equal blocks as are no taller.

    Along the model's width nothing is split: what enters and leaves the stream of hidden states is one thing. So they
    are those of the MLPs, by their neurons. Why that pays: docs/method.md.
    """
    width = model.config.get_text_config(decoder=True).hidden_size
    found: dict[str, Grid] = {}
    for target in targets:
        long, short = max(target.shape), min(target.shape)
        count = max(c for c in range(1, long // short + 1) if long % c == 0)
        if count > 1 and long != width:
            found[target.name] = (count, 1) if target.shape[0] == long else (1, count)
    return found


def census(model: "PreTrainedModel", targets: Sequence[Target]) -> Census:
    """How many parameters are targeted, and what else lies in the blocks; model: dense, may be on meta."""
    blocks, _ = decoder_blocks(model)
    chosen = {target.name + ".weight" for target in targets}
    other = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if name.startswith(blocks + ".") and parameter.ndim > 1 and name not in chosen
    }
    return Census(
        targeted=sum(m * n for m, n in (target.shape for target in targets)),
        blocks_other=sum(other.values()),
        blocks_other_names=tuple(sorted({".".join(n.split(".")[-3:-1]) for n in other})),
        total=sum(p.numel() for p in model.parameters()),
    )


def _shape(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, (nn.Linear, LowRankLayer)):
        return module.out_features, module.in_features
    n, m = module.weight.shape  # type: ignore[misc]
    return m, n


def _matches(name: str, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(f".{name}.", f"{head}.{pattern}.{tail}") for head in ("", "*") for tail in ("", "*"))


def _expert_counts(model: "PreTrainedModel") -> set[int]:
    config = model.config.get_text_config(decoder=True)
    return {count for key in EXPERT_COUNTS if (count := getattr(config, key, None))}
