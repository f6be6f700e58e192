"""Seconds of a step of every method, and with the steps of the judged runs the seconds to both targets.

The runs themselves are not timed, since worker processes share the machine. One cell a seed times all methods' steps in one
process, in turn; as many at once as there are between rare inversions, so that these fall into every round.
"""

from collections.abc import Callable

from analyses.claims import claim
from analyses.clock import now, seconds_per_step
from analyses.training.comparison import SECONDS, Comparison, against_rivals
from analyses.training.config import Config
from analyses.training.entrants import TUNING, VARIES, chosen, entered, entrants, problem_of
from analyses.training.experiments.judging import EXPLORED, JUDGING, PRACTICE, group_of
from analyses.training.ingredients import Ingredient, compared
from analyses.training.methods import INVERT_EVERY, METHODS, Entrant
from analyses.training.races import TARGETS, Target
from curvlab.problems import Problem
from curvlab.study import (
    Cell,
    Claim,
    Context,
    Expected,
    Experiment,
    Inequality,
    Observations,
    Wins,
    observed,
    undecided,
)
from curvlab.tools.storage import digest


def _steps(method: Entrant, index: int, start: Problem, config: Config, seed: int) -> Callable[[int], float]:
    """Return what takes some steps of a run and returns their seconds; a run that diverges begins anew."""
    run = entered(method, index, start, config, seed)
    taken = 0

    def timed(steps: int) -> float:
        nonlocal run, taken
        data = [run.batches(taken + step) for step in range(steps)]
        taken += steps
        since = now(config.device)
        finite = [run.take(batches) for batches in data]
        spent = now(config.device) - since
        if not all(finite):
            run = entered(method, index, start, config, seed)
        return spent

    return timed


def _measure(cell: Cell, context: Context[Config]) -> Observations:
    config, seed = context.config, int(cell["seed"])
    start = problem_of(config, seed)
    runs = {method.name: _steps(method, chosen(method, context), start, config, seed) for method in entrants(config)}
    return [observed(SECONDS, seconds, method=name) for name, seconds in seconds_per_step(runs, INVERT_EVERY).items()]


def _less_time(versus: Comparison, target: Target, config: Config) -> Claim:
    steps = f"steps_to_{target}"
    return claim(
        f"time-{target}-{versus.method}-{versus.other}", PRACTICE, Wins((steps, SECONDS), "less"),
        f"{METHODS[versus.method].title} needs less time to {config.race.described(target)} than {versus.other}.",
        "Its seconds, steps times the seconds of a step, minus those of the rival, seed by seed.",
        undecided("Its steps are fewer and dearer.", explored=EXPLORED), group=group_of(versus),
        at={"experiment": (JUDGING.name, "timing"), "method": (*versus.methods, None)}, estimate=versus.seconds(steps),
        assumptions=versus.outside,
    )  # fmt: skip


def _faster(ingredient: Ingredient, expected: Expected) -> Claim:
    return claim(
        f"time-step-{ingredient.name}", ingredient.source, Inequality(SECONDS, "less", 1.0, centre="geometric mean"),
        ingredient.faster,
        f"Seconds of a step of {ingredient.method} over those of {ingredient.without}, seed by seed.",
        expected, group=ingredient.group, estimate=ingredient.versus.ratio, bound_from="1: no difference",
    )  # fmt: skip


def _claims(config: Config) -> list[Claim]:
    return [
        *(_less_time(versus, target, config) for versus in against_rivals(config) for target in TARGETS),
        *(_faster(one, one.expected_faster) for one in compared(config) if one.expected_faster),
    ]


TIMING: Experiment[Config] = Experiment(
    name="timing",
    cells=lambda config: [{"field": digest([method.name for method in entrants(config)])[:8]}],
    measure=_measure,
    varies=VARIES,
    claims=_claims,
    seconds=lambda _, config: 4.0 * config.race.cost,
    memory=8e8,
    after=(TUNING,),
)
