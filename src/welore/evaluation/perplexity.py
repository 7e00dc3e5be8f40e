"""The perplexity of a language model on a text, and its divergence from the dense model it was made from."""

import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from welore.config import TOP_LOGPROBS, Dataset, EvaluationConfig, RunOptions, as_record, require_at_least, settings_of
from welore.data.packing import IGNORED, Batch
from welore.data.text import TextOptions
from welore.data.windows import Openings, evaluation_text, require_known_tokens, stack, windows
from welore.errors import WeLoreError
from welore.evaluation.divergence import divergence, save_predictions
from welore.evaluation.logprobs import LogprobsFile, binding, logprobs_name, saved_logprobs
from welore.io.claim import claimed
from welore.io.context import RunContext, finest_dtype
from welore.io.progress import Progress, counted
from welore.layers.head import in_pieces
from welore.models.load import LoadedModel, evaluating, input_device, load_model, warn_if_slow
from welore.models.skeleton import context_length, require_context_length
from welore.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS = 1 << 24  # that are in memory at once, of all positions of a batch


def evaluate(
    model: "str | Path | PreTrainedModel",
    config: EvaluationConfig | None = None,
    *,
    dataset: Dataset | None = None,
    against: "str | Path | PreTrainedModel | None" = None,
    save_logprobs: str | Path | None = None,
    top_logprobs: int = TOP_LOGPROBS,
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
        against: the dense model, or a file of its log-probabilities; adds `kl_mean`, `kl_median`, `kl_p99` (nats per
            token) and `top1_agreement` of the next-token distributions on the same windows.
        save_logprobs: .safetensors file to write, for `against`: the `top_logprobs` likeliest tokens after each one.
        label: a name for tables.
        **options: device, progress, cache_dir, revision, tokenizer.

    Returns:
        A record of kind "perplexity": perplexity, nll (nats), effective rank reduction, parameter ratio and bytes.

    Raises:
        WeLoreError: the model or the text cannot be read, or the model computes NaN or Inf.
    """
    context = RunContext.create(**options)
    config = settings_of(EvaluationConfig, config, dataset=dataset)
    require_at_least(1, top_logprobs=top_logprobs)
    saved = saved_logprobs(against)
    with claimed(save_logprobs and logprobs_name(save_logprobs), model, config, against, overwrite=context.overwrite):
        text, digest = evaluation_text(config.dataset, TextOptions.of(config, context))
        loaded = load_model(model, context, config.dtype, label, device_map=config.device_map)
        net = loaded.model
        pieces = windows(loaded.tokenizer, text, config.max_length, config.num_windows, config.bos)
        require_context_length(len(pieces[0]), context_length(net.config))
        require_known_tokens(net, torch.cat(pieces))
        bound = binding(digest, pieces, loaded.tokenizer)
        loaded.inputs["text_sha256"] = digest
        warn_if_slow(net.dtype, net.device)
        started, measured = time.perf_counter(), dict[str, float]()
        if against is not None:
            measured = _divergence(loaded, saved or against, text, pieces, bound, config, context)
        if save_logprobs is not None:
            header = bound | {"model": str(loaded.inputs["model"])}
            measured |= save_predictions(Path(save_logprobs), net, pieces, top_logprobs, header, context.progress)
        if not measured:
            measured = {"nll": _mean_loss(net, pieces, config.batch_size, context.progress)}
    numbers: dict[str, Any] = {"perplexity": perplexity_of(measured["nll"])} | measured
    numbers |= {"tokens": sum(len(piece) - 1 for piece in pieces), "windows": len(pieces)}
    numbers["seconds"] = time.perf_counter() - started
    bos = "text" if isinstance(text, Tensor) else Openings.of(loaded.tokenizer, config.bos, config.max_length).bos
    return loaded.record("perplexity", as_record(config) | {"bos": bos}, numbers)


def _mean_loss(model: "PreTrainedModel", pieces: list[Tensor], batch_size: int, progress: Progress) -> float:
    """Mean -log p of all predicted tokens, of windows that are read at once."""
    batches = counted(progress, stack(pieces, batch_size), "perplexity")
    labelled = ({"input_ids": batch, "labels": batch} for batch in batches)
    nll, tokens = negative_log_likelihood(model, labelled, input_device(model))
    if not math.isfinite(nll):
        raise WeLoreError("the model computes NaN or Inf: try --dtype float32, or look for damaged weights")
    return nll / tokens


def _divergence(
    loaded: LoadedModel,
    against: "LogprobsFile | str | Path | PreTrainedModel",
    text: str | Tensor,
    pieces: list[Tensor],
    bound: dict[str, str],
    config: EvaluationConfig,
    context: RunContext,
) -> dict[str, float]:
    """The divergence from a dense model, which the inputs of the record name.

    WeLoreError if its tokenizer gives other tokens, or it does not know them; bound: see `binding`.
    """
    if isinstance(against, LogprobsFile):
        against.require(bound, pieces)
        loaded.inputs.update(against=against.model, against_top_logprobs=against.k)
        return divergence(loaded.model, against, stack(pieces, 1), context.progress)
    dense = load_model(against, context, config.dtype, device_map=config.device_map)
    loaded.inputs["against"] = dense.inputs["model"]
    batches = stack(pieces, config.batch_size)
    theirs = stack(windows(dense.tokenizer, text, config.max_length, config.num_windows, config.bos), config.batch_size)
    if len(theirs) != len(batches) or not all(map(torch.equal, theirs, batches)):
        raise WeLoreError(
            "the tokenizers of the two models divide the text differently: compare with the dense model that the "
            "compressed one was made from"
        )
    require_known_tokens(dense.model, *batches)
    return divergence(loaded.model, dense.model, batches, context.progress)


@torch.no_grad()
def negative_log_likelihood(model: Any, batches: Iterable[Batch], device: torch.device) -> tuple[float, int]:
    """Sum of -log p over the labelled tokens, and their number; float32 logits, float64 sums."""
    total, tokens, head = 0.0, 0, _HeadInPieces(model)
    with evaluating(model):
        for batch in batches:
            inputs = {name: values.to(device) for name, values in batch.items()}
            labels = inputs.pop("labels")
            summed = head.negative_log_likelihood(inputs, labels)
            if summed is None:
                summed = _summed(model(**inputs, use_cache=False).logits, labels)
            total += summed
            tokens += int((batch["labels"][:, 1:] != IGNORED).sum())
    return total, tokens


def _summed(logits: Tensor, labels: Tensor) -> float:
    """Sum of -log p over windows; logits (windows, length, vocabulary)."""
    total = 0.0
    for scores, target in zip(logits, labels.to(logits.device), strict=True):
        losses = cross_entropy(scores[:-1].float(), target[1:], reduction="none", ignore_index=IGNORED)
        total += float(losses.sum(dtype=finest_dtype(losses.device)))
    return total


class _HeadInPieces:
    """The output layer of a model with a large vocabulary, run on some positions at a time.

    It runs inside the model's forward pass, where a head that is cut over processes is whole. A model that does more
    than its head (Gemma 2 caps its logits) is seen at the first batch; its logits are made at once.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.head = model, model.get_output_embeddings()

    def negative_log_likelihood(self, inputs: Batch, labels: Tensor) -> float | None:
        """Sum of -log p over a batch; None if its logits are small, or cannot be made in pieces."""
        size = self.model.config.get_text_config(decoder=True).vocab_size
        if self.head is None or labels.numel() * size <= LOGITS:
            return None
        total, last = 0.0, torch.zeros(0)

        def read(head: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            nonlocal total
            for hidden, target in zip(arguments[0], labels, strict=True):
                step = max(1, LOGITS // size)
                for start in range(0, len(target) - 1, step):
                    stop = start + step
                    scores = head.forward(hidden[None, start : stop + 1])  # of the last no loss is taken
                    total += _summed(scores, target[None, start : stop + 1])
            return (arguments[0][:, -1:], *arguments[1:])

        def keep(head: Any, arguments: Any, result: Tensor) -> None:
            nonlocal last
            last = result

        hooks = [self.head.register_forward_pre_hook(read), self.head.register_forward_hook(keep)]
        try:
            with in_pieces(self.head):
                logits = self.model(**inputs, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        if torch.equal(logits.float(), last.to(logits.device).float()):
            return total
        self.head = None
        return None


def perplexity_of(nll: float) -> float:
    """Its exponential, as far as that fits into a double."""
    return math.exp(min(nll, 700.0))
