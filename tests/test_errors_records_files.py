import errno
import json
import os
import stat
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from welore.config import CalibrationConfig
from welore.errors import WeLoreError, choose
from welore.io.atomic import atomic_directory, atomic_write, read_json, write_json
from welore.io.claim import claimed, require_unread
from welore.records import Identity, Record
from welore.reporting.discover import machine_text


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


METHODS = {"full": 1, "lrc": 2, "nlrc": 3, "lora": 4, "galore": 5}


def test_known_name_gives_its_entry() -> None:
    assert choose("method", "lora", METHODS) == 4


def test_unknown_name_is_answered_with_the_nearest_and_all() -> None:
    with pytest.raises(WeLoreError) as caught:
        choose("method", "galroe", METHODS)
    assert str(caught.value) == "unknown method 'galroe'; did you mean 'galore'? (full, galore, lora, lrc, nlrc)"


def test_name_near_to_nothing_gets_no_guess() -> None:
    with pytest.raises(WeLoreError) as caught:
        choose("method", "xyz", METHODS)
    assert str(caught.value) == "unknown method 'xyz' (full, galore, lora, lrc, nlrc)"


# --- records ------------------------------------------------------------------------------------------------------


def some_record() -> Record:
    inputs = {"model": "größer", "label": None}
    return Record("perplexity", inputs, {"target": {"keep": 0.8}}, {"nll": 0.1 + 0.2, "tokens": 7})


def test_record_comes_back_equal(tmp_path: Path) -> None:
    record = some_record()
    record.save(tmp_path / "new" / "a.json")
    assert Record.load(tmp_path / "new" / "a.json") == record


def test_record_says_versions_machine_and_time() -> None:
    record = some_record()
    for package in ("welore", "torch", "transformers", "safetensors", "numpy"):
        assert record.versions[package] == metadata.version(package)
    assert record.versions["python"].split(".")[:2] == [str(part) for part in sys.version_info[:2]]
    assert record.machine["cores"] == os.cpu_count()
    assert record.machine["processor"]
    assert record.created.endswith("+00:00")


def test_record_names_every_package_that_computes() -> None:
    versions = some_record().versions
    for package in ("accelerate", "datasets", "tokenizers"):
        assert versions[package] == metadata.version(package)


def test_record_names_the_gpu_only_where_there_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n")
    monkeypatch.setattr("welore.records.DRIVER", driver)

    kinds = [torch.device("mps"), torch.device("cuda")]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert "gpu" not in some_record().machine
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: kinds[-1])
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    machine = some_record().machine
    assert (machine["gpu"], machine["gpus"], machine["cuda"]) == ("NVIDIA H100", 2, torch.version.cuda)
    assert machine["driver"] == "535.104.05"
    assert "2 x NVIDIA H100 (driver 535.104.05)" in machine_text(some_record())
    driver.unlink()
    assert "driver" not in some_record().machine
    del kinds[1]
    assert some_record().machine["gpu"] == "mps"  # which has no other name
    assert "cuda" not in some_record().machine


def test_keys_of_a_later_version_are_ignored_and_missing_ones_filled(tmp_path: Path) -> None:
    record = some_record()
    path = tmp_path / "a.json"
    record.save(path)
    content = read_json(path)
    write_json(path, content | {"of a later version": 1})
    assert Record.load(path) == record
    for name in ("versions", "machine", "created"):
        del content[name]
    write_json(path, content)
    older = Record.load(path)
    assert (older.numbers, older.versions, older.machine, older.created) == (record.numbers, {}, {}, "")


def test_settings_of_version_0_1_have_the_names_of_today(tmp_path: Path) -> None:
    compression = {"asked": {"params": 0.8}, "neurons": 3, "healing": {"steps": 64, "lr": 1e-4}, "calibration": {}}
    inputs = {"model": "m", "fingerprint": "f", "compression": compression, "data_sha256": "d"}
    settings = {"data": "c4", "length": 8, "steps": 5, "lr": 0.1, "warmup": 1, "accumulation": 2, "eval_every": 3}
    settings |= {"eval_items": 4, "save_every": 6, "task_data": None, "seed": 0}
    content = {"kind": "finetune", "inputs": inputs, "settings": settings, "numbers": {"tokens": 7}}
    write_json(tmp_path / "finetune.json", content)
    record = Record.load(tmp_path / "finetune.json")
    assert record.settings == {
        "dataset": "c4",
        "max_length": 8,
        "max_steps": 5,
        "learning_rate": 0.1,
        "warmup_steps": 1,
        "gradient_accumulation_steps": 2,
        "eval_steps": 3,
        "max_eval_samples": 4,
        "save_steps": 6,
        "task_dataset": None,
        "seed": 0,
    }
    assert record.inputs["model_fingerprint"] == "f"
    assert record.inputs["compression"] == {
        "target": {"keep": 0.8},
        "mlp_pruning": 3,
        "recovery": {"max_steps": 64, "learning_rate": 1e-4},
        "statistics": {},
    }
    assert record.numbers == {"tokens": 7}


