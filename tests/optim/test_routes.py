"""Every route to a direction against the plain one."""

from typing import Any

import pytest
import torch
from oracle import DOUBLE
from torch import Tensor, nn

from curvlab.fisher import STRUCTURES, make
from curvlab.optim import Preconditioner, routes
from curvlab.optim.routes import Gradient, Lift, PerSampleGradients, Route, Step
from curvlab.testing.oracle import assert_close

FAST = [route for route in routes.ROUTES if route is not Gradient]
OPTIONS: dict[str, dict[str, Any]] = {
    "kfac": {"factored_damping": True},
    "full": {"side": "rows"},
    "block-diagonal": {"side": "rows"},
}


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 4)]
    return nn.Sequential(*layers).double()


def steps(key: str, kind: Any, damping: float = 0.5) -> tuple[list[dict[str, Tensor]], list[str]]:
    """Take three steps, of which the second takes no new curvature; return directions, and what the routes were."""
    model, loss, taken = network(), nn.CrossEntropyLoss(), []
    natural = Preconditioner(
        model, loss, make(key, **OPTIONS.get(key, {})), kind=kind, damping=damping, kl_clip=None, refresh_every=2
    )
    found = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(3, 1, 4, 4, dtype=DOUBLE, generator=generator), torch.tensor([0, 1, 3])
        model.zero_grad()
        due = natural.due
        with natural.collect():
            loss(model(x), y).backward()
        taken.append(type(routes.route_of(Step(natural.structure, natural._passes[0], due))).__name__)
        natural.precondition()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return found, taken


@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("key", STRUCTURES)
@pytest.mark.parametrize("route", FAST)
def test_a_route_leads_where_the_plain_one_does(
    route: type[Route], key: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    damping = 20.0 if key in ("block-tridiagonal", "layer-wise") else 0.5
    monkeypatch.setattr(routes, "ROUTES", (Gradient,))
    expected, _ = steps(key, kind, damping)
    monkeypatch.setattr(routes, "ROUTES", (route, Gradient))
    found, taken = steps(key, kind, damping)
    for one, other in zip(found, expected, strict=True):
        for name, value in other.items():
            assert_close(one[name], value, 1e-9)
    lifts = route is Lift and not STRUCTURES[key].averages and kind != "mc"
    per_sample = route is PerSampleGradients
    names = ["PerSampleGradients"] * 3 if per_sample else ["Lift" if lifts else "Gradient", "Gradient"] * 2
    assert taken == names[:3]


def test_the_plain_route_is_open_to_every_step_and_the_last() -> None:
    assert routes.ROUTES[-1] is Gradient
    for key in STRUCTURES:
        for due in (False, True):
            step = Step(make(key), None, due)
            assert [route for route in routes.ROUTES if route.applies(step)] == [Gradient]
