from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from conftest import build
from welore.data.windows import TopK
from welore.training import objective
from welore.training.objective import Objective, top_k_divergence

IDS = torch.tensor([[5, 17, 3, 88, 42, 9, 61, 30], [7, 7, 1, 90, 2, 4, 95, 50]])
MASKED = torch.where(torch.arange(8) < torch.tensor([[4], [0]]), -100, IDS)  # a prompt of four tokens in the first row


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "CHUNK", 3)  # does not divide the positions


def teacher_of(family: str, **changes: Any) -> PreTrainedModel:
    """Like the student, a little different."""
    model = build(family, **changes)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def expected_loss(student: Tensor, teacher: Tensor, labels: Tensor, weight: float, temperature: float) -> Tensor:
    """From whole logits (b, length, vocabulary), by the definition, summed over predicted positions."""
    wanted = labels[:, 1:]
    kept = wanted != -100
    q = functional.log_softmax(student[:, :-1].float() / temperature, -1)[kept]
    p = functional.softmax(teacher[:, :-1].float() / temperature, -1)[kept]
    distance = functional.kl_div(q, p, reduction="none").sum()
    text = functional.cross_entropy(student[:, :-1].float()[kept], wanted[kept], reduction="sum")
    return weight * temperature**2 * distance + (1 - weight) * text


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def distilled(
    student: PreTrainedModel, teacher: PreTrainedModel, labels: Tensor, dtype: torch.dtype | None = None, **how: Any
) -> tuple[float, dict[str, Tensor], Objective]:
    objective = Objective(student.eval(), teacher.eval(), **how)  # no dropout
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = objective(student, {"input_ids": IDS, "labels": labels})[0] / 9
    loss.backward()
    return loss.item(), gradients(student), objective


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (0.7, 2.0)])
def test_loss_and_gradients_are_those_of_whole_logits(
    family: str, dtype: torch.dtype | None, weight: float, temperature: float
) -> None:
    student, teacher = build(family), teacher_of(family)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        scores, taught = student.eval()(input_ids=IDS).logits, teacher.eval()(input_ids=IDS).logits
    loss = expected_loss(scores, taught, MASKED, weight, temperature) / 9
    loss.backward()
    wanted = gradients(student)

    how = {"weight": weight, "temperature": temperature}
    found, ours, bound = distilled(build(family), teacher_of(family), MASKED, dtype, **how)
    assert bound.chunked
    near = 3e-2 if dtype else 1e-5
    assert found == pytest.approx(loss.item(), rel=near)
    assert ours.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert torch.norm(ours[name] - gradient) <= 4 * near * torch.norm(gradient) + 1e-5, name


def test_a_frozen_head_gets_no_gradient_and_the_rest_the_same() -> None:
    student = build("llama")
    student.get_output_embeddings().requires_grad_(False)
    _, ours, _ = distilled(student, teacher_of("llama"), MASKED)
    _, whole, _ = distilled(build("llama"), teacher_of("llama"), MASKED)
    assert whole.keys() - ours.keys() == {"lm_head.weight"}
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, whole[name])


def test_a_model_that_changes_its_logits_is_distilled_from_whole_logits() -> None:
    student, teacher = build("gemma2", final_logit_softcapping=0.5), teacher_of("gemma2", final_logit_softcapping=0.5)
    scores, taught = student.eval()(input_ids=IDS).logits, teacher.eval()(input_ids=IDS).logits
    loss = expected_loss(scores, taught, MASKED, 1.0, 1.0) / 9
    loss.backward()
    again = build("gemma2", final_logit_softcapping=0.5)
    found, ours, bound = distilled(again, teacher, MASKED)
    assert not bound.chunked
    assert found == pytest.approx(loss.item(), rel=1e-5)
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)


def test_whole_logits_give_the_same_loss() -> None:
    pieces, *_ = distilled(build("llama"), teacher_of("llama"), MASKED)
    whole, _, bound = distilled(build("llama"), teacher_of("llama"), MASKED, whole_logits=True)
    assert not bound.chunked
    assert whole == pytest.approx(pieces, rel=1e-6)


