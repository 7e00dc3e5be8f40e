import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import FAMILIES, MIXTURES, Command, build, compress, logits
from processes import command, launched
from toys import calibrate, checkpoint, finetuned
from welore.allocation.plan import Allocation, Plan
from welore.calibration.statistics import Statistics
from welore.compression import recovery as healing
from welore.config import FinetuneConfig, RecoveryConfig
from welore.data.text import TextOptions
from welore.data.windows import TopK, write_windows
from welore.errors import WeLoreError
from welore.io.context import RunContext
from welore.models.load import fastest, read_tokenizer
from welore.models.skeleton import config_of
from welore.models.source import CheckpointSource
from welore.records import Record
from welore.training.methods import MarkedModel
from welore.training.teacher import recorded_predictions
from welore.training.trainer import FinetuneTrainer

IDS = torch.randint(0, 96, (4, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def source(saved: Callable[..., Path], tokenizer: Any) -> Path:
    path = saved("llama", initializer_range=0.3)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def own(source: Path, tmp_path: Path) -> Statistics:
    """A calibration of 20 windows that the model wrote."""
    return calibrate(source, "self", tmp_path / "c.safetensors", num_tokens=320, max_length=16, measure_losses=0)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def distance(directory: Path) -> float:
    """From the dense model, of the expected next tokens."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    p, q = (torch.log_softmax(x, -1) for x in (logits(build("llama", initializer_range=0.3), IDS), logits(model, IDS)))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_params_alone_heals_the_factors_and_nothing_else(
    source: Path, own: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recovery = RecoveryConfig(relative_learning_rate=1 / 200)  # nine steps only
    record = compress(source, tmp_path / "healed", keep=0.25, statistics=own, seed=1, recovery=recovery)
    plain = compress(source, tmp_path / "cut", keep=0.25, statistics=own, recovery=None)
    assert record.settings["recovery"]["text"] == "self"
    assert record.settings["recovery"]["distill_weight"] == 1.0  # its own text says nothing that it does not
    assert record.settings["recovery"]["max_steps"] == 9  # of two windows each; two of 20 are held out
    assert record.numbers["healed"]
    assert plain.settings["recovery"] is None
    after, before = weights(tmp_path / "healed"), weights(tmp_path / "cut")
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    factors = {name for name in after if name.split(".")[-2] in "ABPC"}
    assert changed == factors
    assert distance(tmp_path / "healed") < distance(tmp_path / "cut")
    assert (tmp_path / "healed" / "plan.json").read_bytes() == (tmp_path / "cut" / "plan.json").read_bytes()
    assert not list(tmp_path.glob("*.work"))


def test_updates_of_low_rank_are_merged_into_the_factors_alone(source: Path, own: Statistics, tmp_path: Path) -> None:
    recovery = RecoveryConfig(trainable="updates", relative_learning_rate=1 / 20)  # nine steps only
    record = compress(source, tmp_path / "healed", keep=0.25, statistics=own, seed=1, recovery=recovery)
    compress(source, tmp_path / "cut", keep=0.25, statistics=own, recovery=None)
    assert record.settings["recovery"]["trained"] == "updates"
    after, before = weights(tmp_path / "healed"), weights(tmp_path / "cut")
    factors = {name for name in after if name.split(".")[-2] in "ABPC"}
    assert {name for name in after if not torch.equal(after[name], before[name])} == factors
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: t.dtype for name, t in before.items()}
    assert record.numbers["healing_parameters"] == 8 * sum(sum(after[name].shape) for name in factors)
    ranks = [int(torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-4)) for name in factors]
    assert max(ranks) <= 8
    assert distance(tmp_path / "healed") < distance(tmp_path / "cut")


def test_what_is_trained_fits_into_the_memory_that_is_free(
    source: Path, own: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(source, tmp_path / "cut", keep=0.5, statistics=own, recovery=None)
    plan = Plan.load(tmp_path / "cut" / "plan.json")
    weights, context = CheckpointSource(source), RunContext.create(device="cpu")
    training = FinetuneConfig(distill="t", batch_size=2, max_length=16, dtype="bfloat16")

    def choice(free: float | None, trainable: Any = "auto", host_memory: float = 6e9) -> tuple[str, bool]:
        monkeypatch.setattr(healing, "free_memory", lambda _: free)
        config = RecoveryConfig(trainable=trainable, host_memory=host_memory, rank=2)
        name, chosen = healing.choose_trainable(weights, plan, config, training, context)
        return name, chosen.gradient_checkpointing

    ways = [("factors", False), ("updates", False), ("updates", True)]
    settings = [replace(training, method="lrc"), replace(training, method="updates", rank=2)]
    settings.append(replace(settings[1], gradient_checkpointing=True))
    needed = [healing.memory_needed(weights, plan.allocations, each) for each in settings]
    assert needed == sorted(needed, reverse=True)
    assert [choice(size) for size in needed] == ways
    assert choice(None) == choice(1e12) == ways[0]
    assert choice(1e12, "updates") == ways[1]
    assert [choice(1e12, host_memory=size) for size in needed] == ways  # a host has other things to hold
    assert choice(None, host_memory=1) == ways[2]
    with pytest.raises(WeLoreError, match=r"recovery needs .* GB on cpu"):
        choice(needed[-1] - 1)
    streamed, card = replace(settings[-1], stream_weights=True), torch.device("cuda")
    least = healing.memory_needed(weights, plan.allocations, streamed)
    assert least < needed[-1]
    config = RecoveryConfig(rank=2)
    for alone in (True, False):  # several processes cannot leave weights on the host
        _, chosen, _ = healing.first_that_fits(
            weights, plan.allocations, config, training, card, int(needed[-1] - 1), alone
        )
        assert chosen.stream_weights == alone


def test_weights_that_would_grow_on_a_cpu_stay_in_their_file(saved: Callable[..., Path]) -> None:
    source, cpu, config = CheckpointSource(saved("llama", torch.bfloat16)), torch.device("cpu"), RecoveryConfig(rank=2)
    allocations = [Allocation(t.name, t.shape, 4, True, 0.0) for t in source.targets]
    training = FinetuneConfig(distill="t", batch_size=2, max_length=16, dtype="float32")

    def streams(training: FinetuneConfig, free: int | None, alone: bool = True) -> tuple[bool, float]:
        _, chosen, needed = healing.first_that_fits(source, allocations, config, training, cpu, free, alone)
        return chosen.stream_weights, needed

    assert not streams(training, None)[0]  # there is room
    assert not streams(replace(training, dtype="bfloat16"), 1)[0]  # they do not grow
    assert not streams(training, 1, alone=False)[0]
    assert streams(training, 1)[0]
    assert streams(training, 1)[1] < streams(training, 1, alone=False)[1]


def test_weights_in_their_file_are_recovered_to_the_same_bytes(tmp_path: Path) -> None:
    dense, cut = checkpoint(tmp_path / "dense", None), checkpoint(tmp_path / "cut", dtype=torch.bfloat16)
    write_windows(tmp_path / "w.safetensors", IDS, recorded_predictions(dense, IDS, RunContext.create(device="cpu")))
    known: dict[str, Any] = {"distill": tmp_path / "w.safetensors", "distill_weight": 1.0, "max_length": 16}
    for name in ("converted", "streamed"):
        options = {"max_steps": 2, "batch_size": 1, "eval_steps": 2, "learning_rate": 1e-2, "rank": 2}
        how = {"gradient_checkpointing": True, "dtype": "float32", "stream_weights": name == "streamed"}
        finetuned(cut, tmp_path / name, "updates", **known | options | how)
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("converted", "streamed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes() != (cut / "model.safetensors").read_bytes()


def test_a_cut_is_written_where_no_training_fits(
    source: Path, own: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(healing, "free_memory", lambda _: 1000)
    record = compress(source, tmp_path / "out", keep=0.5, statistics=own)
    assert "take another device, or --recovery none" in record.settings["recovery"]["failed"]
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow
def test_activations_that_are_computed_again_change_nothing(source: Path, own: Statistics, tmp_path: Path) -> None:
    for name, size in (("held", 6e9), ("again", 1.0)):
        recovery = RecoveryConfig(trainable="updates", host_memory=size, relative_learning_rate=1 / 20)
        record = compress(source, tmp_path / name, keep=0.5, statistics=own, recovery=recovery)
        assert record.settings["recovery"]["gradient_checkpointing"] == (name == "again")
    files = [tmp_path / name / "model.safetensors" for name in ("held", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_predictions_are_those_of_the_dense_model(
    source: Path, own: Statistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows, stored = own.generated_text(), own.teacher()
    assert windows is not None
    assert stored is not None
    monkeypatch.setattr("welore.training.teacher.fastest", lambda _: {"dtype": "float32", "attention": None})
    predictions = recorded_predictions(source, windows, RunContext.create(device="cpu", progress=False))
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        output = model(windows, labels=windows)
    expected = output.logits.log_softmax(-1).gather(-1, predictions.ids.long())
    torch.testing.assert_close(predictions.logprobs, expected.half(), rtol=2e-3, atol=2e-3)
    for each in (predictions, TopK(*stored)):  # the next token is always among those listed
        assert each.loss(windows) == pytest.approx(float(output.loss), rel=1e-2)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("trainable", ["factors", "updates"])
def test_two_processes_train_as_one(
    source: Path, own: Statistics, tmp_path: Path, trainable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"}, raising=False)  # float32
    settings = ["--keep", "0.5", "--statistics", str(tmp_path / "c.safetensors"), "--recovery-trainable", trainable]
    recovery: Any = RecoveryConfig(trainable=trainable)  # type: ignore[arg-type]
    one = compress(source, tmp_path / "one", keep=0.5, statistics=own, recovery=recovery, device="cpu")
    for ended in launched(command("compress", source, tmp_path / "two", "--device", "cpu", *settings)):
        assert ended.status == 0, ended.err
    two = Record.load(tmp_path / "two" / "compression.json")
    assert two.numbers["healing_tokens"] == one.numbers["healing_tokens"]
    for name, loss in one.numbers["held_out_loss"].items():
        assert two.numbers["held_out_loss"][name] == pytest.approx(loss, rel=1e-5)
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
@pytest.mark.slow
def test_every_family_heals(saved: Callable[..., Path], tokenizer: Any, tmp_path: Path, family: str) -> None:
    source = saved(family, initializer_range=1.0)
    tokenizer.save_pretrained(source)
    c = calibrate(source, "self", tmp_path / "c.safetensors", num_tokens=64, max_length=16, measure_losses=0)
    record = compress(source, tmp_path / "small", keep=0.5, statistics=c)
    assert record.settings["recovery"]["max_steps"] == 1
    assert record.numbers["healing_tokens"] == 32


@pytest.mark.slow
def test_what_healing_harms_is_kept_as_it_was_cut(
    source: Path, own: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recovery = RecoveryConfig(relative_learning_rate=10.0)
    record = compress(source, tmp_path / "healed", keep=0.5, statistics=own, recovery=recovery)
    compress(source, tmp_path / "cut", keep=0.5, statistics=own, recovery=None)
    assert not record.numbers["healed"]
    assert record.numbers["held_out_loss"]["healed"] > record.numbers["held_out_loss"]["cut"]
    for name, tensor in weights(tmp_path / "cut").items():
        assert torch.equal(weights(tmp_path / "healed")[name], tensor)


def test_a_lighter_cut_takes_fewer_steps_on_its_own_text(source: Path, own: Statistics, tmp_path: Path) -> None:
    compress(source, tmp_path / "cut", keep=0.75, statistics=own, recovery=None)
    plan, windows = Plan.load(tmp_path / "cut" / "plan.json"), own.generated_text()
    context = RunContext.create(device="cpu")

    def steps(plan: Plan = plan, **settings: Any) -> int:
        return healing._training(windows, plan, RecoveryConfig(**settings), 0, context).max_steps

    assert steps(steps_per_share=20) == math.ceil(20 * (1 - plan.parameter_ratio)) < 9
    assert steps(steps_per_share=20, max_steps=4) == 4
    assert steps() == steps(steps_per_share=20, dataset="my.txt") == 9  # all that there is
    assert steps(replace(plan, optimize_for="anywhere"), steps_per_share=20) == 9  # matrices learn longer than factors


@pytest.mark.slow
def test_a_rate_that_harms_gives_way_to_a_smaller_one(
    source: Path, own: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual_rate = RecoveryConfig(relative_learning_rate=1 / 200)
    usual = compress(source, tmp_path / "usual", keep=0.25, statistics=own, recovery=usual_rate)
    recovery = replace(usual_rate, fallbacks=(200.0, 1.0))
    record = compress(source, tmp_path / "healed", keep=0.25, statistics=own, recovery=recovery)
    assert record.numbers["healed"]
    assert record.settings["recovery"]["learning_rate"] == usual.settings["recovery"]["learning_rate"]
    assert (tmp_path / "usual/model.safetensors").read_bytes() == (tmp_path / "healed/model.safetensors").read_bytes()


def test_a_rate_that_diverges_gives_way_to_a_smaller_one(
    source: Path, own: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, rates = FinetuneTrainer.training_step, []
    models: list[Any] = []

    def first_rate_diverges(trainer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        rates.append(trainer.args.learning_rate)
        models.append(weakref.ref(trainer.model))
        assert {id(alive()) for alive in models if alive() is not None} == {id(trainer.model)}  # one in memory
        loss = step(trainer, *args, **kwargs)
        return loss if trainer.args.learning_rate < rates[0] else loss * float("nan")

    monkeypatch.setattr(FinetuneTrainer, "training_step", first_rate_diverges)
    recovery = RecoveryConfig(relative_learning_rate=1 / 50)
    record = compress(source, tmp_path / "healed", keep=0.25, statistics=own, recovery=recovery)
    assert record.numbers["healed"]
    assert record.settings["recovery"]["learning_rate"] == pytest.approx(rates[0] / 4)


@pytest.mark.slow
def test_a_failed_healing_does_not_take_the_cut_with_it(
    source: Path, own: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FinetuneTrainer, "training_step", lambda *_, **__: torch.tensor(float("nan")))
    record = compress(source, tmp_path / "healed", keep=0.5, statistics=own)
    compress(source, tmp_path / "cut", keep=0.5, statistics=own, recovery=None)
    assert "training loss is nan" in record.settings["recovery"]["failed"]
    assert (tmp_path / "healed/model.safetensors").read_bytes() == (tmp_path / "cut/model.safetensors").read_bytes()


@pytest.mark.parametrize("trainable", ["factors", "updates"])
@pytest.mark.slow
def test_a_kill_while_healing_costs_the_steps_since_the_last_checkpoint(
    source: Path, own: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainable: Any
) -> None:
    recovery = RecoveryConfig(save_steps=2, trainable=trainable)
    compress(source, tmp_path / "straight", keep=0.5, statistics=own, recovery=recovery)
    step, taken = FinetuneTrainer.training_step, []

    def counted(trainer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        taken.append(trainer.state.global_step)
        if taken == [0, 1, 2, 3, 4]:
            raise KeyboardInterrupt
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(FinetuneTrainer, "training_step", counted)
    with pytest.raises(KeyboardInterrupt):
        compress(source, tmp_path / "killed", keep=0.5, statistics=own, recovery=recovery)
    stored = [load_file(path) for path in (tmp_path / "killed.work").glob("recovery-*/*/checkpoints/*/*.safetensors")]
    factors = {name for name in weights(tmp_path / "straight") if name.split(".")[-2] in "ABPC"}
    for tensors in stored:  # what is trained, and no other numbers
        names = {name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
        assert names == factors if trainable == "factors" else len(names) == 2 * len(factors)
    assert len(stored) == 2
    assert not (tmp_path / "killed").exists()
    scale: Any = MarkedModel.scale  # another number of threads sums in another order
    monkeypatch.setattr(MarkedModel, "scale", property(lambda marked: scale.fget(marked) * (1 + 1e-15)))
    compress(source, tmp_path / "killed", keep=0.5, statistics=own, recovery=recovery)
    assert taken == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8]
    for name in ("model.safetensors", "plan.json"):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


@pytest.mark.parametrize(
    ("rate", "fastest"),
    [
        (1 / 1000, healing.fastest),  # of another version
        (1 / 1500, lambda _: {"dtype": "bfloat16", "attention": "eager"}),  # on another device
    ],
)
@pytest.mark.slow
def test_what_was_killed_under_other_settings_begins_anew(
    source: Path, own: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: float, fastest: Any
) -> None:
    straight = compress(source, tmp_path / "straight", keep=0.5, statistics=own)
    step = FinetuneTrainer.training_step

    def killed(trainer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return step(trainer, *args, **kwargs)

    with monkeypatch.context() as earlier:
        earlier.setattr(healing, "fastest", fastest)
        recovery = RecoveryConfig(relative_learning_rate=rate, save_steps=2)
        earlier.setattr(FinetuneTrainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            compress(source, tmp_path / "killed", keep=0.5, statistics=own, recovery=recovery)
    record = compress(source, tmp_path / "killed", keep=0.5, statistics=own)
    assert record.settings["recovery"] == straight.settings["recovery"]
    for file in ("model.safetensors", "plan.json"):
        assert (tmp_path / "straight" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes()


@pytest.mark.slow
def test_a_long_healing_of_a_small_cut_has_a_higher_rate(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "my.txt"
    text.write_text("the matrix is cut where the loss feels it least and learns again " * 200, encoding="utf-8")
    how: dict[str, Any] = {"strategy": "waterfill", "scaling": "none", "num_tokens": 320}
    rates: dict[float, list[float]] = {0.9: [], 0.6: []}
    for params, found in rates.items():
        for most in (64, 2, 1):  # the steps that the usual rate is for; two are taken
            recovery = RecoveryConfig(dataset=str(text), max_steps=most, fallbacks=(1.0,))
            record = compress(source, tmp_path / f"{params}-{most}", keep=params, recovery=recovery, **how)
            found.append(record.settings["recovery"]["learning_rate"])
    usual, just, longer = rates[0.9]
    assert usual == just == pytest.approx(longer / 2**0.5)
    assert len(set(rates[0.6])) == 1


def test_a_text_of_ones_own_heals_as_well(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "my.txt"
    text.write_text("the matrix is cut where the loss feels it least and learns again " * 200, encoding="utf-8")
    how: dict[str, Any] = {"keep": 0.6, "strategy": "waterfill", "scaling": "none", "num_tokens": 320}
    record = compress(
        source, tmp_path / "small", recovery=RecoveryConfig(dataset=str(text), max_steps=3), **how
    )  # max_steps: of the model's own text
    assert record.settings["recovery"]["text"] == str(text)
    assert record.settings["recovery"]["distill_weight"] == 0.5  # the text's own words are the other half
    assert record.numbers["healing_tokens"] == 256  # 5 windows of 64, one held out, in pairs
    assert compress(source, tmp_path / "plain", **how).settings["recovery"] is None


def test_a_tenth_of_every_text_is_held_out(source: Path, tmp_path: Path) -> None:
    for name, word in (("a", "w5 "), ("b", "w7 ")):
        (tmp_path / f"{name}.txt").write_text(word * 4000, encoding="utf-8")
    texts = ",".join(str(tmp_path / f"{name}.txt") for name in "ab")

    def read(dataset: str) -> torch.Tensor:
        config = RecoveryConfig(dataset=dataset, num_tokens=100 * 64)
        return healing.recovery_text(config, config_of(source), read_tokenizer(source), 0, TextOptions())

    windows = read(texts)
    assert windows.shape[1] == 64
    assert {int(window[0]) for window in windows[: len(windows) // 10]} == {5, 7}
    assert torch.equal(windows, read(texts))
    kept = tmp_path / "kept.safetensors"
    write_windows(kept, windows)
    assert torch.equal(read(str(kept)), windows)  # a file of windows stays as it is


def test_what_cannot_heal_is_refused_before_anything_is_written(source: Path, own: Statistics, tmp_path: Path) -> None:
    foreign = calibrate(source, IDS, tmp_path / "foreign.safetensors")
    how: dict[str, Any] = {"keep": 0.6, "statistics": foreign}
    with pytest.raises(WeLoreError, match="windows that the model wrote"):
        compress(source, tmp_path / "out", recovery=RecoveryConfig(), **how)
    with pytest.raises(WeLoreError, match="windows that the model wrote"):
        compress(source, tmp_path / "out", keep=0.6, preset="paper", recovery=RecoveryConfig())
    with pytest.raises(WeLoreError, match="cannot be mixed"):
        compress(source, tmp_path / "out", recovery=RecoveryConfig(dataset="self,pydoc"), **how)
    with pytest.raises(WeLoreError, match="tokenizer is another model's: it gives token 96, this model knows 96"):
        larger = read_tokenizer(source)
        larger.add_tokens(["w96"])
        text = RecoveryConfig(dataset=["w96 " * 9999], num_tokens=500)
        compress(source, tmp_path / "out", keep=0.6, statistics=own, recovery=text, tokenizer=larger)
    assert not (tmp_path / "out").exists()


def test_without_text_of_its_own_params_alone_only_cuts(source: Path, tmp_path: Path) -> None:
    foreign = calibrate(source, IDS, tmp_path / "foreign.safetensors")
    assert foreign.generated_text() is None
    assert compress(source, tmp_path / "out", keep=0.6, statistics=foreign).settings["recovery"] is None


def test_a_calibration_keeps_what_the_model_wrote(source: Path, own: Statistics) -> None:
    windows = own.generated_text()
    assert windows is not None
    assert windows.shape == (20, 16)
    again = Statistics.load(own.store.path).generated_text()  # type: ignore[attr-defined]
    assert again is not None
    assert torch.equal(again, windows)


@pytest.mark.parametrize(
    ("device", "can", "dtype", "attention"),
    [
        ("cpu", {"architecture": "x86_64", "avx512_bf16": True}, "bfloat16", "eager"),
        ("cpu", {"architecture": "x86_64"}, "float32", None),
        ("cuda", {"architecture": "x86_64"}, "bfloat16", None),  # what the processor lacks does not matter there
        ("cuda", {"no bfloat16": True}, "float16", None),  # a T4, a V100
    ],
)
def test_it_trains_in_what_the_device_is_fast_in(
    monkeypatch: pytest.MonkeyPatch, device: str, can: dict[str, Any], dtype: str, attention: str | None
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: "no bfloat16" not in can)
    assert fastest(device) == {"dtype": dtype, "attention": attention}


@pytest.mark.parametrize(
    ("error", "reason"),
    [(torch.OutOfMemoryError("out of memory"), "out of memory"), (KeyError("x"), "KeyError: 'x'")],
    ids=["memory", "any"],
)
def test_a_recovery_that_fails_leaves_the_factors_and_has_a_status(
    source: Path,
    own: Statistics,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Command,
    error: Exception,
    reason: str,
) -> None:
    def failing(*_: Any, **__: Any) -> torch.Tensor:
        raise error

    monkeypatch.setattr(FinetuneTrainer, "training_step", failing)
    answer = command(
        "compress", source, tmp_path / "recovered", "--keep", 0.5, "--statistics", tmp_path / "c.safetensors"
    )
    assert answer.status == 3
    assert f"recovery failed: {reason}" in answer.err
    record = Record.load(tmp_path / "recovered" / "compression.json")
    assert record.settings["recovery"]["failed"] == reason
    compress(source, tmp_path / "factors", keep=0.5, statistics=own, recovery=None)
    files = [tmp_path / name / "model.safetensors" for name in ("recovered", "factors")]
    assert files[0].read_bytes() == files[1].read_bytes()
