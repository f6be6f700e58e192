"""An analysis from its parts: what every analysis does with its claims, cells and data."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from analyses.part import C, Part
from curvlab.problems import GRAPHS, DataUnavailable, Problem, ProblemError, resolve, swept_arguments
from curvlab.study import Cell, Claim, UsageError
from curvlab.study import DataUnavailable as StudyDataUnavailable

Parts = Mapping[str, Part[C]]

PLAIN = (bool, int, float, str, type(None))
"""Types of a module's attributes that are settings, such as a loss's reduction."""


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


def instance(spec: str, **arguments: object) -> Problem:
    """Return the problem of seed 0, by which a run knows its problem again, the same whatever random numbers were drawn.

    Raises:
        UsageError: the problem does not exist, or not with these arguments.
        DataUnavailable: of `curvlab.study`: its data are absent.
    """
    with problem_faults(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        try:
            return resolve(spec, **{"seed": 0} | arguments)
        except ValueError as error:
            raise UsageError(f"--problem: {error}") from error


def data_hash(spec: str, **arguments: object) -> str:
    """Return a digest of a problem's `instance`, whose errors these are."""
    return digest_of(instance(spec, **arguments))


def digest_of(problem: Problem) -> str:
    """Return a digest of a problem's data, of its model with the parameters that it has, and of its loss."""
    digest = hashlib.sha256()
    for tensor in (*problem.train, *problem.test):
        _add(digest, tensor)
    for module in (problem.model, problem.loss):
        digest.update(repr(module).encode())
        for name, part in module.named_modules():
            settings = {key: value for key, value in sorted(vars(part).items()) if isinstance(value, PLAIN)}
            digest.update(f"{name}: {_source(type(part))} {settings}".encode())
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            digest.update(name.encode())
            _add(digest, tensor)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, tensor: Tensor) -> None:
    """Add shape, type and entries of a tensor."""
    digest.update(f"{list(tensor.shape)} {tensor.dtype} {tensor.layout}".encode())
    values = tensor.detach().cpu()
    if values.layout is torch.sparse_coo:
        values = values.coalesce()
        parts = [values.indices(), values.values()]
    elif values.layout is torch.sparse_csr:
        parts = [values.crow_indices(), values.col_indices(), values.values()]
    else:
        parts = [values]
    for part in parts:
        digest.update(part.resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _source(kind: type[nn.Module]) -> str:
    """Return the text of a class of the user's own, else its name."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind.__module__.partition(".")[0] in ("torch", "curvlab"):
        return name
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return name


def classifies_nodes(spec: str) -> bool:
    """Whether the inputs of a problem are nodes of a graph, so that no other network can be built on them."""
    return spec.removesuffix("-gcn") in GRAPHS


def squared(spec: str) -> dict[str, Any]:
    """Return the argument by which a problem that classifies by default has a half squared error; none if it has one."""
    return {"loss": "half-squared"} if swept_arguments(spec).get("loss") == "cross-entropy" else {}
