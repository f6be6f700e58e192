"""A network trained on real data with a cross-entropy: the redundant rows of a softmax, and what training does to the rank."""

import torch
from torch import nn

import curvlab
from analyses.claims import claim
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.points import experiment, page
from analyses.jacobian_rank.setting import Setting
from curvlab import study
from curvlab.rows import Rows
from curvlab.spectrum import Rank, rank

OUTPUTS, WIDTH, SAMPLES = 3, 128, 40
STEPS, LEARNING_RATE = 100, 0.01
DAMPING = "rel:1e-6"
POINT = {"problem": "digits", "loss": "cross-entropy", "outputs": OUTPUTS, "width": WIDTH, "samples": SAMPLES}
SOURCE = page("condition 1", "claim 1, for a cross-entropy")


def _train(model: nn.Module, loss: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for _ in range(STEPS):
        optimiser.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimiser.step()
    optimiser.zero_grad()
    return float(loss(model(x), y).detach())


def _described(rows: Rows, found: Rank, name: str) -> list[dict[str, object]]:
    missing = rows.R - found.structural_zeros - found.rank
    return [
        study.observed(f"missing_{name}", missing, tolerance=0.0),
        study.observed(f"undecided_{name}", found.undecided),
        study.observed(f"condition_{name}", found.condition),
        study.observed(f"effective_{name}", found.effective_dimension(DAMPING)),
    ]


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    setting = Setting.of(cell, context.config)
    model, loss, (x, y) = setting.network(), setting.problem.loss, setting.problem.train
    rows = []
    conditions = []
    for when in ("initial", "trained"):
        if when == "trained":
            rows.append(study.observed("loss", _train(model, loss, x, y)))
        S = curvlab.sqrt_fisher(model, loss, x, y)
        of_fisher, of_jacobian = rank(S), rank(S.jacobian())
        redundant = of_fisher.structural_zeros / len(x) - 1
        described = _described(S, of_fisher, "fisher") + _described(S, of_jacobian, "jacobian")
        described.append(study.observed("redundant", redundant, tolerance=0.0))
        rows += [{**row, "when": when} for row in described]
        conditions.append(of_fisher.condition)
    rows.append(study.observed("worsened", conditions[1] / conditions[0]))
    return rows


CLAIMS = [
    claim("trained-redundant", SOURCE, study.Identity(("missing_fisher", "redundant")),
          "Under a softmax the rows of the Fisher matrix have one redundant direction a sample and no other, before training.",
          "Rows missing in the numerical rank beyond one a sample.",
          study.supported("A common shift of the logits changes nothing, and J has full row rank."),
          group="derived", estimate=study.among(study.identities, when="initial")),
    claim("trained-jacobian", SOURCE, study.Always("missing_jacobian", "less", 0.0),
          f"The Jacobian of a network with {OUTPUTS} outputs a sample has full row rank nC, before and after training with a "
          "cross-entropy.",
          "Rows missing in the numerical rank of J.", study.supported("P is far above the number of rows."), group="derived"),
    claim("trained-condition", SOURCE, study.Inequality("worsened", "greater", 1.0, centre="geometric mean"),
          "Training with a cross-entropy worsens the condition of the Fisher matrix' rows.",
          "Condition number of S after training over that before.",
          study.supported("Fitted samples lose their weight p(1 − p).", explored=12),
          group="derived", bound_from="1: no worse"),
]  # fmt: skip

TRAINED = experiment(lambda _: [POINT], name="trained", measure=_measure, claims=CLAIMS, seconds=0.3)
