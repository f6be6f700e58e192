"""Every learning-rate scheduler of torch, and its GradScaler, drive both optimisers as they drive SGD."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimiser_cases import RHO, data, flat, network, optimiser, take
from torch import nn
from torch.optim import lr_scheduler

from curvlab.optim import NaturalGradient, Preconditioner
from curvlab.rows.loss import Kind

STEPS = 6
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.7),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, STEPS),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=STEPS + 1, cycle_momentum=True),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, threshold=10.0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)], milestones=[2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)], optimizer=o
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, anneal_epochs=2),
}


def test_none_is_left_out() -> None:
    kinds = (lr_scheduler.LRScheduler, lr_scheduler.ReduceLROnPlateau)
    there = {
        name
        for name, one in vars(lr_scheduler).items()
        if inspect.isclass(one) and issubclass(one, kinds) and not name.startswith("_")
    }
    assert there - {"LRScheduler"} <= set(SCHEDULERS)


def advance(scheduler: Any, value: float) -> None:
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(value)
    else:
        scheduler.step()


def scheduled(name: str) -> tuple[NaturalGradient, Any]:
    made = optimiser(network(), lr=0.1, momentum=0.5)
    return made, SCHEDULERS[name](made)


def settings(made: torch.optim.Optimizer) -> tuple[float, float]:
    group = made.param_groups[0]
    return float(group["lr"]), float(group["momentum"])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_rates_and_momentum_are_those_that_sgd_has_and_the_steps_are_taken_at_them(name: str) -> None:
    (x, y), plain = data(), network()
    reference = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.5)
    at_rates = optimiser(network(), lr=0.1, momentum=0.5)
    for_reference, (made, for_made) = SCHEDULERS[name](reference), scheduled(name)
    seen = set()
    for _ in range(STEPS):
        assert settings(made) == settings(reference)
        seen.add(settings(made))
        at_rates.param_groups[0]["lr"], at_rates.param_groups[0]["momentum"] = settings(reference)
        take(made, x, y)
        take(at_rates, x, y)
        reference.step()
        advance(for_reference, 1.0)
        advance(for_made, 1.0)
    assert torch.equal(flat(made.preconditioner.model), flat(at_rates.preconditioner.model))
    assert len(seen) > 1


def train(made: NaturalGradient, schedule: Any, steps: int) -> None:
    x, y = data()
    for _ in range(steps):
        take(made, x, y)
        advance(schedule, 1.0)


@pytest.mark.parametrize("name", ["OneCycleLR", "ReduceLROnPlateau"])
def test_a_saved_schedule_goes_on(name: str) -> None:
    (whole, schedule), (first, begun), (second, resumed) = (scheduled(name) for _ in range(3))
    train(whole, schedule, STEPS)
    train(first, begun, STEPS // 2)
    second.preconditioner.model.load_state_dict(first.preconditioner.model.state_dict())
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(begun.state_dict())
    train(second, resumed, STEPS // 2)
    assert settings(second) == settings(whole)
    assert torch.equal(flat(second.preconditioner.model), flat(whole.preconditioner.model))


def loop(scaler: torch.amp.GradScaler | None, name: str, kind: Kind, *, before_sgd: bool) -> torch.Tensor:
    """Train with a preconditioner before SGD, or with natural gradient, under a schedule; with a scaler or without."""
    model, loss = network(), nn.CrossEntropyLoss()
    natural = Preconditioner(model, loss, kind=kind, damping=RHO) if before_sgd else None
    stepper: Any
    if natural is None:
        stepper = NaturalGradient(model, loss, 0.1, kind=kind, damping=RHO, momentum=0.5)
    else:
        stepper = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    collect = (natural or stepper).collect
    schedule = SCHEDULERS[name](stepper)
    for seed in range(STEPS):
        x, y = data(seed=seed)
        stepper.zero_grad()
        with collect():
            value = loss(model(x), y)
            (value if scaler is None else scaler.scale(value)).backward()
        if natural is not None:
            if scaler is not None:
                scaler.unscale_(stepper)
            natural.precondition()
        if scaler is None:
            stepper.step()
        else:
            scaler.step(stepper)
            scaler.update()
        advance(schedule, 1.0)
    return flat(model)


@pytest.mark.parametrize(
    ("kind", "before_sgd"),
    [("exact", False), ("exact", True), ("mc", True)],
    ids=["natural gradient", "preconditioner", "preconditioner of draws"],
)
@pytest.mark.parametrize("name", ["OneCycleLR", "ReduceLROnPlateau", "SequentialLR"])
def test_a_scaler_and_a_schedule_together_take_the_steps_of_the_schedule_alone(
    name: str, kind: Kind, before_sgd: bool
) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    scaled, plain = (loop(one, name, kind, before_sgd=before_sgd) for one in (scaler, None))
    torch.testing.assert_close(scaled, plain, rtol=1e-9, atol=1e-12)
    assert scaler.get_scale() > 1024
