"""Starts above the threshold, and a step size that is lowered at the edge (claims 9 and 10)."""

import itertools

import numpy as np

from analyses.claims import claim
from analyses.edge_of_stability.config import Config
from analyses.edge_of_stability.descent import TOLERANCE, descend, edge_of, gradient_descent
from analyses.edge_of_stability.points import BAND, memory, page, points, reaching
from analyses.edge_of_stability.setting import Setting, setting_of
from analyses.edge_of_stability.windows import Edge
from curvlab import study
from curvlab.spectrum import eigenpairs

FACTORS = (1.2, 1.6)
"""S(0) over 2/η of the runs that start above the threshold."""
EARLY = 50
"""Steps in which the sharpness is to fall to the threshold."""
FINE = 5
"""Steps between measurements until then."""
SHARE = 3
"""These runs take --steps over this."""


def _points(config: Config) -> list[study.Point]:
    catapults = [{"schedule": "catapult", "factor": factor} for factor in FACTORS]
    drop = [{"schedule": "drop", "factor": 0.0}] if len(config.etas) > 1 else []
    return points(config, [*catapults, *drop])


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    setting, config = setting_of(cell, context.config), context.config
    return _drop(setting, config) if cell["schedule"] == "drop" else _catapult(setting, float(cell["factor"]), config)


def _catapult(setting: Setting, factor: float, config: Config) -> list[dict[str, object]]:
    steps = config.steps // SHARE
    initial = float(eigenpairs(setting.hessian(setting.network()), 1, tolerance=TOLERANCE).values[0])
    measured = {*range(0, EARLY + 1, FINE), *config.measured(steps)}
    edge = edge_of(gradient_descent(setting, factor * 2.0 / initial, measured, config.top), steps)
    survived = edge.trace.diverged is None
    rows = [*edge.course(), study.observed("survived", float(survived))]
    early = edge.ratio[(edge.steps > 0) & (edge.steps <= EARLY)]
    if len(early):
        rows.append(study.observed("lowest", float(early.min())))
    if survived:
        rows.append(study.observed("late_ratio", float(edge.ratio[edge.steps >= steps // 2].mean())))
    return rows


def _drop(setting: Setting, config: Config) -> list[dict[str, object]]:
    steps, first, last = config.steps // SHARE, max(config.etas), min(config.etas)
    process = gradient_descent(setting, first, config.measured(2 * steps), config.top)

    def lower(step: int) -> None:
        process.optimiser.steps.param_groups[0]["lr"] = first if step < steps else last

    process.before = lower
    trace = descend(process, 2 * steps)
    old, new = Edge(trace, 2 / first, first), Edge(trace, 2 / last, last)
    plateau = old.ratio[(old.steps >= steps // 2) & (old.steps < steps)]
    reached = bool(len(plateau)) and bool((old.ratio[old.steps < steps] >= 1).any())
    rows = [*new.course(), study.observed("reached", float(reached))]
    if reached and trace.diverged is None:
        late = new.sharpness[new.steps >= 3 * steps // 2]
        rows += [
            study.observed("resumed", float(np.log(late.mean() / (plateau.mean() * 2 / first)))),
            study.observed("new_ratio", float(late.mean() / new.threshold)),
        ]
    return rows


def _of_catapults(factor: float) -> list[study.Claim]:
    source, at = page("claim 9"), {"schedule": "catapult", "factor": factor}
    run = f"that starts at {factor:g} times its threshold"
    return [
        claim(f"catapult-falls-{factor:g}", source, study.Inequality("lowest", "less", 1.0),
              f"Gradient descent {run} first falls to the threshold or below.",
              f"Least sharpness over the threshold in the first {EARLY} steps.",
              study.supported("Divergence along the top eigenvector is stopped by falling curvature."), at=at),
        claim(f"catapult-survives-{factor:g}", source, study.Inequality("survived", "greater", 0.5),
              f"Gradient descent {run} does not diverge.",
              "Share of the runs that end with a loss below a hundred times the first.",
              study.undecided("It is known for factors below about two, on other networks."), at=at),
        # A seed whose run diverges has no ratio, and survived says that it is there.
        claim(f"catapult-edge-{factor:g}", source, study.Equivalence(("late_ratio", "survived"), 1.0, BAND),
              f"Gradient descent {run} ends up hovering there.",
              "Mean sharpness over the threshold in the second half of the run.",
              study.supported("It behaves as every other run then."), at=at,
              estimate=study.among(study.by_seed, quantity="late_ratio")),
    ]  # fmt: skip


def _of_drops(config: Config) -> list[study.Claim]:
    source, at = page("claim 10"), {"schedule": "drop"}
    lowered = f"lowered from {max(config.etas):g} to {min(config.etas):g} at the edge"
    return [
        claim("drop-resumes", source, study.Inequality("resumed", "greater", 0.0),
              f"With η {lowered}, progressive sharpening resumes.",
              "Log of the mean sharpness in the last quarter of the run over that in the second, before the change.",
              study.supported("The new threshold is higher."), at=at),
        claim("drop-edge", source, study.Equivalence("new_ratio", 1.0, BAND),
              f"With η {lowered}, the sharpness goes up to the new 2/η.",
              "Mean sharpness over the new threshold in the last quarter of the run.",
              study.supported("It behaves as every other run then."), at=at),
    ]  # fmt: skip


def _claims(config: Config) -> list[study.Claim]:
    return [*itertools.chain.from_iterable(map(_of_catapults, FACTORS)), *map(reaching, _of_drops(config))]


SCHEDULES: study.Experiment[Config] = study.Experiment(
    name="schedules", cells=_points, measure=_measure, claims=_claims, seconds=3.0, memory=memory
)
