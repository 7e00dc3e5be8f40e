"""The demo, on a small model: what it makes, and that only the same measurement is used again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from toys import checkpoint
from welore.cli import demo as embedded
from welore.config import EvaluationConfig
from welore.records import Record

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], embedded.DemoResults]:
    model = checkpoint(tmp_path / "model", rank_reduction=None, num_hidden_layers=1)
    monkeypatch.setattr(embedded, "embedded_model", lambda: model)
    text = tmp_path / "prose.txt"
    text.write_text(" ".join(f"The number after {n} is {n + 1}." for n in range(900)))
    monkeypatch.setattr(embedded, "EVALUATION", EvaluationConfig(str(text), max_length=64, num_windows=16))
    short = {"dataset": str(text), "max_steps": 2, "max_length": 32, "max_eval_samples": 2}
    monkeypatch.setattr(embedded, "TUNING", replace(embedded.TUNING, **short))  # type: ignore[arg-type]
    monkeypatch.setattr(embedded, "CALIBRATION", replace(embedded.CALIBRATION, num_tokens=128, max_length=32))
    monkeypatch.setattr(embedded, "RANK_REDUCTION", 0.3)
    return lambda: embedded.demo(tmp_path / "out")


def times(out: Path) -> dict[str, str]:
    """When each record was made."""
    found = [*out.glob("*.ppl.json"), *out.glob("*/finetune.json")]
    return {str(path.relative_to(out)): str(path.stat().st_mtime_ns) for path in found}


@pytest.mark.slow
def test_the_demo_tunes_what_it_compressed_and_its_control_and_reports_both(
    demo: Callable[[], embedded.DemoResults], tmp_path: Path
) -> None:
    results = demo()
    tuned, control = (
        Record.load(tmp_path / "out" / name / "finetune.json") for name in ("welore-tuned", "dense-tuned")
    )
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
    demo: Callable[[], embedded.DemoResults], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    demo()
    first = times(out)
    demo()
    assert times(out) == first

    monkeypatch.setattr(embedded, "TUNING", replace(embedded.TUNING, learning_rate=1e-4))
    demo()
    second = times(out)
    assert {name for name in first if first[name] != second[name]} == {
        f"{name}{end}" for name in ("welore-tuned", "dense-tuned") for end in (".ppl.json", "/finetune.json")
    }

    monkeypatch.setattr(embedded, "RANK_REDUCTION", 0.2)
    demo()
    third = times(out)
    unchanged = {"dense.ppl.json", "ours-small.ppl.json"}  # of neither does the paper's size decide
    assert {name for name in first if second[name] == third[name]} == unchanged


def test_our_method_has_the_paper_s_number_of_parameters_and_a_smaller_one(
    demo: Callable[[], embedded.DemoResults], tmp_path: Path
) -> None:
    results = demo()
    numbers = {name: record.numbers for name, record in zip(embedded.LABELS, results.records, strict=True)}
    ratio = numbers["welore"]["parameter_ratio"]
    assert numbers["ours"]["parameter_ratio"] == pytest.approx(ratio, abs=0.01)
    assert numbers["uniform-same-parameters"]["parameter_ratio"] <= ratio
    assert numbers["ours-small"]["parameter_ratio"] == pytest.approx(embedded.KEEP, abs=0.01)
    made = Record.load(tmp_path / "out" / "ours-small" / "compression.json").settings
    assert (made["strategy"], made["scaling"], made["target"]) == ("waterfill", "kfac", {"keep": embedded.KEEP})
    assert numbers["dense-tuned"]["parameter_ratio"] == 1

    assert len(results.findings) == 3
    assert [row[0] for row in results.rows] == list(embedded.LABELS.values())
    assert repr(results) == f"DemoResults(8 models, page={str(results.page)!r})"
    page = results._repr_html_()
    assert page.count("<tr>") == 9
    assert page.count("<p>") == 3