def test_fingerprints_of_matrices_and_of_whole_models_are_told_apart(tmp_path: Path) -> None:
    for kind, name in {"compression": "targets_fingerprint", "pretrain": "model_fingerprint"}.items():
        content = {"kind": kind, "inputs": {"fingerprint": "f"}, "settings": {}, "numbers": {}}
        write_json(tmp_path / "a.json", content)
        assert Record.load(tmp_path / "a.json").inputs == {name: "f"}


def test_record_is_one_line_in_a_terminal_and_a_table_in_a_notebook() -> None:
    numbers = {"perplexity": 20.91234, "nll": 3.04, "parameter_ratio": 0.8, "bytes": 1_000_000, "items": [1]}
    record = Record("perplexity", {"model": "a<b", "label": None}, {}, numbers)
    assert repr(record) == "Record(perplexity of a<b: perplexity 20.91, parameter_ratio 0.8, bytes 1,000,000)"
    page = record._repr_html_()
    assert "<caption>perplexity of a&lt;b</caption>" in page
    assert "<tr><th>nll</th><td>3.04</td></tr>" in page
    assert "items" not in page


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_number_that_json_lacks_is_refused_and_the_old_record_stays(tmp_path: Path, number: float) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"nll": 1.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"nll": number})
    assert read_json(path) == {"nll": 1.5}
    assert names(tmp_path) == ["a.json"]


def test_record_with_a_number_that_json_lacks_is_not_lost(tmp_path: Path) -> None:
    numbers = {"nll": float("nan"), "table": [[1.0, float("inf")]], "more": {"x": float("-inf")}}
    Record("perplexity", {}, {}, numbers).save(tmp_path / "a.json")
    assert Record.load(tmp_path / "a.json").numbers == {"nll": None, "table": [[1.0, None]], "more": {"x": None}}


def test_name_with_bytes_that_are_no_letters_can_be_written(tmp_path: Path) -> None:
    identity = Identity(os.fsdecode(b"models/\xff"), "f")
    assert identity.name == "models/?"
    Record("perplexity", {"model": os.fsdecode(b"\xff")}, {}, {}).save(tmp_path / "a.json")
    assert Record.load(tmp_path / "a.json").inputs["model"] == os.fsdecode(b"\xff")


@pytest.mark.parametrize("content", [{"kind": "perplexity"}, ["a", "list"], {"kind": "x", "extra": 1}])
def test_json_that_is_no_record_is_refused(tmp_path: Path, content: object) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(WeLoreError, match=r"a\.json is not a record of welore"):
        Record.load(tmp_path / "a.json")


@pytest.mark.parametrize("content", [b"", b'{"kind": "perpl', b"\xff\xfe\x00", b"kind: perplexity\nnll: 1\n"])
def test_broken_json_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(WeLoreError, match=r"a\.json is not JSON") as caught:
        Record.load(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_missing_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeLoreError, match=r"none\.json does not exist"):
        Record.load(tmp_path / "none.json")


# --- whole files --------------------------------------------------------------------------------------------------


def test_file_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    with atomic_write(path) as partial:
        partial.write_text("half")
        assert not path.exists()
        partial.write_text("whole")
    assert path.read_text() == "whole"
    assert names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_failed_write_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)), atomic_write(path) as partial:
        partial.write_text("ne")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_place_where_no_file_can_be_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WeLoreError, match="is a directory: name a file"), atomic_write(tmp_path):
        pass
    with pytest.raises(WeLoreError, match="cannot be made a directory"), atomic_write(tmp_path / "file" / "a.json"):
        pass


# --- whole directories --------------------------------------------------------------------------------------------


def result(path: Path, text: str) -> None:
    path.mkdir(exist_ok=True)
    for name in ("config.json", "weights"):
        (path / name).write_text(text)


def content(path: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in path.iterdir()}


def test_directory_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out"
    with atomic_directory(path) as unfinished:
        result(unfinished, "new")
        assert not path.exists()
    assert content(path) == {"config.json": "new", "weights": "new"}
    assert names(path.parent) == ["out"]


def test_leftover_of_a_killed_run_does_not_get_into_the_result(tmp_path: Path) -> None:
    path = tmp_path / "out"
    result(tmp_path / ".out.welore-partial", "killed")
    (tmp_path / ".out.welore-partial" / "model-00001-of-00007.safetensors").write_text("killed")
    with atomic_directory(path) as unfinished:
        assert not list(unfinished.iterdir())
        result(unfinished, "new")
    assert content(path) == {"config.json": "new", "weights": "new"}
    assert names(tmp_path) == ["out"]


