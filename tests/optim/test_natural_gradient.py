"""The optimiser against steps written out."""

import copy
from typing import Any

import pytest
import torch
from optimiser_cases import RHO, Partial, data, flat, linear, network, optimiser, take
from oracle import DOUBLE
from torch import Tensor, nn

from curvlab.errors import StateError
from curvlab.nn import HalfSquaredError
from curvlab.optim import LevenbergMarquardt, NaturalGradient
from curvlab.testing.oracle import assert_close, dense_ggn, dense_jacobian


def dense_direction(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor, decay: float = 0.0) -> Tensor:
    z = model(x)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(z, y), list(model.parameters()))])
    F = dense_ggn(dense_jacobian(model, x), loss, z.detach(), y)
    return torch.linalg.solve(F + RHO * torch.eye(len(F), dtype=DOUBLE), gradient + decay * flat(model))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_steps_written_out(momentum: float, decoupled: bool, nesterov: bool) -> None:
    model, loss, (x, y) = network(), nn.CrossEntropyLoss(), data()
    made = optimiser(model, momentum=momentum, nesterov=nesterov, weight_decay=0.1, decoupled=decoupled)
    velocity = torch.zeros_like(flat(model))
    for _ in range(4):
        theta, direction = flat(model), dense_direction(model, loss, x, y, 0.0 if decoupled else 0.1)
        velocity = momentum * velocity + direction
        move = direction + momentum * velocity if nesterov else velocity
        take(made, x, y)
        assert_close(flat(model), theta * (1 - 0.3 * 0.1 * decoupled) - 0.3 * move, 1e-8)


def test_a_closure_runs_once_and_its_loss_comes_back() -> None:
    model, (x, y) = network(), data()
    twin = copy.deepcopy(model)
    made, other = optimiser(model), optimiser(twin)
    calls = []

    def closure() -> Tensor:
        made.zero_grad()
        value: Tensor = made.preconditioner.loss(model(x), y)
        value.backward()
        calls.append(value)
        return value

    for _ in range(3):
        with torch.no_grad():
            assert made.step(closure) is calls[-1]
        take(other, x, y)
        assert torch.equal(flat(model), flat(twin)), "a closure that clears gradients leaves the same routes open"
    assert len(calls) == 3


def test_schedules_of_torch_and_functions_of_the_step() -> None:
    (x, y), by_function, by_scheduler = data(), network(), network()
    first = optimiser(by_function, lr=lambda t: 0.3 * 0.5**t, momentum=0.5)
    second = optimiser(by_scheduler, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(second, 0.5)
    for _ in range(4):
        take(first, x, y)
        take(second, x, y)
        scheduler.step()
    assert_close(flat(by_function), flat(by_scheduler))


def test_what_a_group_sets_itself_functions_of_the_step_leave() -> None:
    model, (x, y) = network(), data()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    made = optimiser(model, lr=lambda _: 0.3, structure="block-diagonal", param_groups=groups)
    first, last = model[0].weight.detach().clone(), model[2].weight.detach().clone()
    take(made, x, y)
    assert torch.equal(model[0].weight, first)
    assert not torch.equal(model[2].weight, last)
    with pytest.raises(ValueError, match="leave lr and momentum out of param_groups"):
        optimiser(network(), lr="quadratic", param_groups=[{"params": network().parameters(), "lr": 0.0}])


@pytest.mark.parametrize("options", [{}, {"kl_clip": 1e-3}])
def test_groups_without_gradients_stay_where_they_are(options: dict[str, Any]) -> None:
    """Decoupled weight decay spares frozen parameters and those that no gradient reaches, as in torch."""
    model = Partial()
    frozen = nn.Linear(3, 3).double().requires_grad_(False)
    whole = nn.Sequential(model, frozen)
    groups = [{"params": model.unreached.parameters()}, {"params": [*model.last.parameters(), *frozen.parameters()]}]
    made = optimiser(
        whole,
        structure="kfac",
        plain=("0.unreached",),
        weight_decay=0.1,
        decoupled=True,
        param_groups=groups,
        **options,
    )
    before = {name: p.detach().clone() for name, p in whole.named_parameters()}
    take(made, *data())
    moved = {name for name, p in whole.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"0.last.weight", "0.last.bias"}


@pytest.mark.parametrize("late", [False, True])
def test_groups_of_other_parameters_are_refused(*, late: bool) -> None:
    model, other = network(), nn.Linear(3, 2).double()
    own = {"params": model[0].parameters()}
    message = r"group 1 holds 2 tensors that are not parameters of the Sequential .* shape \(2, 3\), \(2,\)"
    if late:
        made = optimiser(model, param_groups=[own])
        for params in (other.parameters(), other.named_parameters()):
            with pytest.raises(ValueError, match=message):
                made.add_param_group({"params": params})
        made.add_param_group({"params": model[2].parameters(), "lr": 0.0})
        before = copy.deepcopy(model)
        take(made, *data())
        assert torch.equal(model[2].weight, before[2].weight)
        assert not torch.equal(model[0].weight, before[0].weight)
    else:
        with pytest.raises(ValueError, match=message):
            optimiser(model, param_groups=[own, {"params": other.parameters()}])


def test_groups_have_rates_of_their_own_and_plain_parameters_move_along_their_gradient() -> None:
    model, (x, y) = network(), data()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.0}]
    made = optimiser(model, param_groups=groups, plain=("0",))
    gradient = torch.autograd.grad(nn.CrossEntropyLoss()(model(x), y), model[0].weight)[0]
    before = copy.deepcopy(model)
    take(made, x, y)
    assert_close(model[0].weight.detach(), (before[0].weight - 0.3 * gradient).detach())
    assert torch.equal(model[2].weight, before[2].weight)


