"""Numbers of steps and of seconds of one method against those of others, seed by seed.

A run that does not reach its target counts with the whole budget, so a ratio of two runs is bounded from the side of the one
that fails.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analyses.clock import priced
from analyses.training.config import Config
from analyses.training.entrants import entrants
from curvlab.study.estimates import Estimate

SECONDS = "seconds_per_step"
"""The quantity by which steps become seconds."""


def seconds_to(table: pd.DataFrame, steps: str) -> pd.DataFrame:
    """Return the seconds that each method takes at each seed, steps times seconds of a step, as rows of `steps`."""
    return priced(table[table["quantity"] == steps], table[table["quantity"] == SECONDS])


@dataclass(frozen=True)
class Comparison:
    """A method against others.

    Attributes:
        method: the method.
        others: those that it is compared with; of several, the one with the least mean logarithm over the seeds that are
            judged, which favours them.
    """

    method: str
    others: tuple[str, ...]

    @property
    def methods(self) -> tuple[str, ...]:
        """All of them."""
        return (self.method, *self.others)

    def steps(self, table: pd.DataFrame) -> pd.DataFrame:
        """Estimate by log10 of the values over those of the best other."""
        logs = table.assign(value=np.log10(table["value"])).pivot_table("value", "seed", "method")
        best = logs[list(self.others)].mean().idxmin()
        return (logs[self.method] - logs[best]).rename("value").reset_index()

    def seconds(self, steps: str) -> Estimate:
        """Return the estimate by log10 of the seconds that some steps take over those of the best other."""
        return lambda table: self.steps(seconds_to(table, steps))

    def outside(self, table: pd.DataFrame) -> str | None:
        """Say that no run of any of these methods reached the target."""
        runs = table[(table["quantity"] != SECONDS) & table["method"].isin(self.methods)]
        if (runs["status"] == "ok").any():
            return None
        return f"Neither {self.method} nor what it is compared with reached the target within the budget."


def against_rivals(config: Config) -> list[Comparison]:
    """Return every structure that takes part against all rivals; none where there is no rival."""
    present = entrants(config)
    rivals = tuple(method.name for method in present if method.family == "first order")
    return [Comparison(method.name, rivals) for method in present if rivals and method.name in config.structures]
