import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

import welore
from conftest import allocate, build, compress, logits
from welore.errors import WeLoreError
from welore.layers.low_rank import LowRankLayer
from welore.layers.storage_forms import FORMS
from welore.models.load import load


def compressed(saved, out: Path, storage: str | None) -> Path:
    """A compressed model; "split": long matrices in two blocks, of which one may be dense."""
    split = storage == "split"
    source = saved("llama", **({"intermediate_size": 64} if split else {}))
    how = {"storage": "pivoted", "strategy": "waterfill"} if split else {"storage": storage}
    plan = allocate(welore.analyze(source, split=split), rank_reduction=0.4, **how)
    compress(source, out, plan=plan)
    return out


@pytest.fixture
def small(request: pytest.FixtureRequest, saved, tmp_path: Path) -> Path:
    """Stored as A and B unless a test asks for something else (`EVERY_STORAGE`)."""
    return compressed(saved, tmp_path / "small", getattr(request, "param", None))


STORAGES = ("factored", "pivoted", "split")
EVERY_STORAGE = pytest.mark.parametrize("small", STORAGES, indirect=True)


def edit_weights(directory: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(directory / "model.safetensors") | {k.replace("__", "."): v for k, v in changes.items()}
    kept = {name: t for name, t in tensors.items() if t is not None}
    save_file(kept, directory / "model.safetensors", {"format": "pt"})


def first_factored(directory: Path) -> str:
    return next(iter(welore.Plan.load(directory / "plan.json").ranks))


WITHOUT_THE_PACKAGE = """
import sys, traceback
from transformers import AutoModelForCausalLM
for directory in sys.argv[1:]:
    print("NEXT", file=sys.stderr)
    try:
        AutoModelForCausalLM.from_pretrained(directory)
        print("LOADED", file=sys.stderr)
    except Exception:
        traceback.print_exc()
"""


@pytest.mark.slow
def test_without_the_package_loading_fails_instead_of_making_random_weights(saved, tmp_path: Path) -> None:
    directories = [compressed(saved, tmp_path / storage, storage) for storage in STORAGES]
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, *map(str, directories)]
    run = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=True)
    _, *said = run.stderr.split("NEXT\n")
    assert len(said) == len(STORAGES)
    for each in said:
        assert "LOADED" not in each
        assert "Traceback" in each
        assert "mismatch" in each.lower()


@pytest.mark.slow
def test_importing_the_package_is_enough_in_either_order(small: Path) -> None:
    for imports in ("import welore, transformers", "import transformers, welore", "import welore.models.quantizer"):
        code = (
            f"{imports}\nfrom transformers import AutoModelForCausalLM as M\n"
            f"m = M.from_pretrained({str(small)!r}); print(sum('LowRank' in type(x).__name__ for x in m.modules()))"
        )
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=True
        )
        assert int(run.stdout) == len(welore.Plan.load(small / "plan.json").ranks)


@pytest.mark.parametrize(
    ("small", "part"),
    [(form, part) for form in FORMS for part in FORMS[form].parts],
    indirect=["small"],
)
def test_checkpoint_that_lost_a_factor_fails(small: Path, part: str) -> None:
    name = first_factored(small)
    edit_weights(small, **{f"{name}.{part}": None})
    with pytest.raises(WeLoreError, match=f"lost the tensor {name}.{part}"):
        AutoModelForCausalLM.from_pretrained(small)
    with pytest.raises(WeLoreError, match="lost the tensor"):
        welore.merge(small, small.parent / "dense")


@EVERY_STORAGE
def test_checkpoint_with_a_wrong_rank_fails(small: Path) -> None:
    name = first_factored(small)
    config = json.loads((small / "config.json").read_text())
    config["quantization_config"]["ranks"][name] += 1
    (small / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeLoreError, match=f"config.json gives {name} rank"):
        AutoModelForCausalLM.from_pretrained(small)


