"""Starts above the threshold, and a step size that is lowered at the edge (claims 9 and 10)."""

import itertools
from typing import Any

from analyses.claims import claim
from analyses.edge_of_stability.config import Config
from analyses.edge_of_stability.descent import TOLERANCE, descend, edge_of, gradient_descent
from analyses.edge_of_stability.points import HOVERING, HOVERS, memory, page, points, settled
from analyses.edge_of_stability.setting import Setting, setting_of
from analyses.edge_of_stability.windows import NEVER, Edge
from curvlab import study
from curvlab.spectrum import eigenpairs

FACTORS = (1.2, 1.6)
"""S(0) over 2/η of the runs that start above the threshold."""
EARLY = 50
"""Steps in which the sharpness is to fall to the threshold; it is measured at every one of them."""
SHARE = 3
"""The share of the steps after which η is lowered, as a divisor."""


def _points(config: Config) -> list[study.Point]:
    catapults = [{"schedule": "catapult", "factor": factor} for factor in FACTORS]
    drop = [{"schedule": "drop", "factor": 0.0}] if max(config.etas) > config.middle else []
    return points(config, [*catapults, *drop])


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    config = context.config
    setting = setting_of(cell, config)
    return _drop(setting, config) if cell["schedule"] == "drop" else _catapult(setting, float(cell["factor"]), config)


def _catapult(setting: Setting, factor: float, config: Config) -> list[dict[str, object]]:
    steps = config.steps // 2
    initial = float(eigenpairs(setting.hessian(setting.network()), 1, tolerance=TOLERANCE).values[0])
    measured = {*range(EARLY + 1), *config.measured(steps)}
    edge = edge_of(gradient_descent(setting, factor * 2.0 / initial, measured, config.top), steps)
    early = edge.ratio[(edge.steps > 0) & (edge.steps <= EARLY)]
    lowest = [study.observed("lowest", float(early.min()))] if len(early) else []
    return [*edge.reached(), *edge.at_edge(), *edge.course(), *lowest]


def _drop(setting: Setting, config: Config) -> list[dict[str, object]]:
    """Training whose η is lowered: what is seen of it is that of the run from there on, against its own threshold."""
    first, last = max(config.etas), config.middle
    lowered = config.steps // SHARE
    process = gradient_descent(setting, first, config.measured(), config.top)

    def lower(step: int) -> None:
        process.optimiser.steps.param_groups[0]["lr"] = first if step < lowered else last

    process.before = lower
    whole = descend(process, config.steps)
    before = study.Trace([seen for seen in whole.seen if seen["step"] < lowered])
    after = [{**seen, "step": seen["step"] - lowered} for seen in whole.seen[lowered:]]
    rows = Edge(whole, 2 / last, last).course()
    if Edge(before, 2 / first, first).crossing is None:
        return [*rows, *(study.observed(name, 0.0, **study.outside(NEVER)) for name in ("trend", "plateau_ratio"))]
    edge = Edge(study.Trace(after, whole.diverged), 2 / last, last)
    return [*rows, *edge.before(), *edge.at_edge()]


def _of_catapults(factor: float) -> list[study.Claim]:
    source, survives = page("claim 9"), f"catapult-survives-{factor:g}"
    run = f"that starts at {factor:g} times its threshold"
    paper: dict[str, Any] = {"group": "paper", "at": {"schedule": "catapult", "factor": factor}}
    return [
        claim(f"catapult-falls-{factor:g}", source, study.Inequality("lowest", "less", 1.0, centre="geometric mean"),
              f"Gradient descent {run} first falls to the threshold or below.",
              f"Least sharpness over the threshold at the first {EARLY} steps.",
              study.supported("Divergence along the top eigenvector is stopped by falling curvature."),
              bound_from="2/η", **paper),
        claim(survives, source, study.Share("survived", "greater", 0.5),
              f"Gradient descent {run} does not diverge in most runs.",
              "Runs that end with a loss below a hundred times the first.",
              study.undecided("It is known for factors below about two, on other networks."), **paper),
        claim(f"catapult-edge-{factor:g}", source, HOVERS,
              f"Gradient descent {run} ends up hovering there.",
              HOVERING, settled("It behaves as every other run then."), given=survives, **paper),
    ]  # fmt: skip


def _of_drops(config: Config) -> list[study.Claim]:
    source, paper = page("claim 10"), {"group": "paper", "at": {"schedule": "drop"}}
    lowered = f"lowered from {max(config.etas):g} to {config.middle:g} at the edge"
    return [
        claim("drop-resumes", source, study.Inequality("trend", "greater", 0.5, centre="mean"),
              f"With η {lowered}, progressive sharpening resumes.",
              "Kendall's τ of the sharpness with the step, from the change to the crossing of the new threshold.",
              settled("The new threshold is higher."), **paper),
        claim("drop-edge", source, HOVERS,
              f"With η {lowered}, the sharpness goes up to the new 2/η and hovers there.",
              HOVERING, settled("It behaves as every other run then."), **paper),
    ]  # fmt: skip


def _claims(config: Config) -> list[study.Claim]:
    return [*itertools.chain.from_iterable(map(_of_catapults, FACTORS)), *_of_drops(config)]


SCHEDULES: study.Experiment[Config] = study.Experiment(
    name="schedules",
    cells=_points,
    measure=_measure,
    varies=("initialisation",),
    claims=_claims,
    seconds=2.0,
    memory=memory,
)