def test_old_result_comes_back_after_a_kill_between_the_two_renames(tmp_path: Path) -> None:
    result(tmp_path / ".out.welore-replaced", "old")
    with pytest.raises(WeLoreError, match="exists already"), atomic_directory(tmp_path / "out"):
        pass
    assert content(tmp_path / "out") == {"config.json": "old", "weights": "old"}
    assert names(tmp_path) == ["out"]


def test_neighbours_of_a_user_are_left_alone(tmp_path: Path) -> None:
    for name in ("out.partial", "out.replaced", "a.txt.partial"):
        result(tmp_path / name, "mine")
    with atomic_directory(tmp_path / "out") as unfinished:
        result(unfinished, "new")
    write_json(tmp_path / "a.txt", 1)
    for name in ("out.partial", "out.replaced", "a.txt.partial"):
        assert content(tmp_path / name)["weights"] == "mine"


def test_link_at_a_hidden_name_is_not_followed(tmp_path: Path) -> None:
    result(tmp_path / "elsewhere", "mine")
    (tmp_path / ".a.json.welore-partial").symlink_to(tmp_path / "elsewhere" / "weights")
    (tmp_path / ".out.welore-partial").symlink_to(tmp_path / "elsewhere")
    write_json(tmp_path / "a.json", 1)
    with atomic_directory(tmp_path / "out") as unfinished:
        result(unfinished, "new")
    assert content(tmp_path / "elsewhere") == {"config.json": "mine", "weights": "mine"}
    assert not (tmp_path / "a.json").is_symlink()
    assert not (tmp_path / "out").is_symlink()


def test_modes_are_those_of_the_umask_whatever_the_library(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_directory(tmp_path / "out") as unfinished:
            save_file({"x": np.ones(3)}, unfinished / "weights")
            (unfinished / "weights").chmod(0o600)  # as some versions of safetensors do
        with atomic_write(tmp_path / "a.safetensors") as partial:
            partial.unlink()
            save_file({"x": np.ones(3)}, partial)
            partial.chmod(0o600)
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (*tmp_path.rglob("*"),)}
    assert modes == {"out": 0o750, "weights": 0o640, "a.safetensors": 0o640}


def test_of_a_link_to_a_file_the_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.json").symlink_to(tmp_path / "big disk.json")
    write_json(tmp_path / "a.json", 1)
    assert (tmp_path / "a.json").is_symlink()
    assert (tmp_path / "big disk.json").read_text() == "1\n"


def test_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WeLoreError, match="is a pipe, a device or a socket"):
        write_json(tmp_path / "pipe", 1)
    assert (tmp_path / "pipe").is_fifo()


DISK_FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
    RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
]


@pytest.mark.parametrize("error", DISK_FULL, ids=["python", "safetensors", "torch"])
def test_full_disk_is_one_sentence(tmp_path: Path, error: Exception) -> None:
    for write in (atomic_write, atomic_directory):
        sentence = pytest.raises(WeLoreError, match=r"out cannot be written: .*(No space|too large|disk full)")
        with sentence, write(tmp_path / "out"):
            raise error
    assert names(tmp_path) == []


# --- the claim of a command on its output ----------------------------------------------------------------------------


def test_second_command_on_an_output_is_refused_and_nothing_stays(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out.json"
    with claimed(out):
        with pytest.raises(WeLoreError, match=r"another command is writing .*out\.json"), claimed(out):
            pass
        with claimed(tmp_path / "deep" / "other.json"):
            pass
    with claimed(out):  # the refused one has not taken the lock away
        pass
    assert names(tmp_path) == []


def test_lock_of_a_killed_process_does_not_hold(tmp_path: Path) -> None:
    code = "import os, sys\nfrom welore.io.claim import claimed\nwith claimed(sys.argv[1]): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "a"], check=False).returncode == -9
    assert names(tmp_path) == [".a.welore-lock"]
    with claimed(tmp_path / "a"):
        pass
    assert names(tmp_path) == []


def test_output_is_never_something_that_is_read(tmp_path: Path) -> None:
    model = tmp_path / "model"
    result(model, "mine")
    (tmp_path / "text.txt").touch()
    (tmp_path / "link.txt").symlink_to(tmp_path / "text.txt")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "config.json").symlink_to(model / "config.json")
    config = CalibrationConfig(dataset=f"wikitext2:1,{tmp_path}/text.txt:2")
    for output, read in (
        (model / "config.json", model),
        (model / "weights", str(model)),
        (model, model),
        (tmp_path, model),
        (model / "config.json", tmp_path / "snapshot"),
        (tmp_path / "text.txt", config),
        (tmp_path / "link.txt", config),
        (tmp_path, {f"{tmp_path}/text.txt": 1.0}),
    ):
        with pytest.raises(WeLoreError, match="which is read: name another output"):
            require_unread(output, read)
    some_record().save(model / "perplexity.json")
    for output in (model / "perplexity.json", model / "new.json", model / "small", tmp_path / "out"):
        require_unread(output, model, config, "wikitext2", 0.5, None)


