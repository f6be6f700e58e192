"""What is measured of an optimiser that was chosen, and what is claimed of advice."""

import math

import numpy as np
import pandas as pd

from analyses.advice.arms import ARMS, DEARER
from analyses.advice.config import Config
from analyses.advice.trial import BLOWN_UP, SHARES, STEPS, diverges, drawn, portions, problem_of, task_of, trained
from analyses.claims import claim
from curvlab import study

LOSS, DIVERGED, SEEN, RATIO = "loss", "diverged", "seen", 1.1
SOURCE = "curvlab.advise"
MEMORY = 2e9
DEAR = {
    "cora-gcn": 40.0,
    "cifar10-5k-cnn": 100.0,
    "cifar10-5k-residual": 30.0,
    "fashion-lenet": 15.0,
    "characters": 10.0,
}
"""Seconds that `STEPS` steps take beyond the budget."""


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    config, seed, name, arm = context.config, int(cell["seed"]), str(cell["problem"]), str(cell["arm"])
    problem = problem_of(name, config, seed)
    task = task_of(problem, name, config, seed)
    test = portions(problem, graph=task.graph)
    with drawn(seed):
        begun = task.clock()
        chosen = ARMS[arm](task, config.budget)
        cost = task.clock() - begun
        run = trained(chosen, task, test, config.budget)
        losses = [look.loss for look in run.looks]
        rows = [
            study.observed(LOSS, min(losses), method=chosen.method, candidate=str(chosen), cost=cost, steps=run.steps),
            *(
                study.observed(SEEN, loss, share=share)
                for share, loss in zip(SHARES, losses[1:], strict=True)
                if math.isfinite(loss)
            ),
        ]
        if arm == "advice":
            rows.append(study.observed(DIVERGED, float(diverges(run, task, test)), trouble=run.trouble or ""))
    return rows


def ratio(table: pd.DataFrame, other: str) -> pd.DataFrame:
    """Estimate by the loss after advice over that after another choice, seed by seed."""
    logs = study.difference_by_seed(table.assign(value=np.log(table["value"])), "arm", "advice", other)
    return logs.assign(value=np.exp(logs["value"]))


def _log_ratio(table: pd.DataFrame) -> pd.DataFrame:
    ratios = ratio(table, "adam")
    return ratios.assign(value=np.log(ratios["value"]))


def _against_grid(table: pd.DataFrame) -> pd.DataFrame:
    return ratio(table, "grid")


def _within(table: pd.DataFrame) -> pd.DataFrame:
    ratios = ratio(table, "grid")
    return ratios.assign(value=(ratios["value"] <= RATIO).astype(float))


def _of_problem(problem: str, config: Config) -> list[study.Claim]:
    after = f"lowest test loss in {config.budget:g} s of training from the start, processor time of one thread"
    return [
        claim(
            f"adam-{problem}", SOURCE, study.Wins(LOSS, "less"),
            f"On {problem}, advice trains to a lower loss than Adam tuned in the same time.",
            f"log of the {after}, over that with Adam's learning rate chosen by the same race.",
            study.undecided("It has Adam among what it races, and less time for it."),
            group="exploration", at={"problem": problem, "arm": ("advice", "adam")}, estimate=_log_ratio,
        ),
        claim(
            f"grid-{problem}", SOURCE, study.Inequality(LOSS, "less", RATIO, centre="geometric mean"),
            f"On {problem}, advice trains to a loss within 10 % of that of a grid search at {DEARER} times the cost.",
            f"{after.capitalize()}, over that of the best point of the grid.",
            study.undecided("What wins a short race need not win a long one."),
            group="exploration", at={"problem": problem, "arm": ("advice", "grid")}, estimate=_against_grid,
            bound_from="what was asked of advice",
        ),
    ]  # fmt: skip


def _claims(config: Config) -> list[study.Claim]:
    names = ", ".join(config.problems)
    return [
        claim(
            "advice-diverges", SOURCE, study.Share(DIVERGED, "less", 0.05),
            f"Of advised optimisers, less than one in twenty diverges within {STEPS} steps.",
            f"Whether a run ends with an error, a loss that is not finite, or a test loss above {BLOWN_UP:g} times the first; "
            f"{names}, each at seeds of its own.",
            study.supported("What diverges in the race is out, and natural gradient has a trust region."),
            group="derived", at={"arm": "advice"}, bound_from="what was asked of advice",
        ),
        claim(
            "advice-grid", SOURCE, study.Share(LOSS, "greater", 0.8),
            f"In more than four cases of five, advice trains to a loss within 10 % of that of a grid search at {DEARER} times the "
            "cost.",
            f"Whether the ratio of the lowest test losses in {config.budget:g} s of training is at most {RATIO:g}; {names}, each "
            "at seeds of its own.",
            study.undecided("The grid has no candidate that advice lacks but for more learning rates."),
            group="derived", at={"arm": ("advice", "grid")}, estimate=_within, bound_from="what was asked of advice",
        ),
        claim(
            "advice-adam", SOURCE, study.Wins(LOSS, "less"),
            "In most cases, advice trains to a lower loss than Adam tuned in the same time.",
            f"log of the ratio of the lowest test losses in {config.budget:g} s of training; {names}, each at seeds of its own.",
            study.undecided("It has Adam among what it races, and less time for it."),
            group="derived", at={"arm": ("advice", "adam")}, estimate=_log_ratio,
        ),
        *(one for problem in config.problems for one in _of_problem(problem, config)),
    ]  # fmt: skip


def _cells(config: Config) -> list[study.Point]:
    return [
        {"problem": problem, "arm": arm, "seed": seed}
        for problem, seeds in config.seeds_by_problem.items()
        for seed in seeds
        for arm in config.arms
    ]


def _seconds(cell: study.Cell, config: Config) -> float:
    search = DEARER if cell["arm"] == "grid" else 1
    return 1.1 * (search + 1) * config.budget + (
        DEAR.get(str(cell["problem"]), 1.0) if cell["arm"] == "advice" else 0.0
    )


ADVICE: study.Experiment[Config] = study.Experiment(
    name="advice",
    cells=_cells,
    measure=_measure,
    varies=("initialisation", "batches", "draws"),
    claims=_claims,
    seconds=_seconds,
    memory=MEMORY,
)
