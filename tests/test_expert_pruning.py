"""Whole experts taken out of a mixture: which ones, and an ordinary smaller model of the family, there and back."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    Llama4ForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
)

import welore
from campaigns.architectures import ARCHITECTURES, loaded, matrix_of
from campaigns.architectures import build as build_architecture
from conftest import Command, compress, done, logits
from processes import command, launched
from test_checkpoint import equal, weights_of
from toys import calibrate, checkpoint
from welore.allocation.plan import Plan
from welore.calibration.statistics import Statistics
from welore.compression.analysis import Analyzer
from welore.compression.blockwise import BlockAnalyzer
from welore.compression.needs import Needs
from welore.compression.pipeline import make_job
from welore.config import CalibrationConfig, CompressionConfig, RecoveryConfig
from welore.errors import WeLoreError
from welore.io.context import RunContext
from welore.io.resume import Workspace
from welore.layers.remaining import is_left
from welore.models.expert_pruning import find_expert_pruning
from welore.models.load import sizes_in
from welore.models.source import ModelSource, open_source

# Where routers keep what they add to the scores of every expert; and how they are called.
FAMILIES = {
    "Mixtral": "num_local_experts",
    "Qwen3-MoE": "num_experts",
    "OLMoE": "num_experts",
    "DeepSeek-V3": "n_routed_experts",
    "GPT-OSS": "num_local_experts",
    "GraniteMoeHybrid": "num_local_experts",
    "Llama4": "num_local_experts",
}
WINDOWS = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0))


def statistics_of(model: Any, directory: Path) -> Statistics:
    return calibrate(model, WINDOWS, directory / "c.safetensors", dtype="float32", measure_losses=0)


def without_choice(model: Any, plan: Plan) -> Any:
    """The dense model, whose routers give the experts that were taken out a score of minus infinity."""

    def forbid(mixture: str, name: str) -> None:
        left = plan.experts[mixture]
        gone = sorted(set(range(left.width)) - set(left.indices))
        router = model.get_submodule(name)
        plain = nn.functional.linear

        def scores(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            y = plain(x, weight, bias)
            if weight.shape[0] == left.width:
                y[..., gone] = -torch.inf
            return y

        inner = router.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            nn.functional.linear = scores
            try:
                return inner(*args, **kwargs)
            finally:
                nn.functional.linear = plain

        router.forward = forward

    for mixture in plan.experts:
        around = mixture.rpartition(".")[0]
        (name,) = [n for n in ("gate", "router") if hasattr(model.get_submodule(around), n)]
        forbid(mixture, f"{around}.{name}")
    return model


@pytest.fixture
def dense(tmp_path: Path) -> Callable[..., Path]:
    """Builds and saves a mixture with routers that are not alike; the directory."""

    def save(name: str) -> Path:
        model = build_architecture(name)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.copy_(torch.tensor([0.0, 0.002, -0.002, 0.004]))
        directory = tmp_path / "dense"
        model.save_pretrained(directory)
        config = json.loads((directory / "config.json").read_text())
        if name == "Qwen3-MoE":  # as on the hub
            config["num_experts"] = config.pop("num_local_experts")
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return save


@pytest.mark.parametrize("name", FAMILIES)
def test_pruned_model_is_the_dense_one_that_cannot_choose_the_others(
    name: str, dense: Callable[..., Path], tmp_path: Path
) -> None:
    directory, small = dense(name), tmp_path / "small"
    statistics = statistics_of(loaded(directory), tmp_path)
    how: dict[str, Any] = {"expert_pruning": 0.25, "optimize_for": "anywhere", "recovery": None}
    record = compress(directory, small, statistics=statistics, **how)
    plan = Plan.load(small / "plan.json")
    assert {left.pruned for left in plan.experts.values()} == {1}

    before, after = (json.loads((d / "config.json").read_text()) for d in (directory, small))
    assert after == before | {FAMILIES[name]: 3}
    assert before[FAMILIES[name]] == 4
    expected = logits(without_choice(loaded(directory), plan), WINDOWS)
    model = loaded(small)
    torch.testing.assert_close(logits(model, WINDOWS), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected, logits(loaded(directory), WINDOWS), atol=1e-4)
    assert record.numbers["parameters"] == sum(p.numel() for p in model.parameters())
    assert record.numbers["parameters_dense"] == sum(p.numel() for p in loaded(directory).parameters())
    generated = model.generate(WINDOWS, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape[1] == WINDOWS.shape[1] + 4

    in_memory = loaded(directory)
    compress(in_memory, statistics=statistics, **how)
    torch.testing.assert_close(logits(in_memory, WINDOWS), expected, rtol=1e-5, atol=1e-6)
    in_memory.save_pretrained(tmp_path / "saved")
    assert equal(weights_of(tmp_path / "saved"), weights_of(small))
    torch.testing.assert_close(logits(loaded(tmp_path / "saved"), WINDOWS), expected, rtol=1e-5, atol=1e-6)
    compress(directory, tmp_path / "again", plan=plan, statistics=statistics, recovery=None)
    assert equal(weights_of(tmp_path / "again"), weights_of(small))


@pytest.mark.parametrize(
    ("name", "kind"),  # of the first one the text alone is read, too
    [("Llama4-Scout", Llama4ForConditionalGeneration), ("Qwen3-VL-MoE", Qwen3VLMoeForConditionalGeneration)],
)
def test_text_part_of_a_multimodal_model_has_fewer_experts(
    name: str, kind: Any, dense: Callable[..., Path], tmp_path: Path
) -> None:
    directory, small = dense(name), tmp_path / "small"
    statistics = statistics_of(loaded(directory), tmp_path)
    how: dict[str, Any] = {"expert_pruning": 0.25, "optimize_for": "anywhere", "recovery": None}
    compress(directory, small, statistics=statistics, **how)
    before, after = (json.loads((d / "config.json").read_text()) for d in (directory, small))
    assert after == before | {"text_config": before["text_config"] | {"num_local_experts": 3}}
    expected = logits(without_choice(loaded(directory), Plan.load(small / "plan.json")), WINDOWS)
    for model in (loaded(small), loaded(small, kind)):
        torch.testing.assert_close(logits(model, WINDOWS), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE", "DeepSeek-V3", "GPT-OSS"])
def test_the_silence_of_the_experts_that_go_loses_least(name: str, dense: Callable[..., Path], tmp_path: Path) -> None:
    """tr(G W H W^T), in float64: the mean over all tokens of (g^T W x)^2, as far as inputs tell no gradients."""
    directory = dense(name)
    model, statistics = loaded(directory), statistics_of(loaded(directory), tmp_path)
    how: dict[str, Any] = {"expert_pruning": 0.5, "optimize_for": "anywhere", "recovery": None}
    compress(directory, tmp_path / "small", statistics=statistics, **how)
    experts = Plan.load(tmp_path / "small/plan.json").experts
    assert experts
    for mixture, left in experts.items():
        losses = []
        for number in range(4):
            down = f"{mixture}.{number}.down_proj"
            W, G, H = matrix_of(model, down), statistics.outputs(down), statistics.inputs(down)
            assert G is not None
            assert H is not None
            losses.append(float(torch.trace(G.double() @ W.double() @ H.double() @ W.double().T)))
        assert set(left.indices) == set(torch.tensor(losses).topk(2).indices.tolist())


@pytest.mark.parametrize("name", ["Mixtral", "DeepSeek-V3", "GPT-OSS"])
def test_experts_that_are_left_are_compressed_as_usual(
    name: str, dense: Callable[..., Path], tmp_path: Path, tokens: Tensor
) -> None:
    directory, small = dense(name), tmp_path / "small"
    statistics = statistics_of(loaded(directory), tmp_path)
    how: dict[str, Any] = {"keep": 0.5, "expert_pruning": 0.25, "statistics": statistics, "recovery": None}
    how |= {"mlp_pruning": 0.2 if name == "Mixtral" else 0}
    record = compress(directory, small, **how)
    plan, model = Plan.load(small / "plan.json"), loaded(small)
    assert plan.dense_parameters == sum(math.prod(t.shape) for t in ModelSource(loaded(directory)).targets)
    assert record.numbers["parameter_ratio"] == pytest.approx(0.5, abs=0.01)
    assert record.settings["expert_pruning"] == 0.25
    assert sizes_in(small, model)["parameter_ratio"] == record.numbers["parameter_ratio"]  # also in other records
    assert bool(plan.neurons) == (name == "Mixtral")
    assert {len(left.indices) for left in plan.experts.values()} == {3}

    in_memory = loaded(directory)
    compress(in_memory, **how)
    torch.testing.assert_close(logits(in_memory, tokens), logits(model, tokens), rtol=1e-5, atol=1e-6)
    assert equal(in_memory.state_dict(), model.state_dict())
    model.save_pretrained(tmp_path / "saved")
    assert equal(weights_of(tmp_path / "saved"), weights_of(small))
    compress(directory, tmp_path / "again", plan=plan, statistics=statistics, recovery=None)
    assert equal(weights_of(tmp_path / "again"), weights_of(small))

    welore.merge(small, tmp_path / "merged")
    merged = loaded(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, tokens), logits(model, tokens), rtol=1e-3, atol=1e-3)
    assert not hasattr(merged.config, "quantization_config")
    dense_model = without_choice(loaded(directory), plan)
    with torch.no_grad():  # the dense model with the matrices of the result, in their old places
        for a in plan.allocations:
            matrix_of(dense_model, a.name).copy_(matrix_of(merged, plan.name_in_result(a.name)))
    torch.testing.assert_close(logits(dense_model, tokens), logits(merged, tokens), rtol=1e-4, atol=1e-5)


# --- the job ---------------------------------------------------------------------------------------------------------

TEXT = CalibrationConfig(num_tokens=256, max_length=64)


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """A mixture of eight experts, two for each token, that can read; the directory."""
    return checkpoint(tmp_path / "mixture", None, "qwen3_moe", num_experts=8, moe_intermediate_size=40)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("pruning", [0.0, 0.2])
def test_experts_that_go_are_neither_decomposed_nor_stored(
    whole: bool, pruning: float, mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed, compute = set[str](), Analyzer.compute
    stored, store = set[str](), Workspace.store
    monkeypatch.setattr(Analyzer, "compute", lambda self, target: computed.add(target.layer) or compute(self, target))
    monkeypatch.setattr(Workspace, "store", lambda self, name, group: stored.add(name) or store(self, name, group))
    config = CompressionConfig(keep=0.5, expert_pruning=0.25, mlp_pruning=pruning)
    text = replace(TEXT, whole_model=whole)
    plan = welore.compress(mixture, tmp_path / "own", config, calibration=text, recovery=None).plan
    assert computed == {allocation.name for allocation in plan.allocations}
    assert len({name for name in computed if name.startswith("model.layers.0.mlp.experts.")}) == 6 * 3
    gone = {name.rpartition(".")[2] for name in stored if not is_left(name, plan.experts)}
    assert gone - {"inputs-sum", "magnitudes-sum", "outputs-sum"} == {"about", "silence"}


def test_no_room_is_asked_for_experts_that_go(mixture: Path) -> None:
    context = RunContext.create(device="cpu")
    source = open_source(mixture, context)
    disk = []
    for pruning in (0.0, 0.25):
        config = CompressionConfig(keep=0.5, expert_pruning=pruning, mlp_pruning=0)
        job = make_job(source, config, TEXT, None, None, None, context)
        disk += [stage.disk_bytes for stage in Needs(job).stages() if stage.name == "decompositions"]
    gone = [target for target in source.targets if ".experts.0." in target.name]
    assert disk[0] - disk[1] == 2 * sum(4 * min(target.shape) ** 2 for target in gone)


def test_neurons_of_experts_that_go_do_not_count_where_few_may_be_taken_out(mixture: Path) -> None:
    context = RunContext.create(device="cpu")
    source = open_source(mixture, context)
    sizes = {target.name: math.prod(target.shape) for target in source.targets}
    gone = sum(size for name, size in sizes.items() if ".experts.0." in name or ".experts.1." in name)
    left = sum(size for name, size in sizes.items() if ".experts." in name) - gone
    modes = []
    for removed in (left / 25, left / 18):  # a twentieth is the least
        config = CompressionConfig(keep=1 - (gone + removed) / sum(sizes.values()), expert_pruning=0.25)
        job = make_job(source, replace(config, mlp_pruning="auto"), TEXT, None, None, None, context)
        modes.append(job.config.mlp_pruning)
    assert modes == [0.0, "auto"]


@pytest.mark.usefixtures("one_thread")
def test_job_that_was_stopped_when_experts_were_compared_continues_to_the_same_bytes(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their sums, to which the others of the layer have lent some, are in the workspace then."""
    config, text = CompressionConfig(keep=0.5, expert_pruning=0.25), replace(TEXT, whole_model=False)

    class Stopped(BaseException):
        pass

    def stop(self: BlockAnalyzer, names: Any, *rest: Any) -> None:
        if any(".experts." in name for name in names):
            raise Stopped
        usual(self, names, *rest)

    usual = BlockAnalyzer.__call__
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(BlockAnalyzer, "__call__", stop)
        welore.compress(mixture, tmp_path / "out", config, calibration=text, recovery=None)
    assert list((tmp_path / "out.work").glob("*.outputs-sum.safetensors"))
    for name in ("out", "undisturbed"):
        welore.compress(mixture, tmp_path / name, config, calibration=text, recovery=None)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


