from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from conftest import build, compress
from welore.errors import WeLoreError
from welore.training.activations import PRODUCTS, keep_wide_products

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
