"""Which matrices of a decoder are targeted: found in the model itself, whatever its family."""

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from welore.errors import WeLoreError, first_line
from welore.grids import Grid, Target
from welore.lowrank import LowRank

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Census:
    """Parameters of a model by what becomes of them."""

    targeted: int
    blocks_other: int  # in matrices of the decoder blocks that are not targeted: experts, routers, excluded ones
    blocks_other_names: tuple[str, ...]
    total: int


def decoder_blocks(model: "PreTrainedModel") -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks: the outermost list as long as the configuration says."""
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers and "vision" not in name
    ]
    if not found:
        raise WeLoreError(f"{type(model).__name__} has no list of {layers} decoder blocks: it is not supported")
    return min(found, key=lambda item: item[0].count("."))


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
        if not (type(module) in (nn.Linear, Conv1D) or isinstance(module, LowRank)):
            continue
        if isinstance(model.get_submodule(name.rpartition(".")[0]), LowRank):  # A and B, or P and C
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
    if isinstance(module, (nn.Linear, LowRank)):
        return module.out_features, module.in_features
    n, m = module.weight.shape  # type: ignore[misc]
    return m, n


def _matches(name: str, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(f".{name}.", f"{head}.{pattern}.{tail}") for head in ("", "*") for tail in ("", "*"))


def _expert_counts(model: "PreTrainedModel") -> set[int]:
    config = model.config.get_text_config(decoder=True)
    return {count for key in EXPERT_COUNTS if (count := getattr(config, key, None))}


def config_of(directory: Path) -> "PretrainedConfig":
    """The configuration of a model directory; WeLoreError if transformers does not know the architecture."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory)
    except (ValueError, OSError) as error:
        raise WeLoreError(f"{directory}: {first_line(error)}") from error


def context_length(config: "PretrainedConfig") -> int | None:
    """How many tokens a model reads at once, None where its configuration does not say."""
    found: int | None = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found


def refuse_longer(length: int, limit: int | None) -> None:
    """Raise WeLoreError if a model that reads `limit` tokens at once is to read more; None: it does not say."""
    if limit is not None and length > limit:
        raise WeLoreError(f"length is {length}: this model reads at most {limit} tokens at once, pass --length {limit}")


def dense_skeleton(config: "PretrainedConfig", kind: Any) -> "PreTrainedModel":
    """The dense model of a configuration on the meta device; kind: AutoModelForCausalLM, or a class of models."""
    plain = type(config).from_dict(config.to_dict())
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    with torch.device("meta"):
        return (kind.from_config if hasattr(kind, "from_config") else kind._from_config)(plain)
