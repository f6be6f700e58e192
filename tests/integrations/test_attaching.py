"""A preconditioner that is attached to an optimiser against the same steps taken by hand."""

import copy
from typing import Any

import pytest
import torch
from integration_cases import digits, flat, network
from torch import Tensor, nn

from curvlab.integrations import attach
from curvlab.integrations.attaching import numbers_of
from curvlab.optim import NaturalGradient, Preconditioner

RHO = 0.05


def data(seed: int) -> tuple[Tensor, Tensor]:
    x, y = digits(1).tensors
    return x[seed::4], y[seed::4]


def pair(model: nn.Module) -> tuple[Preconditioner, torch.optim.Optimizer]:
    pre = Preconditioner(model, nn.CrossEntropyLoss(), damping=RHO, seed=2)
    return pre, torch.optim.AdamW(model.parameters(), lr=0.05)


def backward(pre: Preconditioner, seed: int) -> Tensor:
    x, y = data(seed=seed)
    value: Tensor = pre.loss(pre.model(x), y)
    value.backward()
    return value


def by_hand(steps: int) -> Tensor:
    pre, adamw = pair(network())
    for seed in range(steps):
        adamw.zero_grad()
        with pre.collect():
            backward(pre, seed)
        pre.precondition()
        adamw.step()
    return flat(pre.model)


def attached(optimizer: Any, seed: int, how: str) -> None:
    pre = optimizer.preconditioner
    optimizer.zero_grad()
    if how == "closure":
        assert optimizer.step(lambda: backward(pre, seed)) > 0
        return
    with pre.collect():
        backward(pre, seed)
    optimizer.step(*[lambda: None] if how == "idle closure" else [])


@pytest.mark.parametrize("how", ["no closure", "closure", "idle closure"])
def test_steps_are_those_taken_by_hand(how: str) -> None:
    optimizer = attach(*pair(model := network()))
    for seed in range(4):
        attached(optimizer, seed, how)
    assert torch.equal(flat(model), by_hand(4))


def test_a_saved_optimiser_continues_bit_for_bit_with_its_preconditioner(tmp_path: Any) -> None:
    optimizer = attach(*pair(model := network()))
    for seed in range(2):
        attached(optimizer, seed, "no closure")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other = attach(*pair(twin := network()))
    twin.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    for seed in range(2, 4):
        attached(other, seed, "no closure")
    assert torch.equal(flat(twin), by_hand(4))


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_steps_with_unscaled_gradients_and_leaves_out_steps_that_overflow(fused: bool) -> None:
    def train(scale: float, steps: list[int]) -> Tensor:
        torch.manual_seed(0)
        model = network().float()
        pre = Preconditioner(model, nn.CrossEntropyLoss(), damping=RHO, kind="empirical")
        optimizer = attach(pre, torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
        for seed in steps:
            optimizer.zero_grad()
            x, y = data(seed=abs(seed))
            with pre.collect():
                scaler.scale(pre.loss(pre.model(x.float()), y) * (torch.inf if seed < 0 else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
        return flat(model)

    torch.testing.assert_close(train(1024.0, [1, -2, 3]), train(1.0, [1, 3]), rtol=0, atol=1e-5)


def test_a_second_preconditioner_is_refused() -> None:
    pre, adamw = pair(model := network())
    attach(pre, adamw)
    for optimizer in (adamw, NaturalGradient(model, pre.loss, lr=0.1)):
        with pytest.raises(ValueError, match=r"has a preconditioner already"):
            attach(pre, optimizer)


def test_an_optimiser_of_another_model_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"AdamW has no parameter of the Sequential that the preconditioner was made for"
    ):
        attach(pair(network())[0], pair(network())[1])


def test_a_state_without_a_preconditioner_is_refused_before_anything_changes() -> None:
    optimizer = attach(*pair(network()))
    attached(optimizer, 0, "no closure")
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"The state has no 'preconditioner'.*after attach\(\)"):
        optimizer.load_state_dict(pair(network())[1].state_dict())
    assert len(optimizer.state) == len(before["state"])


def test_numbers_of_a_step_are_flat() -> None:
    pre, adamw = pair(network())
    for optimizer in (attach(pre, adamw), NaturalGradient(pre.model, pre.loss, lr=0.1, damping=RHO)):
        attached(optimizer, 0, "no closure")
        numbers = numbers_of(optimizer)
        assert numbers["damping"] == RHO
        assert numbers["skipped"] == 0
    assert numbers_of(torch.optim.SGD(pre.model.parameters(), lr=0.1)) == {}
