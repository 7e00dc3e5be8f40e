"""Restart, corruption and several processes: the result is always that of an undisturbed run."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import welore
from conftest import build, compress
from processes import command, forked, launched
from welore.config import CalibrationConfig, CompressionConfig
from welore.errors import WeLoreError
from welore.io import parallel
from welore.io.context import RunContext
from welore.io.parallel import Processes, default_workers, join_processes, launched_rank, parallel_map
from welore.io.progress import silent
from welore.io.resume import Workspace, restart_key


def test_group_comes_back_and_can_be_dropped(tmp_path: Path) -> None:
    space = Workspace(tmp_path / "w", "key")
    space.open()
    space.store("model.layers.1.q", {"x": torch.arange(6).reshape(2, 3)})
    assert torch.equal(space.fetch("model.layers.1.q")["x"], torch.arange(6).reshape(2, 3))
    assert space.fetch("model.layers.10.q") is None
    space.drop("model.layers.1.q")
    assert space.fetch("model.layers.1.q") is None


@pytest.mark.parametrize("damage", ["cut", "empty", "value", "name"])
def test_damaged_group_is_not_there(tmp_path: Path, damage: str) -> None:
    space = Workspace(tmp_path / "w", "key")
    space.open()
    space.store("q", {"x": torch.ones(50)})
    (path,) = (tmp_path / "w").glob("q.*")
    content = path.read_bytes()
    value, name = content[:-1] + b"\xff", content.replace(b'"x"', b'"y"')
    path.write_bytes({"cut": content[:-9], "empty": b"", "value": value, "name": name}[damage])
    assert space.fetch("q") is None
    assert not path.exists()


def test_other_key_starts_anew_and_the_same_continues(tmp_path: Path) -> None:
    for key, found in (("a", False), ("a", True), ("b", False)):
        space = Workspace(tmp_path / "w", key)
        space.open()
        assert (space.fetch("q") is not None) == found
        space.store("q", {"x": torch.ones(2)})


def test_directory_of_somebody_else_is_never_deleted(saved, tmp_path: Path) -> None:
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "thesis.txt").write_text("years of work")
    with pytest.raises(WeLoreError, match=r"holds thesis\.txt: move it"):
        compress(saved("llama"), tmp_path / "out", rank_reduction=0.4)
    assert (tmp_path / "out.work" / "thesis.txt").read_text() == "years of work"


def test_output_may_be_written_with_a_slash(saved, tmp_path: Path) -> None:
    compress(saved("llama"), f"{tmp_path}/out/", rank_reduction=0.4)
    assert {p.name for p in tmp_path.iterdir() if p.name.startswith("out")} == {"out"}


def test_results_come_in_order_whatever_the_workers() -> None:
    for workers in (1, 3):
        assert parallel_map(lambda x: x * x, range(20), [1.0] * 20, workers=workers, progress=silent, label="") == [
            x * x for x in range(20)
        ]


def test_the_dearest_item_begins_and_results_stay_in_order() -> None:
    begun: list[int] = []
    costs = [1.0, 5.0, 3.0, 5.0]

    def work(x: int) -> int:
        begun.append(x)
        return x

    assert parallel_map(work, range(4), costs, workers=1, progress=silent, label="") == [0, 1, 2, 3]
    assert begun == [1, 3, 2, 0]


@pytest.mark.parametrize(("free", "at_once"), [(100, 2), (39, 1), (None, 4)])
def test_no_more_items_run_at_once_than_memory_holds(
    monkeypatch: pytest.MonkeyPatch, free: int | None, at_once: int
) -> None:
    monkeypatch.setattr(parallel, "free_memory", lambda device: free)
    running, most, lock = [0], [0], threading.Lock()

    def work(x: int) -> int:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.02)
        with lock:
            running[0] -= 1
        return x

    context = RunContext(device=torch.device("cpu"), workers=4)
    assert context.map(work, range(8), [1.0] * 8, "", [40] * 8) == list(range(8))
    assert most[0] == at_once


def test_two_items_at_most_run_on_a_gpu() -> None:
    assert default_workers(torch.device("cuda")) == 2
    assert default_workers(torch.device("mps")) == 1
    assert RunContext(device=torch.device("cuda"), workers=16).at_once == 2
    assert RunContext(device=torch.device("cpu"), workers=16).at_once == 16


def test_first_error_stops_the_rest() -> None:
    seen = []

    def work(x: int) -> None:
        seen.append(x)
        time.sleep(0.001)
        if x == 3:
            raise WeLoreError("three is broken")

    with pytest.raises(WeLoreError, match="three is broken"):
        parallel_map(work, range(1000), [1.0] * 1000, workers=2, progress=silent, label="")
    assert len(seen) < 1000


def test_workers_see_one_blas_thread_and_leave_the_rest_as_it_was() -> None:
    before = torch.get_num_threads()
    assert parallel_map(lambda _: torch.get_num_threads(), [0], [1.0], workers=1, progress=silent, label="") == [1]
    assert torch.get_num_threads() == before


def test_impossible_number_of_workers_is_one_sentence() -> None:
    with pytest.raises(WeLoreError, match="workers is 0"):
        RunContext.create(workers=0)


def test_number_of_a_launcher_that_is_none_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert join_processes().size == 1
    monkeypatch.setenv("WORLD_SIZE", "")
    assert join_processes().size == 1
    monkeypatch.setenv("WORLD_SIZE", "two")
    for ask in (join_processes, launched_rank):
        with pytest.raises(WeLoreError, match="WORLD_SIZE is 'two' in the environment"):
            ask()


def test_processes_share_all_items_and_none_twice() -> None:
    items = list(range(11))
    shares = [Processes(rank, 3).share(items) for rank in range(3)]
    assert sorted(x for share in shares for x in share) == items


def test_processes_share_the_costs_evenly() -> None:
    costs = [1.0, 9.0, 2.0, 8.0, 1.0, 3.0]
    shares = [Processes(rank, 3).share("abcdef", costs) for rank in range(3)]
    assert shares == [["b"], ["d"], ["a", "c", "e", "f"]]


def files_of(directory: Path) -> dict[str, bytes]:
    """Everything but the record, which tells the time."""
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir()) if p.name != "compression.json"}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("label", ["singular values", "factors", "writing"])
@pytest.mark.parametrize("after", [0, 5])
def test_run_stopped_anywhere_continues_to_the_same_bytes(saved, tmp_path: Path, label: str, after: int) -> None:
    source = saved("llama")
    compress(source, tmp_path / "undisturbed", rank_reduction=0.4)
    computed = []

    def stopping(items: Iterable[tuple[Any, float]], what: str, total: float) -> Iterator[Any]:
        for number, (item, _) in enumerate(items):
            if what == label and number == after:
                raise Killed
            yield item

    def counting(items: Iterable[tuple[Any, float]], what: str, total: float) -> Iterator[Any]:
        computed.append(what)
        return silent(items, what, total)

    with pytest.raises(Killed):
        compress(source, tmp_path / "out", rank_reduction=0.4, workers=1, progress=stopping)
    assert not (tmp_path / "out").exists()
    kept = list((tmp_path / "out.work").glob("*.values.*"))
    assert len(kept) >= (after if label == "singular values" else 14)

    compress(source, tmp_path / "out", rank_reduction=0.4, workers=2, progress=counting)
    assert computed == ["singular values", "factors", "writing"]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")
    assert not (tmp_path / "out.work").exists()


def test_corrupt_partial_work_is_made_again(saved, tmp_path: Path) -> None:
    source = saved("gpt2")
    compress(source, tmp_path / "undisturbed", rank_reduction=0.4)

    def stopping(items: Iterable[tuple[Any, float]], what: str, total: float) -> Iterator[Any]:
        yield from silent(items, what, total)
        if what == "factors":
            raise Killed

    with pytest.raises(Killed):
        compress(source, tmp_path / "out", rank_reduction=0.4, progress=stopping)
    kept = sorted((tmp_path / "out.work").glob("*.safetensors"))
    assert any(".factored-" in path.name for path in kept)
    for path in kept:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    compress(source, tmp_path / "out", rank_reduction=0.4)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")


def test_work_of_a_model_that_has_changed_since_is_not_used(saved, tmp_path: Path) -> None:
    source = saved("llama")

    def stopping(items: Iterable[tuple[Any, float]], what: str, total: float) -> Iterator[Any]:
        yield from silent(items, what, total)
        raise Killed

    with pytest.raises(Killed):
        compress(source, tmp_path / "out", rank_reduction=0.4, progress=stopping)
    file = source / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 0x40  # the last number of some matrix: the fingerprint, a sample, cannot see it
    file.write_bytes(content)
    compress(source, tmp_path / "out", rank_reduction=0.4)
    compress(source, tmp_path / "undisturbed", rank_reduction=0.4)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")


def test_work_on_a_model_in_memory_that_has_changed_since_is_not_used(tmp_path: Path) -> None:
    model = build("llama", torch.bfloat16)

    def stopping(items: Iterable[tuple[Any, float]], what: str, total: float) -> Iterator[Any]:
        yield from silent(items, what, total)
        raise Killed

    with pytest.raises(Killed):
        welore.analyze(model, work_dir=tmp_path / "work", progress=stopping)
    model.model.layers[0].mlp.up_proj.weight.data[-1, -1] += 1  # the fingerprint, a sample, cannot see it
    again, fresh = welore.analyze(model, work_dir=tmp_path / "work"), welore.analyze(model)
    assert all((again.values[name] == fresh.values[name]).all() for name in fresh.values)


def test_work_of_other_versions_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    key = restart_key("weights", {"seed": 0})
    assert restart_key("weights", {"seed": 0}) == key
    for package in ("welore", "torch", "transformers"):
        monkeypatch.setattr("welore.io.resume.version", lambda name, new=package: "9" if name == new else version(name))
        assert restart_key("weights", {"seed": 0}) != key


@pytest.mark.parametrize("changed", ["config.json", "tokenizer.json", "text"])
def test_work_that_rests_on_another_file_is_not_used(saved, tokenizer, tmp_path: Path, changed: str) -> None:
    source, text = saved("llama"), tmp_path / "text.txt"
    tokenizer.save_pretrained(source)
    text.write_text(" ".join(f"w{i * i % 96}" for i in range(3000)))
    calibration = CalibrationConfig(str(text), num_tokens=128, max_length=32)
    ours: dict[str, Any] = {"config": CompressionConfig(keep=0.7, preset="fast"), "calibration": calibration}

    def stopping(items: Iterable[tuple[Any, float]], what: str, total: float) -> Iterator[Any]:
        yield from silent(items, what, total)
        if what == "singular values":
            raise Killed

    with pytest.raises(Killed):
        welore.compress(source, tmp_path / "out", **ours, progress=stopping)
    path, old, new = {
        "config.json": (source / "config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5'),
        "tokenizer.json": (source / "tokenizer.json", '"w4": 4', '"w4": 7'),
    }.get(changed, (text, "w4 ", "w5 "))
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new))
    welore.compress(source, tmp_path / "out", **ours)
    welore.compress(source, tmp_path / "undisturbed", **ours)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")


def test_mistake_of_the_user_leaves_no_work_behind(saved, tmp_path: Path) -> None:
    with pytest.raises(WeLoreError, match="cannot be reached"):
        compress(saved("llama"), tmp_path / "out", rank_reduction=0.999)
    assert not (tmp_path / "out.work").exists()


@pytest.mark.usefixtures("one_thread")
def test_killed_process_continues(saved, tmp_path: Path) -> None:
    source, out = saved("llama"), tmp_path / "out"

    def stop(items: Iterable[tuple[Any, float]], what: str, total: float) -> Iterator[Any]:
        for number, (item, _) in enumerate(items):
            if what == "factors" and number == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item

    ended = forked(lambda: compress(source, out, rank_reduction=0.4, progress=stop))
    assert ended.status == -signal.SIGKILL, ended.err
    assert not out.exists()
    assert (tmp_path / "out.work").is_dir()
    compress(source, out, rank_reduction=0.4)
    compress(source, tmp_path / "undisturbed", rank_reduction=0.4)
    assert files_of(out) == files_of(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    "label",
    [
        "the model writes",
        "windows",
        "blocks, forward",
        "blocks, backward",
        "neurons",
        "neurons refitted",
        "singular values",
    ],
)
def test_run_that_makes_its_own_calibration_continues_to_the_same_bytes(
    saved, tokenizer, tmp_path: Path, label: str
) -> None:
    source = saved("llama")
    tokenizer.save_pretrained(source)
    text = CalibrationConfig(num_tokens=256, batch_size=1, whole_model=not label.startswith("blocks"))
    ours: dict[str, Any] = {"keep": 0.6, "mlp_pruning": 0.2, "calibration": text, "workers": 1}
    compress(source, tmp_path / "undisturbed", **ours)

    def stopping(items: Iterable[tuple[Any, float]], what: str, total: float) -> Iterator[Any]:
        for number, (item, _) in enumerate(items):
            if what == label and number == 1:
                raise Killed
            yield item

    with pytest.raises(Killed):
        compress(source, tmp_path / "out", **ours, progress=stopping)
    assert (tmp_path / "out.work").is_dir()
    compress(source, tmp_path / "out", **ours)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")
    assert not (tmp_path / "out.work").exists()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "settings",
    [{"rank_reduction": 0.4}, {"keep": 0.7, "num_tokens": 128}, {"keep": 0.6, "num_tokens": 128, "mlp_pruning": 0.3}],
    ids=["paper", "ours", "neurons"],
)
def test_two_processes_write_the_same_bytes_as_one(saved, tokenizer, tmp_path: Path, settings: dict[str, Any]) -> None:
    source = saved("llama")
    tokenizer.save_pretrained(source)
    compress(source, tmp_path / "undisturbed", **settings)
    words = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]
    both = launched(command("compress", source, tmp_path / "out", *words))
    for ended in both:
        assert ended.status == 0, ended.err
    assert "".join(ended.out for ended in both).count("achieved ERR") == 1
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")
    assert not (tmp_path / "out.work").exists()


def test_checkpoint_is_read_rightly_by_several_threads(saved) -> None:
    from welore.models.source import CheckpointSource

    weights = CheckpointSource(saved("llama"))
    expected = {t.name: weights.read(t) for t in weights.targets}
    wrong = []

    def read() -> None:
        for _ in range(20):
            wrong.extend(t.name for t in weights.targets if not torch.equal(weights.read(t), expected[t.name]))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.slow
def test_mistake_that_processes_meet_is_said_once(saved, tokenizer, tmp_path: Path) -> None:
    source = saved("llama")
    tokenizer.save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "welore"]
    launch += ["compress", str(source), str(tmp_path / "out"), "--rank-reduction", "0.4"]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    run = subprocess.run(launch, check=False, capture_output=True, text=True, env=environment)
    said = [line for line in run.stderr.splitlines() if line.startswith("welore: ")]
    assert len(said) == 1, run.stderr
    assert "up_proj.weight holds NaN or Inf" in said[0]
    assert not (tmp_path / "out").exists()
