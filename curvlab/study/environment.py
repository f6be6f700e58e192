"""What a run ran on: versions, commit, hardware and threads."""

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime
from pathlib import Path

import torch

from curvlab.study.faults import UsageError
from curvlab.tools.memory import physical_memory

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


def environment(source: Path, device: str) -> dict[str, object]:
    """Everything that ``environment.json`` records; ``source`` is a file of the code that is run."""
    return {
        "started": datetime.now().astimezone().isoformat(timespec="milliseconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git": git_state(source),
        "hardware": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_bytes": physical_memory(),
            "device": _name(device),
        },
        "threads": {"torch": torch.get_num_threads(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")},
    }


def _name(device: str) -> str:
    """What a device is, if it is one of this machine."""
    here = torch.device(device).type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_name(device) if here else device


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


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
