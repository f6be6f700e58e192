"""Training with a structure as preconditioner: its own edge, at 2/η of the preconditioned Hessian (claim 13)."""

from __future__ import annotations

from math import log10

import numpy as np
import torch
from torch import nn

from analyses.assembly import classifies_nodes
from analyses.edge_of_stability.config import Config
from analyses.edge_of_stability.descent import descend
from analyses.edge_of_stability.optimisers import frozen, natural
from analyses.edge_of_stability.part import BAND, PAPER, REACHED, Part, cells_of, must_reach, of
from analyses.edge_of_stability.parts.training import rows_of
from analyses.edge_of_stability.setting import Setting, setting_of
from analyses.edge_of_stability.windows import Edge
from analyses.estimates import by_seed
from analyses.part import Observations, where
from curvlab.fisher import Structure, make
from curvlab.rows import sqrt_fisher
from curvlab.spectrum import StructureOperator, eigenpairs
from curvlab.study import Cell, Claim, Equivalence, Inequality

NAME = "preconditioned"
SAMPLES = 32
"""With ten classes 320 rows, on whose side the full structure is solved."""
FROZEN, LIVE = "frozen", "live"
DAMPING = {FROZEN: 0.1, LIVE: 1e-4}
"""ρ over λ_max of the structure at initialisation."""
ETA = {FROZEN: 0.1, LIVE: 0.4}
STEPS = {FROZEN: 240, LIVE: 40}
EVERY = {FROZEN: 30, LIVE: 20}
KICK = 1e-3
"""Relative change of the parameters, at random, that gives every mode a residual before the bound is probed."""
BEYOND = (0.9, 1.1)
"""Step sizes after a live run, over its bound 2/λ_max."""
PROBE = 15
"""Steps taken at each of these."""
COVERED = ("full", "block-diagonal")
"""Structures for which λ_max(P⁻¹H) near interpolation is known: 1, and the number of layers."""


def _cells(config: Config) -> list[Cell]:
    few = {} if classifies_nodes(config.problem) else {"samples": SAMPLES}
    points = [
        {"structure": structure, "mode": mode, "loss": "half-squared"} | few
        for structure in config.preconditioners
        for mode in (FROZEN, LIVE)
    ]
    return cells_of(NAME, config, points)


def _layers(model: nn.Module) -> int:
    """Number of layers with parameters."""
    return sum(bool(list(module.parameters(recurse=False))) for module in model.modules())


def _measure(cell: Cell, config: Config) -> Observations:
    setting, mode = setting_of(cell, config), str(cell["mode"])
    model, structure = setting.network(), make(str(cell["structure"]))
    structure.update(sqrt_fisher(model, setting.problem.loss, *setting.problem.train))
    damping = DAMPING[mode] * float(eigenpairs(StructureOperator(structure), 1, tolerance=1e-3).values[0])
    eta, live = ETA[mode], mode == LIVE
    optimiser = natural(model, setting, structure, damping, eta) if live else frozen(model, structure, damping, eta)
    measured = range(EVERY[mode] if live else 0, STEPS[mode] + 1, EVERY[mode])

    def observe(step: int, now: nn.Module) -> None:
        if live and step in measured:
            structure.update(sqrt_fisher(now, setting.problem.loss, *setting.problem.train))

    run = descend(model, setting, optimiser, STEPS[mode], measured, top=1, observe=observe)
    edge = Edge(run, optimiser.threshold, eta)
    rows = rows_of(run, edge) if run.points else [{"quantity": REACHED, "value": 0.0}]
    if live and run.diverged is None:
        layers = _layers(model)
        rows.append({"quantity": "final", "value": float(edge.sharpness[-1]), "layers": layers})
        known = {"full": 1, "block-diagonal": layers}.get(structure.key)
        if known is not None:
            rows.append({"quantity": "final_share", "value": float(edge.sharpness[-1]) / known})
            rows += _beyond(model, setting, structure, damping, known)
    return rows


def _beyond(
    model: nn.Module, setting: Setting, structure: Structure, damping: float, known: int
) -> list[dict[str, object]]:
    """Change of the loss by further steps, on both sides of the bound 2/λ_max that theory gives."""
    generator = torch.Generator().manual_seed(0)
    start = {}
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
        start[name] = value + KICK * float(value.norm() / noise.norm()) * noise
    rows: list[dict[str, object]] = []
    for factor in BEYOND:
        model.load_state_dict(start)
        optimiser = natural(model, setting, structure, damping, factor * 2.0 / known)
        run = descend(model, setting, optimiser, PROBE, ())
        change = log10(run.losses[-1] / run.losses[0]) if np.isfinite(run.losses[-1]) else np.inf
        diverged = {"status": f"diverged at step {run.diverged}"} if run.diverged is not None else {}
        rows.append({"quantity": f"change_{factor:g}", "value": change, **diverged})
    return rows


