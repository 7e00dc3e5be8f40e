"""Memory that is free: of the machine, of the container that a process runs in, of a card."""

import os
from pathlib import Path
from typing import Any

import torch

CGROUPS, MEMBERSHIP, MEMINFO = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"), Path("/proc/meminfo")
LIMITS = {  # of the two versions of control groups: limit, use, and the part of it that can be dropped
    "2": ("memory.max", "memory.current", "inactive_file"),
    "1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_memory(device: str | torch.device) -> int | None:
    """Bytes that this process can still allocate on a device; None where nothing tells."""
    device = torch.device(device)
    if device.type == "cpu":
        return _free_on_host()
    module: Any = getattr(torch, device.type, None)
    if device.type == "mps":
        return int(module.recommended_max_memory() - module.driver_allocated_memory())
    if not hasattr(module, "mem_get_info"):
        return None
    unused = module.memory_reserved(device) - module.memory_allocated(device)  # torch keeps it for the next tensor
    return int(module.mem_get_info(device)[0] + unused)


def tensor_memory(device: torch.device) -> tuple[int, int]:
    """Bytes of tensors on a device that is not the CPU: now, and at most so far; MPS keeps no peak and tells now."""
    module = torch.get_device_module(device)
    if not hasattr(module, "max_memory_allocated"):
        return (module.current_allocated_memory(),) * 2
    return module.memory_allocated(device), module.max_memory_allocated(device)


def _free_on_host() -> int | None:
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:  # no Linux; macOS tells how much there is
        names = os.sysconf_names if hasattr(os, "sysconf") else {}
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in names else None
    available = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    return min([available, *_left_by_cgroups()])


def _left_by_cgroups() -> list[int]:
    """The bytes that every limited control group of this process leaves, from its own up to the outermost."""
    left = []
    for line in MEMBERSHIP.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = CGROUPS / "memory" if controllers else CGROUPS
        group = top / path.lstrip("/")
        for directory in (group, *group.parents):
            if not directory.is_relative_to(top):
                break
            limit, use, droppable = LIMITS["1" if controllers else "2"]
            try:
                bound = (directory / limit).read_text().strip()
                stat = dict(each.split() for each in (directory / "memory.stat").read_text().splitlines())
                used = int((directory / use).read_text()) - int(stat.get(droppable, 0))
            except (OSError, ValueError):  # the outermost has no limit; a path may lie outside of this container
                continue
            if bound.isdecimal():
                left.append(max(0, int(bound) - used))
    return left
