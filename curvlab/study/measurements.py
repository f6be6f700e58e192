"""Measurements in long form: one row per observation, ready for seaborn and for the judge.

The columns are the cell's coordinates, ``quantity``, ``value`` (float), what else the analysis returns
(``layer``, ``sample``, ``step``, …), an optional ``status`` and ``cell``, the cell's key. A run that diverged
is recorded by a status other than ``"ok"``; its values may then be infinite or NaN without being a fault. An
observation outside the assumptions of what it is measured for says so by its status, too, see `outside`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from pandas.api.types import is_object_dtype

from curvlab.study.cells import Cell, Scalar, scalar

Row = dict[str, Scalar]

OUTSIDE = "outside the assumptions"
"""How the status of an observation begins that no claim is judged by."""


def observed(quantity: str, value: object, **entries: object) -> dict[str, object]:
    """Return an observation: the value of a quantity, with such entries as its layer, its step, its tolerance and its status."""
    return {"quantity": quantity, "value": value, **entries}


def outside(reason: str) -> dict[str, str]:
    """The status of an observation outside the assumptions, as an entry of it: ``{"value": …, **outside("…")}``."""
    return {"status": f"{OUTSIDE}: {reason}"}


def round_off(size: int, condition: float = 1.0, dtype: torch.dtype = torch.float64) -> float:
    """Return the tolerance of an identity: ten times the relative error that sums of ``size`` terms explain, here 10·size·ε·κ.

    Args:
        size: Number of terms.
        condition: Condition number κ of what was solved.
        dtype: Floating-point precision of the computation.
    """
    return 10.0 * size * torch.finfo(dtype).eps * condition


def is_outside(measurements: pd.DataFrame) -> Bool[np.ndarray, " rows"]:
    """Which observations are outside the assumptions."""
    if "status" not in measurements:
        return np.zeros(len(measurements), dtype=bool)
    found: Bool[np.ndarray, " rows"]
    found = measurements["status"].fillna("").astype(str).str.startswith(OUTSIDE).to_numpy(dtype=bool)
    return found


def normalise(cell: Cell, rows: Sequence[Mapping[str, object]]) -> list[Row]:
    """The observations of one cell as plain scalars, without its coordinates.

    Raises:
        ValueError: a row without ``quantity`` or ``value``, or one that contradicts a coordinate of the cell.
        TypeError: an entry that is not a scalar.
    """
    normalised = []
    for index, row in enumerate(rows):
        where = f"observation {index} of cell {cell}"
        missing = {"quantity", "value"} - row.keys()
        if missing:
            raise ValueError(f"{where} has no {' and no '.join(sorted(missing))}")
        plain = {name: scalar(entry, f"{name!r} in {where}") for name, entry in row.items()}
        if isinstance(plain["value"], str):
            raise TypeError(f"'value' in {where} is text ({plain['value']!r}); put text into a column of its own")
        plain["value"] = float(plain["value"])
        for name in cell.coordinates.keys() & plain.keys():
            if plain.pop(name) != cell[name]:
                raise ValueError(f"{where} has a {name!r} other than the cell's")
        normalised.append(plain)
    return normalised


def tabulate(measured: Mapping[Cell, Sequence[Row]]) -> pd.DataFrame:
    """All observations as one table; a column whose entries are of several types becomes text."""
    rows = [{**cell.coordinates, **row, "cell": cell.key} for cell, rows in measured.items() for row in rows]
    table = pd.DataFrame(rows, columns=None if rows else ["quantity", "value", "cell"])
    for name in table.columns:
        types = {type(entry) for entry in table[name].dropna()} if is_object_dtype(table[name]) else set()
        if len(types) > 1:
            table[name] = table[name].map(str, na_action="ignore").astype("str")
    return table.astype({"value": float})


def faults(measurements: pd.DataFrame) -> Bool[np.ndarray, " rows"]:
    """Which observations are non-finite although no status such as ``diverged`` declares it."""
    nonfinite: Bool[np.ndarray, " rows"] = ~np.isfinite(measurements["value"].to_numpy(dtype=float))
    if "status" not in measurements:
        return nonfinite
    undeclared: Bool[np.ndarray, " rows"]
    undeclared = measurements["status"].fillna("ok").isin(["ok", ""]).to_numpy(dtype=bool)
    return nonfinite & undeclared


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as dictionaries."""
    return [{str(name): entry for name, entry in row.items()} for row in table.to_dict("records")]


def locate(observation: Mapping[str, Any]) -> str:
    """Where an observation comes from: its quantity, layer and sample if it has them, and its cell."""
    known = [(name, observation[name]) for name in ("layer", "sample") if pd.notna(observation.get(name))]
    inside = [f"{name} {entry:g}" if isinstance(entry, float) else f"{name} {entry}" for name, entry in known]
    cell = [f"cell {Cell.from_key(str(observation['cell']))}"] if "cell" in observation else []
    return ", ".join([f"{observation.get('quantity')} = {observation['value']}", *inside, *cell])
