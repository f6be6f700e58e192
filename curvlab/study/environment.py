"""What a run ran on: versions, commit, hardware, threads, and how much memory is free."""

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime
from pathlib import Path

import torch

from curvlab.study.faults import UsageError

PACKAGES = (
    "curvlab",
    "torch",
    "backpack-for-pytorch",
    "numpy",
    "scipy",
    "scikit-learn",
    "statsmodels",
    "pandas",
    "pyarrow",
    "matplotlib",
)

CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Memory limits of a container, versions 2 and 1: folder, limit, use, and the file cache in that use."""


def environment(source: Path, device: str) -> dict[str, object]:
    """Everything that ``environment.json`` records; ``source`` is a file of the code that is run."""
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git": git_state(source),
        "hardware": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_bytes": _physical_memory(),
            "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device,
        },
        "threads": {"torch": torch.get_num_threads(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")},
    }


def check_device(device: str) -> None:
    """Make sure that torch can compute on ``device``.

    Raises:
        UsageError: it cannot, with torch's reason.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error


def git_state(source: Path) -> dict[str, object]:
    """Commit of the repository that tracks ``source`` and whether its working tree differs from it (dirty).

    Both are None where ``source`` is not under version control, as in an installed package.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def available_memory(device: str) -> float | None:
    """Bytes that a cell can still allocate on ``device``; None where the system does not tell."""
    if torch.device(device).type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = [1024 * kibibytes for kibibytes in _entries("/proc/meminfo", "MemAvailable:")]
    for folder, limit, used, cached in CGROUPS:
        if _read(f"{folder}/{limit}").isdigit():
            reclaimable = sum(_entries(f"{folder}/memory.stat", cached))
            free.append(int(_read(f"{folder}/{limit}")) - int(_read(f"{folder}/{used}")) + reclaimable)
    return float(min(free)) if free else _physical_memory()


def _entries(path: str, name: str) -> list[int]:
    """The number after ``name`` in a table of the kernel; empty where there is no such table or entry."""
    lines = (line.split() for line in _read(path).splitlines())
    return [int(line[1]) for line in lines if line and line[0] == name]


def _physical_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _processor() -> str:
    names = [line.partition(":")[2].strip() for line in _read("/proc/cpuinfo").splitlines() if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
