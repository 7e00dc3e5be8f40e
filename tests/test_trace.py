import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conftest import everything
from toys import trace
from welore.emergence.trace import LINES, WORK, Trace, Writer, file_of, finish, read_lines
from welore.errors import WeLoreError


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    found = Trace.load(trace(tmp_path / "trace"))
    assert list(found.steps) == [0, 10, 20, 30, 40, 50]
    assert len(found.matrices) == 21
    matrix = found.matrices["model.layers.1.mlp.up_proj"]
    assert matrix.shape == (20, 12)
    assert matrix.gradient.shape == matrix.weight.shape == matrix.change.shape == (6, 12)
    for square in (*matrix.same.values(), *matrix.other.values()):
        assert square.shape == (6, 6)
        assert np.array_equal(square, square.T)
    assert np.allclose(np.diag(matrix.same["cosine"]), 1)
    assert np.allclose(matrix.stable_rank, (matrix.gradient**2).sum(1) / matrix.gradient[:, 0] ** 2)
    assert np.allclose(matrix.top1_energy * matrix.stable_rank, 1)


def test_plans_are_the_papers_at_fifty_per_cent(tmp_path: Path) -> None:
    found = Trace.load(trace(tmp_path / "trace"))
    assert len(found.plans) == 6
    assert {plan.strategy for plan in found.plans} == {"welore"}
    last = {a.name: a for a in found.plans[-1].allocations}
    assert last["model.layers.0.mlp.gate_proj"].factored  # which decays in the toy
    assert found.plans[-1].model != found.plans[0].model


@pytest.mark.parametrize("kept", [0, 20, 50])
def test_a_trace_is_cut_back_and_grows_to_the_same_bytes(tmp_path: Path, kept: int) -> None:
    whole = everything(trace(tmp_path / "whole"))
    place = trace(tmp_path / "cut")
    (place / LINES).write_bytes((place / LINES).read_bytes() + b'{"step": 60, "tok')  # killed in the middle of a line
    header, *lines = read_lines(place)
    about = {name: header[name] for name in ("name", "fingerprint")}
    shapes = {name: (s[0], s[1]) for name, s in header["shapes"].items()}
    writer = Writer(place, about, shapes, at=kept)
    assert writer.steps == [step for step in range(0, 60, 10) if step <= kept]
    for line in lines[len(writer.steps) :]:
        writer.append(line, load_file(tmp_path / "whole" / file_of(line["step"])))
    finish(place)
    finish(tmp_path / "whole")
    assert {p.relative_to(place): b for p, b in everything(place).items()} == {
        p.relative_to(tmp_path / "whole"): b for p, b in whole.items()
    }


def test_finish_removes_the_work_and_rows_that_no_line_names(tmp_path: Path) -> None:
    place = trace(tmp_path / "trace")
    (place / WORK).mkdir(exist_ok=True)
    (place / WORK / "gradients.safetensors").write_text("large")
    (place / file_of(70)).write_text("written, but its line was not")
    finish(place)
    assert not (place / WORK).exists()
    assert sorted(path.name for path in place.glob("step-*")) == [file_of(step) for step in range(0, 60, 10)]


def test_the_trace_of_another_run_is_not_gone_on_with(tmp_path: Path) -> None:
    place = trace(tmp_path / "trace")
    with pytest.raises(WeLoreError, match="is of another run"):
        Writer(place, {"name": "another", "fingerprint": "1"}, {"x": (2, 2)}, at=10)


def test_what_is_no_trace_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(WeLoreError, match="holds no trace: make one with `welore pretrain`"):
        Trace.load(tmp_path)
    place = trace(tmp_path / "trace")
    (place / file_of(20)).unlink()
    with pytest.raises(WeLoreError, match="is broken"):
        Trace.load(place)
    lines = (place / LINES).read_text().splitlines()
    (place / LINES).write_text(lines[0] + "\n")
    with pytest.raises(WeLoreError, match="without a single checkpoint"):
        Trace.load(place)
    (place / LINES).write_text(lines[0] + "\nnot JSON\n")
    with pytest.raises(WeLoreError, match="line 2 is not JSON"):
        Trace.load(place / LINES)
    (place / LINES).write_text(json.dumps({"format": "another"}) + "\n")
    with pytest.raises(WeLoreError, match="no trace that this version reads"):
        Trace.load(place)


def test_zero_gradient_has_no_energy_anywhere(tmp_path: Path) -> None:
    matrix = Trace.load(trace(tmp_path / "t")).matrices["model.layers.0.mlp.up_proj"]
    silent = replace(matrix, gradient=np.zeros_like(matrix.gradient), gradient_energy=np.zeros(6))
    assert not silent.top1_energy.any()
    assert not silent.stable_rank.any()
    assert np.array_equal(matrix.top1_energy, 1 / matrix.stable_rank)


@pytest.mark.parametrize("damage", ["NaN", "ascending", "shape", "lost", "learning_rate", "step", "header"])
def test_damaged_trace_is_one_sentence(tmp_path: Path, damage: str) -> None:
    directory = trace(tmp_path / "t")
    path, lines = directory / file_of(20), (directory / LINES).read_text().splitlines()
    arrays, weight = load_file(path), "model.layers.0.mlp.up_proj:weight"
    number = json.loads(lines[2])
    if damage in ("NaN", "ascending", "shape", "lost"):
        values = arrays.pop(weight)
        changed = {"NaN": values * np.nan, "ascending": values[::-1].copy(), "shape": values[:-1].copy()}
        save_file(arrays | ({} if damage == "lost" else {weight: changed[damage]}), path)
    elif damage == "header":
        lines[0] = json.dumps(json.loads(lines[0]) | {"shapes": [1]})
    else:
        lines[2] = json.dumps(number | {damage: "soon"})
    (directory / LINES).write_text("\n".join(lines) + "\n")
    with pytest.raises(WeLoreError, match=r"(is broken|is not JSON) \(.*record (it|the trace) again"):
        Trace.load(directory)
