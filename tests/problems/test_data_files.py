"""Where data files are looked for, how they are fetched, and what is said when they are damaged."""

import gzip
import hashlib
import io
import tarfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import create_server

import numpy as np
import pooch
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from curvlab.problems import DataUnavailable, data_folder, files, read_cifar10, read_idx
from curvlab.problems.files import RemoteFile, fetch
from curvlab.tools.errors import CommandError

CONTENT = b"published content"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def idx_bytes(array: np.ndarray) -> bytes:
    lengths = b"".join(length.to_bytes(4, "big") for length in array.shape)
    return bytes([0, 0, 8, array.ndim]) + lengths + array.tobytes()


zipped = partial(gzip.compress, mtime=0)
"""Compress without the time of day: the names of the cases must be the same in every process."""


def write_idx(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zipped(idx_bytes(array)))
    return path


def write_cifar(path: Path, batches: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in batches.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        """Log nothing."""


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[tuple[str, Path]]:
    """A web server on this machine and the folder that it publishes."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = tmp_path / "published"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder))) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", folder
        httpd.shutdown()
        thread.join()


def test_data_folder_is_the_variable_or_the_user_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path))
    assert data_folder() == tmp_path
    monkeypatch.setenv("CURVLAB_DATA", "~/sets")
    assert data_folder() == Path.home() / "sets"
    for unset in (partial(monkeypatch.setenv, "CURVLAB_DATA", ""), partial(monkeypatch.delenv, "CURVLAB_DATA")):
        unset()
        assert data_folder() == Path(pooch.os_cache("curvlab"))


def test_a_file_that_is_there_is_used_without_a_request(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/file").write_bytes(CONTENT)
    assert fetch(RemoteFile("raw/file", (), SHA256), tmp_path) == tmp_path / "raw/file"


def test_an_absent_file_is_fetched_from_the_first_mirror_that_has_it(server, tmp_path):
    url, folder = server
    (folder / "file").write_bytes(CONTENT)
    remote = RemoteFile("raw/file", (f"{url}/gone", f"{url}/file"), SHA256)
    assert fetch(remote, tmp_path).read_bytes() == CONTENT
    (folder / "file").unlink()
    assert fetch(remote, tmp_path).read_bytes() == CONTENT


def test_a_download_with_the_wrong_content_is_not_kept(server, tmp_path):
    url, folder = server
    (folder / "file").write_bytes(b"something else")
    with pytest.raises(DataUnavailable, match="does not exist and could not be fetched") as caught:
        fetch(RemoteFile("raw/file", (f"{url}/file",), SHA256), tmp_path)
    assert f"{url}/file (ValueError: SHA256 hash" in str(caught.value)
    assert [path for path in (tmp_path / "raw").rglob("*") if path.is_file()] == []


def test_a_damaged_file_is_named_and_left_alone(server, tmp_path):
    url, folder = server
    (folder / "file").write_bytes(CONTENT)
    damaged = tmp_path / "file"
    damaged.write_bytes(CONTENT[:5])
    with pytest.raises(DataUnavailable, match=f"{damaged} is damaged: .*{SHA256}. Delete it"):
        fetch(RemoteFile("file", (f"{url}/file",), SHA256), tmp_path)
    assert damaged.read_bytes() == CONTENT[:5]


def test_a_missing_file_is_explained(server, tmp_path, monkeypatch):
    url, _ = server
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path))
    remote = RemoteFile("raw/file", (f"{url}/gone", f"{url}/lost"), SHA256)
    with pytest.raises(DataUnavailable) as caught:
        fetch(remote, tmp_path)
    message = str(caught.value)
    for part in (
        f"{tmp_path}/raw/file does not exist",
        f"{url}/gone (HTTPError: 404",
        f"nor from {url}/lost",
        "let CURVLAB_DATA name a folder that holds raw/file",
    ):
        assert part in message
    assert isinstance(caught.value, CommandError)
    monkeypatch.delenv("CURVLAB_DATA")
    with pytest.raises(DataUnavailable, match=r"CURVLAB_DATA \(unset"):
        fetch(remote, tmp_path)


def test_a_silent_server_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(files, "READ_SECONDS", 0.2)
    with create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/file"
        start = time.perf_counter()
        with pytest.raises(DataUnavailable, match="ReadTimeout"):
            fetch(RemoteFile("file", (url,), SHA256), tmp_path)
    assert time.perf_counter() - start < 5


@given(st.data())
def test_idx_round_trip(tmp_path_factory, data):
    array = data.draw(arrays(np.uint8, data.draw(array_shapes(max_dims=3, max_side=5))))
    path = write_idx(tmp_path_factory.mktemp("idx") / "file.gz", array)
    np.testing.assert_array_equal(read_idx(path), array, strict=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (zipped(idx_bytes(np.zeros((4, 3), np.uint8)))[:-12], "truncated or not a gzip file"),
        (b"no gzip at all", "truncated or not a gzip file"),
        (zipped(idx_bytes(np.zeros((4, 3), np.uint8))[:-1]), r"header promises \(4, 3\), 12 bytes, and 11"),
        (zipped(idx_bytes(np.zeros((4, 3), np.uint8)) + b"x"), "12 bytes, and 13 follow"),
        (zipped(bytes([0, 0, 8, 3, 0])), "truncated or damaged"),
        (zipped(bytes([0, 0, 13, 1, 0, 0, 0, 1, 0, 0, 0, 0])), "not an IDX file of unsigned bytes"),
        (zipped(b""), "not an IDX file of unsigned bytes"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path, content, message):
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(DataUnavailable, match=f"images.gz is .*{message}"):
        read_idx(path)


def test_cifar_batches_are_read_in_the_order_asked_for(tmp_path):
    rng = np.random.default_rng(0)
    labels = {"data_batch_1": [3, 9], "data_batch_2": [0], "test_batch": [7]}
    images = {name: rng.integers(0, 256, (len(y), 3, 32, 32), np.uint8) for name, y in labels.items()}
    archive = write_cifar(
        tmp_path / "cifar.tar.gz",
        {
            name: b"".join(bytes([c]) + x.tobytes() for c, x in zip(labels[name], images[name], strict=True))
            for name in labels
        },
    )
    x, y = read_cifar10(archive, ["data_batch_2", "data_batch_1"])
    np.testing.assert_array_equal(y, np.array([0, 3, 9]), strict=True)
    assert x.shape == (3, 32, 32, 3)
    assert x[1, 5, 6, 2] == images["data_batch_1"][0, 2, 5, 6]
    np.testing.assert_array_equal(x[0].transpose(2, 0, 1), images["data_batch_2"][0])


@pytest.mark.parametrize("batches", [{}, {"test_batch": b""}, {"test_batch": bytes(3072)}])
def test_incomplete_cifar_archives_are_named(tmp_path, batches):
    archive = write_cifar(tmp_path / "cifar.tar.gz", {"data_batch_1": bytes(3073), **batches})
    with pytest.raises(DataUnavailable, match=r"cifar\.tar\.gz: batch test_batch\.bin is missing, empty or not"):
        read_cifar10(archive, ["test_batch"])


@pytest.mark.parametrize("length", [0, 20, 400])
def test_truncated_cifar_archives_are_named(tmp_path, length):
    noise = np.random.default_rng(0).integers(0, 256, 3073, np.uint8).tobytes()
    archive = write_cifar(tmp_path / "cifar.tar.gz", {"test_batch": noise})
    archive.write_bytes(archive.read_bytes()[:length])
    with pytest.raises(DataUnavailable, match=r"cifar\.tar\.gz is truncated or not a tar\.gz archive"):
        read_cifar10(archive, ["test_batch"])
