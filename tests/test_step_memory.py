"""The memory of a step that `finetune --dry-run` predicts, against tensors that are there."""

import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import welore
from toys import checkpoint, finetuned, weights
from welore.config import FinetuneConfig, MethodName, choices
from welore.training.memory import StepMemory, estimate_step
from welore.training.methods import METHODS

TEXT = {"dataset": "pydoc", "max_steps": 1, "warmup_steps": 0, "batch_size": 2, "max_length": 32}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("models") / "small")


def predicted(model: Path, **settings: Any) -> StepMemory:
    return estimate_step(model, FinetuneConfig(**{"dtype": "float32", **TEXT, **settings}), device="cpu")


def needs(method: str) -> list[str]:
    return [package for package in METHODS[method].packages if importlib.util.find_spec(package) is None]


@pytest.mark.parametrize("method", choices(MethodName))
@pytest.mark.parametrize("storage", ["factored", "pivoted", "split"])
def test_what_is_trained_is_told_from_the_configuration_alone(method: str, storage: str, tmp_path: Path) -> None:
    if needs(method):
        pytest.skip(f"absent: {needs(method)}")
    longer = {"intermediate_size": 64} if storage == "split" else {}
    model = checkpoint(tmp_path / "model", storage=storage, **longer)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    for file in (*model.glob("*.safetensors"), *model.glob("tokenizer*")):
        file.unlink()
    rank = {} if METHODS[method].default_rank is None else {"rank": 2}
    memory, marked = predicted(model, method=method, **rank), welore.mark_trainable(loaded, method, **rank)
    assert memory.trained == sum(p.numel() for p in marked.parameters)
    assert memory.parameters == sum(p.numel() for p in marked.base.parameters())


@pytest.mark.parametrize("method", ["lrc", "full", "lora", "galore"])
def test_weights_gradients_and_moments_are_those_of_a_step(small: Path, method: str) -> None:
    if needs(method):
        pytest.skip(f"absent: {needs(method)}")
    marked = welore.mark_trainable(AutoModelForCausalLM.from_pretrained(small), method)
    memory = predicted(small, method=method)
    assert memory.weights == sum(p.nbytes for p in marked.model.parameters())
    assert memory.gradients == sum(p.nbytes for p in marked.parameters)
    if method != "galore":
        optimizer = torch.optim.AdamW(marked.parameters)
        marked.model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
        optimizer.step()
        states = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.ndim]
        assert memory.optimizer == sum(tensor.nbytes for tensor in states)
        assert predicted(small, method=method, optimizer="adamw_8bit").optimizer == memory.optimizer / 4


def test_projected_moments_are_those_of_galore(small: Path, tmp_path: Path) -> None:
    pytest.importorskip("galore_torch")
    text = tmp_path / "text.txt"
    text.write_text("all work and no play " * 100)
    settings = TEXT | {"dataset": str(text), "rank": 4, "save_steps": 1, "eval_steps": 0}
    finetuned(small, tmp_path / "run", "galore", **settings)
    checkpoints = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    total = 0
    for state in torch.load(checkpoints / "optimizer.pt", weights_only=False)["state"].values():
        total += sum(state[name].nbytes for name in ("exp_avg", "exp_avg_sq"))
        total += state["projector"].ortho_matrix.nbytes if "projector" in state else 0
    assert predicted(small, method="galore", rank=4).optimizer == total


def forward_bytes(model: Path, method: str) -> int:
    """What the forward pass of a decoder keeps for its backward pass, without weights."""
    net: Any = AutoModelForCausalLM.from_pretrained(model)
    welore.mark_trainable(net, method)
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    sizes: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage  # alive, so that no other one gets its address
        return tensor

    ids = torch.randint(2, 90, (2, 32))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = net.model(ids).last_hidden_state  # the head's are counted as logits
    assert hidden.requires_grad
    return sum(storage.nbytes() for storage in sizes.values())


WIDE = {"hidden_size": 64, "intermediate_size": 160}  # matrices are most of such a model
REPEATED = {"intermediate_size_mlp": 160, "interleave_moe_layer_step": 2, "head_dim": 16}
MIXTURE = {"num_experts": 8, "moe_intermediate_size": 48}


