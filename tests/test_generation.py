from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from conftest import build
from toys import ALPHABET, characters
from welore.config import CalibrationConfig
from welore.data.self_generated import OPENINGS, generate_text
from welore.errors import WeLoreError

END = 1  # of `characters`
CHAT = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '</s>' }}{% endfor %}"


def writer(family: str = "llama", **changes: Any) -> PreTrainedModel:
    model = build(family, vocab_size=len(ALPHABET) + 2, **changes)
    model.generation_config.eos_token_id = END
    return model


def generate(model: PreTrainedModel, tokenizer: Any, *, batch_size: int | None = None, **settings: Any) -> torch.Tensor:
    return generate_text(model, tokenizer, CalibrationConfig(**settings), batch_size=batch_size)


def ends_at_once(model: PreTrainedModel) -> PreTrainedModel:
    """The model, made to end every text after one token."""

    def only_the_end(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, -30.0).index_fill_(-1, torch.tensor(END), 30.0)

    model.get_output_embeddings().register_forward_hook(only_the_end)
    return model


@pytest.mark.parametrize(
    ("family", "length"), [("llama", 12), ("gpt2", 12), ("gemma3_text", 12), ("gemma3_text", 24), ("mixtral", 12)]
)
def test_the_likeliest_tokens_are_those_of_greedy_generation(family: str, length: int) -> None:
    """The layers of gemma3_text see 16 tokens, so their cache of 24 is none that is reserved."""
    model = writer(family)
    model.generation_config.eos_token_id = None
    tokenizer = characters()
    tokenizer.eos_token = None
    found = generate(model, tokenizer, num_tokens=3 * length, max_length=length, top_k=1)
    assert found.shape == (3, length)
    with torch.inference_mode():
        expected = model.generate(
            found[:, :1], attention_mask=torch.ones(3, 1), do_sample=False, max_new_tokens=length - 1, pad_token_id=0
        )
    assert torch.equal(found, expected)


def test_a_token_is_drawn_with_the_probability_that_the_model_gives_it() -> None:
    model, uniform = writer(), torch.rand((5, 4), dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    found = generate(model, characters(), num_tokens=20, max_length=4, seed=7, temperature=2.0)
    with torch.inference_mode():
        cumulated = (model(found).logits / 2).double().softmax(-1).cumsum(-1)
    for row in range(5):
        for position in range(1, 4):
            if found[row, position - 1] != END:
                below = int((cumulated[row, position - 1] <= uniform[row, position]).sum())
                assert found[row, position] == below


def test_a_model_without_a_cache_of_keys_and_values_writes_the_same() -> None:
    """Mamba and others keep their state in another way, or not at all."""
    model, how = writer(), {"num_tokens": 50, "max_length": 10}
    expected = generate(model, characters(), **how)
    forward = model.forward
    model.forward = lambda input_ids, use_cache: forward(input_ids, use_cache=use_cache)  # type: ignore[method-assign]
    assert torch.equal(generate(model, characters(), **how), expected)


def test_the_seed_alone_decides_what_is_written() -> None:
    model, tokenizer, how = writer(), characters(), {"num_tokens": 50, "max_length": 10}
    first = generate(model, tokenizer, seed=3, **how)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(first, generate(model, tokenizer, seed=3, **how))
    assert torch.equal(first, generate(model, tokenizer, seed=3, batch_size=2, **how))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, generate(model, tokenizer, seed=4, **how))
    assert len(set(first[:, 0].tolist())) > 1


def test_settings_of_the_checkpoint_do_not_change_the_text() -> None:
    model, how = writer(), {"num_tokens": 30, "max_length": 10}
    expected = generate(model, characters(), **how)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.top_k = 1
    assert torch.equal(expected, generate(model, characters(), **how))


def test_after_its_end_another_text_begins() -> None:
    found = generate(ends_at_once(writer()), characters(), num_tokens=24, max_length=8)
    assert (found[:, 1::2] == END).all()
    assert (found[:, 0::2] != END).all()
    assert len(found[:, 0::2].unique()) > 3


def test_a_text_begins_as_asked() -> None:
    tokenizer, numbers = characters(), torch.linspace(0, 0.999, 300).tolist()
    ordinary = {tuple(OPENINGS["vocabulary"](tokenizer)(number)) for number in numbers}
    assert ordinary == {(token,) for token in range(2, len(tokenizer))}
    words = {tuple(OPENINGS["word"](tokenizer)(number)) for number in numbers}
    assert {tokenizer.decode(list(ids)) for ids in words} == {c for c in ALPHABET if c.isalpha()}
    assert OPENINGS["nothing"](tokenizer)(0.5) == [END]
    tokenizer.chat_template = CHAT
    assert tokenizer.decode(OPENINGS["chat"](tokenizer)(0.5)) == "[user]"