@pytest.mark.parametrize("value", [0, 1000, -1])
@pytest.mark.parametrize("small", ["pivoted"], indirect=True)
def test_order_that_is_no_permutation_fails(small: Path, value: int) -> None:
    name = f"{first_factored(small)}.order"
    order = load_file(small / "model.safetensors")[name]
    order[(order != value).nonzero()[0]] = value
    edit_weights(small, **{name: order})
    with pytest.raises(WeLoreError, match=f"{name} is no permutation"):
        AutoModelForCausalLM.from_pretrained(small)
    with pytest.raises(WeLoreError, match=f"{name} is no permutation"):
        welore.merge(small, small.parent / "dense")


LIES = {
    "no rank": lambda c: c["ranks"].pop(next(iter(c["ranks"]))),
    "a rank of a norm": lambda c: c["ranks"].update({"model.norm": 3}),
    "a rank of the model": lambda c: c["ranks"].update({"": 3}),
    "a rank that is a text": lambda c: c["ranks"].update({next(iter(c["ranks"])): "3"}),
    "a rank beyond the matrix": lambda c: c["ranks"].update({next(iter(c["ranks"])): 1 << 40}),
    "ranks that are a list": lambda c: c.update(ranks=[1]),
    "a form that is a list": lambda c: c.update(forms={next(iter(c["ranks"])): []}),
    "blocks that do not divide": lambda c: c.update(
        grids={name: [5, 1] for name in c.get("grids", ["model.layers.0.mlp.up_proj"])},
        ranks=c["ranks"] | {"model.layers.0.mlp.up_proj.0": 3},
    ),
    "a shape that is not the files'": lambda c: c.update(shapes={"model.layers.0.mlp.up_proj": [3, 32]}),
    "a shape of a layer that is not there": lambda c: c.update(shapes={"model.layers.9.mlp.up_proj": [3, 32]}),
    "a field of its own": lambda c: c.update(self=5),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("small", ["pivoted", "split"], indirect=True)
def test_configuration_that_lies_is_refused_by_every_verb(small: Path, lie: str) -> None:
    config = json.loads((small / "config.json").read_text())
    LIES[lie](config["quantization_config"])
    (small / "config.json").write_text(json.dumps(config))
    for verb in (lambda: load(small, "auto", "cpu"), lambda: welore.merge(small, small.parent / "out")):
        with pytest.raises(WeLoreError):
            verb()
    assert not (small.parent / "out").exists()


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.input_layernorm.weight"])
def test_merge_refuses_a_checkpoint_that_lost_a_tensor(small: Path, name: str) -> None:
    edit_weights(small, **{name: None})
    with pytest.raises(WeLoreError, match=f"lacks {name}"):
        welore.merge(small, small.parent / "out")


def test_merge_refuses_factors_that_hold_nan(small: Path) -> None:
    name = f"{first_factored(small)}.A.weight"
    edit_weights(small, **{name: load_file(small / "model.safetensors")[name] * torch.nan})
    with pytest.raises(WeLoreError, match="holds NaN or Inf"):
        welore.merge(small, small.parent / "out")
    assert not (small.parent / "out").exists()


def test_weights_that_are_integers_are_refused_in_a_compressed_checkpoint(small: Path) -> None:
    edit_weights(small, **{"model.norm.weight": torch.ones(32, dtype=torch.int8)})
    with pytest.raises(WeLoreError, match="norm.weight has dtype torch.int8"):
        welore.merge(small, small.parent / "out")


def test_factor_of_a_layer_that_is_dense_is_refused(small: Path) -> None:
    edit_weights(small, **{"model.norm.A.weight": torch.ones(3, 3), "model.layers.0.mlp.A.weight": torch.ones(3, 3)})
    with pytest.raises(WeLoreError, match=r"holds model\.layers\.0\.mlp\.A\.weight"):
        welore.merge(small, small.parent / "out")


@EVERY_STORAGE
def test_factor_of_a_dtype_that_nobody_multiplies_is_refused(small: Path) -> None:
    name = first_factored(small)
    part = next(part for part in ("A.weight", "P.weight") if f"{name}.{part}" in load_file(small / "model.safetensors"))
    factor = load_file(small / "model.safetensors")[f"{name}.{part}"]
    edit_weights(small, **{f"{name}.{part}": factor.to(torch.float8_e4m3fn)})
    with pytest.raises(WeLoreError, match=f"{name}.{part} has dtype"):
        welore.merge(small, small.parent / "out")


@EVERY_STORAGE
def test_config_says_more_than_format_1_only_where_there_is_more(small: Path) -> None:
    about = json.loads((small / "config.json").read_text())["quantization_config"]
    forms = welore.Plan.load(small / "plan.json").forms
    if set(forms.values()) == {"factored"}:
        assert set(about) == {"quant_method", "version", "ranks"}
        assert about["version"] == 1
    else:
        assert about["version"] == (3 if "grids" in about else 2)
        assert about["forms"] == forms


def test_form_that_nobody_knows_fails(small: Path) -> None:
    config = json.loads((small / "config.json").read_text())
    config["quantization_config"]["forms"] = {first_factored(small): "pivot"}
    (small / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeLoreError, match="unknown form 'pivot'; did you mean 'pivoted'"):
        AutoModelForCausalLM.from_pretrained(small)


def test_checkpoint_of_a_later_format_says_upgrade(small: Path) -> None:
    config = json.loads((small / "config.json").read_text())
    config["quantization_config"]["version"] = 99
    (small / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeLoreError, match="upgrade it"):
        AutoModelForCausalLM.from_pretrained(small)


def test_rank_of_a_layer_that_is_not_there_fails(small: Path) -> None:
    config = json.loads((small / "config.json").read_text())
    ranks = config["quantization_config"]["ranks"]
    ranks["model.layers.9.mlp.up_proj"] = 3
    (small / "config.json").write_text(json.dumps(config))
    edit_weights(
        small,
        **{
            "model.layers.9.mlp.up_proj.A.weight": torch.ones(4, 3),
            "model.layers.9.mlp.up_proj.B.weight": torch.ones(3, 4),
        },
    )
    with pytest.raises(WeLoreError, match="has no such layer"):
        AutoModelForCausalLM.from_pretrained(small)


@EVERY_STORAGE
def test_loaded_model_is_an_ordinary_model(small: Path, tokens: torch.Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(small)
    assert not hasattr(model, "hf_quantizer")
    assert not model.is_quantized
    assert model.half().dtype == torch.float16
    assert model.float().dtype == torch.float32
    assert all(p.requires_grad for p in model.parameters())
    layer = next(module for module in model.modules() if isinstance(module, LowRankLayer))
    assert [type(child) for child in layer.children()] == [torch.nn.Linear] * 2
    x = torch.ones(2, layer.in_features)
    torch.testing.assert_close(layer(x), x @ FORMS[layer.form].unpack(layer.state_dict()).T, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(logits(model, tokens)).all()


@EVERY_STORAGE
@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}])
def test_options_of_from_pretrained_work(small: Path, tokens: torch.Tensor, options: dict[str, object]) -> None:
    model = AutoModelForCausalLM.from_pretrained(small, **options)
    assert model.dtype == options.get("dtype", torch.float32)
    assert torch.isfinite(logits(model, tokens)).all()
    plain = AutoModelForCausalLM.from_pretrained(small).to(model.dtype).state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in model.state_dict().items())