@pytest.mark.parametrize(
    ("family", "most", "changes"),
    [
        *[("llama", 1, {}), ("mixtral", 1, {}), ("qwen3_moe", 1, MIXTURE), ("gpt_oss", 1.4, {})],
        *[("llama4_text", 1, REPEATED | {"num_local_experts": count}) for count in (4, 32)],
    ],
)
@pytest.mark.parametrize(("reduction", "method"), [(None, "full"), (0.4, "full"), (0.4, "lrc")])
@pytest.mark.filterwarnings("ignore:.*RoPE")
def test_activations_are_at_least_those_that_a_forward_pass_keeps_and_at_most_twice_as_many(
    tmp_path: Path, family: str, most: float, changes: dict[str, Any], reduction: float | None, method: str
) -> None:
    """Of a mixture, whose experts are together or apart, a token meets two; GPT-OSS clamps what they compute.

    Llama 4 repeats each token for every expert, and runs all of them while they are together.
    """
    model = checkpoint(tmp_path / "model", reduction, family, **WIDE | changes)
    memory = predicted(model, method=method).activations
    assert memory / 2 < forward_bytes(model, method) <= most * memory


def test_with_full_checkpointing_less_is_kept_than_with_selective(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", None, **WIDE)
    selective, everything = (
        predicted(model, method="full", **{name: True}).activations
        for name in ("selective_checkpointing", "gradient_checkpointing")
    )
    assert everything < selective


def test_settings_that_save_memory_are_seen(small: Path, tmp_path: Path) -> None:
    base = predicted(small, method="updates")
    assert predicted(small, method="updates", stream_weights=True).weights < base.weights
    assert predicted(small, method="updates", dtype="bfloat16").weights < base.weights
    assert predicted(small, method="updates", whole_logits=True).logits != base.logits
    dense = checkpoint(tmp_path / "dense", None)
    taught = predicted(small, method="updates", distill=dense)
    assert taught.weights - base.weights == 4 * sum(t.numel() for t in weights(dense).values())
    assert base.total == base.weights + base.gradients + base.optimizer + base.activations + base.logits


def test_a_dry_run_prints_the_memory_and_writes_nothing(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from welore.cli.main import app

    words = ["finetune", str(small), str(tmp_path / "run"), "--dry-run", "--device", "cpu", "--max-length", "32"]
    app(words, standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert "parameters trained; memory of a step at most:" in lines[0]
    names = ["weights", "gradients", "optimizer", "activations", "logits", "total"]
    assert [line.split()[0] for line in lines[1:]] == names
    app([*words, "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["trained"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*bitsandbytes.*")
def test_commands_of_the_page_run_in_miniature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page's own words, but for the model, the numbers of steps and tokens, and the texts."""
    from welore.cli.main import app

    page = Path(__file__).resolve().parents[1] / "docs" / "how-to" / "fine-tune-7b.md"
    commands = re.findall(r"^welore (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    dense = checkpoint(tmp_path / "Llama-2-7b-hf", None)
    rows = [{"prompt": f"After {n} comes", "completion": f" {n + 1}."} for n in range(60)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.txt").write_text("all work and no play makes a dull day. " * 40)
    monkeypatch.chdir(tmp_path)
    tiny = {"meta-llama/Llama-2-7b-hf": str(dense), "wikitext2": "text.txt", "1024": "128", "2048": "64", "1000": "2"}
    if importlib.util.find_spec("bitsandbytes") is None:
        tiny["adamw_8bit"] = "adamw_torch"
    for command in commands:
        words = [tiny.get(word, word) for word in shlex.split(command)]
        more = ["--num-tokens", "2048", "--max-length", "64"] * (words[0] == "compress")
        app([*words, *more, "--device", "cpu"], standalone_mode=False)
    verbs = [command.split()[0] for command in commands]
    assert verbs == ["compress", "compress", "finetune", "finetune", "finetune", "evaluate"]
    tuned, adapted = (welore.Record.load(tmp_path / name / "finetune.json") for name in ("tuned", "adapted"))
    assert tuned.numbers["packed_sequences"] == adapted.numbers["packed_sequences"] < 54
    assert tuned.settings["optimizer"] == tiny.get("adamw_8bit", "adamw_8bit")
    assert f"{tuned.numbers['trainable_parameters']:,} of" in capsys.readouterr().out
