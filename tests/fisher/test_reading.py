"""What optimisers divide by, read from their states: steps of torch's own optimisers, and dense matrices."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvlab.errors import UnsupportedModel
from curvlab.fisher import OptimizerMatrix, from_optimizer
from curvlab.rows import jacobian

Make = Callable[..., torch.optim.Optimizer]
Effective = Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[Tensor, float]]
"""From state and options of a group: the momentum and the learning rate with which the last step was taken."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)
    ).double()  # fmt: skip


def gradients(model: nn.Module, step: int) -> None:
    torch.manual_seed(step)
    x, y = torch.randn(7, 1, 3, 3).double(), torch.randint(3, (7,))
    model.zero_grad()
    nn.CrossEntropyLoss()(model(x), y).backward()


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    for step in range(steps):
        gradients(model, step)
        optimizer.step()


def adam(state: Mapping[str, Any], group: Mapping[str, Any]) -> tuple[Tensor, float]:
    return state["exp_avg"] / (1 - group["betas"][0] ** float(state["step"])), group["lr"]


def adamax(state: Mapping[str, Any], group: Mapping[str, Any]) -> tuple[Tensor, float]:
    return state["exp_avg"], group["lr"] / (1 - group["betas"][0] ** float(state["step"]))


CASES: dict[str, tuple[Make, dict[str, Any], Effective | None]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}, None),
    "adam": (torch.optim.Adam, {"lr": 0.1, "eps": 1e-3}, adam),
    "adam-amsgrad": (torch.optim.Adam, {"lr": 0.1, "amsgrad": True}, adam),
    "adamw": (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.0}, adam),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.1, "eps": 1e-3}, None),
    "rmsprop-centred": (torch.optim.RMSprop, {"lr": 0.1, "centered": True, "eps": 1e-3}, None),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1}, None),
    "adamax": (torch.optim.Adamax, {"lr": 0.1}, adamax),
}


@pytest.mark.parametrize("name", CASES)
def test_the_last_step_was_the_inverse_of_p_times_the_momentum(name: str) -> None:
    make, options, effective = CASES[name]
    model = network()
    optimizer = make(model.parameters(), **options)
    trained(model, optimizer)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    gradients(model, 9)
    optimizer.step()
    momentum, rate = {}, 0.0
    for n, p in model.named_parameters():
        state, group = optimizer.state[p], optimizer.param_groups[0]
        momentum[n], rate = (p.grad, group["lr"]) if effective is None else effective(state, group)
    found = from_optimizer(optimizer, model)
    step = found.solve(momentum)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach() - before[n], -rate * step[n])  # type: ignore[index]
    back = found.matvec(step)
    for n in momentum:
        torch.testing.assert_close(back[n], momentum[n])  # type: ignore[index]


def test_adafactor_steps_along_p_up_to_the_length_that_it_gives_to_each_parameter() -> None:
    model = network()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.1)
    trained(model, optimizer)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    gradients(model, 9)
    optimizer.step()
    step = from_optimizer(optimizer, model).solve({n: p.grad for n, p in model.named_parameters()})
    for n, p in model.named_parameters():
        ratio = (p.detach() - before[n]) / step[n]  # type: ignore[index]
        torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio))
        assert float(ratio.flatten()[0]) < 0


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon; it came with 2.9")
@pytest.mark.parametrize(("inputs", "outputs"), [(4, 6), (6, 4)])
def test_muon_is_the_polar_factor_that_newton_schulz_comes_near(inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(inputs, outputs, bias=False).double()
    optimizer = torch.optim.Muon(model.parameters(), lr=0.1, weight_decay=0.0, nesterov=False)
    for step in range(4):
        torch.manual_seed(step)
        model.zero_grad()
        model(torch.randn(9, inputs).double()).square().sum().backward()
        before = model.weight.detach().clone()
        optimizer.step()
    momentum = optimizer.state[model.weight]["momentum_buffer"]
    U, _, V = torch.linalg.svd(momentum, full_matrices=False)
    found = from_optimizer(optimizer, model)
    polar = found.solve({"weight": momentum})["weight"]  # type: ignore[index]
    torch.testing.assert_close(polar, U @ V, rtol=1e-6, atol=1e-8)
    taken = model.weight.detach() - before
    cosine = -(taken * polar).sum() / taken.norm() / polar.norm()
    assert float(cosine) > 0.95, "Newton–Schulz leaves singular values between 0.7 and 1.2"


def dense(found: OptimizerMatrix, size: int) -> Tensor:
    inverse = found.solve(torch.eye(size).double())
    assert isinstance(inverse, Tensor)
    return inverse


def test_the_response_is_that_of_the_dense_matrix() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    trained(model, optimizer)
    found = from_optimizer(optimizer, model)
    rows = jacobian(model, torch.randn(5, 1, 3, 3).double())
    J = rows.dense()
    expected = J @ dense(found, rows.P) @ J.T / found.structure.count
    torch.testing.assert_close(found.response(rows), expected)


def test_what_cannot_be_read_is_named() -> None:
    model = network()
    with pytest.raises(UnsupportedModel, match="no exp_avg_sq of '0.weight': take a step with it first"):
        from_optimizer(torch.optim.Adam(model.parameters()), model)
    with pytest.raises(UnsupportedModel, match="does not move 0.bias, 0.weight, 3.bias, 3.weight: freeze them"):
        from_optimizer(torch.optim.Adam(model[5].parameters()), model)
    with pytest.raises(UnsupportedModel, match="not known what LBFGS divides by, only for SGD, Adam"):
        from_optimizer(torch.optim.LBFGS(model.parameters()), model)
    groups = [{"params": model[0].parameters(), "eps": 1e-3}, {"params": model[3:].parameters()}]
    optimizer = torch.optim.Adam(groups)
    trained(model, optimizer, 1)
    with pytest.raises(UnsupportedModel, match="groups differ in eps"):
        from_optimizer(optimizer, model)


def test_the_optimiser_is_left_as_it_was() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    trained(model, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    from_optimizer(optimizer, model).solve(torch.ones(sum(p.numel() for p in model.parameters())).double())
    for key, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before["state"][key][name]) for name, value in state.items())
