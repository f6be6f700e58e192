"""Sensitivity to damping ε, schedule γ and refresh interval, one at a time and ε with γ, others as published (claim 4)."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from analyses.claims import claim
from analyses.gnn_natural_gradient.arms import JUDGED, Arm, experiment_of
from analyses.gnn_natural_gradient.comparisons import PAPER, runs
from analyses.gnn_natural_gradient.config import Config
from analyses.gnn_natural_gradient.experiments.accuracy import name_of
from analyses.gnn_natural_gradient.experiments.unlabelled import arm_name
from analyses.gnn_natural_gradient.recipe import ADAM, SGD, Recipe
from analyses.gnn_natural_gradient.training import ACCURACY, VALIDATION, VALIDATION_LOSS
from curvlab.study import Claim, Experiment, Inequality, Spread, undecided

POINTS = 1.0
"""A difference in test accuracy that decides, in percentage points."""


def _swept(base: Recipe, name: str, values: Sequence[float]) -> list[Arm]:
    points: list[dict[str, Any]] = [{name: value} for value in values if value != getattr(base, name)]
    return [
        Arm(f"{base.optimiser} {name}={point[name]:g}", replace(base, **point), {"optimiser": base.optimiser, **point})
        for point in points
    ]


def _joint(config: Config) -> list[Arm]:
    return [
        Arm(
            f"ε={epsilon:g} {arm_name('both', gamma)}",
            replace(ADAM, epsilon=epsilon, gamma=gamma),
            {"optimiser": "joint", "epsilon": epsilon, "gamma": gamma},
        )
        for epsilon in config.epsilons
        for gamma in config.gammas
        if epsilon != ADAM.epsilon
    ]


def _grids(config: Config) -> dict[str, list[Arm]]:
    """Points of the grids by what they vary, but the published ones, whose arms are in other experiments."""
    return {
        "epsilon-adam": _swept(ADAM, "epsilon", config.epsilons),
        "epsilon-sgd": _swept(SGD, "epsilon", config.epsilons),
        "refresh": _swept(ADAM, "refresh", config.refreshes),
        "joint": _joint(config),
    }


def arms(config: Config) -> list[Arm]:
    """Return the points of all grids."""
    return list(itertools.chain.from_iterable(_grids(config).values()))


def _several(arms: Sequence[str], split: str) -> dict[str, object]:
    """Return the coordinates of the runs of some arms; a single one leaves nothing to choose and nothing to measure."""
    return runs(arms if len(arms) > 1 else (), split)


def _decides(name: str, what: str, arms: Sequence[str], config: Config) -> Claim:
    return claim(
        f"sensitivity-{name}", f"{PAPER}, claim 4", Spread(ACCURACY, across="arm", margin=POINTS),
        f"The choice of the {what} decides: mean test accuracies lie more than {POINTS:g} point apart.",
        f"Test accuracies, in percentage points, of {', '.join(arms)}; {config.place(config.splits[0])}.",
        undecided("The first layer's A is close to singular, so ε rules there; nothing is said of the others."),
        group=config.group, at=_several(arms, config.splits[0]),
    )  # fmt: skip


def optimism(table: pd.DataFrame) -> pd.DataFrame:
    """Estimate by the best test accuracy of all arms minus that of the arm which validation nodes prefer, of each seed.

    Of several arms with the same validation accuracy they prefer the one with the lowest validation loss.
    """
    rows = []
    for seed, run in table.groupby("seed"):
        arms = run.pivot_table("value", "arm", "quantity").sort_values(
            [VALIDATION, VALIDATION_LOSS], ascending=[False, True]
        )
        rows.append({"seed": seed, "value": arms[ACCURACY].max() - arms[ACCURACY].iloc[0]})
    return pd.DataFrame(rows)


def _claims(config: Config) -> list[Claim]:
    adam, sgd = (name_of(method, "published") for method in ("adam-kfac", "sgd-kfac"))
    names = {varied: [arm.name for arm in grid] for varied, grid in _grids(config).items()}
    gammas = [arm_name("both", gamma) for gamma in config.gammas]
    joint = [adam, *names["epsilon-adam"], *gammas, *names["joint"]]
    return [
        _decides("epsilon-adam", "damping ε, with Adam,", [adam, *names["epsilon-adam"]], config),
        _decides("epsilon-sgd", "damping ε, with SGD,", [sgd, *names["epsilon-sgd"]], config),
        _decides("refresh", "refresh interval", [adam, *names["refresh"]], config),
        _decides("gamma", "power γ of the schedule", gammas, config),
        _decides("joint", "damping and schedule together", joint, config),
        claim(
            "selection-optimism", f"{PAPER}, claim 4 (docs/theory/izadi_2020.md, trap 1)",
            Inequality(JUDGED, "less", POINTS, centre="mean"),
            f"The best test accuracy of a sweep over ε and γ overstates by at most {POINTS:g} point what the choice on validation "
            "nodes gives.",
            f"Best test accuracy of {len(joint)} values, each run once, minus that of the value with the highest validation "
            f"accuracy, in percentage points, in the sweep of each seed; {config.place(config.splits[0])}.",
            undecided("The more values are tried and the fewer nodes test, the larger it is."),
            group="exploration", at=_several(joint, config.splits[0]), estimate=optimism,
        ),
    ]  # fmt: skip


SENSITIVITY: Experiment[Config] = experiment_of("sensitivity", arms, _claims)
