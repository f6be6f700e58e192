"""Models whose parts torch treats in unusual ways: layers without samples, PReLU, checkpoints, hooks that store."""

from typing import Any

import pytest
import torch
from oracle import DOUBLE, assert_close, dense_jacobian
from torch import Tensor, nn

from curvlab import jacobian, sqrt_fisher
from curvlab.optim import Preconditioner

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
