"""The loss of a batch: of the text's own tokens, or the distance from a teacher; without whole logits where possible.

Logits, tokens x vocabulary numbers in several copies, can take more memory than everything else. So they are computed
and differentiated a chunk of tokens at a time, from the hidden states that the model's head reads.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from welore.data.packing import IGNORED, Batch
from welore.data.windows import TopK
from welore.layers.head import in_pieces, linear_in_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK, LOGITS = 256, 1 << 23  # tokens whose logits exist at once, at most, and how many logits


class Objective:
    """The sum of a batch's losses over its predicted tokens.

    Without a teacher, -log of the probability of the text's next token. With one, p and q being teacher's and
    student's distributions over the vocabulary at `temperature` T: weight T^2 KL(p || q) + (1 - weight) times that.
    T^2 keeps the size of the gradient (Hinton et al., arXiv 1503.02531). The teacher is frozen and lies on the
    student's device; for a student that is `taught`, every batch holds a teacher's predictions in its place (see
    top_k_divergence). chunked: whether logits are made in chunks, which a model that changes its head's product (Gemma
    2 caps it) does not allow; this is seen at the first batch.
    """

    def __init__(
        self,
        student: "PreTrainedModel",
        teacher: "PreTrainedModel | None" = None,
        *,
        weight: float = 1.0,
        temperature: float = 1.0,
        whole_logits: bool = False,
        taught: bool = False,
    ) -> None:
        self.teacher, self.weight, self.temperature = teacher, weight, temperature
        self.head = None if whole_logits else _linear_head(student, by_torch=teacher is None and not taught)
        self.teacher_head = None if whole_logits or teacher is None else _linear_head(teacher)
        self.compared = False  # what the model makes of its head's result

    @property
    def chunked(self) -> bool:
        """Whether no whole logits exist, neither the student's nor the teacher's."""
        return self.head is not None and (self.teacher is None or self.teacher_head is not None)

    def __call__(self, model: Any, inputs: Batch) -> tuple[Tensor, Any]:
        """The sum of the losses, and the outputs of `model`: the student, or what a Trainer has made of it."""
        labels = inputs["labels"]
        text = {name: values for name, values in inputs.items() if name not in ("labels", "logprobs", "ids")}
        predicted = labels[:, 1:] != IGNORED
        expected: Tensor | TopK | None = None
        if "ids" in inputs:
            expected = TopK(inputs["logprobs"], inputs["ids"])[:, :-1][predicted]
        elif self.teacher is not None:
            expected = self.teacher_outputs(text)[:, :-1][predicted]
        if self.head is not None:
            total, outputs = _at_head(model, self.head, text, lambda hidden: self._total(hidden, expected, labels))
            if self.compared or torch.equal(total.float(), outputs.logits.float()):
                self.compared = True
                return outputs.logits.sum(), outputs
            self.head = None
        outputs = model(**text, use_cache=False)
        return self._total(outputs.logits, expected, labels).sum(), outputs

    @torch.no_grad()
    def teacher_outputs(self, text: Batch) -> Tensor:
        """The hidden states that the teacher's head reads (b, length, width), or its logits."""
        assert self.teacher is not None
        if self.teacher_head is not None:
            hidden, outputs = _at_head(self.teacher, self.teacher_head, text, lambda hidden: hidden)
            if self.compared or torch.equal(hidden.float(), outputs.logits.float()):
                return hidden
            self.teacher_head = None
        logits: Tensor = self.teacher(**text, use_cache=False).logits
        return logits

    def _total(self, states: Tensor, expected: Tensor | TopK | None, labels: Tensor) -> Tensor:
        """(1, 1, 1), of hidden states or logits (b, length, ...); expected: the teacher's at predicted tokens."""
        target = labels[:, 1:].to(states.device)
        if expected is None and self.head is not None:
            total = _cross_entropy(states[:, :-1].flatten(0, 1), self.head, target.flatten())
        elif expected is None:
            total = functional.cross_entropy(
                states[:, :-1].flatten(0, 1).float(), target.flatten(), ignore_index=IGNORED, reduction="sum"
            )
        else:
            predicted = target != IGNORED
            total = self._distance(states[:, :-1][predicted], expected, target[predicted])
        return total.view(1, 1, 1)

    def _distance(self, student: Tensor, teacher: Tensor | TopK, target: Tensor) -> Tensor:
        """The sum over positions. Gradients are found chunk by chunk on the way, so that only one chunk's logits exist.

        The result is the sum and a linear function of value 0 with those gradients: the backward pass repeats nothing.
        """
        weights = [] if self.head is None else [p for p in self.head.parameters() if p.requires_grad]
        slopes = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in (student, *weights)]
        total = torch.zeros((), device=student.device)
        size = CHUNK if self.head is None else chunk_of(len(self.head.weight))
        for start in range(0, len(student), size):
            rows = slice(start, start + size)
            part = student[rows].detach().requires_grad_()
            with torch.enable_grad():
                loss = self._distance_of_chunk(part, teacher[rows], target[rows])
                own, *others = torch.autograd.grad(loss, [part, *weights])
            total += loss.detach()
            slopes[0][rows] = own
            for slope, other in zip(slopes[1:], others, strict=True):
                slope += other
        linear = sum((t.float() * slope).sum() for t, slope in zip((student, *weights), slopes, strict=True))
        return total + (linear - linear.detach())

    def _distance_of_chunk(self, student: Tensor, teacher: Tensor | TopK, target: Tensor) -> Tensor:
        scores, T = _logits(student, self.head), self.temperature
        if isinstance(teacher, TopK):
            loss = self.weight * top_k_divergence(scores, teacher)
        else:
            expected = _logits(teacher, self.teacher_head)
            p, q = (functional.log_softmax(logits / T if T != 1 else logits, -1) for logits in (expected, scores))
            loss = self.weight * T**2 * functional.kl_div(q, p, reduction="sum", log_target=True)
        if self.weight < 1:
            loss = loss + (1 - self.weight) * functional.cross_entropy(scores, target, reduction="sum")
        return loss


