"""The width that the theorems' conclusions take, against the width that suffices for the proofs (claim 6)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

import curvlab
from analyses.claims import claim
from analyses.descent import Direction
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.descent import descend
from analyses.jacobian_rank.points import BOTH, SYNTHETIC, experiment, page
from analyses.jacobian_rank.setting import BOUND_TOLERANCE, Setting
from curvlab import study, theory
from curvlab.fisher import Full

SAMPLES = (4, 8, 16, 32)
WIDTHS = tuple(2**power for power in range(13))
"""Tried one after the other, until the conclusion holds."""


@dataclass(frozen=True)
class Theorem:
    """What a theorem concludes of a method.

    Attributes:
        method: in words.
        direction: its steps.
        eta: its learning rate, from λ_max(G(0)).
        rate: the concluded factor per step of ‖r‖², from η and λ₀.
        steps: number of steps for which that is asked.
        every: steps from one look at the Jacobian to the next.
        power: of n in the width that suffices, n^power/λ₀⁴ but for constants and the probability of failure.
    """

    method: str
    direction: Callable[[Setting], Direction]
    eta: Callable[[float], float]
    rate: Callable[[float, float], float]
    steps: int
    every: int
    power: int


THEOREMS: Mapping[str, Theorem] = {
    "natural": Theorem(
        method="natural gradient",
        direction=lambda setting: setting.natural(Full()),
        eta=lambda _: 0.5,
        rate=lambda eta, _: theory.ngd_rate_bound(eta),
        steps=6, every=1, power=4,
    ),
    "descent": Theorem(
        method="gradient descent",
        direction=Setting.gradient,
        eta=lambda largest: 1 / largest,
        rate=lambda eta, least: 1 - eta * least / 2,
        steps=20, every=10, power=6,
    ),
}  # fmt: skip


def _points(config: Config) -> list[study.Point]:
    at = {"problem": SYNTHETIC, "similarity": 0.0, "activation": config.activation[0]}
    return [{**at, "samples": samples} for samples in SAMPLES]


def _concludes(setting: Setting, theorem: Theorem, least: float) -> float | None:
    """Return C_emp along a run, None as soon as the theorem's conclusion does not hold: full row rank, and the rate."""
    if not setting.full_rank:
        return None
    eta = theorem.eta(float(setting.eigenvalues[-1]))
    rate = theorem.rate(eta, least)
    direction = theorem.direction(setting)
    start = float(setting.residual.square().sum())
    model = setting.network()
    changes = []
    for first in range(0, theorem.steps, theorem.every):
        path = descend(setting, direction, eta, theorem.every, model)
        allowed = (rate ** np.arange(first, first + len(path)) + BOUND_TOLERANCE) * start
        if not (setting.squared_residuals(path) <= allowed).all():
            return None
        now = setting.inspect(curvlab.jacobian(model, setting.inputs))
        if now.deficiency:
            return None
        changes.append(now.change)
    return theory.stability_constant(max(changes), float(setting.eigenvalues[0]))


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    def setting(width: int) -> Setting:
        return Setting.of(cell, context.config, width=width)

    inputs = setting(WIDTHS[0]).inputs.numpy(force=True)
    N, features = inputs.shape
    least = float(np.linalg.eigvalsh(theory.two_layer_limit_gram(inputs, str(cell["activation"])))[0])
    widths = [width for width in WIDTHS if width * features >= N]
    while widths and not setting(widths[0]).full_rank:
        del widths[0]
    rows = []
    for name, theorem in THEOREMS.items():
        at: dict[str, object] = {"run": name, "sufficient": N**theorem.power / least**4}
        reached = ((width, _concludes(setting(width), theorem, least)) for width in widths)
        width, constant = next((found for found in reached if found[1] is not None), (None, None))
        if width is None or constant is None:
            rows.append(study.observed("needed", float("nan"), status=f"more than {WIDTHS[-1]} units", **at))
            continue
        rows += [
            study.observed("needed", width, **at),
            study.observed("over_rank", width / widths[0], **at),
            study.observed(f"constant_{name}", constant, **at),
        ]
    return rows


NEEDS = page("condition 1 and theorem 3", "claims 1 and 6, derived")


def _order(name: str) -> study.Claim:
    method, order = THEOREMS[name].method, f"n^{THEOREMS[name].power}/λ₀⁴"
    return claim(
        f"width-order-{name}", page("theorem 3", "claim 6"), study.Inequality("needed", "less", 1.0, centre="mean"),
        f"The width at which {method} reaches the theorem's conclusion grows more slowly than the sufficient order {order}.",
        f"Slope of log least width against log {order}, n from {SAMPLES[0]} to {SAMPLES[-1]}; conclusion: full row rank, and the "
        "rate at every step.",
        study.supported("The order is sufficient, not necessary: the proof takes union bounds and norms of sums of n terms."),
        group="exploration", bound_from="1: in proportion to the order",
        estimate=study.among(partial(study.slope_by_seed, against="sufficient"), run=name),
    )  # fmt: skip


CLAIMS = [
    *map(_order, THEOREMS),
    claim("width-proportional", NEEDS, study.Equivalence("needed", 1.0, 0.25, centre="mean"),
          "The width at which natural gradient reaches the theorem's conclusion is proportional to n.",
          "Slope of log least width against log n.",
          study.undecided("P ≥ n needs m ≥ n/d; whether more than a multiple of that is needed, no theorem says."),
          group="exploration", estimate=study.among(partial(study.slope_by_seed, against="samples"), run="natural")),
    claim("width-rank", NEEDS, study.Inequality("over_rank", "less", 2.0, centre="geometric mean"),
          "Natural gradient reaches the theorem's conclusion at no more than twice the width at which J(0) has full row rank.",
          "The one width over the other, the mean over n.",
          study.undecided("Condition 1 is necessary; no theorem says how much more is."),
          group="exploration", estimate=study.among(study.geometric_by_seed, run="natural")),
    claim("width-condition", page("theorem 1: the converse is not claimed", "claim 2"),
          study.Always("constant_natural", "greater", 0.5),
          "At the least width that reaches the theorem's conclusion, condition 2 fails.",
          "C_emp along natural gradient at that width; condition 2 wants it below ½.",
          study.supported("The conditions are sufficient, not necessary."), group="exploration", bound_from="condition 2"),
]  # fmt: skip

WIDTH = experiment(_points, varies=BOTH, name="width", measure=_measure, claims=CLAIMS, seconds=0.15)
