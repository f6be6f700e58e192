"""Every example runs as its first lines say."""

import runpy
from pathlib import Path

import pytest

from curvlab.fisher import STRUCTURES
from curvlab.rows import modules

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = ("structure", "layer", "problem", "optimiser", "growing")


@pytest.fixture
def as_it_was(monkeypatch):
    """Forget what examples add."""
    monkeypatch.setattr(modules, "RULES", dict(modules.RULES))
    yield
    STRUCTURES.unregister("scalar")


@pytest.mark.usefixtures("as_it_was")
@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_runs(name, capsys):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out


def test_every_example_is_run():
    assert {example.stem for example in EXAMPLES.glob("*.py")} == {*SCRIPTS, "analysis"}
