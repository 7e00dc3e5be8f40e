"""The perplexity of a language model on a text, and its divergence from the dense model it was made from."""

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from welore.config import Dataset, EvaluationConfig, RunOptions, as_record
from welore.data.text import TextOptions
from welore.data.windows import evaluation_text, stack, windows
from welore.errors import WeLoreError
from welore.evaluation.divergence import divergence
from welore.io.context import RunContext
from welore.io.progress import Progress, counted, silent
from welore.models.load import evaluating, load_for_inference, warn_if_slow
from welore.models.replace import sizes
from welore.models.skeleton import context_length, require_context_length, require_known_tokens
from welore.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NATS = 700.0  # the exponential of more does not fit into a double


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
    loaded = load_for_inference(model, context, config.dtype, label)
    net = loaded.model
    warn_if_slow(net.dtype, net.device)
    pieces = windows(loaded.tokenizer, text, config.max_length, config.num_windows)
    require_context_length(len(pieces[0]), context_length(net.config))
    require_known_tokens(net, torch.cat(pieces))
    batches = stack(pieces, config.batch_size)
    started = time.perf_counter()
    nll, tokens = negative_log_likelihood(net, batches, context.progress)
    mean = nll / tokens
    numbers = {
        "perplexity": math.exp(min(mean, NATS)),
        "nll": mean,
        "tokens": tokens,
        "windows": len(pieces),
        "seconds": time.perf_counter() - started,
    }
    inputs = loaded.inputs | {"text_sha256": digest}
    if against is not None:
        dense = load_for_inference(against, context, config.dtype, None)
        inputs["against"] = dense.inputs["model"]
        numbers |= divergence(net, dense.model, batches, context.progress)
    settings = as_record(config) | {"dtype": str(net.dtype).removeprefix("torch."), "device": str(net.device)}
    return Record("perplexity", inputs, settings, numbers | sizes(net))


@torch.inference_mode()
def negative_log_likelihood(
    model: "PreTrainedModel", batches: list[Tensor], progress: Progress = silent
) -> tuple[float, int]:
    """Sum of -log p(token | those before it in its window), and the number of tokens predicted.

    batches: (b, length) token ids. Logits are read in float32; sums are kept in float64.
    """
    total, tokens = 0.0, 0
    with evaluating(model):
        for batch in counted(progress, batches, "perplexity"):
            ids = batch.to(model.device)
            logits = model(ids, use_cache=False).logits
            for window, scores in zip(ids, logits, strict=True):
                losses = cross_entropy(scores[:-1].float(), window[1:], reduction="none")
                total += float(losses.sum(dtype=torch.float64))
            tokens += batch.numel() - len(batch)
    if not math.isfinite(total):
        raise WeLoreError("the model computes NaN or Inf: try --dtype float32, or look for damaged weights")
    return total, tokens
