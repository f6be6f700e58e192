"""Models whose parts torch treats in unusual ways: layers without samples, PReLU, checkpoints, hooks that store."""

from typing import Any

import pytest
import torch
from oracle import DOUBLE, assert_close, dense_jacobian
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from curvlab import jacobian, sqrt_fisher
from curvlab.errors import UnsupportedModel
from curvlab.optim import Preconditioner
from curvlab.spectrum import GGN, Hessian

KINDS = ["exact", "empirical", "mc"]


def fisher_of_rows(model: nn.Module, x: Tensor, kind: Any) -> None:
    """Check the rows of one kind against a dense Jacobian and the loss's own derivatives at the outputs."""
    loss, targets = nn.CrossEntropyLoss(), torch.arange(len(x)) % 3
    J = dense_jacobian(model, x).view(3, len(x), -1)
    S = sqrt_fisher(model, loss, x, targets, kind, generator=torch.Generator().manual_seed(0) if kind == "mc" else None)
    p = model(x).detach().softmax(1)
    if kind == "exact":
        H = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        expected = torch.einsum("cnp,ncd,dnq->pq", J, H, J) / len(x)
        assert_close(S.dense().T @ S.dense(), expected)
    elif kind == "empirical":
        errors = p - nn.functional.one_hot(targets, 3)
        assert_close(S.dense(), torch.einsum("nc,cnp->np", errors, J) / len(x) ** 0.5)
    else:
        drawn = [torch.einsum("nc,cnp->np", p - nn.functional.one_hot(torch.tensor(k), 3), J) for k in range(3)]
        nearest = torch.stack([(S.dense() - d / len(x) ** 0.5).norm(dim=1) for d in drawn]).min(0).values
        assert float(nearest.max()) < 1e-9


class Hyper(nn.Module):
    """A layer that makes the weight of another from a fixed embedding `[3]` or `[1, 3]`."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.make, self.embedding = nn.Linear(3, 12), nn.Parameter(torch.randn(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.make(self.embedding).view(4, 3))


@pytest.mark.parametrize("N", [1, 3, 5])
@pytest.mark.parametrize("shape", [(3,), (1, 3)])
def test_a_layer_called_on_an_embedding_without_samples(shape: tuple[int, ...], N: int) -> None:
    torch.manual_seed(0)
    model, x = Hyper(*shape).to(DOUBLE), torch.randn(N, 4, dtype=DOUBLE)
    assert_close(jacobian(model, x).dense(), dense_jacobian(model, x))
    for kind in KINDS:
        fisher_of_rows(model, x, kind)
    loss, targets = nn.CrossEntropyLoss(), torch.arange(N) % 3
    preconditioner = Preconditioner(model, loss, "full", kind="exact")
    with preconditioner.collect():
        loss(model(x), targets).backward()
    preconditioner.precondition()


class Bent(nn.Module):
    """PReLU around bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.scale, self.bend = nn.Parameter(torch.randn(4, 3)), nn.Embedding(3, 4), nn.PReLU(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bend(torch.tanh(x * self.scale(torch.arange(3)).sum(0)) @ self.mix)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("N", [2, 3])
def test_prelu_beside_dense_rows_also_of_as_many_samples_as_outputs(N: int, kind: Any) -> None:
    torch.manual_seed(0)
    model, x = Bent().to(DOUBLE), torch.randn(N, 4, dtype=DOUBLE)
    assert_close(jacobian(model, x).dense(), dense_jacobian(model, x))
    fisher_of_rows(model, x, kind)


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        inner = checkpoint(lambda h: torch.tanh(self.inner(h)), self.first(x), use_reentrant=self.reentrant)
        return self.last(inner)


@pytest.mark.parametrize("N", [1, 3])
def test_checkpoints(N: int) -> None:
    x = torch.randn(N, 4, dtype=DOUBLE)
    loss, targets = nn.CrossEntropyLoss(), torch.arange(N) % 3
    model, reentrant = (Checkpointed(reentrant=flag).to(DOUBLE) for flag in (False, True))
    J = jacobian(model, x).dense()
    plain = nn.Sequential(model.first, model.inner, nn.Tanh(), model.last)
    assert_close(J, dense_jacobian(plain, x))
    for kind in KINDS:
        fitting = {"generator": torch.Generator()} if kind == "mc" else {}
        with pytest.raises(UnsupportedModel, match=r"use_reentrant=True.*Call .*use_reentrant=False"):
            sqrt_fisher(reentrant, loss, x, targets, kind, **fitting)
    with pytest.raises(UnsupportedModel, match=r"use_reentrant=True.*Call .*use_reentrant=False"):
        jacobian(reentrant, x)
    preconditioner = Preconditioner(reentrant, loss, "full", kind="exact")
    with pytest.raises(UnsupportedModel, match=r"use_reentrant=True"), preconditioner.collect():
        loss(reentrant(x), targets).backward()


def test_what_hooks_store_can_be_used_afterwards() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.scale, self.last = nn.Linear(4, 5), nn.Parameter(torch.randn(5)), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x) * self.scale))

    model, x, stored = Scaled().to(DOUBLE), torch.randn(3, 4, dtype=DOUBLE), []
    J = dense_jacobian(model, x)
    model.first.register_forward_hook(lambda _, __, y: stored.append(y.detach()))
    model.last.register_forward_pre_hook(lambda _, args: stored.append(args[0] * 1))
    assert_close(jacobian(model, x).dense(), J)
    loss, targets = nn.CrossEntropyLoss(), torch.arange(3)
    preconditioner = Preconditioner(model, loss, "full", kind="exact")
    with preconditioner.collect():
        loss(model(x), targets).backward()
    assert stored
    assert all(bool(kept.detach().sum().isfinite()) for kept in stored)


