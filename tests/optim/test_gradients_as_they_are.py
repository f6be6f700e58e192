"""Gradients that something else has changed are preconditioned as they are, and what comes out is the user's."""

import copy
from collections.abc import Callable

import pytest
import torch
from preconditioner_cases import RHO, data, network, now, options, reference, run
from torch import Tensor, nn

from curvlab import sqrt_fisher
from curvlab.fisher import KFAC, STRUCTURES, Full, Structure, make
from curvlab.optim import Preconditioner
from curvlab.rows.loss import Kind
from curvlab.testing.oracle import assert_close


@pytest.mark.parametrize("key", ["kfac", "full", "diagonal"])
def test_a_gradient_that_was_touched_is_preconditioned_as_it_is(key: str) -> None:
    x, y = data()
    pre = Preconditioner(network(), nn.CrossEntropyLoss(), key, kind="exact", damping=RHO, kl_clip=None)
    gradient = run(pre, x, y)
    total = nn.utils.clip_grad_norm_(pre.model.parameters(), 1e-3)
    pre.precondition()
    clipped = {name: g * 1e-3 / (total + 1e-6) for name, g in gradient.items()}
    assert_close(now(pre), reference(pre.structure, clipped), 1e-8)


def scale_behind_the_back(pre: Preconditioner) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    scaler.unscale_(torch.optim.SGD(pre.model.parameters(), lr=1.0))


def edit_data(pre: Preconditioner) -> None:
    for parameter in pre.model.parameters():
        assert parameter.grad is not None
        parameter.grad.data.clamp_(-1e-2, 1e-2)


@pytest.mark.parametrize("change", [scale_behind_the_back, edit_data])
@pytest.mark.parametrize("kind", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("structure", [KFAC(factored_damping=True), Full(side="rows")], ids=["kfac", "full"])
def test_a_gradient_changed_without_a_trace_is_preconditioned_as_it_is(
    structure: Structure, kind: Kind, change: Callable[[Preconditioner], None]
) -> None:
    """These change numbers and no version counter."""
    pre = Preconditioner(
        network(), nn.CrossEntropyLoss(), copy.deepcopy(structure), kind=kind, damping=RHO, kl_clip=None
    )
    run(pre, *data(2))
    change(pre)
    gradient = {name: p.grad.clone() for name, p in pre.parameters.items() if p.grad is not None}
    pre.precondition()
    assert_close(now(pre), reference(pre.structure, gradient), 1e-8)


def clip_within(pre: Preconditioner, x: Tensor, y: Tensor) -> None:
    pre.loss(pre.model(x), y).backward()
    nn.utils.clip_grad_norm_(pre.model.parameters(), 1e-3)


def penalise_parameters(pre: Preconditioner, x: Tensor, y: Tensor) -> None:
    (pre.loss(pre.model(x), y) + 1e-3 * sum(p.square().sum() for p in pre.model.parameters())).backward()


def penalise_an_activation(pre: Preconditioner, x: Tensor, y: Tensor) -> None:
    seen: list[Tensor] = []
    handle = pre.model.get_submodule("1").register_forward_hook(lambda *call: seen.append(call[-1]))
    loss = pre.loss(pre.model(x), y)
    handle.remove()
    (loss + seen[0].square().mean()).backward()


def penalise_the_gradient(pre: Preconditioner, x: Tensor, y: Tensor) -> None:
    x = x.requires_grad_()
    loss = pre.loss(pre.model(x), y)
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + slope.square().sum()).backward()


def go_back_twice(pre: Preconditioner, x: Tensor, y: Tensor) -> None:
    loss = pre.loss(pre.model(x), y)
    loss.backward(retain_graph=True)
    loss.backward()


