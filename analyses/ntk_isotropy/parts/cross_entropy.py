"""Cross-entropy: Newton's method per sample, with loss ratio e^{−η} (claim 13)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping

import numpy as np
import torch

import curvlab
from analyses.estimates import by_seed
from analyses.ntk_isotropy.config import Config
from analyses.ntk_isotropy.part import PAPER, Part, cells_of
from analyses.ntk_isotropy.parts.steps import move
from analyses.ntk_isotropy.setting import flat, setting_of
from analyses.part import Expectation, Observations, where
from curvlab import theory
from curvlab.errors import IllConditioned
from curvlab.fisher import Full
from curvlab.nn import HalfSquaredError
from curvlab.study import Cell, Claim, Equivalence, Inequality

NAME = "cross-entropy"
RATES = (0.5, 1.0)
STEPS = 8
LAST = 3
"""Steps at the end over which the ratio is averaged."""
SLOWER: tuple[tuple[str, Expectation, str], ...] = (
    ("unweighted", "supported", "Without H the step shrinks with p − y, so the ratio tends to 1."),
    ("damped", "open", "The published damping is felt once p(1 − p) of the fitted samples falls to ρ/Θ."),
)
"""Variants whose loss falls more slowly."""
PUBLISHED_DAMPING = 1e-5
"""λ of the published code, added to HJJᵀ: ρ = λ/N."""


def _cells(config: Config) -> list[Cell]:
    if not {"loss", "outputs"} <= config.takes.keys():
        return []
    points: list[Mapping[str, object]] = []
    for outputs in (2, *config.other_outputs):
        at = {"outputs": outputs, "loss": "cross-entropy", "width": config.swept_widths[0]}
        points += [{**at, "fisher": "exact", "eta": eta} for eta in RATES]
        points += [{**at, "fisher": fisher, "eta": 1.0} for fisher in ("unweighted", "damped")]
    return cells_of(NAME, config, points)


def _measure(cell: Cell, config: Config) -> Observations:
    setting = setting_of(cell, config)
    x, labels, loss = setting.inputs, setting.targets, setting.problem.loss
    fisher, eta = str(cell["fisher"]), float(cell["eta"])
    model = copy.deepcopy(setting.problem.model)
    N = len(x)
    structure = Full()
    losses = []
    rows: list[dict[str, object]] = []
    for step in range(STEPS + 1):
        with torch.no_grad():
            z = model(x)
        losses.append(float(loss(z, labels)))
        rows.append({"quantity": "loss", "value": losses[-1], "step": step})
        if step == STEPS:
            break
        if fisher == "unweighted":
            structure.update(curvlab.sqrt_fisher(model, HalfSquaredError(), x, torch.zeros_like(z)))
        else:
            structure.update(curvlab.sqrt_fisher(model, loss, x, labels))
        u = flat(z.softmax(1) - torch.nn.functional.one_hot(labels, z.shape[1])) / N
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IllConditioned)
            direction = structure.lift(structure.rows.dual(u), PUBLISHED_DAMPING / N if fisher == "damped" else 0.0)
        move(model, direction, eta)
    ratios = np.array(losses[1:]) / np.array(losses[:-1])
    per_sample = torch.nn.functional.cross_entropy(setting.problem.model(x), labels, reduction="none")
    predicted = theory.newton_losses(per_sample.detach().double().numpy(force=True), eta, STEPS).mean(1)
    rows += [
        {"quantity": "loss_ratio", "value": float(ratio), "step": step + 1, "predicted": float(np.exp(-eta))}
        for step, ratio in enumerate(ratios)
    ]
    rows += [{"quantity": "loss_predicted", "value": float(v), "step": step} for step, v in enumerate(predicted)]
    rows.append({"quantity": "final_ratio_quotient", "value": float(ratios[-LAST:].mean() / np.exp(-eta))})
    rows.append({"quantity": "final_ratio", "value": float(ratios[-LAST:].mean())})
    return rows


def _claims(config: Config) -> list[Claim]:
    if not {"loss", "outputs"} <= config.takes.keys():
        return []
    claims = [
        Claim(
            id=f"cross-entropy-{outputs}-{eta:g}",
            statement=f"With {outputs} classes and η = {eta:g} the cross-entropy falls by e^(−η) per undamped exact step.",
            source=f"derived from {PAPER}, appendix (theory file, claim 13)",
            measured=f"Mean ratio of the last {LAST} of {STEPS} steps over e^(−η).",
            rule=Equivalence(1.0, 0.05),
            estimate=by_seed,
            expected="supported",
            reason="HΔf = −η(p − y) is Newton's method per sample; its loss is multiplied by e^(−η) once samples are fitted.",
            needs=where(NAME, outputs=outputs, eta=eta, fisher="exact"),
            quantities=("final_ratio_quotient",),
        )
        for outputs in (2, *config.other_outputs)
        for eta in RATES
    ]
    claims += [
        Claim(
            id=f"cross-entropy-{fisher}",
            statement=f"At η = 1 the loss ratio of the {fisher} Fisher stays above e^(−1).",
            source=f"derived from {PAPER}, appendix (theory file, claim 13)",
            measured=f"Mean ratio of the last {LAST} of {STEPS} steps over e^(−1), over all numbers of classes.",
            rule=Inequality(1.1, "greater"),
            estimate=by_seed,
            expected=expected,
            reason=reason,
            needs=where(NAME, fisher=fisher),
            quantities=("final_ratio_quotient",),
        )
        for fisher, expected, reason in SLOWER
    ]
    return claims


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda width: 0.2 + 3.0 * (width / 2048) ** 2)
