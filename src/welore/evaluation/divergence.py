"""How far the next-token distributions of a compressed model are from those of the dense model it was made from."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

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
    """KL(dense || model) in nats over all predicted tokens, how often both rank the same token first; `nll` of model.

    dense: a model, or saved log-probabilities; with these, `kl_rest` is the mean probability of the tokens that are
    not listed. batches: (b, length) token ids; with saved log-probabilities b is 1. Windows are read in pieces of at
    most ROWS tokens, with the keys and values of those before them: the logits of whole windows never exist.
    """
    compared: list[tuple[Tensor, ...]] = []
    with evaluating(model), nullcontext() if isinstance(dense, LogprobsFile) else evaluating(dense):
        for at, batch in enumerate(counted(progress, batches, "divergence")):
            theirs: Iterator[Tensor | Predictions]
            if isinstance(dense, LogprobsFile):
                theirs = dense.pieces(at, ROWS)
            else:
                theirs = (logits for logits, _ in logit_pieces(dense, batch))
            for (own, following), reference in zip(logit_pieces(model, batch), theirs, strict=True):
                size = dense.vocabulary if isinstance(reference, Predictions) else reference.shape[-1]
                if own.shape[-1] != size:
                    raise WeLoreError(
                        f"the two models have {own.shape[-1]} and {size} tokens: compare with the dense model that the "
                        "compressed one was made from"
                    )
                rows = *_compare(own, reference.to(own.device)), _losses(own, following)
                compared.append(tuple(row.cpu().double() for row in rows))
    nats, same, rest, losses = (torch.cat(rows).numpy() for rows in zip(*compared, strict=True))
    if not np.isfinite(nats).all():
        raise WeLoreError("one of the two models computes NaN or Inf: try --dtype float32, or look for damaged weights")
    numbers = {
        "nll": float(losses.mean()),
        "kl_mean": float(nats.mean()),
        "kl_median": float(np.median(nats)),
        "kl_p99": float(np.quantile(nats, 0.99)),
        "top1_agreement": float(same.mean()),
    }
    return numbers | ({"kl_rest": float(rest.mean())} if isinstance(dense, LogprobsFile) else {})


@torch.inference_mode()
def save_predictions(
    path: Path, model: "PreTrainedModel", windows: Sequence[Tensor], k: int, header: dict[str, str], progress: Progress
) -> dict[str, float]:
    """Write the k likeliest tokens after every token of windows (length,); `nll`, as for `divergence`.

    header: see `write_logprobs`.
    """
    size = model.config.get_text_config(decoder=True).vocab_size
    losses: list[Tensor] = []

    def predictions(window: Tensor) -> Iterator[Predictions]:
        for logits, following in logit_pieces(model, window[None]):
            losses.append(_losses(logits, following).cpu().double())
            if not bool(losses[-1].isfinite().all()):
                raise WeLoreError("the model computes NaN or Inf: try --dtype float32, or look for damaged weights")
            yield Predictions.of(logits, min(k, size))

    with evaluating(model):
        each = (predictions(window) for window in counted(progress, windows, "log-probabilities"))
        write_logprobs(path, each, windows, min(k, size), header | {"vocab_size": str(size)})
    return {"nll": float(torch.cat(losses).mean())}


def logit_pieces(model: "PreTrainedModel", batch: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (rows, vocabulary) after all tokens of a batch but the last of each window, and the next tokens (rows,).

    At most ROWS at once.
    """
    ids, cache, step = batch.to(input_device(model)), None, ROWS // len(batch) or 1
    for at in range(0, ids.shape[1] - 1, step):
        stop = min(at + step, ids.shape[1] - 1)
        out: Any = model(ids[:, at:stop], past_key_values=cache, use_cache=True)
        cache = out.get("past_key_values")
        if cache is None:
            raise WeLoreError(f"{type(model).__name__} keeps no keys and values: its divergence cannot be measured")
        yield out.logits.flatten(0, 1), ids[:, at + 1 : stop + 1].flatten()


def _losses(logits: Tensor, following: Tensor) -> Tensor:
    """-log p (rows,) of the tokens that follow."""
    return cross_entropy(logits.float(), following.to(logits.device), reduction="none")


def _compare(logits: Tensor, reference: Tensor | Predictions) -> tuple[Tensor, Tensor, Tensor]:
    """KL(reference || logits) in nats, whether the largest logit is the same one, and what is not listed (rows,)."""
    best = logits.argmax(-1)
    if isinstance(reference, Predictions):
        return reference.divergence(logits), best == reference.first, reference.rest.exp()
    log_q, log_p = logits.float().log_softmax(-1), reference.float().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)  # rounding can make it slightly negative
    return kl, best == reference.argmax(-1), torch.zeros_like(kl)
