"""Files that are whole or not there."""

import json
import pickle
from pathlib import Path

import pytest

from curvlab.tools.storage import StorageFull, WriteError, digest, write


def test_writes_are_whole_or_not_at_all(tmp_path, full_disk):
    path = tmp_path / "file"
    write(path, b"old")
    full_disk.after(0)
    with pytest.raises(StorageFull, match=r"needs 3 B, .* are available.*another disk"):
        write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_digests_do_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": [0.1, "ü"]}) == digest(json.loads('{"b": [0.1, "ü"], "a": 1}'))
    assert digest({"a": 1}) != digest({"a": 2})


def test_what_cannot_be_written_is_named_with_the_reason(tmp_path):
    with pytest.raises(WriteError, match=r"nowhere/file cannot be written \(No such file or directory\)"):
        write(tmp_path / "nowhere" / "file", b"")


@pytest.mark.parametrize("error", [WriteError("file"), StorageFull(Path("file"), 2, 1)])
def test_errors_cross_processes(error):
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.exit_code) == (type(error), str(error), error.exit_code)
