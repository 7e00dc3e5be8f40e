from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from toys import checkpoint
from welore.emergence.init_model import SIZES, Size, init_model, make_tokenizer, save_model, size_of
from welore.errors import WeLoreError
from welore.models.load import read_tokenizer

TEXT = "\n".join(f"The number after {n} is {n + 1}." for n in range(200))


@pytest.mark.parametrize(("name", "millions"), [("9m", 9), ("20m", 20), ("60m", 58), ("130m", 134), ("350m", 368)])
def test_sizes_are_called_after_their_parameters(name: str, millions: int) -> None:
    size = SIZES[name]
    with torch.device("meta"):
        config = LlamaConfig(
            vocab_size=32_000,
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
        )
        model = LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.05)


def test_a_size_is_a_name_or_four_numbers() -> None:
    assert size_of("20m") == Size(256, 4, 4, 688)
    assert size_of("32/2/4/56") == Size(32, 2, 4, 56)
    with pytest.raises(WeLoreError, match="unknown size '13m'; did you mean '130m'"):
        size_of("13m")
    for wrong in ("32/2/4", "32/2/4/x", "32/0/4/56"):
        with pytest.raises(WeLoreError, match="give a name .* or HIDDEN/LAYERS/HEADS/INTERMEDIATE"):
            size_of(wrong)
    with pytest.raises(WeLoreError, match="4 heads must divide the hidden size into even parts"):
        size_of("36/2/4/56")


def test_vocabulary_writes_any_text_back_and_is_the_same_every_time() -> None:
    found = make_tokenizer([TEXT], 300)
    assert len(found) == 300
    for text in (TEXT, "Grüße, 東京!\n\n  x"):
        assert found.decode(found(text).input_ids) == text
    again = make_tokenizer([TEXT], 300)
    assert found.backend_tokenizer.to_str() == again.backend_tokenizer.to_str()
    assert len(found("The number after").input_ids) < len("The number after") / 3
    with pytest.raises(WeLoreError, match="vocab_size is 200: bytes and the two ends take 258"):
        make_tokenizer([TEXT], 200)


def test_init_model_is_random_but_for_its_seed_and_comes_back_from_disk(tmp_path: Path) -> None:
    tokenizer = make_tokenizer([TEXT], 300)
    before = torch.get_rng_state()
    model, again, other = (init_model(Size(32, 2, 4, 56), tokenizer, 64, seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    weight = model.model.layers[1].mlp.up_proj.weight
    assert torch.equal(weight, again.model.layers[1].mlp.up_proj.weight)
    assert not torch.equal(weight, other.model.layers[1].mlp.up_proj.weight)
    assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert model.config.rms_norm_eps == 1e-6
    assert not model.config.tie_word_embeddings
    save_model(model, tokenizer, tmp_path / "start")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    assert torch.equal(loaded.model.layers[1].mlp.up_proj.weight, weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "start")(TEXT).input_ids == tokenizer(TEXT).input_ids


def test_a_tokenizer_can_be_taken_from_a_model(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", rank_reduction=None)
    assert read_tokenizer(str(model))("abc").input_ids == AutoTokenizer.from_pretrained(model)("abc").input_ids
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeLoreError, match="has no tokenizer that can be read"):
        read_tokenizer(str(tmp_path / "empty"))
