"""Digests and atomic writes: a file on disk is either the old one or the new one, whole."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from curvlab.tools.errors import CommandError
from curvlab.tools.text import size


class WriteError(CommandError):
    """A file that cannot be written, such as for a missing permission (exit code 2)."""


class StorageFull(WriteError):
    """The disk or the quota is exhausted (exit code 3); nothing that was written before is touched."""

    exit_code = 3

    def __init__(self, path: Path, needed: int, available: int) -> None:
        super().__init__(
            f"no space left for {path}: needs {size(needed)}, {size(available)} are available; everything "
            "finished before it is kept. Free some space and run the same command again, or choose a folder on "
            "another disk"
        )


def canonical(value: object) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: object) -> str:
    """SHA-256 of the canonical JSON of ``value``, 64 hexadecimal digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


@contextlib.contextmanager
def writing(path: Path, needed: int = 0) -> Iterator[None]:
    """Context that writes ``needed`` bytes to ``path``.

    Raises:
        StorageFull: the disk or the quota is exhausted.
        WriteError: it cannot be written for another reason.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(path, needed, free_space(path)) from error
        raise WriteError(f"{path} cannot be written ({error.strerror}); choose another folder") from error


def make_folder(folder: Path) -> None:
    """Make a folder and its parents; `writing` lists the errors."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` atomically; its folder exists, and `writing` lists the errors."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path, len(content)):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def free_space(path: Path) -> int:
    """Free bytes on the disk that holds ``path`` or, before it exists, its nearest existing folder."""
    return shutil.disk_usage(next(p for p in (path, *path.absolute().parents) if p.exists())).free
