"""The dummy analysis run in-process, and a disk that is full."""

import errno
import multiprocessing
import os
import signal
from dataclasses import replace

import dummy_analysis
import pytest

from curvlab.study import load, main

multiprocessing.set_forkserver_preload(["curvlab.study"])


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


UNDRAWN = replace(dummy_analysis.ANALYSIS, figures={})


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the dummy in-process; `run.measured` are the cells that were measured since the last run."""
    log = tmp_path / "measured.txt"
    monkeypatch.setenv("DUMMY_LOG", str(log))

    def call(*arguments, analysis=UNDRAWN):
        log.write_text("")
        code = main(analysis, [*arguments, "--results", str(tmp_path / "results")])
        call.measured = log.read_text().splitlines()
        return code

    call.results = tmp_path / "results"
    call.stored = lambda: load(call.results / "dummy" / "latest")
    call.outcomes = lambda: dict(zip(call.stored().verdicts["claim"], call.stored().verdicts["outcome"], strict=True))
    return call


@pytest.fixture(autouse=True)
def ctrl_c_interrupts():
    """Undo that a shell makes what it starts in the background ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
