"""How far the next-token distributions of a compressed model are from those of the dense model it was made from."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from welore.errors import WeLoreError
from welore.evaluation.logprobs import LogprobsFile, Predictions, write_logprobs
from welore.io.progress import Progress, counted, silent
from welore.models.load import evaluating, input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 128  # tokens whose logits are in work at once, of each of the two models


@torch.inference_mode()
def divergence(
    model: "PreTrainedModel",
    dense: "PreTrainedModel | LogprobsFile",
    batches: Sequence[Tensor],
    progress: Progress = silent,
) -> dict[str, float]:
    """KL(dense || model) in nats over all predicted tokens, and how often both rank the same token first.

    dense: a model, or saved log-probabilities; with these, `kl_rest` is the mean probability of the tokens that are
    not listed. batches: (b, length) token ids; with saved log-probabilities b is 1. Windows are read in pieces of at
    most ROWS tokens, with the keys and values of those before them: the logits of whole windows never exist.
    """
    compared: list[tuple[Tensor, ...]] = []
    with evaluating(model), nullcontext() if isinstance(dense, LogprobsFile) else evaluating(dense):
        for at, batch in enumerate(counted(progress, batches, "divergence")):
            theirs = dense.pieces(at, ROWS) if isinstance(dense, LogprobsFile) else logit_pieces(dense, batch)
            pairs: Iterator[tuple[Tensor, Tensor | Predictions]] = zip(logit_pieces(model, batch), theirs, strict=True)
            for own, reference in pairs:
                size = dense.vocabulary if isinstance(reference, Predictions) else reference.shape[-1]
                if own.shape[-1] != size:
                    raise WeLoreError(
                        f"the two models have {own.shape[-1]} and {size} tokens: compare with the dense model that the "
                        "compressed one was made from"
                    )
                compared.append(tuple(row.double().cpu() for row in _compare(own, reference.to(own.device))))
    nats, same, rest = (torch.cat(rows).numpy() for rows in zip(*compared, strict=True))
    if not np.isfinite(nats).all():
        raise WeLoreError("one of the two models computes NaN or Inf: try --dtype float32, or look for damaged weights")
    numbers = {
        "kl_mean": float(nats.mean()),
        "kl_median": float(np.median(nats)),
        "kl_p99": float(np.quantile(nats, 0.99)),
        "top1_agreement": float(same.mean()),
    }
    return numbers | ({"kl_rest": float(rest.mean())} if isinstance(dense, LogprobsFile) else {})


@torch.inference_mode()
def save_predictions(
    path: Path, model: "PreTrainedModel", windows: Sequence[Tensor], k: int, header: dict[str, str], progress: Progress
) -> None:
    """Write the k likeliest tokens after every token of windows (length,); header: see `write_logprobs`."""
    size = model.config.get_text_config(decoder=True).vocab_size
    reads = counted(progress, windows, "log-probabilities")
    each = ((_finite(Predictions.of(logits, min(k, size))) for logits in logit_pieces(model, w[None])) for w in reads)
    with evaluating(model):
        write_logprobs(path, each, windows, min(k, size), header | {"vocab_size": str(size)})


def _finite(predictions: Predictions) -> Predictions:
    """The predictions; WeLoreError if one is NaN."""
    if not bool(predictions.logprobs.isfinite().all()):
        raise WeLoreError("the model computes NaN or Inf: try --dtype float32, or look for damaged weights")
    return predictions


def logit_pieces(model: "PreTrainedModel", batch: Tensor) -> Iterator[Tensor]:
    """Logits (rows, vocabulary) of all tokens of a batch but the last of each window, at most ROWS at once."""
    batch, cache = batch[:, :-1].to(input_device(model)), None
    for at in range(0, batch.shape[1], ROWS // len(batch) or 1):
        ids = batch[:, at : at + (ROWS // len(batch) or 1)]
        out: Any = model(ids, past_key_values=cache, use_cache=True)
        cache = out.get("past_key_values")
        if cache is None:
            raise WeLoreError(f"{type(model).__name__} keeps no keys and values: its divergence cannot be measured")
        yield out.logits.flatten(0, 1)


def _compare(logits: Tensor, reference: Tensor | Predictions) -> tuple[Tensor, Tensor, Tensor]:
    """KL(reference || logits) in nats, whether the largest logit is the same one, and what is not listed (rows,)."""
    best = logits.argmax(-1)
    if isinstance(reference, Predictions):
        return reference.divergence(logits), best == reference.first, reference.rest.exp()
    log_q, log_p = logits.float().log_softmax(-1), reference.float().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)  # rounding can make it slightly negative
    return kl, best == reference.argmax(-1), torch.zeros_like(kl)
