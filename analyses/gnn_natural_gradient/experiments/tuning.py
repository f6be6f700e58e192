"""Every configuration of every method, and which of them is judged: the one that classifies the most validation nodes right.

Configurations run from streams of their own, which no judged run has, whatever its seed. Their validation accuracy at the
epoch of the lowest validation loss is averaged over these, and of equal ones the loss decides.
"""

import pandas as pd

from analyses.gnn_natural_gradient.arms import MEMORY, VARIES, reduced, seconds, train
from analyses.gnn_natural_gradient.config import Config
from analyses.gnn_natural_gradient.recipe import METHODS, Recipe
from analyses.gnn_natural_gradient.training import VALIDATION, VALIDATION_LOSS
from curvlab.study import Cell, Context, Experiment, Observations, Point


def _points(config: Config) -> list[Point]:
    return [
        {"method": method, "split": split, "configuration": index, "seed": start}
        for split in config.splits
        for method in METHODS
        for index in range(config.configurations)
        for start in range(config.starts)
    ]


def _measure(cell: Cell, context: Context[Config]) -> Observations:
    recipe = METHODS[str(cell["method"])].recipes[int(cell["configuration"])]
    rows = reduced(train(recipe, cell, context, "tuning"), recipe)
    return [row | {"quantity": f"tuning_{row['quantity']}"} for row in rows]


def best(runs: pd.DataFrame) -> int:
    """Return the configuration that comes first, by measurements of several; those that diverged come last."""
    totals = runs.groupby(["quantity", "configuration"])["value"].sum()
    accuracy, loss = totals[f"tuning_{VALIDATION}"], totals[f"tuning_{VALIDATION_LOSS}"]
    diverged = (runs["status"] != "ok").groupby(runs["configuration"]).sum()
    return int(min(accuracy.index, key=lambda index: (diverged[index], -round(accuracy[index], 9), loss[index])))


def selected(method: str, split: str, context: Context[Config]) -> Recipe:
    """Return a method's configuration on a split."""
    return METHODS[method].recipes[best(context.rows("tuning", method=method, split=split))]


TUNING: Experiment[Config] = Experiment(
    name="tuning", cells=_points, measure=_measure, varies=VARIES, seconds=seconds, memory=MEMORY
)
