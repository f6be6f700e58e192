"""What cannot be measured elsewhere is refused before anything is measured, with a reason."""

import errno
import os
import re
import sys
import types
from pathlib import Path

import dummy_analysis
import pytest
from executor_cases import POOL, WITHOUT, plain


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--executor", "rai"], r"Unknown executor 'rai'. Did you mean 'ray'\? Known: local, ray, slurm"),
        (["--executor", "slurm", "--executor-options", "cluster=local", "colour=red"], "Unknown argument 'colour'"),
        (["--executor", "slurm"], 'Could not detect "srun"'),
        (["--executor", "ray", "--executor-options", "num_cpu=1"], "num_cpu"),
        (["--executor", "local", "--executor-options", "time=60"], "cannot be started with these --executor-options"),
        (["--executor-options", "time"], "are name=value, each name once, such as partition=gpu; got 'time'"),
        (["--executor", "own_executors:NOTHING"], "NOTHING is object, not a class or function"),
        (["--executor", "own_executors:lost", "--executor-options", "count=1"], "gives list, which has no submit"),
        (["--executor", "own_executors:OPEN", "--executor-options", "a=1"], "is there already"),
        (["--executor", "own_executors:Refusing"], "takes no jobs: RuntimeError: closed for the season"),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_reason(run, capsys, words, said):
    for name, package in {"ray": "ray", "slurm": "submitit"}.items():
        if name in words and WITHOUT[package]:
            pytest.skip(f"{package} is not installed")
    assert run("--seeds", "1", *words) == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert re.search(said, shown), shown
    assert run.measured == []


@pytest.mark.parametrize(("name", "package"), [("ray", "ray>=2.40"), ("slurm", "submitit>=1.5")])
def test_a_package_that_is_not_there_is_named_with_the_command_that_installs_it(
    run, capsys, monkeypatch, name, package
):
    monkeypatch.setitem(sys.modules, package.partition(">")[0], None)
    assert run("--seeds", "1", "--executor", name) == 2
    assert f"pip install '{package}'" in capsys.readouterr().err


def test_an_analysis_that_other_machines_cannot_import_is_refused_with_a_reason(run, capsys):
    module = types.ModuleType("of_this_process_only")
    exec("def measure(cell, context):\n    return []", module.__dict__)
    module.measure.__module__ = module.__name__
    sys.modules[module.__name__] = module
    analysis = dummy_analysis.changed(measure=module.measure)
    try:
        assert run("--seeds", "1", *POOL, analysis=analysis) == 2
    finally:
        del sys.modules[module.__name__]
    shown = capsys.readouterr().err
    assert "No module named 'of_this_process_only'" in shown
    assert "installed on every machine" in shown


def test_a_disk_that_is_full_before_the_first_job_stops_the_run_with_a_reason(run, capsys, monkeypatch):
    def full(self, **_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "touch", full)
    assert run("--seeds", "1", *POOL, analysis=plain()) == 3
    assert "no space left" in capsys.readouterr().err
    assert run.measured == []


def test_an_analysis_that_cannot_be_sent_is_refused_with_a_reason(run, capsys):
    local = dummy_analysis.changed(measure=lambda *a: [])
    assert run("--seeds", "1", *POOL, analysis=local) == 2
    assert "dummy cannot be sent to others" in capsys.readouterr().err
