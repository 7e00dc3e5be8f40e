"""Tools that train and compile, on every form: peft by the usual names, torch.compile, torch.export."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import welore
from conftest import build, logits
from toys import checkpoint
from welore.errors import WeLoreError
from welore.models.replace import sizes

FORMS: dict[str, dict[str, Any]] = {
    "factored": {},
    "pivoted": {"storage": "pivoted"},
    "split": {"storage": "split", "intermediate_size": 64},
    "conv1d": {"family": "gpt2"},
}
NAMES = {"conv1d": ["c_attn", "c_fc"]}
needs_peft = pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="peft is absent: pip install '.[train]'")
needs_trl = pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="trl is absent: pip install trl")


def trained(model: Any, tokens: torch.Tensor) -> list[float]:
    """Losses of three steps."""
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
    for _ in range(3):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@needs_peft
@pytest.mark.filterwarnings("ignore")  # of peft
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_adapters_by_the_usual_names_train_save_load_and_merge(
    form: str, dora: bool, tmp_path: Path, tokens: torch.Tensor
) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    directory = checkpoint(tmp_path / "model", **FORMS[form])
    model = AutoModelForCausalLM.from_pretrained(directory)
    before, names = logits(model, tokens), welore.lora_targets(model, NAMES.get(form, ["q_proj", "up_proj"]))
    adapted: Any = get_peft_model(model, LoraConfig(target_modules=names, use_dora=dora, task_type="CAUSAL_LM"))
    torch.testing.assert_close(logits(adapted, tokens), before, rtol=1e-4, atol=1e-4)
    losses = trained(adapted, tokens)
    assert losses[-1] < losses[0]
    adapted.eval().save_pretrained(tmp_path / "adapter")
    again: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), tmp_path / "adapter")
    torch.testing.assert_close(logits(again, tokens), logits(adapted, tokens))
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged, tokens), logits(adapted, tokens), rtol=1e-3, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded, tokens), logits(merged, tokens))


@needs_peft
def test_targets_are_the_factors_of_low_rank_layers_and_the_others_themselves(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint(tmp_path / "model"))
    ranks = model.config.quantization_config.ranks
    expected = []
    for layer in ("model.layers.0", "model.layers.1"):
        for kind in ("q_proj", "v_proj"):  # the default of peft for llama
            name = f"{layer}.self_attn.{kind}"
            expected += [f"{name}.A", f"{name}.B"] if name in ranks else [name]
    assert sorted(welore.lora_targets(model)) == sorted(expected)
    assert sorted(welore.lora_targets(model, ["self_attn.q_proj", "v_proj"])) == sorted(expected)
    dense = build("llama")
    assert welore.lora_targets(dense, ["v_proj"]) == [f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)]
    with pytest.raises(WeLoreError, match="no linear layer of this model is called 'qproj'"):
        welore.lora_targets(model, ["q_proj", "qproj"])
    model.config.model_type = "unheard"
    with pytest.raises(WeLoreError, match="peft has no default targets for unheard: name them"):
        welore.lora_targets(model)


@pytest.mark.filterwarnings("ignore")  # of torch's compiler
@pytest.mark.parametrize("form", ["factored", "pivoted", "split"])
def test_export_before_and_after_generate_and_compiled_training(
    form: str, tmp_path: Path, tokens: torch.Tensor
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint(tmp_path / "model", **FORMS[form]))
    expected, greedy = logits(model, tokens), model.generate(tokens, max_new_tokens=4, do_sample=False)
    for _ in range(2 if form == "split" else 1):  # the second time after a cache has been filled
        program = torch.export.export(model, (tokens,), {"use_cache": False}, strict=False)
        torch.testing.assert_close(program.module()(tokens, use_cache=False).logits, expected)
        cached = model.generate(tokens, max_new_tokens=4, do_sample=False, cache_implementation="static")
        assert torch.equal(cached, greedy)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens).logits, expected)
    losses = trained(compiled, tokens)
    assert losses[-1] < losses[0]


@needs_trl
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of trl
@pytest.mark.parametrize("form", FORMS)
def test_trl_trains_by_instructions_and_by_preferences(form: str, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    directory = checkpoint(tmp_path / "model", **FORMS[form])
    options: dict[str, Any] = {"max_steps": 2, "use_cpu": True, "report_to": [], "bf16": False, "logging_steps": 1}
    rows = {"prompt": ["one and"] * 4, "chosen": [" one is two"] * 4, "rejected": [" one is no"] * 4}
    answers = Dataset.from_dict({"prompt": rows["prompt"], "completion": rows["chosen"]})
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    by_answers: Any = SFTTrainer(str(directory), SFTConfig(str(tmp_path / "sft"), **options), train_dataset=answers)
    by_preferences: Any = DPOTrainer(
        model,
        args=DPOConfig(str(tmp_path / "dpo"), **options),
        train_dataset=Dataset.from_dict(rows),
        processing_class=by_answers.processing_class,
    )
    for trainer in (by_answers, by_preferences):
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        assert trainer.train().training_loss > 0
        factors = [name for name in before if name.endswith((".A.weight", ".B.weight", ".P.weight", ".C.weight"))]
        assert factors
        assert all(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters() if name in factors)


@needs_peft
@pytest.mark.filterwarnings("ignore")  # of peft
@pytest.mark.parametrize("form", FORMS)
def test_adapters_are_no_matrices_of_the_model(form: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint(tmp_path / "model", **FORMS[form]))
    own = sizes(model)
    adapted = welore.mark_trainable(model, "lora").model
    more = sizes(adapted.get_base_model())
    assert {name: more[name] for name in ("rank_reduction", "parameter_ratio")} == {
        name: own[name] for name in ("rank_reduction", "parameter_ratio")
    }
    for given in (adapted, adapted.get_base_model()):
        with pytest.raises(WeLoreError, match="has adapters already"):
            welore.mark_trainable(given, "nlrc")
