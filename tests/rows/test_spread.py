"""Layers that all samples share, such as tables of positions, have factored rows where the model broadcasts their outputs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import DOUBLE
from row_cases import check_passes
from torch import Tensor, nn

import curvlab
from curvlab.optim import Preconditioner
from curvlab.rows.factored import EmbeddingRows, KroneckerRows
from curvlab.rows.guard import checks_of
from curvlab.testing.oracle import assert_close, dense_jacobian

N, T, C = 3, 4, 2


class Positioned(nn.Module):
    """Tokens and positions; how the positions are handed on decides whether they can have samples."""

    def __init__(self, positions: Callable[[], Tensor], use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.tokens, self.places, self.head = nn.Embedding(5, 3), nn.Embedding(T, 3), nn.Linear(3, C)
        self.positions, self.use = positions, use

    def forward(self, x: Tensor) -> Tensor:
        h = self.use(self.tokens(x), self.places(self.positions()))
        return self.head(torch.tanh(h)).transpose(1, 2)


def added(h: Tensor, places: Tensor) -> Tensor:
    return h + places


def transposed(h: Tensor, places: Tensor) -> Tensor:
    """Fails for places with another axis."""
    return h + places.t().t()


def stacked(h: Tensor, places: Tensor) -> Tensor:
    """Returns something else for places with another axis."""
    return h + places.flatten()[: T * 3].view(T, 3) * len(places)


def model_of(use: Callable[[Tensor, Tensor], Tensor] = added, form: str = "[T]") -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    positions = {"[T]": lambda: torch.arange(T), "[1, T]": lambda: torch.arange(T)[None]}[form]
    return Positioned(positions, use).to(DOUBLE), torch.randint(5, (N, T))


@pytest.mark.parametrize("form", ["[T]", "[1, T]"])
def test_positions_that_are_added_have_factored_rows_without_further_checks(
    form: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = model_of(form=form)
    J = curvlab.jacobian(model, x)
    assert_close(J.dense(), dense_jacobian(model, x))
    assert {layer.name: type(layer) for layer in J.layers} == {
        "tokens": EmbeddingRows,
        "places": EmbeddingRows,
        "head": KroneckerRows,
    }
    assert "checked by another backward pass for every batch" not in caplog.text
    assert not model.places._forward_pre_hooks


@pytest.mark.parametrize("zero", [False, True], ids=["", "zero-head"])
@pytest.mark.parametrize("use", [transposed, stacked])
def test_positions_that_are_not_broadcast_have_dense_rows(use: Any, zero: bool) -> None:
    """A head of zeros returns the same whatever it sees."""
    model, x = model_of(use)
    if zero:
        nn.init.zeros_(model.head.weight)  # type: ignore[arg-type]
    for _ in range(2):
        J = curvlab.jacobian(model, x)
        assert_close(J.dense(), dense_jacobian(model, x))
    assert checks_of(model).known.shared == {"places": None}


def test_a_layer_that_all_samples_share() -> None:
    """A network that makes positions from coordinates; one of its two layers has a parameter frozen."""

    class Coordinates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.body = nn.Linear(1, 4), nn.Linear(4, 3), nn.Linear(3, C)
            self.first.bias.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            places = self.second(torch.tanh(self.first(torch.linspace(-1, 1, T, dtype=x.dtype)[:, None])))
            return self.body(torch.tanh(x + places)).transpose(1, 2)

    torch.manual_seed(0)
    model, x = Coordinates().to(DOUBLE), torch.randn(N, T, 3, dtype=DOUBLE)
    J = curvlab.jacobian(model, x)
    assert_close(J.dense(), dense_jacobian(model, x))
    assert all(isinstance(layer, KroneckerRows) for layer in J.layers)


@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("use", [added, transposed])
def test_a_pass_of_the_users_own(use: Any, kind: Any) -> None:
    """A pass before the first one tells which layers all samples share."""
    model, x = model_of(use)
    training = check_passes(model, nn.CrossEntropyLoss(), x, torch.randint(C, (N, T)), kind, times=3)
    assert (training._checks.known.shared["places"] is not None) == (use is added)


def test_dropout_in_training_does_not_hide_that_positions_are_added() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Positioned(lambda: torch.arange(T), added), nn.Dropout(0.5)).to(DOUBLE).train()
    loss, x, y = nn.CrossEntropyLoss(), torch.randint(5, (N, T)), torch.randint(C, (N, T))
    training = Preconditioner(model, loss, "kfac", kl_clip=None)
    state = torch.get_rng_state()
    with training.collect():
        z = model(x)
        after = torch.get_rng_state()
        loss(z, y).backward()
    assert training._checks.known.shared["0.places"] is not None
    assert torch.equal(torch.get_rng_state(), after), "trying takes no random numbers"
    assert not torch.equal(state, after)
