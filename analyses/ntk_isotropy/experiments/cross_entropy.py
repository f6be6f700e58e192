"""Cross-entropy: Newton's method per sample, with loss ratio e^{−η} (claim 13)."""

import warnings
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

import curvlab
from analyses.claims import claim
from analyses.descent import Descent, Direction, flat
from analyses.ntk_isotropy.config import Config
from analyses.ntk_isotropy.descent import finite
from analyses.ntk_isotropy.points import PAPER, experiment, page, seconds
from analyses.ntk_isotropy.setting import Setting
from curvlab import study, theory
from curvlab.errors import IllConditioned
from curvlab.fisher import Full
from curvlab.nn import HalfSquaredError
from curvlab.study.loop import Seen

RATES = (0.5, 1.0)
STEPS = 8
LAST = 3
"""Steps at the end over which the ratio is averaged."""
SLOWER: tuple[tuple[str, study.Expected], ...] = (
    ("unweighted", study.supported("Without H the step shrinks with p − y, so the ratio tends to 1.")),
    ("damped", study.undecided("The published damping is felt once p(1 − p) of the fitted samples falls to ρ/Θ.")),
)
"""Variants whose loss falls more slowly."""
PUBLISHED_DAMPING = 1e-5
"""λ of the published code, added to HJJᵀ: ρ = λ/N."""


def _points(config: Config) -> list[study.Point]:
    if not {"loss", "outputs"} <= config.takes.keys():
        return []
    wanted: list[study.Point] = []
    for outputs in (2, *config.other_outputs):
        at = {"outputs": outputs, "loss": "cross-entropy", "width": config.swept_widths[0]}
        wanted += [{**at, "fisher": "exact", "eta": eta} for eta in RATES]
        wanted += [{**at, "fisher": fisher, "eta": 1.0} for fisher, _ in SLOWER]
    return wanted


def _direction(fisher: str, setting: Setting) -> Direction:
    """The natural gradient of the cross-entropy: exact, with the published damping, or without H."""
    x, labels = setting.problem.train
    structure = Full()
    damping = PUBLISHED_DAMPING / len(x) if fisher == "damped" else 0.0

    def direction(model: nn.Module) -> Mapping[str, Tensor]:
        with torch.no_grad():
            z = model(x)
        loss, targets = setting.problem.loss, labels
        if fisher == "unweighted":
            loss, targets = HalfSquaredError(), torch.zeros_like(z)
        structure.update(curvlab.sqrt_fisher(model, loss, x, targets))
        u = flat(z.softmax(1) - torch.nn.functional.one_hot(labels, z.shape[1])) / len(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IllConditioned)
            return structure.lift(structure.rows.dual(u), damping)

    return direction


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    setting = Setting.of(cell, context.config)
    x, labels = setting.problem.train
    eta = float(cell["eta"])

    def loss(model: nn.Module) -> Seen:
        with torch.no_grad():
            return finite({"loss": float(setting.problem.loss(model(x), labels))})

    model = setting.network()
    trace = study.follow(Descent(model, _direction(str(cell["fisher"]), setting), eta, loss), STEPS)
    losses, ended = trace.series("loss", STEPS + 1), trace.ended
    ratios = losses[1:] / losses[:-1]
    final, limit = float(ratios[-LAST:].mean()), float(np.exp(-eta))
    per_sample = torch.nn.functional.cross_entropy(setting.problem.model(x), labels, reduction="none")
    predicted = theory.newton_losses(per_sample.detach().double().numpy(force=True), eta, STEPS).mean(1)
    return [
        *(study.observed("loss", v, step=step, **ended) for step, v in enumerate(losses)),
        *(study.observed("loss_ratio", v, step=step, predicted=limit, **ended) for step, v in enumerate(ratios, 1)),
        *(study.observed("loss_predicted", v, step=step) for step, v in enumerate(predicted)),
        study.observed("final_ratio_quotient", final / limit, **ended),
        study.observed("final_ratio", final, **ended),
    ]


def _claims(config: Config) -> list[study.Claim]:
    falls = [_falls(outputs, eta) for outputs in (2, *config.other_outputs) for eta in RATES]
    return falls + [_falls_more_slowly(fisher, expected) for fisher, expected in SLOWER]


def _falls(outputs: int, eta: float) -> study.Claim:
    return claim(
        f"cross-entropy-{outputs}-{eta:g}", page(f"derived from {PAPER}, appendix", "claim 13"),
        study.Equivalence("final_ratio_quotient", 1.0, 0.05),
        f"With {outputs} classes and η = {eta:g} the cross-entropy falls by e^(−η) per undamped exact step.",
        f"Mean ratio of the last {LAST} of {STEPS} steps over e^(−η).",
        study.supported("HΔf = −η(p − y) is Newton's method per sample; its loss is multiplied by e^(−η) once samples are "
                        "fitted."),
        at={"outputs": outputs, "eta": eta, "fisher": "exact"},
    )  # fmt: skip


def _falls_more_slowly(fisher: str, expected: study.Expected) -> study.Claim:
    return claim(
        f"cross-entropy-{fisher}", page(f"derived from {PAPER}, appendix", "claim 13"),
        study.Inequality("final_ratio_quotient", "greater", 1.1),
        f"At η = 1 the loss ratio of the {fisher} Fisher stays above e^(−1).",
        f"Mean ratio of the last {LAST} of {STEPS} steps over e^(−1), over all numbers of classes.",
        expected, at={"fisher": fisher},
    )  # fmt: skip


CROSS_ENTROPY = experiment(_points, name="cross-entropy", measure=_measure, claims=_claims, seconds=seconds(0.2, 3.0))
