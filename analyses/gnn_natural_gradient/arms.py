"""Arms, the recipes that are compared: the runs of an experiment of them, and what a run is judged by."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import nan
from operator import attrgetter

from analyses.gnn_natural_gradient.config import Config
from analyses.gnn_natural_gradient.recipe import Recipe
from analyses.gnn_natural_gradient.training import ACCURACY, VALIDATION, VALIDATION_LOSS, GraphTraining, setting_of
from curvlab.study import Cell, Claim, Context, Experiment, Observations, Point, Trace, follow, observed, stream

BEST_EPOCH = "best_epoch"
JUDGED = (ACCURACY, VALIDATION, VALIDATION_LOSS)
"""What a run is judged by, at the epoch of its lowest validation loss."""
VARIES = attrgetter("varies")
"""What a seed varies, by configuration."""
MEMORY = 1.5e9
"""Peak bytes of a run on the largest graph."""


@dataclass(frozen=True)
class Arm:
    """A recipe with a name.

    Attributes:
        name: The coordinate `arm` of its cells, which no arm of another experiment has.
        recipe: What it is trained with.
        at: Further coordinates, against which figures draw it.
    """

    name: str
    recipe: Recipe
    at: Mapping[str, str | float] = field(default_factory=dict)


Arms = Callable[[Config], Sequence[Arm]]


def seconds(_: Cell, config: Config) -> float:
    """Seconds of a run on karate."""
    return 0.004 * config.epochs


def train(recipe: Recipe, cell: Cell, context: Context[Config], *role: str) -> Trace:
    """Train by a recipe on the split and from the seed of a cell, or from a stream of its own if the run has a role."""
    config, seed = context.config, int(cell["seed"])
    seed = stream(seed, *role) if role else seed
    setting = setting_of(config.problem, str(cell["split"]), config.device, config.dtype, seed)
    return follow(GraphTraining(setting, recipe, seed, config.epochs), config.epochs, checkpoint=context.checkpoint)


def reduced(trace: Trace, recipe: Recipe) -> list[dict[str, object]]:
    """Return what a run is judged by; NaN if it diverged before it showed anything."""
    nothing = dict.fromkeys((*JUDGED, "step"), nan)
    best = min(trace.seen, key=lambda seen: float(seen[VALIDATION_LOSS]), default=nothing)
    values = {**{name: best[name] for name in JUDGED}, BEST_EPOCH: best["step"]}
    return [observed(name, value, status=trace.status, recipe=str(recipe)) for name, value in values.items()]


def experiment_of(name: str, arms: Arms, claims: Callable[[Config], list[Claim]]) -> Experiment[Config]:
    """Return an experiment that trains every arm on the first split."""
    return Experiment(
        name=name,
        cells=partial(_points, arms=arms),
        measure=partial(_measure, arms=arms),
        varies=VARIES,
        claims=claims,
        seconds=seconds,
        memory=MEMORY,
    )


def _points(config: Config, arms: Arms) -> list[Point]:
    return [{"arm": arm.name, "split": config.splits[0], **arm.at} for arm in arms(config)]


def _measure(cell: Cell, context: Context[Config], arms: Arms) -> Observations:
    (recipe,) = (arm.recipe for arm in arms(context.config) if arm.name == cell["arm"])
    return reduced(train(recipe, cell, context), recipe)
