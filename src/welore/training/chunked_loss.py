"""The loss of a language model without its logits: head and cross-entropy in pieces, by torch's own function.

Logits are tokens x vocabulary numbers, held in several copies while they are differentiated: with a small model and
a large vocabulary more than everything else together.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from welore.models.skeleton import decoder_blocks
from welore.training.data import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PIECE = 256  # tokens whose logits exist at once
PROBE = 8  # tokens on which the loss is compared
TOLERANCE = 1e-2  # of the compared losses, relative: bfloat16 rounds
MORE_THAN_A_HEAD = ("final_logit_softcapping", "logits_scaling", "logit_scale")  # Gemma 2, Granite, Cohere


def shrink_head(model: "PreTrainedModel") -> bool:
    """Make the training loss of `model` skip the logits; whether it could be done.

    While the head is in training mode it hands the hidden states on, and the loss function applies it in pieces.
    A model that does more to its logits would compute another loss: those that say so are left alone, and with all
    others the two losses are compared on a few tokens. Where they differ, or torch lacks the function (before 2.13),
    everything stays as it was.
    """
    head: Any = model.get_output_embeddings()
    config = model.config.get_text_config(decoder=True)
    if any(getattr(config, name, None) is not None for name in MORE_THAN_A_HEAD):
        return False
    if not hasattr(nn, "LinearCrossEntropyOptions") or type(head) is not nn.Linear:
        return False
    usual_forward, usual_loss = head.forward, model.loss_function
    before = _probe(model, head)
    setattr(head, "forward", lambda hidden: hidden if head.training else usual_forward(hidden))  # noqa: B010 - see mypy

    def loss(logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Any = None, **_: Any) -> Tensor:
        return _loss_in_pieces(logits, head, labels, num_items_in_batch)

    model.loss_function = loss
    after = _probe(model, head)
    if abs(after - before) <= TOLERANCE * abs(before):
        return True
    del head.forward
    model.loss_function = usual_loss
    return False


def _loss_in_pieces(hidden: Tensor, head: Any, labels: Tensor, items: Any) -> Tensor:
    """Mean over the labelled tokens, or sum over `items`; hidden: (b, length, width), labels: (b, length)."""
    wanted = labels[:, 1:].reshape(-1).to(hidden.device)
    flat, weight, bias = hidden[:, :-1].reshape(-1, hidden.shape[-1]), head.weight, head.bias
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        flat, weight, bias = flat.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    total = functional.linear_cross_entropy(
        flat,
        weight,
        wanted,
        linear_bias=bias,
        reduction="sum",
        ignore_index=IGNORED,
        options=nn.LinearCrossEntropyOptions(batch_chunk_size=PIECE, acc_policy="accurate"),  # and the faster one
    )
    count = (wanted != IGNORED).sum() if items is None else items
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


@torch.no_grad()
def _probe(model: "PreTrainedModel", head: nn.Module) -> float:
    """Loss on a few tokens, without dropout but with the head as in training, through the first block alone.

    One block is enough to see what becomes of the logits; and what libraries keep for every matrix they have seen
    (oneDNN: half a megabyte) is not kept for shapes that never come again.
    """
    name, blocks = decoder_blocks(model)
    embeddings: Any = model.get_input_embeddings()
    training = model.training
    model.eval()
    head.train()
    device = embeddings.weight.device
    ids = torch.arange(PROBE, device=device)[None] % len(embeddings.weight)
    model.set_submodule(name, blocks[:1])
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    finally:
        model.set_submodule(name, blocks)
    model.train(training)
    return float(loss)
