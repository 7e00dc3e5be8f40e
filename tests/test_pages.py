"""Pages of mapped files that are given back, and read again."""

import mmap
import platform
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from welore.io import pages
from welore.io.pages import give_back, give_back_freed

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="no /proc/self/maps")


@LINUX
def test_pages_of_a_file_are_given_back_and_read_again(tmp_path: Path) -> None:
    numbers = torch.arange(1 << 18, dtype=torch.float32)
    save_file({"x": numbers}, tmp_path / "x.safetensors")
    mapped = load_file(tmp_path / "x.safetensors")["x"]
    mapped[5] = -1  # a page of our own
    given = give_back([mapped])
    assert numbers.nbytes - 2 * 65536 <= given <= numbers.nbytes
    numbers[5] = -1
    assert torch.equal(mapped, numbers)


@LINUX
def test_memory_that_no_file_holds_is_left_alone() -> None:
    assert give_back([torch.ones(1 << 18), torch.ones(3), torch.ones(1 << 18, device="meta")]) == 0


def test_without_linux_nothing_is_given_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pages, "MAPS", tmp_path / "maps")
    assert give_back([torch.ones(1 << 18)]) == 0
    give_back_freed()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_was_freed_is_given_back() -> None:
    blocks = [torch.ones(4096) for _ in range(4096)]  # 64 MB, each below the size for which glibc asks the system
    last = blocks.pop()  # the heap cannot shrink below it
    del blocks
    before = resident()
    give_back_freed()
    assert before - resident() > 32 << 20
    assert last.sum() == 4096


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
