"""Mixtures of experts: every matrix of every expert is compressed, stored, loaded and merged as one of its own."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING, AutoModel, Ernie4_5_VLMoeForConditionalGeneration

import welore
from campaigns.architectures import ROPE, loaded, matrix_of
from campaigns.architectures import build as build_architecture
from conftest import COMMON, Command, build, compress, logits
from test_checkpoint import equal, weights_of
from toys import calibrate, characters, checkpoint, finetuned
from welore.calibration.scaling import DAMPING_INPUTS, DAMPING_OUTPUTS
from welore.calibration.statistics import SHRINKAGE
from welore.config import CalibrationConfig, CompressionConfig
from welore.io.context import RunContext
from welore.io.safetensors_stream import TensorReader
from welore.layers.experts import Experts
from welore.layers.low_rank import LowRankLayer
from welore.models.experts import fuse, fused_experts, unfuse, unfused
from welore.models.quantizer import WeLoreQuantizer
from welore.models.replace import sizes
from welore.models.source import CheckpointSource, ModelSource, open_source
from welore.training.methods import mark_trainable

PAPER: dict[str, Any] = {"scaling": "none", "storage": "factored", "min_ratio": 0}
# What the families differ in: names in files, shared experts, and 3-D tensors in files, of which two are transposed.
# Llama 4 repeats all tokens for every expert.
KINDS = ("Mixtral", "Qwen3-MoE", "OLMoE", "DeepSeek-V3", "GPT-OSS", "GraniteMoeHybrid", "Llama4", "Qwen3-VL-MoE")


@pytest.fixture
def dense(tmp_path: Path) -> Callable[..., Path]:
    """Builds and saves a mixture; the directory."""

    def save(name: str, dtype: torch.dtype = torch.float32, **how: Any) -> Path:
        build_architecture(name).to(dtype).save_pretrained(tmp_path / "dense", **how)
        return tmp_path / "dense"

    return save


@pytest.mark.parametrize("name", [*KINDS, "PhiMoE", "Jamba", "MiniMax"])
def test_experts_apart_compute_what_they_compute_together(name: str, tokens: torch.Tensor) -> None:
    model = build_architecture(name)
    before, parameters = logits(model, tokens), {n: p.clone() for n, p in model.named_parameters()}
    twin = unfused(model)
    assert twin is not model
    assert fused_experts(model).keys() == {n for n, m in twin.named_modules() if isinstance(m, Experts)}
    torch.testing.assert_close(logits(twin, tokens), before, rtol=1e-5, atol=1e-6)
    experts = [n for n, m in twin.named_modules() if isinstance(m, torch.nn.Linear) and ".experts." in n]
    weight = twin.get_submodule(experts[0]).weight
    assert torch.equal(weight, matrix_of(model, experts[0]))
    for layer in experts:  # they share their numbers
        twin.get_submodule(layer).weight.data.mul_(2)
    assert not torch.allclose(logits(model, tokens), before, rtol=1e-3)
    for layer in experts:
        twin.get_submodule(layer).weight.data.div_(2)
    unfuse(model)
    assert not fused_experts(model)
    torch.testing.assert_close(logits(model, tokens), before, rtol=1e-5, atol=1e-6)
    fuse(model)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in parameters.items()}
    assert all(torch.equal(p, parameters[n]) for n, p in model.named_parameters())
    assert torch.equal(logits(model, tokens), before)


def test_training_gradients_reach_the_experts_and_the_router(tokens: torch.Tensor) -> None:
    model = build("mixtral")
    twin = unfused(build("mixtral"))
    for net in (model, twin):
        net(tokens, labels=tokens).loss.backward()
    router = "model.layers.0.mlp.gate.weight"
    torch.testing.assert_close(twin.get_parameter(router).grad, model.get_parameter(router).grad)
    whole = model.get_parameter("model.layers.0.mlp.experts.down_proj").grad
    for number in range(4):
        own = twin.get_parameter(f"model.layers.0.mlp.experts.{number}.down_proj.weight").grad
        torch.testing.assert_close(torch.zeros_like(whole[number]) if own is None else own, whole[number])


class Waits(TorchDispatchMode):
    """Counts the operations for whose result the host would wait for a GPU."""

    KINDS = ("aten.bincount", "aten.nonzero", "aten._local_scalar_dense", "aten.masked_select", "aten.unique")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func).startswith(self.KINDS)
        return func(*args, **kwargs or {})


def test_experts_read_one_list_of_numbers_from_the_device(
    monkeypatch: pytest.MonkeyPatch, tokens: torch.Tensor
) -> None:
    model, lists = unfused(build("mixtral")), list[torch.Tensor]()
    experts = next(module for module in model.modules() if isinstance(module, Experts))
    as_list = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: lists.append(self) or as_list(self))
    with Waits() as waits, torch.no_grad():
        experts(torch.randn(5, 32), torch.tensor([[0, 3]] * 5), torch.full((5, 2), 0.5))
    assert [as_list(counts) for counts in lists] == [[5, 0, 0, 5]]
    assert waits.count == 0


@pytest.mark.parametrize("name", KINDS)
def test_files_and_memory_hold_the_same_matrices(name: str, dense: Callable[..., Path]) -> None:
    directory = dense(name)
    model = loaded(directory)
    stored, here = open_source(directory, RunContext.create()), ModelSource(model)
    assert isinstance(stored, CheckpointSource)
    assert stored.identity.fingerprint == here.identity.fingerprint
    assert stored.targets == here.targets
    assert any(".experts.3." in target.name for target in stored.targets)
    assert set(stored.names()) == set(here.names())
    for tensor in stored.names():
        assert torch.equal(stored.tensor(tensor), here.tensor(tensor)), tensor
        assert stored.info(tensor) == here.info(tensor)
        assert torch.equal(torch.cat(list(stored.chunks(tensor))), here.tensor(tensor).flatten())
        assert stored.stored_name(tensor) == here.stored_name(tensor)


@pytest.mark.parametrize("name", KINDS)
def test_factors_of_every_expert_are_those_of_an_independent_svd(
    name: str, dense: Callable[..., Path], tmp_path: Path, tokens: torch.Tensor
) -> None:
    directory = dense(name)
    plan = welore.compress(directory, tmp_path / "small", CompressionConfig(keep=0.7, **PAPER), recovery=None).plan
    reference, small, tensors = loaded(directory), loaded(tmp_path / "small"), weights_of(tmp_path / "small")
    of_experts = [a for a in plan.allocations if ".experts." in a.name]
    counts = {name.split(".experts.")[1].split(".")[0] for name in (a.name for a in of_experts)}
    assert counts == {"0", "1", "2", "3"}
    assert len({a.rank for a in of_experts}) > 1  # every matrix has its own spectrum under the one threshold
    for a in of_experts:
        W = matrix_of(reference, a.name).double().numpy()
        U, sigma, V = np.linalg.svd(W, full_matrices=False)
        layer = small.get_submodule(a.name)
        assert isinstance(layer, LowRankLayer) == a.factored
        if a.factored:
            product = (layer.A.weight.double() @ layer.B.weight.double()).detach().numpy()
            np.testing.assert_allclose(product, (U[:, : a.rank] * sigma[: a.rank]) @ V[: a.rank], atol=2e-6 * sigma[0])
    config = json.loads((tmp_path / "small/config.json").read_text())["quantization_config"]
    assert config["version"] == 6
    assert {f"{layer}.A.weight" for layer in config["ranks"]} <= set(tensors)
    generated = small.generate(tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape[1] == tokens.shape[1] + 4


@pytest.mark.parametrize("name", KINDS)
def test_round_trip(name: str, dense: Callable[..., Path], tmp_path: Path, tokens: torch.Tensor) -> None:
    """In memory as on the disk; loading, saving and loading again is bit-equal; merging gives an ordinary model."""
    directory, how = dense(name), CompressionConfig(keep=0.7, **PAPER)
    welore.compress(directory, tmp_path / "small", how, recovery=None)
    small = loaded(tmp_path / "small")
    in_memory = loaded(directory)
    welore.compress(in_memory, config=how, recovery=None)
    expected = logits(small, tokens)
    assert equal(in_memory.state_dict(), small.state_dict())
    torch.testing.assert_close(logits(in_memory, tokens), expected, rtol=1e-5, atol=1e-6)  # others lie in a mapped file
    for word, model in (("again", small), ("from-memory", in_memory)):
        model.save_pretrained(tmp_path / word)
        assert equal(weights_of(tmp_path / word), weights_of(tmp_path / "small"))
    for other in (loaded(tmp_path / "again"), pickle.loads(pickle.dumps(small))):
        torch.testing.assert_close(logits(other, tokens), expected, rtol=1e-5, atol=1e-6)
    bare, whole = AutoModel.from_pretrained(tmp_path / "small"), AutoModel.from_pretrained(directory)
    assert not torch.allclose(bare(tokens).last_hidden_state, whole(tokens).last_hidden_state, atol=1e-4)

    welore.merge(tmp_path / "small", tmp_path / "merged")
    files = weights_of(tmp_path / "merged")
    assert {n: t.shape for n, t in files.items()} == {n: t.shape for n, t in weights_of(directory).items()}
    merged = loaded(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, tokens), expected, rtol=1e-3, atol=1e-4)
    assert not any(isinstance(module, Experts | LowRankLayer) for module in merged.modules())
    welore.merge(small)
    assert not any(isinstance(module, Experts | LowRankLayer) for module in small.modules())
    small.save_pretrained(tmp_path / "merged-in-memory")
    assert equal(weights_of(tmp_path / "merged-in-memory"), files)


def test_quantizer_that_is_told_no_model_loads_the_same(
    dense: Callable[..., Path], tmp_path: Path, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5.19, which vLLM 0.32 needs, gives it the weights' conversions alone."""
    welore.compress(dense("Mixtral"), tmp_path / "small", CompressionConfig(keep=0.7, **PAPER), recovery=None)
    expected, usual = logits(loaded(tmp_path / "small"), tokens), WeLoreQuantizer.update_weight_conversions
    monkeypatch.setattr(
        WeLoreQuantizer, "update_weight_conversions", lambda self, entries, model=None: usual(self, entries)
    )
    torch.testing.assert_close(logits(loaded(tmp_path / "small"), tokens), expected)