def test_directory_that_cannot_be_renamed_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(WeLoreError, match="is a mount point"), claimed("/proc", marker="config.json"):
        pass
    with pytest.raises(WeLoreError, match="cannot be written"), claimed("/proc/out", marker="config.json"):
        pass


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_failed_run_leaves_the_old_result_untouched(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "out"
    result(path, "old")
    with pytest.raises(type(error)), atomic_directory(path, overwrite=True) as unfinished:
        (unfinished / "config.json").write_text("new")
        raise error
    assert content(path) == {"config.json": "old", "weights": "old"}
    assert names(tmp_path) == ["out"]


def test_result_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "out"
    result(path, "old")
    (path / "of the old one").write_text("old")
    with pytest.raises(WeLoreError, match="exists already.*--overwrite"), atomic_directory(path):
        pass
    assert content(path)["config.json"] == "old"
    with atomic_directory(path, overwrite=True) as unfinished:
        result(unfinished, "new")
    assert content(path) == {"config.json": "new", "weights": "new"}


def test_overwrite_never_deletes_what_is_no_result(tmp_path: Path) -> None:
    home, file = tmp_path / "home", tmp_path / "thesis.tex"
    home.mkdir()
    (home / "thesis.tex").write_text("years")
    file.write_text("years")
    for path in (home, file):
        with pytest.raises(WeLoreError, match="not a result of ours"), atomic_directory(path, overwrite=True):
            pass
    assert content(home) == {"thesis.tex": "years"}
    assert file.read_text() == "years"


def test_empty_directory_is_taken_even_when_it_is_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with atomic_directory(".") as unfinished:
        result(unfinished, "new")
    assert content(tmp_path / "out") == {"config.json": "new", "weights": "new"}


def test_of_a_link_the_directory_behind_it_is_replaced(tmp_path: Path) -> None:
    result(tmp_path / "big disk", "old")
    (tmp_path / "out").symlink_to(tmp_path / "big disk")
    with atomic_directory(tmp_path / "out", overwrite=True) as unfinished:
        result(unfinished, "new")
    assert (tmp_path / "out").is_symlink()
    assert content(tmp_path / "big disk") == {"config.json": "new", "weights": "new"}


def test_model_that_is_read_is_never_replaced(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoint-100"
    checkpoint.mkdir(parents=True)
    (tmp_path / "link").symlink_to(checkpoint)
    for out in (checkpoint, tmp_path / "run", tmp_path / "link", checkpoint / ".." / "checkpoint-100"):
        with pytest.raises(WeLoreError, match="is or holds .*, which is read"):
            require_unread(out, checkpoint)
    require_unread(checkpoint / "small", checkpoint)
    require_unread(tmp_path / "run2", checkpoint)


# Kills a replacement at its first, second, ... access to the file system, until one is not killed any more.
KILLED_AT_EVERY_MOMENT = """
import itertools, json, os, signal, sys
from pathlib import Path
from welore.io.atomic import atomic_directory

NAMES = ("config.json", "tokenizer.json", "weights")
out = Path(sys.argv[1]) / "out"

def write(text):
    with atomic_directory(out, overwrite=True) as unfinished:
        for name in NAMES:
            (unfinished / name).write_text(text)

def state():
    if not out.exists():
        return "absent"
    found = {path.name: path.read_text() for path in out.iterdir()}
    return next((text for text in ("old", "new") if found == dict.fromkeys(NAMES, text)), "torn")

states = []
for moment in itertools.count(1):
    write("old")
    assert os.listdir(out.parent) == ["out"], "a leftover stays"
    child = os.fork()
    if child == 0:
        accesses = itertools.count(1)
        def kill(event, arguments):
            if event.startswith(("os.", "shutil.", "open")) and next(accesses) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(kill)
        write("new")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    states.append(state())
    if status == 0:
        break
print(json.dumps(states))
"""


def test_run_killed_at_any_moment_leaves_the_old_result_the_new_one_or_none(tmp_path: Path) -> None:
    run = [sys.executable, "-c", KILLED_AT_EVERY_MOMENT, str(tmp_path)]
    states = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert len(states) > 10
    assert "torn" not in states
    assert states[0] == "old"
    assert states[-1] == "new"
