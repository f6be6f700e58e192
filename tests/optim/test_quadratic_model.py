"""The quadratic model against dense matrices and theory: step lengths, damping, and the batch that it needs."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from optimiser_cases import RHO, Partial, data, flat, linear, network, optimiser, take
from oracle import DOUBLE
from torch import Tensor, nn

from curvlab import sqrt_fisher
from curvlab.errors import StateError, UnsupportedModel
from curvlab.fisher import Full
from curvlab.nn import HalfSquaredError
from curvlab.optim import LevenbergMarquardt
from curvlab.optim.quadratic import Agreement, BatchLoss, agreement, best_combination
from curvlab.testing.oracle import assert_close, dense_ggn, dense_jacobian


def test_the_quadratic_model_has_the_coupled_weight_decay() -> None:
    """With it, loss and model are one quadratic function, whose minimum the steps find."""
    model, x, y = linear()
    loss, options = HalfSquaredError(), {"lr": "quadratic", "structure": "diagonal", "weight_decay": 0.5}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradient = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    slopes = {name: g + 0.5 * before[name] for name, g in zip(before, gradient, strict=True)}
    after = {name: p - 0.1 * slopes[name] for name, p in before.items()}
    batch = BatchLoss(model, loss, ((x,), {}), y, decay=dict.fromkeys(before, 0.5))
    assert agreement(batch, slopes, before, after, 0.0).ratio == pytest.approx(1.0, rel=1e-8)
    made = optimiser(model, loss, **options | {"damping": 0.0})
    for _ in range(40):
        take(made, x, y)
    gradient = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    for g, p in zip(gradient, model.parameters(), strict=True):
        assert_close(g, -0.5 * p.detach(), 1e-8)


def test_the_quadratic_model_of_a_quadratic_loss_is_the_loss() -> None:
    """It then chooses the step of length 1 along the full direction, and promises what happens."""
    model, x, y = linear()
    loss = HalfSquaredError()
    batch = BatchLoss(model, loss, ((x,), {}), y)
    gradient = {"weight": torch.autograd.grad(loss(model(x), y), model.weight)[0]}
    solution = Full().update(sqrt_fisher(model, loss, x, y)).solve(gradient, 0.0)
    newton = {"weight": -solution["weight"]}  # type: ignore[call-overload]
    coefficients, squared = best_combination(batch, gradient, [newton], 0.0)
    assert_close(coefficients, torch.ones(1, dtype=DOUBLE), 1e-9)
    assert_close(squared, -(gradient["weight"] * newton["weight"]).sum(), 1e-9)
    directions = [{"weight": torch.randn(2, 9, dtype=DOUBLE)} for _ in range(3)]
    best, _ = best_combination(batch, gradient, directions, 0.0)
    here = {"weight": model.weight.detach()}

    def value(c: Tensor) -> Tensor:
        moved = here["weight"] + sum(ck * d["weight"] for ck, d in zip(c, directions, strict=True))
        result: Tensor = loss(x @ moved.T, y)
        return result

    slope = torch.autograd.functional.jacobian(value, best)
    assert float(slope.norm()) < 1e-10


def test_curvature_along_directions_is_that_of_the_dense_matrix() -> None:
    model, loss, (x, y) = network(), nn.CrossEntropyLoss(label_smoothing=0.1), data()
    directions = [{name: torch.randn_like(p) for name, p in model.named_parameters()} for _ in range(3)]
    stacked = torch.stack([torch.cat([d.flatten() for d in direction.values()]) for direction in directions])
    F = dense_ggn(dense_jacobian(model, x), loss, model(x).detach(), y)
    batch = BatchLoss(model, loss, ((x,), {}), y)
    assert_close(batch.curvature(directions), stacked @ F @ stacked.T, 1e-9)
    with torch.no_grad():
        moved = copy.deepcopy(model)
        moved[0].weight.add_(0.3)
    F = dense_ggn(dense_jacobian(moved, x), loss, moved(x).detach(), y)
    at = {name: p.detach() for name, p in moved.named_parameters()}
    assert_close(batch.curvature(directions, at), stacked @ F @ stacked.T, 1e-9)


@pytest.mark.parametrize("training", [False, True])
def test_curvature_of_a_network_whose_attention_would_be_fused(training: bool) -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    model = nn.Sequential(encoder, nn.Flatten(), nn.Linear(20, 3)).double().train(training)
    loss, x, y = nn.CrossEntropyLoss(), torch.randn(6, 5, 4, dtype=DOUBLE), torch.arange(6) % 3
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    F = dense_ggn(dense_jacobian(copy.deepcopy(model).eval(), x), loss, model(x).detach(), y)
    flat_direction = torch.cat([part.flatten() for part in direction.values()])
    curvature = BatchLoss(model, loss, ((x,), {}), y).curvature([direction])
    assert_close(curvature, (flat_direction @ F @ flat_direction).view(1, 1), 1e-9)


def test_the_quadratic_model_counts_parameters_that_no_gradient_reaches() -> None:
    """They stay where the structure has no curvature that couples them with others."""
    model, loss = Partial(), nn.CrossEntropyLoss()
    made = optimiser(
        model, loss, lr="quadratic", structure="diagonal", damping=LevenbergMarquardt(initial=RHO, every=1)
    )
    before = model.unreached.weight.detach().clone()
    first = loss(model(data()[0]), data()[1]).item()
    for _ in range(3):
        take(made, *data())
    assert torch.equal(model.unreached.weight, before)
    assert loss(model(data()[0]), data()[1]).item() < first
    assert made.damping < RHO


def test_the_quadratic_step_is_conjugate_gradient_on_a_quadratic_loss() -> None:
    """The best of the direction and the last step is preconditioned CG, which ends after as many steps as eigenvalues."""
    model, x, y = linear()
    made = optimiser(model, HalfSquaredError(), lr="quadratic", structure="diagonal", damping=0.0)
    residuals = []
    for _ in range(6):
        take(made, x, y)
        residuals.append(float((model(x) - y).detach().norm()))
    assert residuals[-1] < 1e-6 < 1e-2 < residuals[-2]


def test_the_quadratic_step_takes_no_last_step_for_zero() -> None:
    """A plain parameter gets its first gradient when others have moved already."""
    model, (x, y) = network(), data()
    made = optimiser(model, lr="quadratic", plain=("0.bias",))
    take(made, x, y)
    twin = copy.deepcopy(made)
    for late in (made, twin):
        bias = late.preconditioner.model[0].bias
        late.state[bias].clear()
    twin.state[twin.preconditioner.model[0].bias]["last_step"] = torch.zeros(6, dtype=DOUBLE)
    for late in (made, twin):
        take(late, x, y)
    assert torch.equal(flat(model), flat(twin.preconditioner.model))


def test_damping_follows_the_quality_of_the_quadratic_model() -> None:
    rule = LevenbergMarquardt(initial=1.0, omega=0.5, every=2, low=0.3, high=3.0)
    found = [
        rule.adjusted(rho, Agreement(ratio, 1.0, 0.0))
        for rho, ratio in ((1.0, 0.5), (2.0, 0.8), (1.0, 0.8), (1.0, 0.1))
    ]
    assert found == [1.0, 0.5, 0.3, 3.0]
    assert rule.adjusted(0.5, Agreement(1.0, -1.0, 0.0)) == 2.0, "no decrease was promised"
    assert rule.adjusted(0.5, Agreement(-1e-9, 1e-9, 1e-8)) == 0.5, "the promise is lost in round-off"
    model, x, y = linear()
    made = optimiser(model, HalfSquaredError(), lr=1.0, damping=rule)
    for _ in range(4):
        take(made, x, y)
    assert made.damping == 0.3, "on a quadratic loss the damped model promises less than comes"


def test_the_quadratic_model_needs_the_batch() -> None:
    model, loss, (x, y) = network(), nn.CrossEntropyLoss(), data()
    made = optimiser(model, lr="quadratic", refresh_every=2)
    take(made, x, y)
    made.zero_grad()
    loss(model(x), y).backward()
    with pytest.raises(StateError, match=r"needs the batch of the step.*collect\(\)"):
        made.step()


@pytest.mark.parametrize("change", [lambda z: z[..., 0].flip(1), lambda z: z[..., 0] / 10])
@pytest.mark.parametrize("options", [{"lr": "quadratic"}, {"damping": LevenbergMarquardt(every=1)}])
def test_the_quadratic_model_takes_the_loss_of_what_the_model_returns(
    options: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> None:
    model, (x, y) = nn.Sequential(network(), nn.Unflatten(1, (3, 1))), data()
    made = optimiser(model, structure="kfac", kind="mc", **options)
    with made.collect():
        made.preconditioner.loss(change(model(x)), y).backward()
    with pytest.raises(UnsupportedModel, match="something else than what the model returned"):
        made.step()


class InPlace(nn.Module):
    """Doubles its inputs where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.shift = network(), nn.Parameter(torch.zeros(3, dtype=DOUBLE))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.mul_(2)) / (1 + self.shift)


