"""Rows of passes in which samples take another way through the model than in those that were checked."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import DOUBLE, assert_close, dense_jacobian
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.fisher import Full
from curvlab.optim import Preconditioner
from curvlab.rows import jacobian, sweep
from curvlab.rows.route import route_to


class ByLength(nn.Module):
    """Sorts its samples by length, as before packing, and brings them back."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        lengths, order = lengths.sort(descending=True)
        hidden, _ = self.rnn(x[order])
        last = hidden[torch.arange(len(x)), lengths - 1]
        return self.head(last[order.argsort()])


class Reusing(nn.Module):
    """Uses the weight of a layer once more where a flag is set."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.flag = nn.Linear(3, 3), nn.Linear(3, 2), False

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(torch.tanh(h @ self.first.weight) if self.flag else h)


class Positions(nn.Module):
    """Learned positions, whose layer is called on no sample; as many as samples in some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place, self.head = nn.Embedding(7, 4), nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, i: Tensor) -> Tensor:
        return self.head(torch.tanh(self.token(i) + self.place(torch.arange(i.shape[1]))).mean(1))


@pytest.mark.parametrize("sorted_first", [True, False])
def test_samples_that_are_sorted_in_some_batches_only(sorted_first: bool) -> None:
    model, x = ByLength().to(DOUBLE), torch.randn(4, 5, 3, dtype=DOUBLE)
    batches = [torch.tensor([5, 4, 3, 2]), torch.tensor([2, 5, 3, 4]), torch.tensor([3, 2, 4, 5])]
    for lengths in batches if sorted_first else reversed(batches):
        assert_close(jacobian(model, (x, lengths)).dense(), dense_jacobian(model, (x, lengths)))


def test_a_weight_that_is_used_elsewhere_from_some_batch_on() -> None:
    model, x = Reusing().to(DOUBLE), torch.randn(5, 3, dtype=DOUBLE)
    for flag in (False, True, False):
        model.flag = flag
        assert_close(jacobian(model, x).dense(), dense_jacobian(model, x))


class Routed(nn.Module):
    def __init__(self, route: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.route = nn.Linear(3, 4), nn.Linear(4, 2), route

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.route(torch.tanh(self.first(x))))


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def vmap(_: Any, in_dims: Any, x: Tensor) -> Any:
        return 2 * x, in_dims[0]

    @staticmethod
    def backward(_: Any, g: Tensor) -> Tensor:
        return 2 * g


@pytest.mark.parametrize(
    ("route", "times"),
    [
        (F.relu, 1),
        (lambda h: h[:, :2].repeat(1, 2), 1),
        (lambda h: h.masked_fill(h > 0, 0.0), 1),
        (lambda h: h[torch.arange(len(h))], 3),
        (lambda h: h.gather(1, torch.zeros_like(h, dtype=torch.long)), 3),
        (Doubling.apply, 3),
    ],
)
def test_only_a_way_that_depends_on_numbers_is_checked_for_every_batch(
    route: Callable[[Tensor], Tensor], times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []
    compare = sweep.compare

    def note(parameters: Any, z: Any, seeds: Any, layers: Any) -> Any:
        compared.append(1)
        return compare(parameters, z, seeds, layers)

    monkeypatch.setattr(sweep, "compare", note)
    model = Routed(route).to(DOUBLE)
    for _ in range(3):
        jacobian(model, torch.randn(5, 3, dtype=DOUBLE), engine="autograd")
    assert len(compared) == times
    assert route_to(model(torch.randn(5, 3, dtype=DOUBLE))).fixed is (times == 1)


@pytest.mark.parametrize("kind", ["empirical", "exact"])
def test_training_on_batches_with_as_many_positions_as_samples(kind: Any) -> None:
    model, loss = Positions().to(DOUBLE), nn.CrossEntropyLoss()
    natural = Preconditioner(model, loss, Full(), kind=kind, damping=1e-2)
    for T in (5, 4, 6, 4, 5):
        x, y = torch.randint(7, (4, T)), torch.randint(3, (4,))
        model.zero_grad()
        with natural.collect():
            loss(model(x), y).backward()
        natural.precondition()
        expected = Full.fit(unchecked(model), loss, (x, y), kind=kind)
        assert_close(natural.structure.to_dense(), expected.to_dense())


def unchecked(model: nn.Module) -> nn.Module:
    """Return a model of the same parameters that nobody has checked yet."""
    fresh = Positions().to(DOUBLE)
    fresh.load_state_dict(model.state_dict())
    return fresh