def test_nobody_learns_from_an_equal_or_from_nothing() -> None:
    loss, found, _ = distilled(build("llama"), build("llama").requires_grad_(False), MASKED)
    assert loss == pytest.approx(0, abs=1e-6)
    assert all(gradient.abs().max() < 1e-5 for gradient in found.values())
    loss, found, _ = distilled(build("llama"), teacher_of("llama"), torch.full_like(IDS, -100))
    assert loss == 0
    assert all(not gradient.any() for gradient in found.values())


def test_no_more_than_a_piece_of_logits_exists_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    linear = functional.linear

    def watched(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if len(weight) == 96:  # the vocabulary
            seen.append(hidden.numel() // hidden.shape[-1])
        return linear(hidden, weight, bias)

    monkeypatch.setattr(functional, "linear", watched)
    student, teacher = build("llama").train(), teacher_of("llama")
    loss, _ = Objective(student, teacher)(student, {"input_ids": IDS, "labels": IDS})
    loss.backward()
    assert sum(seen) == 2 * (14 + 2)  # once for the student, once for the teacher; and two last positions of each
    assert max(seen) <= 3


def test_evaluation_sees_logits_as_before_and_the_teacher_is_not_touched() -> None:
    student, teacher = build("llama"), teacher_of("llama")
    expected = [model.eval()(IDS).logits for model in (student, teacher)]
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    distilled(student, teacher, MASKED)
    for model, logits in zip((student, teacher), expected, strict=True):
        assert torch.equal(model.eval()(IDS).logits, logits)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in teacher.named_parameters())


def test_padding_is_hidden_from_the_teacher() -> None:
    student, teacher = build("llama"), teacher_of("llama")
    bound = Objective(student, teacher)
    mask = torch.ones_like(IDS)
    mask[0, 5:] = 0
    padded = torch.where(mask.bool(), IDS, 0)
    found = []
    for ids in (padded, torch.where(mask.bool(), IDS, 33)):
        found.append(bound.teacher_outputs({"input_ids": ids, "attention_mask": mask})[mask.bool()])
    assert torch.equal(*found)


def predictions(teacher: PreTrainedModel, k: int) -> TopK:
    logprobs, ids = teacher.eval()(IDS).logits.detach().double().log_softmax(-1).topk(k)
    return TopK(logprobs.float(), ids.int())


def taught(student: PreTrainedModel, teacher: TopK, labels: Tensor, **how: Any) -> tuple[float, dict[str, Tensor]]:
    objective = Objective(student.eval(), taught=True, **how)
    loss = objective(student, {"input_ids": IDS, "labels": labels, **vars(teacher)})[0] / 9
    loss.backward()
    return loss.item(), gradients(student)


@pytest.mark.parametrize("weight", [1.0, 0.7])
def test_all_of_a_teachers_log_probabilities_teach_what_the_teacher_does(weight: float) -> None:
    teacher = teacher_of("llama")
    vocabulary = teacher.config.vocab_size
    wanted, slopes, _ = distilled(build("llama"), teacher, MASKED, weight=weight)
    loss, own = taught(build("llama"), predictions(teacher, vocabulary), MASKED, weight=weight)
    assert loss == pytest.approx(wanted, rel=1e-5)
    for name, slope in slopes.items():
        assert torch.allclose(own[name], slope, atol=1e-6)


def test_the_tokens_that_a_teacher_does_not_list_are_one_class() -> None:
    scores = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    p = torch.randn(5, 12, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    ids = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(i))[:4] for i in range(5)])
    loss = top_k_divergence(scores, TopK(p.gather(-1, ids), ids.int()))
    expected = torch.zeros(())
    for row in range(5):
        mine = torch.zeros(12, dtype=torch.bool).index_fill(0, ids[row], True)
        classes = [torch.cat((x[mine], x[~mine].sum()[None])) for x in (p[row].exp(), scores[row].softmax(-1))]
        expected = expected + (classes[0] * (classes[0] / classes[1]).log()).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    own, theirs = (torch.autograd.grad(x, scores, retain_graph=True)[0] for x in (loss, expected))
    assert torch.allclose(own, theirs, atol=1e-6)


def test_a_few_log_probabilities_teach_nearly_the_same() -> None:
    teacher = teacher_of("llama")
    wanted, _, _ = distilled(build("llama"), teacher, MASKED)
    losses = [taught(build("llama"), predictions(teacher, k), MASKED)[0] for k in (1, 16, 64)]
    assert losses == sorted(losses)  # a bound from below
    assert losses[-1] <= wanted * (1 + 1e-5)
