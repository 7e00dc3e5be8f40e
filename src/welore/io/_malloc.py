"""The heap of the command line's process, for one bar: `compress` of SmolLM2 takes at most 64 MB above the imports.

benchmarks/memory.py measures it: 53 MB with this call, 260 to 310 MB without, because glibc keeps what threads have
freed. The setting is for the whole process and cannot be undone, so no library function makes it.
"""

import ctypes
import platform

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # M_TRIM_THRESHOLD and so on, of malloc.h
OPTIONS = {TRIM_THRESHOLD: 16 << 20, MMAP_THRESHOLD: 1 << 20, ARENA_MAX: 1}


def return_freed_memory() -> None:
    """Make glibc keep one heap for all threads and give large freed blocks back at once; no effect elsewhere."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in OPTIONS.items():
            libc.mallopt(option, value)
