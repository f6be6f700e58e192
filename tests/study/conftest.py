"""A disk that is full."""

import errno
import os

import pytest


class FullDisk:
    """Lets a number of atomic writes pass and fails every one after that, as a full disk does."""

    def __init__(self, monkeypatch):
        self._left = None
        self._replace = os.replace
        monkeypatch.setattr(os, "replace", self._try)

    def after(self, writes, name=""):
        """Be full after ``writes`` more writes of files with ``name`` in their path."""
        self._left, self._name = writes, name

    def freed(self):
        """Have space again."""
        self._left = None

    def _try(self, source, target):
        if self._left is not None and self._name in str(target):
            if self._left == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            self._left -= 1
        self._replace(source, target)


@pytest.fixture
def full_disk(monkeypatch):
    return FullDisk(monkeypatch)
