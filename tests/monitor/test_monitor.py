"""A monitor beside a plain loop: what it leaves untouched, when it measures, what it tells."""

import copy
import logging

import pytest
import torch
from torch import nn

import curvlab
from curvlab.errors import UnsupportedModel
from curvlab.fisher import KFAC
from curvlab.monitor import QUANTITIES, Condition, Edge, Event, Quantity, QuantityDropped
from curvlab.optim import NaturalGradient, Preconditioner


class Clock:
    """Seconds that pass as the test says."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))
    return model, torch.randn(10, 4), torch.randint(3, (10,))


LOSS = nn.CrossEntropyLoss()


def train(model, x, y, optimizer, steps, after=None):
    """A plain loop; returns its losses."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = LOSS(model(x), y)
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
        if after is not None:
            after(x, y, value)
    return losses


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_run_with_a_monitor_is_bit_for_bit_the_run_without(optimizer):
    model, x, y = network()
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    alone = train(other, x, y, optimizer(other.parameters(), lr=0.1), 6)
    torch.manual_seed(1)
    moved = optimizer(model.parameters(), lr=0.1)
    with curvlab.monitor(model, LOSS, optimizer=moved, every=1) as monitor:
        assert train(model, x, y, moved, 6, monitor.after_step) == alone
    assert not monitor.dropped
    assert {m.quantity for m in monitor.measurements} == set(QUANTITIES)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    grads = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in grads)
    assert all(module.training for module in model.modules())
    assert not moved._optimizer_step_pre_hooks
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_what_fails_inside_a_quantity_leaves_the_model_as_it_was():
    class Failing(Quantity):
        key = "failing"

        def measure(self, _):
            torch.rand(3)
            raise RuntimeError("out of order")

    model, x, y = network()
    model[3].eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = curvlab.monitor(model, LOSS, [Failing(), "layers"], optimizer=optimizer, every=1)
    random = torch.get_rng_state()
    with pytest.warns(QuantityDropped, match="leaves out 'failing' from step 1 on. RuntimeError: out of order"):
        monitor.after_step(x, y)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model] == [True, True, True, False, True]
    train(model, x, y, optimizer, 2, monitor.after_step)
    assert monitor.dropped == {"failing": "RuntimeError: out of order"}
    assert [m.step for m in monitor.measurements] == [1, 2, 3]
    assert "dropped: failing" in repr(monitor)


def test_the_share_of_time_stays_within_the_budget_by_the_clock_of_the_loop():
    clock = Clock()

    class Slow(Quantity):
        key = "slow"
        passes = 5.0

        def measure(self, _):
            clock.now += 5.0
            return {"value": 1.0}

    model, x, y = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    monitor = curvlab.monitor(model, LOSS, [Slow()], budget=0.1, optimizer=optimizer, clock=clock)
    for _ in range(420):
        clock.now += 1.0
        monitor.after_step(x, y)
    assert [m.step for m in monitor.measurements] == [78, 128, 178, 228, 278, 328, 378]
    assert monitor.share == pytest.approx(35 / monitor.plan.trained, rel=1e-5)
    assert monitor.share <= 0.1
    assert 400 <= monitor.plan.trained <= 418  # measurements are no training


def test_the_parameters_before_a_step_are_kept_only_where_their_change_is_due():
    model, x, y = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = curvlab.monitor(model, LOSS, ["alignment"], optimizer=optimizer, every=3)
    kept = []
    original = monitor._look_at
    monitor._look_at = lambda *args: (kept.append(dict(monitor._before)), original(*args))
    seen = []

    def after(*args):
        seen.append(bool(monitor._before))
        monitor.after_step(*args)

    train(model, x, y, optimizer, 6, after)
    assert seen == [False, False, True, False, False, True]
    assert [len(k) for k in kept] == [6, 6]
    assert [m.step for m in monitor.measurements] == [3, 6]


@pytest.mark.parametrize("natural", [True, False])
def test_natural_gradient_and_a_preconditioner_are_monitored(natural):
    model, x, y = network()
    model = nn.Sequential(model[0], model[2], model[4])
    if natural:
        optimizer, behind = NaturalGradient(model, LOSS, lr=0.1, structure=KFAC(), damping=0.1), None
        collecting = optimizer
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        behind = collecting = Preconditioner(model, LOSS, KFAC(), damping=0.1)
    monitor = curvlab.monitor(model, LOSS, optimizer=optimizer, preconditioner=behind, every=2)
    for _ in range(4):
        optimizer.zero_grad()
        with collecting.collect():
            value = LOSS(model(x), y)
            value.backward()
        if behind is not None:
            behind.precondition()
        optimizer.step()
        monitor.after_step(x, y, value)
    assert not monitor.dropped
    assert set(monitor.table()["step"]) == {2, 4}
    assert 0 < monitor.curves["alignment/cosine"][-1][1] < 1