def test_one_undamped_step_solves_a_linear_model() -> None:
    model, x, y = linear()
    take(optimiser(model, HalfSquaredError(), lr=1.0, damping=0.0), x, y)
    assert_close(model(x).detach(), y, 1e-9)


def test_the_trust_region_bounds_the_length_of_the_step() -> None:
    model, loss, (x, y) = network(), nn.CrossEntropyLoss(), data()
    direction = dense_direction(model, loss, x, y)
    F = dense_ggn(dense_jacobian(model, x), loss, model(x).detach(), y) + RHO * torch.eye(len(direction), dtype=DOUBLE)
    before, value = flat(model), loss(model(x), y).detach()
    take(optimiser(model, kl_clip=1e-6), x, y)
    step = flat(model) - before
    assert_close(step @ F @ step, 1e-6 * value.clamp_max(1), 1e-8)
    assert_close(step / step.norm(), -direction / direction.norm(), 1e-8)
    model = network()
    made = optimiser(model, kl_clip=lambda step: 1e6 if step == 0 else 1e-6)
    take(made, x, y)
    assert_close(flat(model), before - 0.3 * direction, 1e-8)
    before, value = flat(model), loss(model(x), y).detach()
    F = dense_ggn(dense_jacobian(model, x), loss, model(x).detach(), y) + RHO * torch.eye(len(direction), dtype=DOUBLE)
    take(made, x, y)
    step = flat(model) - before
    assert_close(step @ F @ step, 1e-6 * value.clamp_max(1), 1e-8)


def test_steps_that_are_not_finite_leave_the_parameters() -> None:
    model, (x, y) = network(), data()
    made = optimiser(model, momentum=0.9, weight_decay=0.1)
    before = flat(model)
    take(made, x, y)
    moved = flat(model)
    assert not torch.equal(before, moved)
    made.zero_grad()
    with made.collect():
        (made.preconditioner.loss(model(x), y) * torch.nan).backward()
    made.step()
    assert torch.equal(flat(model), moved)
    assert made.preconditioner.skipped == 1


