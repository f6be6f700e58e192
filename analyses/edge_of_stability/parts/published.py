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
        point: the curve that it is on, "loss" or "sharpness", with the step and the height; None if on neither.
    """

    statement: str
    value: float
    read: Callable[[Run], float]
    point: tuple[str, float, float] | None


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


def _at(curve: str, step: int, value: float, what: str, read: Callable[[Run], float]) -> Milestone:
    """Return the height of a curve."""
    return Milestone(what, value, read, (curve, step, value))


def _passing(sharpness: float, step: int) -> Milestone:
    """Return the step at which the sharpness passes a value."""
    what = f"The step at which the sharpness passes {sharpness:g}"
    return Milestone(what, step, _passes(sharpness), ("sharpness", step, sharpness))


MILESTONES: Mapping[str, Milestone] = {
    "first-sharpness": _at(
        "sharpness", 0, 78.0, "The sharpness at the start", lambda run: run.points[0].eigenvalues[0]
    ),
    "first-loss": _at("loss", 0, 0.60, "The loss at the start", _loss_at(0)),
    "loss-100": _at("loss", 100, 0.41, "The loss at step 100", _loss_at(100)),
    "dip": _at("sharpness", 450, 71.0, "The least sharpness of the first 1000 steps", _least_until(1000)),
    "passes-100": _passing(100.0, 2100),
    "passes-135": _passing(135.0, 3000),
    "passes-200": _passing(2 / ETA, 4350),
    "loss-4500": _at("loss", 4500, 0.20, "The loss at step 4500", _loss_at(4500)),
    "plateau": _at("sharpness", 9050, 208.0, "The mean sharpness after the crossing, between 203 and 213,", _plateau),
    "last-step": Milestone(
        "The step at which 99 % of the samples are fitted", 9050.0, lambda run: len(run.losses) - 1.0, None
    ),
    "last-loss": _at("loss", 9050, 0.11, "The loss at that step", lambda run: run.losses[-1]),
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