@pytest.mark.parametrize(
    "backward", [clip_within, penalise_parameters, penalise_an_activation, penalise_the_gradient, go_back_twice]
)
@pytest.mark.parametrize("kind", ["mc", "exact"])
@pytest.mark.parametrize("structure", [KFAC(factored_damping=True), Full(side="rows")], ids=["kfac", "full"])
def test_a_gradient_of_more_than_the_loss_is_preconditioned_as_it_is(
    structure: Structure, kind: Kind, backward: Callable[[Preconditioner, Tensor, Tensor], None]
) -> None:
    pre = Preconditioner(
        network(), nn.CrossEntropyLoss(), copy.deepcopy(structure), kind=kind, damping=RHO, kl_clip=None
    )
    with pre.collect():
        backward(pre, *data(2))
    gradient = {name: p.grad.clone() for name, p in pre.parameters.items() if p.grad is not None}
    pre.precondition()
    assert_close(now(pre), reference(pre.structure, gradient), 1e-8)


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("key", ["kfac", "full"])
def test_a_gradient_that_a_hook_changed_is_preconditioned_as_it_is(key: str, hook: str) -> None:
    options = {"factored_damping": True} if key == "kfac" else {"side": "rows"}
    pre = Preconditioner(network(), nn.CrossEntropyLoss(), make(key, **options), damping=RHO, kl_clip=None)
    weight = pre.model.get_parameter("2.weight")

    def halve(changed: Tensor) -> Tensor | None:
        if changed is not weight:
            return changed / 2
        assert weight.grad is not None
        weight.grad /= 2
        return None

    handle = getattr(weight, hook)(halve)
    gradient = run(pre, *data(2))
    pre.precondition()
    assert_close(now(pre), reference(pre.structure, gradient), 1e-8)
    handle.remove()
    weight.grad = None
    gradient_without = run(pre, *data(2))["2.weight"]
    assert_close(gradient["2.weight"], gradient_without / 2, 1e-12)


@pytest.mark.parametrize("key", STRUCTURES)
def test_what_becomes_of_the_gradients_afterwards_is_the_users(key: str) -> None:
    pre, other = (
        Preconditioner(network(), nn.CrossEntropyLoss(), make(key, **options(key)), damping=RHO, kl_clip=None, seed=3)
        for _ in range(2)
    )
    for seed in range(3):
        run(pre, *data(seed=seed))
        run(other, *data(seed=seed))
        pre.precondition()
        other.precondition()
        assert torch.equal(now(pre), now(other))
        for parameter in pre.parameters.values():
            assert parameter.grad is not None
            assert parameter.grad.stride() == parameter.stride()
            parameter.grad.fill_(torch.nan)


def test_gradients_that_live_longer_than_a_pass_stay_where_they_are() -> None:
    pre, kept = Preconditioner(network(), nn.CrossEntropyLoss(), damping=RHO, kl_clip=None), {}
    for name, parameter in pre.parameters.items():
        kept[name] = parameter.grad = torch.zeros_like(parameter)
    for _ in range(2):
        pre.model.zero_grad(set_to_none=False)
        with pre.collect():
            pre.loss(pre.model(data()[0]), data()[1]).backward()
        pre.precondition()
        assert all(parameter.grad is kept[name] for name, parameter in pre.parameters.items())


def test_the_users_gradient_at_the_outputs_stays() -> None:
    pre, (x, y) = Preconditioner(network(), nn.CrossEntropyLoss(), damping=RHO, kl_clip=None), data()
    with pre.collect():
        z = pre.model(x)
        z.retain_grad()
        pre.loss(z, y).backward()
    pre.precondition()
    assert_close(z.grad, torch.autograd.grad(pre.loss(leaf := z.detach().requires_grad_(), y), leaf)[0], 1e-12)


def test_loss_scaling_changes_nothing_but_the_gradient() -> None:
    """Gradients scaled by a GradScaler are unscaled before they are preconditioned."""
    model, loss, (x, y) = network().float(), nn.CrossEntropyLoss(), data(40)
    x = x.float()
    pre = Preconditioner(model, loss, "kfac", kind="empirical", damping=RHO, kl_clip=None)
    stepper = torch.optim.SGD(model.parameters(), lr=1.0)
    gradient = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with pre.collect():
        scaler.scale(loss(model(x), y)).backward()
    scaler.unscale_(stepper)
    pre.precondition()
    fitted = KFAC().update(sqrt_fisher(model, loss, x, y, "empirical"))
    assert_close(now(pre), reference(fitted, dict(zip(pre.parameters, gradient, strict=True))), 1e-3)
