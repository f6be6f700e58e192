"""Sensitivity to damping ε, schedule γ and refresh interval, one at a time and ε with γ, others as published (claim 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from analyses.gnn_natural_gradient.config import Config
from analyses.gnn_natural_gradient.part import (
    ACCURACY,
    JUDGED,
    PAPER,
    Arm,
    best_arm,
    difference,
    fixed,
    needs,
    part_of_arms,
    worst_arm,
)
from analyses.gnn_natural_gradient.parts.accuracy import name_of
from analyses.gnn_natural_gradient.parts.unlabelled import arm_name
from analyses.gnn_natural_gradient.recipe import ADAM, SGD, Recipe
from curvlab.study import Claim, Inequality

NAME = "sensitivity"
BASES = {"adam": ADAM, "sgd": SGD}
POINTS = 1.0
"""A difference in test accuracy that decides, in percentage points."""


def _swept(base: Recipe, name: str, published: float, values: Sequence[float]) -> list[Arm]:
    points: list[dict[str, Any]] = [{name: value} for value in values if value != published]
    return [
        fixed(f"{base.optimiser} {name}={point[name]:g}", replace(base, **point), optimiser=base.optimiser, **point)
        for point in points
    ]


def _joint(config: Config) -> list[Arm]:
    return [
        fixed(
            f"ε={epsilon:g} {arm_name('both', gamma)}", replace(ADAM, epsilon=epsilon, gamma=gamma),
            optimiser="joint", epsilon=epsilon, gamma=gamma,
        )
        for epsilon in config.epsilons
        for gamma in config.gammas
        if epsilon != ADAM.epsilon
    ]  # fmt: skip


def arms(config: Config) -> list[Arm]:
    """Return every point of the grids but the published one, whose arm is in the part "accuracy"."""
    return [
        *(arm for base in BASES.values() for arm in _swept(base, "epsilon", base.epsilon, config.epsilons)),
        *_swept(ADAM, "refresh", ADAM.refresh, config.refreshes),
        *_joint(config),
    ]


def _claims(config: Config) -> list[Claim]:
    kfac = {optimiser: name_of(f"{optimiser}-kfac", "published") for optimiser in BASES}
    names = {
        f"epsilon-{optimiser}": [
            kfac[optimiser],
            *(a.name for a in _swept(base, "epsilon", base.epsilon, config.epsilons)),
        ]
        for optimiser, base in BASES.items()
    }
    gammas = [arm_name("both", gamma) for gamma in config.gammas]
    names["refresh"] = [kfac["adam"], *(a.name for a in _swept(ADAM, "refresh", ADAM.refresh, config.refreshes))]
    names["gamma"] = gammas
    names["joint"] = [kfac["adam"], *names["epsilon-adam"][1:], *gammas, *(a.name for a in _joint(config))]
    what = {
        "epsilon-adam": "damping ε, with Adam",
        "epsilon-sgd": "damping ε, with SGD",
        "refresh": "refresh interval",
        "gamma": "power γ of the schedule",
        "joint": "damping and schedule together",
    }
    claims = [_decides(name, what[name], arms, config) for name, arms in names.items() if len(arms) > 1]
    if len(names["joint"]) > 1:
        claims.append(_optimism(names["joint"], config))
    return claims


def _decides(name: str, what: str, arms: Sequence[str], config: Config) -> Claim:
    def estimate(table: pd.DataFrame) -> pd.DataFrame:
        return difference(table, best_arm(table, arms), worst_arm(table, arms))

    return Claim(
        id=f"sensitivity-{name}",
        statement=f"The choice of the {what} decides: it is worth more than {POINTS:g} point of test accuracy.",
        source=f"{PAPER}, claim 4",
        measured=f"Test accuracy, in percentage points, of the best of {len(arms)} values by mean validation accuracy minus "
        "that of the worst, seed by seed.",
        rule=Inequality(POINTS, "greater"),
        estimate=estimate,
        expected="open",
        reason="The first layer's A is close to singular, so ε rules there; nothing is said of the others.",
        needs=needs(arms, config.splits[0]),
        quantities=JUDGED,
    )


def _optimism(arms: Sequence[str], config: Config) -> Claim:
    def estimate(table: pd.DataFrame) -> pd.DataFrame:
        return difference(table, best_arm(table, arms, ACCURACY), best_arm(table, arms))

    return Claim(
        id="selection-optimism",
        statement=f"Printing the best test accuracy of a sweep over ε and γ overstates by at most {POINTS:g} point what a choice "
        "on validation data gives.",
        source=f"{PAPER}, claim 4 (theory file, trap 1)",
        measured=f"Test accuracy, in percentage points, of the best of {len(arms)} values by mean test accuracy minus that of "
        "the best by mean validation accuracy, seed by seed.",
        rule=Inequality(POINTS, "less"),
        estimate=estimate,
        expected="open",
        reason="The more values are tried and the fewer nodes test, the larger it is.",
        needs=needs(arms, config.splits[0]),
        quantities=JUDGED,
    )


PART = part_of_arms(NAME, arms, _claims)
