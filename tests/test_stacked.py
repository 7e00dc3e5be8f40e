"""Matrices that read one input as one layer: equal to the layers that it stands for, also in shares of devices."""

from collections.abc import Mapping
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from welore.errors import WeLoreError
from welore.layers.block_grid import Grid, block_names
from welore.layers.low_rank import SplitLinear
from welore.layers.stacked import Part, StackedLinear
from welore.layers.storage_forms import FACTORED, FORMS, PIVOTED

N = 24
product = partial(nn.Linear, bias=False)
# name -> shape, grid, and the low-rank matrices by the number of their block
STACK: dict[str, tuple[Grid, Grid | None, dict[int, tuple[str, int]]]] = {
    "q": ((16, N), None, {0: (FACTORED, 5)}),
    "k": ((8, N), None, {0: (PIVOTED, 3)}),
    "v": ((8, N), None, {}),
    "up": ((32, N), (2, 1), {0: (PIVOTED, 7), 1: (FACTORED, 4)}),
    "grid": ((16, N), (2, 2), {0: (PIVOTED, 3), 2: (FACTORED, 2), 3: (PIVOTED, 5)}),
}


def layer_of(name: str) -> nn.Module:
    """The layer of the checkpoint, with random weights and order."""
    (m, n), grid, forms = STACK[name]
    torch.manual_seed(len(name) + m)
    if grid is None:
        layer = FORMS[forms[0][0]].layer(n, m, forms[0][1]) if forms else product(n, m)
    else:
        layer = SplitLinear(n, m, grid)
        for index, (form, rank) in forms.items():
            setattr(layer, str(index), FORMS[form].layer(n // grid[1], m // grid[0], rank))
    for key, buffer in layer.named_buffers():
        if key.endswith("order"):
            buffer.copy_(torch.randperm(len(buffer)))
    return layer


def part(name: str, rows: range | None = None, columns: range | None = None) -> Part:
    (m, n), grid, forms = STACK[name]
    names = [name] if grid is None else block_names(name, grid)
    low_rank = {names[index]: form for index, form in forms.items()}
    return Part(name, (m, n), rows or range(m), columns or range(n), grid, low_rank)


def stored(names: list[str]) -> dict[str, Tensor]:
    """The tensors of the checkpoint, without tombstones."""
    found = {f"{name}.{key}": t for name in names for key, t in layer_of(name).state_dict().items()}
    return {key: tensor for key, tensor in found.items() if tensor.numel()}


def filled(parts: list[Part], tensors: Mapping[str, Tensor]) -> StackedLinear:
    stack = StackedLinear(parts, product)
    for key, tensor in tensors.items():
        stack.fill(key, tensor)
    stack.require_filled()
    return stack


@torch.no_grad()
def test_a_stack_gives_what_its_layers_give_in_as_few_products() -> None:
    x, names = torch.randn(3, 5, N), list(STACK)
    expected = torch.cat([layer_of(name)(x) for name in names], -1)
    stack = filled([part(name) for name in names], stored(names))
    torch.testing.assert_close(stack(x), expected)
    assert [tuple(p.weight.shape) for p in stack.products] == [(3 + 2, 12), (5 + 3 + 8 + 7 + 4, 24), (8 + 5, 12)]
    alone = filled([part("v")], stored(["v"]))
    torch.testing.assert_close(alone(x), layer_of("v")(x))


@torch.no_grad()
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_rows_of_several_devices_are_those_of_one(devices: int) -> None:
    x, names = torch.randn(3, N), list(STACK)
    for name in names:
        m = STACK[name][0][0]
        shares = [range(i * m // devices, (i + 1) * m // devices) for i in range(devices)]
        outputs = [filled([part(name, rows=rows)], stored([name]))(x) for rows in shares]
        torch.testing.assert_close(torch.cat(outputs, -1), layer_of(name)(x))


@torch.no_grad()
@pytest.mark.parametrize("devices", [2, 3, 8])
def test_columns_of_several_devices_add_up_to_those_of_one(devices: int) -> None:
    x, width = torch.randn(3, N), N // devices
    for name in STACK:
        shares = [range(i * width, (i + 1) * width) for i in range(devices)]
        outputs = [filled([part(name, columns=c)], stored([name]))(x[:, slice(c.start, c.stop)]) for c in shares]
        torch.testing.assert_close(sum(outputs), layer_of(name)(x))


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
