"""Neurons taken out before the cut: which ones, what the others become, and all the way to a checkpoint and back."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

import welore
from conftest import build, compress, logits
from toys import calibrate, characters, checkpoint
from welore.allocation.plan import Plan
from welore.calibration.statistics import Statistics
from welore.compression.mlp_pruning import Search, select_neurons
from welore.config import RecoveryConfig
from welore.errors import WeLoreError
from welore.layers.remaining import Remaining, as_json, dense_numel, read_remaining
from welore.linalg.brain_surgeon import refit, removal
from welore.models.mlp import find_mlps, resize_layers
from welore.models.replace import sizes
from welore.models.source import CheckpointSource
from welore.models.targets import find_targets


def moments(size: int, seed: int) -> Tensor:
    draws = torch.randn(3 * size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    draws *= torch.linspace(0.2, 2, size)
    return draws.T @ draws / len(draws)


def test_costs_are_those_of_the_refitted_matrix() -> None:
    W = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    G, H = moments(5, 1), moments(12, 2)
    order, costs = removal(W, G, H)
    assert len(order) == len(costs) == 10  # a sixth is always kept
    assert len(set(order.tolist())) == len(order)

    def loss(gone: list[int]) -> float:
        kept = torch.tensor([i for i in range(12) if i not in gone])
        error = W.clone()
        error[:, kept] -= refit(W, H, kept)
        return float(torch.trace(G @ error @ H @ error.T))

    for count in range(1, 11):
        assert float(costs[:count].sum()) == pytest.approx(loss(order[:count].tolist()), rel=1e-3)
    assert int(order[0]) == min(range(12), key=lambda i: loss([i]))


def removal_anew(W: Tensor, G: Tensor, H: Tensor, group: int, count: int) -> tuple[list[int], list[float]]:
    """The order and the costs from formulas in float64 that compute every group from the start."""
    order: list[int] = []
    costs: list[float] = []
    while len(order) < count:
        stay = torch.tensor([i for i in range(W.shape[1]) if i not in order])
        inverse = torch.linalg.inv(H[stay][:, stay])
        fitted = W @ H[:, stay] @ inverse
        each = (fitted * (G @ fitted)).sum(0) / inverse.diagonal()
        gone = each.argsort()[:group]
        small = torch.linalg.inv(inverse[gone][:, gone])
        total = float((fitted[:, gone].T @ G @ fitted[:, gone] * small).sum())
        order += stay[gone].tolist()
        costs += [total / group] * group
    return order, costs


def test_groups_go_in_the_order_and_at_the_cost_of_float64() -> None:
    width, d = 200, 20
    W = torch.randn(d, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    G, H = moments(d, 1), moments(width, 2)
    order, costs = removal(W, G, H)
    group, count = 2, 166
    expected, each = removal_anew(W, G, H, group, count)
    assert len(order) == count
    assert [set(order[i : i + group].tolist()) for i in range(0, count, group)] == [
        set(expected[i : i + group]) for i in range(0, count, group)
    ]
    assert costs.tolist() == pytest.approx(each, rel=1e-3)
    most, fewer = removal(W, G, H, most=31)
    assert torch.equal(most, order[:30])
    assert torch.equal(fewer, costs[:30])
    cheap, dear = removal(W, G, H, dearest=float(costs[:50].max()) * 1.0001)
    assert len(cheap) == 50 + group * int((costs[50::group] > costs[:50].max() * 1.0001).int().argmax() + 1)
    assert torch.equal(dear, costs[: len(cheap)])
    assert removal(W, G, H, most=1)[0].tolist() == []


def test_refit_is_the_least_squares_of_what_the_neurons_said() -> None:
    x = torch.randn(400, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 7] = x[:, 1] - 2 * x[:, 3]  # what neuron 7 says, 1 and 3 say together
    W = torch.randn(4, 8, dtype=torch.float64)
    kept = torch.tensor([0, 1, 2, 3, 4, 5, 6])
    H = x.T @ x / len(x) + 1e-9 * torch.eye(8)
    torch.testing.assert_close(x[:, kept] @ refit(W, H, kept).T, x @ W.T, rtol=1e-5, atol=1e-5)
    order, costs = removal(W, torch.eye(4), H)
    assert int(order[0]) in (1, 3, 7)
    assert float(costs[0]) < 1e-3 * float(costs[1])


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gpt_neox", "gemma3_text", "starcoder2"])
def test_mlps_are_found_in_the_model_itself(family: str) -> None:
    model = build(family)
    found = find_mlps(model, find_targets(model))
    assert [mlp.name.rpartition(".")[2] for mlp in found] == ["mlp"] * model.config.num_hidden_layers
    assert {mlp.width for mlp in found} == {128 if family == "gpt2" else 56}
    assert {sum(map(mlp.copies, mlp.up_layers)) for mlp in found} == {1 if "gpt" in family or "star" in family else 2}


def test_what_only_looks_like_an_mlp_is_none() -> None:
    # the four matrices of this attention have the shapes of three makers and a reader
    model = build("qwen3", head_dim=16, num_key_value_heads=4)
    targets = find_targets(model)
    assert {t.shape for t in targets if "self_attn" in t.name} == {(64, 32), (32, 64)}
    assert all(mlp.name.endswith(".mlp") for mlp in find_mlps(model, targets))
    # a layer that is not targeted cannot be made smaller
    assert find_mlps(model, find_targets(model, exclude=["layers.0.mlp.up_proj"]))[0].name == "model.layers.1.mlp"

    class Normed(nn.Module):
        """As the MLP, with a norm of its neurons."""

        def __init__(self, mlp: nn.Module, norm: nn.Module | None) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj, self.norm = mlp.gate_proj, mlp.up_proj, mlp.down_proj, norm

        def forward(self, x: Tensor) -> Tensor:
            y = self.gate_proj(x) * self.up_proj(x)
            return self.down_proj(self.norm(y) if self.norm else y.softmax(-1))

    for norm in (nn.LayerNorm(56), None):
        model.model.layers[0].mlp = Normed(model.model.layers[0].mlp, norm)
        assert [mlp.name for mlp in find_mlps(model, targets)] == ["model.layers.1.mlp"]


def test_resized_layers_keep_their_kind() -> None:
    for family, name in (("gpt2", "transformer.h.0.mlp.c_fc"), ("gpt_neox", "gpt_neox.layers.0.mlp.dense_h_to_4h")):
        model = build(family)
        old = model.get_submodule(name)
        resize_layers(model, {name: (20, 32)})
        new = model.get_submodule(name)
        assert type(new) is type(old)
        assert new.bias.shape == (20,)
        assert new(torch.zeros(2, 32)).shape == (2, 20)
        assert old.bias.shape[0] in (128, 56)


def calibrated(directory: Path, family: str = "llama", **changes: Any) -> tuple[Path, Path]:
    """A small model and its calibration on text of its own."""
    sizes = {} if family == "gpt2" else {"intermediate_size": 128}
    model, statistics = checkpoint(directory / "model", None, family, **sizes, **changes), directory / "C.safetensors"
    calibrate(model, "self", statistics, num_tokens=1024, max_length=64)
    return model, statistics


def unshrunk(statistics: Path) -> Statistics:
    """Moments as they were summed: what neurons cost follows from the sample alone."""
    return replace(Statistics.load(statistics), shrinkage=0.0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox", "gemma3_text"])
def test_from_a_model_to_a_smaller_one_and_back(tmp_path: Path, family: str, tokens: Tensor) -> None:
    source, file = calibrated(tmp_path, family)
    small, statistics = tmp_path / "small", unshrunk(file)
    record = compress(source, small, keep=0.6, mlp_pruning=0.3, statistics=statistics, recovery=None)
    plan = Plan.load(small / "plan.json")
    gone = sum(n.pruned for n in plan.neurons.values())
    assert record.settings["mlp_pruning"] == gone == pytest.approx(0.3 * 2 * 128, abs=4)
    assert record.numbers["parameter_ratio"] == pytest.approx(0.6, abs=0.01)
    about = json.loads((small / "config.json").read_text())["quantization_config"]
    assert about["version"] == 4
    assert set(about["shapes"]) == set(plan.shapes)

    model = AutoModelForCausalLM.from_pretrained(small)
    for name, (m, n) in plan.shapes.items():
        layer = model.get_submodule(name)
        assert (m, n) == (
            getattr(layer, "out_features", None) or layer.nf,
            getattr(layer, "in_features", None) or layer.nx,
        )
    found = sizes(model)
    for name in ("rank_reduction", "parameter_ratio", "parameters"):
        assert found[name] == pytest.approx(record.numbers[name])
    dense = AutoModelForCausalLM.from_pretrained(source)
    assert record.numbers["parameters_dense"] == sum(p.numel() for p in dense.parameters())

    said = logits(model, tokens)
    welore.merge(small, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    torch.testing.assert_close(logits(merged, tokens), said, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), tokens), said)
    if family == "llama":
        bare = AutoModel.from_pretrained(small)
        welore.merge(bare)
        assert bare.layers[0].mlp.down_proj.weight.shape == (32, 128)
    welore.merge(model)
    assert {name: p.shape for name, p in model.named_parameters()} == {n: p.shape for n, p in dense.named_parameters()}
    torch.testing.assert_close(logits(model, tokens), said, rtol=1e-4, atol=1e-4)

    compress(source, tmp_path / "planned", plan=plan, statistics=statistics)
    name = "model.safetensors"
    assert (tmp_path / "planned" / name).read_bytes() == (small / name).read_bytes()


def test_neurons_that_do_nothing_go_first_and_nothing_is_lost(tmp_path: Path, tokens: Tensor) -> None:
    model = build("llama", intermediate_size=64)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, ::4] = 0
    model.save_pretrained(tmp_path / "model")
    ids = torch.randint(0, 90, (8, 32), generator=torch.Generator().manual_seed(0))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(map(str, ids.flatten().tolist())))
    source, statistics = tmp_path / "model", tmp_path / "C.safetensors"
    checkpoint(tmp_path / "with_tokenizer", None)
    for path in (tmp_path / "with_tokenizer").glob("token*"):
        path.rename(source / path.name)
    calibrate(source, str(text), statistics, num_tokens=256, max_length=32, measure_losses=0)
    kept = 1 - 2 * 16 * 3 * 32 / sum(m * n for m, n in Statistics.load(statistics).shapes.values())
    record = compress(source, tmp_path / "small", keep=kept, mlp_pruning=0.25, statistics=statistics, recovery=None)
    plan = Plan.load(tmp_path / "small" / "plan.json")
    for found in plan.neurons.values():
        assert found.indices == tuple(i for i in range(64) if i % 4)
    assert record.numbers["lrcs"] == 0
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(logits(small, tokens), logits(model, tokens), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [0.0, 1e-25])
def test_an_mlp_that_says_next_to_nothing_loses_most_neurons(tmp_path: Path, tokens: Tensor, size: float) -> None:
    source = checkpoint(tmp_path / "model", None, "llama", intermediate_size=128)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= size
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    calibrate(source, "self", tmp_path / "C.safetensors", num_tokens=256, max_length=64, measure_losses=0)
    method = {"statistics": tmp_path / "C.safetensors", "mlp_pruning": 0.2, "recovery": None}
    compress(source, tmp_path / "small", keep=0.7, **method)
    neurons = Plan.load(tmp_path / "small" / "plan.json").neurons
    assert neurons["model.layers.1.mlp"].pruned >= 50
    assert torch.isfinite(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "small"), tokens)).all()


def test_params_alone_takes_out_what_is_worth_it(tmp_path: Path) -> None:
    source, statistics = calibrated(tmp_path)
    alone = {"statistics": statistics, "recovery": None}
    taken = {
        params: compress(source, tmp_path / str(params), keep=params, **alone).settings["mlp_pruning"]
        for params in (0.98, 0.4)
    }
    assert taken[0.98] == 0 < taken[0.4]
    asked = compress(source, tmp_path / "none", keep=0.4, mlp_pruning=0, **alone)
    assert asked.settings["mlp_pruning"] == 0
    named = compress(source, tmp_path / "named", keep=0.4, strategy="waterfill", scaling="kfac", **alone)
    assert named.settings["mlp_pruning"] == 0


def test_a_result_for_a_gpu_has_plain_factors_and_round_ranks_and_widths(tmp_path: Path, tokens: Tensor) -> None:
    source, statistics = calibrated(tmp_path, hidden_size=64, num_hidden_layers=1)
    small = tmp_path / "small"
    record = compress(source, small, keep=0.4, statistics=unshrunk(statistics), recovery=None, optimize_for="gpu")
    plan = Plan.load(small / "plan.json")
    assert record.settings["optimize_for"] == plan.optimize_for == "gpu"
    assert "optimize_for gpu" in str(welore.info(small))
    assert record.settings["rank_multiple"] == plan.rank_multiple > 1
    assert plan.neurons
    assert not plan.grids
    widths = [len(mlp.indices) for mlp in plan.neurons.values()]
    assert all(size % plan.rank_multiple == 0 for size in (*widths, *plan.ranks.values()))
    assert set(plan.forms.values()) == {"factored"}
    assert record.numbers["parameter_ratio"] == pytest.approx(0.4, abs=0.02)
    assert torch.isfinite(logits(AutoModelForCausalLM.from_pretrained(small), tokens)).all()


def test_a_given_share_leaves_widths_that_quantizers_accept(tmp_path: Path) -> None:
    source, statistics = calibrated(tmp_path)
    how: dict[str, Any] = {"mlp_pruning": 0.3, "rank_multiple": 16, "recovery": None}
    compress(source, tmp_path / "small", keep=0.6, statistics=statistics, **how)
    widths = [len(neurons.indices) for neurons in Plan.load(tmp_path / "small" / "plan.json").neurons.values()]
    assert widths
    assert all(width % 16 == 0 for width in widths)


def test_pruning_that_puts_the_target_out_of_reach_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, statistics = calibrated(tmp_path)

    def most(*arguments: Any) -> dict[str, Remaining]:
        return select_neurons(*arguments[:-1], Search(share=0.8))

    monkeypatch.setattr("welore.compression.pipeline.select_neurons", most)
    record = compress(source, tmp_path / "small", keep=0.8, statistics=statistics, recovery=None)
    assert record.settings["mlp_pruning"] == 0
    assert record.numbers["parameter_ratio"] == pytest.approx(0.8, abs=0.02)


@pytest.mark.slow
def test_a_smaller_mlp_is_healed_and_resumed_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: Tensor
) -> None:
    source, statistics = calibrated(tmp_path)
    how: dict[str, Any] = {"keep": 0.6, "mlp_pruning": 0.3, "statistics": statistics, "recovery": RecoveryConfig()}
    whole = compress(source, tmp_path / "whole", **how)
    assert "held_out_loss" in whole.numbers

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("welore.compression.pipeline.factor_matrices", killed)
        with pytest.raises(KeyboardInterrupt):
            compress(source, tmp_path / "resumed", **how)
    assert (tmp_path / "resumed.work").is_dir()
    # other sizes of the same matrices may lie there: they are not taken for these
    compress(source, tmp_path / "resumed", **(how | {"mlp_pruning": 0.5, "keep": 0.4, "recovery": None}))
    other = compress(source, tmp_path / "other", **(how | {"mlp_pruning": 0.5, "keep": 0.4, "recovery": None}))
    name = "model.safetensors"
    assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert other.numbers["parameter_ratio"] < whole.numbers["parameter_ratio"]
    with monkeypatch.context() as patch:
        patch.setattr("welore.compression.pipeline.factor_matrices", killed)
        with pytest.raises(KeyboardInterrupt):
            compress(source, tmp_path / "again", **how)
    compress(source, tmp_path / "again", **how)
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    AutoModelForCausalLM.from_pretrained(tmp_path / "again")(tokens)


def test_what_cannot_be_is_refused(tmp_path: Path, saved: Callable[..., Path]) -> None:
    source, statistics = calibrated(tmp_path)
    out = tmp_path / "out"
    for match, how in {
        "mlp_pruning is 1.5": {"keep": 0.6, "mlp_pruning": 1.5},
        "neurons are chosen by statistics": {"rank_reduction": 0.5, "mlp_pruning": 0.2},
        "give statistics, or a scaling that needs them": {"keep": 0.6, "mlp_pruning": 0.2, "preset": "paper"},
        "mlp_pruning is too large": {"keep": 0.6, "mlp_pruning": 0.9, "statistics": statistics},
        "cannot be reached": {"keep": 0.9, "mlp_pruning": 0.5, "statistics": statistics},
    }.items():
        with pytest.raises(WeLoreError, match=match):
            compress(source, out, **how)
    assert not out.exists()
    with pytest.raises(WeLoreError, match="a model in memory needs its tokenizer"):
        compress(build("llama"), keep=0.6, mlp_pruning=0.2)

    opt, other = saved("opt", vocab_size=98), tmp_path / "opt.safetensors"
    characters().save_pretrained(opt)
    calibrate(opt, "self", other, num_tokens=256, max_length=32, measure_losses=0)
    with pytest.raises(WeLoreError, match="has no MLP whose neurons could be taken out"):
        compress(opt, tmp_path / "x", keep=0.6, mlp_pruning=0.2, statistics=other)
    assert compress(opt, tmp_path / "y", keep=0.6, statistics=other, recovery=None).settings["mlp_pruning"] == 0

    compress(source, out, keep=0.6, mlp_pruning=0.3, statistics=statistics, recovery=None)
    plan = Plan.load(out / "plan.json")
    with pytest.raises(WeLoreError, match="leave those out"):
        compress(source, tmp_path / "x", plan=plan, mlp_pruning=0.2, statistics=statistics)
    model = AutoModelForCausalLM.from_pretrained(source)
    compress(model, plan=plan, statistics=statistics)
    ids = torch.arange(3, 19)[None]
    assert torch.equal(logits(model, ids), logits(AutoModelForCausalLM.from_pretrained(out), ids))
    one, *others = plan.neurons.items()
    fewer = replace(plan, neurons={one[0]: Remaining(one[1].width, one[1].indices[1:]), **dict(others)})
    with pytest.raises(WeLoreError, match="the plan gives .* the shape|has no 2 x 1 equal blocks"):
        compress(source, tmp_path / "x", plan=fewer, statistics=statistics)
    with pytest.raises(WeLoreError, match="takes neurons out of elsewhere"):
        elsewhere = replace(plan, neurons={"elsewhere": one[1]})
        compress(source, tmp_path / "x", plan=elsewhere, statistics=statistics)
    with pytest.raises(WeLoreError, match="give the statistics that they were chosen by"):
        compress(source, tmp_path / "x", plan=replace(plan, scaling="none"))
    compressed = CheckpointSource(out)
    with pytest.raises(WeLoreError, match="this model is compressed already"):
        _ = compressed.targets


def test_kept_neurons_are_written_as_ranges() -> None:
    found = {"mlp": Remaining(16, (0, 1, 2, 5, 7, 8)), "one": Remaining(3, (2,))}
    assert as_json(found)["mlp"] == {"width": 16, "kept": "0-2,5,7-8"}
    assert read_remaining(json.loads(json.dumps(as_json(found)))) == found
    assert dense_numel(60, "mlp.down_proj", found, {}) == 160
    assert dense_numel(60, "attention.o_proj", found, {}) == 60
    for kept in ((), (1, 1), (2, 1), (-1, 2), (15, 16)):
        with pytest.raises(WeLoreError, match="some of 0 to 15, ascending"):
            Remaining(16, kept)
