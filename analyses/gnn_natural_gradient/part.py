"""Arms, the recipes that are compared, and the comparisons that claims are made of.

An arm has a name, which is a coordinate of its cells; an arm of one part serves the claims of another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd

import analyses.part
from analyses.estimates import difference_by_seed
from analyses.gnn_natural_gradient.config import Config
from analyses.gnn_natural_gradient.recipe import Recipe
from analyses.gnn_natural_gradient.training import Trace, setting_of, train
from analyses.part import Expectation, Observations
from curvlab.study import Cell, Claim, Inequality

PAPER = "Izadi, Fang, Stevenson & Lin 2020"

Part = analyses.part.Part[Config]

ACCURACY, VALIDATION, VALIDATION_LOSS = "test_accuracy", "validation_accuracy", "validation_loss"
BEST_EPOCH = "best_epoch"
JUDGED = (ACCURACY, VALIDATION, VALIDATION_LOSS)
"""What a run is judged by, at the epoch of its lowest validation loss; accuracies in per cent."""


@dataclass(frozen=True)
class Arm:
    """A recipe with a name.

    Attributes:
        name: the coordinate `arm` of its cells.
        recipe: what it is on a split; tuned arms choose there.
        at: further coordinates, against which figures draw it.
    """

    name: str
    recipe: Callable[[Config, str], Recipe]
    at: Mapping[str, str | float] = field(default_factory=dict)


def fixed(name: str, recipe: Recipe, **at: str | float) -> Arm:
    """Return an arm whose recipe depends on nothing."""
    return Arm(name, lambda _config, _split: recipe, at)


Arms = Callable[[Config], Sequence[Arm]]


def cells_of(part: str, arms: Arms, config: Config, splits: Sequence[str]) -> list[Cell]:
    """Return the cells of arms: each on the splits at every seed."""
    return [
        Cell({"part": part, "arm": arm.name, "split": split, **arm.at, "seed": seed})
        for split in splits
        for arm in arms(config)
        for seed in range(config.seeds)
    ]


def run(recipe: Recipe, config: Config, split: str, seed: int) -> Trace:
    """Train by a recipe."""
    return train(setting_of(config.problem, split, config.device, config.dtype), recipe, seed, config.epochs)


def reduced(trace: Trace) -> list[dict[str, object]]:
    """Return what a run is judged by."""
    best = trace.best
    values = {
        ACCURACY: trace.test_accuracy[best],
        VALIDATION: trace.validation_accuracy[best],
        VALIDATION_LOSS: trace.validation_loss[best],
        BEST_EPOCH: best + 1,
    }
    return [{"quantity": name, "value": value, "status": trace.status} for name, value in values.items()]


def trained(cell: Cell, config: Config, arms: Arms) -> tuple[Recipe, Trace]:
    """Train the arm of a cell."""
    split = str(cell["split"])
    recipe = next(arm for arm in arms(config) if arm.name == cell["arm"]).recipe(config, split)
    return recipe, run(recipe, config, split, int(cell["seed"]))


def part_of_arms(name: str, arms: Arms, claims: Callable[[Config], list[Claim]]) -> Part:
    """Return a part that trains every arm on the first split."""

    def cells(config: Config) -> list[Cell]:
        return cells_of(name, arms, config, config.splits[:1])

    def measure(cell: Cell, config: Config) -> Observations:
        recipe, trace = trained(cell, config, arms)
        return [row | {"recipe": str(recipe)} for row in reduced(trace)]

    return Part(name, cells, measure, claims, seconds=lambda epochs: 0.004 * epochs)


def needs(arms: Sequence[str], split: str) -> Callable[[Cell], bool]:
    """Return the test for the cells of arms on a split."""
    return lambda cell: cell.coordinates.get("arm") in arms and cell["split"] == split


def values(table: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """Return a quantity, a row per seed and a column per arm."""
    return table[table["quantity"] == quantity].pivot_table("value", "seed", "arm")


def best_arm(table: pd.DataFrame, arms: Sequence[str], quantity: str = VALIDATION) -> str:
    """Return the arm with the highest mean accuracy, of the nodes that validate unless said otherwise.

    Of several it is the one with the lowest mean validation loss.
    """
    accuracy, loss = values(table, quantity).mean(), values(table, VALIDATION_LOSS).mean()
    return min(arms, key=lambda arm: (-round(float(accuracy[arm]), 9), float(loss[arm])))


def worst_arm(table: pd.DataFrame, arms: Sequence[str]) -> str:
    """Return the arm with the lowest mean validation accuracy, of several the one with the highest loss."""
    accuracy, loss = values(table, VALIDATION).mean(), values(table, VALIDATION_LOSS).mean()
    return min(arms, key=lambda arm: (round(float(accuracy[arm]), 9), -float(loss[arm])))


def difference(table: pd.DataFrame, first: str, second: str, quantity: str = ACCURACY) -> pd.DataFrame:
    """Return a quantity of an arm minus that of another, seed by seed; 0 for an arm against itself."""
    if first == second:
        seeds = values(table, quantity).index
        return pd.DataFrame({"seed": seeds, "value": np.zeros(len(seeds))})
    return difference_by_seed(table[table["quantity"] == quantity], "arm", first, second)


def gain_claim(
    name: str,
    statement: str,
    source: str,
    first: Sequence[str],
    second: Sequence[str],
    config: Config,
    *,
    reason: str,
    split: str | None = None,
    bound: float = 0.0,
    direction: Literal["less", "greater"] = "greater",
    expected: Expectation = "open",
) -> Claim:
    """Return the claim that one arm has a higher test accuracy than another.

    Each is the best on validation data of several.
    """
    split = split or config.splits[0]
    chosen = " Each is the one of its kind with the highest mean validation accuracy." if len(first) > 1 else ""

    def estimate(table: pd.DataFrame) -> pd.DataFrame:
        return difference(table, best_arm(table, first), best_arm(table, second))

    return Claim(
        id=name,
        statement=statement,
        source=f"{PAPER}, {source}",
        measured="Difference of test accuracies at the lowest validation loss, in percentage points, between "
        f"{' or '.join(first)} and {' or '.join(second)}, seed by seed, on the {split} split.{chosen}",
        rule=Inequality(bound, direction),
        estimate=estimate,
        expected=expected,
        reason=reason,
        needs=needs([*first, *second], split),
        quantities=JUDGED,
    )