@pytest.mark.parametrize("options", [{}, {"plain": ("shift",), "lr": "quadratic"}], ids=["bare parameter", "quadratic"])
def test_a_model_that_changes_its_inputs_is_refused_where_its_pass_is_repeated(options: dict[str, Any]) -> None:
    x, y = data()
    take(optimiser(InPlace(), plain=("shift",)), x, y)
    with pytest.raises(UnsupportedModel, match="inputs were changed in place"):
        take(optimiser(InPlace(), **options), x, y)


@pytest.mark.parametrize("quadratic", [False, True])
def test_memory_of_a_batch_may_be_taken_unless_its_pass_is_repeated(*, quadratic: bool) -> None:
    (x, y), (others, _) = data(), data(seed=2)
    made = optimiser(network(), lr="quadratic" if quadratic else 0.1)
    made.zero_grad()
    with made.collect():
        made.preconditioner.loss(made.preconditioner.model(x), y).backward()
    x.copy_(others)
    with pytest.raises(UnsupportedModel, match="before the next batch") if quadratic else nullcontext():
        made.step()


def test_omega_and_every_are_checked() -> None:
    with pytest.raises(ValueError, match="omega is a number"):
        LevenbergMarquardt(omega=1.5)
    with pytest.raises(ValueError, match="every is a whole number"):
        LevenbergMarquardt(every=0)
    with pytest.raises(ValueError, match="initial is a number"):
        LevenbergMarquardt(initial=1e9)
