"""What experiments share: cells, sources of claims, and estimates over several cells of a seed."""

from collections.abc import Callable

import pandas as pd
from scipy.stats import spearmanr

from analyses.block_structure.config import Config
from curvlab.study import Point as Place
from curvlab.study import outside
from curvlab.study.estimates import Estimate

FAILS = "Granziol & Juarev 2026"
ADAM = "Zhang, Chen, Ding et al. 2024"
MINI = "Zhang, Chen, Li et al. 2024 (Adam-mini)"
DONG = "Dong, Zhang et al. 2025"
DERIVED = "derived"

START, MIDDLE, END = "start", "middle", "end"
TIMES = (START, MIDDLE, END)


def formed(config: Config) -> list[Place]:
    """The cell of the network that claims are about, if its matrices are formed."""
    return [{"problem": config.problem}] if config.dense(config.problem) else []


def page(source: str, claim: int) -> str:
    """Where a claim comes from."""
    return f"{source} (docs/theory/block_structure.md, claim {claim})"


def correlation(first: str, second: str, *across: str) -> Estimate:
    """Return the estimate by the rank correlation of two quantities over what some columns tell apart, at each seed."""

    def estimate(table: pd.DataFrame) -> pd.DataFrame:
        return rank_correlations(table.pivot_table("value", ["seed", *across], "quantity").dropna(), first, second)

    return estimate


def rank_correlations(table: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """The rank correlation of two columns at each seed at which neither is constant, of more than two rows."""
    found = {
        seed: float(spearmanr(group[first], group[second]).statistic)
        for seed, group in table.groupby("seed")
        if len(group) > 2 and min(group[first].nunique(), group[second].nunique()) > 1
    }
    return pd.DataFrame({"seed": list(found), "value": list(found.values())})


def quotient(column: str | list[str], first: object, second: object) -> Estimate:
    """Return the estimate by the value at one entry of a column, or of several, over that at another, at each seed."""

    def estimate(table: pd.DataFrame) -> pd.DataFrame:
        wide = table.pivot_table("value", "seed", column)
        return (wide[first] / wide[second]).rename("value").reset_index()

    return estimate


def too_few(columns: tuple[str, ...], least: int = 4) -> Callable[[pd.DataFrame], str | None]:
    """Return what says that a rank correlation needs several points."""

    def assumptions(table: pd.DataFrame) -> str | None:
        points = len(table[list(columns)].drop_duplicates())
        return None if points >= least else f"A rank correlation over {points} points says nothing; {least} are needed."

    return assumptions


def nothing(reason: str) -> dict[str, object]:
    """The entries of an observation that does not exist at this network."""
    return {"value": float("nan"), **outside(reason)}
