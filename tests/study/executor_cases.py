"""Executors as cases of tests, and the dummy analysis as it travels to them."""

import os
from functools import partial
from importlib.util import find_spec

import dummy_analysis
import pytest

WITHOUT = {name: not find_spec(name) for name in ("ray", "submitit")}


def case(name, *settings, needs="", study=False):
    """An executor with its settings as a case of the fixture `executor`, of long runs only or of all."""
    marks = [pytest.mark.skipif(WITHOUT[needs], reason=f"{needs} is not installed")] if needs else []
    options = ("--executor-options", *settings) if settings else ()
    return pytest.param(("--executor", name, *options), id=name, marks=[*marks, pytest.mark.study] if study else marks)


THREADS = case("concurrent.futures:ThreadPoolExecutor")
PROCESSES = case("own_executors:processes", "max_workers=2")
RAY = case("ray", needs="ray", study=True)
SLURM = case("slurm", "cluster=local", needs="submitit", study=True)
POOL = ("--executor", "own_executors:processes")


def measuring(measure):
    """The dummy with another measurement, in an environment that travels with it."""
    environment = {name: value for name, value in os.environ.items() if name.startswith("DUMMY_")}
    return dummy_analysis.changed(measure=partial(measure, environment), seconds=1.0)


def plain():
    return measuring(dummy_analysis.measure_in)


def log_of(folder):
    return (folder / "log.txt").read_text()