@pytest.mark.parametrize("name", ["Mixtral", "GPT-OSS", "Llama4"])
def test_experts_that_are_excluded_stay_as_they_are_in_the_files(
    name: str, dense: Callable[..., Path], tmp_path: Path, tokens: torch.Tensor
) -> None:
    directory = dense(name)
    compress(directory, tmp_path / "small", keep=0.6, exclude=["experts"], **PAPER)
    before, after = weights_of(directory), weights_of(tmp_path / "small")
    kept = {n for n in before if ".experts." in n}
    assert kept
    assert all(torch.equal(before[n], after[n]) for n in kept)
    small = loaded(tmp_path / "small")
    assert fused_experts(small)
    assert small.config.quantization_config.version == 1
    in_memory = loaded(directory)
    compress(in_memory, keep=0.6, exclude=["experts"], **PAPER)
    assert fused_experts(in_memory)
    torch.testing.assert_close(logits(in_memory, tokens), logits(small, tokens), rtol=1e-5, atol=1e-6)
    assert sizes(in_memory) == sizes(small)
    welore.merge(tmp_path / "small", tmp_path / "merged")
    assert weights_of(tmp_path / "merged").keys() == before.keys()


@pytest.mark.parametrize("name", KINDS)
def test_a_share_is_that_of_all_matrices_of_the_blocks(name: str, dense: Callable[..., Path], tmp_path: Path) -> None:
    directory = dense(name)
    numbers = compress(directory, tmp_path / "small", keep=0.8, **PAPER).numbers
    routers = ("gate.weight", "router.weight", "router.layer.weight")

    def count(where: Path) -> int:
        tensors = {n: t for n, t in weights_of(where).items() if ".layers." in n and t.ndim > 1}
        return sum(
            t.numel() for n, t in tensors.items() if not n.endswith(routers) and "conv1d" not in n and "bias" not in n
        )

    assert count(tmp_path / "small") == pytest.approx(0.8 * count(directory), rel=0.01)
    assert numbers["parameter_ratio"] == pytest.approx(0.8, abs=0.01)
    kinds = welore.info(tmp_path / "small").ranks  # one row of the description for all experts
    assert not any(part.isdecimal() for kind in kinds for part in kind.split("."))
    stored = {n: t.numel() for n, t in weights_of(tmp_path / "small").items() if "correction" not in n}
    assert numbers["parameters"] == sum(stored.values())


