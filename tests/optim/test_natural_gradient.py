"""The optimiser against steps written out, against theory on quadratics, and against itself after a restart."""

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from oracle import DOUBLE
from torch import Tensor, nn

from curvlab import sqrt_fisher
from curvlab.errors import StateError, UnsupportedModel
from curvlab.fisher import KFAC, Full
from curvlab.nn import HalfSquaredError
from curvlab.optim import LevenbergMarquardt, NaturalGradient
from curvlab.optim.quadratic import Batch, agreement, best_combination
from curvlab.testing.oracle import assert_close, dense_ggn, dense_jacobian

RHO = 0.05


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def data(N: int = 12, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, 4, dtype=DOUBLE, generator=generator), torch.randint(3, (N,), generator=generator)


def optimiser(model: nn.Module, loss: nn.Module | None = None, **options: Any) -> NaturalGradient:
    defaults: dict[str, Any] = {"lr": 0.3, "structure": "full", "kind": "exact", "damping": RHO}
    return NaturalGradient(model, loss or nn.CrossEntropyLoss(), **defaults | options)


def take(made: NaturalGradient, x: Tensor, y: Tensor) -> None:
    made.zero_grad()
    with made.collect():
        made.preconditioner.loss(made.preconditioner.model(x), y).backward()
    made.step()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


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


def test_the_quadratic_model_has_the_coupled_weight_decay() -> None:
    """With it, loss and model are one quadratic function, whose minimum the steps find."""
    model, x, y = linear()
    loss, options = HalfSquaredError(), {"lr": "quadratic", "structure": "diagonal", "weight_decay": 0.5}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradient = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    slopes = {name: g + 0.5 * before[name] for name, g in zip(before, gradient, strict=True)}
    after = {name: p - 0.1 * slopes[name] for name, p in before.items()}
    batch = Batch(model, loss, ((x,), {}), y, decay=dict.fromkeys(before, 0.5))
    assert agreement(batch, slopes, before, after, 0.0) == pytest.approx(1.0, rel=1e-8)
    made = optimiser(model, loss, **options | {"damping": 0.0})
    for _ in range(40):
        take(made, x, y)
    gradient = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    for g, p in zip(gradient, model.parameters(), strict=True):
        assert_close(g, -0.5 * p.detach(), 1e-8)


@pytest.mark.parametrize("damping", [RHO, LevenbergMarquardt(every=1)])
def test_copies_and_pickles_go_on_alike(damping: Any) -> None:
    made = optimiser(network(), structure="kfac", kind="mc", momentum=0.5, damping=damping)
    take(made, *data(seed=0))
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        original = copy.deepcopy(made)
        for seed in (1, 2):
            take(original, *data(seed=seed))
            take(other, *data(seed=seed))
        assert torch.equal(flat(original.preconditioner.model), flat(other.preconditioner.model))
        assert other.damping == original.damping


def test_copies_of_a_scheduled_optimiser_move_the_model_that_was_copied() -> None:
    model, loss = network(), nn.CrossEntropyLoss()
    made = optimiser(model, loss, structure="kfac")
    scheduler = torch.optim.lr_scheduler.StepLR(made, 2)
    made.register_step_post_hook(lambda *_: None)
    take(made, *data(seed=0))
    scheduler.step()
    before = flat(model)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        twin = other.preconditioner.model
        take(other, *data(seed=1))
        assert torch.equal(flat(model), before)
        assert not torch.equal(flat(twin), before)
        assert not other._optimizer_step_post_hooks
    take(made, *data(seed=1))
    assert torch.equal(flat(model), flat(twin))


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


def test_the_state_of_another_optimiser_is_refused_before_anything_changes() -> None:
    model = network()
    made = optimiser(model, momentum=0.5)
    take(made, *data())
    before = copy.deepcopy(made.state_dict())
    with pytest.raises(ValueError, match=r"has no 'preconditioner' and no 'rho', so it is that of another optimiser"):
        made.load_state_dict(torch.optim.SGD(model.parameters(), lr=7.0).state_dict())
    assert made.param_groups[0]["lr"] == before["param_groups"][0]["lr"]
    assert made.preconditioner.steps == 1
    assert len(made.state) == len(before["state"])


def test_groups_have_rates_of_their_own_and_plain_parameters_move_along_their_gradient() -> None:
    model, (x, y) = network(), data()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.0}]
    made = optimiser(model, param_groups=groups, plain=("0",))
    gradient = torch.autograd.grad(nn.CrossEntropyLoss()(model(x), y), model[0].weight)[0]
    before = copy.deepcopy(model)
    take(made, x, y)
    assert_close(model[0].weight.detach(), (before[0].weight - 0.3 * gradient).detach())
    assert torch.equal(model[2].weight, before[2].weight)


