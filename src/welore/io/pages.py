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
    if not MAPS.exists():
        return 0
    files = _mapped_files()
    given = 0
    for tensor in tensors:
        start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        if tensor.device.type == "cpu" and first < last and any(low <= first and last <= high for low, high in files):
            with suppress(AttributeError):  # a C library without it
                ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), PAGEOUT)
                given += last - first
    return given


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
