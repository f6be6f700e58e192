"""Every example runs as its first lines say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
RUN = {
    "structure": ["structure.py"],
    "optimiser": ["optimiser.py"],
    "growing network": ["growing.py"],
    "layer": ["layer.py"],
    "problem": ["problem.py"],
    "a problem in an analysis": ["-m", "curvlab", "run", "spectrum", "--problem", "problem:moons", "--seeds", "2",
                                 "--structures", "kfac", "--top", "1", "--lanczos", "8", "--probes", "2"],
}  # fmt: skip
"""Arguments of the interpreter, by what they show."""


@pytest.mark.parametrize("shown", RUN)
def test_an_example_runs(shown, tmp_path):
    for example in EXAMPLES.glob("*.py"):
        (tmp_path / example.name).write_text(example.read_text())
    done = subprocess.run(
        [sys.executable, *RUN[shown]], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_every_example_is_run():
    run = {Path(arguments[0]).name for arguments in RUN.values()} | {"analysis.py"}
    assert {example.name for example in EXAMPLES.glob("*.py")} <= run
