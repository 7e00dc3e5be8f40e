import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import welore
from conftest import FAMILIES, MIXTURES, build, compress, logits
from welore.errors import WeLoreError
from welore.layers.low_rank import LowRankLayer, LowRankLinear
from welore.models.replace import sizes


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(directory.glob("*.safetensors")) for name, t in load_file(path).items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


EVERY_FORM = ("llama", "qwen2", "gpt2", "opt", "phi3", "starcoder2", "mixtral")  # what the families differ in


@pytest.mark.parametrize(
    ("family", "storage"),
    [*((f, "factored") for f in (*FAMILIES, *MIXTURES)), *((f, "pivoted") for f in EVERY_FORM), ("llama", "auto")]
    + [(f, "split") for f in ("gpt2", "gpt_neox", "phi3")],
)
@pytest.mark.slow
def test_round_trip(saved, tmp_path: Path, tokens: torch.Tensor, family: str, storage: str) -> None:
    """compress -> from_pretrained -> save_pretrained -> from_pretrained is bit-equal; merge gives the same logits."""
    long: dict[str, Any] = {"intermediate_size": 64} if (family, storage) == ("gpt_neox", "split") else {}
    source = saved(family, **long)
    how: dict[str, Any] = {"rank_reduction": 0.4, "storage": storage}
    if storage == "split":  # long matrices in blocks
        how |= {"storage": "pivoted", "split": True}
    record = compress(source, tmp_path / "small", **how)
    assert record.numbers["lrcs"] > 0
    assert bool(record.settings["split"]) == (storage == "split")

    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    forms = welore.Plan.load(tmp_path / "small" / "plan.json").forms
    assert {n: m.form for n, m in small.named_modules() if isinstance(m, LowRankLayer)} == forms
    assert len(forms) == record.numbers["lrcs"]
    assert storage == "auto" or set(forms.values()) == {how["storage"]}

    in_memory = build(family, **long)
    compress(in_memory, **how)
    assert torch.equal(logits(in_memory, tokens), logits(small, tokens))

    small.save_pretrained(tmp_path / "again")
    assert equal(weights_of(tmp_path / "again"), weights_of(tmp_path / "small"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, tokens), logits(small, tokens))

    welore.merge(tmp_path / "small", tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not any(isinstance(module, LowRankLayer) for module in dense.modules())
    torch.testing.assert_close(logits(dense, tokens), logits(small, tokens), rtol=1e-3, atol=1e-3)

    welore.merge(small)
    small.save_pretrained(tmp_path / "merged-in-memory")
    assert equal(weights_of(tmp_path / "merged-in-memory"), weights_of(tmp_path / "dense"))


@pytest.mark.parametrize(
    ("dtype", "storage"),
    [(t, "factored") for t in (torch.float32, torch.bfloat16, torch.float16)] + [(torch.bfloat16, "pivoted")],
)
def test_sharded_equals_unsharded_in_every_dtype(
    saved, tmp_path: Path, tokens: torch.Tensor, dtype: torch.dtype, storage: str
) -> None:
    whole = saved("qwen2", dtype)
    how: dict[str, Any] = {"rank_reduction": 0.3, "storage": storage}
    compress(whole, tmp_path / "one", **how)
    compress(whole, tmp_path / "many", **how, max_shard_size="12KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    assert equal(weights_of(tmp_path / "one"), weights_of(tmp_path / "many"))
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "many"))
    assert one.dtype == many.dtype == dtype
    assert torch.equal(logits(one, tokens), logits(many, tokens))


