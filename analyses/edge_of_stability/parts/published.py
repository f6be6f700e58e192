"""The run that the README of the published code shows, on CIFAR-10: its milestones here and there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from torch import nn

from analyses.edge_of_stability.config import Config
from analyses.edge_of_stability.descent import Run, descend
from analyses.edge_of_stability.optimisers import momentum
from analyses.edge_of_stability.part import PAPER, Part
from analyses.edge_of_stability.parts.training import checkpoint_of, rows_of
from analyses.edge_of_stability.setting import setting_of
from analyses.edge_of_stability.windows import Edge
from analyses.part import Observations, where
from curvlab.study import Cell, Claim, Identity

NAME = "published"
ETA = 0.01
"""Step size, so that the threshold is 200."""
ACCURACY = 0.99
"""Share of the training set that ends the run."""
EVERY = 50
"""Steps between measurements, and between looks at the accuracy."""
LIMIT = 12_000
"""Steps after which the run ends anyhow; a milestone that was not reached by then counts as reached there."""
READING = 0.1
"""Relative deviation up to which a milestone counts as met: they are read off figures, and the initialisation is another."""
SHARPNESS = {0: 78.0, 450: 71.0, 2100: 100.0, 3000: 135.0, 4350: 200.0, 9050: 208.0}
LOSS = {0: 0.60, 100: 0.41, 4500: 0.20, 9050: 0.11}
"""Points of the published curves, by step."""
SETTING: Mapping[str, str | int | float] = {
    "problem": "cifar10-5k",
    "network": "fc-tanh",
    "width": 200,
    "depth": 3,
    "samples": 5000,
    "scaling": "standardised",
    "loss": "half-squared",
    "eta": ETA,
    "seed": 0,
}


@dataclass(frozen=True)
class Milestone:
    """A number that can be read off the published figures.

    Attributes:
        statement: what it is.
        value: as published.
        read: the same of a run.
    """

    statement: str
    value: float
    read: Callable[[Run], float]


def _loss_at(step: int) -> Callable[[Run], float]:
    return lambda run: run.losses[min(step, len(run.losses) - 1)]


def _passes(sharpness: float) -> Callable[[Run], float]:
    def read(run: Run) -> float:
        return float(next((point.step for point in run.points if point.eigenvalues[0] >= sharpness), LIMIT))

    return read


def _least_until(step: int) -> Callable[[Run], float]:
    return lambda run: min(point.eigenvalues[0] for point in run.points if point.step <= step)


def _plateau(run: Run) -> float:
    crossing = _passes(2 / ETA)(run)
    return float(
        np.mean([p.eigenvalues[0] for p in run.points if p.step >= crossing] or [run.points[-1].eigenvalues[0]])
    )


MILESTONES: Mapping[str, Milestone] = {
    "first-sharpness": Milestone("The sharpness at the start", 78.0, lambda run: run.points[0].eigenvalues[0]),
    "first-loss": Milestone("The loss at the start", 0.60, _loss_at(0)),
    "loss-100": Milestone("The loss at step 100", 0.41, _loss_at(100)),
    "dip": Milestone("The least sharpness of the first 1000 steps", 71.0, _least_until(1000)),
    "passes-100": Milestone("The step at which the sharpness passes 100", 2100.0, _passes(100.0)),
    "passes-135": Milestone("The step at which the sharpness passes 135", 3000.0, _passes(135.0)),
    "passes-200": Milestone("The step at which the sharpness crosses 2/η = 200", 4350.0, _passes(2 / ETA)),
    "loss-4500": Milestone("The loss at step 4500", 0.20, _loss_at(4500)),
    "plateau": Milestone("The mean sharpness after the crossing, between 203 and 213,", 208.0, _plateau),
    "last-step": Milestone(
        "The step at which 99 % of the samples are fitted", 9050.0, lambda run: len(run.losses) - 1.0
    ),
    "last-loss": Milestone("The loss at that step", 0.11, lambda run: run.losses[-1]),
}
"""What the README's figures show, by the end of the claim's id."""


def _cells(config: Config) -> list[Cell]:
    return [Cell({"part": NAME, **SETTING})] if config.published else []


def _measure(cell: Cell, config: Config) -> Observations:
    setting = setting_of(cell, replace(config, dtype="float32"))
    model = setting.network()
    optimiser = momentum(model, "gd", ETA, 0.0)

    def fitted(now: nn.Module) -> bool:
        return setting.accuracy(now) >= ACCURACY

    run = descend(
        model,
        setting,
        optimiser,
        LIMIT,
        range(0, LIMIT + 1, EVERY),
        until=fitted,
        checkpoint=checkpoint_of(cell, config),
    )
    rows = rows_of(run, Edge(run, optimiser.threshold, ETA))
    return rows + [{"quantity": name, "value": milestone.read(run)} for name, milestone in MILESTONES.items()]


def _deviation(published: float) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """Estimate by the relative deviation from a published number."""

    def estimate(table: pd.DataFrame) -> pd.DataFrame:
        return table.assign(value=table["value"] / published - 1, tolerance=READING)[["seed", "value", "tolerance"]]

    return estimate


def _claims(config: Config) -> list[Claim]:
    if not config.published:
        return []
    return [
        Claim(
            id=f"published-{name}",
            statement=f"{milestone.statement} is that of the published run, {milestone.value:g}, to {READING:.0%}.",
            source=f"{PAPER}, README of the published code",
            measured="The same of this run over the published one, less 1.",
            rule=Identity(coarsest=READING),
            estimate=_deviation(milestone.value),
            expected="supported",
            reason="Data, network, loss and step size are the same; the initialisation is drawn anew.",
            needs=where(NAME),
            quantities=(name,),
        )
        for name, milestone in MILESTONES.items()
    ]


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda _: 3600.0)
