"""The small runs whose results are frozen, and one run of an analysis through its command line, in this process.

Between them the runs of an analysis have every experiment and every claim of the run without options, and no data that
have to be fetched.
"""

import contextlib
import dataclasses
import io
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd

from curvlab.study import main

RUNS: Mapping[str, Mapping[str, str]] = {
    "ntk_isotropy": {
        "digits": "--seeds 3 --widths 64 128 256",
        "karate": "--seeds 2 --problem karate-gcn --widths 32 64",
    },
    "jacobian_rank": {
        "digits": "--seeds 3 --widths 64 256 1024 16384",
        "karate": "--seeds 2 --problem karate-gcn --samples 4 --widths 32 128 --activation relu",
    },
    "edge_of_stability": {
        "digits": "--seeds 3",
        "options": "--seeds 2 --width 16 --samples 32 --steps 200 --every 15 --structures kfac --preconditioners kfac "
        "--adam 0.001 --batch-size 8 16 --sweep-depths 2 --sweep-widths 8 --sweep-samples 64",
        "karate": "--seeds 2 --problem karate-gcn --steps 60 --every 15 --structures kfac --preconditioners",
    },
    "gnn_acceleration": {"karate": "--seeds 3 --draws 20 --depths 0 1 2 3"},
    "gnn_natural_gradient": {
        "karate": "--seeds 3 --epochs 40 --configurations 2 --starts 1 --dtype float64",
        "single precision": "--seeds 2 --epochs 20 --configurations 1 --starts 1 --epsilons 0.1 --gammas 1 --refreshes 4",
    },
    "spectrum": {
        "digits": "--seeds 2 --width 8 --top 3 --probes 2 --lanczos 12 "
        "--structures full block-diagonal block-tridiagonal unit-wise diagonal kfac ekfac",
        "trained": "--seeds 2 --width 6 --top 2 --probes 2 --lanczos 8 --steps 10 --structures full kfac",
        "karate": "--seeds 2 --problem karate-gcn --width 4 --top 1 --probes 2 --lanczos 4 --structures full kfac",
    },
    "training": {
        "digits": "--seeds 2 --races 2 --steps 40 --configurations 2 --target-loss 0.5 --target-accuracy 0.8 --dtype float64 "
        "--structures full block-diagonal layer-wise block-tridiagonal unit-wise diagonal kfac ekfac",
        "single precision": "--seeds 2 --races 2 --steps 10 --configurations 1 --target-loss 2 --target-accuracy 0.2 --rivals sgd "
        "--structures full kfac",
    },
}  # fmt: skip
"""Options by analysis and run.

Where all structures are named, the stored results lack one that is measured by default since, and whose claims would enter
their families: leave the option out when the results are stored again.
"""

COMPUTED = frozenset(
    {
        "value", "tolerance", "threshold", "time", "error", "eigenvalue", "place", "rho_relative", "predicted", "smallest",
        "largest", "target", "sufficient", "condition", "angle",
    }
)  # fmt: skip
"""Columns of measurements that hold computed numbers; the others say which number it is."""

KEY = ("run", "cell", "quantity", "labels", "column", "occurrence")
"""What a stored number is known by; `occurrence` counts those that share the rest."""


@dataclass(frozen=True)
class Results:
    """What the runs of an analysis gave.

    Attributes:
        numbers: One row a computed number, its columns `KEY` and `number`.
        verdicts: Verdicts by run and claim.
        seconds: Processor time that it took.
    """

    numbers: pd.DataFrame
    verdicts: dict[str, dict[str, dict[str, Any]]]
    seconds: float


def results(name: str) -> Results:
    """Run all small runs of an analysis."""
    since = time.process_time()
    numbers: list[dict[str, object]] = []
    verdicts = {}
    for run, options in RUNS[name].items():
        table, judged = once(name, options)
        numbers += [{"run": run, **number} for row in table.to_dict("records") for number in _numbers(row)]
        verdicts[run] = {verdict["claim"]: verdict for verdict in judged}
    return Results(_counted(pd.DataFrame(numbers)), verdicts, time.process_time() - since)


def once(name: str, options: str) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Run an analysis once, without figures, and return its measurements and its verdicts.

    Raises:
        RuntimeError: it did not end well, or a cell of it failed.
    """
    analysis = dataclasses.replace(import_module(f"analyses.{name}").ANALYSIS, figures={})
    with tempfile.TemporaryDirectory() as folder:
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = main(analysis, [*options.split(), "--workers", "1", "--quiet", "--results", folder])
        if code != 0:
            raise RuntimeError(f"{name} {options} ended with {code}: {output.getvalue()}")
        latest = Path(folder) / name / "latest"
        judged = json.loads((latest / "verdicts.json").read_text())
        if judged["failures"]:
            raise RuntimeError(f"{name} {options}: a cell failed: {judged['failures'][0]}")
        return pd.read_parquet(latest / "measurements.parquet"), judged["verdicts"]


def coordinates(cell: str) -> dict[str, Any]:
    """The coordinates of a cell from its key."""
    found: dict[str, Any] = json.loads(cell)
    return found


def canonical(entries: Mapping[str, object]) -> str:
    """Entries as text that does not depend on their order."""
    return json.dumps(dict(sorted(entries.items())), ensure_ascii=False)


def _numbers(row: Mapping[str, Any]) -> list[dict[str, object]]:
    """The computed numbers of an observation."""
    cell = coordinates(row["cell"])
    inside = {name: entry for name, entry in row.items() if name not in {*cell, "cell", "quantity"}}
    labels = {name: _plain(entry) for name, entry in inside.items() if name not in COMPUTED and not _absent(entry)}
    key = {"cell": canonical(cell), "quantity": row["quantity"], "labels": canonical(labels)}
    return [
        {**key, "column": name, "number": float(entry)}
        for name, entry in inside.items()
        if name in COMPUTED and (name == "value" or not _absent(entry))
    ]


def _absent(entry: object) -> bool:
    return entry is None or entry != entry


def _plain(entry: object) -> object:
    """A label as JSON has it; a whole number is an integer, although a column with gaps holds floats."""
    return int(entry) if isinstance(entry, float) and entry.is_integer() else entry


def _counted(numbers: pd.DataFrame) -> pd.DataFrame:
    count = numbers.groupby(list(KEY[:-1])).cumcount()
    return numbers.assign(occurrence=count)[[*KEY, "number"]]