def test_the_opening_token_of_a_tokenizer_comes_first() -> None:
    tokenizer = characters(opens=True)
    for first in ("vocabulary", "word"):
        opening, token = OPENINGS[first](tokenizer)(0.3)
        assert opening == 0
        assert token > 1
    assert OPENINGS["nothing"](tokenizer)(0.3) == [0]


def test_question_and_answer_of_a_chat_are_one_text() -> None:
    tokenizer = characters()
    tokenizer.chat_template = CHAT
    found = generate(ends_at_once(writer()), tokenizer, num_tokens=16, max_length=16, first="chat")
    assert tokenizer.decode(found[0]) == "[user]</s></s>[user]</s></s>"


def test_tokens_are_rounded_up_to_whole_windows() -> None:
    assert generate(writer(), characters(), num_tokens=21, max_length=10).shape == (3, 10)


def test_a_model_that_writes_is_left_as_it_was() -> None:
    model = writer().train()
    generate(model, characters(), num_tokens=6, max_length=3)
    assert model.training


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"num_tokens": 0}, "num_tokens is 0: it must be at least 1"),
        ({"max_length": 1}, "max_length is 1: it must be at least 2"),
        ({"batch_size": 0}, "batch_size is 0: it must be at least 1"),
        ({"temperature": 0.0}, "temperature is 0.0: it must be above 0"),
        ({"temperature": float("nan")}, "temperature is nan: it must be above 0"),
        ({"top_k": -3}, "top_k is -3: it must be at least 1, or 0 for all tokens"),
        ({"top_p": 1.5}, "top_p is 1.5: it must be above 0 and at most 1"),
        ({"first": "char"}, "unknown beginning 'char'; did you mean 'chat'"),
        ({"first": "chat"}, "this tokenizer has no chat template"),
    ],
)
def test_impossible_settings_are_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(WeLoreError, match=message):
        generate(writer(), characters(), **how)


def test_a_model_that_computes_nan_is_refused() -> None:
    model = writer()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(WeLoreError, match="the model computes NaN or Inf"):
        generate(model, characters(), num_tokens=6, max_length=3)


def test_rows_of_the_output_layer_that_stand_for_no_token_are_never_drawn() -> None:
    """A vocabulary is often padded to a multiple of 64 or 128."""
    model, size = build("llama", vocab_size=512), len(ALPHABET) + 2
    found = generate(model, characters(), num_tokens=400, max_length=20)
    assert int(found.max()) < size
    with torch.inference_mode():
        cumulated = model(found).logits[0, :, :size].double().softmax(-1).cumsum(-1)
    uniform = torch.rand((20, 20), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    after = [at for at in range(1, 20) if found[0, at - 1] != END]
    assert [int(found[0, at]) for at in after] == [int((cumulated[at - 1] <= uniform[0, at]).sum()) for at in after]


def test_a_tokenizer_of_another_model_is_refused_before_the_model_writes() -> None:
    for model in (build("llama", vocab_size=50), writer()):
        tokenizer = characters() if len(model.model.embed_tokens.weight) == 50 else characters(opens=True)
        tokenizer.add_tokens(["<extra>"])  # special words beyond the embedding never begin a text
        if len(model.model.embed_tokens.weight) == 50:
            with pytest.raises(WeLoreError, match="it gives token 97, this model knows 50"):
                generate(model, tokenizer, num_tokens=6, max_length=3)
        else:
            assert generate(model, tokenizer, num_tokens=6, max_length=3).shape == (2, 3)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no\nsystem') }}", "template of this tokenizer cannot be used: no"),
        ("{% for m in messages %}", "template of this tokenizer cannot be used: "),
        ("hello", "the chat template has nothing before the user's words"),
        ("{{ messages[0]['content'] }}", "the chat template has nothing before the user's words"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_one_sentence(template: str, message: str) -> None:
    tokenizer = characters()
    tokenizer.chat_template = template
    with pytest.raises(WeLoreError, match=message) as caught:
        OPENINGS["chat"](tokenizer)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_first_and_end_token_is_refused() -> None:
    tokenizer = characters()
    tokenizer.eos_token = None
    with pytest.raises(WeLoreError, match="neither a first nor an end token"):
        OPENINGS["nothing"](tokenizer)
