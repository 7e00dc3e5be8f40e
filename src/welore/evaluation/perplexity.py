"""4 - evaluate: the perplexity of a language model on a text."""

import hashlib
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from welore.data.text import read_text
from welore.data.windows import stack, windows
from welore.errors import WeLoreError, choose
from welore.io.progress import Progress, counted, silent
from welore.models.load import DTYPES, made_ready, warn_if_slow
from welore.models.replace import sizes
from welore.models.skeleton import context_length, require_context_length
from welore.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate(
    model: "str | Path | PreTrainedModel",
    data: str = "wikitext2",
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    length: int = 2048,
    limit: int | None = None,
    batch_size: int = 1,
    dtype: str = "auto",
    device: str | None = None,
    label: str | None = None,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
    progress: Progress = silent,
) -> Record:
    """Perplexity record of MODEL on `data` (see corpus.read_text), beside its ERR, parameter ratio and bytes.

    The text is cut into non-overlapping windows of `length` tokens (the first `limit` of them), each read on its
    own; the result is exp of the mean negative log-likelihood over all predicted tokens, in float32, whatever the
    batch size. dtype: of the weights; "auto" is that of the checkpoint. tokenizer: needed for a model in memory.
    label: a name for tables.
    """
    choose("dtype", dtype, DTYPES)
    if batch_size < 1:
        raise WeLoreError(f"batch_size is {batch_size}: it must be at least 1")
    text = read_text(data, cache_dir=cache_dir)
    ready = made_ready(
        model, tokenizer, dtype=dtype, device=device, cache_dir=cache_dir, revision=revision, label=label
    )
    warn_if_slow(ready.model.dtype, ready.model.device)
    model = ready.model
    found = windows(ready.tokenizer, text, length, limit)
    _refuse_misfit(model, found)
    started = time.perf_counter()
    nll, tokens = negative_log_likelihood(model, stack(found, batch_size), progress)
    mean = nll / tokens
    numbers = {
        "perplexity": math.exp(min(mean, 700.0)),  # beyond that a double overflows; nll stays exact
        "nll": mean,
        "tokens": tokens,
        "windows": len(found),
        "seconds": time.perf_counter() - started,
    }
    settings = {
        "data": data,
        "length": length,
        "windows": limit,
        "batch_size": batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
    }
    inputs = ready.inputs | {"text_sha256": hashlib.sha256(text.encode()).hexdigest()}
    return Record("perplexity", inputs, settings, numbers | sizes(model))


@torch.inference_mode()
def negative_log_likelihood(
    model: "PreTrainedModel", batches: list[Tensor], progress: Progress = silent
) -> tuple[float, int]:
    """Sum of -log p(token | those before it in its window), and the number of tokens predicted.

    batches: (b, length) token ids. Logits are read in float32; sums are kept in float64.
    """
    total, tokens = 0.0, 0
    training = model.training
    model.eval()
    for batch in counted(progress, batches, "perplexity"):
        ids = batch.to(model.device)
        logits = model(ids, use_cache=False).logits
        for window, scores in zip(ids, logits, strict=True):
            losses = cross_entropy(scores[:-1].float(), window[1:], reduction="none")
            total += float(losses.sum(dtype=torch.float64))
        tokens += batch.numel() - len(batch)
    model.train(training)
    if not math.isfinite(total):
        raise WeLoreError("the model computes NaN or Inf: try --dtype float32, or look for damaged weights")
    return total, tokens


def _refuse_misfit(model: "PreTrainedModel", found: list[Tensor]) -> None:
    """Raise WeLoreError if a window is longer than the model can read, or of a tokenizer with more tokens."""
    require_context_length(len(found[0]), context_length(model.config))
    embeddings: Any = model.get_input_embeddings()
    largest, size = max(int(window.max()) for window in found), len(embeddings.weight)
    if largest >= size:
        raise WeLoreError(f"the tokenizer is another model's: it gives token {largest}, this model knows {size}")
