"""An analysis from its parts: what every analysis does with its claims, cells and data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from analyses.part import C, Part
from curvlab.problems import GRAPHS, DataUnavailable, Problem, ProblemError, resolve, swept_arguments
from curvlab.study import Cell, Claim, UsageError
from curvlab.study import DataUnavailable as StudyDataUnavailable

Parts = Mapping[str, Part[C]]


@contextmanager
def problem_faults() -> Iterator[None]:
    """End the run with a message where the problem that the user named does not exist, or its data are absent."""
    try:
        yield
    except ProblemError as error:
        raise UsageError(f"--problem: {error}") from error
    except DataUnavailable as error:
        raise StudyDataUnavailable(str(error)) from error


def claims_of(parts: Parts[C]) -> Callable[[C], list[Claim]]:
    """Return the claims of all parts, from a configuration."""

    @problem_faults()
    def claims(config: C) -> list[Claim]:
        return [claim for part in parts.values() for claim in part.claims(config)]

    return claims


def cells_of(parts: Parts[C], neighbours: Callable[[Cell], object]) -> Callable[[C], list[Cell]]:
    """Return the cells of all parts, from a configuration; those with equal `neighbours` stand side by side."""

    @problem_faults()
    def cells(config: C) -> list[Cell]:
        return sorted((cell for part in parts.values() for cell in part.cells(config)), key=neighbours)  # type: ignore[arg-type]

    return cells


def data_hash(spec: str, **arguments: object) -> str:
    """Return a digest of a problem's training and test data.

    Raises:
        UsageError: the problem does not exist, or not with these arguments.
        DataUnavailable: of `curvlab.study`: its data are absent.
    """
    with problem_faults():
        try:
            problem: Problem = resolve(spec, **arguments)
        except ValueError as error:
            raise UsageError(f"--problem: {error}") from error
    digest = hashlib.sha256()
    for tensor in (*problem.train, *problem.test):
        digest.update(tensor.numpy(force=True).tobytes())
    return digest.hexdigest()


def classifies_nodes(spec: str) -> bool:
    """Whether the inputs of a problem are nodes of a graph, so that no other network can be built on them."""
    return spec.removesuffix("-gcn") in GRAPHS


def squared(spec: str) -> dict[str, Any]:
    """Return the argument by which a problem that classifies by default has a half squared error; none if it has one."""
    return {"loss": "half-squared"} if swept_arguments(spec).get("loss") == "cross-entropy" else {}
