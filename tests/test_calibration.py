import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

import welore
from conftest import FAMILIES, MIXTURES, build
from welore.calibration import Calibration
from welore.mixture import seed_of
from welore.targets import find_targets

IDS = torch.randint(3, 90, (3, 11), generator=torch.Generator().manual_seed(1))


def by_hand(model: PreTrainedModel, ids: Tensor, seed: int) -> dict[str, Tensor]:
    """The same statistics from autograd: gradients of what is added to every output, one window after the other."""
    model = copy.deepcopy(model)
    if model.config.model_type not in MIXTURES:  # fused experts have no product in float64
        model.double()
    uniform = torch.rand(ids.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    inputs: dict[str, list[Tensor]] = {}
    added: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[..., Tensor]:
        def forward(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
            zero = torch.zeros_like(y, requires_grad=True)
            inputs.setdefault(name, []).append(args[0].detach().reshape(-1, args[0].shape[-1]))
            added.setdefault(name, []).append(zero)
            return y + zero

        return forward

    targets = find_targets(model)
    for target in targets:
        model.get_submodule(target.name).register_forward_hook(hook(target.name))
    for window, numbers in zip(ids, uniform, strict=True):
        logits = model(window[None], use_cache=False).logits[0].double()
        below = logits.softmax(-1).cumsum(-1) <= numbers[:, None]
        cross_entropy(logits, below.sum(-1), reduction="sum").backward()
    found = {}
    for target in targets:
        x = torch.cat(inputs[target.name]).double()
        g = torch.cat([zero.grad.reshape(-1, zero.shape[-1]) for zero in added[target.name] if zero.grad is not None])
        g = g.double()
        found |= {
            f"{target.name}.inputs": x.T @ x / ids.numel(),
            f"{target.name}.magnitudes": x.abs().sum(0) / ids.numel(),
            f"{target.name}.outputs": g.T @ g / ids.numel(),
        }
    return found


def gathered(model: PreTrainedModel, directory: Path, ids: Tensor = IDS, **how: Any) -> Calibration:
    return welore.calibrate(model, ids, directory / "c.safetensors", **how)


def seed_of_labels() -> int:
    return seed_of(0, "labels")


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_statistics_are_those_of_autograd_by_hand(family: str, whole: bool, tmp_path: Path) -> None:
    model = build(family)
    found = gathered(model, tmp_path, whole=whole, batch_size=2)
    assert found.record.numbers["road"] == ("whole" if whole else "blocks")
    expected = by_hand(model, IDS, seed_of_labels())
    for name in found.shapes:
        for kind, get in (("inputs", found.inputs), ("magnitudes", found.magnitudes), ("outputs", found.outputs)):
            value, wanted = get(name), expected[f"{name}.{kind}"]
            assert value is not None
            torch.testing.assert_close(value.double(), wanted, rtol=2e-3, atol=1e-5 * float(wanted.abs().max()))
            if value.ndim == 2:
                assert torch.equal(value, value.T)
        assert found.counts[name] == IDS.numel()
