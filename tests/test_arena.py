"""Methods compared by one program: every cell is a record, made once."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from conftest import build
from toys import characters, checkpoint, weights

DIRECTORY = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A benchmark as a module, for the time of a test."""
    monkeypatch.syspath_prepend(DIRECTORY)

    def load(name: str) -> ModuleType:
        module = importlib.import_module(name)
        monkeypatch.delitem(sys.modules, name)
        return module

    return load


def numbers(record: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(record.read_text("utf-8"))["numbers"]
    return content


@pytest.mark.slow
def test_arena_makes_a_record_for_every_cell_once_and_the_tables_read_them(
    benchmark: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arena, text, out = benchmark("arena"), tmp_path / "text.txt", tmp_path / "arena" / "small"
    monkeypatch.setattr(arena, "HERE", tmp_path)
    model = checkpoint(tmp_path / "small", None, intermediate_size=128)
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    options = f"--keep 0.8 --tokens 128 --calibrate-on {text} --texts foxes={text},dogs={text} --windows 1 --length 64"
    methods = ["plain-uniform", "svd-llm", "magnitude"]
    monkeypatch.setattr(sys, "argv", ["arena.py", str(model), "--methods", *methods, *options.split()])
    arena.main()
    cells = {path.stem: numbers(path) for path in out.glob("*.json")}
    assert set(cells) == {"dense-1-0", *(f"{method}-0.8-0" for method in methods)}
    assert "kl_mean_foxes" not in cells.pop("dense-1-0")
    for cell in cells.values():
        assert cell["parameter_ratio"] == pytest.approx(0.8, abs=0.03)
        assert cell["kl_mean_foxes"] == cell["kl_mean_dogs"] > 0
        assert cell["seconds"] > 0
    monkeypatch.setattr(arena, "run", None)  # what is there is not made again
    arena.main()
    tables = benchmark("tables")
    monkeypatch.setattr(tables, "HERE", tmp_path)
    assert len(tables.arena("arena/small").splitlines()) == 2 + len(cells)


def test_neurons_are_chosen_by_their_weights(benchmark: Callable[[str], ModuleType], tmp_path: Path) -> None:
    baselines, dense = benchmark("baselines"), build("llama", intermediate_size=128)
    large = torch.arange(1, 128, 2)
    for layer in dense.model.layers:
        for up in (layer.mlp.gate_proj, layer.mlp.up_proj):
            up.weight.data[large] *= 10
    dense.save_pretrained(tmp_path / "dense")
    characters().save_pretrained(tmp_path / "dense")
    for score in baselines.SCORES:
        ratio = baselines.narrow(tmp_path / "dense", tmp_path / score, score, 0.7, 16)
        narrow = weights(tmp_path / score)
        count = narrow["model.layers.0.mlp.down_proj.weight"].shape[1]
        assert 64 <= count < 128
        assert ratio == pytest.approx(0.7, abs=0.03)
        for i, layer in enumerate(dense.model.layers):
            stay = narrow[f"model.layers.{i}.mlp.gate_proj.weight"]
            rows = (layer.mlp.gate_proj.weight[:, None] == stay).all(2).nonzero()
            assert set(large.tolist()) <= set(rows[:, 0].tolist())
            assert torch.equal(
                narrow[f"model.layers.{i}.mlp.down_proj.weight"], layer.mlp.down_proj.weight[:, rows[:, 0]]
            )
