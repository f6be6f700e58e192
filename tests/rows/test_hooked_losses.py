"""Losses with hooks, or with another forward pass, are what the user calls."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import DOUBLE, architecture, loss_case
from row_cases import Skipping, fisher, generator
from torch import Tensor, nn
from torch.func import jacrev

from curvlab.errors import UnsupportedModel
from curvlab.nn import Scaled, WeightedCrossEntropy
from curvlab.optim import Preconditioner
from curvlab.rows import sqrt_fisher
from curvlab.rows.collect import Collector
from curvlab.rows.owners import owners_of
from curvlab.rows.passes import Pass
from curvlab.spectrum import GGN, Hessian
from curvlab.testing.oracle import assert_close, dense_ggn, dense_jacobian, output_major, outputs


def tripled(loss: nn.Module) -> None:
    loss.register_forward_hook(lambda _, __, value: 3 * value)


def sharpened(loss: nn.Module) -> None:
    loss.register_forward_pre_hook(lambda _, args: (2 * args[0] + args[0] ** 2, args[1]))


def replaced(loss: nn.Module) -> None:
    forward = type(loss).forward
    loss.forward = lambda z, y: 3 * forward(loss, z, y)  # type: ignore[method-assign]


HOOKED = [
    (hook, loss, part)
    for hook in (tripled, sharpened, replaced)
    for loss in ("mse", "half", "ce")
    for part in (False, True)
]


def hooked(hook: Callable[[nn.Module], None], name: str, reduction: str, part: bool) -> tuple[nn.Module, Any, Any, Any]:
    model, x = architecture("mlp").make(N=4)
    loss, y = loss_case(name).make(0.1 * outputs(model, x), reduction)
    if hook is sharpened and name != "ce":
        y = y - 5  # so that the Hessian is definite
    hook(loss)
    return model, (Scaled(loss, 2.0) if part else loss), x, y


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("hook", "name", "part"), HOOKED)
def test_a_loss_with_hooks_is_what_the_user_calls(hook: Any, name: str, part: bool, reduction: str) -> None:
    model, loss, x, y = hooked(hook, name, reduction, part)
    if hook is replaced and reduction == "mean":
        with pytest.raises(UnsupportedModel, match=r"with its hooks is not a sum over samples(?s:.)*Wrap a function"):
            sqrt_fisher(model, loss, x, y, "ggn")
        return
    z, J = outputs(model, x), dense_jacobian(model, x)
    if hook is not sharpened or name != "ce":
        assert_close(fisher(sqrt_fisher(model, loss, x, y, "ggn")), dense_ggn(J, loss, z, y))
    empirical = sqrt_fisher(model, loss, x, y, "empirical")
    slopes = jacrev(lambda at: loss(at, y))(z) * (empirical.count / (2 if part else 1)) ** 0.5  # √w s, w the multiple
    cotangents = torch.einsum("nc,nm->ncm", slopes, torch.eye(len(z), dtype=DOUBLE)).permute(0, 2, 1).flatten(1)
    assert_close(fisher(empirical), (cotangents @ output_major(J, len(z))).mT @ (cotangents @ output_major(J, len(z))))
    for kind in ("exact", "mc"):
        with pytest.raises(UnsupportedModel, match="with its hooks"):
            sqrt_fisher(model, loss, x, y, kind, generator=generator())  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["ggn", "empirical"])
@pytest.mark.parametrize("hook", [tripled, sharpened])
def test_steps_with_a_loss_that_has_hooks(hook: Any, kind: Any) -> None:
    model, loss, x, y = hooked(hook, "mse", "mean", False)
    preconditioner = Preconditioner(model, loss, "full", kind=kind, damping=1e-2, kl_clip=None)
    with preconditioner.collect():
        loss(model(x), y).backward()
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    F_ = fisher(sqrt_fisher(model, loss, x, y, kind))
    preconditioner.precondition()
    step = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert_close(step, torch.linalg.solve(F_ + 1e-2 * torch.eye(len(g), dtype=DOUBLE), g), 1e-8)
    assert len(loss._forward_hooks) + len(loss._forward_pre_hooks) == 1


def doubled_gradients(loss: nn.Module) -> None:
    loss.register_full_backward_hook(lambda _, into, __: tuple(None if g is None else 2 * g for g in into))


def tripled_gradients(loss: nn.Module) -> None:
    loss.register_full_backward_pre_hook(lambda _, out: tuple(3 * g for g in out))


@pytest.mark.parametrize("name", ["ce", "own", "part"])
@pytest.mark.parametrize("hook", [doubled_gradients, tripled_gradients])
def test_hooks_on_the_gradients_of_a_loss_are_no_part_of_it(hook: Any, name: str) -> None:
    """They change the gradient of the user's pass, which is preconditioned as it is."""
    model, x = architecture("mlp").make(N=4)
    y, inner = (
        torch.tensor([0, 1, 2, 0]),
        {"ce": nn.CrossEntropyLoss, "own": Skipping, "part": nn.CrossEntropyLoss}[name](),
    )
    loss = Scaled(inner, 1.0) if name == "part" else inner
    S = sqrt_fisher(model, loss, x, y, "ggn").dense()
    empirical, H = sqrt_fisher(model, loss, x, y, "empirical").dense(), Hessian(model, loss, (x, y)).to_dense()
    hook(inner)
    assert_close(sqrt_fisher(model, loss, x, y, "ggn").dense(), S)
    assert_close(sqrt_fisher(model, loss, x, y, "empirical").dense(), empirical)
    assert_close(GGN(model, loss, (x, y)).to_dense(), S.T @ S)
    assert_close(Hessian(model, loss, (x, y)).to_dense(), H)
    for kind, rows in (("ggn", S), ("empirical", empirical)):
        preconditioner = Preconditioner(model, loss, "full", kind=kind, damping=0.1, kl_clip=None)  # type: ignore[arg-type]
        model.zero_grad()
        with preconditioner.collect():
            loss(model(x), y).backward()
        g = torch.cat([p.grad.flatten() for p in model.parameters()])
        preconditioner.precondition()
        step = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert_close(step, torch.linalg.solve(rows.T @ rows + 0.1 * torch.eye(len(g), dtype=DOUBLE), g), 1e-8)


def test_hooks_that_only_look_on_leave_a_loss_what_it_is() -> None:
    model, x = architecture("mlp").make(N=4)
    loss, y = loss_case("ce").make(outputs(model, x), "mean")
    expected = fisher(sqrt_fisher(model, loss, x, y))
    seen: list[Tensor] = []
    loss.register_forward_hook(lambda _, __, value: seen.append(value.detach()))
    assert_close(fisher(sqrt_fisher(model, loss, x, y)), expected)
    with Collector(model, loss, owners_of(model), Pass("exact")) as found:
        loss(model(x), y).backward()
    assert found.rows is not None
    assert_close(fisher(found.rows), expected)


def test_hooks_on_a_loss_that_does_not_say_how_it_is_reduced() -> None:
    model, x = architecture("mlp").make(N=4)
    loss = WeightedCrossEntropy(torch.ones(4, dtype=DOUBLE))
    tripled(loss)
    with pytest.raises(UnsupportedModel, match="has hooks, or a forward of its own, that change it"):
        sqrt_fisher(model, loss, x, torch.tensor([0, 1, 2, 0]))
