"""The perplexity of a language model on a text, and its divergence from the dense model it was made from."""

import math
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from welore.config import Dataset, EvaluationConfig, RunOptions, as_record
from welore.data.packing import IGNORED, Batch
from welore.data.text import TextOptions
from welore.data.windows import Openings, evaluation_text, require_known_tokens, stack, windows
from welore.errors import WeLoreError
from welore.evaluation.divergence import divergence
from welore.io.context import RunContext, finest_dtype
from welore.io.progress import counted
from welore.models.load import LoadedModel, evaluating, load_model, warn_if_slow
from welore.models.skeleton import context_length, require_context_length
from welore.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def evaluate(
    model: "str | Path | PreTrainedModel",
    config: EvaluationConfig | None = None,
    *,
    dataset: Dataset | None = None,
    against: "str | Path | PreTrainedModel | None" = None,
    label: str | None = None,
    **options: Unpack[RunOptions],
) -> Record:
    """Measure the perplexity of a model on a text.

    The text is cut into non-overlapping windows of `max_length` tokens. Each window is read on its own. The result is
    exp of the mean negative log-likelihood over all predicted tokens, in float32, whatever the batch size.

    Args:
        model: hub id, directory, .gguf file or model in memory; the last one needs the option `tokenizer`.
        config: text, windows, batch size and dtype of the weights.
        dataset: the text, in place of config.dataset.
        against: the dense model; adds `kl_mean`, `kl_median`, `kl_p99` (nats per token) and `top1_agreement` of the
            next-token distributions on the same windows.
        label: a name for tables.
        **options: device, progress, cache_dir, revision, tokenizer.

    Returns:
        A record of kind "perplexity": perplexity, nll (nats), effective rank reduction, parameter ratio and bytes.

    Raises:
        WeLoreError: the model or the text cannot be read, or the model computes NaN or Inf.
    """
    context = RunContext.create(**options)
    config = config or EvaluationConfig()
    config = config if dataset is None else replace(config, dataset=dataset)
    text, digest = evaluation_text(config.dataset, TextOptions.of(config, context))
    loaded = load_model(model, context, config.dtype, label)
    net = loaded.model
    warn_if_slow(net.dtype, net.device)
    pieces = windows(loaded.tokenizer, text, config.max_length, config.num_windows, config.bos)
    require_context_length(len(pieces[0]), context_length(net.config))
    require_known_tokens(net, torch.cat(pieces))
    batches = stack(pieces, config.batch_size)
    started = time.perf_counter()
    labelled = ({"input_ids": batch, "labels": batch} for batch in counted(context.progress, batches, "perplexity"))
    nll, tokens = negative_log_likelihood(net, labelled, net.device)
    if not math.isfinite(nll):
        raise WeLoreError("the model computes NaN or Inf: try --dtype float32, or look for damaged weights")
    numbers = {
        "perplexity": perplexity_of(nll / tokens),
        "nll": nll / tokens,
        "tokens": tokens,
        "windows": len(pieces),
        "seconds": time.perf_counter() - started,
    }
    loaded.inputs["text_sha256"] = digest
    if against is not None:
        dense = load_model(against, context, config.dtype, None)
        loaded.inputs["against"] = dense.inputs["model"]
        _require_equal_tokens(dense, text, batches, config)
        numbers |= divergence(net, dense.model, batches, context.progress)
    bos = "text" if isinstance(text, Tensor) else Openings.of(loaded.tokenizer, config.bos, config.max_length).bos
    return loaded.record("perplexity", as_record(config) | {"bos": bos}, numbers)


def _require_equal_tokens(
    dense: LoadedModel, text: str | Tensor, batches: list[Tensor], config: EvaluationConfig
) -> None:
    """Raise WeLoreError unless the dense model's own tokenizer gives the tokens that it is to read, which it knows."""
    pieces = windows(dense.tokenizer, text, config.max_length, config.num_windows, config.bos)
    theirs = stack(pieces, config.batch_size)
    if len(theirs) != len(batches) or not all(map(torch.equal, theirs, batches)):
        raise WeLoreError(
            "the tokenizers of the two models divide the text differently: compare with the dense model that the "
            "compressed one was made from"
        )
    require_known_tokens(dense.model, *batches)


@torch.no_grad()
def negative_log_likelihood(model: Any, batches: Iterable[Batch], device: torch.device) -> tuple[float, int]:
    """Sum of -log p over the labelled tokens, and their number; float32 logits, float64 sums."""
    total, tokens = 0.0, 0
    with evaluating(model):
        for batch in batches:
            inputs = {name: values.to(device) for name, values in batch.items()}
            labels = inputs.pop("labels")
            logits = model(**inputs, use_cache=False).logits
            for scores, target in zip(logits, labels, strict=True):
                losses = cross_entropy(scores[:-1].float(), target[1:], reduction="none", ignore_index=IGNORED)
                total += float(losses.sum(dtype=finest_dtype(device)))
            tokens += int((batch["labels"][:, 1:] != IGNORED).sum())
    return total, tokens


def perplexity_of(nll: float) -> float:
    """Its exponential, as far as that fits into a double."""
    return math.exp(min(nll, 700.0))
