"""Matrices that read one input as one layer: equal to the layers that it stands for, also in shares of devices."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from welore.errors import WeLoreError
from welore.layers.block_grid import Grid, block_names
from welore.layers.int8 import Int8Linear, dequantize, quantize_rows
from welore.layers.low_rank import SplitLinear
from welore.layers.stacked import Part, StackedLinear
from welore.layers.storage_forms import FACTORED, FORMS, PIVOTED

N = 24
# name -> shape, grid, and the low-rank matrices by the number of their block
STACK: dict[str, tuple[Grid, Grid | None, dict[int, tuple[str, int]]]] = {
    "q": ((16, N), None, {0: (FACTORED, 5)}),
    "k": ((8, N), None, {0: (PIVOTED, 3)}),
    "v": ((8, N), None, {}),
    "up": ((32, N), (2, 1), {0: (PIVOTED, 7), 1: (FACTORED, 4)}),
    "grid": ((16, N), (2, 2), {0: (PIVOTED, 3), 2: (FACTORED, 2), 3: (PIVOTED, 5)}),
}


def product(n: int, m: int, int8: bool) -> nn.Module:
    return Int8Linear(n, m) if int8 else nn.Linear(n, m, bias=False)


@torch.no_grad()
def layer_of(name: str, int8: bool = False) -> nn.Module:
    """The layer of the checkpoint, with random weights and order; int8: its weights are rounded to 8 bits."""
    (m, n), grid, forms = STACK[name]
    torch.manual_seed(len(name) + m)
    if grid is None:
        layer = FORMS[forms[0][0]].layer(n, m, forms[0][1]) if forms else nn.Linear(n, m, bias=False)
    else:
        layer = SplitLinear(n, m, grid)
        for index, (form, rank) in forms.items():
            setattr(layer, str(index), FORMS[form].layer(n // grid[1], m // grid[0], rank))
    for key, buffer in layer.named_buffers():
        if key.endswith("order"):
            buffer.copy_(torch.randperm(len(buffer)))
    for weight in layer.parameters():
        if int8:
            weight.copy_(dequantize(*quantize_rows(weight)))
    return layer


def part(name: str, rows: range | None = None, columns: range | None = None, int8: bool = False) -> Part:
    (m, n), grid, forms = STACK[name]
    names = [name] if grid is None else block_names(name, grid)
    low_rank = {names[index]: form for index, form in forms.items()}
    integers = {key.removesuffix("_scale").removesuffix(".weight") for key in stored([name], int8) if "_scale" in key}
    return Part(name, (m, n), rows or range(m), columns or range(n), grid, low_rank, integers)


def stored(names: list[str], int8: bool = False) -> dict[str, Tensor]:
    """The tensors of the checkpoint, without tombstones."""
    found = {f"{name}.{key}": t for name in names for key, t in layer_of(name, int8).state_dict().items()}
    tensors = {key: tensor for key, tensor in found.items() if tensor.numel()}
    for key in [key for key in tensors if int8 and key.endswith("weight")]:
        tensors[key], tensors[f"{key}_scale"] = quantize_rows(tensors[key])
    return tensors


def filled(parts: list[Part], tensors: Mapping[str, Tensor]) -> StackedLinear:
    stack = StackedLinear(parts, product)
    for key, tensor in tensors.items():
        stack.fill(key, tensor)
    stack.require_filled()
    return stack


@torch.no_grad()
@pytest.mark.parametrize("int8", [False, True])
def test_a_stack_gives_what_its_layers_give_in_as_few_products(int8: bool) -> None:
    x, names = torch.randn(3, 5, N), list(STACK)
    expected = torch.cat([layer_of(name, int8)(x) for name in names], -1)
    stack = filled([part(name, int8=int8) for name in names], stored(names, int8))
    torch.testing.assert_close(stack(x), expected)
    assert [tuple(p.weight.shape) for p in stack.products] == [(3 + 2, 12), (5 + 3 + 8 + 7 + 4, 24), (8 + 5, 12)]
    assert {p.weight.dtype for p in stack.products} == {torch.int8 if int8 else torch.float32}
    alone = filled([part("v")], stored(["v"]))
    torch.testing.assert_close(alone(x), layer_of("v")(x))


@torch.no_grad()
def test_some_matrices_of_a_stack_may_be_int8() -> None:
    x = torch.randn(3, N)
    stack = filled([part("q"), part("k", int8=True)], stored(["q"]) | stored(["k"], int8=True))
    torch.testing.assert_close(stack(x), torch.cat([layer_of("q")(x), layer_of("k", int8=True)(x)], -1))


@torch.no_grad()
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_rows_of_several_devices_are_those_of_one(devices: int, int8: bool) -> None:
    x, names = torch.randn(3, N), list(STACK)
    for name in names:
        m = STACK[name][0][0]
        shares = [range(i * m // devices, (i + 1) * m // devices) for i in range(devices)]
        tensors = stored([name], int8)
        outputs = [filled([part(name, rows=rows, int8=int8)], tensors)(x) for rows in shares]
        torch.testing.assert_close(torch.cat(outputs, -1), layer_of(name, int8)(x))


@torch.no_grad()
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("devices", [2, 3, 8])
def test_columns_of_several_devices_add_up_to_those_of_one(devices: int, int8: bool) -> None:
    x, width = torch.randn(3, N), N // devices
    for name in STACK:
        shares, tensors = [range(i * width, (i + 1) * width) for i in range(devices)], stored([name], int8)
        stacks = [filled([part(name, columns=columns, int8=int8)], tensors) for columns in shares]
        outputs = [stack(x[:, slice(c.start, c.stop)]) for stack, c in zip(stacks, shares, strict=True)]
        torch.testing.assert_close(sum(outputs), layer_of(name, int8)(x))


def test_damaged_tensors_are_refused() -> None:
    tensors = stored(["k"])
    stack = StackedLinear([part("k")], product)
    with pytest.raises(WeLoreError, match=r"^k.C.weight has shape \(5, 2\), not \(5, 3\) as config.json says"):
        stack.fill("k.C.weight", tensors["k.C.weight"][:, :2])
    with pytest.raises(WeLoreError, match=r"^k.P.weight has dtype torch.int8, in which nothing can be multiplied"):
        stack.fill("k.P.weight", tensors["k.P.weight"].to(torch.int8))
    with pytest.raises(WeLoreError, match=r"^k.order is no permutation of its 8 rows"):
        stack.fill("k.order", torch.zeros(8, dtype=torch.int64))
    with pytest.raises(WeLoreError, match=r"^the checkpoint holds k.A.weight, of which config.json says nothing"):
        stack.fill("k.A.weight", tensors["k.C.weight"])
    with pytest.raises(WeLoreError, match=r"^the checkpoint has lost the tensor k.C.weight: it cannot be loaded"):
        stack.require_filled()
    stack, tensors = StackedLinear([part("k", int8=True)], product), stored(["k"], int8=True)
    with pytest.raises(WeLoreError, match=r"^k.C.weight has dtype torch.float32, not int8 as config.json says"):
        stack.fill("k.C.weight", tensors["k.C.weight"].float())
    with pytest.raises(WeLoreError, match=r"^k.C.weight_scale has shape \(5,\), not \(5, 1\) as config.json says"):
        stack.fill("k.C.weight_scale", tensors["k.C.weight_scale"].flatten())
