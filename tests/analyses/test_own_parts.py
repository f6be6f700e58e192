"""Problems and structures of a user's own in our analyses, by module:name, in worker processes, too."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from curvlab.study.runner import main

EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK = ["--seeds", "1", "--top", "10", "--lanczos", "8", "--probes", "2", "--workers", "2", "--shard", "1/1"]

SCRIPT = """
from analyses.spectrum import ANALYSIS
from curvlab.fisher import Diagonal
from curvlab.study import main
from problem import moons


class Mine(Diagonal, key="mine", summary="the diagonal again"):
    pass


def narrow(*, seed: int = 0):
    return moons(width=3, seed=seed)


if __name__ == "__main__":
    raise SystemExit(main(ANALYSIS))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a problem, a structure, and a script that has one of each in itself."""
    for name in ("problem", "structure"):
        (tmp_path / f"{name}.py").write_text((EXAMPLES / f"{name}.py").read_text())
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def run(folder: Path, *command: str) -> str:
    """Measure all cells in two processes, without report and figures; what was said."""
    path = os.pathsep.join([str(EXAMPLES.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *command, *QUICK], cwd=folder, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "measuring in 2 processes" in next(folder.glob("results/.cache/spectrum/*.log")).read_text()
    return done.stdout


def test_those_of_modules_run_by_the_command(folder: Path) -> None:
    own = ("--problem", "problem:moons", "--structures", "kfac", "structure:LayerScalar")
    said = run(folder, "-m", "curvlab", "run", "spectrum", *own)
    assert "4 of its 4 cells are in the cache" in said


def test_those_of_a_script_run_by_it(folder: Path) -> None:
    own = ("--problem", "__main__:narrow", "--structures", "__main__:Mine")
    said = run(folder, "script.py", *own)
    assert "3 of its 3 cells are in the cache" in said
    assert f"assemble: python script.py {' '.join(own)}" in said


GENERAL = ("block_structure", "edge_of_stability", "jacobian_rank", "ntk_isotropy", "spectrum", "training")


@pytest.mark.parametrize("name", GENERAL)
@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ("curvlab.fisher:Diagonal", ""),
        ("curvlab.fisher:Diagnal", "Did you mean 'Diagonal'?"),
        ("curvlab.fisher:make", "not a Structure class"),
        ("no_such_module:Mine", "No module named 'no_such_module'"),
        ("kfca", "Did you mean 'kfac'?"),
    ],
)
def test_every_analysis_takes_a_structure_of_a_module_or_says_what_is_wrong(
    name: str, structure: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    analysis = import_module(f"analyses.{name}.analysis").ANALYSIS
    code = main(analysis, ["--structures", structure, "--dry-run", "--results", str(tmp_path)])
    text = capfd.readouterr()
    assert code == (2 if message else 0)
    assert message in " ".join((text.err + text.out).replace("│", " ").split())
