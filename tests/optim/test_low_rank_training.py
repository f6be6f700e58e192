"""Training on real digits with low rank blocks and adaptive inverses, by the same preconditioner as with all structures."""

from typing import Any

import pytest
import torch

from curvlab.fisher import AdaptiveInverse, Sketched, Structure
from curvlab.optim import Preconditioner
from curvlab.problems import resolve

SENG = {"sketch": 16, "threshold": 300}
PARTS = ("1.weight", ("1.bias", "3.weight", "3.bias", "5.weight", "5.bias"))


@pytest.mark.parametrize(
    ("structure", "options"),
    [
        pytest.param(Sketched(), {"kind": "empirical", "damping": 0.5}, id="low rank"),
        pytest.param(Sketched(**SENG), {"kind": "empirical", "damping": 0.5}, id="sketched"),
        pytest.param(Sketched(**SENG, scaling="published"), {"kind": "empirical", "damping": 0.5, "refresh_every": 10}, id="stale"),
        pytest.param(AdaptiveInverse(), {"kind": "exact", "damping": 0.5}, id="adaptive"),
        pytest.param(
            AdaptiveInverse(recursion="first-order", rate=0.02, partition=PARTS),
            {"kind": "mc", "damping": 0.1},
            id="first order, in parts",
        ),
    ],
)  # fmt: skip
def test_digits_are_learned_faster_than_by_gradient_descent_at_the_same_rate(
    structure: Structure, options: dict[str, Any]
) -> None:
    losses = []
    for preconditioned in (False, True):
        problem = resolve("digits-mlp", width=6, seed=3).to(dtype=torch.float32)
        model, loss, (x, y) = problem.model, problem.loss, problem.train
        pre = Preconditioner(model, loss, structure, kl_clip=None, **options)
        sgd = torch.optim.SGD(model.parameters(), lr=0.5)
        for step in range(40):
            batch = torch.arange(64) + 64 * (step % 15)
            sgd.zero_grad()
            if preconditioned:
                with pre.collect():
                    loss(model(x[batch]), y[batch]).backward()
                pre.precondition()
            else:
                loss(model(x[batch]), y[batch]).backward()
            sgd.step()
        with torch.no_grad():
            losses.append(float(loss(model(x), y)))
    assert losses[1] < 0.8 * losses[0]