@pytest.mark.parametrize("pruning", [0.0, 0.2])
def test_statistics_that_are_used_up_block_by_block_leave_the_same_experts(
    mixture: Path, tmp_path: Path, pruning: float
) -> None:
    statistics = calibrate(mixture, "self", tmp_path / "c", num_tokens=256, max_length=64, measure_losses=0)
    config = CompressionConfig(keep=0.5, expert_pruning=0.25, mlp_pruning=pruning)
    own = welore.compress(mixture, tmp_path / "own", config, calibration=TEXT, recovery=None)
    given = welore.compress(mixture, tmp_path / "given", config, statistics=statistics, recovery=None)
    assert own.plan.experts == given.plan.experts
    assert {len(left.indices) for left in own.plan.experts.values()} == {6}
    assert bool(own.plan.neurons) == bool(pruning)
    if not pruning:  # nothing is rounded
        assert equal(weights_of(tmp_path / "own"), weights_of(tmp_path / "given"))


@pytest.mark.usefixtures("one_thread")
def test_two_processes_leave_the_experts_of_one(mixture: Path, tmp_path: Path) -> None:
    config = CompressionConfig(keep=0.5, expert_pruning=0.25)
    welore.compress(mixture, tmp_path / "one", config, calibration=TEXT, recovery=None)
    size, text = ("--keep", 0.5, "--expert-pruning", 0.25), ("--num-tokens", 256, "--max-length", 64)
    for ended in launched(command("compress", mixture, tmp_path / "two", *size, *text, "--recovery", "none")):
        assert ended.status == 0, ended.err
    assert Plan.load(tmp_path / "two" / "plan.json").experts == Plan.load(tmp_path / "one" / "plan.json").experts
    assert equal(weights_of(tmp_path / "two"), weights_of(tmp_path / "one"))


