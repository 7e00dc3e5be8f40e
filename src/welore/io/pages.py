"""Memory given back to the system: of mapped files, which it reads again when they are needed, and what was freed."""

import ctypes
import mmap
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from torch import Tensor

MAPS, PAGEOUT = Path("/proc/self/maps"), 21  # MADV_PAGEOUT of Linux 5.4: nothing is lost, whatever the memory is


def give_back(tensors: Iterable[Tensor]) -> int:
    """Take tensors whose numbers lie in a mapped file out of the resident set; the bytes. 0 where there is no Linux.

    The weights of a model that was loaded are such: every page that was read stays until something else wants the room.
    """
    ranges = [_pages(tensor) for tensor in tensors if tensor.device.type == "cpu"]
    ranges = [(first, last) for first, last in ranges if first < last]
    if not ranges or not MAPS.exists():
        return 0
    files, given = _mapped_files(), 0
    for first, last in ranges:
        if any(low <= first and last <= high for low, high in files):
            with suppress(AttributeError):  # a C library without it
                ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), PAGEOUT)
                given += last - first
    return given


def _pages(tensor: Tensor) -> tuple[int, int]:
    """First and last address of the pages that hold nothing but this tensor."""
    start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
    return -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE


def give_back_freed() -> None:
    """Give the system the blocks that glibc keeps for the next allocation; no effect elsewhere."""
    if MAPS.exists():
        with suppress(AttributeError):  # of another C library
            ctypes.CDLL(None).malloc_trim(0)


def _mapped_files() -> list[tuple[int, int]]:
    """First and last address of the files of tensors that are mapped into this process."""
    rows = (line.split(maxsplit=5) for line in MAPS.read_text(errors="replace").splitlines())
    ranges = (row[0].split("-") for row in rows if len(row) > 5 and row[5].startswith("/") and ".so" not in row[5])
    return [(int(low, 16), int(high, 16)) for low, high in ranges]
