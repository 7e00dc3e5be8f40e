"""How far the next-token distributions of a compressed model are from those of the dense model it was made from."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from welore.errors import WeLoreError
from welore.io.progress import Progress, counted, silent
from welore.models.load import evaluating, input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 128  # tokens whose logits are in work at once, of each of the two models


@torch.inference_mode()
def divergence(
    model: "PreTrainedModel", dense: "PreTrainedModel", batches: list[Tensor], progress: Progress = silent
) -> dict[str, float]:
    """KL(dense || model) in nats over all predicted tokens, and how often both rank the same token first.

    batches: (b, length) token ids. Windows are read in pieces of at most ROWS tokens, with the keys and values of
    those before them, so that the logits of whole windows never exist.
    """
    divergences: list[Tensor] = []
    agreements: list[Tensor] = []
    with evaluating(model), evaluating(dense):
        for batch in counted(progress, batches, "divergence"):
            for own, reference in zip(logit_pieces(model, batch), logit_pieces(dense, batch), strict=True):
                kl, same = _compare(own, reference.to(own.device))
                divergences.append(kl.cpu())
                agreements.append(same.cpu())
    nats = torch.cat(divergences).double().numpy()
    if not np.isfinite(nats).all():
        raise WeLoreError("one of the two models computes NaN or Inf: try --dtype float32, or look for damaged weights")
    return {
        "kl_mean": float(nats.mean()),
        "kl_median": float(np.median(nats)),
        "kl_p99": float(np.quantile(nats, 0.99)),
        "top1_agreement": float(torch.cat(agreements).double().mean()),
    }


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


def _compare(logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """KL(reference || logits) in nats and whether the largest logit is the same one, for each row (rows,)."""
    if logits.shape != reference.shape:
        raise WeLoreError(
            f"the two models have {logits.shape[-1]} and {reference.shape[-1]} tokens: compare with the dense model "
            "that the compressed one was made from"
        )
    log_q, log_p = logits.float().log_softmax(-1), reference.float().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)  # rounding can make it slightly negative
    return kl, logits.argmax(-1) == reference.argmax(-1)
