"""Long matrices block by block: the layer, which matrices they are, and all the way to a checkpoint and back."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import welore
from conftest import COMMON, allocate, build, compress, logits
from toys import calibrate
from welore.allocation.spectra import Spectra
from welore.calibration.statistics import Statistics
from welore.compression.analysis import Analyzer, grids_of
from welore.errors import WeLoreError
from welore.io.context import RunContext
from welore.layers.block_grid import Grid
from welore.layers.low_rank import SplitLinear
from welore.layers.storage_forms import FACTORED, PIVOTED
from welore.models.mlp import long_matrices
from welore.models.replace import replace_module, sizes
from welore.models.source import ModelSource
from welore.models.targets import find_targets, in_blocks
from welore.training.methods import find_matrices

GATE = "model.layers.0.mlp.gate_proj"


@pytest.mark.parametrize("grid", [(2, 1), (1, 3), (2, 3), (1, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_is_the_matrix_of_its_blocks_forward_and_backward(grid: Grid, bias: bool) -> None:
    torch.manual_seed(0)
    made = nn.Sequential(SplitLinear(12, 8, grid, bias=bias))
    last = grid[0] * grid[1] - 1
    if last:
        replace_module(made, "0.0", 2, FACTORED)
        replace_module(made, f"0.{last}", 2, PIVOTED)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    whole = nn.Linear(12, 8, bias=bias)
    down, across = grid
    rows = []
    for i in range(down):
        blocks = [made[0].get_submodule(str(i * across + j)) for j in range(across)]
        rows.append(torch.cat([block(torch.eye(12 // across)).T for block in blocks], 1))
    whole.weight.data = torch.cat(rows)
    if bias:
        whole.bias.data = made[0].bias.data
    x = torch.randn(3, 5, 12, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    torch.testing.assert_close(made(x), whole(y), rtol=1e-4, atol=1e-4)
    made(x).square().sum().backward()
    whole(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-3)


def test_blocks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(WeLoreError, match=r"shape \(8, 12\) has no 3 x 1 equal blocks"):
        SplitLinear(12, 8, (3, 1))
    with pytest.raises(WeLoreError, match=f"{GATE}: a matrix of shape"):
        in_blocks(find_targets(build("llama")), {GATE: (3, 1)})


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {}, {}),  # 56 x 32 is not twice as long as wide; k and v are, along the width of the model
        ("llama", {"intermediate_size": 64}, {"gate_proj": (2, 1), "up_proj": (2, 1), "down_proj": (1, 2)}),
        ("llama", {"intermediate_size": 112}, {"gate_proj": (2, 1), "up_proj": (2, 1), "down_proj": (1, 2)}),  # not 3
        ("gpt2", {}, {"c_fc": (4, 1), "c_proj": (1, 4)}),
        ("gpt_neox", {"intermediate_size": 64}, {"dense_h_to_4h": (2, 1), "dense_4h_to_h": (1, 2)}),
        ("phi3", {}, {"gate_up_proj": (2, 1)}),
        ("opt", {"ffn_dim": 96}, {"fc1": (3, 1), "fc2": (1, 3)}),
        ("qwen3", {"head_dim": 16}, {}),  # 64 x 32 and 32 x 64 are those of the attention, as in Qwen3-0.6B
        ("qwen3", {"head_dim": 16, "num_key_value_heads": 4}, {}),
    ],
)
def test_what_is_split_is_long_and_of_an_mlp(family: str, changes: dict[str, int], expected: dict[str, Grid]) -> None:
    model = build(family, **changes)
    found = long_matrices(model, find_targets(model))
    assert {name.rpartition(".")[2]: grid for name, grid in found.items()} == expected
    for target in in_blocks(find_targets(model), found):
        assert max(target.shape) < 2 * min(target.shape) or target.layer not in found


def test_a_state_space_is_not_split() -> None:
    changes = {"num_hidden_layers": 12, "n_mamba_heads": 2, "mamba_dt_rank": 2}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["zamba"](**COMMON | changes))
    targets = find_targets(model)
    assert {name.rpartition(".")[2] for name in long_matrices(model, targets)} <= {"gate_proj", "up_proj", "down_proj"}
    assert any(target.name.endswith("mamba.in_proj") for target in targets)


def test_blocks_tile_their_matrix() -> None:
    weights = ModelSource(build("gpt2"))
    grids = {"transformer.h.0.mlp.c_fc": (4, 2)}
    (whole,) = (weights.read(t) for t in weights.targets if t.name in grids)
    seen = torch.zeros_like(whole)
    for target in in_blocks(weights.targets, grids):
        if target.layer in grids:
            assert torch.equal(weights.read(target), whole[target.rows, target.columns])
            assert weights.read(target).shape == target.shape
            seen[target.rows, target.columns] += 1
    assert bool((seen == 1).all())


def half_low_rank(out: Path) -> Path:
    """A model of which the upper half of one matrix is of rank 3, the lower of full rank."""
    model = build("llama", intermediate_size=64)
    with torch.no_grad():
        weight = model.get_submodule(GATE).weight
        weight[:32] = torch.randn(32, 3) @ torch.randn(3, 32)
        weight[32:] = 3 * torch.linalg.qr(torch.randn(32, 32))[0]
    model.save_pretrained(out)
    return out


@pytest.mark.parametrize("storage", ["factored", "pivoted"])
def test_each_block_is_stored_as_suits_it(tmp_path: Path, storage: str, tokens: torch.Tensor) -> None:
    source, small = half_low_rank(tmp_path / "source"), tmp_path / "small"
    spectra = welore.analyze(source, split=True, include=["layers.0.mlp.gate_proj"])
    assert list(spectra.values) == [f"{GATE}.0", f"{GATE}.1"]
    plan = allocate(spectra, keep=0.75, strategy="waterfill", storage=storage)
    assert plan.ranks.keys() == {f"{GATE}.0"}
    assert plan.ranks[f"{GATE}.0"] >= 3
    record = compress(source, small, plan=plan)
    assert record.settings["split"] == 1

    dense = AutoModelForCausalLM.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(small)
    layer = model.get_submodule(GATE)
    assert isinstance(layer, SplitLinear)
    assert torch.equal(layer.get_submodule("1").weight, dense.get_submodule(GATE).weight[32:])
    torch.testing.assert_close(logits(model, tokens), logits(dense, tokens), rtol=1e-3, atol=1e-3)
    found = sizes(model)
    for name in ("rank_reduction", "parameter_ratio", "parameters"):
        assert found[name] == pytest.approx(record.numbers[name])

    welore.merge(model)
    torch.testing.assert_close(model.get_submodule(GATE).weight, dense.get_submodule(GATE).weight, rtol=1e-4, atol=1e-4)
    welore.merge(small, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.get_submodule(GATE).weight, model.get_submodule(GATE).weight)


def test_a_layer_of_which_no_block_is_cut_stays_as_it_is(saved: Callable[..., Path], tmp_path: Path) -> None:
    source = saved("llama", intermediate_size=64)
    plan = allocate(welore.analyze(source, split=True), keep=0.97, strategy="waterfill", storage="pivoted")
    untouched = set(plan.grids) - set(plan.split)
    assert untouched
    record = compress(source, tmp_path / "small", plan=plan)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert all(type(model.get_submodule(name)) is nn.Linear for name in untouched)
    assert sizes(model)["rank_reduction"] == pytest.approx(record.numbers["rank_reduction"])


def test_files_remember_the_blocks(saved: Callable[..., Path], tmp_path: Path) -> None:
    spectra = welore.analyze(saved("gpt2"), split=True)
    spectra.save(tmp_path / "spectra.safetensors")
    assert Spectra.load(tmp_path / "spectra.safetensors").grids == spectra.grids != {}
    plan = allocate(spectra, keep=0.7, strategy="waterfill")
    plan.save(tmp_path / "plan.json")
    assert welore.Plan.load(tmp_path / "plan.json") == plan
    content = json.loads((tmp_path / "plan.json").read_text())
    lost = next(iter(plan.grids)) + ".1"
    content["matrices"] = [entry for entry in content["matrices"] if entry["name"] != lost]
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(WeLoreError, match=f"says nothing of {lost}"):
        welore.Plan.load(tmp_path / "plan.json")


def test_a_checkpoint_that_lost_a_dense_block_fails(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source, small = half_low_rank(tmp_path / "source"), tmp_path / "small"
    plan = allocate(
        welore.analyze(source, split=True, include=["layers.0.mlp.gate_proj"]), keep=0.75, strategy="waterfill"
    )
    compress(source, small, plan=plan)
    kept = {name: t for name, t in load_file(small / "model.safetensors").items() if name != f"{GATE}.1.weight"}
    save_file(kept, small / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeLoreError, match=f"lost the tensor {GATE}.1.weight"):
        AutoModelForCausalLM.from_pretrained(small)


def test_losses_that_were_measured_in_another_way_are_left_aside(tmp_path: Path) -> None:
    model = build("gpt2")
    ids = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0))
    weights = ModelSource(model)

    def losses(calibration: Statistics, split: bool) -> int:
        context, grids = RunContext.create(progress=False), grids_of(weights, split)
        return len(Analyzer(weights, calibration, context, "kfac").spectra(grids).losses)

    blocks = calibrate(model, ids, tmp_path / "blocks", measure_losses=1)
    whole = calibrate(model, ids, tmp_path / "whole", measure_losses=1, split=False)
    assert losses(blocks, True) == len(in_blocks(weights.targets, blocks.grids)) > len(weights.targets)
    assert losses(whole, False) == len(weights.targets)
    assert losses(blocks, False) == losses(whole, True) == 0


def test_fine_tuning_knows_the_layers_of_blocks(saved: Callable[..., Path], tmp_path: Path) -> None:
    source = saved("gpt2")
    plan = allocate(welore.analyze(source, split=True), keep=0.7, strategy="waterfill")
    compress(source, tmp_path / "small", plan=plan)
    dense = find_matrices(AutoModelForCausalLM.from_pretrained(source), plan)
    assert set(dense.lrc) == plan.lrc_layers
    small = find_matrices(AutoModelForCausalLM.from_pretrained(tmp_path / "small"))
    assert set(small.lrc) == set(plan.ranks)
    assert set(dense.nlrc) <= set(small.nlrc)
