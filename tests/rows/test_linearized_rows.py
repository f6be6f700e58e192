"""Rows of a linearised model: the Jacobian of its origin, weighted at its own output."""

from typing import Any

import pytest
import torch
from layer_cases import layer_case
from oracle import ARCHITECTURES, LOSSES, Architecture, LossCase, architecture, freeze, loss_case
from torch import Tensor, nn

from curvlab.nn import Linearized, linearize
from curvlab.rows import jacobian, sqrt_fisher
from curvlab.testing.oracle import assert_close, dense_empirical, dense_ggn, dense_jacobian, outputs

CASES = [pytest.param(a, id=a.name) for a in [*ARCHITECTURES, layer_case("encoder"), layer_case("lstm-all")]]


def moved(model: nn.Module, seed: int = 3) -> Linearized:
    """Linearise a model and step away from its origin."""
    linear = linearize(model)
    source = torch.Generator().manual_seed(seed)
    for parameter in linear.parameters():
        step = torch.randn(parameter.shape, generator=source, dtype=parameter.dtype)
        parameter.data += 0.3 * step * parameter.requires_grad
    return linear


@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_the_origin(case: Architecture) -> None:
    model, inputs = case.make(N=3)
    J = dense_jacobian(model, inputs, case.pick)
    linear = moved(model)
    rows = jacobian(linear, inputs, output=case.output)
    assert list(rows.space.shapes) == [name for name, p in linear.named_parameters() if p.requires_grad]
    if case.output is None or not callable(case.output):
        assert_close(rows.dense(), J)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in LOSSES])
def test_the_loss_is_taken_at_the_linearised_output(case: LossCase, kind: Any) -> None:
    model, x = architecture("residual").make(N=3)
    linear = moved(model)
    z = outputs(linear, x)
    assert float((z - outputs(model, x)).abs().max()) > 0.1
    loss, y = case.make(z, "mean")
    J = dense_jacobian(linear, x)
    reference = dense_ggn(J, loss, z, y) if kind == "exact" else dense_empirical(J, loss, z, y)
    rows = sqrt_fisher(linear, loss, x, y, kind)
    S = rows.dense()
    assert_close(S.T @ S, reference)


def test_engines_and_monte_carlo() -> None:
    model, x = architecture("mlp").make(N=3)
    linear = moved(model)
    loss, y = loss_case("ce").make(outputs(linear, x), "mean")

    def draw(engine: Any) -> Tensor:
        source = torch.Generator().manual_seed(0)
        return sqrt_fisher(linear, loss, x, y, "mc", draws=2, generator=source, engine=engine).dense()

    assert_close(draw("backpack"), draw("autograd"))
    assert_close(jacobian(linear, x, engine="backpack").dense(), dense_jacobian(linear, x))


def test_frozen_after_linearising() -> None:
    model, x = architecture("mlp").make(N=3)
    linear = moved(model)
    full = jacobian(linear, x)
    freeze(linear, "0.bias", "2.weight")
    rows = jacobian(linear, x)
    assert list(rows.space.shapes) == ["0.weight", "2.bias"]
    named = full.space.unflatten(full.dense())
    assert_close(rows.dense(), rows.space.flatten(named))


def test_a_linearised_model_inside_another() -> None:
    inner, x = architecture("mlp").make(N=3)
    model = nn.Sequential(moved(inner), nn.Tanh(), nn.Linear(3, 2)).double()
    assert_close(jacobian(model, x).dense(), dense_jacobian(model, x))
