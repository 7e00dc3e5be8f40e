"""The report: everything that was made is on the page, its numbers are right, and it needs nothing from outside."""

import errno
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from conftest import Command, allocate
from welore.allocation.plan import Plan
from welore.allocation.spectra import Spectra
from welore.errors import WeLoreError
from welore.records import Identity, Record
from welore.reporting.discover import LOADERS, Section, find_artefacts
from welore.reporting.page import report
from welore.reporting.tables import results

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

SOURCE = "/models/tiny"
SHAPES = {"self_attn.q_proj": (8, 8), "self_attn.v_proj": (5, 8), "mlp.down_proj": (8, 13)}


def tiny() -> Spectra:
    shapes = {f"model.layers.{i}.{kind}": shape for i in range(2) for kind, shape in SHAPES.items()}
    values = {
        name: 3 * (1 - np.linspace(0, 1, min(shape))) ** (0.4 + 3.0 * (i % 3)) + 0.1
        for i, (name, shape) in enumerate(shapes.items())
    }
    return Spectra(Identity(SOURCE, "f" * 64), values, shapes)


def settings_of(plan: Plan) -> dict[str, Any]:
    return {"target": dict(plan.target), "strategy": plan.strategy, "min_ratio": plan.min_ratio}


def perplexity(model: str, value: float | None, plan: Plan | None = None, **changes: Any) -> Record:
    settings = {"dataset": "/texts/wiki.txt", "max_length": 512, "num_windows": None, "dtype": "float32"} | changes
    numbers = {
        "perplexity": value,
        "windows": 16,
        "rank_reduction": plan.rank_reduction if plan else 0.0,
        "parameter_ratio": plan.parameter_ratio if plan else 1.0,
        "bytes": 538_090_408,
    }
    inputs = {"model": model, "label": None, "compression": settings_of(plan) if plan else None}
    return Record("perplexity", inputs, settings, numbers)


