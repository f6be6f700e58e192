"""How much memory there is, and how much of it is free."""

import os
from pathlib import Path

import torch

CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Memory limits of a container, versions 2 and 1: folder, limit, use, and the file cache in that use."""


def available_memory(device: str) -> float | None:
    """Bytes that can still be allocated on ``device``; None where the system does not tell."""
    if torch.device(device).type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = [1024 * kibibytes for kibibytes in _entries("/proc/meminfo", "MemAvailable:")]
    for folder, limit, used, cached in CGROUPS:
        if _read(f"{folder}/{limit}").isdigit():
            reclaimable = sum(_entries(f"{folder}/memory.stat", cached))
            free.append(int(_read(f"{folder}/{limit}")) - int(_read(f"{folder}/{used}")) + reclaimable)
    return float(min(free)) if free else physical_memory()


def physical_memory() -> int | None:
    """Bytes that are built in; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _entries(path: str, name: str) -> list[int]:
    """The number after ``name`` in a table of the kernel; empty where there is no such table or entry."""
    lines = (line.split() for line in _read(path).splitlines())
    return [int(line[1]) for line in lines if line and line[0] == name]


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
