"""Steps whose rows or gradients are not finite."""

import pytest
import torch
from preconditioner_cases import RHO, data, network, run
from torch import nn

from curvlab.optim import NaturalGradient, Preconditioner
from curvlab.optim.gradients import masked
from curvlab.rows.loss import Kind


@pytest.mark.parametrize("kind", ["mc", "exact", "empirical"])
def test_a_step_that_is_not_finite_is_skipped_for_plain_parameters_too(kind: Kind) -> None:
    pre = Preconditioner(network(), nn.CrossEntropyLoss(), kind=kind, damping=RHO, plain=("4",), kl_clip=None)
    x, y = data()
    run(pre, x * torch.nan, y)
    pre.precondition()
    assert pre.skipped == 1
    assert all(parameter.grad is None for parameter in pre.model.parameters())
    run(pre, x, y)
    pre.model.get_parameter("4.bias").grad.fill_(torch.inf)  # type: ignore[union-attr]
    pre.precondition()
    assert pre.skipped == 2
    assert all(parameter.grad is None for parameter in pre.model.parameters())


def test_a_skipped_step_has_had_its_turn_once_there_is_curvature() -> None:
    pre = Preconditioner(network(), nn.CrossEntropyLoss(), damping=RHO, refresh_every=2, kl_clip=None)
    due = []
    for step in range(7):
        due.append(pre.due)
        x, y = data(seed=step)
        run(pre, x * torch.nan if step in (0, 3) else x, y)
        pre.precondition()
    assert due == [True, True, False, True, False, True, False]
    assert pre.skipped == 2


def test_steps_that_are_not_finite_are_skipped_and_counted() -> None:
    model, loss, (x, y) = network(), nn.CrossEntropyLoss(), data()
    pre = Preconditioner(model, loss, "kfac", damping=RHO, patience=2, kl_clip=None)
    run(pre, x, y)
    pre.precondition()
    before = pre.structure.to_dense()
    for _ in range(2):
        run(pre, x, y)
        for p in pre.parameters.values():
            assert p.grad is not None
            p.grad.fill_(torch.nan)
        pre.precondition()
        assert all(p.grad is None for p in pre.parameters.values())
    assert torch.equal(pre.structure.to_dense(), before)
    assert pre.skipped == 2
    run(pre, x, y)
    pre.precondition()
    assert "2 skipped" in repr(pre)
    with pytest.raises(FloatingPointError, match="3 steps in a row"):  # noqa: PT012
        for _ in range(3):
            run(pre, x, y)
            model[0].weight.grad[0, 0] = torch.inf
            pre.precondition()


def test_an_inverse_beyond_what_numbers_hold_leaves_parameters_as_they_are() -> None:
    """Without inputs F is 0, and the inverse of the damping alone overflows in single precision."""
    model = nn.Linear(3, 2, bias=False)
    weight = model.weight.detach().clone()
    loss = nn.CrossEntropyLoss()
    natural = NaturalGradient(model, loss, structure="diagonal", damping=1e-44, patience=1)

    def step() -> None:
        with natural.collect():
            loss(model(torch.zeros(4, 3)), torch.zeros(4, dtype=torch.long)).backward()
        model.weight.grad = torch.ones(2, 3)
        natural.step()

    step()
    assert natural.log()["skipped"] == 1
    assert torch.equal(model.weight, weight)
    with pytest.raises(FloatingPointError, match=r"leaves the range of torch.float32 at ρ = 1e-44. Raise the damping"):
        step()


def test_where_a_device_is_not_waited_for_the_direction_becomes_zero() -> None:
    direction = {"a": torch.ones(2), "b": torch.ones(3)}
    good, bad = {"a": torch.ones(2), "b": torch.ones(3)}, {"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan, 1.0])}
    assert all(torch.equal(masked(direction, good)[name], direction[name]) for name in direction)
    assert not any(bool(value.any()) for value in masked(direction, bad).values())
    assert not any(bool(value.any()) for value in masked(bad, good).values())


def test_steps_without_new_curvature_are_skipped_alike() -> None:
    pre = Preconditioner(network(), nn.CrossEntropyLoss(), "kfac", damping=RHO, refresh_every=5, kl_clip=None)
    run(pre, *data())
    pre.precondition()
    run(pre, *data())
    next(iter(pre.parameters.values())).grad.fill_(torch.nan)  # type: ignore[union-attr]
    pre.precondition()
    assert pre.skipped == 1
    assert pre.steps == 2
