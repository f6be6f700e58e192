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
NEWTON = 0.1
"""Deviation of the losses from Newton's method that counts as following it."""
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
        wanted += [{**at, "fisher": fisher, "eta": 1.0} for fisher in ("mse", *(name for name, _ in SLOWER))]
        wanted.append({**at, "fisher": "exact", "eta": 1.0, "width": config.swept_widths[-1]})
    return wanted


def _direction(fisher: str, setting: Setting) -> Direction:
    """The natural gradient of the cross-entropy: exact, with the published damping, without H, or H with the Fisher of the MSE."""
    x, labels = setting.problem.train
    structure = Full()
    damping = PUBLISHED_DAMPING / len(x) if fisher == "damped" else 0.0

    def direction(model: nn.Module) -> Mapping[str, Tensor]:
        with torch.no_grad():
            z = model(x)
        loss, targets = setting.problem.loss, labels
        if fisher in ("unweighted", "mse"):
            loss, targets = HalfSquaredError(), torch.zeros_like(z)
        structure.update(curvlab.sqrt_fisher(model, loss, x, targets))
        p = z.softmax(1)
        off = p - torch.nn.functional.one_hot(labels, z.shape[1])
        if fisher == "mse":
            hessian = p.diag_embed() - p[:, :, None] * p[:, None] + PUBLISHED_DAMPING * torch.eye(z.shape[1]).to(p)
            off = torch.linalg.solve(hessian, off)
        u = flat(off) / len(x)
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
        study.observed("loss_over_newton", losses[-1] / predicted[-1], **ended),
    ]


def _claims(config: Config) -> list[study.Claim]:
    counts = (2, *config.other_outputs)
    falls = [_falls(outputs, "exact", eta, config.swept_widths[0]) for outputs in counts for eta in RATES]
    falls += [_falls(outputs, "mse", 1.0, config.swept_widths[0]) for outputs in counts]
    falls += [_newton(outputs, config.swept_widths[-1]) for outputs in counts]
    return falls + [_falls_more_slowly(fisher, expected) for fisher, expected in SLOWER]


def _falls(outputs: int, fisher: str, eta: float, width: int) -> study.Claim:
    exact = fisher == "exact"
    return claim(
        f"cross-entropy-{outputs}-{f'{eta:g}' if exact else fisher}", page(f"derived from {PAPER}, appendix", "claim 13"),
        study.Equivalence("final_ratio_quotient", 1.0, 0.05, centre="geometric mean"),
        f"With {outputs} classes and η = {eta:g} the cross-entropy falls by e^(−η) per "
        + ("undamped exact step." if exact else "step of the published variant (JJᵀ)⁻¹(H + λI)⁻¹."),
        f"Mean ratio of the last {LAST} of {STEPS} steps over e^(−η).",
        study.supported("HΔf = −η(p − y) is Newton's method per sample; its loss is multiplied by e^(−η) once samples are "
                        "fitted."),
        group="derived", at={"outputs": outputs, "eta": eta, "fisher": fisher, "width": width},
    )  # fmt: skip


def _newton(outputs: int, width: int) -> study.Claim:
    return claim(
        f"cross-entropy-{outputs}-losses", page(f"derived from {PAPER}, appendix", "claim 13"),
        study.Equivalence("loss_over_newton", 1.0, NEWTON, centre="geometric mean"),
        f"With {outputs} classes the losses of a wide network are those of Newton's method for every sample.",
        f"Loss after {STEPS} exact steps at η = 1 over that of log S ← log S − η(1 + S), at the largest width.",
        study.undecided("The law is exact in the limit; the first step is long, and the curvature of f bends it."),
        group="derived", at={"outputs": outputs, "eta": 1.0, "fisher": "exact", "width": width},
    )  # fmt: skip


def _falls_more_slowly(fisher: str, expected: study.Expected) -> study.Claim:
    return claim(
        f"cross-entropy-{fisher}", page(f"derived from {PAPER}, appendix", "claim 13"),
        study.Inequality("final_ratio_quotient", "greater", 1.1, centre="geometric mean"),
        f"At η = 1 the loss ratio of the {fisher} Fisher stays above e^(−1).",
        f"Mean ratio of the last {LAST} of {STEPS} steps over e^(−1), over all numbers of classes.",
        expected, group="derived", at={"fisher": fisher},
    )  # fmt: skip


CROSS_ENTROPY = experiment(_points, name="cross-entropy", measure=_measure, claims=_claims, seconds=seconds(0.2, 3.0))
