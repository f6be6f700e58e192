"""Results on disk: one folder per configuration and day, whole or marked as partial, and ``latest``.

A run works in ``<results>/<analysis>/<date>-<digest>-partial``, where its log grows, and renames that folder
to ``<date>-<digest>`` when everything is in it. An interrupted run leaves the partial folder, and the same
command completes it. ``latest`` points to the last complete folder: a symbolic link, or a text file with its
name where links cannot be made.
"""

import io
import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from curvlab.study.cells import Cell, phrase
from curvlab.study.claims import Claim, Failure, Verdict
from curvlab.study.faults import UsageError
from curvlab.study.measurements import records
from curvlab.tools.storage import make_folder, write, write_json, writing

PARTIAL = "-partial"


@dataclass(frozen=True)
class Drawn:
    """A figure of a results folder.

    Attributes:
        name: Its name; the files are ``figures/<name>.png`` and ``.pdf``.
        caption: What it shows.
        claims: Ids of the claims that it is about.
        fault: Why it could not be drawn; empty if it was.
    """

    name: str
    caption: str = ""
    claims: tuple[str, ...] = ()
    fault: str = ""


@dataclass(frozen=True)
class Results:
    """What a results folder holds, read back.

    Attributes:
        folder: The folder.
        config: Recorded options.
        environment: Versions, commit, hardware, threads.
        measurements: One row per observation.
        verdicts: One row per claim: the verdict and the claim's own text.
        failures: Cells without measurements.
        complete: Whether every cell was tried.
        figures: The figures, as far as they are drawn.
    """

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    measurements: pd.DataFrame
    verdicts: pd.DataFrame
    failures: tuple[Failure, ...]
    complete: bool
    figures: tuple[Drawn, ...] = ()

    @property
    def by_claim(self) -> dict[str, dict[str, Any]]:
        """The rows of the verdicts by claim."""
        return {str(row["claim"]): row for row in records(self.verdicts)}


def verdict_table(claims: Sequence[Claim], verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """One row per claim: the verdict's fields, then what the claim says, of what, and how it is decided."""
    rows = [
        asdict(verdict)
        | {
            "statement": claim.statement,
            "source": claim.source,
            "measured": claim.measured,
            "group": claim.group,
            "given": claim.given,
            "experiment": claim.experiment,
            "varies": list(claim.varies),
            "cells": phrase(claim.where),
            "quantities": list(claim.rule.names),
            "sort": type(claim.rule).__name__,
            "rule": str(claim.rule),
            "bound_from": claim.bound_from,
            "estimand": claim.rule.estimand,
            "region": list(claim.rule.region),
            "logarithmic": claim.rule.logarithmic,
            "expected": claim.expected.outcome,
            "reason": claim.expected.reason,
            "explored": claim.expected.explored,
        }
        for claim, verdict in zip(claims, verdicts, strict=True)
    ]
    return pd.DataFrame(rows)


def write_measurements(folder: Path, measurements: pd.DataFrame) -> None:
    """Write ``measurements.parquet``."""
    buffer = io.BytesIO()
    measurements.to_parquet(buffer, index=False)
    write(folder / "measurements.parquet", buffer.getvalue())


def write_rows(folder: Path, claims: Sequence[Claim], measurements: pd.DataFrame) -> None:
    """Write ``rows/<claim>.csv``, the observations that each claim reads, where there are any."""
    make_folder(folder / "rows")
    cells = [Cell.from_key(key) for key in measurements["cell"].unique()]
    for claim in claims:
        rows = claim.reads(measurements, cells)
        if len(rows):
            text = rows.drop(columns="cell").dropna(axis="columns", how="all").to_csv(index=False)
            write(rows_of(folder, claim.id), text.encode())


def rows_of(folder: Path, claim: str) -> Path:
    """Where the observations lie that a claim reads."""
    name = re.sub(r"[^\w.+-]", "_", claim)
    return folder / "rows" / f"{name}.csv"


def write_verdicts(folder: Path, verdicts: pd.DataFrame, failures: Sequence[Failure], complete: bool) -> None:
    """Write ``verdicts.json``; numbers that do not exist become null."""
    content = {
        "complete": complete,
        "verdicts": [{name: _finite(entry) for name, entry in row.items()} for row in records(verdicts)],
        "failures": [{"cell": dict(f.cell.coordinates), "reason": f.reason} for f in failures],
    }
    write_json(folder / "verdicts.json", content)


def _finite(entry: object) -> object:
    if isinstance(entry, list | tuple):
        return [_finite(one) for one in entry]
    return None if isinstance(entry, float) and not math.isfinite(entry) else entry


def final_name(partial: Path) -> Path:
    """The name that a partial folder gets when it is finished."""
    return partial.with_name(partial.name.removesuffix(PARTIAL))


def promote(partial: Path) -> Path:
    """Rename a finished partial folder to its final name, replacing one of the same day and digest."""
    final = final_name(partial)
    replaced = partial.with_name(f".{final.name}.replaced")
    with writing(final):
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        partial.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    point_to(final)
    return final


def point_to(folder: Path) -> None:
    """Let ``latest`` beside ``folder`` point to it."""
    pointer = folder.with_name("latest")
    temporary = folder.with_name(".latest")
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(folder.name, target_is_directory=True)
        temporary.replace(pointer)
    except (OSError, NotImplementedError):
        write(pointer, folder.name.encode())


def resolve(folder: Path) -> Path:
    """A results folder, following ``latest`` whether it is a link or a text file."""
    return folder.with_name(folder.read_text().strip()) if folder.is_file() else folder.resolve()


def latest(results: Path, analysis: str) -> Path | None:
    """The last complete results folder of an analysis; None before the first."""
    pointer = results / analysis / "latest"
    return resolve(pointer) if pointer.exists() else None


def load(folder: Path) -> Results:
    """Read a results folder, or ``latest``.

    Raises:
        UsageError: it is not a results folder, or a file in it cannot be read.
    """
    folder = resolve(folder)
    try:
        judged = json.loads((folder / "verdicts.json").read_text())
        return Results(
            folder=folder,
            config=json.loads((folder / "config.json").read_text()),
            environment=json.loads((folder / "environment.json").read_text()),
            measurements=pd.read_parquet(folder / "measurements.parquet"),
            verdicts=pd.DataFrame(judged["verdicts"]),
            failures=tuple(Failure(Cell(f["cell"]), f["reason"]) for f in judged["failures"]),
            complete=judged["complete"],
            figures=_read_figures(folder),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder} is not a readable results folder: {error}") from error


def write_figures(folder: Path, figures: Sequence[Drawn]) -> None:
    """Write ``figures.json``: what the figures show."""
    write_json(folder / "figures.json", [asdict(figure) for figure in figures])


def _read_figures(folder: Path) -> tuple[Drawn, ...]:
    path = folder / "figures.json"
    stored = json.loads(path.read_text()) if path.exists() else []
    return tuple(Drawn(**figure | {"claims": tuple(figure["claims"])}) for figure in stored)
