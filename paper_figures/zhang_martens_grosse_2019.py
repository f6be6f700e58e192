"""Zhang, Martens & Grosse 2019: paths in output space, rates, and what the theorems ask of the Jacobian."""

from __future__ import annotations

from functools import partial

import pandas as pd

from analyses.jacobian_rank import ANALYSIS, panels
from curvlab.study.panels import PanelGrid, take
from paper_figures import Paper, interval


def constants(measurements: pd.DataFrame) -> pd.DataFrame:
    """C of condition 2 by activation and width, mean ± half the 95 % t-interval over seeds, in LaTeX."""
    titles = {"constant_trajectory": "along the run", "constant_ball_random": "in the ball"}
    tables = {title: take(measurements, "training", name, data="own", eta=0.5) for name, title in titles.items()}
    rows = []
    for activation in panels.NAMES:
        shown = {title: table[table["activation"] == activation] for title, table in tables.items()}
        for width in sorted(shown["in the ball"]["width"].unique()):
            cells = {
                title: interval(table.loc[table["width"] == width, "value"], ".2f") for title, table in shown.items()
            }
            rows.append({"activation": activation, "width": f"{width:g}", **cells})
    return pd.DataFrame(rows)


PAPER = Paper(
    title="Zhang, Martens & Grosse 2019, Fast Convergence of Natural Gradient Descent for Overparameterized Neural Networks",
    analysis=ANALYSIS,
    settings={"problem": "two-layer", "activation": ("relu", "erf"), "published": True},
    figures={
        "trajectories": PanelGrid(
            f"{ANALYSIS.command} --published",
            [[partial(panels.output_paths, run=run, images="mnist") for run in panels.PATHS]],
            claims=("published-paths-",),
            height=2.8,
        ),
        "rates": PanelGrid(
            ANALYSIS.command,
            [[panels.residual_against_step, panels.decay_against_leverage]],
            claims=("rate-", "kfac-"),
            height=2.8,
        ),
    },
    tables={"condition_2": constants},
)
