"""Cells, measurements and the cache."""

import logging

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curvlab.study import Cell
from curvlab.study.cache import CellCache
from curvlab.study.measurements import faults, locate, normalise, tabulate

scalars = (
    st.text(max_size=5)
    | st.integers(-(2**53), 2**53)
    | st.booleans()
    | st.floats(allow_nan=False, allow_infinity=False)
)
names = st.text("abcdefgh", min_size=1, max_size=4)


@given(st.dictionaries(names, scalars, max_size=4))
def test_a_cell_is_its_key(coordinates):
    cell = Cell(coordinates)
    assert Cell.from_key(cell.key) == cell
    assert hash(Cell(dict(reversed(coordinates.items())))) == hash(cell)
    assert {cell: 1}[Cell(coordinates)] == 1


def test_cells_differ_by_type_and_unwrap_numpy():
    assert Cell({"x": 1}) != Cell({"x": True})
    assert Cell({"x": 1}) != Cell({"x": 1.0})
    assert Cell({"x": np.int64(3), "y": torch.tensor(0.5)}) == Cell({"y": 0.5, "x": 3})
    assert str(Cell({"structure": "full", "seed": 3})) == "structure=full, seed=3"


@pytest.mark.parametrize(
    ("coordinates", "error", "message"),
    [
        ({"value": 1}, ValueError, "cannot be called 'value'"),
        ({"": 1}, ValueError, "cannot be called ''"),
        ({"width": float("nan")}, ValueError, "'width' is nan"),
        ({"widths": [1, 2]}, TypeError, "'widths' is a list"),
        ({"x": np.zeros(3)}, TypeError, "'x' is a ndarray"),
    ],
)
def test_coordinates_that_are_refused(coordinates, error, message):
    with pytest.raises(error, match=message):
        Cell(coordinates)


CELL = Cell({"structure": "full", "seed": 2})


def test_observations_become_a_table():
    rows = normalise(
        CELL,
        [
            {"quantity": "rank", "value": 40, "layer": 1, "seed": 2},
            {"quantity": "error", "value": torch.tensor(1e-9, dtype=torch.float64), "layer": "all"},
            {"quantity": "covered", "value": np.True_},
        ],
    )
    table = tabulate({CELL: rows})
    assert list(table["value"]) == [40.0, 1e-9, 1.0]
    assert list(table["layer"].fillna("-")) == ["1", "all", "-"]
    assert list(table["seed"]) == [2, 2, 2]
    assert set(table["cell"]) == {CELL.key}
    assert list(tabulate({}).columns) == ["quantity", "value", "cell"]


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"value": 1.0}, ValueError, "observation 0 of cell structure=full, seed=2 has no quantity"),
        ({"quantity": "q", "value": "big"}, TypeError, "'value' .* is text"),
        ({"quantity": "q", "value": [1.0]}, TypeError, "'value' .* is a list"),
        ({"quantity": "q", "value": 1.0, "seed": 3}, ValueError, "'seed' other than the cell's"),
    ],
)
def test_observations_that_are_refused(row, error, message):
    with pytest.raises(error, match=message):
        normalise(CELL, [row])


def test_undeclared_non_finite_values_are_faults():
    table = pd.DataFrame(
        {"quantity": "q", "value": [1.0, np.nan, np.inf, -np.inf], "status": ["ok", None, "diverged", ""]}
    )
    assert list(faults(table)) == [False, True, False, True]
    assert list(faults(table.drop(columns="status"))) == [False, True, True, True]
    observation = {"quantity": "error", "value": np.nan, "layer": 2, "sample": 7, "cell": CELL.key}
    assert locate(observation) == "error = nan, layer 2, sample 7, cell seed=2, structure=full"


ROWS = [{"quantity": "q", "value": 0.1 + 0.2, "layer": 1}, {"quantity": "q", "value": float("inf")}]


@pytest.fixture
def cache(tmp_path):
    return CellCache(tmp_path, {"analysis": "a", "version": 1, "config": {"dtype": "float64"}})


def test_the_cache_gives_back_what_it_was_given(cache):
    assert cache.load(CELL) is None
    cache.store(CELL, ROWS)
    assert cache.load(CELL) == ROWS
    assert cache.load(Cell({"structure": "full", "seed": 3})) is None
    assert CellCache(cache.folder, {**cache.context, "version": 2}).load(CELL) is None


def flip_a_digit(content):
    return content.replace("0.3000", "0.4000")


@pytest.mark.parametrize("damage", [flip_a_digit, lambda c: c[: len(c) // 2], lambda _: "", lambda _: "[1, 2]"])
def test_a_damaged_entry_is_noticed(cache, damage, caplog):
    cache.store(CELL, ROWS)
    path = cache.path(CELL)
    path.write_text(damage(path.read_text()))
    with caplog.at_level(logging.WARNING):
        assert cache.load(CELL) is None
    assert "damaged" in caplog.text
    assert "seed=2" in caplog.text
    cache.store(CELL, ROWS)
    assert cache.load(CELL) == ROWS


def test_an_entry_of_another_cell_is_noticed(cache, caplog):
    other = Cell({"seed": 3})
    cache.store(other, ROWS)
    cache.path(other).rename(cache.path(CELL))
    assert cache.load(CELL) is None
    assert "damaged" in caplog.text
