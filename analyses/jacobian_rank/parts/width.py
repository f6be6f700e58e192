"""The width that the theorems' conclusions take, against the width that suffices for the proofs (claim 6)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log2

import numpy as np

import curvlab
from analyses.estimates import by_seed, least_by_seed, slope_by_seed
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.descent import Direction, descend, gradient, inspect, natural
from analyses.jacobian_rank.part import PAPER, SYNTHETIC, Part, cells_of
from analyses.jacobian_rank.parts.training import BOUND_TOLERANCE
from analyses.jacobian_rank.setting import Setting, setting_of
from analyses.part import Observations, where
from curvlab import theory
from curvlab.fisher import Full
from curvlab.study import Cell, Claim, Equivalence, Inequality

NAME = "width"
SAMPLES = (4, 8, 16, 32)
WIDTHS = tuple(2**power for power in range(13))
"""Tried one after the other, until the conclusion holds."""


@dataclass(frozen=True)
class Run:
    """A method with what its theorem concludes.

    Attributes:
        name: of the method, in words.
        direction: its steps.
        eta: its learning rate, from λ_max(G(0)).
        rate: the concluded factor per step of ‖r‖², from η and λ₀.
        steps: number of steps for which that is asked.
        every: steps from one look at the Jacobian to the next.
        power: of n in the width that suffices, n^power/λ₀⁴ but for constants and the probability of failure.
    """

    name: str
    direction: Callable[[Setting], Direction]
    eta: Callable[[float], float]
    rate: Callable[[float, float], float]
    steps: int
    every: int
    power: int


RUNS: Mapping[str, Run] = {
    "natural": Run(
        "natural gradient",
        lambda setting: natural(Full(), setting),
        lambda _: 0.5,
        lambda eta, _: theory.ngd_rate_bound(eta),
        6,
        1,
        4,
    ),
    "descent": Run(
        "gradient descent", gradient, lambda largest: 1 / largest, lambda eta, least: 1 - eta * least / 2, 20, 10, 6
    ),
}


def _cells(config: Config) -> list[Cell]:
    at = {"problem": SYNTHETIC, "similarity": 0.0, "activation": config.activation[0]}
    return cells_of(NAME, config, [{**at, "samples": samples} for samples in SAMPLES])


def _concludes(setting: Setting, run: Run, least: float) -> float | None:
    """Return C_emp along a run, None if it loses full row rank or ‖r(k)‖² exceeds rate^k ‖r(0)‖²."""
    if not setting.full_rank:
        return None
    model, y = copy.deepcopy(setting.problem.model), setting.targets.numpy(force=True)
    eta, start = run.eta(float(setting.eigenvalues[-1])), float(setting.residual.square().sum())
    direction, rate = run.direction(setting), run.rate(eta, least)
    change = 0.0
    for k in range(1, run.steps + 1):
        squared = float(np.square(descend(model, setting, direction, eta, 1)[-1] - y).sum())
        if not squared <= (rate**k + BOUND_TOLERANCE) * start:
            return None
        if k % run.every == 0:
            point = inspect(curvlab.jacobian(model, setting.inputs), setting)
            if point.deficiency:
                return None
            change = max(change, point.change)
    return theory.stability_constant(change, float(setting.eigenvalues[0]))


def _measure(cell: Cell, config: Config) -> Observations:
    def setting(width: int) -> Setting:
        return setting_of(cell, config, width=width)

    inputs = setting(WIDTHS[0]).inputs.numpy(force=True)
    N, features = inputs.shape
    least = float(np.linalg.eigvalsh(theory.two_layer_limit_gram(inputs, str(cell["activation"])))[0])
    widths = [width for width in WIDTHS if width * features >= N]
    while widths and not setting(widths[0]).full_rank:
        del widths[0]
    rows: list[dict[str, object]] = []
    for name, run in RUNS.items():
        at: dict[str, object] = {"run": name, "sufficient": N**run.power / least**4}
        reached = ((width, _concludes(setting(width), run, least)) for width in widths)
        width, constant = next((found for found in reached if found[1] is not None), (None, None))
        if width is None or constant is None:
            rows.append({"quantity": "needed", "value": float("nan"), "status": f"more than {WIDTHS[-1]} units", **at})
            continue
        rows += [
            {"quantity": "needed", "value": width, **at},
            {"quantity": "doublings", "value": log2(width / widths[0]), **at},
            {"quantity": "constant", "value": constant, **at},
        ]
    return rows


def _order_claim(name: str, run: Run) -> Claim:
    return Claim(
        id=f"width-order-{name}",
        statement=f"The width at which {run.name} reaches the theorem's conclusion grows more slowly than the sufficient order "
        f"n^{run.power}/λ₀⁴.",
        source=f"{PAPER}, theorem 3 (theory file, claim 6)",
        measured=f"Slope of log least width against log n^{run.power}/λ₀⁴, n from {SAMPLES[0]} to {SAMPLES[-1]}; conclusion: full "
        "row rank, and the rate at every step.",
        rule=Inequality(1.0, "less"),
        estimate=lambda table: slope_by_seed(table[table["run"] == name], against="sufficient"),
        expected="supported",
        reason="The order is sufficient, not necessary: the proof takes union bounds and norms of sums of n terms.",
        needs=where(NAME),
        quantities=("needed",),
    )


def _claims(config: Config) -> list[Claim]:  # noqa: ARG001
    return [
        *(_order_claim(name, run) for name, run in RUNS.items()),
        Claim(
            id="width-proportional",
            statement="The width at which natural gradient reaches the theorem's conclusion is proportional to n.",
            source=f"{PAPER}, condition 1 and theorem 3 (theory file, claims 1 and 6; derived)",
            measured="Slope of log least width against log n.",
            rule=Equivalence(1.0, 0.25),
            estimate=lambda table: slope_by_seed(table[table["run"] == "natural"], against="samples"),
            expected="open",
            reason="P ≥ n needs m ≥ n/d; whether more than a multiple of that is needed, no theorem says.",
            needs=where(NAME),
            quantities=("needed",),
        ),
        Claim(
            id="width-rank",
            statement="Natural gradient reaches the theorem's conclusion at no more than twice the width at which J(0) has full "
            "row rank.",
            source=f"{PAPER}, condition 1 and theorem 3 (theory file, claims 1 and 6; derived)",
            measured="Doublings from the one width to the other, the mean over n.",
            rule=Inequality(1.0, "less"),
            estimate=lambda table: by_seed(table[table["run"] == "natural"]),
            expected="open",
            reason="Condition 1 is necessary; no theorem says how much more is.",
            needs=where(NAME),
            quantities=("doublings",),
        ),
        Claim(
            id="width-condition",
            statement="At the least width that reaches the theorem's conclusion, condition 2 fails.",
            source=f"{PAPER}, theorem 1: the converse is not claimed (theory file, claim 2)",
            measured="C_emp along natural gradient at that width, the smallest over n; condition 2 wants it below ½.",
            rule=Inequality(0.5, "greater"),
            estimate=lambda table: least_by_seed(table[table["run"] == "natural"]),
            expected="supported",
            reason="The conditions are sufficient, not necessary.",
            needs=where(NAME),
            quantities=("constant",),
        ),
    ]


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda _: 0.15)
