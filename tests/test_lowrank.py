from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from welore.errors import WeLoreError
from welore.layers.low_rank import LowRankLayer, PivotedLinear
from welore.layers.storage_forms import FORMS, PIVOTED

SHAPES = [(5, 7, 3), (7, 5, 3), (4, 9, 4), (6, 6, 1)]  # n, m, r


def layer(form: str, shape: tuple[int, int, int] = (5, 7, 3), dtype: torch.dtype = torch.float64) -> LowRankLayer:
    torch.manual_seed(0)
    n, m, r = shape
    made = FORMS[form].layer(n, m, r, bias=True, dtype=dtype)
    state = made.state_dict()
    for part, tensor in FORMS[form].pack(torch.randn(m, r), torch.randn(r, n)).items():
        state[part].copy_(tensor)
    state["bias"].normal_()
    return made


def dense(made: LowRankLayer) -> Tensor:
    """W, so that gradients reach the factors through it."""
    if isinstance(made, PivotedLinear):
        return torch.cat((made.P.weight, made.C.weight @ made.P.weight))[made.order.long()]
    return made.A.weight @ made.B.weight


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (0,)])
def test_layer_is_its_product_forward_and_backward(
    form: str, shape: tuple[int, int, int], leading: tuple[int, ...]
) -> None:
    ours = layer(form, shape)
    theirs = deepcopy(ours)
    x = torch.randn(*leading, shape[0], dtype=torch.float64, requires_grad=True)
    x_ = x.detach().clone().requires_grad_()
    weights = torch.randn(*leading, shape[1], dtype=torch.float64)
    y, y_ = ours(x), torch.nn.functional.linear(x_, dense(theirs), theirs.bias)
    torch.testing.assert_close(y, y_)
    (weights * y).sum().backward()
    (weights * y_).sum().backward()
    torch.testing.assert_close(x.grad, x_.grad)
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)


def test_gradients_of_a_pivoted_layer_are_those_of_differences() -> None:
    made = layer(PIVOTED)
    parameters = dict(made.named_parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(made, dict(zip(parameters, values, strict=True)), x)

    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *parameters.values()))


@pytest.mark.parametrize("form", FORMS)
def test_children_are_plain_linears_and_the_state_comes_back(form: str) -> None:
    made = layer(form)
    assert [type(child) for child in made.children()] == [torch.nn.Linear] * 2
    again = FORMS[form].layer(5, 7, 3, bias=True, dtype=torch.float64)
    again.load_state_dict(made.state_dict())
    x = torch.randn(2, 5, dtype=torch.float64)
    assert torch.equal(again(x), made(x))
    assert made.state_dict()["weight"].shape == (0,)
    assert "rank=3" in repr(made)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casting_leaves_the_order_alone(dtype: torch.dtype) -> None:
    made = layer(PIVOTED, dtype=torch.float32)
    order = made.order.clone()
    cast = deepcopy(made).to(dtype)
    assert cast.order.dtype == torch.int32
    assert torch.equal(cast.order, order)
    x = torch.randn(4, 5)
    assert cast(x.to(dtype)).dtype == dtype
    torch.testing.assert_close(cast(x.to(dtype)).float(), made(x), rtol=0.05, atol=0.1)


def test_autocast_computes_in_bfloat16_and_trains_in_float32() -> None:
    made = layer(PIVOTED, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        z = made.P(torch.randn(4, 5))
        y = made(torch.randn(4, 5))
    assert z.dtype == torch.bfloat16
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in made.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_product_of_the_state_is_the_matrix_of_the_layer(form: str) -> None:
    made = layer(form, dtype=torch.float32)
    torch.testing.assert_close(FORMS[form].unpack(made.state_dict()), dense(made).detach())


@pytest.mark.parametrize("rank", [0, 7, 8])
def test_pivoted_layer_with_nothing_to_combine_is_refused(rank: int) -> None:
    with pytest.raises(WeLoreError, match=f"rank is {rank}: a pivoted layer with 7 outputs has ranks from 1 to 6"):
        PivotedLinear(9, 7, rank)


@pytest.mark.parametrize("form", FORMS)
def test_decoding_lays_weights_by_column_and_nobody_notices(form: str, tmp_path: Path) -> None:
    made = layer(form, (5, 7, 3), torch.float32).eval()
    tall = made.C if isinstance(made, PivotedLinear) else made.A
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    x = torch.randn(1, 1, 5)
    with torch.inference_mode():
        many, one = made(x.repeat(1, 2, 1)), made(x)
        assert tall.weight.stride(0) == 1
        torch.testing.assert_close(made(x), one)
    torch.testing.assert_close(one[0, 0], many[0, 1])
    state = made.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    save_file(state, tmp_path / "layer.safetensors")  # refuses what is not contiguous
    made(torch.randn(2, 5)).sum().backward()
    made.zero_grad()
    assert made.train() is made
    assert tall.weight.is_contiguous()
    made(x).sum().backward()
    assert tall.weight.is_contiguous(), "one token with gradients is no decoding"
