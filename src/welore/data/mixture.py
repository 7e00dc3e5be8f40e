"""Which text a model is calibrated on: names with weights -> windows of tokens, drawn in proportion."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from welore.data.packing import blocks_of_text
from welore.data.windows import WINDOWS, digest, read_windows
from welore.errors import WeLoreError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SELF = "self"  # the text that the model writes
Mixture = str | Sequence[str] | Mapping[str, float]


@dataclass(frozen=True)
class Source:
    """Windows (count, length) of a text with its weight in the mixture, and the digest of what was read or written."""

    name: str
    weight: float
    windows: Tensor
    sha256: str

    def about(self) -> dict[str, Any]:
        """What the record says of it."""
        return {"name": self.name, "weight": self.weight, "windows": len(self.windows), "sha256": self.sha256}


def parse_mixture(data: Mixture) -> dict[str, float]:
    """Name -> weight, of "NAME", "NAME:WEIGHT,NAME:WEIGHT", several of them, or a mapping."""
    if isinstance(data, Mapping):
        pairs = [(name, float(weight)) for name, weight in data.items()]
    else:
        parts = [part for text in ([data] if isinstance(data, str) else data) for part in text.split(",")]
        pairs = [_weighted(part.strip()) for part in parts]
    if not pairs or not all(name for name, _ in pairs):
        raise WeLoreError("a name of a text is missing: give self, or NAME:WEIGHT,NAME:WEIGHT such as pydoc:1,my.txt:2")
    for name, weight in pairs:
        if not 0 < weight < float("inf"):
            raise WeLoreError(f"the weight of {name} is {weight:g}: it must be above 0")
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise WeLoreError(f"{name} is named {names.count(name)} times: name it once, with a weight")
    return dict(pairs)


def _weighted(part: str) -> tuple[str, float]:
    name, colon, weight = part.rpartition(":")
    try:
        return (name, float(weight)) if colon else (part, 1.0)
    except ValueError:
        return part, 1.0  # the colon belongs to the name


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


def drawn(
    name: str,
    weight: float,
    count: int,
    tokenizer: "PreTrainedTokenizerBase",
    length: int,
    *,
    seed: int,
    cache_dir: str | Path | None = None,
) -> Source:
    """`count` windows of a text, none twice, in an order that depends on the seed and the name, not on a file's folder.

    Of a named data set the training part is read, of any other text all but the first tenth, as in fine-tuning: what
    `welore evaluate` reads first stays unseen. Of a file of windows the first are taken as they are.
    """
    if name.endswith(WINDOWS):
        ids = read_windows(name, length, len(tokenizer))
        _refuse_few(name, len(ids), count, length)
        return Source(name, weight, ids[:count], digest(ids))
    found = blocks_of_text(name, tokenizer, length, tokens=count * length, eval_items=1, cache_dir=cache_dir)
    _refuse_few(name, len(found.train), count, length)
    order = order_of(len(found.train), seed, Path(name).name)
    windows = torch.stack([found.train[int(index)]["input_ids"] for index in order[:count]])
    return Source(name, weight, windows, found.sha256)


def _refuse_few(name: str, there: int, wanted: int, length: int) -> None:
    if there < wanted:
        raise WeLoreError(
            f"{name} has {there} windows of {length} tokens, {wanted} are wanted: take fewer tokens, shorter windows "
            "or a smaller weight"
        )


def draw(
    data: Mixture, tokens: int, tokenizer: "PreTrainedTokenizerBase", length: int, **how: Any
) -> tuple[dict[str, int], list[Source]]:
    """Windows of every text of a mixture, and those of each that are drawn; what the model writes is only counted.

    how: seed and cache_dir of `drawn`.
    """
    mixture = parse_mixture(data)
    counts = apportion(mixture, -(-tokens // length))
    found = [drawn(name, mixture[name], n, tokenizer, length, **how) for name, n in counts.items() if name != SELF]
    return counts, found


def mixed(found: Sequence[Source], seed: int) -> tuple[Tensor, list[str]]:
    """Windows (count, length) of all texts in random order, and the name of the text of each; of one text as drawn."""
    windows, names = torch.cat([text.windows for text in found]), [text.name for text in found for _ in text.windows]
    if len(found) == 1:
        return windows, names
    order = order_of(len(windows), seed, "heal")
    return windows[order], [names[index] for index in order.tolist()]


def given(ids: Tensor) -> Source:
    """Windows of token ids (windows, length) that the caller has made."""
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2 or ids.is_floating_point():
        raise WeLoreError(
            f"data is a tensor of shape {tuple(ids.shape)}: give token ids (windows, length), length >= 2"
        )
    return Source("token ids", 1.0, ids.cpu().long(), digest(ids.cpu().long()))


def seed_of(seed: int, purpose: str) -> int:
    """Independent random numbers for every purpose, from one seed."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:7])


def order_of(count: int, seed: int, purpose: str) -> Tensor:
    """A random order (count,) of what is read for a purpose."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(seed, purpose)))
