"""Izadi, Fang, Stevenson & Lin 2020: accuracies by split, curves, unlabelled nodes and the published sweeps."""

from __future__ import annotations

from functools import partial

import pandas as pd

from analyses.gnn_natural_gradient import ANALYSIS, panels
from analyses.gnn_natural_gradient.experiments.accuracy import HEADLINE_QUANTITY
from analyses.gnn_natural_gradient.recipe import METHODS
from analyses.gnn_natural_gradient.training import ACCURACY, VALIDATION_LOSS
from curvlab.study.panels import PanelGrid, take
from paper_figures import Paper, interval


def accuracies(measurements: pd.DataFrame) -> pd.DataFrame:
    """Test accuracies in per cent by split and method, means with 95 % intervals, beside the published one, in LaTeX."""
    table = take(measurements, "accuracy", ACCURACY)
    stored = measurements[measurements["quantity"] == HEADLINE_QUANTITY]
    headline = dict(zip(stored["split"], stored["value"], strict=True))
    rows = []
    for split, of_split in table.groupby("split"):
        for method in METHODS:
            runs = of_split[of_split["method"] == method]
            cells = {choice: interval(group["value"], ".2f") for choice, group in runs.groupby("choice")}
            paper = f"{headline[split]:.2f}" if method == "adam-kfac" and split in headline else ""
            rows.append({"split": split, "method": METHODS[method].title, **cells, "paper": paper})
    return pd.DataFrame(rows)


PAPER = Paper(
    title="Izadi, Fang, Stevenson & Lin 2020, Optimization of Graph Neural Networks with Natural Gradient Descent "
    "(arXiv 2008.09624)",
    analysis=ANALYSIS,
    settings={"problem": "cora", "splits": ("public",), "seeds": 8},
    others={"citeseer": ("accuracy", "curves"), "pubmed": ("accuracy", "curves")},
    figures={
        "accuracy": PanelGrid(
            ANALYSIS.command,
            [[panels.accuracy, panels.epochs, partial(panels.epochs, seconds=True)]],
            claims=("accuracy-", "headline-"),
            height=2.5,
        ),
        "curves": PanelGrid(
            ANALYSIS.command,
            [
                [
                    partial(panels.curves, quantity=quantity, choice="published")
                    for quantity in (VALIDATION_LOSS, ACCURACY)
                ]
            ],
            claims=("reach-adam-published", "reach-sgd-published"),
            height=2.5,
        ),
        "sweeps": PanelGrid(
            ANALYSIS.command,
            [[panels.epsilon, panels.refresh], [panels.unlabelled, panels.joint]],
            claims=("sensitivity-", "lambda-both", "lambda-plain"),
            height=2.3,
            columns=4,
        ),
    },
    tables={"accuracies": accuracies},
)
