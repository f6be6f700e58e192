"""Cohen et al. 2021: loss and sharpness at several step sizes, flow against descent, and every approximation's λ_max."""

from __future__ import annotations

from functools import partial

import pandas as pd

from analyses.edge_of_stability import ANALYSIS, panels
from analyses.edge_of_stability.analysis import FIGURES
from curvlab.study.panels import PanelGrid, take
from paper_figures import Paper, interval


def plateaus(measurements: pd.DataFrame) -> pd.DataFrame:
    """By run, over seeds: median of the crossing, mean of the sharpness at the edge ± half its 95 % t-interval, in LaTeX."""
    table = take(measurements, "training", "plateau_ratio")
    crossings = take(measurements, "training", "crossing")
    rows = []
    for optimiser in dict.fromkeys(table["optimiser"]):
        for eta in sorted(table.loc[table["optimiser"] == optimiser, "eta"].unique()):
            cells = [of[(of["optimiser"] == optimiser) & (of["eta"] == eta)]["value"] for of in (table, crossings)]
            rows.append(
                {
                    "optimiser": panels.TITLES[optimiser],
                    r"$\eta$": f"{eta:g}",
                    "crossing (step)": f"{cells[1].median():g}",
                    "sharpness / threshold": interval(cells[0], ".3f"),
                }
            )
    return pd.DataFrame(rows)


PAPER = Paper(
    title="Cohen, Kaur, Li, Kolter & Talwalkar 2021, Gradient Descent on Neural Networks Typically Occurs at the Edge of "
    "Stability (arXiv 2103.00065)",
    analysis=ANALYSIS,
    settings={"problem": "digits", "network": "fc-tanh", "loss": "half-squared", "scaling": "unit", "published": True},
    figures={
        "loss_and_sharpness": PanelGrid(
            ANALYSIS.command,
            [[panels.loss_against_step, panels.sharpness_against_step]],
            claims=("edge-gd", "plateaus", "loss-"),
            height=2.5,
        ),
        "flow": FIGURES["flow"],
        "structures": FIGURES["structures"],
        "published": PanelGrid(
            f"{ANALYSIS.command} --published",
            [[partial(panels.published, quantity=name) for name in ("loss", "sharpness")]],
            claims=("published-",),
            height=2.5,
        ),
    },
    tables={"plateaus": plateaus},
)