@pytest.mark.parametrize("goal", ["cpu", "anywhere"])
def test_recovery_trains_what_is_left(mixture: Path, tmp_path: Path, goal: str, tokens: Tensor) -> None:
    size = {"keep": 0.6} if goal == "cpu" else {"keep": None}
    config = CompressionConfig(**size, expert_pruning=0.25, optimize_for=goal)
    text = ["Nothing of this has the model read before. " * 60]
    recovery = RecoveryConfig(dataset=text, num_tokens=2048, learning_rate=1e-3, teacher_weight=0.1)
    cut, healed = (
        welore.compress(mixture, tmp_path / name, config, calibration=TEXT, recovery=training)
        for name, training in (("cut", None), ("healed", recovery))
    )
    assert healed.record.settings["recovery"]["trained"] == ("factors" if goal == "cpu" else "matrices")
    assert healed.record.numbers["healed"]
    before, after = weights_of(tmp_path / "cut"), weights_of(tmp_path / "healed")
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    moved = {n for n, t in before.items() if not torch.equal(t, after[n])}
    assert any(".experts.5." in n for n in moved)
    assert all(torch.allclose(t, after[n], atol=0.1 * float(t.abs().max())) for n, t in before.items() if len(t))
    assert cut.plan.experts == healed.plan.experts


