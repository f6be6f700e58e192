"""An analysis with a claim of every rule, group and outcome, for the reports: its numbers are made to come out so."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from curvlab.study import (
    Always,
    Analysis,
    Cell,
    Claim,
    CommonOptions,
    Context,
    Equivalence,
    Experiment,
    Identity,
    Inequality,
    Share,
    Spread,
    Wins,
    identities,
    observed,
    outside,
    refuted,
    style,
    supported,
    undecided,
)
from curvlab.study.panels import PanelGrid, take

MARKUP = '</script><script>alert(1)</script> & "quotes" don\'t matter.'


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Options of the analysis."""

    problem: str = "noise"
    """What goes wrong: noise (nothing), nan, failing, stopped or no-claims."""


def measure(cell: Cell, context: Context[Options]) -> list[dict[str, object]]:
    seed = int(cell["seed"])
    draws = np.random.default_rng([seed, 7])
    last = seed == max(context.config.seeds_run)
    if last and context.config.problem == "failing":
        raise RuntimeError("this cell always fails")
    if last and context.config.problem == "stopped":
        raise KeyboardInterrupt
    level = float("nan") if last and context.config.problem == "nan" else draws.normal(1.0, 0.05)
    arms = [observed("spread", place + draws.normal(0, 0.2), arm=arm) for place, arm in enumerate("abc")]
    return [
        observed("ratio", float(np.exp(draws.normal(-1.0, 0.8)))),
        observed("level", level),
        observed("wide", draws.normal(0.9, 2.0)),
        observed("survives", float(draws.random() < 0.02)),
        observed("faster", draws.normal(-1.0, 0.3)),
        *arms,
        observed("residual", abs(draws.normal(0, 2e-16)), tolerance=1e-14),
        *(observed("bounded", draws.random() * 1.001, step=step) for step in range(20)),
        observed("narrow", 1.0, **outside("the network is narrower than the theorem allows")),
    ]


def claims(config: Options) -> Sequence[Claim]:
    if config.problem == "no-claims":
        return []
    made = supported("it was made so")
    paper = {"source": "A. Nobody 2026, Theorem 1", "measured": "A noisy number.", "group": "paper"}
    derived = paper | {"source": "from Theorem 1", "group": "derived"}
    return [
        Claim(id="ratio", statement="The error is less than that of the exact step.", expected=made,
              rule=Inequality("ratio", "less", 1.0, centre="geometric mean"), bound_from="equation (3)", **paper),
        Claim(id="level", statement="The level is 1.", rule=Equivalence("level", 1.0, 0.2, centre="mean"),
              expected=made, **paper),
        Claim(id="survives", statement="At most runs the step survives.", rule=Share("survives", "greater", 0.5),
              expected=supported("the paper says so", explored=12), **paper),
        Claim(id="wide", statement=MARKUP, rule=Inequality("wide", "greater", 0.5, centre="mean"), expected=made, **paper),
        Claim(id="unplanned", statement="It holds at width 7, too.", rule=Wins("faster", "less"), at={"width": 7},
              expected=made, **paper),
        Claim(id="narrow", statement="Narrow networks do it.", rule=Equivalence("narrow", 1.0, 0.1, centre="median"),
              expected=undecided("nobody knows"), **derived),
        Claim(id="faster", statement="It is faster than its rival.", rule=Wins("faster", "less"), expected=made, **derived),
        Claim(id="bounded", statement="The number never exceeds 1.", rule=Always("bounded", "less", 1.0),
              expected=refuted("the bound is not sharp"), **derived),
        Claim(id="spread", statement="The arms differ.", rule=Spread("spread", "arm"), expected=undecided("we wonder"),
              given="level", **paper | {"group": "exploration"}),
        Claim(id="residual", statement="Both ways of computing agree.", rule=Identity("residual"), estimate=identities,
              expected=made, **paper | {"group": "self-check"}),
    ]  # fmt: skip


def levels(axes, measurements: pd.DataFrame) -> None:
    """The level, of every seed & arm."""
    table = take(measurements, "numbers", "level").assign(place=0)
    style.measured(axes, table, "place", "full")


def spoilt(measurements: pd.DataFrame, verdicts: pd.DataFrame) -> Figure:
    raise ValueError("nothing to draw")


ANALYSIS = Analysis(
    name="reported",
    question="Does a report tell what was learnt, on what, and how surely?",
    paper="A. Nobody, On <Nothing>, 2026",
    config=Options,
    experiments=(
        Experiment(
            name="numbers", cells=[{}], measure=measure, claims=claims, varies=("initialisation", "draws"), seconds=0.01
        ),
    ),
    subject=lambda config: {"data set": "made up", "N": 40, "widths": (8, 16), "problem": config.problem},
    figures={
        "levels": PanelGrid("python reported.py", [[levels]], claims=("level",), width="column"),
        "spoilt": spoilt,
    },
)
