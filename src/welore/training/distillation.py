"""The loss of a student against its teacher: the distance between what both expect at every position.

Libraries were looked at first: Liger's and the other fused distances need a GPU with triton; torch's own
linear_cross_entropy takes a teacher's probabilities only for all positions at once.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from welore.training.chunked_loss import PIECE, shrink_head
from welore.training.data import IGNORED, Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Distillation:
    """Makes the training loss of `student` the distance from `teacher`; `show` comes before every batch.

    Loss of a predicted position, p and q being teacher's and student's distributions over the vocabulary, both at
    `temperature` T: weight T^2 KL(p || q) + (1 - weight) (-log of the student's probability of the text's next token).
    T^2 keeps the size of the gradient (Hinton et al., arXiv 1503.02531). The teacher is not trained; it must be on
    the student's device. in_pieces: hold the logits of PIECE tokens at once, where the models' heads allow it.
    """

    def __init__(
        self,
        student: "PreTrainedModel",
        teacher: "PreTrainedModel",
        *,
        weight: float = 1.0,
        temperature: float = 1.0,
        in_pieces: bool = True,
    ) -> None:
        self.teacher, self.weight, self.temperature = teacher.eval(), weight, temperature
        self.head: Any = student.get_output_embeddings() if in_pieces and shrink_head(student) else None
        self.teachers_head: Any = teacher.get_output_embeddings() if in_pieces and shrink_head(teacher) else None
        self.in_pieces = self.head is not None and self.teachers_head is not None
        self.taught: Tensor | None = None
        student.loss_function = self._loss

    @torch.no_grad()
    def show(self, batch: Batch) -> None:
        """Let the teacher read the batch that the student will read next."""
        if self.teachers_head is not None:
            self.teachers_head.train()  # then it hands hidden states on, see headloss
        read = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        self.taught = self.teacher(**read, use_cache=False).logits
        self.teacher.eval()

    def _loss(
        self, logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Any = None, **_: Any
    ) -> Tensor:
        """Mean over the predicted positions, or sum over `num_items_in_batch`; of hidden states in place of logits."""
        assert self.taught is not None, "the teacher has not seen this batch"
        wanted = labels[:, 1:].to(logits.device)
        predicted = wanted != IGNORED
        found = _Divergence.apply(
            logits[:, :-1][predicted],
            *_weights(self.head),
            self.taught[:, :-1][predicted],
            *_weights(self.teachers_head),
            wanted[predicted],
            self.weight,
            self.temperature,
        )
        self.taught = None
        count = predicted.sum() if num_items_in_batch is None else num_items_in_batch
        return found / (count.to(found.device) if isinstance(count, Tensor) else count)


class _Divergence(torch.autograd.Function):
    """Sum of the losses over positions, PIECE at a time; gradients are found on the way, so no logits are kept.

    Of student and teacher: hidden states (positions, width) and the head, or logits where `weight` is None.
    wanted: (positions,). Gradients with respect to the student's three tensors, in float32 for its head.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        taught: Tensor,
        teachers_weight: Tensor | None,
        teachers_bias: Tensor | None,
        wanted: Tensor,
        share: float,
        temperature: float,
    ) -> Tensor:
        kind = hidden.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        ctx.trained = ctx.needs_input_grad[1:3]
        weight, bias = (None if t is None else t.detach().to(low or t.dtype) for t in (weight, bias))
        pairs = zip((weight, bias), ctx.trained, strict=True)
        sums = [torch.zeros_like(t, dtype=torch.float32) for t, asked in pairs if asked and t is not None]
        slopes = torch.empty_like(hidden)
        total = torch.zeros((), device=hidden.device)
        with torch.autocast(kind, enabled=False):
            for start in range(0, len(hidden), PIECE):
                rows = slice(start, start + PIECE)
                expected = _logits(taught[rows], teachers_weight, teachers_bias).float()
                part = hidden[rows].detach().to(low or hidden.dtype)
                scores = _logits(part, weight, bias).float()
                loss, slope = divergence(scores, expected, wanted[rows], share, temperature)
                slope = slope.to(part.dtype)
                slopes[rows] = slope if weight is None else slope @ weight
                if ctx.trained[0]:
                    sums[0] += slope.T @ part
                if ctx.trained[1]:
                    sums[-1] += slope.sum(0)
                total += loss
        ctx.save_for_backward(slopes, *sums)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        slopes, *sums = ctx.saved_tensors
        rest = iter(sums)
        head = [next(rest) * slope if asked else None for asked in ctx.trained]
        return slopes * slope.to(slopes.dtype), *head, None, None, None, None, None, None


def divergence(
    scores: Tensor, expected: Tensor, wanted: Tensor, weight: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Sum over positions of weight T^2 KL(teacher || student) + (1 - weight) cross-entropy; its gradient by `scores`.

    scores, expected: (positions, vocabulary), logits of student and teacher, float32; wanted: (positions,). The
    gradient is weight T (q - p) + (1 - weight) (q_1 - what came): written down, it takes a third of the passes over
    the vocabulary that autograd makes.
    """
    p, q = (functional.log_softmax(logits / temperature, -1) for logits in (expected, scores))
    probability = p.exp()
    loss = weight * temperature**2 * torch.dot(probability.flatten(), p.sub_(q).flatten())
    slope = q.exp_().sub_(probability).mul_(weight * temperature)
    if weight < 1:
        q = functional.log_softmax(scores, -1)
        loss = loss + (1 - weight) * functional.nll_loss(q, wanted, reduction="sum")
        q.exp_()[torch.arange(len(wanted), device=wanted.device), wanted] -= 1
        slope.add_(q, alpha=1 - weight)
    return loss, slope


def _logits(hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return hidden if weight is None else functional.linear(hidden.to(weight.dtype), weight, bias)


def _weights(head: Any) -> Sequence[Tensor | None]:
    """Weight and bias of a head that hands hidden states on."""
    return (None, None) if head is None else (head.weight, head.bias)
