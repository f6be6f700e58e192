"""Batches in which no target counts, or the loss is flat."""

import pytest
import torch
from oracle import DOUBLE, architecture
from row_cases import Skipping, fisher
from torch import Tensor, nn
from torch.nn import functional as F

import curvlab
from curvlab.errors import Weightless
from curvlab.fisher import KFAC, Full
from curvlab.nn import PerSample
from curvlab.optim import Preconditioner
from curvlab.rows import merge, sqrt_fisher
from curvlab.rows.collect import Collector
from curvlab.rows.loss import loss_terms
from curvlab.rows.owners import owners_of
from curvlab.rows.passes import Pass
from curvlab.rows.streamed import bytes_of
from curvlab.spectrum import GGN
from curvlab.testing.oracle import assert_close, dense_ggn, dense_jacobian, outputs


class Masked(nn.Module):
    """A mean over samples whose target is not negative, as a user would write it."""

    def __init__(self, reduction: str, *, least: int = 0, weighed: bool = False) -> None:
        super().__init__()
        self.reduction, self.least, self.weighed = reduction, least, weighed

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        counts = y >= 0
        if self.weighed:
            total = (F.cross_entropy(z, y.clamp(min=0), reduction="none") * counts).sum()
        else:
            total = F.cross_entropy(z[counts], y[counts], reduction="sum")
        return total / counts.sum().clamp(min=self.least) if self.reduction == "mean" else total


OWN_MEANS = [
    Masked("mean"),
    Masked("mean", least=1),
    Masked("mean", weighed=True),
    Masked("mean", least=1, weighed=True),
    Skipping(ignore_index=-1),
]


@pytest.mark.parametrize("loss", OWN_MEANS)
def test_a_mean_over_no_targets_has_no_weight(loss: nn.Module) -> None:
    model, x = architecture("mlp").make(N=6)
    none, some = torch.full((3,), -1), torch.tensor([0, -1, 2])
    for kind in ("ggn", "empirical"):
        with pytest.raises(Weightless, match="No target carries weight"):
            sqrt_fisher(model, loss, x[:3], none, kind)
        with pytest.raises(Weightless), Collector(model, loss, owners_of(model), Pass(kind)):
            loss(model(x[:3]), none)
    z, J = outputs(model, x), dense_jacobian(model, x)
    expected = dense_ggn(J, nn.CrossEntropyLoss(ignore_index=-1), z, torch.cat([none, some]))
    batches = [(x[:3], none), (x[3:], some)]
    v = torch.randn(J.shape[1], dtype=DOUBLE)
    for structure in (Full, KFAC):
        alone = structure.fit(model, loss, batches[1:], kind="ggn")
        assert_close(structure.fit(model, loss, batches, kind="ggn").matvec(v), alone.matvec(v))
    assert_close(GGN(model, loss, batches).to_dense(), expected, 1e-9)
    data, S = (x, torch.cat([none, some])), sqrt_fisher(model, loss, x, torch.cat([none, some]), "ggn")
    memory = 16 * -(-bytes_of(S) // 6)
    streamed = curvlab.gram(model, data, loss=loss, kind="ggn", memory=memory)
    assert_close(torch.linalg.eigvalsh(streamed), torch.linalg.eigvalsh(S.gram()), 1e-9)


def test_training_steps_over_no_targets_are_weightless_or_finite() -> None:
    """The step is refused by name, and the next one goes on."""
    model, x = architecture("mlp").make(N=3)
    for kind in ("ggn", "empirical"):
        loss = Masked("mean", least=1)
        preconditioner = Preconditioner(model, loss, "kfac", kind=kind, damping=0.1, kl_clip=None)  # type: ignore[arg-type]
        for y in (torch.tensor([0, -1, 2]), torch.full((3,), -1), torch.tensor([1, 1, -1])):
            model.zero_grad()
            if not bool((y >= 0).any()):
                with pytest.raises(Weightless), preconditioner.collect():
                    loss(model(x), y).backward()
                continue
            with preconditioner.collect():
                loss(model(x), y).backward()
            preconditioner.precondition()
            assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_a_loss_that_is_flat_where_the_outputs_are_keeps_its_divisor() -> None:
    """All residuals are within the tolerance: the batch has no curvature, but counts when means merge."""

    def tolerant(z: Tensor, y: Tensor) -> Tensor:
        return ((z - y).abs() - 0.5).relu().square().sum(1)

    model, x = architecture("mlp").make(N=4)
    loss, y = PerSample(tolerant), outputs(model, x).clone()
    y[3] += 2.0
    assert loss_terms(loss, outputs(model, x)[:3], y[:3]).count == pytest.approx(3)
    whole = GGN(model, loss, (x, y)).to_dense()
    assert_close(GGN(model, loss, [(x[:3], y[:3]), (x[3:], y[3:])]).to_dense(), whole)
    halves = [sqrt_fisher(model, loss, x[n], y[n], "empirical") for n in (slice(3), slice(3, 4))]
    assert_close(fisher(merge(halves)), fisher(sqrt_fisher(model, loss, x, y, "empirical")))
