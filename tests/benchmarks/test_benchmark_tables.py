"""Tables that no terminal shows: one row a line, however long it is."""

import pytest
from rich import box
from rich.console import Console

from benchmarks import options, tables

ROW = ["curvlab, K-FAC with the inverses of its factors", "LeNet on Fashion-MNIST, batches of 128", "0.001234", "12.3×"]


@pytest.fixture
def table():
    made = tables.empty(box.SIMPLE_HEAD, ["method", "network"], ["seconds", "to SGD"])
    made.add_row(*ROW)
    return made


def test_a_row_that_is_wider_than_eighty_columns_is_one_line_in_a_file(table, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")

    def run(_, console, __):
        console.print(table)
        return 0

    assert options.command("benchmarks", options.CommonOptions, run, []) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "curvlab" in line]
    assert len(line.rstrip()) > 80
    assert all(text in line for text in ROW)


def test_eighty_columns_would_wrap_it(table, capsys):
    Console(width=80).print(table)
    assert len(capsys.readouterr().out.splitlines()) > 4
