"""Seconds of an epoch of every method as published, and with the epochs of the judged runs those to the best loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd

from analyses.clock import now, seconds_per_step
from analyses.gnn_natural_gradient.config import Config
from analyses.gnn_natural_gradient.part import BEST_EPOCH, PAPER, Part, needs, values
from analyses.gnn_natural_gradient.parts.accuracy import CHOICES, name_of, published
from analyses.gnn_natural_gradient.recipe import METHODS
from analyses.gnn_natural_gradient.training import Run, setting_of
from analyses.part import Observations
from curvlab.study import Cell, Claim, Inequality

NAME = "timing"
SECONDS = "seconds_per_epoch"


def _cells(config: Config) -> list[Cell]:
    return [Cell({"part": NAME, "split": config.splits[0], "seed": seed}) for seed in range(config.seeds)]


def _epochs(method: str, config: Config, seed: int) -> Callable[[int], float]:
    """Return what takes some epochs and returns their seconds, without evaluation."""
    split = config.splits[0]
    run = Run(
        setting_of(config.problem, split, config.device, config.dtype),
        published(method, config, split),
        seed,
        config.epochs,
    )

    def timed(epochs: int) -> float:
        since = now(config.device)
        for _ in range(epochs):
            run.step()
        return now(config.device) - since

    return timed


def _measure(cell: Cell, config: Config) -> Observations:
    runs = {method: _epochs(method, config, int(cell["seed"])) for method in METHODS}
    period = published("adam-kfac", config, config.splits[0]).refresh
    found = seconds_per_step(runs, period, rounds=1)
    return [{"quantity": SECONDS, "method": method, "value": seconds} for method, seconds in found.items()]


def seconds_to(table: pd.DataFrame, methods: tuple[str, str], arms: tuple[str, str]) -> pd.DataFrame:
    """Estimate by log10 of the seconds to the lowest validation loss, the first over the second."""
    epochs = values(table, BEST_EPOCH)
    price = table[table["quantity"] == SECONDS].pivot_table("value", "seed", "method")
    first, second = (epochs[arm] * price[method] for arm, method in zip(arms, methods, strict=True))
    return pd.Series(np.log10(first / second), name="value").rename_axis("seed").reset_index()


def _claims(config: Config) -> list[Claim]:
    split = config.splits[0]
    claims = []
    for choice, words in CHOICES.items():
        for optimiser, title in (("adam", "Adam"), ("sgd", "SGD")):
            methods = (f"{optimiser}-kfac", optimiser)
            arms = (name_of(methods[0], choice), name_of(methods[1], choice))
            runs = needs(arms, split)
            claims.append(
                Claim(
                    id=f"seconds-{optimiser}-{choice}",
                    statement=f"K-FAC brings {title}, {words}, to its lowest validation loss in less time.",
                    source=f"{PAPER}, claim 1 (wall-clock time)",
                    measured="log10 of the seconds of training to its own lowest validation loss over those without K-FAC: "
                    "epochs times seconds of an epoch.",
                    rule=Inequality(0.0, "less"),
                    estimate=partial(seconds_to, methods=methods, arms=arms),
                    expected="open",
                    reason="An epoch is dearer by a product with two inverses, and by the inverses every 50 epochs.",
                    needs=lambda cell, runs=runs: cell["part"] == NAME or runs(cell),  # type: ignore[misc]
                    quantities=(BEST_EPOCH, SECONDS),
                )
            )
    return claims


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda epochs: 0.02 * min(epochs, 50))