def test_generation_with_the_cache_is_generation_without(saved, tmp_path: Path, tokens: torch.Tensor) -> None:
    compress(saved("llama"), tmp_path / "small", rank_reduction=0.4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(tokens)
    with_cache = model.generate(tokens, attention_mask=mask, use_cache=True, **settings)
    without = model.generate(tokens, attention_mask=mask, use_cache=False, **settings)
    assert with_cache.shape == (1, tokens.shape[1] + 12)
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("storage", ["factored", "pivoted"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_record_equals_a_recount_of_the_saved_tensors(saved, tmp_path: Path, family: str, storage: str) -> None:
    source = saved(family)
    numbers = compress(source, tmp_path / "small", rank_reduction=0.4, storage=storage).numbers
    small, dense = weights_of(tmp_path / "small"), weights_of(source)
    removed = full = stored = targeted = 0
    for name, W in dense.items():
        if W.ndim != 2 or (".layers." not in name and ".h." not in name):
            continue
        full += min(W.shape)
        targeted += W.numel()
        left, right = (small.get(name.replace("weight", f"{x}.weight")) for x in ("AB", "CP")[storage == "pivoted"])
        if left is None or right is None:
            stored += W.numel()
        else:
            assert left.shape[1] == right.shape[0]
            assert small[name].shape == (0,)
            removed += min(W.shape) - left.shape[1]
            stored += left.numel() + right.numel()
    assert numbers["rank_reduction"] == removed / full
    assert numbers["parameter_ratio"] == stored / targeted
    assert numbers["parameters"] == sum(t.numel() for t in small.values() if t.is_floating_point())
    assert numbers["bytes"] == sum(path.stat().st_size for path in (tmp_path / "small").glob("*.safetensors"))


def test_plan_and_record_lie_beside_the_weights(saved, tmp_path: Path) -> None:
    record = compress(saved("llama"), tmp_path / "small", rank_reduction=0.4)
    plan = welore.Plan.load(tmp_path / "small" / "plan.json")
    assert welore.Record.load(tmp_path / "small" / "compression.json") == record
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["quantization_config"]["ranks"] == plan.ranks
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_storage_changes_the_numbers_that_are_stored_and_not_the_model(
    saved, tmp_path: Path, tokens: torch.Tensor, family: str
) -> None:
    source, found, records = saved(family), {}, {}
    for storage in ("factored", "pivoted"):
        how: dict[str, Any] = {"rank_reduction": 0.4, "storage": storage}
        records[storage] = compress(source, tmp_path / storage, **how).numbers
        welore.merge(tmp_path / storage, tmp_path / f"{storage}-dense")
        found[storage] = weights_of(tmp_path / f"{storage}-dense")
    assert records["pivoted"]["rank_reduction"] == records["factored"]["rank_reduction"]
    assert records["pivoted"]["parameter_ratio"] < records["factored"]["parameter_ratio"]
    assert records["pivoted"]["bytes"] < records["factored"]["bytes"]
    torch.testing.assert_close(found["pivoted"], found["factored"], rtol=1e-5, atol=1e-5)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "pivoted")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "factored-dense")
    torch.testing.assert_close(logits(small, tokens), logits(dense, tokens), rtol=1e-3, atol=1e-3)


def test_bytes_of_a_pivoted_model_count_its_orders(saved, tmp_path: Path) -> None:
    source = saved("llama")
    compress(source, tmp_path / "small", rank_reduction=0.4, storage="pivoted")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert sizes(model)["bytes"] == sum(t.nbytes for t in weights_of(tmp_path / "small").values())


def test_bias_keeps_its_dense_key_and_its_value(saved, tmp_path: Path) -> None:
    source = saved("starcoder2")
    compress(source, tmp_path / "small", rank_reduction=0.5)
    small, dense = weights_of(tmp_path / "small"), weights_of(source)
    biases = [name for name in dense if name.endswith("c_fc.bias") and name.replace("bias", "A.weight") in small]
    assert biases
    assert all(torch.equal(small[name], dense[name]) for name in biases)


def test_old_gpt2_names_are_completed(saved, tmp_path: Path, tokens: torch.Tensor) -> None:
    directory = saved("gpt2")
    expected = logits(AutoModelForCausalLM.from_pretrained(directory), tokens)
    tensors = {name.removeprefix("transformer."): t.clone() for name, t in weights_of(directory).items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    compress(directory, tmp_path / "small", threshold=0.0)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "small"), tokens), expected)
    compress(directory, tmp_path / "smaller", rank_reduction=0.3)
    AutoModelForCausalLM.from_pretrained(tmp_path / "smaller")


def test_tokenizer_and_licence_travel_and_weights_of_others_do_not(saved, tmp_path: Path) -> None:
    source = saved("llama")
    for name in ("tokenizer.json", "vocab.txt", "chat_template.jinja", "LICENSE", "other.bin", "code.py", "README.md"):
        (source / name).write_text("{}")
    compress(source, tmp_path / "small", rank_reduction=0.4)
    found = {path.name for path in (tmp_path / "small").iterdir()}
    assert {"tokenizer.json", "vocab.txt", "chat_template.jinja", "LICENSE", "generation_config.json"} <= found
    assert not {"other.bin", "code.py"} & found


def test_plan_of_another_model_is_refused_before_anything_is_written(saved, tmp_path: Path) -> None:
    compress(saved("llama"), tmp_path / "small", rank_reduction=0.4)
    plan = welore.Plan.load(tmp_path / "small" / "plan.json")
    with pytest.raises(WeLoreError, match="the plan was made for another model"):
        compress(saved("mistral", intermediate_size=48), tmp_path / "other", plan=plan)
    assert not (tmp_path / "other").exists()