@pytest.mark.usefixtures("one_thread")
def test_job_that_was_stopped_among_the_experts_continues_to_the_same_bytes(mixture: Path, tmp_path: Path) -> None:
    config = CompressionConfig(keep=0.5, expert_pruning=0.25)

    class Stopped(BaseException):
        pass

    def stop(items: Any, label: str, total: float) -> Any:
        for number, (item, _) in enumerate(items):
            if label == "experts" and number == 3:
                raise Stopped
            yield item

    def run(out: Path, **options: Any) -> None:
        welore.compress(mixture, out, config, calibration=TEXT, recovery=None, **options)

    with pytest.raises(Stopped):
        run(tmp_path / "out", progress=stop)
    assert (tmp_path / "out.work").is_dir()
    run(tmp_path / "out")
    run(tmp_path / "undisturbed")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_command_line_tells_the_size_before_and_the_experts_afterwards(
    command: Command, mixture: Path, tmp_path: Path
) -> None:
    how = (mixture, tmp_path / "small", "--expert-pruning", "0.25", "--for", "anywhere", "--recovery", "none")
    how = (*how, "--num-tokens", "128", "--max-length", "64")
    told = done(command("compress", *how, "--dry-run", "--json"))
    answer = command("compress", *how, "--json")
    assert answer.status == 0
    record, estimate = json.loads(answer.out), json.loads(told)
    assert estimate["parameters"] == pytest.approx(record["numbers"]["parameters"], rel=0.01)  # but for routers
    assert [stage["name"] for stage in estimate["stages"]] == ["text", "statistics", "expert pruning", "writing"]
    assert "25.0% of the experts were taken out" in answer.err
    assert record["settings"]["target"] == {"expert_pruning": 0.25}
    assert "expert_pruning 0.25" in str(welore.info(tmp_path / "small"))
    assert "--expert-pruning 0.25 --preset best --for anywhere" in (tmp_path / "small/README.md").read_text()


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "paper": ("Mixtral", {"keep": 0.6, "preset": "paper"}, "expert_pruning: experts are chosen by statistics: give"),
    "none": ("Granite", {"keep": 0.6}, "has no targeted experts that could be taken out: leave expert_pruning out"),
    "excluded": ("Mixtral", {"keep": 0.6, "exclude": ("experts",)}, "has no targeted experts"),
    "few": (
        "Mixtral",
        {"keep": 0.6, "expert_pruning": 0.75},
        "leaves 1 of 4 experts .* every token chooses 2: at most",
    ),
    "nothing": (
        "Mixtral",
        {"keep": 0.6, "expert_pruning": 0.1},
        "takes out none of the 4 experts .* 0.25 takes out one",
    ),
    "share": ("Mixtral", {"keep": 0.6, "expert_pruning": 1.0}, "expert_pruning is 1.0: it is the share"),
    "large": ("Mixtral", {"keep": 0.99}, "keep 0.99 cannot be reached"),
    "both": ("Mixtral", {"keep": 0.6, "optimize_for": "anywhere"}, "take out neurons by keep, or experts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, dense: Callable[..., Path], tmp_path: Path) -> None:
    name, settings, sentence = REFUSED[case]
    directory = dense(name)
    with pytest.raises(WeLoreError, match=sentence):
        welore.compress(directory, tmp_path / "small", CompressionConfig(**{"expert_pruning": 0.25} | settings))
    assert not (tmp_path / "small").exists()


def test_plan_for_other_experts_is_refused(dense: Callable[..., Path], tmp_path: Path) -> None:
    directory = dense("Mixtral")
    how: dict[str, Any] = {"expert_pruning": 0.25, "optimize_for": "anywhere", "recovery": None}
    compress(directory, tmp_path / "small", statistics=(known := statistics_of(loaded(directory), tmp_path)), **how)
    plan = Plan.load(tmp_path / "small/plan.json")
    (first, left), *others = plan.experts.items()
    for experts in (dict(others), {first: replace(left, width=9), **dict(others)}):
        with pytest.raises(WeLoreError, match=f"takes experts out of {first}, which this model does not have in that"):
            compress(directory, tmp_path / "again", plan=replace(plan, experts=experts), statistics=known)


def test_groups_of_experts_lose_as_many() -> None:
    family, settings = ARCHITECTURES["DeepSeek-V3"]

    def build(groups: int) -> Any:
        config = CONFIG_MAPPING[family](**settings | {"n_routed_experts": 8, "n_group": 2, "topk_group": groups})
        return AutoModelForCausalLM.from_config(config)

    model = build(1)
    source = ModelSource(model)
    pruning = find_expert_pruning(source, 6)
    assert pruning.select(torch.tensor([1.0, 2, 3, 4, 8, 7, 6, 5])).indices == (1, 2, 3, 4, 5, 6)
    for count, groups in ((5, 1), (2, 2)):
        with pytest.raises(WeLoreError, match=rf"leaves {count} of 8 experts in a layer, which lie in 2 groups"):
            find_expert_pruning(ModelSource(build(groups)), count)
