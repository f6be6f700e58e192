"""Whether an analysis runs from its command line, is repeatable, and decides what it claims."""

from __future__ import annotations

import contextlib
import io
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from curvlab.study import Analysis, load, main
from curvlab.study.execution import Plan
from curvlab.study.options import parse
from curvlab.study.runner import DONE, FAILED
from curvlab.testing.failing import that

KEPT_APART = ("seconds", "time")
"""Beginnings of quantities that are times, which no two runs share."""


def check_analysis(analysis: Analysis[Any], *options: str) -> None:
    """Run an analysis twice at a small size, and check what it leaves.

    Every cell is measured, with every quantity that a claim reads; a second run takes all from the cache, a fresh one
    measures the same; every figure is drawn; measurements can be sent to other processes.

    Args:
        analysis: The analysis.
        options: Of its command line, such as "--widths", "8": make it small. Two seeds unless "--seeds" is among them.

    Raises:
        AssertionError: something does not hold; the message says what.

    Cost: that of two runs.
    """
    with tempfile.TemporaryDirectory() as folder:
        seeds = () if "--seeds" in options else ("--seeds", "2")
        arguments = [*options, *seeds, "--workers", "1", "--results", folder]
        first = _run(analysis, arguments)
        stored = load(Path(folder) / analysis.name / "latest")
        with that("every cell is measured", analysis.name):
            failed = [f"{failure.cell}: {failure.reason}" for failure in stored.failures]
            assert not failed, "; ".join(failed)
        with that("every figure is drawn", analysis.name):
            drawn = {path.stem for path in (stored.folder / "figures").glob("*.pdf")}
            assert drawn == set(analysis.figures), f"{sorted(set(analysis.figures) - drawn)} are missing: {first}"
        config = parse(analysis.defaults, arguments, prog="", description="")
        plan = Plan.of(analysis, config)
        with that("every claim finds the quantities that it reads", analysis.name):
            found = stored.verdicts.set_index("claim")
            nothing = found.index[
                found["note"].fillna("").str.startswith(("nothing was measured", "its assumptions or"))
            ]
            assert nothing.empty, "; ".join(f"{claim}: {found.loc[claim, 'note']}" for claim in nothing)
        with that("measurements can be sent to other processes", analysis.name):
            pickle.loads(pickle.dumps(plan.task()))
        with that("a second run measures nothing anew", analysis.name):
            assert " 0 to run" in _run(analysis, arguments), "cells were measured again"
        _run(analysis, [*arguments, "--fresh"])
        with that("a fresh run measures the same", analysis.name):
            again = load(Path(folder) / analysis.name / "latest").measurements
            _check_equal(_values(stored.measurements), _values(again))


def _run(analysis: Analysis[Any], arguments: list[str]) -> str:
    with that("it runs from its command line", analysis.name):
        printed, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            code = main(analysis, arguments)
        assert code in (DONE, FAILED), f"exit code {code}: {errors.getvalue().strip()}"
    return printed.getvalue()


def _values(measurements: pd.DataFrame) -> pd.DataFrame:
    return measurements[~measurements["quantity"].str.startswith(KEPT_APART)].reset_index(drop=True)


def _check_equal(before: pd.DataFrame, after: pd.DataFrame) -> None:
    assert len(before) == len(after), f"{len(before)} observations, then {len(after)}"
    same = np.isclose(before["value"], after["value"], rtol=1e-6, atol=0, equal_nan=True)
    if not same.all():
        row = before[~same].iloc[0]
        raise AssertionError(f"{row['quantity']} of cell {row['cell']} was {row['value']}, then another value")