def test_nan_outside_the_targets_is_named_too_and_nothing_is_written(saved, tmp_path: Path) -> None:
    source = saved("llama")
    tensors = weights_of(source)
    tensors["model.embed_tokens.weight"][7, 7] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeLoreError, match="embed_tokens.weight holds NaN"):
        compress(source, tmp_path / "small", rank_reduction=0.4)
    assert {path.name for path in tmp_path.iterdir()} == {source.name}


def test_existing_result_is_replaced_only_when_asked(saved, tmp_path: Path) -> None:
    source = saved("llama")
    compress(source, tmp_path / "small", rank_reduction=0.4)
    with pytest.raises(WeLoreError, match="--overwrite"):
        compress(source, tmp_path / "small", rank_reduction=0.2)
    compress(source, tmp_path / "small", rank_reduction=0.2, overwrite=True)
    assert welore.Plan.load(tmp_path / "small" / "plan.json").target == {"rank_reduction": 0.2}
    with pytest.raises(WeLoreError, match="is or holds .*, which is read"):
        compress(source, source, rank_reduction=0.2, overwrite=True)


def test_compressed_model_is_not_compressed_again(saved, tmp_path: Path) -> None:
    compress(saved("llama"), tmp_path / "small", rank_reduction=0.4)
    with pytest.raises(WeLoreError, match="merge it first"):
        compress(tmp_path / "small", tmp_path / "smaller", rank_reduction=0.4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with pytest.raises(WeLoreError, match="merge it first"):
        compress(model, rank_reduction=0.4)
    with pytest.raises(WeLoreError, match="nothing to merge"):
        welore.merge(saved("mistral"), tmp_path / "dense")


def test_included_head_becomes_low_rank(saved, tmp_path: Path, tokens: torch.Tensor) -> None:
    compress(saved("llama"), tmp_path / "small", rank_reduction=0.4, include=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert isinstance(model.lm_head, LowRankLinear)
    assert torch.isfinite(logits(model, tokens)).all()


def test_model_in_memory_is_saved_when_a_directory_is_named(tmp_path: Path, saved) -> None:
    model = build("llama")
    compress(model, tmp_path / "memory", rank_reduction=0.4)
    compress(saved("llama"), tmp_path / "stream", rank_reduction=0.4)
    assert equal(weights_of(tmp_path / "memory"), weights_of(tmp_path / "stream"))
    for name in ("plan.json", "compression.json"):
        assert (tmp_path / "memory" / name).is_file()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_model_in_memory_and_in_a_directory_give_the_same(
    saved, tokenizer, tmp_path: Path, tokens: torch.Tensor, family: str
) -> None:
    """A size alone: text of its own, statistics, pruning, factors, recovery."""
    source = saved(family)
    tokenizer.save_pretrained(source)
    config = welore.CompressionConfig(keep=0.6, mlp_pruning=0.3)
    text = welore.CalibrationConfig(num_tokens=320, max_length=16)
    on_disk = welore.compress(source, tmp_path / "small", config, calibration=text)
    model = AutoModelForCausalLM.from_pretrained(source)
    in_memory = welore.compress(model, config=config, calibration=text, tokenizer=tokenizer)
    assert on_disk.plan.neurons
    assert on_disk.record.settings["recovery"]["text"] == "self"
    assert in_memory.plan.allocations == on_disk.plan.allocations
    assert in_memory.plan.neurons == on_disk.plan.neurons
    assert in_memory.record.numbers["held_out_loss"] == on_disk.record.numbers["held_out_loss"]
    assert in_memory.output_dir is None
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(logits(model, tokens), logits(small, tokens))
    model.save_pretrained(tmp_path / "again")
    assert equal(weights_of(tmp_path / "again"), weights_of(tmp_path / "small"))
    for result in (on_disk, in_memory):
        assert f"{result.parameter_ratio:.1%}" in repr(result)
        assert f"{result.bytes / 1e6:,.1f} MB" in result._repr_html_()


def test_a_target_out_of_reach_is_refused_before_any_text_is_written(saved, tokenizer, tmp_path: Path) -> None:
    source = saved("llama")
    tokenizer.save_pretrained(source)
    seen: list[str] = []

    def watched(items: Any, label: str, total: float) -> Any:
        seen.append(label)
        return (item for item, _ in items)

    with pytest.raises(WeLoreError, match="keep 0.001 cannot be reached"):
        welore.compress(source, tmp_path / "small", keep=0.001, progress=watched)
    assert not seen
    assert not (tmp_path / "small.work").exists()