def test_without_an_optimiser_quantities_that_need_one_are_left_out():
    model, x, y = network()
    monitor = curvlab.monitor(model, LOSS, every=1)
    train(model, x, y, torch.optim.SGD(model.parameters(), lr=0.1), 2, monitor.after_step)
    assert not monitor.dropped
    assert set(monitor.quantities) == set(QUANTITIES) - {"edge", "alignment", "anisotropy"}
    monitor = curvlab.monitor(model, LOSS, ["edge"], every=1)
    with pytest.warns(QuantityDropped, match=r"call curvlab.monitor\(…, optimizer=optimizer\)"):
        monitor.after_step(x, y)


def test_nothing_is_measured_at_a_loss_that_is_not_finite():
    model, x, y = network()
    monitor = curvlab.monitor(model, LOSS, ["layers"], every=1)
    monitor.after_step(x, y, torch.tensor(float("nan")))
    monitor.after_step(x, y, float("inf"))
    assert not monitor.measurements
    assert not monitor.dropped


def test_a_quantity_of_ones_own_is_registered_measured_and_raises_events_once_an_onset(caplog):
    class Level(Quantity, key="test-level", summary="what the test says"):
        levels = iter([0.5, 1.0, 1.2, 0.95, 1.1, 0.5, 1.0])

        def measure(self, training):
            return {"level": next(self.levels), "step": float(training.step)}

        def conditions(self, values):
            yield Condition("high", values["level"], f"it is {values['level']}", where="here")

    told = []
    model, x, y = network()
    try:
        monitor = curvlab.monitor(model, LOSS, ["test-level"], every=1, on_event=told.append)
        with caplog.at_level(logging.WARNING, "curvlab"):
            for _ in range(7):
                monitor.after_step(x, y)
    finally:
        QUANTITIES.unregister("test-level")
    assert monitor.events == told == [
        Event(2, "high", "test-level", "it is 1.0", "here"),
        Event(7, "high", "test-level", "it is 1.0", "here"),
    ]  # fmt: skip
    assert [record.getMessage() for record in caplog.records] == ["Step 2, high: it is 1.0", "Step 7, high: it is 1.0"]
    assert monitor.curves["test-level/step"] == [(step, float(step)) for step in range(1, 8)]
    assert monitor.curves["event/high"] == [(2, 1.0), (7, 1.0)]


def test_every_registered_quantity_has_a_key_and_a_summary():
    for key, kind in QUANTITIES.items():
        assert kind.key == key
        assert kind.summary
        assert kind.__doc__


def test_measuring_by_hand_returns_the_numbers_and_raises_what_is_wrong():
    model, x, y = network()
    monitor = curvlab.monitor(model, LOSS, ["rank", "layers"])
    assert set(monitor.measure(x, y, "rank")) == {"rank/effective", "rank/rows"}
    assert "layers/0/weight_norm" in monitor.measure(x, y)
    with pytest.raises(UnsupportedModel, match="no optimiser"):
        curvlab.monitor(model, LOSS, ["edge"]).measure(x, y)


def test_structured_outputs_and_inputs_by_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.map = nn.Linear(4, 3)

        def forward(self, left, right):
            return {"logits": self.map(left * right)}

    torch.manual_seed(0)
    model, x, y = Named(), {"left": torch.randn(10, 4), "right": torch.randn(10, 4)}, torch.randint(3, (10,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = curvlab.monitor(model, LOSS, optimizer=optimizer, every=1, output="logits")
    for _ in range(2):
        optimizer.zero_grad()
        LOSS(model(**x)["logits"], y).backward()
        optimizer.step()
        monitor.after_step(x, y)
    assert not monitor.dropped


def test_a_plot_has_a_panel_a_quantity():
    model, x, y = network()
    monitor = curvlab.monitor(model, LOSS, ["rank", "layers"], every=1)
    monitor.after_step(x, y, 0.5)
    assert sorted(axis.get_title() for axis in monitor.plot().axes) == ["layers", "loss", "rank"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"quantities": ["edg"]}, "Unknown quantity 'edg'"),
        ({"quantities": ["edge", Edge(k=2)]}, "edge is named twice"),
        ({"quantities": []}, "leaves nothing to measure"),
        ({"budget": 2.0}, "share of the training time"),
        ({"every": 0}, "whole number of steps"),
    ],
)
def test_options_out_of_range_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        curvlab.monitor(network()[0], LOSS, **options)


def test_a_natural_gradient_takes_no_other_preconditioner():
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="preconditions by itself"):
        curvlab.monitor(
            model, LOSS, optimizer=NaturalGradient(model, LOSS, 0.1), preconditioner=Preconditioner(model, LOSS)
        )
