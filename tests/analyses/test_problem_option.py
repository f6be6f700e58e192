"""What every analysis says of a problem that does not exist, or whose data are absent."""

from importlib import import_module
from pathlib import Path

import pytest

from curvlab.study.runner import main

GENERAL = ("edge_of_stability", "jacobian_rank", "ntk_isotropy", "spectrum", "training")
GRAPHS = ("gnn_acceleration", "gnn_natural_gradient")


def run(name: str, problem: str, tmp_path: Path, *options: str) -> int:
    analysis = import_module(f"analyses.{name}.analysis").ANALYSIS
    return main(analysis, ["--problem", problem, "--results", str(tmp_path), *options])


@pytest.mark.parametrize("name", [*GENERAL, *GRAPHS])
def test_an_unknown_problem_is_wrong_usage(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(name, "digitz", tmp_path) == 2
    text = capfd.readouterr()
    assert "--problem" in text.err + text.out
    assert name in GRAPHS or "Did you mean 'digits'" in text.err


@pytest.mark.parametrize("name", GENERAL)
def test_absent_data_are_named(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "absent_data.py").write_text(
        "from curvlab.problems import DataUnavailable\n\n\n"
        "def problem(width: int = 8, depth: int = 2, seed: int = 0):\n"
        '    raise DataUnavailable("The images are not there; fetch them.")\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert run(name, "absent_data:problem", tmp_path) == 3
    assert "The images are not there; fetch them." in capfd.readouterr().err


@pytest.mark.parametrize("name", GENERAL)
def test_a_network_that_not_every_width_fits(name: str, tmp_path: Path) -> None:
    """The width of a transformer is a multiple of its heads; no analysis may ask for another one by itself."""
    assert run(name, "characters", tmp_path, "--dry-run") == 0
