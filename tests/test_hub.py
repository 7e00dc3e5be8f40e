"""A checkpoint on its own: it loads where nobody imported welore, says what it is, and keeps its files when saved."""

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import welore
from conftest import build, compress, logits
from hub_server import hub
from test_architectures import build_architecture
from toys import checkpoint
from welore.models.card import write_card
from welore.records import Record

BOOTSTRAP, FILES = "modeling_welore.py", ["README.md", "compression.json", "modeling_welore.py", "plan.json"]
STOCK = """
import sys
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline
assert "welore" not in sys.modules
for directory in sys.argv[1:]:
    config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    assert "welore" in sys.modules
    assert config.model_type == type(model).config_class.model_type
    assert [type(model).__name__] == config.architectures
    expected = load_file(directory + "/expected.safetensors")
    ids, logits = expected["ids"], expected["logits"]
    assert (model(ids).logits - logits).abs().max() < 1e-5
    AutoModel.from_pretrained(directory, trust_remote_code=True)(ids)
    model.half().float().save_pretrained(directory + "/saved")
    again = AutoModelForCausalLM.from_pretrained(directory + "/saved", trust_remote_code=True)
    assert (again(ids).logits - logits).abs().max() < 2e-2
answer = pipeline("text-generation", model=sys.argv[1], trust_remote_code=True)("one", max_new_tokens=4)
assert answer[0]["generated_text"].startswith("one")
"""
ABSENT = """
import sys, traceback
class Absent:
    def find_spec(self, name, *rest):
        if name == "welore":
            raise ModuleNotFoundError("No module named 'welore'", name=name)
sys.meta_path.insert(0, Absent())
from transformers import AutoModelForCausalLM
for trusted in (False, True):
    print("NEXT", file=sys.stderr)
    try:
        AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=trusted)
        print("LOADED", file=sys.stderr)
    except Exception:
        traceback.print_exc()
"""


PUSH = """
import sys, torch, welore
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model.push_to_hub("me/small")
again = AutoModelForCausalLM.from_pretrained("me/small")
ids = torch.arange(8)[None]
assert torch.equal(model(ids).logits, again(ids).logits)
"""