def take_scaled(made: NaturalGradient, scaler: torch.amp.GradScaler, x: Tensor, y: Tensor, *, unscaled: bool) -> None:
    made.zero_grad()
    with made.collect():
        scaler.scale(made.preconditioner.loss(made.preconditioner.model(x), y)).backward()
    if unscaled:
        scaler.unscale_(made)
    scaler.step(made)
    scaler.update()


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("structure", ["kfac", "full"])
def test_a_scaled_loss_takes_the_same_steps(structure: str, unscaled: bool) -> None:
    options: dict[str, Any] = {"structure": structure, "kind": "empirical", "momentum": 0.5, "weight_decay": 0.1}
    plain, scaled = (optimiser(network(), plain=("2.bias",), **options) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for seed in range(3):
        take(plain, *data(seed=seed))
        take_scaled(scaled, scaler, *data(seed=seed), unscaled=unscaled)
    assert_close(flat(scaled.preconditioner.model), flat(plain.preconditioner.model), 1e-10)


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_step_that_overflows_under_a_scaler_leaves_no_rows_behind(unscaled: bool) -> None:
    """The gradient of a plain parameter overflows, which the preconditioner does not look at."""
    made, expected = (optimiser(network(), structure="kfac", plain=("2.bias",)) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model, before = made.preconditioner.model, flat(made.preconditioner.model)
    bias = dict(model.named_parameters())["2.bias"]
    handle = bias.register_hook(lambda gradient: gradient / 0)
    take_scaled(made, scaler, *data(), unscaled=unscaled)
    handle.remove()
    assert torch.equal(flat(model), before)
    assert (made.preconditioner.skipped, made.preconditioner.steps) == (1, 1)
    assert scaler.get_scale() == 512.0
    take_scaled(made, scaler, *data(seed=2), unscaled=unscaled)
    take(expected, *data(seed=2))
    assert_close(flat(model), flat(expected.preconditioner.model), 1e-10)


@pytest.mark.parametrize(
    "options", [{"momentum": 0.9, "kl_clip": 1e-2}, {"lr": "quadratic", "damping": LevenbergMarquardt(1.0)}], ids=str
)
def test_parameters_in_half_precision_train(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).bfloat16()
    loss, x = nn.CrossEntropyLoss(), torch.randn(30, 4).bfloat16()
    y = x[:, :3].argmax(1)
    optimizer = NaturalGradient(model, loss, structure="kfac", **{"lr": 0.3, "damping": 0.1, "kl_clip": None} | options)
    values = []
    for _ in range(25):
        optimizer.zero_grad()
        with optimizer.collect():
            value = loss(model(x), y)
            value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    assert values[-1] < 0.6 * values[0]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_repr_names_the_method_and_every_hyper_parameter_that_is_not_the_usual_one() -> None:
    text = repr(optimiser(network(), momentum=0.9, weight_decay=0.1, kl_clip=0.02, refresh_every=5))
    for name in ("lr=0.3", "momentum=0.9", "weight_decay=0.1", "kl_clip=0.02", "structure=Full(", "kind='exact'"):
        assert name in text
    for name in ("damping=", "decay=", "refresh_every=5", "0 steps, 0 skipped"):
        assert name in text
    assert "nesterov" not in text
    assert "LevenbergMarquardt(initial=1" in repr(optimiser(network(), damping=LevenbergMarquardt(1.0)))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is a number"),
        ({"lr": "quadratc"}, 'lr is a number, a function of the step or "quadratic"'),
        ({"momentum": -0.1}, "momentum is a number"),
        ({"weight_decay": float("inf")}, "weight_decay is a number"),
        ({"kl_clip": 0.0}, r"kl_clip is a number in \(0"),
        ({"damping": -1.0}, "damping is a number"),
        ({"lr": "quadratic", "momentum": 0.9}, "leave momentum and nesterov"),
    ],
)
def test_what_is_out_of_range_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimiser(network(), **options)


def test_a_network_that_has_changed_needs_a_new_optimiser() -> None:
    model = network()
    made = optimiser(model)
    model[2] = nn.Linear(6, 3).double()
    with pytest.raises(StateError, match=r"2 were replaced\..* instead of a NaturalGradient, make a new one"):
        take(made, *data())
