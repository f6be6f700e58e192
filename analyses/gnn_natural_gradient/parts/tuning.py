"""Every configuration of every method: the table from which the selected ones come."""

from __future__ import annotations

from analyses.gnn_natural_gradient.config import Config
from analyses.gnn_natural_gradient.part import Part
from analyses.gnn_natural_gradient.recipe import METHODS
from analyses.gnn_natural_gradient.selection import NAME, cells_of_method, measure
from curvlab.study import Cell, Claim


def _cells(config: Config) -> list[Cell]:
    return [cell for split in config.splits for method in METHODS for cell in cells_of_method(method, split, config)]


def _claims(config: Config) -> list[Claim]:  # noqa: ARG001
    return []


PART = Part(NAME, _cells, measure, _claims, seconds=lambda epochs: 0.004 * epochs)
