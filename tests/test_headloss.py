import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from conftest import build
from welore.training.chunked_loss import shrink_head

pytestmark = pytest.mark.skipif(
    not hasattr(nn, "LinearCrossEntropyOptions"), reason="this torch has no linear_cross_entropy in pieces (2.13)"
)
IDS = torch.tensor([[5, 17, 3, 88, 42, 9, 61, 30], [7, 7, 1, 90, 2, 4, 95, 50]])


def loss_and_gradients(
    model: PreTrainedModel, labels: Tensor, dtype: torch.dtype | None
) -> tuple[float, dict[str, Tensor]]:
    model.eval()  # no dropout,
    model.get_output_embeddings().train()  # but the head as in training
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(input_ids=IDS, labels=labels, num_items_in_batch=torch.tensor(9)).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "phi3", "opt"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_loss_and_gradients_are_those_of_the_whole_logits(family: str, dtype: torch.dtype | None) -> None:
    labels = IDS.clone()
    labels[0, :4] = -100
    expected, gradients = loss_and_gradients(build(family), labels, dtype)
    model = build(family)
    assert shrink_head(model)
    found, ours = loss_and_gradients(model, labels, dtype)
    near = 2e-2 if dtype else 1e-5
    assert found == pytest.approx(expected, rel=near)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.norm(ours[name] - gradient) <= 4 * near * torch.norm(gradient) + 1e-5, name


def test_evaluation_sees_logits_as_before() -> None:
    model = build("llama")
    expected = model.eval()(IDS).logits
    shrink_head(model)
    assert torch.equal(model.eval()(IDS).logits, expected)


def test_a_model_that_changes_its_logits_is_left_alone() -> None:
    model = build("gemma2", final_logit_softcapping=0.5)
    expected = model.train()(input_ids=IDS, labels=IDS).loss
    assert not shrink_head(model)
    assert torch.equal(model.train()(input_ids=IDS, labels=IDS).loss, expected)
