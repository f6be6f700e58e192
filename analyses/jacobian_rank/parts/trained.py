"""A network trained on real data with a cross-entropy: the redundant rows of a softmax, and what training does to the rank."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

import curvlab
from analyses.estimates import by_seed, identities
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.part import PAPER, Part, cells_of
from analyses.jacobian_rank.setting import setting_of
from analyses.part import Observations, where
from curvlab.rows import Rows
from curvlab.spectrum import Rank, rank
from curvlab.study import Cell, Claim, Identity, Inequality

NAME = "trained"
OUTPUTS, WIDTH, SAMPLES = 3, 128, 40
STEPS, LEARNING_RATE = 100, 0.01
DAMPING = "rel:1e-6"


def _cells(config: Config) -> list[Cell]:
    at = {"problem": "digits", "loss": "cross-entropy", "outputs": OUTPUTS, "width": WIDTH, "samples": SAMPLES}
    return cells_of(NAME, config, [at])


def _train(model: nn.Module, loss: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for _ in range(STEPS):
        optimiser.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimiser.step()
    optimiser.zero_grad()
    return float(loss(model(x), y).detach())


def _described(rows: Rows, found: Rank, name: str, when: str) -> list[dict[str, object]]:
    return [
        {
            "quantity": f"missing_{name}",
            "value": rows.R - found.structural_zeros - found.rank,
            "tolerance": 0.0,
            "when": when,
        },
        {"quantity": f"undecided_{name}", "value": found.undecided, "when": when},
        {"quantity": f"condition_{name}", "value": found.condition, "when": when},
        {"quantity": f"effective_{name}", "value": found.effective_dimension(DAMPING), "when": when},
    ]


def _measure(cell: Cell, config: Config) -> Observations:
    problem = setting_of(cell, config).problem
    x, y = problem.train
    model = copy.deepcopy(problem.model)
    rows: list[dict[str, object]] = []
    conditions = []
    for when in ("initial", "trained"):
        S = curvlab.sqrt_fisher(model, problem.loss, x, y)
        of_fisher, of_jacobian = rank(S), rank(S.jacobian())
        rows += _described(S, of_fisher, "fisher", when) + _described(S, of_jacobian, "jacobian", when)
        rows.append(
            {"quantity": "redundant", "value": of_fisher.structural_zeros / len(x) - 1, "tolerance": 0.0, "when": when}
        )
        conditions.append(of_fisher.condition)
        if when == "initial":
            rows.append({"quantity": "loss", "value": _train(model, problem.loss, x, y)})
    rows.append({"quantity": "decades", "value": float(np.log10(conditions[1] / conditions[0]))})
    return rows


def _claims(config: Config) -> list[Claim]:  # noqa: ARG001
    source = f"{PAPER}, condition 1, for a cross-entropy (derived)"
    return [
        Claim(
            id="trained-redundant",
            statement="Under a softmax the rows of the Fisher matrix have one redundant direction a sample and no other, before "
            "training.",
            source=source,
            measured="Rows missing in the numerical rank beyond one a sample.",
            rule=Identity(),
            estimate=lambda table: identities(table[table["when"] == "initial"]),
            expected="supported",
            reason="A common shift of the logits changes nothing, and J has full row rank.",
            needs=where(NAME),
            quantities=("missing_fisher", "redundant"),
        ),
        Claim(
            id="trained-jacobian",
            statement="The Jacobian of a network trained on real data with a cross-entropy still has full row rank.",
            source=source,
            measured="Rows missing in the numerical rank of J after training.",
            rule=Identity(),
            estimate=lambda table: identities(table[table["when"] == "trained"]),
            expected="supported",
            reason="P is far above the number of rows.",
            needs=where(NAME),
            quantities=("missing_jacobian",),
        ),
        Claim(
            id="trained-condition",
            statement="Training with a cross-entropy worsens the condition of the Fisher matrix' rows by more than a decade.",
            source=source,
            measured="log10 of the condition number of S after training over that before.",
            rule=Inequality(1.0, "greater"),
            estimate=by_seed,
            expected="refuted",
            reason="Fitted samples lose their weight p(1 − p), but an earlier run found 0.8 decades.",
            needs=where(NAME),
            quantities=("decades",),
        ),
    ]


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda _: 0.3)
