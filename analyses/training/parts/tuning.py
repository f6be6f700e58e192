"""Every configuration of every method, from the tuning seed: the table from which the judged configurations come."""

from __future__ import annotations

from analyses.training.config import Config
from analyses.training.part import Part
from analyses.training.race import entrants
from analyses.training.tuning import NAME, cell_of, measure
from curvlab.study import Cell, Claim


def _cells(config: Config) -> list[Cell]:
    return [cell_of(method.name, index) for method in entrants(config) for index in range(config.configurations)]


def _claims(config: Config) -> list[Claim]:  # noqa: ARG001
    return []


PART = Part(NAME, _cells, measure, _claims, seconds=lambda steps: 0.008 * steps)
