"""The heap of the command line's process, for one bar: `compress` of SmolLM2 takes at most 64 MB above the imports.

benchmarks/memory.py measures it: 28 MB with this call (41 with two workers), 260 to 310 MB without, because glibc keeps
what threads have freed. The setting is for the whole process and cannot be undone, so no library function makes it.
"""

import ctypes
import platform

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # M_TRIM_THRESHOLD and so on, of malloc.h


def return_freed_memory(large: int = 256 << 10) -> None:
    """Make glibc keep one heap for all threads and give freed blocks of `large` bytes back; no effect elsewhere.

    Every such block is new memory to the system, which costs time: a process that trains wants a larger bound.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((TRIM_THRESHOLD, 4 * large), (MMAP_THRESHOLD, large), (ARENA_MAX, 1)):
            libc.mallopt(option, value)