@pytest.mark.parametrize(
    "options",
    [
        {"structure": "full", "momentum": 0.9},
        {"structure": "ekfac", "kind": "mc", "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
        {"structure": "kfac", "damping": LevenbergMarquardt(every=2), "momentum": 0.5},
        {"structure": "kfac", "damping": LevenbergMarquardt(every=2), "lr": "quadratic"},
        {"structure": "diagonal", "kind": "mc", "refresh_every": 3, "kl_clip": 1e-2},
    ],
)
def test_a_saved_state_continues_bit_for_bit(options: dict[str, Any]) -> None:
    model = network()
    made = optimiser(model, **options)
    for step in range(4):
        take(made, *data(seed=step))
    twin = network()
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    other = optimiser(twin, **options)
    other.load_state_dict(copy.deepcopy(made.state_dict()))
    for step in range(4, 9):
        take(made, *data(seed=step))
        take(other, *data(seed=step))
        assert torch.equal(flat(model), flat(twin))
    assert made.damping == other.damping


def test_a_state_survives_a_file(tmp_path: Any) -> None:
    model = network()
    made = optimiser(model, structure=KFAC(factored_damping=True, invert_every=3), momentum=0.5)
    take(made, *data())
    torch.save(made.state_dict(), tmp_path / "state.pt")
    other = optimiser(model, structure=KFAC(factored_damping=True, invert_every=3), momentum=0.5)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.preconditioner.steps == 1


def linear() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(9, 2, bias=False).double()
    return model, torch.randn(6, 9, dtype=DOUBLE), torch.randn(6, 2, dtype=DOUBLE)


def test_one_undamped_step_solves_a_linear_model() -> None:
    model, x, y = linear()
    take(optimiser(model, HalfSquaredError(), lr=1.0, damping=0.0), x, y)
    assert_close(model(x).detach(), y, 1e-9)


def test_the_quadratic_model_of_a_quadratic_loss_is_the_loss() -> None:
    """It then chooses the step of length 1 along the full direction, and promises what happens."""
    model, x, y = linear()
    loss = HalfSquaredError()
    batch = Batch(model, loss, ((x,), {}), y)
    gradient = {"weight": torch.autograd.grad(loss(model(x), y), model.weight)[0]}
    solution = Full().update(sqrt_fisher(model, loss, x, y)).solve(gradient, 0.0)
    newton = {"weight": -solution["weight"]}  # type: ignore[call-overload]
    assert_close(best_combination(batch, gradient, [newton], 0.0), torch.ones(1, dtype=DOUBLE), 1e-9)
    directions = [{"weight": torch.randn(2, 9, dtype=DOUBLE)} for _ in range(3)]
    best = best_combination(batch, gradient, directions, 0.0)
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
    batch = Batch(model, loss, ((x,), {}), y)
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
    curvature = Batch(model, loss, ((x,), {}), y).curvature([direction])
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


class Partial(nn.Module):
    """A layer that gradients do not reach in front of one that they do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unreached, self.last = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.unreached(x).detach())


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
    assert rule.adjusted(1.0, 0.5) == 1.0
    assert rule.adjusted(2.0, 0.8) == 0.5
    assert rule.adjusted(1.0, 0.8) == 0.3
    assert rule.adjusted(1.0, 0.1) == 3.0
    assert rule.adjusted(0.5, float("nan")) == 2.0
    model, x, y = linear()
    made = optimiser(model, HalfSquaredError(), lr=1.0, damping=rule)
    for _ in range(4):
        take(made, x, y)
    assert made.damping == 0.3, "on a quadratic loss the damped model promises less than comes"


def test_the_trust_region_bounds_the_length_of_the_step() -> None:
    model, loss, (x, y) = network(), nn.CrossEntropyLoss(), data()
    direction = dense_direction(model, loss, x, y)
    F = dense_ggn(dense_jacobian(model, x), loss, model(x).detach(), y) + RHO * torch.eye(len(direction), dtype=DOUBLE)
    before = flat(model)
    take(optimiser(model, kl_clip=1e-6), x, y)
    step = flat(model) - before
    assert_close(step @ F @ step, torch.tensor(1e-6, dtype=DOUBLE), 1e-8)
    assert_close(step / step.norm(), -direction / direction.norm(), 1e-8)
    model = network()
    made = optimiser(model, kl_clip=lambda step: 1e6 if step == 0 else 1e-6)
    take(made, x, y)
    assert_close(flat(model), before - 0.3 * direction, 1e-8)
    before = flat(model)
    F = dense_ggn(dense_jacobian(model, x), loss, model(x).detach(), y) + RHO * torch.eye(len(direction), dtype=DOUBLE)
    take(made, x, y)
    step = flat(model) - before
    assert_close(step @ F @ step, torch.tensor(1e-6, dtype=DOUBLE), 1e-8)


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
    optimizer = NaturalGradient(model, loss, structure="kfac", **{"lr": 0.3, "damping": 0.1} | options)
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


def test_the_repr_lists_every_hyper_parameter() -> None:
    text = repr(optimiser(network(), momentum=0.9, weight_decay=0.1, kl_clip=0.01, damping=LevenbergMarquardt()))
    for name in ("lr: 0.3", "momentum: 0.9", "nesterov", "weight_decay: 0.1", "decoupled=False", "kl_clip=0.01"):
        assert name in text
    for name in (
        "LevenbergMarquardt(initial=1.0",
        "structure=Full(",
        "kind='exact'",
        "refresh_every=1",
        "plain=()",
        "graph=False",
    ):
        assert name in text


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
        ({"lr": "quadratic", "momentum": 0.9}, "leave momentum, nesterov and kl_clip"),
    ],
)
def test_what_is_out_of_range_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimiser(network(), **options)


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
        return self.body(x.mul_(2)) + self.shift


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


def test_a_network_that_has_changed_needs_a_new_optimiser() -> None:
    model = network()
    made = optimiser(model)
    model[2] = nn.Linear(6, 3).double()
    with pytest.raises(StateError, match=r"2 were replaced\..* instead of a NaturalGradient, make a new one"):
        take(made, *data())


def test_omega_and_every_are_checked() -> None:
    with pytest.raises(ValueError, match="omega is a number"):
        LevenbergMarquardt(omega=1.5)
    with pytest.raises(ValueError, match="every is a whole number"):
        LevenbergMarquardt(every=0)
    with pytest.raises(ValueError, match="initial is a number"):
        LevenbergMarquardt(initial=1e9)
