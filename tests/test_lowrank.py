from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from torch.utils._python_dispatch import TorchDispatchMode

from welore.errors import WeLoreError
from welore.layers.low_rank import LowRankLayer, LowRankLinear, PivotedLinear, optimize_for_decoding
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
        return torch.cat((made.P.weight, made.C.weight @ made.P.weight))[made.order]
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
    assert cast.order.dtype == torch.int64
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
def test_decoding_leaves_the_parameters_alone(form: str, tmp_path: Path) -> None:
    made = layer(form, (5, 7, 3), torch.float32).eval()
    x = torch.randn(1, 1, 5)
    with torch.inference_mode():
        made(x)
    parameters = dict(made.named_parameters())
    assert parameters_to_vector(parameters.values()).numel() == sum(p.numel() for p in parameters.values())
    save_file(parameters, tmp_path / "layer.safetensors")  # refuses what is not contiguous
    program = torch.export.export(made, (x,)).module()
    torch.testing.assert_close(program(x), made(x))
    for tensor in made.state_dict().values():
        tensor.zero_()
    assert not any(tensor.any() for tensor in (*parameters.values(), *made.buffers()))


def test_decoding_hands_the_weight_on_as_it_is() -> None:
    class Scaled(torch.Tensor):
        """As torchao's: a weight that knows only what a linear layer does with it."""

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is not torch.nn.functional.linear:
                return super().__torch_function__(function, types, args, kwargs or {})
            x, weight = args[:2]
            return torch.nn.functional.linear(x, 2 * weight.as_subclass(torch.Tensor))

    made = LowRankLinear(5, 7, 3).eval()
    x = torch.randn(1, 5)
    expected = 2 * made(x)
    made.A.weight = torch.nn.Parameter(made.A.weight.detach().as_subclass(Scaled), requires_grad=False)
    optimize_for_decoding(made)
    with torch.inference_mode():
        torch.testing.assert_close(torch.Tensor(made(x)), expected)


@pytest.mark.parametrize("form", FORMS)
def test_optimized_for_decoding_is_the_same_layer(form: str) -> None:
    made = layer(form, (5, 7, 3), torch.float32)
    x, before = torch.randn(1, 5), {name: tensor.clone() for name, tensor in made.state_dict().items()}
    expected = made(x)
    with torch.inference_mode():
        optimize_for_decoding(torch.nn.Sequential(made, torch.nn.Linear(7, 7)))
    assert getattr(made, made.tall).weight.stride(0) == 1
    torch.testing.assert_close(made(x), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())
    made(x).sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())


def test_no_operation_of_a_pivoted_layer_on_a_gpu_adds_atomically() -> None:
    class Names(TorchDispatchMode):
        seen: ClassVar[set[str]] = set()

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.add(function.overloadpacket.__name__)
            return function(*args, **kwargs or {})

    made = PivotedLinear(5, 7, 3, device="meta")
    with Names() as names:
        made(torch.empty(2, 5, device="meta")).sum().backward()
    assert "index_select" in names.seen
    assert not names.seen & {"gather", "scatter_add", "scatter_add_"}
    order = torch.randperm(7)
    y = torch.randn(2, 3, 7)
    assert torch.equal(y.index_select(-1, order), y.gather(-1, order.expand(y.shape)))
