"""The dummy analysis run in-process."""

import multiprocessing
import signal

import pytest
from dummy_analysis import UNDRAWN

from curvlab.study import load, main

multiprocessing.set_forkserver_preload(["curvlab.study"])


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


@pytest.fixture
def alone(tmp_path):
    """What one process measures of the dummy at a number of seeds."""

    def measurements(seeds):
        assert main(UNDRAWN, ["--seeds", str(seeds), "--workers", "1", "--results", str(tmp_path / "alone")]) == 0
        return load(tmp_path / "alone" / "dummy" / "latest").measurements

    return measurements


@pytest.fixture(autouse=True)
def ctrl_c_interrupts():
    """Undo that a shell makes what it starts in the background ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
