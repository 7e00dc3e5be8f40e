"""The demo, on a small model: what it makes, and that only the same measurement is used again."""

from collections.abc import Callable
from pathlib import Path

import pytest

from toys import checkpoint
from welore.cli import demo as embedded
from welore.records import Record

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

SHORT = {"steps": 2, "length": 32, "eval_items": 2}


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], embedded.Results]:
    model = checkpoint(tmp_path / "model", rank_reduction=None, num_hidden_layers=1)
    monkeypatch.setattr(embedded, "embedded_model", lambda: model)
    text = tmp_path / "prose.txt"
    text.write_text(" ".join(f"The number after {n} is {n + 1}." for n in range(900)))
    monkeypatch.setattr(embedded, "DATA", str(text))
    monkeypatch.setattr(embedded, "LENGTH", 64)
    monkeypatch.setattr(embedded, "TUNING", embedded.TUNING | {"data": str(text), **SHORT})
    monkeypatch.setattr(embedded, "RANK_REDUCTION", 0.3)
    return lambda: embedded.demo(tmp_path / "out")


def times(out: Path) -> dict[str, str]:
    """When each record was made."""
    found = [*out.glob("*.ppl.json"), *out.glob("*/finetune.json")]
    return {str(path.relative_to(out)): str(path.stat().st_mtime_ns) for path in found}


def test_the_demo_tunes_what_it_compressed_and_its_control_and_reports_both(
    demo: Callable[[], embedded.Results], tmp_path: Path
) -> None:
    results = demo()
    tuned, control = (
        Record.load(tmp_path / "out" / name / "finetune.json") for name in ("welore-tuned", "dense-tuned")
    )
    assert tuned.numbers["rank_reduction"] > 0 == control.numbers["rank_reduction"]
    assert tuned.numbers["tokens"] == control.numbers["tokens"] == 2 * 4 * 32
    assert tuned.inputs["data_sha256"] == control.inputs["data_sha256"]
    assert len(results.records) == 6
    page = results.page.read_text(encoding="utf-8")
    for record in results.records:
        assert str(record.inputs["label"]) in page
    assert "prose.txt, 2 steps of 4 x 32 tokens, float32" in page
    assert (results.page.parent / "fine-tuning-1.png").is_file()
    perplexities = [f"{record.numbers['perplexity']:.4g}" for record in results.records[-2:]]
    assert all(any(value in sentence for sentence in results.findings) for value in perplexities)


def test_a_repeated_demo_measures_nothing_again_unless_something_changed(
    demo: Callable[[], embedded.Results], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    demo()
    first = times(out)
    demo()
    assert times(out) == first

    monkeypatch.setattr(embedded, "TUNING", embedded.TUNING | {"lr": 1e-4})
    demo()
    second = times(out)
    assert {name for name in first if first[name] != second[name]} == {
        f"{name}{end}" for name in ("welore-tuned", "dense-tuned") for end in (".ppl.json", "/finetune.json")
    }

    monkeypatch.setattr(embedded, "RANK_REDUCTION", 0.2)
    demo()
    third = times(out)
    assert {name for name in first if second[name] == third[name]} == {"dense.ppl.json"}