class Gated(nn.Module):
    """Layers, a bare parameter and a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale, self.norm, self.last = (
            nn.Linear(4, 5),
            nn.Parameter(torch.randn(5)),
            nn.LayerNorm(5),
            nn.Linear(5, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.norm(torch.tanh(self.first(x)) * self.scale))
        return out


@pytest.fixture(scope="module")
def exported() -> tuple[nn.Module, nn.Module, nn.Module]:
    """A model, what it is exported to for any number of samples, and for five."""
    torch.manual_seed(0)
    model, x = Gated().to(DOUBLE), torch.randn(5, 4, dtype=DOUBLE)
    free = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("N")},)).module()
    return model, free, torch.export.export(model, (x,)).module()


def test_exported_models(exported: tuple[nn.Module, nn.Module, nn.Module]) -> None:
    model, free, fixed = exported
    x, y, loss = torch.randn(5, 4, dtype=DOUBLE), torch.tensor([0, 1, 2, 0, 1]), nn.CrossEntropyLoss()
    J = dense_jacobian(model, x)
    assert_close(jacobian(free, x).dense(), J)
    for kind in KINDS:
        fisher_of_rows(free, x, kind)
    S = sqrt_fisher(model, loss, x, y).dense()
    for made in (free, fixed):
        assert_close(GGN(made, loss, (x, y)).to_dense(), S.T @ S)
        assert_close(Hessian(made, loss, (x, y)).to_dense(), Hessian(model, loss, (x, y)).to_dense())
    preconditioner = Preconditioner(free, loss, "full", kind="exact", damping=0.1)
    with preconditioner.collect():
        loss(free(x), y).backward()
    gradient = torch.cat([p.grad.flatten() for p in free.parameters()])
    preconditioner.precondition()
    expected = torch.linalg.solve(S.T @ S + 0.1 * torch.eye(S.shape[1], dtype=DOUBLE), gradient)
    assert_close(torch.cat([p.grad.flatten() for p in free.parameters()]), expected, 1e-8)


def test_models_exported_for_one_number_of_samples_are_told_the_remedy(
    exported: tuple[nn.Module, nn.Module, nn.Module],
) -> None:
    fixed = exported[2]
    x, y, loss = torch.randn(5, 4, dtype=DOUBLE), torch.tensor([0, 1, 2, 0, 1]), nn.CrossEntropyLoss()
    remedy = r"first.weight.* single samples.*dynamic_shapes=\(\{0: torch.export.Dim\('N'\)\},\)"
    with pytest.raises(UnsupportedModel, match=remedy):
        jacobian(fixed, x)
    with pytest.raises(UnsupportedModel, match=remedy):
        sqrt_fisher(fixed, loss, x, y)
    preconditioner = Preconditioner(fixed, loss, "kfac", kind="exact")
    with pytest.raises(UnsupportedModel, match=remedy), preconditioner.collect():
        loss(fixed(x), y).backward()
