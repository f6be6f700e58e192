"""One network on one problem, with what follows from it at initialisation."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

import curvlab
from analyses.assembly import squared
from analyses.jacobian_rank.config import Config
from curvlab.problems import Problem, resolve
from curvlab.rows import Rows
from curvlab.spectrum import rank
from curvlab.study import Cell

log = logging.getLogger("curvlab")

ARGUMENTS = ("width", "activation", "samples", "similarity", "loss", "outputs", "seed")
"""Coordinates of a cell that are arguments of a problem."""


def flat(z: Float[Tensor, "N C"]) -> Float[Tensor, " R"]:
    """Outputs in row order (output, sample), outputs outermost."""
    return z.T.reshape(-1)


def outputs(model: nn.Module, inputs: Tensor) -> Float[Tensor, " R"]:
    """Outputs of a model in row order."""
    with torch.no_grad():
        return flat(model(inputs))


@dataclass(frozen=True, eq=False)
class Setting:
    """A problem with its kernel at initialisation, computed once and shared by cells."""

    problem: Problem

    @property
    def inputs(self) -> Tensor:
        """Training inputs."""
        return self.problem.train[0]

    @cached_property
    def targets(self) -> Float[Tensor, " R"]:
        """Training targets in row order."""
        return flat(self.problem.train[1])

    @cached_property
    def jacobian(self) -> Rows:
        """Rows of J(0)."""
        return curvlab.jacobian(self.problem.model, self.inputs)

    @cached_property
    def gram(self) -> Float[Tensor, "R R"]:
        """G(0) = J(0) J(0)ᵀ, not divided by the number of samples."""
        return self.jacobian.gram()

    @cached_property
    def eigenvalues(self) -> Float[np.ndarray, " R"]:
        """Eigenvalues of G(0), ascending."""
        return np.asarray(torch.linalg.eigvalsh(self.gram).numpy(force=True))

    @cached_property
    def full_rank(self) -> bool:
        """Whether J(0) has full row rank, which every theorem assumes; a warning says so if it cannot have it."""
        rows = self.jacobian
        if rows.P < rows.R:
            log.warning(
                "%s has P = %d parameters, fewer than its R = %d rows. The theorems need P >= R; steps use the pseudo-inverse.",
                self.problem.name,
                rows.P,
                rows.R,
            )
        return rank(rows).full is True

    @cached_property
    def initial(self) -> Float[Tensor, " R"]:
        """u(0)."""
        return outputs(self.problem.model, self.inputs)

    @property
    def residual(self) -> Float[Tensor, " R"]:
        """u(0) − y."""
        return self.initial - self.targets


def setting_of(cell: Cell, config: Config, **overrides: Any) -> Setting:
    """Return the setting of a cell; the last one is kept, so that neighbouring cells share it."""
    wanted: dict[str, Any] = {name: cell[name] for name in ARGUMENTS if name in cell.coordinates} | overrides
    if wanted.get("width") == 0:
        del wanted["width"]
    spec = str(cell.coordinates.get("problem", config.problem))
    wanted = squared(spec) | wanted
    return _setting(spec, config.device, config.dtype, tuple(sorted(wanted.items())))


@lru_cache(maxsize=1)
def _setting(spec: str, device: str, dtype: str, arguments: tuple[tuple[str, Any], ...]) -> Setting:
    values: Mapping[str, Any] = dict(arguments)
    return Setting(resolve(spec, **values).to(device, getattr(torch, dtype)))
