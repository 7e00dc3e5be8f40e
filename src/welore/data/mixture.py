"""Texts with weights -> windows of tokens, drawn in proportion."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from welore.config import SELF, Dataset, require_number
from welore.data.packing import Blocks, blocks_of_text
from welore.data.text import TextOptions, dataset_name
from welore.data.windows import digest, given_windows, is_windows
from welore.errors import WeLoreError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Source:
    """Windows (count, length) of a text with its weight in the mixture, and the digest of what was read or written."""

    name: str
    weight: float
    windows: Tensor
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """The source as a record stores it."""
        return {"name": self.name, "weight": self.weight, "windows": len(self.windows), "sha256": self.sha256}


def parse_mixture(dataset: str | Path | Mapping[str, float]) -> dict[str, float]:
    """Name -> weight, of "NAME", "NAME:WEIGHT,NAME:WEIGHT" or a mapping."""
    if isinstance(dataset, Mapping):
        require_number("above 0", **{str(name): weight for name, weight in dataset.items()})
        pairs = [(str(name), float(weight)) for name, weight in dataset.items()]
    else:
        pairs = [_weighted(part.strip()) for part in str(dataset).split(",")]
    if not pairs or not all(name for name, _ in pairs):
        raise WeLoreError("a name of a text is missing: give self, or NAME:WEIGHT,NAME:WEIGHT such as pydoc:1,my.txt:2")
    names = [name for name, _ in pairs]
    for name, weight in pairs:
        if not 0 < weight < float("inf"):
            raise WeLoreError(f"the weight of {name} is {weight:g}: it must be above 0")
        if names.count(name) > 1:
            raise WeLoreError(f"{name} is named {names.count(name)} times: name it once, with a weight")
    return dict(pairs)


def _weighted(part: str) -> tuple[str, float]:
    name, colon, weight = part.rpartition(":")
    try:
        return (name, float(weight)) if colon else (part, 1.0)
    except ValueError:
        return part, 1.0  # the colon belongs to the name, as in "owner/name:config"


def apportion(mixture: Mapping[str, float], windows: int) -> dict[str, int]:
    """Windows of every text, in proportion to the weights, by largest remainder; WeLoreError if one gets none."""
    total = sum(mixture.values())
    exact = {name: windows * weight / total for name, weight in mixture.items()}
    counts = {name: int(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: counts[name] - exact[name])[: windows - sum(counts.values())]:
        counts[name] += 1
    for name, count in counts.items():
        if count == 0:
            raise WeLoreError(
                f"{name} with weight {mixture[name]:g} of {total:g} gets none of {windows} windows: take more tokens, "
                "shorter windows or a larger weight"
            )
    return counts


def draw(
    dataset: Dataset,
    tokens: int,
    tokenizer: "PreTrainedTokenizerBase",
    length: int,
    *,
    seed: int,
    options: TextOptions = TextOptions(),
) -> tuple[dict[str, int], list[Source]]:
    """Windows that every text of a data set gets by its weight, and those that are drawn; the model writes "self".

    Of every text windows are drawn, none twice, in an order that depends on the seed and the name, not on a file's
    directory. They are drawn from the training part (packing.blocks_of_text): text that `welore evaluate` reads first
    stays unseen. Of a file of windows the first are taken as they are, of a tensor all.
    """
    if isinstance(dataset, Tensor):
        ids = given_windows(dataset)
        return {}, [Source("token ids", 1.0, ids, digest(ids))]
    named = isinstance(dataset, str | Path | Mapping)
    mixture = parse_mixture(dataset) if named else {dataset_name(dataset): 1.0}
    counts = apportion(mixture, -(-tokens // length))
    sources = []
    for name, count in counts.items():
        if name == SELF:
            continue
        text = name if named else dataset
        if is_windows(text):
            windows = given_windows(text, length)
            sha256 = digest(windows)
        else:
            split = blocks_of_text(text, tokenizer, length, tokens=count * length, eval_items=1, options=options)
            assert isinstance(split.train, Blocks)
            windows = split.train.tokens[order_of(len(split.train), seed, Path(name).name)]
            sha256 = split.sha256
        if len(windows) < count:
            raise WeLoreError(
                f"{name} has {len(windows)} windows of {length} tokens, {count} are wanted: take fewer tokens, shorter "
                "windows or a smaller weight"
            )
        sources.append(Source(name, mixture[name], windows[:count].long(), sha256))
    return counts, sources


def mixed(sources: Sequence[Source], seed: int) -> tuple[Tensor, list[str]]:
    """Windows (count, length) of all texts in random order, and the name of the text of each; of one text as drawn."""
    windows = torch.cat([source.windows for source in sources])
    names = [source.name for source in sources for _ in source.windows]
    if len(sources) == 1:
        return windows, names
    order = order_of(len(windows), seed, "heal")
    return windows[order], [names[index] for index in order.tolist()]


def seed_of(seed: int, purpose: str) -> int:
    """Independent random numbers for every purpose, from one seed."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:7])


def order_of(count: int, seed: int, purpose: str) -> Tensor:
    """A random order (count,) of what is read for a purpose."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(seed, purpose)))