def _claims(config: Config) -> list[Claim]:
    claims = [claim for structure in config.preconditioners for claim in _frozen_claims(structure)]
    return claims + [
        claim for structure in COVERED if structure in config.preconditioners for claim in _live_claims(structure)
    ]


def _frozen_claims(structure: str) -> list[Claim]:
    at = where(NAME, structure=structure, mode=FROZEN)
    what = f"gradient descent preconditioned by the initial {structure} structure"
    return [
        Claim(
            id=f"preconditioned-sharpens-{structure}",
            statement=f"Below its threshold, {what} raises λ_max((F + ρI)⁻¹H).",
            source=f"{PAPER} (theory file, claims 3 and 13)",
            measured="Share of the intervals between measurements before the crossing over which it rises.",
            rule=Inequality(0.5, "greater"),
            estimate=by_seed,
            expected="open",
            reason="A linear change of variables makes it gradient descent, on another network.",
            needs=at,
            quantities=("rising_share",),
        ),
        Claim(
            id=f"preconditioned-edge-{structure}",
            statement=f"Having reached it, {what} hovers at λ_max((F + ρI)⁻¹H) = 2/η.",
            source=f"{PAPER} (theory file, claim 13)",
            measured="λ_max((F + ρI)⁻¹H)·η/2, the mean over measurements from the first crossing to the end.",
            rule=Equivalence(1.0, BAND),
            estimate=of("plateau_ratio"),
            expected="supported",
            reason="A linear change of variables makes it gradient descent.",
            assumptions=must_reach,
            needs=at,
            quantities=("plateau_ratio", REACHED),
        ),
        Claim(
            id=f"preconditioned-above-{structure}",
            statement=f"Having reached its edge, {what} is above it on average.",
            source=f"{PAPER} (theory file, claims 4 and 13)",
            measured="The same mean.",
            rule=Inequality(1.0, "greater"),
            estimate=of("plateau_ratio"),
            expected="open",
            reason="The paper asks it as a separate question.",
            assumptions=must_reach,
            needs=at,
            quantities=("plateau_ratio", REACHED),
        ),
    ]


def _live_claims(structure: str) -> list[Claim]:
    at = where(NAME, structure=structure, mode=LIVE)
    number, bound = ("1", "2") if structure == "full" else ("the number L of layers", "2/L")
    below, above = BEYOND

    def side(word: str, factor: float, rule: Inequality) -> Claim:
        return Claim(
            id=f"natural-{word}-{structure}",
            statement=f"Near interpolation {structure} natural gradient {'converges' if factor < 1 else 'moves away'} at "
            f"{factor:g} times the bound η = {bound}.",
            source=f"{PAPER} and Karakida & Osawa 2020 (theory file, claim 13, derived)",
            measured=f"Log10 of the loss after {PROBE} steps over that before, "
            f"after a random change by {KICK:g} of the parameters at which a run at η = {ETA[LIVE]:g} ends.",
            rule=rule,
            estimate=by_seed,
            expected="supported",
            reason="The mode of the largest eigenvalue is multiplied by 1 − ηλ a step.",
            needs=at,
            quantities=(f"change_{factor:g}",),
        )

    return [
        Claim(
            id=f"natural-curvature-{structure}",
            statement=f"Near interpolation λ_max of the Hessian preconditioned by the {structure} Fisher matrix is {number}.",
            source=f"{PAPER} and Karakida & Osawa 2020 (theory file, claim 13, derived)",
            measured=f"λ_max((F + ρI)⁻¹H) over that after {STEPS[LIVE]} steps.",
            rule=Equivalence(1.0, 0.05),
            estimate=by_seed,
            expected="supported",
            reason="H tends to F as residuals vanish; L blocks of a full row rank add up to L.",
            needs=at,
            quantities=("final_share",),
        ),
        side("below", below, Inequality(0.0, "less")),
        side("beyond", above, Inequality(0.0, "greater")),
    ]


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda _: 4.0)
