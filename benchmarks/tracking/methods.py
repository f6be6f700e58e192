"""Ways to find the leading eigenpairs of an operator, the next time of one that has changed a little."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from curvlab.spectrum import Operator, eigenpairs

TOLERANCE = 1e-3
"""Residual `‖Hx − θx‖` over θ that every measurement has to reach: a bound on the relative error of θ."""

ASKED = 0.9 * TOLERANCE
"""Tolerance that curvlab is asked for, which is relative to the largest eigenvalue; a second one that is much smaller takes
another call."""

BLOCK = 8
"""Vectors in a product: eigenvalues at the edge stand close together."""

LIMIT = 1000
"""Products of power iteration for one eigenvalue, after which it gives up."""

MethodName = Literal["curvlab", "eigsh-cold", "eigsh-warm", "power"]


class Counted(Operator):
    """An operator that counts products with single vectors."""

    def __init__(self, operator: Operator) -> None:
        self.operator, self.products = operator, 0
        self.space, self.dtype, self.device = operator.space, operator.dtype, operator.device

    def held(self) -> AbstractContextManager[None]:  # noqa: D102
        return self.operator.held()

    def matmat(self, block: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:  # noqa: D102
        self.products += len(block)
        return self.operator.matmat(block)


@dataclass(frozen=True, eq=False)
class Found:
    """Eigenpairs, and what the next measurement starts from.

    Attributes:
        values: θ, descending.
        vectors: x of norm 1, one a row.
        start: vectors to start from.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "k P"]
    start: Float[Tensor, "m P"]


Find = Callable[[Operator, int, Tensor | None], Found]
"""Finds the k largest eigenpairs of an operator, given what the last measurement left."""


@dataclass(frozen=True)
class Method:
    """One way to find eigenpairs.

    Attributes:
        title: its name in the table.
        find: finds them.
        bounded: whether it stops at a residual within `TOLERANCE`, so that a larger one is its fault.
    """

    title: str
    find: Find
    bounded: bool


def _curvlab(operator: Operator, k: int, start: Tensor | None) -> Found:
    found = eigenpairs(operator, k, tolerance=ASKED, start=start, block=BLOCK)
    while bool((found.residuals > TOLERANCE * found.values.abs().cpu()).any()):
        least = float(found.values.abs().min() / found.values.abs().max())
        found = eigenpairs(operator, k, tolerance=ASKED * least, start=found, block=BLOCK)
    return Found(found.values, found.vectors, found.subspace)


def _scipy(operator: LinearOperator, k: int, tolerance: float, start: Tensor | None, like: Operator) -> Found:
    given = None if start is None else start.sum(0).numpy(force=True)
    values, vectors = eigsh(operator, k, which="LA", tol=tolerance, v0=given)
    order = np.argsort(values)[::-1]
    rows = torch.from_numpy(np.ascontiguousarray(vectors[:, order].T)).to(like.device, like.dtype)
    return Found(torch.from_numpy(values[order].copy()), rows, rows)


def _cold(operator: Operator, k: int, _: Tensor | None) -> Found:
    return _scipy(operator.scipy(), k, 0.0, None, operator)


def _warm(operator: Operator, k: int, start: Tensor | None) -> Found:
    return _scipy(operator.scipy(), k, TOLERANCE, start, operator)


def _power(operator: Operator, k: int, start: Tensor | None) -> Found:
    """Iterate with one vector at a time, orthogonal to those that were found."""
    if start is None:
        drawn = torch.randn(k, operator.size, generator=torch.Generator().manual_seed(0), dtype=operator.dtype)
        start = drawn.to(operator.device)
    values: list[Tensor] = []
    vectors = start[:0]
    for x in start:
        for _ in range(LIMIT):
            x = x - (vectors @ x) @ vectors
            x = x / x.norm()
            image = operator.matmat(x[None])[0]
            theta = x @ image
            if float((image - theta * x).norm()) <= TOLERANCE * abs(float(theta)):
                break
            x = image
        x = x / x.norm()
        values.append(theta.cpu())
        vectors = torch.cat([vectors, x[None]])
    return Found(torch.stack(values), vectors, vectors)


METHODS: dict[MethodName, Method] = {
    "curvlab": Method(f"curvlab, blocks of {BLOCK}, from the last ones", _curvlab, bounded=True),
    "eigsh-cold": Method("eigsh, random start, tolerance 0", _cold, bounded=True),
    "eigsh-warm": Method(f"eigsh, from the last ones, tolerance {TOLERANCE:g}", _warm, bounded=False),
    "power": Method("power iteration with deflation, from the last ones", _power, bounded=False),
}
