"""Several rows in one sequence: the same tokens, losses, gradients and weights as those of padded rows."""

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import welore
from conftest import FAMILIES, MIXTURES, build, compress
from toys import characters, checkpoint, finetuned, weights
from welore.config import FinetuneConfig
from welore.data.examples import examples_of_rows
from welore.data.packing import IGNORED, PackedRows, best_fit
from welore.data.rows import Rows
from welore.errors import WeLoreError
from welore.training.data import collate, require_packing

PAIRS = [{"prompt": f"After {n} comes", "completion": f" {n + 1}." + "!" * (n % 7)} for n in range(20)]
SHORT: dict[str, Any] = {
    **{"max_steps": 1, "learning_rate": 5e-3, "warmup_steps": 0, "max_eval_samples": 2, "eval_steps": 1},
    **{"save_steps": 0, "dataset": PAIRS, "max_length": 64, "max_grad_norm": 0.0},
}
OTHERS: dict[str, dict[str, Any]] = {
    "opt": FAMILIES["opt"],  # makes a mask of its own
    "gpt_oss": MIXTURES["gpt_oss"],  # makes its mask without positions
    "mamba": {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "bloom": {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "lfm2": {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
}


def rows(**settings: Any) -> Any:
    """The training part of PAIRS, 18 rows of 16 to 26 tokens."""
    table = Rows("pairs", "completion", Dataset.from_list(PAIRS))
    return examples_of_rows(table, characters(), FinetuneConfig(dataset=PAIRS, max_length=64, **settings))


def test_every_row_is_in_one_sequence_token_by_token() -> None:
    alone, packed = rows().train, rows(packing=True)
    assert packed.counts["train_items"] == 18
    assert packed.counts["packed_sequences"] == len(packed.train) < 9
    assert len(packed.evaluation) == 2  # which is not packed
    assert "position_ids" not in packed.evaluation[0]
    order = [at for pack in packed.train.packs for at in pack]
    assert sorted(order) == list(range(18))
    for name in ("input_ids", "labels"):
        together = torch.cat([sequence[name] for sequence in packed.train])
        assert torch.equal(together, torch.cat([alone[at][name] for at in order]))
    starts = torch.cat([sequence["position_ids"] for sequence in packed.train]) == 0
    assert starts.nonzero()[:, 0].tolist() == [sum(len(alone[a]["input_ids"]) for a in order[:n]) for n in range(18)]
    assert packed.train.lengths.tolist() == [len(sequence["input_ids"]) for sequence in packed.train]
    assert max(packed.train.lengths) <= 64
    assert torch.equal(packed.train.extremes, alone.extremes)
    assert packed.sha256 == rows().sha256


def test_the_first_token_of_a_row_is_not_predicted_from_the_row_before() -> None:
    packed = rows(packing=True, loss_on_prompt=True).train
    for sequence in packed:
        first = sequence["position_ids"] == 0
        assert set(sequence["labels"][first].tolist()) == {IGNORED}
        assert torch.equal(sequence["labels"][~first], sequence["input_ids"][~first])


def test_bins_are_filled_best_first() -> None:
    assert best_fit([3, 5, 4, 2, 6], 8) == [[4, 3], [1, 0], [2]]
    draw = random.Random(0)
    for _ in range(20):
        lengths = [draw.randint(1, 40) for _ in range(60)]
        bins = best_fit(lengths, 40)
        assert sorted(item for pack in bins for item in pack) == list(range(60))
        totals = [sum(lengths[item] for item in pack) for pack in bins]
        assert max(totals) <= 40
        for at, pack in enumerate(bins):  # a new bin was needed: no earlier one had room
            assert all(total + lengths[pack[0]] > 40 for total in totals[:at])


@pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="trl is absent: pip install trl")
@pytest.mark.filterwarnings("ignore")  # of trl
def test_bins_are_as_full_as_those_of_trl() -> None:
    from trl.data_utils import pack_dataset

    draw = random.Random(1)
    lengths = [draw.randint(1, 30) for _ in range(200)]
    table = Dataset.from_dict({"input_ids": [[n] * length for n, length in enumerate(lengths)]})
    theirs = pack_dataset(table, 30)["seq_lengths"]
    ours = [sum(lengths[item] for item in pack) for pack in best_fit(lengths, 30)]
    assert sorted(ours) == sorted(map(sum, theirs))


def losses_and_gradients(model: Any, examples: list[Any], size: int) -> tuple[float, dict[str, torch.Tensor]]:
    """The sum of the losses of all predicted tokens, and its gradients, in batches."""
    model.zero_grad()
    total = 0.0
    for start in range(0, len(examples), size):
        batch = collate(examples[start : start + size])
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "mixtral", "compressed"])
def test_losses_and_gradients_are_those_of_padded_rows(family: str, attention: str) -> None:
    model: Any = build("llama" if family == "compressed" else family, vocab_size=98)
    if family == "compressed":
        compress(model, rank_reduction=0.4, min_ratio=0.3)
    model.set_attn_implementation(attention)
    examples = rows().train
    packed = PackedRows(examples, 64)
    loss, gradients = losses_and_gradients(model, [*examples], 5)
    packed_loss, packed_gradients = losses_and_gradients(model, [*packed], 3)
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert gradients.keys() == packed_gradients.keys()
    for name, gradient in gradients.items():
        close = {"rtol": 1e-3, "atol": 1e-5 * float(gradient.abs().max() + 1)}
        torch.testing.assert_close(packed_gradients[name], gradient, **close, msg=name)


