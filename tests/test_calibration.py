import copy
import dataclasses
import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

import welore
import welore.models.load
from conftest import FAMILIES, MIXTURES, build
from toys import calibrate, checkpoint
from welore.calibration import block_runner, layerwise
from welore.calibration import collect as collection
from welore.calibration.hooks import Moments
from welore.calibration.layerwise import collect_statistics
from welore.calibration.scaling import metric
from welore.calibration.statistics import Statistics
from welore.config import SELF, CalibrationConfig
from welore.data.mixture import draw, seed_of
from welore.data.windows import write_windows
from welore.errors import WeLoreError
from welore.io.context import RunContext
from welore.io.parallel import Processes
from welore.io.resume import Workspace
from welore.io.safetensors_stream import TensorReader
from welore.layers.experts import Experts
from welore.linalg.svd import Side
from welore.models.experts import unfused
from welore.models.load import read_tokenizer
from welore.models.source import ModelSource
from welore.models.targets import find_targets, in_blocks

CPU = torch.device("cpu")
IDS = torch.randint(3, 90, (3, 11), generator=torch.Generator().manual_seed(1))


def hashed(x: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """lowbias32: https://nullprogram.com/blog/2018/07/31/."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def by_hand(model: PreTrainedModel, ids: Tensor, seed: int) -> dict[str, Tensor]:
    """The same statistics from autograd: gradients of what is added to every output, one window after the other."""
    model = copy.deepcopy(unfused(model)).double()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-(2**31), 2**31, ids.shape, dtype=torch.int32, generator=generator).numpy().view(np.uint32)
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
    for window, numbers in zip(ids, drawn, strict=True):
        logits = model(window[None], use_cache=False).logits[0].double()
        words = hashed(np.arange(logits.shape[-1], dtype=np.uint32) * np.uint32(2654435769))
        waiting = -np.log1p(-((hashed(numbers[:, None] ^ words) & np.uint32(2**31 - 1)) + 0.5) / 2.0**31)
        labels = (logits.detach().softmax(-1) / torch.from_numpy(waiting)).argmax(-1)
        cross_entropy(logits, labels, reduction="sum").backward()
    found = {}
    for target in targets:
        if target.name not in inputs:  # an expert that no token has reached
            continue
        x = torch.cat(inputs[target.name]).double()
        g = torch.cat([zero.grad.reshape(-1, zero.shape[-1]) for zero in added[target.name] if zero.grad is not None])
        g = g.double()
        found |= {
            f"{target.name}.inputs": x.T @ x / ids.numel(),
            f"{target.name}.magnitudes": x.abs().sum(0) / ids.numel(),
            f"{target.name}.outputs": g.T @ g / len(g),
            f"{target.name}.x": x,
            f"{target.name}.g": g,
        }
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            lend(found, name, len(list(module.children())), ids.numel())
    return found


def lend(found: dict[str, Tensor], experts: str, count: int, tokens: int) -> None:
    """Every expert gets some tokens more of the average of its layer, and counts as if at least one had reached it."""

    def average(rows: list[Tensor], *, apart: bool) -> tuple[float, Tensor]:
        grams = [x.T @ x for x in rows]
        sizes = [len(x) * (1 + float(S.trace() ** 2 / S.square().sum())) for x, S in zip(rows, grams, strict=True)]
        mean = torch.stack(grams).sum(0) / sum(map(len, rows))
        mean = torch.eye(len(mean), dtype=mean.dtype) * mean.diagonal().mean() if apart else mean
        return sum(sizes) / sum(map(len, rows)), mean

    layers = {key.split(".")[-2] for key in found if key.startswith(f"{experts}.") and key.endswith(".x")}
    for layer in layers:
        names = [f"{experts}.{number}.{layer}" for number in range(count)]
        for kind, side, apart in (("inputs", "x", layer == "down_proj"), ("outputs", "g", layer != "down_proj")):
            rows = [found[f"{name}.{side}"] for name in names if f"{name}.x" in found]
            more, mean = average(rows, apart=apart)
            size = torch.cat(rows).abs().mean(0)
            for name in names:
                x = found.get(f"{name}.{side}", torch.zeros(0, len(mean), dtype=mean.dtype))
                used = max(1, len(x)) / tokens if kind == "inputs" else 1
                found[f"{name}.{kind}"] = used * (x.T @ x + more * mean) / (len(x) + more)
                if kind == "inputs":
                    sizes = size.mean().expand(len(mean)) if apart else size
                    found[f"{name}.magnitudes"] = used * (x.abs().sum(0) + more * sizes) / (len(x) + more)


def gathered(model: PreTrainedModel, directory: Path, ids: Tensor = IDS, **how: Any) -> Statistics:
    return calibrate(model, ids, directory / "c.safetensors", **{"dtype": "float32", "whole_model": False} | how)


def statistics(found: Statistics) -> dict[str, Tensor]:
    """Every tensor of a calibration."""
    return {name: found.store.read(name) for name in found.layout()}


def seed_of_labels() -> int:
    return seed_of(0, "labels")


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_statistics_are_those_of_autograd_by_hand(family: str, whole: bool, tmp_path: Path) -> None:
    model = build(family)
    found = gathered(model, tmp_path, whole_model=whole, batch_size=2)
    assert found.record.numbers["mode"] == ("whole" if whole else "blocks")
    expected = by_hand(model, IDS, seed_of_labels())
    for name in found.shapes:
        for kind, get in (("inputs", found.inputs), ("magnitudes", found.magnitudes), ("outputs", found.outputs)):
            value = get(name)
            assert value is not None
            wanted = expected[f"{name}.{kind}"]
            torch.testing.assert_close(value.double(), wanted, rtol=2e-3, atol=1e-5 * float(wanted.abs().max()))
            if value.ndim == 2:
                assert torch.equal(value, value.T)
        assert found.counts[name] == len(expected.get(f"{name}.x", ()))
        assert found.counts[name] == IDS.numel() or ".experts." in name


def test_an_expert_borrows_from_its_layer_what_the_text_has_not_shown(tmp_path: Path) -> None:
    model = build("qwen3_moe", num_experts=24)
    found, expected = gathered(model, tmp_path), by_hand(model, IDS, seed_of_labels())
    never = [name for name, count in found.counts.items() if count == 0]
    assert len(never) > 6
    assert found.record.numbers["never_reached"] == len(never)
    assert found.shared.keys() == found.shapes.keys()
    for name in found.shapes:
        assert found.counts[name] == len(expected.get(f"{name}.x", ()))
        for kind, get in (("inputs", found.inputs), ("magnitudes", found.magnitudes), ("outputs", found.outputs)):
            value, wanted = get(name), expected[f"{name}.{kind}"]
            assert value is not None
            torch.testing.assert_close(value.double(), wanted, rtol=2e-3, atol=1e-5 * float(wanted.abs().max()))
    again = Statistics.load(tmp_path / "c.safetensors")
    assert (again.shared, again.counts) == (found.shared, found.counts)
    gate, up = (never[0].replace("down_proj", layer) for layer in ("gate_proj", "up_proj"))
    assert found.shared[up] == found.shared[gate]


# --- the two roads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "mixtral"])
def test_blocks_one_at_a_time_give_what_the_whole_model_gives(family: str, tmp_path: Path) -> None:
    model = build(family)
    blocks = statistics(gathered(model, tmp_path))
    whole = statistics(gathered(model, tmp_path, whole_model=True))
    assert blocks.keys() == whole.keys()
    for name, value in blocks.items():
        share = 1e-3 if name.endswith(".losses") else 1e-6  # the last directions turn with the rounding of the moments
        torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=share * float(whole[name].abs().max()))


def test_sliding_windows_and_their_masks_belong_to_their_blocks(tmp_path: Path) -> None:
    ids = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(2))
    model = build("gemma3_text", sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    found, expected = gathered(model, tmp_path, ids, measure_losses=0), by_hand(model, ids, seed_of_labels())
    for name, value in statistics(found).items():
        torch.testing.assert_close(
            value.double(), expected[name], rtol=2e-3, atol=1e-5 * float(expected[name].abs().max())
        )


@pytest.mark.parametrize("whole", [False, True])
def test_the_largest_log_probabilities_of_every_position_are_stored_on_request(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_runner, "LOGITS", 4 * 96)  # four positions
    model, k = build("llama"), 5
    context = RunContext.create(device="cpu").within(Workspace(tmp_path / "work", None))
    context.workspace.open()
    config = CalibrationConfig(whole_model=whole, batch_size=2, dtype="float32")
    collect_statistics(model, find_targets(model), IDS, config, context, top_k=k)
    stored = context.workspace.fetch("teacher")
    with torch.no_grad():
        logprobs = model(IDS).logits.log_softmax(-1)
    ids, following = logprobs.topk(k).indices, IDS[:, 1:]
    assert torch.equal(stored["ids"][..., :-1], ids[..., :-1].int())
    listed = (ids[:, :-1] == following[..., None]).any(-1)
    assert not listed.all()
    last = torch.where(listed, ids[:, :-1, -1], following)
    assert torch.equal(stored["ids"][:, :-1, -1], last.int())  # of the token that comes next, if it is none of them
    expected = logprobs.gather(-1, stored["ids"].long())
    torch.testing.assert_close(stored["logprobs"], expected.half(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("family", "split"), [("llama", False), ("gpt2", False), ("gpt2", True)])
def test_losses_of_components_are_measured(family: str, split: bool, tmp_path: Path) -> None:
    model = build(family)
    found = gathered(model, tmp_path, measure_losses=1.0, split=split)
    assert found.measured == IDS.numel()
    assert bool(found.grids) == split
    seen = by_hand(model, IDS, seed_of(0, "measured"))
    weights = ModelSource(model)
    for target in in_blocks(weights.targets, found.grids):
        norm, losses = metric("kfac", found, target), found.losses(target.name)
        assert norm is not None
        assert losses is not None
        L, R = (_root(weight) for weight in (norm.outputs, norm.inputs))
        U, S, V = torch.linalg.svd(L.T @ weights.read(target).double() @ R, full_matrices=False)
        g, x = seen[f"{target.layer}.g"][:, target.rows], seen[f"{target.layer}.x"][:, target.columns]
        along = (g @ torch.linalg.inv(L).T @ U) * S * (x @ torch.linalg.inv(R).T @ V.T)
        wanted = along.square().sum(0) / IDS.numel()
        assert losses.shape == wanted.shape
        torch.testing.assert_close(losses[:6].double(), wanted[:6], rtol=2e-2, atol=1e-3 * float(wanted.max()))


def test_losses_are_left_out_when_nothing_is_to_be_measured(tmp_path: Path) -> None:
    found = gathered(build("llama"), tmp_path, measure_losses=0)
    assert found.measured == 0
    assert found.losses(next(iter(found.shapes))) is None
    with pytest.raises(WeLoreError, match="measure_losses is 2"):
        gathered(build("llama"), tmp_path, measure_losses=2)


def _root(weight: Tensor | Side) -> Tensor:
    assert isinstance(weight, Side)
    half, exponent = weight.root(torch.device("cpu"), torch.float64)
    return half * 2.0**exponent


class Leaves(LlamaDecoderLayer):
    """Leaves its result behind."""

    left: ClassVar[list[Tensor]] = []

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.left[:] = [super().forward(hidden_states, **kwargs)]
        return self.left[0]


class Finds(LlamaDecoderLayer):
    """Adds what was left behind."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return super().forward(hidden_states + Leaves.left[0], **kwargs)


def test_a_decoder_whose_blocks_share_more_than_hidden_states_runs_whole(tmp_path: Path) -> None:
    model = build("llama")
    model.model.layers[0].__class__, model.model.layers[1].__class__ = Leaves, Finds
    found = gathered(model, tmp_path, measure_losses=0)
    assert found.record.numbers["mode"] == "whole"
    expected = by_hand(model, IDS, seed_of_labels())
    for name, value in statistics(found).items():
        torch.testing.assert_close(
            value.double(), expected[name], rtol=2e-3, atol=1e-5 * float(expected[name].abs().max())
        )


def test_float16_whose_gradients_vanish_is_refused(tmp_path: Path) -> None:
    model = build("llama")
    exact, half = (statistics(gathered(model, tmp_path, dtype=dtype)) for dtype in ("float32", "float16"))
    for name, value in exact.items():
        torch.testing.assert_close(half[name], value, rtol=0.1, atol=0.02 * float(value.abs().max()))
    model.get_output_embeddings().weight.data.mul_(1e-5)
    gathered(model, tmp_path)
    with pytest.raises(WeLoreError, match="are too small for float16 .*: try --dtype bfloat16 or float32"):
        gathered(model, tmp_path, dtype="float16")


def test_pieces_of_the_logits_do_not_change_the_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = statistics(gathered(build("llama"), tmp_path))
    monkeypatch.setattr(block_runner, "LOGITS", 4 * 96)  # four positions
    for name, value in statistics(gathered(build("llama"), tmp_path)).items():
        torch.testing.assert_close(value, at_once[name], rtol=1e-4, atol=1e-7)


def test_windows_in_work_at_once_do_not_change_the_statistics(tmp_path: Path) -> None:
    one, three = (statistics(gathered(build("llama"), tmp_path, batch_size=size)) for size in (1, 3))
    for name, value in one.items():
        torch.testing.assert_close(value, three[name], rtol=1e-4, atol=1e-7)


def test_a_model_in_memory_is_left_as_it_was(tmp_path: Path) -> None:
    model = build("llama").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gathered(model, tmp_path)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(not module._forward_hooks and "forward" not in vars(module) for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bfloat16_weights_are_computed_with_in_float32(tmp_path: Path) -> None:
    half = build("llama", torch.bfloat16)
    found, expected = gathered(half, tmp_path, measure_losses=0), by_hand(half.float(), IDS, seed_of_labels())
    assert found.record.settings["dtype"] == "float32"
    for name, value in statistics(found).items():
        torch.testing.assert_close(
            value.double(), expected[name], rtol=2e-3, atol=1e-5 * float(expected[name].abs().max())
        )


# --- several processes ----------------------------------------------------------------------------------------------


class Meeting:
    """Where the threads of a test, which stand for processes, exchange what they have."""

    def __init__(self, size: int) -> None:
        self.barrier, self.items = threading.Barrier(size), [None] * size

    def exchange(self, rank: int, item: Any) -> list[Any]:
        self.items[rank] = item
        self.barrier.wait()
        everyones = list(self.items)
        self.barrier.wait()
        return everyones


@dataclasses.dataclass(frozen=True)
class Thread(Processes):
    meeting: Meeting

    def wait(self) -> None:
        self.meeting.barrier.wait()

    def gather(self, item: Any) -> list[Any]:
        return self.meeting.exchange(self.rank, copy.deepcopy(item))

    def add(self, total: Tensor) -> None:
        total.copy_(torch.stack(self.gather(total)).sum(0))

    def agreed(self, value: Any) -> Any:
        return self.gather(value)[0]


def collected(at: Path, model: PreTrainedModel, config: CalibrationConfig, size: int) -> dict[str, Tensor]:
    """Every tensor that so many processes store."""
    meeting, workspace = Meeting(size), Workspace(at, "key")
    workspace.open()

    def run(rank: int) -> dict[str, Any]:
        context = dataclasses.replace(RunContext.create(device="cpu"), processes=Thread(rank, size, meeting))
        return collect_statistics(model, find_targets(model), IDS, config, context.within(workspace), top_k=3)

    with ThreadPoolExecutor(size) as pool:
        numbers = list(pool.map(run, range(size)))
    assert len({n["sampled_label_nll"] for n in numbers}) == 1
    assert not [path for path in at.iterdir() if path.name.startswith(("boundary", "gradient"))]
    tensors = {path.stem: workspace.fetch(path.stem) for path in sorted(at.glob("*.safetensors"))}
    return {f"{group}/{name}": value for group, found in tensors.items() for name, value in (found or {}).items()}


@pytest.mark.parametrize("size", [2, 3])  # of two batches
@pytest.mark.parametrize(("family", "whole"), [("llama", False), ("mixtral", False), ("llama", True)])
def test_several_processes_share_the_windows(family: str, whole: bool, size: int, tmp_path: Path) -> None:
    config, model = CalibrationConfig(dtype="float32", whole_model=whole, batch_size=2), build(family)
    one, several = (collected(tmp_path / str(n), model, config, n) for n in (1, size))
    assert one.keys() == several.keys()
    for name, value in one.items():
        torch.testing.assert_close(several[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("apart", [(False, True), (True, False), (False, False)])
def test_matrices_that_share_in_one_process_only_are_told_apart(apart: tuple[bool, bool]) -> None:
    meeting, xs = Meeting(2), torch.randn(2, 4, 7)
    fork = Fork()

    def run(rank: int) -> tuple[Moments, dict[str, dict[str, Tensor]]]:
        mine = copy.deepcopy(fork)
        moments = Moments({name: mine.get_submodule(name) for name in ("left", "right", "never")})
        mine.apart = apart[rank]
        mine(xs[rank]).backward()
        moments.end_batch()
        moments.reduce(Thread(rank, 2, meeting))
        return moments, {n: {k: g[k] for k, g in moments.statistics(n, 8) if k != "about"} for n in ("left", "right")}

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, range(2)))
    together = torch.cat([x for x, alone in zip(xs, apart, strict=True) if not alone])
    for moments, found in results:
        assert moments.counts == {"left": 8, "right": len(together), "never": 0}
        torch.testing.assert_close(found["left"]["inputs"], xs.reshape(-1, 7).T @ xs.reshape(-1, 7) / 8)
        if any(apart):
            torch.testing.assert_close(found["right"]["inputs"], together.T @ together / 8)
        else:
            assert moments.owner["right"] == "left"


# --- sharing, and what is never reached -----------------------------------------------------------------------------


def test_matrices_that_read_the_same_tensor_share_one_statistic(tmp_path: Path) -> None:
    found = gathered(build("llama"), tmp_path)
    block = {name.removeprefix("model.layers.1."): kept for name, kept in found.shared.items() if ".1." in name}
    assert {name: kept.removeprefix("model.layers.1.") for name, kept in block.items()} == {
        "self_attn.q_proj": "self_attn.q_proj",
        "self_attn.k_proj": "self_attn.q_proj",
        "self_attn.v_proj": "self_attn.q_proj",
        "self_attn.o_proj": "self_attn.o_proj",
        "mlp.gate_proj": "mlp.gate_proj",
        "mlp.up_proj": "mlp.gate_proj",
        "mlp.down_proj": "mlp.down_proj",
    }
    kept = {name for name in found.layout() if name.endswith(".inputs")}
    assert len(kept) == 8


class Fork(nn.Module):
    """Two layers that read the same tensor, except in the batches in which `apart` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.never = nn.Linear(7, 5), nn.Linear(7, 3, bias=False), nn.Linear(7, 2)
        self.apart = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.left(x).sum()
        if self.apart:
            return y
        return y + self.right(x).sum()


@pytest.mark.parametrize("order", [(False, True, False), (True, False, False), (False, False, True)])
def test_matrices_that_share_only_sometimes_are_told_apart(order: tuple[bool, ...]) -> None:
    fork, xs = Fork(), torch.randn(3, 4, 7)
    moments = Moments({name: fork.get_submodule(name) for name in ("left", "right", "never")})
    for x, apart in zip(xs, order, strict=True):
        fork.apart = apart
        fork(x).backward()
        moments.end_batch()
    together = torch.cat([x for x, apart in zip(xs, order, strict=True) if not apart])
    for name, rows in (("left", xs.reshape(-1, 7)), ("right", together)):
        found = {kind: group.get(kind) for kind, group in moments.statistics(name, 12)}
        torch.testing.assert_close(found["inputs"], rows.T @ rows / 12)
        torch.testing.assert_close(found["magnitudes"], rows.abs().sum(0) / 12)
        assert moments.counts[name] == len(rows)
    assert [kind for kind, _ in moments.statistics("never", 12)] == ["about"]
    assert moments.counts["never"] == 0


def test_wide_products_are_made_in_pieces_of_the_upper_triangle() -> None:
    layer, x = nn.Linear(301, 270), torch.randn(19, 301)
    moments = Moments({"layer": layer})
    y = layer(x)
    y.backward(g := torch.randn_like(y))
    moments.end_batch()
    found = {kind: group.get(kind) for kind, group in moments.statistics("layer", 19)}
    torch.testing.assert_close(found["inputs"], x.T @ x / 19)
    torch.testing.assert_close(found["outputs"], g.T @ g / 19)


class Ungated(LlamaMLP):
    """Leaves one of its matrices out."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x))


def test_a_matrix_that_no_token_reaches_has_zeros_and_a_count_of_zero(tmp_path: Path) -> None:
    model = build("llama")
    model.model.layers[0].mlp.__class__ = Ungated
    found = gathered(model, tmp_path)
    name = "model.layers.0.mlp.gate_proj"
    assert found.counts[name] == 0
    assert found.record.numbers["never_reached"] == 1
    for value, shape in (
        (found.inputs(name), (32, 32)),
        (found.outputs(name), (56, 56)),
        (found.magnitudes(name), (32,)),
    ):
        assert value is not None
        assert torch.equal(value, torch.zeros(shape))
    assert found.inputs("model.embed_tokens") is None
    assert found.outputs("no.such.matrix") is None


# --- precision, and the choice of the road ---------------------------------------------------------------------------


def test_a_short_pass_of_a_small_model_runs_whole_and_a_restart_keeps_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mode(name: str) -> str:
        context = RunContext.create(device="cpu").within(Workspace(tmp_path / name, "key"))
        assert context.workspace is not None
        context.workspace.open()
        config, model = CalibrationConfig(), build("llama")
        return str(collect_statistics(model, find_targets(model), IDS, config, context)["mode"])

    assert mode("enough") == "whole"
    monkeypatch.setattr(layerwise, "free_memory", lambda device: 1 << 20)
    assert mode("little") == "blocks"
    assert mode("enough") == "whole"
    monkeypatch.undo()
    monkeypatch.setattr(layerwise, "SHORT", 1e5)
    assert mode("long") == "blocks"


@pytest.mark.parametrize("whole", [False, True])
def test_bfloat16_products_give_nearly_the_statistics_of_float32(whole: bool, tmp_path: Path) -> None:
    model = build("llama")
    exact, fast = (
        statistics(gathered(model, tmp_path, dtype=dtype, whole_model=whole, measure_losses=0))
        for dtype in ("float32", "bfloat16")
    )
    for name, value in exact.items():
        error = torch.linalg.norm(fast[name] - value) / torch.linalg.norm(value)
        assert error < 0.03, name


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_head_stay_in_the_dtype_of_the_model(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("welore.layers.head.AT_ONCE", 10 * 32)  # ten rows of the head
    model = build("llama", torch.bfloat16, tie_word_embeddings=tied)
    runner = block_runner.block_runner(model, IDS[:1], torch.device("cpu"), torch.float32, torch.bfloat16)
    assert runner is not None
    shell = runner._backbone
    for table, original in (
        (shell.get_input_embeddings(), model.get_input_embeddings()),
        (shell.get_output_embeddings(), model.get_output_embeddings()),
    ):
        assert table.weight.data_ptr() == original.weight.data_ptr()
    hidden = runner.embed(IDS)
    assert hidden.dtype == torch.float32
    leaf = torch.randn(IDS.shape[0], IDS.shape[1], 32, requires_grad=True)
    logits = runner.logits(IDS, leaf)
    logits.backward(above := torch.randn_like(logits))
    head, exact = model.float(), leaf.detach().clone().requires_grad_()
    expected = head.lm_head(head.model.norm(exact))
    torch.testing.assert_close(logits, expected)
    expected.backward(above)
    torch.testing.assert_close(leaf.grad, exact.grad, rtol=0.05, atol=0.05)


def test_a_whole_model_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "free_memory", lambda device: 1 << 20)
    with pytest.raises(WeLoreError, match=r"the whole model take 0.0 GB at once, and cpu has 0.0 GB free: leave out"):
        gathered(build("llama", intermediate_size=256), tmp_path, whole_model=True)


def test_blocks_of_a_model_too_large_for_the_device_are_tried_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    usual = block_runner.frozen_copy
    monkeypatch.setattr(
        block_runner, "frozen_copy", lambda m, where, *a, **k: tried.append(where) or usual(m, CPU, *a, **k)
    )
    for free in (1 << 30, 1 << 10):
        monkeypatch.setattr(block_runner, "free_memory", lambda device, free=free: free)
        tried.clear()
        with suppress(RuntimeError):  # nothing computes on that device
            block_runner.block_runner(build("llama"), IDS[:1], torch.device("meta"), torch.float32, None)
        assert tried[0].type == ("meta" if free > 1 << 20 else "cpu")


def test_auto_is_bfloat16_where_the_device_multiplies_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for can, expected in ((True, "bfloat16"), (False, "float32"), (None, "float32")):
        monkeypatch.setattr(layerwise, "multiplies", lambda dtype, device, can=can: can)
        found = gathered(build("llama"), tmp_path, dtype="auto", measure_losses=0)
        assert found.record.settings["dtype"] == expected


# --- the file -------------------------------------------------------------------------------------------------------


def test_a_saved_calibration_loads_equal_and_saves_to_the_same_bytes(tmp_path: Path) -> None:
    found = gathered(build("qwen2"), tmp_path, exclude=["down_proj"])
    again = Statistics.load(tmp_path / "c.safetensors")
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()
    for field in ("model", "shapes", "counts", "shared", "record", "include", "exclude"):
        assert getattr(found, field) == getattr(again, field)
    assert again.exclude == ("down_proj",)
    assert TensorReader(tmp_path / "c.safetensors").entries.keys() == again.layout().keys()


def test_the_model_s_own_view_of_its_text_lies_in_the_file(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", None)
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f " * 200)
    size = {"num_tokens": 128, "max_length": 16, "measure_losses": 0}
    found = calibrate(model, f"self:1,{text}:1", tmp_path / "C", **size)
    again = Statistics.load(tmp_path / "C").teacher()
    assert again is not None
    logprobs, ids = again
    written = found.generated_text()
    assert written is not None
    assert written.shape == (4, 16)
    assert logprobs.shape == ids.shape == (4, 16, 64)
    dense = AutoModelForCausalLM.from_pretrained(model)
    expected = dense(written).logits.float().log_softmax(-1).gather(-1, ids.long())
    torch.testing.assert_close(logprobs.float(), expected, rtol=1e-3, atol=1e-3)


def test_the_file_can_be_read_by_anyone(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    found = gathered(build("llama"), tmp_path)
    theirs = load_file(tmp_path / "c.safetensors")
    assert theirs.keys() == found.layout().keys()
    assert torch.equal(theirs["model.layers.1.mlp.down_proj.inputs"], found.inputs("model.layers.1.mlp.down_proj"))


def test_a_calibration_of_another_model_is_told_from_this_one(tmp_path: Path) -> None:
    found = gathered(build("llama"), tmp_path)
    other = ModelSource(build("llama", num_key_value_heads=4))
    found.model.check(ModelSource(build("llama")).identity, "calibration")
    with pytest.raises(WeLoreError, match="the calibration was made for another model"):
        found.model.check(other.identity, "calibration")


def test_files_that_are_no_calibration_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(WeLoreError, match="does not exist: make it with `welore calibrate MODEL"):
        Statistics.load(tmp_path / "missing.safetensors")
    path = tmp_path / "c.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(WeLoreError, match="holds no statistics"):
        Statistics.load(path)
    with pytest.raises(WeLoreError, match="is there, and no file of ours"):
        gathered(build("llama"), tmp_path)
    path.unlink()
    gathered(build("llama"), tmp_path)
    about = TensorReader(path).metadata
    tensors = load_file(path)
    save_file(tensors, path, {key: value for key, value in about.items() if key != "counts"})
    with pytest.raises(WeLoreError, match="lacks 'counts'"):
        Statistics.load(path)
    tensors.pop("model.layers.0.mlp.down_proj.inputs")
    save_file(tensors, path, about)
    with pytest.raises(WeLoreError, match="its tensors are not those that it names"):
        Statistics.load(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(WeLoreError, match="is cut off"):
        Statistics.load(path)


def test_without_an_output_the_file_lives_as_long_as_the_statistics(tmp_path: Path) -> None:
    expected = gathered(build("llama"), tmp_path)
    found = calibrate(build("llama"), IDS, dtype="float32", whole_model=False)
    path = found.store.path  # type: ignore[attr-defined]
    found.save(tmp_path / "saved.safetensors")
    assert (tmp_path / "saved.safetensors").is_file()
    part = found.select({}, {})
    for name, value in statistics(expected).items():
        assert torch.equal(found.store.read(name), value)
    assert path.is_file()
    del found
    gc.collect()
    assert path.is_file()  # the selection reads it, too
    del part
    gc.collect()
    assert not path.parent.exists()
    with pytest.raises(WeLoreError, match="it gives token 96"):
        calibrate(build("llama"), torch.tensor([[5, 96, 7]]))


# --- from a directory, with text ------------------------------------------------------------------------------------


def text(directory: Path, name: str, words: str, repeats: int = 60) -> str:
    path = directory / name
    path.write_text(words * repeats)
    return str(path)


def test_a_directory_gives_what_the_same_model_in_memory_gives(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path / "model", rank_reduction=None)
    pears = text(tmp_path, "pears.txt", "Ann has 3 pears and 14 plums. ")
    how: dict[str, Any] = {"num_tokens": 64, "max_length": 16}
    streamed = calibrate(directory, pears, tmp_path / "a.safetensors", **how)
    model, tokenizer = welore.models.load.load(directory, "auto", "cpu")
    in_memory = calibrate(model, pears, tmp_path / "b.safetensors", tokenizer=tokenizer, **how)
    assert streamed.model.fingerprint == in_memory.model.fingerprint
    for name, value in statistics(streamed).items():
        assert torch.equal(value, statistics(in_memory)[name])
    assert list(tmp_path.glob("*.work")) == []


def test_a_mixture_is_drawn_in_proportion_and_named_in_the_record(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path / "model", rank_reduction=None)
    pears, plums = text(tmp_path, "pears.txt", "3 pears. "), text(tmp_path, "plums.txt", "plums, 5 of them. ")
    data = f"{pears}:3, {plums}:1,self:1"
    how: dict[str, Any] = {"num_tokens": 160, "max_length": 16}
    first, second = (calibrate(directory, data, tmp_path / f"{n}.safetensors", **how) for n in (1, 2))
    assert [(s["name"], s["windows"], s["weight"]) for s in first.record.inputs["sources"]] == [
        (pears, 6, 3.0),
        (plums, 2, 1.0),
        ("self", 2, 1.0),
    ]
    assert first.record.numbers["tokens"] == 160
    assert first.record.settings["temperature"] == 1.0
    assert first.record.inputs["sources"] == second.record.inputs["sources"]
    for name, value in statistics(first).items():
        assert torch.equal(value, statistics(second)[name])
    other = calibrate(directory, data, tmp_path / "3.safetensors", seed=1, **how)
    assert other.record.inputs["sources"][2]["sha256"] != first.record.inputs["sources"][2]["sha256"]


def test_texts_and_a_dataset_are_read_like_a_file(tmp_path: Path) -> None:
    import datasets

    directory = checkpoint(tmp_path / "model", rank_reduction=None)
    size: dict[str, Any] = {"num_tokens": 64, "max_length": 16}
    texts = [f"Ann has {n} pears. " * 20 for n in range(9)]
    listed = calibrate(directory, texts, tmp_path / "a.safetensors", **size)
    rows = datasets.Dataset.from_dict({"story": texts})
    table = calibrate(directory, rows, tmp_path / "b.safetensors", text_column="story", **size)
    assert [source["name"] for source in listed.record.inputs["sources"]] == ["list of 9 texts"]
    assert [source["name"] for source in table.record.inputs["sources"]] == ["Dataset of 9 texts"]
    digests = [found.record.inputs["sources"][0]["sha256"] for found in (listed, table)]
    assert digests[0] == digests[1]
    assert listed.record.numbers["windows"] == 4


def test_what_is_drawn_from_a_file_does_not_depend_on_its_folder(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path / "model", rank_reduction=None)
    (tmp_path / "else" / "where").mkdir(parents=True)
    many = " ".join(f"{n} pears." for n in range(200))
    here, there = (text(folder, "pears.txt", many) for folder in (tmp_path, tmp_path / "else" / "where"))
    one, same, other = (
        draw(path, 64, read_tokenizer(directory), 16, seed=seed)[1][0].windows
        for path, seed in ((here, 0), (there, 0), (here, 1))
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_file_of_windows_is_read_as_it_is(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path / "model", rank_reduction=None)
    ids = torch.randint(3, 40, (5, 16), generator=torch.Generator().manual_seed(7))
    kept = tmp_path / "some.safetensors"
    write_windows(kept, ids)
    write_windows(kept, ids + 1)  # what is there stays
    found = calibrate(directory, str(kept), tmp_path / "file.safetensors", num_tokens=48, max_length=16)
    expected = calibrate(directory, ids[:3], tmp_path / "ids.safetensors")
    for name, value in statistics(found).items():
        assert torch.equal(value, statistics(expected)[name])
    with pytest.raises(WeLoreError, match="has 5 windows of 16 tokens, 6 are wanted"):
        calibrate(directory, str(kept), tmp_path / "more.safetensors", num_tokens=96, max_length=16)
    with pytest.raises(WeLoreError, match="has windows of 16 tokens, not of 8"):
        calibrate(directory, str(kept), tmp_path / "more.safetensors", num_tokens=48, max_length=8)
    mixed = draw(f"{kept}:1,pydoc:1", 64, read_tokenizer(directory), 16, seed=0)[1]
    assert torch.equal(mixed[0].windows, ids[:2])


@pytest.mark.parametrize(
    ("instructions", "dtype"), [(True, torch.bfloat16), (False, torch.float32), (None, torch.float32)]
)
def test_on_a_cpu_a_model_writes_in_bfloat16_where_the_processor_multiplies_it(
    instructions: bool | None, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkpoint(tmp_path / "model", rank_reduction=None)
    half = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    half.save_pretrained(directory)
    monkeypatch.setattr("welore.models.copies.multiplies", lambda dtype, device: instructions)
    seen = []
    usual = collection.generate_text
    monkeypatch.setattr(
        collection, "generate_text", lambda m, *args, **how: seen.append(m.dtype) or usual(m, *args, **how)
    )
    found = calibrate(directory, "self", tmp_path / "c.safetensors", num_tokens=64, max_length=16, measure_losses=0)
    size = CalibrationConfig(num_tokens=64, max_length=16, seed=seed_of(0, SELF))
    expected = usual(half.to(dtype), read_tokenizer(directory), size)
    assert seen == [dtype]
    assert torch.equal(found.generated_text(), expected)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("after", "damaged"), [*((after, False) for after in range(1, 11)), (4, True), (8, True)])
def test_a_killed_run_goes_on_to_the_same_statistics(
    after: int, damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkpoint(tmp_path / "model", rank_reduction=None)
    how: dict[str, Any] = {"num_tokens": 64, "max_length": 16, "dtype": "bfloat16", "whole_model": False}
    expected = statistics(calibrate(directory, "self", tmp_path / "whole.safetensors", **how))
    usual, count, steps = Workspace.store, 0, ("written", "boundary-", "gradient-", "loss", "block-")

    def store(self: Workspace, name: str, tensors: Any) -> None:
        nonlocal count
        usual(self, name, tensors)
        count += name.startswith(steps)
        if count == after:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Workspace, "store", store)
        if after <= 9:  # text, three boundaries, two gradients, the loss, two blocks
            with pytest.raises(Killed):
                calibrate(directory, "self", tmp_path / "killed.safetensors", **how)
            assert not (tmp_path / "killed.safetensors").exists()
            assert (tmp_path / "killed.safetensors.work").is_dir()
    if damaged:
        for kind in ("boundary", "gradient"):
            for file in (tmp_path / "killed.safetensors.work").glob(f"{kind}-*"):
                file.write_bytes(file.read_bytes()[:-4])
    again = calibrate(directory, "self", tmp_path / "killed.safetensors", **how)
    assert torch.isfinite(torch.tensor(again.record.numbers["sampled_label_nll"]))
    for name, value in statistics(again).items():
        assert torch.equal(value, expected[name])
    assert not (tmp_path / "killed.safetensors.work").exists()


# --- what is refused ------------------------------------------------------------------------------------------------


def test_impossible_settings_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path / "model", rank_reduction=None)
    pears = text(tmp_path, "pears.txt", "3 pears. ", repeats=10)
    before = sorted(tmp_path.rglob("*"))
    for data, how, message in (
        (pears, {"num_tokens": 0}, "num_tokens is 0: it must be at least 1"),
        (pears, {"max_length": 1}, "max_length is 1: it must be at least 2"),
        (pears, {"batch_size": 0}, "batch_size is 0: it must be at least 1"),
        (pears, {"max_length": 1024}, "length is 1024: this model reads at most 512 tokens at once"),
        (pears, {"num_tokens": 160, "max_length": 16}, r"has 4 windows of 16 tokens, 10 are wanted: take fewer tokens"),
        (pears, {"dtype": "float31"}, "unknown dtype 'float31'; did you mean 'float32'"),
        (f"{pears}:0", {}, "is 0: it must be above 0"),
        (f"{pears}:-1", {}, "is -1: it must be above 0"),
        (f"{pears},{pears}:2", {}, "is named 2 times: name it once"),
        ("pydoc,", {}, "a name of a text is missing"),
        ({}, {}, "a name of a text is missing"),
        (f"{pears}:1,pydoc:99", {"num_tokens": 64, "max_length": 16}, "gets none of 4 windows"),
        ("pidoc", {}, "unknown data set 'pidoc'; did you mean 'pydoc'"),
        (torch.zeros(2, 3), {}, r"the dataset is a tensor of shape \(2, 3\): give token ids"),
        ("self", {"temperature": 0.0}, "temperature is 0.0: it must be above 0"),
        ("self", {"top_k": -1}, "top_k is -1"),
        ("self", {"top_p": 0.0}, "top_p is 0.0"),
        ("self", {"first": "words"}, "unknown beginning 'words'; did you mean 'word'"),
        (pears, {"include": ["no_such"]}, "the pattern 'no_such' matches no linear layer"),
    ):
        with pytest.raises(WeLoreError, match=message):
            calibrate(directory, data, tmp_path / "c.safetensors", **how)  # type: ignore[arg-type]
        assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(WeLoreError, match="is a directory: name a file"):
        calibrate(directory, pears, tmp_path)


def test_a_model_that_computes_nan_is_refused(tmp_path: Path) -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(WeLoreError, match="the model computes NaN or Inf"):
        gathered(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_statistics_that_overflow_name_their_matrix() -> None:
    layer = nn.Linear(3, 2)
    moments = Moments({"model.layers.7.down": layer})
    layer(torch.full((2, 3), 1e25)).sum().backward()
    moments.end_batch()
    with pytest.raises(WeLoreError, match="the inputs of model.layers.7.down hold NaN or Inf"):
        dict(moments.statistics("model.layers.7.down", 2))


def test_a_model_whose_calls_another_library_has_taken_over_is_refused(tmp_path: Path) -> None:
    model = build("llama")
    attention = model.model.layers[1].self_attn
    attention.forward = attention.forward
    with pytest.raises(WeLoreError, match="model.layers.1.self_attn has been given a forward by another library"):
        gathered(model, tmp_path)


def test_several_processes_are_refused(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("welore.io.parallel.join_processes", lambda: Processes(0, 2))
    sentence = refused("calibrate", tmp_path, "-o", tmp_path / "c.safetensors")
    assert "calibrate works in one process: start it without torchrun" in sentence


def test_a_compressed_model_is_refused(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path / "model", rank_reduction=0.4)
    with pytest.raises(WeLoreError, match="compressed already"):
        calibrate(directory, "pydoc", tmp_path / "c.safetensors")


def test_a_model_in_memory_needs_its_tokenizer_to_read(tmp_path: Path) -> None:
    with pytest.raises(WeLoreError, match="a model in memory needs its tokenizer"):
        calibrate(build("llama"), "pydoc", tmp_path / "c.safetensors")


def test_tokens_of_another_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeLoreError, match="it gives token 96, this model knows 96"):
        gathered(build("llama"), tmp_path, torch.tensor([[5, 96, 7]]))
