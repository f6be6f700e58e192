"""Progress on a terminal and elsewhere."""

import io
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from curvlab.tools.progress import progress

CELLS = [f"seed={seed}" for seed in range(5)]
COSTS = dict.fromkeys(CELLS, 2.0)


def shown(*, terminal, quiet=False):
    """What is printed while five cells are measured, the third of them in trouble."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with progress(console, COSTS, quiet) as advance:
        for cell in CELLS:
            trouble = cell == "seed=2"
            advance(cell, "failed: [no]" if trouble else "0.1 s", trouble)
    return console.file.getvalue()


def test_plain_lines_are_the_first_the_last_and_trouble():
    lines = shown(terminal=False).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["[1/5] seed=0", "[3/5] seed=2", "[5/5] seed=4"]
    assert "failed: [no]; 0.0 s left" in lines[1]
    assert lines[2] == "[5/5] seed=4: 0.1 s"


def test_a_terminal_keeps_the_trouble_above_the_bar():
    out = shown(terminal=True)
    assert "of 5 cells" in out
    assert "seed=2: failed: [no]\n" in out
    assert "seed=1: 0.1 s" not in out


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet(terminal):
    assert shown(terminal=terminal, quiet=True) == ""


def test_a_notebook_has_one_bar_that_is_drawn_anew_and_the_trouble(monkeypatch):
    pages, said = [], []

    class Handle:
        def update(self, page):
            pages.append(page)

    display = SimpleNamespace(HTML=str, display=lambda page, display_id: Handle())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr("curvlab.tools.progress.say", lambda _, text: said.append(text))
    monkeypatch.setattr("curvlab.tools.progress.SECONDS_BETWEEN_PAGES", 0.0)
    with progress(Console(file=io.StringIO(), force_jupyter=True), COSTS, quiet=False) as advance:
        for cell in CELLS:
            advance(cell, "failed", cell == "seed=2")
    assert said == ["seed=2: failed"]
    assert len(pages) == 5
    assert pages[-1] == '<progress value="10.0" max="10.0"></progress> 5 of 5 cells: seed=4'