@pytest.mark.parametrize("family", [name for name in (*FAMILIES, *MIXTURES) if name not in OTHERS])
def test_packing_is_right_for_the_families_that_are_tested_everywhere(family: str) -> None:
    require_packing(build(family))
    require_packing(build(family, torch.bfloat16))


@pytest.mark.parametrize("family", OTHERS)
def test_packing_is_refused_where_a_row_would_change_the_next(family: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**OTHERS[family]))
    for parameter in model.parameters():
        parameter.data *= 10 if parameter.ndim > 1 else 1  # as large as those of a trained model
    with pytest.raises(WeLoreError, match="rows cannot be packed for .*leave packing out"):
        require_packing(model)


def test_packing_is_refused_for_flash_attention_and_for_a_text(tmp_path: Path) -> None:
    model = build("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(WeLoreError, match="with attention flash_attention_2: choose sdpa or eager"):
        require_packing(model)
    small, text = checkpoint(tmp_path / "small"), tmp_path / "text.txt"
    text.write_text("all work and no play " * 100)
    with pytest.raises(WeLoreError, match=r"packing goes with .*text.txt is a text"):
        finetuned(small, tmp_path / "run", **SHORT | {"dataset": str(text), "packing": True})


@pytest.mark.parametrize("teacher", [False, True])
def test_a_step_over_packed_rows_is_the_step_over_padded_ones(teacher: bool, tmp_path: Path) -> None:
    small, dense = checkpoint(tmp_path / "small"), checkpoint(tmp_path / "dense", None)
    packs = rows(packing=True).counts["packed_sequences"]
    how = SHORT | ({"distill": dense, "distill_weight": 0.5} if teacher else {})
    padded = finetuned(small, tmp_path / "padded", batch_size=18, **how).numbers
    packed = finetuned(small, tmp_path / "packed", batch_size=packs, packing=True, **how).numbers
    assert packed["tokens"] == padded["tokens"]
    assert packed["train_loss"][0][1] == pytest.approx(padded["train_loss"][0][1], rel=1e-5)
    assert packed["evaluation"][0] == padded["evaluation"][0]  # before the step
    tuned = [weights(tmp_path / name / "model") for name in ("padded", "packed")]
    before = weights(small)
    for name, tensor in tuned[0].items():
        torch.testing.assert_close(tuned[1][name], tensor, rtol=1e-3, atol=2e-4, msg=name)
    assert any(not torch.equal(tuned[1][name], before[name]) for name in before)


def test_a_task_can_be_packed(tmp_path: Path) -> None:
    small = checkpoint(tmp_path / "small")
    settings = SHORT | {"dataset": None, "task": "coin_flip", "task_dataset": "generated", "max_length": 500}
    record = finetuned(small, tmp_path / "run", packing=True, batch_size=2, **settings)
    assert record.settings["packing"] is True
    assert record.numbers["packed_sequences"] < record.numbers["train_items"]
    assert welore.Record.load(tmp_path / "run" / "finetune.json").settings["packing"] is True
