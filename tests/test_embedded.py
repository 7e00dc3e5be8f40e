"""The demo, on a small model: what it makes, and that only the same measurement is used again."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from toys import checkpoint
from welore.cli import demo as embedded
from welore.config import EvaluationConfig
from welore.records import Record

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the demo runs on, for all tests of this file."""
    inputs = tmp_path_factory.mktemp("inputs")
    model = checkpoint(inputs / "model", rank_reduction=None, num_hidden_layers=1)
    text = inputs / "prose.txt"
    text.write_text(" ".join(f"The number after {n} is {n + 1}." for n in range(900)))
    short = {"dataset": str(text), "max_steps": 2, "max_length": 32, "max_eval_samples": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "embedded_model", lambda: model)
        patch.setattr(embedded, "EVALUATION", EvaluationConfig(str(text), max_length=64, num_windows=16))
        patch.setattr(embedded, "TUNING", replace(embedded.TUNING, **short))  # type: ignore[arg-type]
        patch.setattr(embedded, "CALIBRATION", replace(embedded.CALIBRATION, num_tokens=128, max_length=32))
        patch.setattr(embedded, "RANK_REDUCTION", 0.3)
        yield


@pytest.fixture(scope="module")
def out(small: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a demo that is finished."""
    out = tmp_path_factory.mktemp("demo") / "out"
    embedded.demo(out)
    return out


@pytest.fixture(scope="module")
def results(out: Path) -> embedded.DemoResults:
    return embedded.demo(out)  # measures nothing again


def times(out: Path) -> dict[str, str]:
    """When each record was made."""
    found = [*out.glob("*.ppl.json"), *out.glob("*/finetune.json")]
    return {str(path.relative_to(out)): str(path.stat().st_mtime_ns) for path in found}


@pytest.mark.slow
def test_the_demo_tunes_what_it_compressed_and_its_control_and_reports_both(
    results: embedded.DemoResults, out: Path
) -> None:
    tuned, control = (Record.load(out / name / "finetune.json") for name in ("welore-tuned", "dense-tuned"))
    assert tuned.numbers["rank_reduction"] > 0 == control.numbers["rank_reduction"]
    assert tuned.numbers["tokens"] == control.numbers["tokens"] == 2 * 4 * 32
    assert tuned.inputs["data_sha256"] == control.inputs["data_sha256"]
    assert len(results.records) == 8
    page = results.page.read_text(encoding="utf-8")
    for record in results.records:
        assert str(record.inputs["label"]) in page
    assert "prose.txt, 2 steps of 4 x 32 tokens, float32" in page
    assert (results.page.parent / "fine-tuning-1.png").is_file()
    perplexities = [f"{record.numbers['perplexity']:.4g}" for record in results.records[-2:]]
    assert all(any(value in sentence for sentence in results.findings) for value in perplexities)


@pytest.mark.slow
def test_a_repeated_demo_measures_nothing_again_unless_something_changed(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, first = shutil.copytree(out, tmp_path / "out"), times(out)
    embedded.demo(out)
    assert times(out) == first

    monkeypatch.setattr(embedded, "TUNING", replace(embedded.TUNING, learning_rate=1e-4))
    embedded.demo(out)
    second = times(out)
    assert {name for name in first if first[name] != second[name]} == {
        f"{name}{end}" for name in ("welore-tuned", "dense-tuned") for end in (".ppl.json", "/finetune.json")
    }

    monkeypatch.setattr(embedded, "RANK_REDUCTION", 0.2)
    embedded.demo(out)
    third = times(out)
    unchanged = {"dense.ppl.json", "ours-small.ppl.json"}  # of neither does the paper's size decide
    assert {name for name in first if second[name] == third[name]} == unchanged


def test_our_method_has_the_paper_s_number_of_parameters_and_a_smaller_one(
    results: embedded.DemoResults, out: Path
) -> None:
    numbers = {name: record.numbers for name, record in zip(embedded.LABELS, results.records, strict=True)}
    ratio = numbers["welore"]["parameter_ratio"]
    assert numbers["ours"]["parameter_ratio"] == pytest.approx(ratio, abs=0.01)
    assert numbers["uniform-same-parameters"]["parameter_ratio"] <= ratio
    assert numbers["ours-small"]["parameter_ratio"] == pytest.approx(embedded.KEEP, abs=0.01)
    made = Record.load(out / "ours-small" / "compression.json").settings
    assert (made["strategy"], made["scaling"], made["target"]) == ("waterfill", "kfac", {"keep": embedded.KEEP})
    assert numbers["dense-tuned"]["parameter_ratio"] == 1

    assert len(results.findings) == 3
    assert [row[0] for row in results.rows] == list(embedded.LABELS.values())
    assert repr(results) == f"DemoResults(8 models, page={str(results.page)!r})"
    page = results._repr_html_()
    assert page.count("<tr>") == 9
    assert page.count("<p>") == 3
