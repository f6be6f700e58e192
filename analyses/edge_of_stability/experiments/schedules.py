"""Starts above the threshold, and a step size that is lowered at the edge (claims 9 and 10)."""

from functools import partial

import numpy as np

from analyses.edge_of_stability.config import Config
from analyses.edge_of_stability.descent import TOLERANCE, Descent, descend
from analyses.edge_of_stability.optimisers import momentum
from analyses.edge_of_stability.points import BAND, PAPER, memory, points, reaching
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
    model, steps = setting.network(), config.steps // SHARE
    initial = float(eigenpairs(setting.hessian(model), 1, tolerance=TOLERANCE).values[0])
    eta = factor * 2.0 / initial
    optimiser = momentum(model, "gd", eta)
    measured = {*range(0, EARLY + 1, FINE), *config.measured(steps)}
    trace = descend(Descent(model, setting, optimiser, measured, config.top), steps)
    edge = Edge(trace, optimiser.threshold, eta)
    rows = [*edge.course(), study.observed("survived", float(trace.diverged is None))]
    early = edge.ratio[(edge.steps > 0) & (edge.steps <= EARLY)]
    if len(early):
        rows.append(study.observed("lowest", float(early.min())))
    if trace.diverged is None:
        rows.append(study.observed("late_ratio", float(edge.ratio[edge.steps >= steps // 2].mean())))
    return rows


def _drop(setting: Setting, config: Config) -> list[dict[str, object]]:
    model, steps = setting.network(), config.steps // SHARE
    first, last = max(config.etas), min(config.etas)
    optimiser = momentum(model, "gd", first)

    def lower(step: int) -> None:
        optimiser.steps.param_groups[0]["lr"] = first if step < steps else last

    process = Descent(model, setting, optimiser, config.measured(2 * steps), config.top, before=lower)
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
    at, run = {"schedule": "catapult", "factor": factor}, f"that starts at {factor:g} times its threshold"
    source = f"{PAPER} (docs/theory/cohen_2021.md, claim 9)"
    claim = partial(study.Claim, source=source, at=at)
    return [
        claim(
            id=f"catapult-falls-{factor:g}",
            statement=f"Gradient descent {run} first falls to the threshold or below.",
            rule=study.Inequality("lowest", "less", 1.0),
            measured=f"Least sharpness over the threshold in the first {EARLY} steps.",
            expected=study.supported("Divergence along the top eigenvector is stopped by falling curvature."),
        ),
        claim(
            id=f"catapult-survives-{factor:g}",
            statement=f"Gradient descent {run} does not diverge.",
            rule=study.Inequality("survived", "greater", 0.5),
            measured="Share of the runs that end with a loss below a hundred times the first.",
            expected=study.undecided("It is known for factors below about two, on other networks."),
        ),
        claim(
            id=f"catapult-edge-{factor:g}",
            statement=f"Gradient descent {run} ends up hovering there.",
            # A seed whose run diverges has no ratio, and survived says that it is there.
            rule=study.Equivalence(("late_ratio", "survived"), 1.0, BAND),
            measured="Mean sharpness over the threshold in the second half of the run.",
            expected=study.supported("It behaves as every other run then."),
            estimate=study.among(study.by_seed, quantity="late_ratio"),
        ),
    ]


def _claims(config: Config) -> list[study.Claim]:
    at, source = {"schedule": "drop"}, f"{PAPER} (docs/theory/cohen_2021.md, claim 10)"
    claim = partial(study.Claim, source=source, at=at)
    lowered = f"lowered from {max(config.etas):g} to {min(config.etas):g} at the edge"
    return [
        *(claim for factor in FACTORS for claim in _of_catapults(factor)),
        reaching(
            claim(
                id="drop-resumes",
                statement=f"With η {lowered}, progressive sharpening resumes.",
                rule=study.Inequality("resumed", "greater", 0.0),
                measured="Log of the mean sharpness in the last quarter of the run over that in the second, before the change.",
                expected=study.supported("The new threshold is higher."),
            )
        ),
        reaching(
            claim(
                id="drop-edge",
                statement=f"With η {lowered}, the sharpness goes up to the new 2/η.",
                rule=study.Equivalence("new_ratio", 1.0, BAND),
                measured="Mean sharpness over the new threshold in the last quarter of the run.",
                expected=study.supported("It behaves as every other run then."),
            )
        ),
    ]


SCHEDULES: study.Experiment[Config] = study.Experiment(
    name="schedules", cells=_points, measure=_measure, claims=_claims, seconds=3.0, memory=memory
)
