"""Xu, Zhang, Jegelka & Kawaguchi 2021: losses of ReLU networks, singular values of the features, and what accelerates."""

from __future__ import annotations

from functools import partial

import pandas as pd

from analyses.gnn_acceleration import ANALYSIS, panels
from curvlab.study.panels import PanelGrid, take
from paper_figures import Paper, interval


def floors(measurements: pd.DataFrame) -> pd.DataFrame:
    """λ at the start and the least along the flow by aggregation, start and depth, means over seeds, in LaTeX."""
    tables = {"$\\lambda(0)$": "floor_start", r"$\lambda_T$": "floor"}
    keys = ["aggregation", "start", "depth"]
    runs = {
        title: take(measurements, "flows", name, model="single", features="all").groupby(keys)["value"]
        for title, name in tables.items()
    }
    rows = []
    for key, _ in runs[r"$\lambda_T$"]:
        aggregation, start, depth = key
        cells = {title: interval(values.get_group(key), ".3g", ".1g") for title, values in runs.items()}
        rows.append({"aggregation": aggregation, "start": start, "depth": f"{depth:g}", **cells})
    return pd.DataFrame(rows)


PAPER = Paper(
    title="Xu, Zhang, Jegelka & Kawaguchi 2021, Optimization of Graph Neural Networks: Implicit Acceleration by Skip "
    "Connections and More Depth (arXiv 2105.04550)",
    analysis=ANALYSIS,
    settings={"problem": "cora", "aggregation": ("gcn", "gin")},
    figures={
        "losses": PanelGrid(
            ANALYSIS.command,
            [
                [partial(panels.relu_losses, aggregation=aggregation, loss=loss) for aggregation in ("gcn", "gin")]
                for loss in ("squared", "cross-entropy")
            ],
            claims=("relu-skip",),
            height=2.2,
        ),
        "singular_values": PanelGrid(
            ANALYSIS.command,
            [
                [partial(panels.singular_values, aggregation=aggregation, form=form) for aggregation in ("gcn", "gin")]
                for form in ("normalised", "raw")
            ],
            claims=("conditioning-", "rank-"),
            height=2.2,
        ),
        "acceleration": PanelGrid(
            ANALYSIS.command,
            [
                [
                    partial(panels.acceleration, experiment="flows", change="skip"),
                    partial(panels.acceleration, experiment="flows", change="depth"),
                    partial(panels.permutation, targets="one-hot"),
                ]
            ],
            claims=("skip-faster", "depth-faster", "labels-"),
            height=2.4,
        ),
    },
    tables={"lambda": floors},
)
