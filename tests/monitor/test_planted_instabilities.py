"""Instabilities that are planted are told of before the loss shows them."""

import pytest
import torch
from torch import nn

import curvlab
from curvlab.fisher import Full
from curvlab.monitor import Alignment, Edge
from curvlab.optim import NaturalGradient


def ramped(model, loss, x, y, optimizer, steps, rate, every=5):
    """Train while the learning rate grows by a factor a step; returns events by name and losses."""
    monitor = curvlab.monitor(model, loss, [Edge()], optimizer=optimizer, every=every)
    losses = []
    for _ in range(steps):
        optimizer.param_groups[0]["lr"] *= rate
        optimizer.zero_grad()
        if isinstance(optimizer, NaturalGradient):
            with optimizer.collect():
                value = loss(model(x), y)
                value.backward()
        else:
            value = loss(model(x), y)
            value.backward()
        optimizer.step()
        monitor.after_step(x, y, value)
        losses.append(float(value.detach()))
    return {event.name: event.step for event in reversed(monitor.events)}, losses


def rises_at(losses, after=0):
    """The first step at which the loss is twice the lowest before, once so many steps have been taken."""
    lowest = float("inf")
    for step, loss in enumerate(losses[after:], after + 1):
        if loss > 2 * lowest:
            return step
        lowest = min(lowest, loss)
    return None


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_edge_of_a_quadratic_is_told_at_the_very_learning_rate_and_before_the_loss_rises(momentum):
    torch.manual_seed(0)
    model = nn.Linear(6, 1).double()
    x = torch.randn(40, 6).double()
    y = x.sum(1, keepdim=True) + torch.randn(40, 1).double()
    X = torch.cat([x, torch.ones(40, 1).double()], 1)
    sharpness = float(torch.linalg.eigvalsh(2 * X.T @ X / 40).max())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 / sharpness, momentum=momentum)
    events, losses = ramped(model, nn.MSELoss(), x, y, optimizer, 500, 1.01, every=1)
    rates = [0.1 / sharpness * 1.01**step for step in range(1, 501)]
    at = next(step for step, rate in enumerate(rates, 1) if sharpness >= 0.95 * (2 + 2 * momentum) / rate)
    assert events["at the edge"] in (at, at + 1)
    assert events["at the edge"] < rises_at(losses, after=200)


def test_the_edge_of_a_network_is_told_before_its_loss_rises():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x = torch.randn(30, 4).double()
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin()], 1)
    events, losses = ramped(model, nn.MSELoss(), x, y, torch.optim.SGD(model.parameters(), lr=0.02), 600, 1.01)
    assert events["at the edge"] < rises_at(losses)


def test_too_small_a_damping_is_told_and_a_large_one_is_not():
    found = {}
    for damping in (1e-4, 1.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        x = torch.randn(30, 4).double()
        y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin()], 1)
        # One draw of one row a sample misses most of the curvature.
        loss = nn.MSELoss()
        optimizer = NaturalGradient(model, loss, 1e-4, structure=Full(), kind="mc", damping=damping)
        found[damping] = ramped(model, loss, x, y, optimizer, 20, 1.0)[0]
    assert "damping too small" in found[1e-4]
    assert "damping too small" not in found[1.0]


def test_a_layer_that_dies_is_told_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    x, y = torch.randn(30, 4), torch.randn(30, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = curvlab.monitor(model, nn.MSELoss(), ["layers", Alignment()], optimizer=optimizer, every=1)
    for step in range(1, 12):
        optimizer.zero_grad()
        nn.MSELoss()(model(x), y).backward()
        optimizer.step()
        if step == 5:
            with torch.no_grad():
                model[0].bias -= 100.0  # as a step that is much too long leaves it
        monitor.after_step(x, y)
    assert [(event.step, event.name, event.where) for event in monitor.events] == [(7, "layer dead", "0")]
