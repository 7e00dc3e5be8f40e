"""The log-probabilities of a dense model on disk: one pass of it serves every model that is compared with it.

After every token of a text a file holds k tokens with their log-probabilities, the log-probability of all others
together, and the likeliest token: 8 k + 8 bytes. Its tensors are `WINDOW.FIELD`, for the fields of `Predictions`.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from welore.data.windows import digest
from welore.errors import WeLoreError
from welore.io.atomic import atomic_write
from welore.io.fields import refusing
from welore.io.safetensors_stream import TensorInfo, TensorReader, TensorWriter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = "welore.logprobs/1"
SUFFIX = ".safetensors"  # by which a file is told from a model
OTHERS = {  # to what a file is bound -> what to do where it differs
    "text_sha256": "another text: give the --dataset with which it was made",
    "tokenizer_sha256": "another tokenizer: compare with the dense model that the compressed one was made from",
    "windows_sha256": "other windows: give the --max-length, --num-windows and --bos with which it was made",
}


class Predictions(NamedTuple):
    """The tokens that a model expects next, at some positions of a text.

    logprobs (rows, k), float32, and ids (rows, k), int32: of the k likeliest tokens. rest (rows,): log-probability of
    all others together, -inf if there are none. first (rows,): the token of the largest logit.
    """

    logprobs: Tensor
    ids: Tensor
    rest: Tensor
    first: Tensor

    @classmethod
    def of(cls, logits: Tensor, k: int) -> "Predictions":
        """Those of logits (rows, vocabulary)."""
        scores = logits.float().log_softmax(-1)
        top = scores.topk(k)
        return cls(top.values, top.indices.int(), _others(scores, top.indices), logits.argmax(-1).int())

    def to(self, device: torch.device) -> "Predictions":
        """The same on a device."""
        return Predictions(*(tensor.to(device) for tensor in self))

    def divergence(self, logits: Tensor) -> Tensor:
        """KL(these || softmax of logits) in nats (rows,), with one class for all tokens that are not listed.

        It is a lower bound, by the log-sum inequality: equal where both share out the rest alike, or k is everything.
        """
        scores, ids = logits.float().log_softmax(-1), self.ids.long()
        log_q = torch.cat([scores.gather(-1, ids), _others(scores, ids)[:, None]], -1)
        log_p = torch.cat([self.logprobs, self.rest[:, None]], -1)
        return (log_p.exp() * (log_p - log_q)).masked_fill(log_p.isneginf(), 0).sum(-1).clamp_min(0)


def _others(scores: Tensor, ids: Tensor) -> Tensor:
    """Log-probability (rows,) of all tokens but the listed ones."""
    return scores.scatter(-1, ids, -torch.inf).logsumexp(-1)


def _layout(windows: Sequence[Tensor], k: int) -> dict[str, TensorInfo]:
    """Dtype and shape of every tensor of a file for windows (length,), of which all tokens but one are predicted."""
    infos = {}
    for at, rows in enumerate(len(window) - 1 for window in windows):
        shapes = {"logprobs": (rows, k), "ids": (rows, k), "rest": (rows,), "first": (rows,)}
        for field, shape in shapes.items():
            infos[f"{at}.{field}"] = TensorInfo(torch.int32 if field in ("ids", "first") else torch.float32, shape)
    return infos


def binding(text_sha256: str, windows: Sequence[Tensor], tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """Digests of all on which the positions and the ids of a file depend."""
    lengths = torch.tensor([len(window) for window in windows])
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    values = text_sha256, hashlib.sha256(vocabulary).hexdigest(), digest(torch.cat([lengths, *windows]))
    return dict(zip(OTHERS, values, strict=True))


def logprobs_name(path: str | Path) -> Path:
    """The name of a file to write; WeLoreError for one by which --against could not tell it from a model."""
    if Path(path).suffix != SUFFIX:
        raise WeLoreError(f"{path} is no name for a file of log-probabilities: call it NAME{SUFFIX}")
    return Path(path)


def write_logprobs(
    path: Path, predictions: Iterable[Iterable[Predictions]], windows: Sequence[Tensor], k: int, header: dict[str, str]
) -> None:
    """Write the predictions in every window, given in pieces, whole or not at all.

    header: what the file is bound to (`binding`), the name of the model and the size of its vocabulary.
    """
    layout, header = _layout(windows, k), header | {"format": FORMAT}
    with atomic_write(path) as partial, TensorWriter(partial, layout, header) as writer:
        for at, pieces in enumerate(predictions):
            for field, parts in zip(Predictions._fields, zip(*pieces, strict=True), strict=True):
                writer.write(f"{at}.{field}", (part.flatten() for part in parts))


class LogprobsFile:
    """A file of log-probabilities. model: of which they are; k: tokens listed; vocabulary: tokens that there are."""

    def __init__(self, path: str | Path) -> None:
        """Open it; WeLoreError if it is missing or something else."""
        if not Path(path).is_file():
            raise WeLoreError(f"{path} does not exist: make it with `welore evaluate DENSE --save-logprobs {path}`")
        self.reader = TensorReader(path)
        self.header = self.reader.metadata
        with refusing(f"{path} holds no log-probabilities that can be read", "make it again with --save-logprobs"):
            if self.header["format"] != FORMAT:
                raise ValueError(f"its format is {self.header['format']!r}")
            self.model, self.vocabulary = self.header["model"], int(self.header["vocab_size"])
            self.k = self.reader.entries["0.ids"].shape[1]

    def require(self, bound: dict[str, str], windows: Sequence[Tensor]) -> None:
        """Raise WeLoreError unless the file is of this text, tokenizer and windows, and complete."""
        for name, difference in OTHERS.items():
            if self.header.get(name) != bound[name]:
                raise WeLoreError(f"{self.reader.path} was made with {difference}")
        if self.reader.entries != _layout(windows, self.k):
            raise self._damaged()

    def pieces(self, window: int, rows: int) -> Iterator[Predictions]:
        """The predictions in a window, at most so many rows at once; WeLoreError if no model can have made them."""
        every = Predictions(*(self.reader.read(f"{window}.{field}") for field in Predictions._fields))
        ids = torch.cat([every.ids, every.first[:, None]], -1)
        sums = every.logprobs.exp().sum(-1) + every.rest.exp()
        if bool(((ids < 0) | (ids >= self.vocabulary)).any()) or not bool(((sums - 1).abs() < 1e-3).all()):
            raise self._damaged()
        return map(Predictions._make, zip(*(tensor.split(rows) for tensor in every), strict=True))

    def _damaged(self) -> WeLoreError:
        return WeLoreError(f"{self.reader.path} is damaged: make it again with --save-logprobs")


def saved_logprobs(dense: Any) -> LogprobsFile | None:
    """The file of log-probabilities with which a model is compared; None if it is a model."""
    return LogprobsFile(dense) if isinstance(dense, str | Path) and Path(dense).suffix == SUFFIX else None
