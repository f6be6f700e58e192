"""Seconds of a step of every method, and with the steps of the judged runs the seconds to both targets.

The runs themselves are not timed, since worker processes share the machine. One cell a seed times all methods' steps in one
process, in turn; as many at once as there are between rare inversions, so that these fall into every round.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

from analyses.clock import now, seconds_per_step
from analyses.part import Observations
from analyses.training.comparison import SECONDS
from analyses.training.config import Config
from analyses.training.methods import INVERT_EVERY, Method, Optimiser
from analyses.training.part import Part, cells_of
from analyses.training.parts.judging import NAME as JUDGING
from analyses.training.parts.judging import (
    PRACTICE,
    TARGETS,
    ingredient_claims_apply,
    structure_comparisons,
    words,
)
from analyses.training.race import entrants, optimiser_of, problem_of
from analyses.training.run import batches, take_step
from analyses.training.tuning import chosen
from curvlab.problems import Problem
from curvlab.study import Cell, Claim, Inequality
from curvlab.tools.storage import digest

NAME = "timing"


def _cells(config: Config) -> list[Cell]:
    field = digest([method.name for method in entrants(config)])[:8]
    return cells_of(NAME, config.raced, [{"field": field}])


def _steps(method: Method, start: Problem, config: Config, seed: int) -> Callable[[int], float]:
    """Return what takes some steps of a run and returns their seconds; a run that diverges begins anew."""
    point = method.points[chosen(method.name, config)]

    def begin() -> tuple[Problem, Optimiser]:
        problem = replace(start, model=copy.deepcopy(start.model))
        return problem, optimiser_of(method, problem, point, config, seed)

    problem, optimiser = begin()
    taken = 0

    def timed(steps: int) -> float:
        nonlocal problem, optimiser, taken
        data = [batches(problem, config.task, seed, taken + step, method.passes) for step in range(steps)]
        taken += steps
        since = now(config.device)
        finite = [take_step(problem, optimiser, *step) for step in data]
        spent = now(config.device) - since
        if not all(finite):
            problem, optimiser = begin()
        return spent

    return timed


def _measure(cell: Cell, config: Config) -> Observations:
    seed = int(cell["seed"])
    start = problem_of(config, seed)
    runs = {method.name: _steps(method, start, config, seed) for method in entrants(config)}
    return [
        {"quantity": SECONDS, "method": name, "value": seconds}
        for name, seconds in seconds_per_step(runs, INVERT_EVERY, rounds=1).items()
    ]


def _claims(config: Config) -> list[Claim]:
    claims = [
        Claim(
            id=f"time-{target}-{versus.method}",
            statement=f"{versus.method} natural gradient needs less time to {words(target, config)} than the best tuned "
            "first-order method.",
            source=f"{PRACTICE}, for every structure",
            measured="log10 of its seconds, steps times the seconds of a step, over those of the rival that is best in time.",
            rule=Inequality(0.0, "less"),
            estimate=versus.seconds(quantity),
            expected="open",
            reason="Its steps are fewer and dearer.",
            assumptions=versus.outside,
            needs=versus.needs(JUDGING, NAME),
            quantities=(quantity, SECONDS),
        )
        for versus in structure_comparisons(config)
        for quantity, target in TARGETS.items()
    ]
    claims += [
        Claim(
            id=f"time-step-{which.name}",
            statement=which.faster.statement,
            source=which.source,
            measured=f"log10 of the seconds of a step of {which.versus.method} over those of {which.versus.others[0]}.",
            rule=Inequality(0.0, "less"),
            estimate=which.versus.steps,
            expected=which.faster.expected,
            reason=which.faster.reason,
            needs=which.versus.needs(NAME),
            quantities=(SECONDS,),
        )
        for which in ingredient_claims_apply(config)
        if which.faster
    ]
    return claims


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda steps: 4.0 if steps else 0.0)
