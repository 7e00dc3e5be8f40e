from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from conftest import build, compress
from welore.errors import WeLoreError
from welore.training.activations import PRODUCTS, keep_wide_products
from welore.training.preparation import cast
from welore.training.streaming import streamed

IDS = torch.tensor([[5, 17, 3, 88, 42, 9, 61], [7, 7, 1, 90, 2, 4, 95]])


class Products(TorchDispatchMode):
    """Counts the matrix products that are really computed, by how many numbers each sums over."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in PRODUCTS:
            self.count[args[PRODUCTS[func._schema.name]].shape[-1]] += 1
        return func(*args, **kwargs or {})


def step(family: str, dtype: torch.dtype | None, prepare: Callable[[Any], None], **changes: Any) -> Any:
    """A compressed model after one backward pass; its loss; the products computed for it."""
    model = build(family, **changes)
    compress(model, rank_reduction=0.4, min_ratio=0.3)
    prepare(model.train())
    with Products() as products, torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
    return model, loss, products.count


def everything_again(model: PreTrainedModel) -> None:
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "phi3"])
def test_gradients_are_equal_and_no_wide_product_is_repeated(
    family: str, attention: str, dtype: torch.dtype | None
) -> None:
    changes = {"attn_implementation": attention}
    usual, loss, once = step(family, dtype, lambda model: None, **changes)
    thrifty, same, kept = step(family, dtype, keep_wide_products, **changes)
    assert torch.equal(loss, same)
    for (name, before), after in zip(usual.named_parameters(), thrifty.parameters(), strict=True):
        assert torch.equal(before.grad, after.grad), name
    width = usual.config.hidden_size
    repeated = kept - once
    assert repeated
    assert max(repeated) < width
    _, _, twice = step(family, dtype, everything_again, **changes)
    assert max(twice - once) >= width  # the control: here they are


def test_a_model_without_checkpointing_is_refused() -> None:
    model = build("llama")
    model.supports_gradient_checkpointing = False
    with pytest.raises(WeLoreError, match="LlamaForCausalLM has no checkpointing of activations"):
        keep_wide_products(model)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # qwen2: with biases
def test_frozen_weights_that_stay_on_the_host_give_the_same_gradients(family: str, stored: torch.dtype) -> None:
    def gradient(streaming: bool) -> torch.Tensor:
        model: Any = build(family)
        compress(model, rank_reduction=0.4, min_ratio=0.3)
        model.to(stored).requires_grad_(False)
        norm = model.model.layers[0].input_layernorm.weight.requires_grad_(True)
        with streamed(model, torch.float32) if streaming else nullcontext([]) as layers:
            cast(model, torch.float32, streamed=layers)
            assert {layer.weight.dtype for layer in layers} == ({stored} if streaming else set())
            assert {p.dtype for p in model.model.embed_tokens.parameters()} == {torch.float32}
            model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        assert norm.grad is not None
        return norm.grad

    torch.testing.assert_close(gradient(True), gradient(False))


def test_frozen_weights_stay_on_the_host_and_trained_ones_do_not() -> None:
    model: Any = build("llama").requires_grad_(False)
    trained = model.model.layers[0].self_attn.q_proj.requires_grad_(True)
    other = model.model.layers[0].self_attn.k_proj
    with streamed(model, torch.bfloat16):
        torch.nn.Module.to(model, torch.bfloat16)
        assert (other.weight.dtype, trained.weight.dtype) == (torch.float32, torch.bfloat16)
        assert model.lm_head.weight.dtype is torch.bfloat16
    torch.nn.Module.to(model, torch.bfloat16)
    assert other.weight.dtype is torch.bfloat16


def test_weights_on_the_host_are_converted_only_if_that_makes_them_smaller() -> None:
    for stored, wanted in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        model: Any = build("llama", stored).requires_grad_(False)
        with streamed(model, wanted) as layers:
            cast(model, wanted, streamed=layers)
            assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}
            assert model.lm_head.weight.dtype is wanted
