from pathlib import Path

import pytest
import torch

from welore.io import memory
from welore.io.memory import free_memory

MACHINE = 64_000_000 << 10


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Linux machine with 64 GB available, on which this process is in no control group."""
    files = {"MEMINFO": "MemTotal: 99000000 kB\nMemAvailable:   64000000 kB\n", "MEMBERSHIP": ""}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        monkeypatch.setattr(memory, name, tmp_path / name)
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "groups")
    return tmp_path


def group(directory: Path, **files: object) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name.replace("__", ".")).write_text(f"{content}\n")


def test_the_host_has_what_the_kernel_says_is_available(system: Path) -> None:
    assert free_memory("cpu") == MACHINE


def test_a_container_has_what_the_tightest_of_its_groups_leaves(system: Path) -> None:
    (system / "MEMBERSHIP").write_text("0::/slurm/job\n")
    stat = "anon 5\ninactive_file 100"
    group(system / "groups" / "slurm" / "job", memory__max="max", memory__current=900, memory__stat=stat)
    group(system / "groups" / "slurm", memory__max=5000, memory__current=1100, memory__stat=stat)
    assert free_memory("cpu") == 5000 - (1100 - 100)


def test_control_groups_of_the_first_version_are_read_too(system: Path) -> None:
    (system / "MEMBERSHIP").write_text("4:cpu,cpuacct:/elsewhere\n3:memory:/docker/1f\n")
    stat = "total_inactive_file 20"
    files = {"memory__limit_in_bytes": 700, "memory__usage_in_bytes": 90, "memory__stat": stat}
    group(system / "groups" / "memory", **files)  # a container sees its own group as the outermost
    assert free_memory("cpu") == 700 - (90 - 20)


def test_a_machine_without_these_files_has_all_its_memory(system: Path) -> None:
    (system / "MEMINFO").unlink()
    free = free_memory("cpu")
    assert free is not None
    assert free > 1 << 28


def test_memory_that_torch_keeps_on_a_card_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert free_memory("cuda:1") == 1200


def test_nothing_is_known_of_a_device_that_does_not_tell() -> None:
    assert free_memory("meta") is None