def python(code: str, modules: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own. modules: where transformers copies the code that it runs."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"HF_MODULES_CACHE": str(modules)} | variables
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def with_logits(directory: Path, tokens: torch.Tensor) -> Path:
    model = AutoModelForCausalLM.from_pretrained(directory)
    save_file({"ids": tokens, "logits": logits(model, tokens)}, directory / "expected.safetensors")
    return directory


def metadata(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((directory / "README.md").read_text("utf-8").split("---")[1])
    return content


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A compressed directory with plan and record."""
    compress(checkpoint(tmp_path / "dense", None), tmp_path / "small", rank_reduction=0.4, scaling="none")
    return tmp_path / "small"


@pytest.mark.slow
def test_processes_that_never_imported_welore_load_every_form(tmp_path: Path, tokens: torch.Tensor) -> None:
    forms = [
        checkpoint(tmp_path / "factored"),
        checkpoint(tmp_path / "pivoted", family="qwen2", storage="pivoted"),
        checkpoint(tmp_path / "split", family="gemma3_text", storage="split", intermediate_size=64),
        checkpoint(tmp_path / "conv1d", family="gpt2"),
        checkpoint(tmp_path / "mixture", family="mixtral"),
    ]
    run = python(STOCK, tmp_path / "modules", *(with_logits(form, tokens) for form in forms))
    assert run.returncode == 0, run.stderr


def test_without_the_package_the_error_says_what_to_install(small: Path, tmp_path: Path) -> None:
    run = python(ABSENT, tmp_path / "modules", small)
    assert run.returncode == 0, run.stderr
    assert "LOADED" not in run.stderr
    _, stopped, trusted = run.stderr.split("NEXT\n")
    assert "pip install welore" in trusted
    assert "Unknown quantization type, got welore" in stopped


def test_after_the_import_nothing_of_a_directory_is_run_and_nobody_is_asked(
    small: Path, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small / BOOTSTRAP).write_text("raise SystemExit('run')")
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked"))
    model = AutoModelForCausalLM.from_pretrained(small)
    assert type(model) is transformers.LlamaForCausalLM
    assert type(model.config) is transformers.LlamaConfig


@pytest.mark.parametrize("name", ["Llama4-Scout", "Qwen2.5-VL"])
def test_multimodal_models_name_the_classes_that_load_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    build_architecture(name).save_pretrained(tmp_path / "dense")
    compress(tmp_path / "dense", tmp_path / "small", rank_reduction=0.4, scaling="none")
    auto_map = json.loads((tmp_path / "small/config.json").read_text())["auto_map"]
    kinds = {"Llama4-Scout": "AutoModelForCausalLM", "Qwen2.5-VL": "AutoModelForImageTextToText"}
    own = getattr(transformers, kinds[name]).from_pretrained(tmp_path / "small")
    trusted = getattr(transformers, kinds[name]).from_pretrained(tmp_path / "small", trust_remote_code=True)
    assert type(trusted).__name__ == type(own).__name__
    assert auto_map["AutoConfig"].startswith("modeling_welore.")
    assert [name for name, _ in trusted.named_parameters()] == [name for name, _ in own.named_parameters()]


def test_what_lies_beside_the_weights_survives_saving(small: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(small)
    for name, other in {
        "same": model,
        "copy": copy.deepcopy(model),
        "pickled": pickle.loads(pickle.dumps(model)),
    }.items():
        other.save_pretrained(tmp_path / name)
        for file in FILES:
            assert (tmp_path / name / file).read_bytes() == (small / file).read_bytes(), (name, file)
    arguments = TrainingArguments(str(tmp_path / "run"), max_steps=1, use_cpu=True, report_to=[], save_steps=1)
    data = [{"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([5, 6, 7])}] * 8
    Trainer(model, arguments, train_dataset=data).train()
    assert (tmp_path / "run/checkpoint-1/plan.json").read_bytes() == (small / "plan.json").read_bytes()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint-1").config.auto_map == model.config.auto_map
    welore.merge(model)
    model.save_pretrained(tmp_path / "dense-again")
    assert not {path.name for path in (tmp_path / "dense-again").iterdir()} & set(FILES)
    assert "auto_map" not in (tmp_path / "dense-again/config.json").read_text()


def test_a_model_compressed_in_memory_saves_the_same_files(tmp_path: Path) -> None:
    model = build("llama")
    record = compress(model, rank_reduction=0.4, scaling="none")
    model.save_pretrained(tmp_path / "a")
    assert Record.load(tmp_path / "a/compression.json").numbers == record.numbers
    assert {path.name for path in (tmp_path / "a").iterdir()} >= set(FILES)


def test_card_says_base_licence_sizes_and_ranks_of_a_result(tmp_path: Path) -> None:
    dense = checkpoint(tmp_path / "dense", None)
    (dense / "README.md").write_text("---\nlicense: apache-2.0\ntags: [chat]\n---\n# Words of others")
    record = compress(dense, tmp_path / "small", rank_reduction=0.4, scaling="none")
    found = metadata(tmp_path / "small")
    assert (found["license"], found["library_name"]) == ("apache-2.0", "transformers")
    assert found["pipeline_tag"] == "text-generation"
    assert found["tags"] == ["welore", "low-rank", "compression"]
    assert "base_model" not in found  # a directory is none
    card = (tmp_path / "small/README.md").read_text("utf-8")
    assert "Words of others" not in card
    assert str(tmp_path) not in card
    numbers = record.numbers
    assert f"| parameters of the model | {numbers['parameters_dense']:,} | {numbers['parameters']:,} |" in card
    assert f"| bytes of the weights | {numbers['bytes_dense']:,} | {numbers['bytes']:,} |" in card
    assert f"(ERR) | 0 | {numbers['rank_reduction']:.1%}" in card
    ranks = [
        r
        for n, r in json.loads((tmp_path / "small/config.json").read_text())["quantization_config"]["ranks"].items()
        if "up_proj" in n
    ]
    assert f"| mlp.up_proj | {len(ranks)} | {min(ranks)} | {sum(ranks) / len(ranks):.0f} | {max(ranks)} |" in card
    assert "welore compress dense OUT --rank-reduction 0.4" in card
    write_card(tmp_path / "small", "someone/model", (dense / "README.md").read_text())
    assert (metadata(tmp_path / "small")["base_model"], metadata(tmp_path / "small")["base_model_relation"]) == (
        "someone/model",
        "quantized",
    )
    welore.merge(tmp_path / "small", tmp_path / "merged")
    merged = metadata(tmp_path / "merged")
    assert (merged["base_model"], merged["base_model_relation"], merged["license"]) == (
        "someone/model",
        "finetune",
        "apache-2.0",
    )
    assert not (tmp_path / "merged" / BOOTSTRAP).exists()


@pytest.mark.parametrize("card", ["", "---\n- a\n---\n", "---\n: : :\n---", "---\nlicense: [x\n---\n", "no metadata"])
def test_cards_of_others_that_cannot_be_read_are_passed_by(small: Path, card: str) -> None:
    write_card(small, "someone/model", card)
    assert metadata(small)["base_model"] == "someone/model"


@pytest.mark.parametrize("known", [False, True])
def test_push_to_hub_uploads_our_card_and_leaves_one_that_the_hub_has(small: Path, tmp_path: Path, known: bool) -> None:
    """Over HTTP, and back by the name of the repository."""
    by_hand = b"---\nlicense: mit\n---\nWritten by hand"
    uploaded = {"README.md": by_hand} if known else {}
    with hub(uploaded) as address:
        settings = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_none"}
        online = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        run = python(PUSH, tmp_path / "modules", small, **settings, **online)
    assert run.returncode == 0, run.stderr
    assert set(uploaded) == {*FILES, "config.json", "generation_config.json", "model.safetensors"}
    assert (b"Written by hand" in uploaded["README.md"]) == known
    assert (uploaded["README.md"] == (small / "README.md").read_bytes()) == (not known)
    for name in FILES[1:]:
        assert uploaded[name] == (small / name).read_bytes()


def test_only_models_of_welore_are_saved_otherwise(small: Path, tmp_path: Path, saved: Callable[..., Path]) -> None:
    AutoModelForCausalLM.from_pretrained(small)  # save_pretrained has its further step
    plain = AutoModelForCausalLM.from_pretrained(saved("llama"))
    plain.save_pretrained(tmp_path / "plain")
    assert not {path.name for path in (tmp_path / "plain").iterdir()} & set(FILES)