def chunk_of(vocabulary: int) -> int:
    """How many tokens are in a chunk, of a head with so many outputs."""
    return max(1, min(CHUNK, LOGITS // vocabulary))


def top_k_divergence(scores: Tensor, teacher: TopK) -> Tensor:
    """Sum over positions of KL(p || q) between a teacher's k tokens and one class for all others, and the student.

    scores: (positions, vocabulary), the student's logits, float32. With k = vocabulary it is KL(p || q) itself; with
    fewer tokens it is a lower bound, and equal where p and q share out the rest alike.
    """
    ids, p = teacher.ids.long(), teacher.logprobs.float()
    top = scores.gather(-1, ids)
    if ids.shape[-1] == scores.shape[-1]:
        return functional.kl_div(top.log_softmax(-1), p, reduction="sum", log_target=True)
    others = scores.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    q = torch.cat((top, others), -1).log_softmax(-1)
    expected = torch.cat((p.exp(), teacher.rest()[:, None]), -1)
    return functional.kl_div(q, expected, reduction="sum")  # 0 log 0 is 0


def _linear_head(model: "PreTrainedModel", *, by_torch: bool = False) -> Any:
    """The output layer, if logits can be made from it in chunks; by_torch: by its function, which is of torch 2.13."""
    head: Any = model.get_output_embeddings()
    if type(head) is not nn.Linear or (by_torch and not hasattr(nn, "LinearCrossEntropyOptions")):
        return None
    return head


def _at_head(model: Any, head: nn.Module, text: Batch, compute: Callable[[Tensor], Tensor]) -> tuple[Tensor, Any]:
    """compute(hidden states that the head reads), and the model's outputs, which have it in place of logits.

    It is computed inside the model's forward pass, where a head that is cut over processes is whole.
    """
    results = [torch.zeros(0)]

    def read(module: nn.Module, arguments: Any) -> Any:
        results[0] = compute(arguments[0])
        return (arguments[0][:, -1:], *arguments[1:])

    hooks = [head.register_forward_pre_hook(read), head.register_forward_hook(lambda *_: results[0])]
    try:
        with in_pieces(head):
            outputs = model(**text, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return results[0], outputs


def _cross_entropy(hidden: Tensor, head: Any, target: Tensor) -> Tensor:
    """The sum over positions that have a label; hidden: (positions, width). Chunks are torch's."""
    weight, bias = head.weight, head.bias
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    total: Tensor = functional.linear_cross_entropy(
        hidden,
        weight,
        target,
        linear_bias=bias,
        reduction="sum",
        ignore_index=IGNORED,
        options=nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK, acc_policy="accurate"),  # and the faster one
    )
    return total


def _logits(states: Tensor, head: Any) -> Tensor:
    """Of hidden states (positions, width) by the head, or logits as they are: float32."""
    if head is None:
        return states.float()
    kind = states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    weight, bias = head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)
    with torch.autocast(kind, enabled=False):  # its cast of a weight would be differentiated once, in low precision
        return linear_in_pieces(states.to(dtype), weight, bias).float()
