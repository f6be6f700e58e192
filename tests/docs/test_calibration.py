"""The error rates on `docs/calibration.md` are those of the judge, and are kept on the data that every rule is declared for."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest

DOCS = Path(__file__).parents[2] / "docs"
SPEC = importlib.util.spec_from_file_location("calibration", DOCS / "calibration.py")
calibration = importlib.util.module_from_spec(SPEC)
sys.modules["calibration"] = calibration
SPEC.loader.exec_module(calibration)

PAGE = calibration.PAGE.read_text()
FEW = 1500


def lines_of(table):
    """The lines of a table of the page, split into cells, without the header."""
    text = re.search(rf"<!-- {table} -->\n(.*?)<!-- end -->", PAGE, flags=re.DOTALL)[1]
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.strip().splitlines()[2:]]


def numbers(cells):
    """Rates and their upper bounds."""
    return np.array([[float(number) for number in re.findall(r"[\d.e-]+", cell)] for cell in cells])


@pytest.mark.parametrize(("table", "rows"), [("errors", calibration.INSIDE), ("errors outside", calibration.OUTSIDE)])
def test_the_page_has_the_rows_of_the_code(table, rows):
    assert [tuple(line[:3]) for line in lines_of(table)] == [row.title for row in rows], (
        "run: python docs/calibration.py"
    )
    assert len({row.title for row in rows}) == len(rows), "a row is seeded by its title"


def test_every_rule_keeps_its_levels_on_its_data():
    for line in lines_of("errors"):
        assert line[-1] == "yes", line
        uppers = numbers(line[3:7])[:, 1]
        assert (uppers <= 1.1 * np.repeat(calibration.LEVELS, 2) + 0.001 + 1e-4).all(), line


@pytest.mark.parametrize("row", [0, 4, 7, 13, 18, 20, 26, 29, -1, -2])
def test_rates_are_those_of_the_judge(row):
    """Measured again by fewer draws, and within what chance allows."""
    rates = numbers(lines_of("errors")[row][3:7])[:, 0].reshape(2, 2)
    few = FEW // 3 if calibration.INSIDE[row].looks or calibration.INSIDE[row].means else FEW
    again = calibration.INSIDE[row].decisions(few) / few
    assert again == pytest.approx(rates, abs=4 * np.sqrt(0.05 / few))


def test_a_wrong_centre_is_seen_in_the_table():
    """The mean of skewed values, which no test of a dozen seeds can judge."""
    assert [line[-1] for line in lines_of("errors outside")[:5]] == ["no"] * 5


def test_power_is_that_of_the_judge():
    [row] = [row for row in calibration.power_of(1.0) if row.name.startswith("median")]
    [line] = [line for line in lines_of("power") if line[:2] == [row.name, row.data]]
    found = row.decisions(FEW)[:, 0] / FEW
    assert [float(cell) for cell in line[2:4]] == pytest.approx(found, abs=0.06)
