from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import linear
from transformers import PreTrainedModel, TrainingArguments

from conftest import build
from welore.layers.head import in_pieces, linear_in_pieces, pieces_of
from welore.training.objective import Objective
from welore.training.trainer import FinetuneTrainer

pytestmark = pytest.mark.skipif(
    not hasattr(nn, "LinearCrossEntropyOptions"), reason="this torch has no linear_cross_entropy in pieces (2.13)"
)
IDS = torch.tensor([[5, 17, 3, 88, 42, 9, 61, 30], [7, 7, 1, 90, 2, 4, 95, 50]])


def loss_and_gradients(
    model: PreTrainedModel, labels: Tensor, dtype: torch.dtype | None, objective: Objective | None = None
) -> tuple[float, dict[str, Tensor]]:
    """By the model's own loss, or by an objective."""
    model.eval()  # no dropout
    batch = {"input_ids": IDS, "labels": labels}
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = objective(model, batch)[0] / 9 if objective else model(**batch, num_items_in_batch=torch.tensor(9)).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "phi3", "opt"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_loss_and_gradients_are_those_of_the_whole_logits(family: str, dtype: torch.dtype | None) -> None:
    labels = IDS.clone()
    labels[0, :4] = -100
    expected, gradients = loss_and_gradients(build(family), labels, dtype)
    model = build(family)
    objective = Objective(model)
    found, ours = loss_and_gradients(model, labels, dtype, objective)
    assert objective.chunked
    near = 2e-2 if dtype else 1e-5
    assert found == pytest.approx(expected, rel=near)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.norm(ours[name] - gradient) <= 4 * near * torch.norm(gradient) + 1e-5, name


def test_evaluation_sees_logits_as_before() -> None:
    model = build("llama")
    expected = model.eval()(IDS).logits
    loss_and_gradients(model, IDS, None, Objective(model))
    assert torch.equal(model.eval()(IDS).logits, expected)


def test_experts_are_balanced_as_by_the_models_own_loss(tmp_path: Path) -> None:
    model = build("mixtral", output_router_logits=True)
    batch = {"input_ids": IDS, "labels": IDS}
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=1)
    trainer = FinetuneTrainer(
        model=model, args=arguments, train_dataset=[batch], evaluation=[], objective=Objective(model)
    )
    loss = trainer.compute_loss(model, batch)
    assert loss.item() == pytest.approx(model(**batch, use_cache=False).loss.item(), rel=1e-6)
    assert trainer.objective.chunked


def test_a_model_that_changes_its_logits_keeps_its_loss() -> None:
    changes = {"final_logit_softcapping": 0.5}
    model = build("gemma2", **changes)
    objective = Objective(model)
    assert objective.chunked  # not seen yet
    found, ours = loss_and_gradients(model, IDS, None, objective)
    assert not objective.chunked
    expected, gradients = loss_and_gradients(build("gemma2", **changes), IDS, None)
    assert found == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_products_in_pieces_are_the_product(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("welore.layers.head.AT_ONCE", 10 * 32)  # ten rows
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 32).bfloat16(), torch.randn(33, 32).bfloat16()
    added, above = torch.randn(33).bfloat16() if bias else None, torch.randn(2, 5, 33).bfloat16()
    assert [len(piece) for piece in pieces_of(weight)] == [10, 10, 10, 3]
    results = []
    for product in (linear_in_pieces, linear):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        y = product(*leaves, added)
        results.append([y, *torch.autograd.grad(y, leaves, above)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours.float(), expected.float(), rtol=0.02, atol=0.05)


def test_a_head_multiplies_in_pieces_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("welore.layers.head.AT_ONCE", 10 * 32)
    head, rows, whole = nn.Linear(32, 33).bfloat16(), list[int](), functional.linear
    monkeypatch.setattr(functional, "linear", lambda x, w, b=None: rows.append(len(w)) or whole(x, w, b))
    with in_pieces(head):
        head(torch.zeros(2, 1, 32).bfloat16())
    head(torch.zeros(2, 1, 32).bfloat16())
    assert rows == [10, 10, 10, 3, 33]
    assert "forward" not in vars(head)
