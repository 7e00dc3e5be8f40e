"""Files that version 0.1 wrote are read by every later version: tests/fixtures holds one of each kind."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import welore
from conftest import compress, logits

FIXTURES = Path(__file__).parent / "fixtures"
FORMATS = ["format1", "format2", "format3", "format4"]


@pytest.mark.parametrize("name", ["dense", *FORMATS])
def test_checkpoint_gives_the_logits_that_it_gave_when_it_was_written(name: str) -> None:
    expected = load_file(FIXTURES / "logits.safetensors")
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / name)
    torch.testing.assert_close(logits(model, expected["ids"]), expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_checkpoint_says_its_format_plan_and_record(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / name)
    plan = welore.Plan.load(FIXTURES / name / "plan.json")
    record = welore.Record.load(FIXTURES / name / "compression.json")
    assert model.config.quantization_config.version == int(name[-1])
    assert plan.ranks == model.config.quantization_config.ranks
    assert record.numbers["parameter_ratio"] == pytest.approx(plan.parameter_ratio)


@pytest.mark.parametrize("name", FORMATS)
def test_merging_it_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    expected = load_file(FIXTURES / "logits.safetensors")
    welore.merge(FIXTURES / name, tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(model, expected["ids"]), expected[name], rtol=1e-3, atol=1e-3)


def test_spectra_and_plan_are_read_and_the_plan_is_what_the_spectra_give() -> None:
    spectra = welore.Spectra.load(FIXTURES / "spectra.safetensors")
    plan = welore.Plan.load(FIXTURES / "plan.json")
    assert plan.parameter_ratio == pytest.approx(0.6, abs=0.05)
    assert welore.allocate(spectra, keep=0.6).ranks == plan.ranks


def test_statistics_are_read_and_serve_the_plan_that_was_made_from_them(tmp_path: Path) -> None:
    plan = welore.Plan.load(FIXTURES / "plan.json")
    statistics = welore.Statistics.load(FIXTURES / "statistics.safetensors")
    assert statistics.generated_text() is not None
    assert statistics.shrinkage == 0
    record = compress(FIXTURES / "dense", tmp_path / "small", plan=plan, statistics=statistics, recovery=None)
    assert record.numbers["parameter_ratio"] == pytest.approx(plan.parameter_ratio)


@pytest.mark.parametrize("name", ["fixture.ppl.json", "finetune.json", "format4/compression.json"])
def test_record_is_read(name: str) -> None:
    assert welore.Record.load(FIXTURES / name).versions["welore"] == "0.1.0"