def test_weights_of_one_shard_or_many_and_of_any_dtype(
    dense: Callable[..., Path], tmp_path: Path, tokens: torch.Tensor
) -> None:
    directory = dense("Mixtral", torch.bfloat16, max_shard_size="40KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    compress(directory, tmp_path / "one", keep=0.7, **PAPER)
    compress(directory, tmp_path / "many", keep=0.7, **PAPER, max_shard_size="12KB")
    assert equal(weights_of(tmp_path / "one"), weights_of(tmp_path / "many"))
    model = loaded(tmp_path / "many")
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert equal(weights_of(tmp_path / "one"), weights_of(tmp_path / "again"))


@pytest.mark.parametrize("name", ["Mixtral", "Llama4"])
def test_only_factors_are_trained(name: str, dense: Callable[..., Path], tmp_path: Path, tokens: torch.Tensor) -> None:
    compress(dense(name), tmp_path / "small", keep=0.6, **PAPER)
    model = loaded(tmp_path / "small")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    marked = mark_trainable(model, "lrc")
    optimizer = torch.optim.SGD(marked.parameters, lr=1.0)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert any(".experts." in n for n in changed)
    assert all(n.endswith(("A.weight", "B.weight")) for n in changed)


def test_plan_for_a_dense_mixture_tells_which_experts_are_trained(tmp_path: Path) -> None:
    model, other = build("mixtral"), build("mixtral")
    plan = welore.compress(other, config=CompressionConfig(keep=0.6, **PAPER), recovery=None).plan
    marked = mark_trainable(model, "lrc", plan=plan)
    trained = {n.removesuffix(".weight") for n, p in marked.model.named_parameters() if p.requires_grad}
    assert trained == set(plan.ranks)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("memory", [False, True])
def test_fine_tuning_by_a_plan_saves_the_experts_that_it_trains(family: str, memory: bool, tmp_path: Path) -> None:
    """lrc on the dense mixture, the control of the paper; files of the second family hold 3-D tensors."""
    source, text = checkpoint(tmp_path / "dense", None, family), tmp_path / "text.txt"
    text.write_text("Nothing of this has the model read before. " * 60)
    plan = welore.compress(loaded(source), config=CompressionConfig(keep=0.6, **PAPER), recovery=None).plan
    how: dict[str, Any] = {"max_steps": 2, "batch_size": 2, "max_length": 64, "learning_rate": 1e-2, "plan": plan}
    model = loaded(source) if memory else source
    finetuned(model, tmp_path / "run", "lrc", dataset=str(text), tokenizer=characters() if memory else None, **how)
    before, after = weights_of(source), weights_of(tmp_path / "run/model")
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    old, new = loaded(source), loaded(tmp_path / "run/model")
    moved = {a.name for a in plan.allocations if not torch.equal(matrix_of(old, a.name), matrix_of(new, a.name))}
    assert moved <= plan.lrc_layers
    assert len(moved) > 0.7 * len(plan.lrc_layers)  # some experts no token has reached
    assert any(".experts." in name for name in moved)
    if memory:
        assert any(isinstance(module, Experts) for module in model.modules())
        for name in moved:
            assert torch.equal(model.get_submodule(name).weight, matrix_of(new, name))


def test_pruned_int8_and_split_experts(saved: Callable[..., Path], tmp_path: Path, tokens: torch.Tensor) -> None:
    source = saved("mixtral", intermediate_size=64)
    compress(source, tmp_path / "small", keep=0.7, weights="int8", split=True, scaling="none", storage="pivoted")
    config = json.loads((tmp_path / "small/config.json").read_text())["quantization_config"]
    assert any(".experts.0.w1" in name for name in config["int8"])
    assert any(".experts." in name for name in config["grids"])
    small = loaded(tmp_path / "small")
    welore.merge(tmp_path / "small", tmp_path / "merged")
    torch.testing.assert_close(logits(loaded(tmp_path / "merged"), tokens), logits(small, tokens), rtol=1e-2, atol=1e-2)


def test_one_expert_is_read_at_a_time(dense: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    directory, read = dense("GPT-OSS"), list[tuple[int | slice, ...]]()
    source = open_source(directory, RunContext.create())
    whole = load_file(directory / "model.safetensors")

    def part(self: TensorReader, name: str, *index: int | slice) -> torch.Tensor:
        read.append(index)
        return whole[name][index]

    monkeypatch.setattr(TensorReader, "part", part)
    key = "model.layers.0.mlp.experts.2.down_proj.weight"
    assert torch.equal(source.tensor(key), whole["model.layers.0.mlp.experts.down_proj"][2].T)
    assert read == [(2, slice(None), slice(0, 32))]


def test_files_may_hold_the_matrices_of_experts_turned(
    dense: Callable[..., Path], tmp_path: Path, tokens: torch.Tensor
) -> None:
    """As those of Qwen3-VL-MoE on the hub, which transformers turns; it saves them as its model has them."""
    directory = dense("Qwen3-VL-MoE")
    expected = logits(loaded(directory), tokens)
    turned = tmp_path / "turned"
    shutil.copytree(directory, turned)
    tensors = {n: t.mT.contiguous() if t.ndim == 3 else t for n, t in weights_of(directory).items()}
    assert tensors["model.language_model.layers.0.mlp.experts.down_proj"].shape == (4, 24, 32)
    save_file(tensors, turned / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(logits(loaded(turned), tokens), expected, rtol=1e-5, atol=1e-6)
    source, other = (CheckpointSource(where) for where in (turned, directory))
    assert source.identity.fingerprint == other.identity.fingerprint
    for tensor in other.names():
        assert torch.equal(source.tensor(tensor), other.tensor(tensor)), tensor
        assert source.info(tensor) == other.info(tensor)
    for where in (turned, directory):
        compress(where, tmp_path / f"small-{where.name}", keep=0.6, **PAPER)
    assert equal(weights_of(tmp_path / "small-turned"), weights_of(tmp_path / "small-dense"))
    compress(turned, tmp_path / "some", keep=0.8, exclude=["experts"], **PAPER)
    kept = weights_of(tmp_path / "some")
    assert {n for n in tensors if ".experts." in n} <= kept.keys()
    assert all(torch.equal(t, tensors[n]) for n, t in kept.items() if ".experts." in n)


def test_experts_that_the_files_hold_in_another_way_stay_dense(
    command: Command, tmp_path: Path, tokens: torch.Tensor
) -> None:
    """ERNIE-VL, whose files number the experts for text and those for images in one row."""
    text = COMMON | {"moe_intermediate_size": [24, 16], "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}
    text |= {"rope_parameters": ROPE, "num_hidden_layers": 3}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32}
    model = Ernie4_5_VLMoeForConditionalGeneration(
        CONFIG_MAPPING["ernie4_5_vl_moe"](text_config=text, vision_config=vision)
    ).eval()
    assert any(p.ndim == 3 for n, p in model.named_parameters() if ".experts." in n)
    assert not fused_experts(model)
    assert unfused(model) is model
    model.save_pretrained(tmp_path / "dense")
    answer = command("compress", tmp_path / "dense", tmp_path / "small", "--paper", "--keep", 0.7)
    assert answer.status == 0
    together = ["text_moe.experts", "vision_moe.experts"]
    assert f"their files hold all experts of a layer in a way of their own: {', '.join(together)}" in answer.err
    record = json.loads((tmp_path / "small/compression.json").read_text())
    assert set(together) < set(record["numbers"]["left_dense_names"])
    before, after = weights_of(tmp_path / "dense"), weights_of(tmp_path / "small")
    assert all(torch.equal(t, after[n]) for n, t in before.items() if ".experts." in n)
    welore.merge(tmp_path / "small", tmp_path / "merged")
    expected = logits(loaded(tmp_path / "small"), tokens)
    assert not torch.allclose(expected, logits(model, tokens), atol=1e-3)
    torch.testing.assert_close(logits(loaded(tmp_path / "merged"), tokens), expected, rtol=1e-3, atol=1e-4)


# --- statistics ------------------------------------------------------------------------------------------------------


def scaled_optimum(W: torch.Tensor, G: torch.Tensor, H: torch.Tensor, rank: int) -> torch.Tensor:
    """The matrix of a rank that loses least in the norm of G and H, shrunk and damped as usual; float64."""

    def root(moment: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
        moment = moment.double()
        values, vectors = torch.linalg.eigh(moment + damping * moment.diagonal().mean() * torch.eye(len(moment)))
        return vectors * values.sqrt() @ vectors.T, vectors / values.sqrt() @ vectors.T

    H = (1 - SHRINKAGE) * H + SHRINKAGE * H.diagonal().diag()
    (left, unleft), (right, unright) = root(G, DAMPING_OUTPUTS), root(H, DAMPING_INPUTS)
    U, S, V = torch.linalg.svd(left @ W.double() @ right, full_matrices=False)
    return unleft @ (U[:, :rank] * S[:rank]) @ V[:rank] @ unright


@pytest.mark.parametrize("name", ["Mixtral", "DeepSeek-V3", "GPT-OSS", "Llama4"])
def test_scaled_factors_are_those_of_an_independent_svd(name: str, dense: Callable[..., Path], tmp_path: Path) -> None:
    directory = dense(name)
    windows = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0))
    statistics = calibrate(loaded(directory), windows, tmp_path / "c.safetensors", dtype="float32")
    how: dict[str, Any] = {"storage": "factored", "split": False, "mlp_pruning": 0, "statistics": statistics}
    compress(directory, tmp_path / "small", keep=0.6, recovery=None, **how)
    plan = welore.Plan.load(tmp_path / "small/plan.json")
    model, small = loaded(directory), loaded(tmp_path / "small")
    of_experts = [a for a in plan.lrcs if ".experts." in a.name]
    assert of_experts
    for a in of_experts:
        G, H = statistics.outputs(a.name), statistics.inputs(a.name)
        assert G is not None
        assert H is not None
        layer = small.get_submodule(a.name)
        found = (layer.A.weight.double() @ layer.B.weight.double()).detach()
        wanted = scaled_optimum(matrix_of(model, a.name), G, H, a.rank)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_no_expert_stays_dense_for_want_of_tokens(
    saved: Callable[..., Path], tokenizer: Any, tmp_path: Path, tokens: torch.Tensor
) -> None:
    """The job without any setting but a size: text, statistics, MLP pruning, factors and recovery."""
    source = saved("qwen3_moe", num_experts=16, moe_intermediate_size=40)
    tokenizer.save_pretrained(source)
    result = welore.compress(source, tmp_path / "small", keep=0.6, calibration=CalibrationConfig(num_tokens=128))
    assert result.parameter_ratio == pytest.approx(0.6, abs=0.01)
    assert result.record.settings["scaling"] == "kfac"
    statistics = calibrate(source, "self", tmp_path / "c.safetensors", num_tokens=128)
    assert statistics.measured
    never = {name for name, count in statistics.counts.items() if count == 0}
    assert never
    spectra = welore.analyze(source, statistics=statistics)
    assert not spectra.unreached
    assert spectra.losses.keys() == spectra.values.keys()
    plan = welore.allocate(spectra, keep=0.6)
    shares = {a.name: a.stored_parameters / a.dense_parameters for a in plan.allocations if ".experts." in a.name}
    used, unused = (np.mean([s for n, s in shares.items() if (n in never) == kind]) for kind in (False, True))
    assert unused < used
    welore.merge(tmp_path / "small", tmp_path / "merged")
    expected = logits(loaded(tmp_path / "small"), tokens)
    torch.testing.assert_close(logits(loaded(tmp_path / "merged"), tokens), expected, rtol=1e-3, atol=1e-3)


def test_experts_lose_neurons_as_mlps_do(saved: Callable[..., Path], tmp_path: Path, tokens: torch.Tensor) -> None:
    source = saved("mixtral")
    windows = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0))
    statistics = calibrate(loaded(source), windows, tmp_path / "c.safetensors")
    compress(source, tmp_path / "small", keep=0.6, mlp_pruning=0.25, statistics=statistics, recovery=None)
    neurons = welore.Plan.load(tmp_path / "small/plan.json").neurons
    assert any(name.endswith(".experts.2") for name in neurons)
    small = loaded(tmp_path / "small")
    in_memory = loaded(source)
    compress(in_memory, keep=0.6, mlp_pruning=0.25, statistics=statistics, recovery=None)
    torch.testing.assert_close(logits(in_memory, tokens), logits(small, tokens), rtol=1e-5, atol=1e-6)
    welore.merge(tmp_path / "small", tmp_path / "merged")
    merged = loaded(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, tokens), logits(small, tokens), rtol=1e-3, atol=1e-3)
