"""Seconds of an epoch of every method as published, and with the epochs of the judged runs those to the best loss."""

from collections.abc import Callable
from functools import partial
from itertools import count

import pandas as pd

from analyses.claims import claim
from analyses.clock import now, priced, seconds_per_step
from analyses.gnn_natural_gradient.arms import BEST_EPOCH, MEMORY, VARIES
from analyses.gnn_natural_gradient.comparisons import PAPER
from analyses.gnn_natural_gradient.config import Config
from analyses.gnn_natural_gradient.experiments.accuracy import (
    CHOICES,
    OPTIMISERS,
    Choice,
    epochs_ratio,
    name_of,
    published,
)
from analyses.gnn_natural_gradient.recipe import METHODS
from analyses.gnn_natural_gradient.training import GraphTraining, setting_of
from curvlab.study import Cell, Claim, Context, Experiment, Observations, Wins, observed, undecided

SECONDS = "seconds_per_epoch"


def _epochs(method: str, config: Config, seed: int) -> Callable[[int], float]:
    """Return what takes some epochs and returns their seconds, without evaluation."""
    split = config.splits[0]
    setting = setting_of(config.problem, split, config.device, config.dtype, seed)
    run = GraphTraining(setting, published(method, config, split), seed, config.epochs)
    numbers = count()

    def timed(epochs: int) -> float:
        since = now(config.device)
        for _ in range(epochs):
            run.step(next(numbers))
        return now(config.device) - since

    return timed


def _measure(cell: Cell, context: Context[Config]) -> Observations:
    config = context.config
    methods = {method: _epochs(method, config, int(cell["seed"])) for method in METHODS}
    period = published("adam-kfac", config, config.splits[0]).refresh
    found = seconds_per_step(methods, period)
    return [observed(SECONDS, seconds, method=method) for method, seconds in found.items()]


def seconds_ratio(table: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """Estimate by log10 of the seconds to an arm's lowest validation loss over those of another."""
    epochs, price = (table[table["quantity"] == quantity] for quantity in (BEST_EPOCH, SECONDS))
    return epochs_ratio(priced(epochs, price), first, second)


def _claim(optimiser: str, method: str, choice: Choice, config: Config) -> Claim:
    first, second = name_of(f"{optimiser}-kfac", choice), name_of(optimiser, choice)
    return claim(
        f"seconds-{optimiser}-{choice}", f"{PAPER}, claim 1 (wall-clock time)",
        Wins((BEST_EPOCH, SECONDS), "less"),
        f"K-FAC brings {method}, to its lowest validation loss in less time.",
        "log10 of the seconds of training to its own lowest validation loss over those without K-FAC: epochs times seconds of "
        f"an epoch; {config.place(config.splits[0])}.",
        undecided("An epoch is dearer by a product with two inverses, and by the inverses every 50 epochs."),
        # Cells of the timing have no arm.
        at={"experiment": ("timing", "accuracy"), "arm": (None, first, second), "split": config.splits[0]},
        group=config.group,
        estimate=partial(seconds_ratio, first=first, second=second),
    )  # fmt: skip


def _claims(config: Config) -> list[Claim]:
    return [
        _claim(optimiser, f"{title}, {words}", choice, config)
        for choice, words in CHOICES.items()
        for optimiser, title in OPTIMISERS.items()
    ]


TIMING: Experiment[Config] = Experiment(
    name="timing",
    cells=lambda config: [{"split": config.splits[0]}],
    measure=_measure,
    varies=VARIES,
    claims=_claims,
    seconds=lambda _, config: 0.02 * min(config.epochs, 50),
    memory=MEMORY,
)
