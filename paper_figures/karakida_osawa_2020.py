"""Karakida & Osawa 2020: losses against steps, contraction per step, and the table of scales α."""

from __future__ import annotations

from functools import partial

import pandas as pd

from analyses.ntk_isotropy import ANALYSIS, panels
from analyses.ntk_isotropy.setting import PUBLISHED
from curvlab.study import style
from curvlab.study.inference import Summary
from curvlab.study.panels import PanelGrid, at_base, structures_of, take
from paper_figures import Paper


def scales(measurements: pd.DataFrame) -> pd.DataFrame:
    """Published, derived and measured α at the greatest width: mean and half of the 95 % t-interval over seeds."""
    cells = at_base(take(measurements, "response", "alpha", kind="exact", structure=PUBLISHED))
    cells = cells[cells["width"] == cells["width"].max()]
    rows = []
    for structure, group, _ in structures_of(cells):
        same = measurements[measurements["cell"].isin(group["cell"])].groupby("quantity")["value"].mean()
        summary = Summary.of(group["value"].to_numpy())
        half = summary.interval(0.95)[1] - summary.mean
        rows.append(
            {
                "approximation": style.look(structure).label,
                r"$\alpha$ published": _number(same.get("alpha_published")),
                r"$\alpha$ derived": _number(same.get("alpha_predicted")),
                r"$\alpha$ measured": rf"${summary.mean:.6g} \pm {_power(half, 1)}$",
                "anisotropy": f"${_power(float(same['anisotropy']), 2)}$",
            }
        )
    return pd.DataFrame(rows)


def _number(value: float | None) -> str:
    return "--" if value is None else f"{value:g}"


def _power(value: float, digits: int) -> str:
    """A number in LaTeX, with a power of ten where it is far below 1."""
    rounded = float(f"{value:.{digits}g}")
    mantissa, _, exponent = f"{rounded:g}".partition("e")
    return rf"{mantissa} \cdot 10^{{{int(exponent)}}}" if exponent else mantissa


PAPER = Paper(
    title="Karakida & Osawa 2020, Understanding Approximate Fisher Information for Fast Convergence of Natural "
    "Gradient Descent in Wide Neural Networks (arXiv 2010.00879)",
    analysis=ANALYSIS,
    settings={
        "problem": "karakida-osawa",
        "structures": PUBLISHED,
        "other_depths": (),
        "other_activations": (),
        "other_kinds": (),
        "other_outputs": (),
    },
    figures={
        "losses": PanelGrid(
            ANALYSIS.command,
            [
                [partial(panels.loss_against_step, loss=loss, scale=scale) for scale in (0.1, 0.5, 1.0)]
                for loss in ("training", "test")
            ],
            claims=("training-", "test-full", "test-block", "test-kfac", "test-unit"),
            columns=6,
        ),
        "contraction": PanelGrid(
            ANALYSIS.command,
            [[panels.residual_against_rate, panels.modes]],
            claims=("contraction-", "gradient-descent-"),
            height=2.6,
        ),
    },
    tables={"alpha": scales},
)