@EVERY_STORAGE
def test_bare_model_has_the_same_hidden_states_and_saves(small: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    bare, whole = AutoModel.from_pretrained(small), AutoModelForCausalLM.from_pretrained(small)
    with torch.inference_mode():
        expected = whole.model(tokens).last_hidden_state
        assert torch.equal(bare(tokens).last_hidden_state, expected)
    bare.save_pretrained(tmp_path / "bare")
    with torch.inference_mode():
        assert torch.equal(AutoModel.from_pretrained(tmp_path / "bare")(tokens).last_hidden_state, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_compressing_while_loading_equals_compress(saved, tmp_path: Path, tokens: torch.Tensor, family: str) -> None:
    source = saved(family)
    compress(source, tmp_path / "small", rank_reduction=0.4, exclude=["1"])
    wish = welore.WeLoreConfig(rank_reduction=0.4, exclude=["1"])
    loaded = AutoModelForCausalLM.from_pretrained(source, quantization_config=wish)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(logits(loaded, tokens), logits(expected, tokens))
    loaded.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again, tokens), logits(expected, tokens))


def test_compressing_while_loading_is_the_method_of_compress(
    saved, tokenizer, tmp_path: Path, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    import welore.compression.presets as presets

    monkeypatch.setitem(presets.PRESETS, "best", replace(presets.PRESETS["best"], num_tokens=256))
    source = saved("llama")
    with pytest.raises(WeLoreError, match="tokenizer cannot be read: add one, or .* scaling='none' or preset='paper'"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=welore.WeLoreConfig(keep=0.7))
    plain = welore.WeLoreConfig(keep=0.7, scaling="none")
    assert AutoModelForCausalLM.from_pretrained(source, quantization_config=plain).config.quantization_config.ranks
    tokenizer.save_pretrained(source)
    settings = welore.WeLoreConfig(keep=0.7)
    loaded = AutoModelForCausalLM.from_pretrained(source, quantization_config=settings)
    expected = AutoModelForCausalLM.from_pretrained(source)
    welore.compress(expected, keep=0.7, tokenizer=tokenizer)
    assert torch.equal(logits(loaded, tokens), logits(expected, tokens))
    assert loaded.config.quantization_config.to_dict() == expected.config.quantization_config.to_dict()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_mode_and_randomness_of_the_caller_change_nothing(saved, tokenizer, mode: type) -> None:
    source = saved("llama")
    torch.manual_seed(9876)
    size, healing = welore.CalibrationConfig(num_tokens=256, max_length=64), welore.RecoveryConfig()
    models = [AutoModelForCausalLM.from_pretrained(source) for _ in range(2)]
    for model, context in zip(models, (mode, torch.enable_grad), strict=True):
        drawn = random.getstate(), np.random.get_state()[1].tolist()
        with context():
            result = welore.compress(model, keep=0.7, tokenizer=tokenizer, calibration=size, recovery=healing)
        assert "failed" not in result.record.settings["recovery"]
        assert torch.initial_seed() == 9876
        assert (random.getstate(), np.random.get_state()[1].tolist()) == drawn
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert not any(parameter.is_inference() for parameter in models[0].parameters())


def test_work_on_a_model_in_memory_promises_nothing(
    saved, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import welore.calibration.collect as collect

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(collect, "_collect", stop)
    size = welore.CalibrationConfig(num_tokens=128, max_length=64)
    source = saved("llama")
    tokenizer.save_pretrained(source)
    given = {"tokenizer": tokenizer}
    calls = [
        lambda model: welore.calibrate(model, size, tmp_path / "C.safetensors", **given),
        lambda model: welore.compress(model, keep=0.7, calibration=size, **given),
        lambda model: welore.compress(model, tmp_path / "small", keep=0.7, calibration=size, **given),
    ]
    for call in calls:
        with pytest.raises(KeyboardInterrupt) as caught:
            call(AutoModelForCausalLM.from_pretrained(source))
        assert not getattr(caught.value, "__notes__", [])
        assert [path.name for path in tmp_path.iterdir()] == [source.name]
    with pytest.raises(KeyboardInterrupt) as caught:
        calls[0](source)
    assert "the finished work lies in" in caught.value.__notes__[0]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
@pytest.mark.parametrize("wrap", ["peft", "inside", "parallel", "norm"])
def test_wrapped_models_and_adapters_are_refused(small: Path, saved, tmp_path: Path, wrap: str) -> None:
    import peft

    tune = partial(welore.finetune, output_dir=tmp_path / "run", dataset=["a b"])
    verbs = (saved("llama"), partial(welore.compress, keep=0.9)), (small, welore.merge), (small, tune)
    for source, verb in verbs:
        model = AutoModelForCausalLM.from_pretrained(source)
        if wrap == "parallel":
            model = torch.nn.DataParallel(model)
        elif wrap == "norm":
            torch.nn.utils.parametrizations.weight_norm(model.lm_head)
        else:
            model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
            model = model.get_base_model() if wrap == "inside" else model
        with pytest.raises(WeLoreError, match=r"is wrapped, or has adapters .*merge_and_unload"):
            verb(model)


@pytest.mark.parametrize("output", [".", "missing/../small"])
def test_result_may_replace_the_directory_of_the_command(
    saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    source, here = saved("llama"), tmp_path / "empty"
    here.mkdir()
    monkeypatch.chdir(here)
    compress(source, output, rank_reduction=0.4)
    monkeypatch.chdir(tmp_path)
    assert (here / output / "config.json").is_file() or (here / "small" / "config.json").is_file()


def test_words_of_version_0_1_and_unknown_settings() -> None:
    assert welore.WeLoreConfig(params=0.7).compression.keep == 0.7
    with pytest.raises(WeLoreError, match="unknown setting 'kepe'; did you mean 'keep'"):
        welore.WeLoreConfig(kepe=0.7)


def test_wish_without_a_target_is_one_sentence(saved) -> None:
    with pytest.raises(WeLoreError, match="exactly one target"):
        AutoModelForCausalLM.from_pretrained(saved("llama"), quantization_config=welore.WeLoreConfig())


@EVERY_STORAGE
def test_trainer_trains_and_saves_a_compressed_model(small: Path, tmp_path: Path, tokens: torch.Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(small)
    rows = [{"input_ids": tokens[0], "labels": tokens[0]}] * 8
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=3, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    before = model.state_dict()
    before = {name: t.clone() for name, t in before.items()}
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(tmp_path / "trained")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    changed = {name for name, t in trained.state_dict().items() if not torch.equal(t, before[name])}
    form = welore.Plan.load(small / "plan.json").forms[first_factored(small)]
    assert {f"{first_factored(small)}.{part}" for part in FORMS[form].numbers} <= changed
    assert not any(name.endswith(".order") for name in changed)
    assert torch.equal(logits(trained, tokens), logits(model.eval(), tokens))


def test_model_built_in_memory_and_from_disk_have_the_same_layout(small: Path) -> None:
    model = build("llama")
    compress(model, rank_reduction=0.4)
    assert set(model.state_dict()) == set(AutoModelForCausalLM.from_pretrained(small).state_dict())


def test_a_model_in_memory_keeps_its_hooks_and_what_is_frozen(tokens: torch.Tensor) -> None:
    model = build("llama").requires_grad_(False)
    model.lm_head.requires_grad_(True)
    layer, seen, backward = model.model.layers[0].self_attn.o_proj, [], []
    model.model.embed_tokens.requires_grad_(True)
    handle = layer.register_forward_hook(lambda module, inputs, y: seen.append(type(module).__name__))
    layer.register_full_backward_hook(lambda *_: backward.append(1))
    compress(model, rank_reduction=0.4)
    assert isinstance(model.model.layers[0].self_attn.o_proj, LowRankLayer)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["model.embed_tokens.weight", "lm_head.weight"]
    model(tokens).logits.sum().backward()
    assert backward == [1]
    welore.merge(model)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    model(tokens)
    assert seen == ["LowRankLinear", "Linear"]
    handle.remove()
    model(tokens)
    assert len(seen) == 2


@pytest.mark.parametrize("mode", ["autocast", "default dtype"])
def test_work_in_modes_that_change_its_dtypes_is_refused(small: Path, mode: str, tmp_path: Path) -> None:
    verbs = welore.compress, welore.calibrate, welore.finetune, welore.merge, welore.export
    try:
        torch.set_default_dtype(torch.bfloat16 if mode == "default dtype" else torch.float32)
        for verb in verbs:
            with (
                torch.autocast("cpu", enabled=mode == "autocast"),
                pytest.raises(WeLoreError, match="outside of torch"),
            ):
                verb(small, tmp_path / "out")
    finally:
        torch.set_default_dtype(torch.float32)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_trained_biases_leave_frozen_weights_frozen(family: str) -> None:
    model = build(family)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    compress(model, rank_reduction=0.4)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    welore.merge(model)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