def fill(directory: Path) -> Path:
    """What analyze, allocate, compress and evaluate leave behind."""
    spectra = tiny()
    spectra.save(directory / "spectra.safetensors")
    perplexity(SOURCE, 20.0).save(directory / "dense.ppl.json")
    plan = allocate(spectra, threshold=0.3)
    plan.save(directory / "ours" / "plan.json")
    numbers = plan.numbers() | {"bytes": 2_500_000, "bytes_dense": 4_000_000}
    inputs = {"model": SOURCE, "targets_fingerprint": "f" * 64}
    Record("compression", inputs, settings_of(plan), numbers).save(directory / "ours" / "compression.json")
    perplexity("out/ours", 50.0, plan).save(directory / "ours.ppl.json")
    return directory


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return fill(tmp_path / "run")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run, made once for the tests that only read it; the run lies beside it."""
    directory = tmp_path_factory.mktemp("finished")
    return report([fill(directory / "run")], directory / "out")


class Page(HTMLParser):
    """Tables as lists of cells, text without drawings, and every address and id on the page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.text, self.ids, self.addresses, self.open = "", [], [], []  # type: ignore[var-annotated]
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.ids += [value for name, value in attrs if name == "id"]
        self.addresses += [value for name, value in attrs if name in ("href", "src", "xlink:href", "srcset", "data")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        if not {"svg", "style"} & set(self.open):
            self.text += data

    def row(self, name: str, of: int = 0) -> list[str]:
        return [row for row in self.rows if row and row[0] == name][of]


def made(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir()) if out.is_dir() else []


def test_page_and_one_png_per_figure(finished: Path) -> None:
    pictures = ["ours-parameters.png", "ours-reduction.png", "ours-spectra.png", "perplexity.png"]
    assert made(finished.parent) == [*pictures, "report.html"]
    assert all((finished.parent / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert Page(finished).source.count("<svg") == len(pictures)


def test_page_needs_nothing_from_outside_and_is_well_formed(finished: Path) -> None:
    page = Page(finished)
    assert not re.search("https?://", page.source)
    assert not [address for address in page.addresses if not address.startswith(("#", "data:"))]
    assert not re.search(r"<script|<link|@import", page.source)
    assert page.open == []


def test_inlined_drawings_do_not_share_ids(finished: Path) -> None:
    page = Page(finished)
    assert len(page.ids) == len(set(page.ids))
    references = {a[1:] for a in page.addresses if a.startswith("#")} | set(re.findall(r"url\(#([^)]*)\)", page.source))
    assert references <= set(page.ids)


def test_results_stand_with_sizes_and_ratio_to_dense(finished: Path) -> None:
    page = Page(finished)
    plan = Plan.load(finished.parents[1] / "run" / "ours" / "plan.json")
    sizes = [f"{100 * plan.rank_reduction:.1f} %", f"{100 * plan.parameter_ratio:.1f} %"]
    assert page.row("ours") == ["ours", "welore", *sizes, "538.1 MB", "50", "× 2.5"]
    assert page.row("tiny") == ["tiny", "dense", "0.0 %", "100.0 %", "538.1 MB", "20", "× 1"]
    assert page.rows.index(page.row("tiny")) < page.rows.index(page.row("ours"))


def test_plans_show_what_was_asked_and_what_was_achieved(run: Path, tmp_path: Path) -> None:
    spectra = tiny()
    plan = allocate(spectra, rank_reduction=0.1, strategy="uniform", allow_growth=True)
    plan.save(run / "later.plan.json")
    page = Page(report([run], tmp_path / "out"))
    ours, later = page.row("ours", of=1), page.row("later")
    assert ours[3] == "threshold 0.3"
    assert ours[6] == "2.5 MB of 4.0 MB"
    assert ours[9] == "0.3000"
    assert later[2:5] == ["uniform", "ERR 10.0 %", f"{100 * plan.rank_reduction:.1f} %"]
    assert later[6:8] == ["not written", f"{len(plan.ranks)} of 6"]
    # a uniform level is no normalised value: no spectra are drawn under it
    assert "later-reduction.png" in made(tmp_path / "out")
    assert "later-spectra.png" not in made(tmp_path / "out")


def test_text_states_what_the_plan_says(finished: Path) -> None:
    text = " ".join(Page(finished).text.split())
    plan = Plan.load(finished.parents[1] / "run" / "ours" / "plan.json")
    assert f"LRCs: {len(plan.ranks)} of 6 matrices" in text
    assert f"leaves {100 * plan.parameter_ratio:.1f} % of the parameters" in text
    assert "the lowest perplexity of a compressed model (1 measured) is that of ours" in text
    assert "numpy" in text  # versions and machine, from the records


def test_a_plan_copied_beside_the_weights_is_one_plan(run: Path, tmp_path: Path) -> None:
    (run / "first.plan.json").write_bytes((run / "ours" / "plan.json").read_bytes())
    page = Page(report([run], tmp_path / "out"))
    assert len([name for name in made(tmp_path / "out") if name.endswith("reduction.png")]) == 1
    assert len([row for row in page.rows if "threshold 0.3" in row]) == 1


def test_plans_of_directories_with_one_name_are_told_apart(tmp_path: Path) -> None:
    for i, threshold in enumerate((0.2, 0.5)):
        allocate(tiny(), threshold=threshold).save(tmp_path / f"run{i}" / "ours" / "plan.json")
    page = Page(report([tmp_path], tmp_path / "out"))
    assert page.row("run0/ours")[3] == "threshold 0.2"
    assert {"run0-ours-reduction.png", "run1-ours-reduction.png"} <= set(made(tmp_path / "out"))


def test_spectra_without_a_plan_are_drawn(tmp_path: Path) -> None:
    tiny().save(tmp_path / "in" / "spectra-tiny.safetensors")
    page = Page(report([tmp_path / "in"], tmp_path / "out"))
    assert "Spectra of tiny" in page.text
    assert "machine and versions are not known" in page.text
    assert made(tmp_path / "out") == ["report.html", "spectra-1.png"]


def test_a_record_of_unknown_kind_is_listed(run: Path, tmp_path: Path) -> None:
    Record("novelty", {}, {}, {}).save(run / "new.ppl.json")
    assert "run/new.ppl.json: novelty" in Page(report([run], tmp_path / "out")).text


def test_same_page_for_the_same_records(run: Path, tmp_path: Path) -> None:
    pages = [report([run, run / "ours"], tmp_path / name).read_bytes() for name in ("a", "b")]
    assert pages[0] == pages[1]


def test_labels_are_escaped_on_the_page(run: Path, tmp_path: Path) -> None:
    record = perplexity("x", 30.0, Plan.load(run / "ours" / "plan.json"))
    replace(record, inputs=record.inputs | {"label": "<script>$a & b$"}).save(run / "x.ppl.json")
    page = Page(report([run], tmp_path / "out"))
    assert "<script" not in page.source
    assert page.row("<script>$a & b$")[-1] == "× 1.5"


def test_perplexity_that_is_not_finite_has_a_row(run: Path, tmp_path: Path) -> None:
    for path in run.glob("*.ppl.json"):
        path.unlink()
    perplexity("broken", None).save(run / "broken.ppl.json")
    page = Page(report([run], tmp_path / "out"))
    assert page.row("broken")[-2:] == ["not finite", "–"]
    assert "perplexity.png" not in made(tmp_path / "out")


# --- fine-tuning and tasks ---------------------------------------------------------------------------------------


def tuned(method: str, loss: float, err: float = 0.5, **settings: Any) -> Record:
    inputs = {"model": "small", "label": None, "model_fingerprint": str(err), "data_sha256": "d", "split": "s"}
    asked = {
        **{
            "method": method,
            "dataset": "texts/prose.txt",
            "task": None,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "batch_size": 2,
        },
        **{
            "gradient_accumulation_steps": 1,
            "processes": 1,
            "max_length": 64,
            "seed": 0,
            "dtype": "float32",
            "loss_on_prompt": False,
        },
        "max_eval_samples": 4,
    }
    numbers = {
        **{"trains": f"what {method} trains", "trainable_parameters": 1000, "total_parameters": 2000, "tokens": 256},
        **{"tokens_per_second": 70.0, "peak_memory_bytes": 10**9, "resumed_at": 0, "bytes": 10**6},
        **{"rank_reduction": err, "parameter_ratio": 1 - err / 2, "train_loss": [[1, 5.0], [2, loss]]},
        "evaluation": [[0, 5.0, 148.4], [2, loss, float(np.exp(loss))]],
    }
    return Record("finetune", inputs | {"compression": None}, asked | settings, numbers)


def test_fine_tuning_runs_are_drawn_and_listed_by_what_may_be_compared(tmp_path: Path) -> None:
    runs = {
        **{method: tuned(method, loss) for method, loss in (("full", 3.1), ("lrc", 3.2), ("nlrc", 3.3))},
        "control": tuned("full", 2.5, err=0.0),
        "longer": tuned("lrc", 2.9, max_steps=3),
    }
    for name, record in runs.items():
        record.save(tmp_path / "in" / name / "finetune.json")
    page = Page(report([tmp_path / "in"], tmp_path / "out"))
    assert "prose.txt, 2 steps of 2 x 64 tokens, float32" in page.text
    assert "prose.txt, 3 steps of 2 x 64 tokens, float32" in page.text
    row = page.row("nlrc of small")
    assert row[1:6] == ["what nlrc trains", "0.001", "1,000", "2,000", "70"]
    assert row[7:] == ["5.0000", "3.3000", "27.11", "50.0 %", "75.0 %", "1.0 MB"]
    assert made(tmp_path / "out") == [
        "fine-tuning-1-figure-1.png",  # full and lrc on the compressed model
        "fine-tuning-1-figure-5.png",  # lrc and nlrc
        "fine-tuning-1.png",  # these and the control
        "fine-tuning-2.png",
        "report.html",
    ]
    assert page.text.count("As Figure 1 of the paper") == page.text.count("As Figure 5 of the paper") == 1


def scored(label: str, task: str, value: float, unparsable: int = 0) -> Record:
    numbers = {"accuracy": value, "ci95_low": value - 0.1, "ci95_high": value + 0.1, "n": 50, "majority_rate": 0.6}
    return Record("accuracy", {"label": label, "model": "m"}, {"task": task}, numbers | {"unparsable": unparsable})


def test_scores_make_the_table_of_methods_by_tasks(tmp_path: Path) -> None:
    scored("lrc", "boolq", 0.7, 4).save(tmp_path / "in" / "a.score.json")
    scored("full", "boolq", 0.8).save(tmp_path / "in" / "b.score.json")
    scored("full", "svamp", 0.2).save(tmp_path / "in" / "c.score.json")
    page = Page(report([tmp_path / "in"], tmp_path / "out"))
    assert page.row("lrc") == ["lrc", "", "70.0 [60.0, 80.0] (4 unreadable)"]
    assert page.row("full") == ["full", "20.0 [10.0, 30.0]", "80.0 [70.0, 90.0]"]
    assert page.row("most frequent answer") == ["most frequent answer", "60.0", "60.0"]
    assert page.row("n") == ["n", "50", "50"]


def test_a_tuned_model_does_not_repeat_the_compression_it_came_from(run: Path, tmp_path: Path) -> None:
    for name in ("plan.json", "compression.json"):
        path = run / "a-run" / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((run / "ours" / name).read_bytes())
    page = Page(report([run], tmp_path / "out"))
    assert len([row for row in page.rows if "threshold 0.3" in row]) == 1
    assert page.row("ours", of=1)[3] == "threshold 0.3"


@pytest.mark.parametrize(
    ("name", "value"), [("train_loss", [[1, "x"]]), ("evaluation", [[0, 5.0]]), ("trains", 3), ("tokens", None)]
)
def test_a_broken_record_of_fine_tuning_is_named(tmp_path: Path, name: str, value: Any) -> None:
    record = tuned("lrc", 3.0)
    record.numbers[name] = value
    record.save(tmp_path / "in" / "finetune.json")
    path = re.escape(str(tmp_path / "in" / "finetune.json"))
    with pytest.raises(WeLoreError, match=f"nothing to report under .*: {path} is broken .*: make it again"):
        report([tmp_path / "in"], tmp_path / "out")


# --- sections of other packages ---------------------------------------------------------------------------------


def test_a_package_adds_a_section_by_an_entry_point(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(artefacts: Mapping[Path, Any]) -> tuple[dict[str, Any], list[Any]] | None:
        notes = [a for a in artefacts.values() if isinstance(a, str)]
        return ({"notes": notes}, []) if notes else None

    template = "<h2>Notes</h2>{% for note in content.notes %}<p>{{ note }}</p>{% endfor %}"
    section = Section(build, template, {"*.note": lambda path: path.read_text()}, kinds=("novelty",))
    entry = SimpleNamespace(name="notes", load=lambda: section)
    monkeypatch.setattr("welore.reporting.discover.entry_points", lambda group: [entry])
    Record("novelty", {}, {}, {}).save(run / "new.ppl.json")
    assert "Notes" not in Page(report([run], tmp_path / "without")).text
    (run / "a.note").write_text("Seen & noted")
    text = Page(report([run], tmp_path / "with")).text
    assert "Notes" in text
    assert "Seen & noted" in text
    assert "novelty" not in text  # the section shows this kind of record


# --- which dense model a result is compared with ---------------------------------------------------------------


def test_ratio_is_to_the_dense_model_on_the_same_text_and_settings() -> None:
    plan = allocate(tiny(), threshold=0.3)
    texts = results(
        [
            perplexity(SOURCE, 20.0),
            perplexity(SOURCE, 10.0, dataset="pydoc"),
            perplexity("c", 60.0, plan, batch_size=8),
            perplexity("c", 60.0, plan, dataset="pydoc"),
            perplexity("c", 60.0, plan, max_length=1024),
            perplexity("c", 60.0, plan, dtype="bfloat16"),
            perplexity("c", 60.0, plan, bos="window"),
            perplexity("c", 60.0, plan, bos="text"),
        ]
    )
    assert {caption: group[-1].ratio for caption, group in texts.items()} == {
        "wiki.txt, 16 windows of 512 tokens, float32": 3,
        "pydoc, 16 windows of 512 tokens, float32": 6,
        "wiki.txt, 16 windows of 1024 tokens, float32": None,
        "wiki.txt, 16 windows of 512 tokens, bfloat16": None,
        "wiki.txt, 16 windows of 512 tokens, float32, BOS: window": None,
    }


def test_of_several_dense_models_the_one_that_was_compressed_is_the_measure() -> None:
    plan = allocate(tiny(), threshold=0.3)
    records = [perplexity("merged", 40.0), perplexity(SOURCE, 20.0), perplexity("c", 60.0, plan)]
    (group,) = results(records, originals={SOURCE}).values()
    assert [r.ratio for r in group] == [2, 1, 3]
    (unsure,) = results(records).values()
    assert [r.ratio for r in unsure] == [None, None, None]


def test_texts_that_differ_under_one_name_are_not_mixed() -> None:
    pair = [perplexity(SOURCE, value, dataset="pydoc") for value in (10.0, 20.0)]
    hashed = [replace(r, inputs=r.inputs | {"text_sha256": c * 64}) for r, c in zip(pair, "ab", strict=True)]
    captions = list(results(hashed))
    assert captions[1] == captions[0] + " (text bbbbbbbb)"


# --- what is refused, and that nothing is torn ------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def without(part: str, name: str) -> Callable[[Path], None]:
    def remove(path: Path) -> None:
        content = json.loads(path.read_text())
        del content[part][name]
        path.write_text(json.dumps(content))

    return remove


def with_value(part: str, name: str, value: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = json.loads(path.read_text())
        content[part][name] = value
        path.write_text(json.dumps(content))

    return change


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("dense.ppl.json", cut),
        ("dense.ppl.json", lambda path: path.write_text("[]")),
        ("dense.ppl.json", without("numbers", "perplexity")),
        ("dense.ppl.json", with_value("numbers", "bytes", "many")),
        ("ours/compression.json", without("settings", "target")),
        ("ours/compression.json", with_value("settings", "strategy", [1, 2])),
        ("ours/plan.json", cut),
        ("ours/plan.json", lambda path: path.write_text(path.read_text().replace('"welore.plan/1"', '"x"'))),
        ("ours/plan.json", lambda path: path.write_text(re.sub(r'"kept": \d+', '"kept": "x"', path.read_text()))),
        ("ours/plan.json", without("model", "name")),
        ("spectra.safetensors", cut),
    ],
)
def test_a_broken_artefact_is_left_out_by_name_and_alone_it_makes_no_page(
    run: Path, tmp_path: Path, name: str, damage: Callable[[Path], Any]
) -> None:
    complete, none = find_artefacts([run], LOADERS)
    assert none == []
    damage(run / name)
    artefacts, (sentence,) = find_artefacts([run], LOADERS)
    assert str(run / name) in sentence
    assert artefacts.keys() == complete.keys() - {run / name}
    alone = tmp_path / "alone" / Path(name).name
    alone.parent.mkdir()
    (run / name).rename(alone)
    with pytest.raises(WeLoreError, match=f"nothing to report under .*: {re.escape(str(alone))}"):
        report([alone.parent], tmp_path / "out")
    assert made(tmp_path / "out") == []


@pytest.mark.slow
def test_page_names_what_it_leaves_out_and_shows_what_no_list_knows(
    run: Path, tmp_path: Path, command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    (run / "dense.ppl.json").write_text('{"kind": "perpl')
    odd = "_^ $\\frac{ <script>alert(1)</script>\n\0 \ud800 $x_{$"
    tuned(odd.replace("\ud800", ""), 3.0).save(run / "new" / "finetune.json")
    scored(odd, "a task of tomorrow", 0.5).save(run / "new.score.json")
    scored(odd, "svamp", 0.5).save(run / "old.score.json")
    measured = perplexity(odd, 30.0)
    measured.inputs["compression"] = {"strategy": odd}
    measured.save(run / "odd.ppl.json")
    answer = command("report", run, "-o", tmp_path / "out")
    assert (answer.status, answer.out) == (0, f"report -> {tmp_path / 'out' / 'report.html'}\n")
    (warning,) = caplog.messages
    assert f"left out: {run / 'dense.ppl.json'} is not JSON" in warning
    page = Page(tmp_path / "out" / "report.html")
    assert f"{run / 'dense.ppl.json'} is not JSON" in page.text
    assert "script" not in page.open
    assert "<script" not in page.source
    assert "a task of tomorrow" in page.text


def test_a_plan_without_matrices_is_refused(tmp_path: Path) -> None:
    plan = allocate(tiny(), threshold=0.3)
    plan.save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text()) | {"matrices": []}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(WeLoreError, match="(holds|plans) no matrix"):
        report([tmp_path], tmp_path / "out")


def test_nothing_found_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeLoreError, match=r"nothing to report under .*spectra\*.safetensors, plan.json"):
        report([tmp_path], tmp_path / "out")


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeLoreError, match="elsewhere is not a directory"):
        report([tmp_path / "elsewhere"], tmp_path / "out")


def test_what_a_killed_run_left_is_passed_over(run: Path, tmp_path: Path) -> None:
    (run / "killed.partial").mkdir()
    (run / ".killed.welore-partial").mkdir()
    (run / ".killed.welore-partial" / "plan.json").write_text('{"format"')
    (run / "killed.partial" / "plan.json").write_text('{"format"')
    report([run], tmp_path / "out")


@pytest.mark.slow
def test_a_page_that_cannot_be_made_leaves_the_old_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = report([run], tmp_path / "out")
    before, files = page.read_bytes(), made(tmp_path / "out")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr("welore.reporting.figures.parameters_by_module", fail)
    with pytest.raises(RuntimeError, match="no ink"):
        report([run], tmp_path / "out")
    assert page.read_bytes() == before
    assert made(tmp_path / "out") == files


def test_a_new_directory_has_its_name_only_when_the_page_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    perplexity(SOURCE, 20.0).save(tmp_path / "in" / "a.ppl.json")
    with monkeypatch.context() as patch, pytest.raises(WeLoreError, match="cannot be written"):
        write, texts = Path.write_bytes, []

        def full(path: Path, data: bytes) -> int:
            texts.append(path)
            if len(texts) > 1:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return write(path, data)

        patch.setattr(Path, "write_bytes", full)
        report([tmp_path / "in"], tmp_path / "out")
    assert len(texts) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    report([tmp_path / "in"], tmp_path / "out")
    assert made(tmp_path / "out") == ["perplexity.png", "report.html"]


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_missing_extra_is_one_sentence(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(WeLoreError, match=re.escape("pip install 'welore[report]'")):
        report([run], tmp_path / "out")


def test_page_of_a_model_with_210_matrices_is_small(tmp_path: Path) -> None:
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    names = [f"model.layers.{i}.{kind}" for i in range(30) for kind in kinds]
    sigma = {name: (1 - np.linspace(0, 1, 576)) ** (0.5 + i % 7) + 0.01 for i, name in enumerate(names)}
    spectra = Spectra(Identity("big", "e" * 64), sigma, dict.fromkeys(names, (576, 1536)))
    spectra.save(tmp_path / "in" / "spectra.safetensors")
    allocate(spectra, threshold=0.2).save(tmp_path / "in" / "plan.json")
    assert report([tmp_path / "in"], tmp_path / "out").stat().st_size < 1_500_000


def test_a_record_is_read_whatever_its_file_is_called(run: Path, tmp_path: Path) -> None:
    (run / "dense.ppl.json").rename(run / "dense.wikitext2.json")
    (run / "trainer_state.json").write_text('{"log_history": []}')
    (run / "pod.json").write_text('{"kind": "Pod"}')
    (run / "lines.json").write_text('{"a": 1}\n{"b": 2}\n')
    artefacts, left_out = find_artefacts([run], LOADERS)
    assert artefacts[run / "dense.wikitext2.json"].kind == "perplexity"
    assert not {run / name for name in ("trainer_state.json", "pod.json", "lines.json")} & artefacts.keys()
    assert not left_out
