"""Parameters that all samples share by broadcasting have the rows of every sample from one reverse pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import DOUBLE
from row_cases import check_passes
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab import jacobian, sqrt_fisher
from curvlab.fisher import KFAC
from curvlab.testing.oracle import assert_close, dense_jacobian

T, D, C = 4, 3, 2
Use = Callable[[Tensor, Tensor], Tensor]
CALLED: list[int] = []
"""Number of samples of every call of a model."""


class Bare(nn.Module):
    """Applies a bare parameter to features `[N, T, D]` between two layers."""

    def __init__(self, shape: tuple[int, ...], use: Use) -> None:
        super().__init__()
        self.first, self.p, self.last = nn.Linear(D, D), nn.Parameter(torch.randn(shape)), nn.Linear(D, C)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        CALLED.append(len(x))
        return self.last(torch.tanh(self.use(torch.tanh(self.first(x)), self.p))).transpose(1, 2)


def masked(x: Tensor) -> Tensor:
    return (torch.arange(T) < 2)[:, None].expand_as(x)


def in_front(h: Tensor, p: Tensor) -> Tensor:
    return torch.cat([p.expand(len(h), -1, -1), h[:, 1:]], dim=1)


def folded(h: Tensor, p: Tensor) -> Tensor:
    """Every position is an entry of its own."""
    return (h.flatten(0, 1) * p).view_as(h)


def twice(h: Tensor, p: Tensor) -> Tensor:
    return torch.tanh(h * p) - p


def made(h: Tensor, p: Tensor) -> Tensor:
    """What is added is made from the parameter, and looked up in it."""
    return h + torch.tanh(F.embedding(torch.tensor([0, 1, 1, 0]), p)).flip(0)


def looked_up(h: Tensor, p: Tensor) -> Tensor:
    """Positions look up one of three rows by their values, of which the first one is padding."""
    return h + F.embedding((h.detach().sum(-1) > 0).long() + (h.detach()[..., 0] > 0), p, padding_idx=0)


def product(h: Tensor, p: Tensor) -> Tensor:
    return h @ p


def linear(h: Tensor, p: Tensor) -> Tensor:
    return F.linear(h.flatten(0, 1), p[:, :D], p[:, D]).view_as(h)


SHARED: dict[str, tuple[tuple[int, ...], Use]] = {
    "added": ((1, T, D), torch.add),
    "with-a-factor": ((D,), lambda h, p: torch.add(h, p, alpha=2)),
    "subtracted": ((T, 1), torch.sub),
    "subtracted-from": ((D,), lambda h, p: p - h),
    "scale": ((D,), torch.mul),
    "scalar": ((), torch.mul),
    "where": ((D,), lambda h, p: torch.where(masked(h), p, h)),
    "where-not": ((T, D), lambda h, p: torch.where(masked(h), h, p)),
    "token": ((1, 1, D), in_front),
    "folded": ((D,), folded),
    "twice": ((D,), twice),
    "made": ((2, D), made),
    "looked-up": ((3, D), looked_up),
    "product": ((D, D), product),
    "linear": ((D, D + 1), linear),
}
OTHERWISE: dict[str, tuple[tuple[int, ...], Use]] = {
    "divided": ((D,), lambda h, p: h / (1 + p * p)),
    "normalised": ((D,), lambda h, p: F.layer_norm(h, (D,), p)),
    "both": ((D,), lambda h, p: F.layer_norm(h, (D,), p) + p),
    "across-samples": ((D,), lambda h, p: (h * p).flip(0).flip(0)),
}


@pytest.mark.parametrize("N", [1, 5, T])
@pytest.mark.parametrize("name", [*SHARED, *OTHERWISE])
def test_rows_are_those_of_the_model(name: str, N: int, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Bare(*{**SHARED, **OTHERWISE}[name]).to(DOUBLE)
    x, y, loss = torch.randn(N, T, D, dtype=DOUBLE), torch.randint(C, (N, T)), nn.CrossEntropyLoss()
    expected = dense_jacobian(model, x)
    CALLED.clear()
    J = jacobian(model, x)
    assert_close(J.dense(), expected)
    may_be_samples = name == "made" and N == T
    if N > 1 and name in SHARED and not may_be_samples:
        assert len(CALLED) == 2  # the sweep, and a pass that it is compared with
        assert "single samples" not in caplog.text
    options: Any = {"kind": "mc", "generator": torch.Generator().manual_seed(3)}
    S = sqrt_fisher(model, loss, x, y, **options).dense()
    options["generator"].manual_seed(3)
    fit = KFAC.fit(model, loss, (x, y), **options)
    at = torch.cat([torch.arange(p.numel()) + start for start, p in placed(model) if p is model.p])
    assert_close(fit.to_dense()[at[:, None], at], (S.T @ S)[at[:, None], at])


def placed(model: nn.Module) -> list[tuple[int, Tensor]]:
    found, start = [], 0
    for p in model.parameters():
        found.append((start, p))
        start += p.numel()
    return found


@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("name", ["token", "made", "linear", "looked-up", "both"])
def test_a_pass_of_the_users_own(name: str, kind: Any) -> None:
    torch.manual_seed(0)
    model = Bare(*{**SHARED, **OTHERWISE}[name]).to(DOUBLE)
    x, y = torch.randn(3, T, D, dtype=DOUBLE), torch.randint(C, (3, T))
    check_passes(model, nn.CrossEntropyLoss(), x, y, kind, times=2, rows=None if kind == "mc" else "term")


def test_tokens_leave_a_fit_with_one_row_a_sample_to_one_pass_per_batch(caplog: pytest.LogCaptureFixture) -> None:
    """The first batch is compared, later ones of its shape are not."""
    torch.manual_seed(0)
    model, loss = Bare(*SHARED["token"]).to(DOUBLE), nn.CrossEntropyLoss()
    batches = [(torch.randn(3, T, D, dtype=DOUBLE), torch.randint(C, (3, T))) for _ in range(3)]
    KFAC.fit(model, loss, batches, kind="mc", generator=torch.Generator().manual_seed(0))
    CALLED.clear()
    KFAC.fit(model, loss, batches, kind="mc", generator=torch.Generator().manual_seed(0))
    assert CALLED == [3, 3, 3]
    assert "checked by another backward pass for every batch" not in caplog.text
