"""Numbers of steps and of seconds of one method against those of another, seed by seed.

A run that does not reach its target counts with the whole budget: at a seed where only one of the two reaches it, that one
wins, and where neither does, nobody.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analyses.clock import priced
from analyses.training.config import Config
from analyses.training.entrants import entrants
from curvlab.study import difference_by_seed
from curvlab.study.estimates import Estimate

SECONDS = "seconds_per_step"
"""The quantity by which steps become seconds."""


def seconds_to(table: pd.DataFrame, steps: str) -> pd.DataFrame:
    """Return the seconds that each method takes at each seed, steps times seconds of a step, as rows of `steps`."""
    return priced(table[table["quantity"] == steps], table[table["quantity"] == SECONDS])


@dataclass(frozen=True)
class Comparison:
    """A method against another."""

    method: str
    other: str

    @property
    def methods(self) -> tuple[str, str]:
        """Both of them."""
        return self.method, self.other

    def difference(self, table: pd.DataFrame) -> pd.DataFrame:
        """Estimate by the values of the method minus those of the other."""
        return difference_by_seed(table, "method", *self.methods)

    def ratio(self, table: pd.DataFrame) -> pd.DataFrame:
        """Estimate by the values of the method over those of the other."""
        logs = self.difference(table.assign(value=np.log(table["value"])))
        return logs.assign(value=np.exp(logs["value"]))

    def seconds(self, steps: str) -> Estimate:
        """Return the estimate by the seconds that some steps take minus those of the other."""
        return lambda table: self.difference(seconds_to(table, steps))

    def outside(self, table: pd.DataFrame) -> str | None:
        """Say that no run of either method reached the target."""
        runs = table[(table["quantity"] != SECONDS) & table["method"].isin(self.methods)]
        if (runs["status"] == "ok").any():
            return None
        return f"Neither {self.method} nor {self.other} reached the target within the budget."


def against_rivals(config: Config) -> list[Comparison]:
    """Return every structure and every default that takes part against every rival, one by one."""
    present = entrants(config)
    rivals = [method.name for method in present if method.family == "first order"]
    asked = {*config.structures, *config.defaults}
    return [Comparison(method.name, rival) for method in present if method.name in asked for rival in rivals]
