"""The files of the data sets: where they lie, how they are fetched, how their formats are read."""

import gzip
import os
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from textwrap import shorten

import numpy as np
import pooch
from jaxtyping import Int64, UInt8

from curvlab.tools.errors import DataUnavailable

CONNECT_SECONDS, READ_SECONDS = 5, 20


@dataclass(frozen=True)
class RemoteFile:
    """A published file.

    Attributes:
        path: Where it lies under the data folder.
        urls: Where it is published, tried in turn.
        sha256: Of its content.
    """

    path: str
    urls: Sequence[str]
    sha256: str


def data_folder() -> Path:
    """Return the folder of the data sets: `$CURVLAB_DATA`, or the user's cache folder if that is unset."""
    return Path(os.environ.get("CURVLAB_DATA") or pooch.os_cache("curvlab")).expanduser()


def fetch(file: RemoteFile, folder: Path) -> Path:
    """Return the path of a published file under a data folder; download it only if it is not there.

    Raises:
        DataUnavailable: It is neither there nor to be had within some seconds, or its content is not the
            published one. What is there is never overwritten.
    """
    path = folder / file.path
    if not path.exists():
        _download(file, path)
    if (found := pooch.file_hash(str(path))) != file.sha256:
        raise DataUnavailable(
            f"{path} is damaged: its SHA-256 is {found}, that of the published file is {file.sha256}. "
            "Delete it, and it is fetched again."
        )
    return path


def _download(file: RemoteFile, path: Path) -> None:
    failures = []
    for url in file.urls:
        try:
            pooch.retrieve(
                url,
                known_hash=f"sha256:{file.sha256}",
                fname=path.name,
                path=path.parent,
                downloader=pooch.HTTPDownloader(timeout=(CONNECT_SECONDS, READ_SECONDS)),
            )
        except (OSError, ValueError) as error:
            reason = shorten(f"{type(error).__name__}: {error}", 100, placeholder=" …")
            failures.append(f"{url} ({reason})")
        else:
            return
    setting = "" if os.environ.get("CURVLAB_DATA") else " (unset: the user's cache folder was used)"
    raise DataUnavailable(
        f"{path} does not exist and could not be fetched from {', nor from '.join(failures)}. Put the file "
        f"there, or let CURVLAB_DATA{setting} name a folder that holds {file.path}."
    )


def read_idx(path: Path) -> UInt8[np.ndarray, "*shape"]:
    """Read a gzip-compressed IDX file of bytes, the format of MNIST.

    The format: two zero bytes, the type (8: unsigned byte), the number of axes, each axis' length as a
    big-endian 32-bit integer, then the values in C order.

    Raises:
        DataUnavailable: The file is truncated or is not in this format.
    """
    try:
        with gzip.open(path) as stream:
            content = stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataUnavailable(f"{path} is truncated or not a gzip file ({error}).") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataUnavailable(f"{path} is not an IDX file of unsigned bytes: it begins with {content[:4]!r}.")
    header = 4 + 4 * content[3]
    shape = tuple(int.from_bytes(content[start : start + 4]) for start in range(4, header, 4))
    if len(content) != header + prod(shape):
        raise DataUnavailable(
            f"{path} is truncated or damaged: its header promises {shape}, {prod(shape)} bytes, and "
            f"{len(content) - header} follow."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def read_cifar10(
    archive: Path, batches: Sequence[str]
) -> tuple[UInt8[np.ndarray, "N 32 32 3"], Int64[np.ndarray, " N"]]:
    """Read batches of the binary version of CIFAR-10 straight from its archive.

    A record is one byte for the class and 3072 for the image, channel first.

    Args:
        archive: `cifar-10-binary.tar.gz`.
        batches: Names of the batches, such as "data_batch_1" or "test_batch", in the order wanted.

    Raises:
        DataUnavailable: The archive is truncated, or a batch is missing or damaged.
    """
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                stream = tar.extractfile(member)
                if stream is not None and Path(member.name).stem in batches:
                    contents[Path(member.name).stem] = stream.read()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataUnavailable(f"{archive} is truncated or not a tar.gz archive ({error}).") from error
    for batch in batches:
        if not contents.get(batch) or len(contents[batch]) % 3073:
            raise DataUnavailable(f"{archive}: batch {batch}.bin is missing, empty or not in records of 3073 bytes.")
    joined = b"".join(contents[batch] for batch in batches)
    records = np.frombuffer(joined, np.uint8).reshape(-1, 3073)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, records[:, 0].astype(np.int64)
