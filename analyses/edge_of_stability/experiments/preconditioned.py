"""Training with a structure as preconditioner: its own edge, at 2/η of the preconditioned Hessian (claim 13)."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from analyses.claims import claim
from analyses.edge_of_stability.config import Config
from analyses.edge_of_stability.descent import DIVERGED, TrackedDescent, descend, edge_of
from analyses.edge_of_stability.optimisers import frozen, natural
from analyses.edge_of_stability.points import HOVERING, HOVERS, PAPER, memory, page, points, settled
from analyses.edge_of_stability.setting import Setting, setting_of
from analyses.specs import classifies_nodes
from curvlab import study
from curvlab.fisher import Structure, make
from curvlab.rows import sqrt_fisher
from curvlab.spectrum import StructureOperator, eigenpairs

SAMPLES = 32
"""With ten classes 320 rows, on whose side the full structure is solved."""
FROZEN, LIVE = "frozen", "live"
DAMPING = {FROZEN: 0.1, LIVE: 1e-4}
"""ρ over λ_max of the structure at initialisation."""
ETA = {FROZEN: 0.1, LIVE: 0.4}
STEPS = {FROZEN: 600, LIVE: 40}
EVERY = {FROZEN: 15, LIVE: 20}
KICK = 1e-3
"""Relative change of the parameters, at random, that gives every mode a residual before the bound is probed."""
BEYOND = (0.9, 1.1)
"""Step sizes after a live run, over its bound 2/λ_max."""
PROBE = 15
"""Steps taken at each of these."""
COVERED: Mapping[str, Callable[[int], int]] = {"full": lambda _: 1, "block-diagonal": lambda layers: layers}
"""Structures for which λ_max(P⁻¹H) near interpolation is known, and what it is, from the number of layers."""


def _points(config: Config) -> list[study.Point]:
    few = {} if classifies_nodes(config.problem) else {"samples": SAMPLES}
    at = {"loss": "half-squared", **few}
    return points(
        config, [{"structure": name, "mode": mode, **at} for name in config.preconditioners for mode in (FROZEN, LIVE)]
    )


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    setting = setting_of(cell, context.config)
    mode = str(cell["mode"])
    model = setting.network()
    structure = make(str(cell["structure"]))
    initial = sqrt_fisher(model, setting.problem.loss, *setting.problem.train)
    layers = len(initial.layers)
    structure.update(initial)
    damping = DAMPING[mode] * float(eigenpairs(StructureOperator(structure), 1, tolerance=1e-3).values[0])
    eta, live = ETA[mode], mode == LIVE
    optimiser = natural(model, setting, structure, damping, eta) if live else frozen(model, structure, damping, eta)
    measured = range(EVERY[mode] if live else 0, STEPS[mode] + 1, EVERY[mode])
    edge = edge_of(TrackedDescent(model, setting, optimiser, measured, top=1), STEPS[mode])
    rows = edge.rows()
    if live and edge.trace.diverged is None:
        final = float(edge.sharpness[-1])
        rows.append(study.observed("final", final, layers=layers))
        if structure.key in COVERED:
            known = COVERED[structure.key](layers)
            rows.append(study.observed("final_share", final / known))
            rows += _beyond(model, setting, structure, damping, known, study.generator(int(cell["seed"]), "kick"))
    return rows


def _beyond(
    model: nn.Module, setting: Setting, structure: Structure, damping: float, known: int, generator: torch.Generator
) -> list[dict[str, object]]:
    """The loss after further steps over that before, on both sides of the bound 2/λ_max that theory gives."""
    start = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
        start[name] = value + KICK * float(value.norm() / noise.norm()) * noise
    rows = []
    for factor in BEYOND:
        model.load_state_dict(start, strict=False)
        optimiser = natural(model, setting, structure, damping, factor * 2.0 / known)
        trace = descend(TrackedDescent(model, setting, optimiser), PROBE)
        losses = trace.series("loss")
        change = losses[-1] / losses[0] if np.isfinite(losses[-1]) else DIVERGED
        rows.append(study.observed(f"change_{factor:g}", float(change), **trace.ended))
    return rows


def _frozen_claims(structure: str) -> list[study.Claim]:
    what = f"gradient descent preconditioned by the initial {structure} structure"
    at = {"structure": structure, "mode": FROZEN}
    return [
        claim(f"preconditioned-sharpens-{structure}", page("claims 3 and 13"),
              study.Inequality("trend", "greater", 0.5, centre="mean"),
              f"Below its threshold, {what} raises λ_max((F + ρI)⁻¹H).",
              "Kendall's τ of it with the step, over the measurements before the crossing.",
              study.undecided("A linear change of variables makes it gradient descent, on another network."),
              group="derived", at=at),
        claim(f"preconditioned-edge-{structure}", page("claim 13"), HOVERS,
              f"Having reached it, {what} hovers at λ_max((F + ρI)⁻¹H) = 2/η.",
              HOVERING, settled("A linear change of variables makes it gradient descent."), group="derived", at=at),
        claim(f"preconditioned-above-{structure}", page("claims 4 and 13"),
              study.Inequality("plateau_ratio", "greater", 1.0, centre="geometric mean"),
              f"Having reached its edge, {what} hovers above it.",
              HOVERING, study.undecided("The paper says at it or just above.", explored=12),
              group="exploration", at=at, bound_from="2/η"),
    ]  # fmt: skip


def _live_claims(structure: str) -> list[study.Claim]:
    derived: dict[str, Any] = {"group": "derived", "at": {"structure": structure, "mode": LIVE}}
    source = f"{PAPER} and Karakida & Osawa 2020 (docs/theory/cohen_2021.md, claim 13, derived)"
    number, bound = ("1", "2") if structure == "full" else ("the number L of layers", "2/L")
    below, above = BEYOND
    sides: list[tuple[str, str, float, Literal["less", "greater"]]] = [
        ("below", "converges", below, "less"), ("beyond", "moves away", above, "greater"),
    ]  # fmt: skip
    return [
        claim(f"natural-curvature-{structure}", source, study.Equivalence("final_share", 1.0, 0.05, centre="geometric mean"),
              f"Near interpolation λ_max of the Hessian preconditioned by the {structure} Fisher matrix is {number}.",
              f"λ_max((F + ρI)⁻¹H) over that after {STEPS[LIVE]} steps.",
              study.supported("H tends to F as residuals vanish; L blocks of a full row rank add up to L."), **derived),
        *(
            claim(f"natural-{side}-{structure}", source,
                  study.Inequality(f"change_{factor:g}", direction, 1.0, centre="geometric mean"),
                  f"Near interpolation {structure} natural gradient {verb} at {factor:g} times the bound η = {bound}.",
                  f"Loss after {PROBE} steps over that before, after a random change by {KICK:g} of the parameters "
                  f"at which a run at η = {ETA[LIVE]:g} ends.",
                  study.supported("The mode of the largest eigenvalue is multiplied by 1 − ηλ a step."),
                  bound_from="1 as a ratio", **derived)
            for side, verb, factor, direction in sides
        ),
    ]  # fmt: skip


def _claims(config: Config) -> list[study.Claim]:
    frozen = [one for structure in config.preconditioners for one in _frozen_claims(structure)]
    return frozen + [one for structure in COVERED for one in _live_claims(structure)]


PRECONDITIONED: study.Experiment[Config] = study.Experiment(
    name="preconditioned",
    cells=_points,
    measure=_measure,
    varies=("initialisation", "draws"),
    claims=_claims,
    seconds=2.0,
    memory=memory,
)
