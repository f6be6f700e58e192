"""The run that the README of the published code shows, on CIFAR-10: its milestones here and there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
from torch import nn

from analyses.claims import claim
from analyses.edge_of_stability.config import Config
from analyses.edge_of_stability.descent import edge_of, gradient_descent
from analyses.edge_of_stability.points import PAPER
from analyses.edge_of_stability.setting import setting_of
from analyses.edge_of_stability.windows import Edge
from curvlab import study
from curvlab.study.inference import Summary
from curvlab.study.loop import Seen

ETA = 0.01
"""Step size, so that the threshold is 200."""
ACCURACY = 0.99
"""Share of the training set that ends the run."""
EVERY = 50
"""Steps between measurements, and between looks at the accuracy."""
LIMIT = 12_000
"""Steps after which the run ends anyhow; a milestone that was not reached by then counts as reached there."""
READING = 0.05
"""Relative error of a number that is read off a figure: half a unit of the last of its digits, as in 0.11."""
ALONE = 0.1
"""Relative deviation up to which a single run counts as meeting a milestone, reading and another initialisation together."""
COARSEST = 0.25
"""The widest prediction interval, with the reading, that counts as support."""
SETTING: Mapping[str, str | int | float] = {
    "problem": "cifar10-5k",
    "network": "fc-tanh",
    "width": 200,
    "depth": 3,
    "samples": 5000,
    "scaling": "standardised",
    "loss": "half-squared",
    "eta": ETA,
}


@dataclass(frozen=True)
class Milestone:
    """A number that can be read off the published figures.

    Attributes:
        statement: What it is.
        value: As published.
        read: The same of a run.
        point: The curve that it is on, "loss" or "sharpness", with the step and the height; None if on neither.
    """

    statement: str
    value: float
    read: Callable[[Edge], float]
    point: tuple[str, float, float] | None


def _loss_at(step: int) -> Callable[[Edge], float]:
    return lambda edge: float(edge.losses[min(step, len(edge.losses) - 1)])


def _passes(sharpness: float) -> Callable[[Edge], float]:
    return lambda edge: float(next(iter(edge.steps[edge.sharpness >= sharpness]), LIMIT))


def _least_until(step: int) -> Callable[[Edge], float]:
    return lambda edge: float(edge.sharpness[edge.steps <= step].min())


def _plateau(edge: Edge) -> float:
    after = edge.sharpness[edge.steps >= _passes(2 / ETA)(edge)]
    return float(after.mean() if len(after) else edge.sharpness[-1])


def _at(curve: str, step: int, value: float, what: str, read: Callable[[Edge], float]) -> Milestone:
    """Return the height of a curve."""
    return Milestone(what, value, read, (curve, step, value))


def _passing(sharpness: float, step: int) -> Milestone:
    """Return the step at which the sharpness passes a value."""
    what = f"The step at which the sharpness passes {sharpness:g}"
    return Milestone(what, step, _passes(sharpness), ("sharpness", step, sharpness))


MILESTONES: Mapping[str, Milestone] = {
    "first-sharpness": _at("sharpness", 0, 78.0, "The sharpness at the start", lambda edge: float(edge.sharpness[0])),
    "first-loss": _at("loss", 0, 0.60, "The loss at the start", _loss_at(0)),
    "loss-100": _at("loss", 100, 0.41, "The loss at step 100", _loss_at(100)),
    "dip": _at("sharpness", 450, 71.0, "The least sharpness of the first 1000 steps", _least_until(1000)),
    "passes-100": _passing(100.0, 2100),
    "passes-135": _passing(135.0, 3000),
    "passes-200": _passing(2 / ETA, 4350),
    "loss-4500": _at("loss", 4500, 0.20, "The loss at step 4500", _loss_at(4500)),
    "plateau": _at("sharpness", 9050, 208.0, "The mean sharpness after the crossing, between 203 and 213,", _plateau),
    "last-step": Milestone(
        "The step at which 99 % of the samples are fitted", 9050.0, lambda edge: len(edge.losses) - 1.0, None
    ),
    "last-loss": _at("loss", 9050, 0.11, "The loss at that step", lambda edge: float(edge.losses[-1])),
}
"""What the README's figures show, by the end of the claim's id."""


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    setting = setting_of(cell, replace(context.config, dtype="float32"))

    def accuracy(model: nn.Module) -> Seen:
        return {"accuracy": setting.accuracy(model)}

    def fitted(seen: Seen) -> bool:
        return bool(seen.get("accuracy", 0.0) >= ACCURACY)

    process = gradient_descent(setting, ETA, range(0, LIMIT + 1, EVERY), see=accuracy)
    edge = edge_of(process, LIMIT, until=fitted, checkpoint=context.checkpoint)
    return edge.rows() + [study.observed(name, milestone.read(edge)) for name, milestone in MILESTONES.items()]


def _deviation(table: pd.DataFrame, published: float) -> pd.DataFrame:
    """Estimate by the log of the geometric mean over a published number, the same at every seed.

    The tolerance is half the 95 % prediction interval of one more run, and the error of reading.
    """
    logs = Summary.of(np.log(table["value"].to_numpy(dtype=float) / published))
    tolerance = READING + logs.prediction(0.95) if logs.seeds > 1 else ALONE
    return study.identities(table.assign(value=logs.mean, tolerance=tolerance))


CLAIMS = [
    claim(f"published-{name}", f"{PAPER}, README of the published code", study.Identity(name, coarsest=COARSEST),
          f"{milestone.statement} agrees with the published run's, {milestone.value:g}.",
          f"Log of the geometric mean over the published number, against the 95 % prediction interval of one more run and a "
          f"reading error of {READING:.0%}; of a single run against {ALONE:.0%}.",
          study.supported("Data, network, loss and step size are the same; the initialisation is drawn anew."),
          group="paper", estimate=partial(_deviation, published=milestone.value))
    for name, milestone in MILESTONES.items()
]  # fmt: skip


def _cells(config: Config) -> list[study.Point]:
    seeds = config.seeds_run[: config.published_seeds] if config.published else ()
    return [{**SETTING, "seed": seed} for seed in seeds]


PUBLISHED: study.Experiment[Config] = study.Experiment(
    name="published",
    cells=_cells,
    measure=_measure,
    varies=("initialisation",),
    claims=CLAIMS,
    seconds=3600.0,
    memory=1e9,
)
