"""By what a run knows a problem again: a digest of its data, its model with the parameters that it has, and its loss."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from curvlab.problems.problem import Problem
from curvlab.problems.registry import ProblemError, resolve

PLAIN = (bool, int, float, str, type(None))
"""Types of a module's attributes that are settings, such as a loss's reduction."""


def instance(spec: str, **arguments: object) -> Problem:
    """Return the problem of seed 0, by which a run knows its problem again, the same whatever random numbers were drawn.

    Raises:
        ProblemError: the problem does not exist, or not with these arguments.
        DataUnavailable: its data are absent.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        try:
            return resolve(spec, **{"seed": 0} | arguments)
        except ProblemError:
            raise
        except ValueError as error:
            raise ProblemError(f"Problem {spec!r}: {error}") from error


def data_hash(spec: str, **arguments: object) -> str:
    """Return a digest of a problem's `instance`, whose errors these are."""
    return digest_of(instance(spec, **arguments))


def digest_of(problem: Problem) -> str:
    """Return a digest of a problem's data, of its model with the parameters that it has, and of its loss."""
    digest = hashlib.sha256()
    for tensor in (*problem.train, *problem.test):
        _add(digest.update, tensor)
    for module in (problem.model, problem.loss):
        digest.update(repr(module).encode())
        for name, part in module.named_modules():
            settings = {key: value for key, value in sorted(vars(part).items()) if isinstance(value, PLAIN)}
            digest.update(f"{name}: {_source(type(part))} {settings}".encode())
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            digest.update(name.encode())
            _add(digest.update, tensor)
    return digest.hexdigest()


def _add(update: Callable[[bytes], object], tensor: Tensor) -> None:
    """Update a digest by shape, type and entries of a tensor."""
    update(f"{list(tensor.shape)} {tensor.dtype} {tensor.layout}".encode())
    values = tensor.detach().cpu()
    if values.layout is torch.sparse_coo:
        values = values.coalesce()
        parts = [values.indices(), values.values()]
    elif values.layout is torch.sparse_csr:
        parts = [values.crow_indices(), values.col_indices(), values.values()]
    else:
        parts = [values]
    for part in parts:
        update(part.resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _source(kind: type[nn.Module]) -> str:
    """Return the text of a class of the user's own, else its name."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind.__module__.partition(".")[0] in ("torch", "curvlab"):
        return name
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return name
