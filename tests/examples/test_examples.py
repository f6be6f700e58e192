"""Every example runs as its first lines say."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from curvlab.fisher import STRUCTURES
from curvlab.rows import modules
from curvlab.tools.looks import LOOKS

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = ("structure", "layer", "problem", "optimiser", "growing")


@pytest.fixture
def as_it_was(monkeypatch):
    """Forget what examples add."""
    monkeypatch.setattr(modules, "RULES", dict(modules.RULES))
    yield
    STRUCTURES.unregister("scalar")
    LOOKS.pop("scalar", None)


@pytest.mark.usefixtures("as_it_was")
@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_runs(name, capsys):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out


def test_a_problem_of_ones_own_in_an_analysis_of_ours(tmp_path):
    (tmp_path / "problem.py").write_text((EXAMPLES / "problem.py").read_text())
    options = ["--seeds", "2", "--structures", "kfac", "--top", "1", "--lanczos", "8", "--probes", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "curvlab", "run", "spectrum", "--problem", "problem:moons", *options],
        cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "largest-kfac" in done.stdout


def test_every_example_is_run():
    assert {example.stem for example in EXAMPLES.glob("*.py")} == {*SCRIPTS, "analysis"}
