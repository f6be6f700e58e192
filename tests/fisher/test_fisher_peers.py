"""curvlinops and nngeometry as further oracles, where their conventions can be matched."""

import pytest
import torch
from fisher_cases import draw, perceptron, rows_of
from oracle import DOUBLE
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvlab.fisher as cf
from curvlab.nn import HalfSquaredError
from curvlab.testing.oracle import assert_close

curvlinops = pytest.importorskip("curvlinops")
metrics = pytest.importorskip("nngeometry.metrics")
pspace = pytest.importorskip("nngeometry.object.pspace")


class Pooled(nn.Module):
    """Linear layers on positions, then their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)).mean(1))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
    )


NETWORKS = {
    "mlp": lambda: (perceptron().double(), draw(4, 4)),
    "conv": lambda: (convolutional().double(), draw(4, 2, 6, 6)),
    "pooled": lambda: (Pooled().double(), draw(4, 5, 3)),
}
LOSSES = {
    "ce": (nn.CrossEntropyLoss(), torch.tensor([0, 1, 2, 0])),
    "ce-sum": (nn.CrossEntropyLoss(reduction="sum"), torch.tensor([0, 1, 2, 0])),
    "mse": (nn.MSELoss(), draw(4, 3)),
    "bce": (nn.BCEWithLogitsLoss(), torch.tensor([[0.0, 1.0, 1.0]] * 4, dtype=DOUBLE)),
}


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("network", NETWORKS)
def test_curvlinops(network: str, loss: str, kind: str) -> None:
    model, x = NETWORKS[network]()
    module, y = LOSSES[loss]
    parameters, data = list(model.parameters()), [(x, y)]
    rows = rows_of(model, module, x, y, kind)
    identity = torch.eye(rows.P, dtype=DOUBLE)
    if kind == "exact":
        ggn = curvlinops.GGNLinearOperator(model, module, parameters, data, check_deterministic=False)
        assert_close(cf.Full().update(rows).to_dense(), (ggn @ identity).detach())
    for sharing in ("expand", "reduce"):
        for theirs, ours in ((curvlinops.KFACLinearOperator, cf.KFAC), (curvlinops.EKFACLinearOperator, cf.EKFAC)):
            operator = theirs(
                model,
                module,
                parameters,
                data,
                fisher_type={"exact": "type-2", "empirical": "empirical"}[kind],
                kfac_approx=sharing,
                separate_weight_and_bias=False,
                check_deterministic=False,
            )
            expected, got = (operator @ identity).detach(), ours(sharing=sharing).update(rows)
            assert got.trace() == pytest.approx(float(expected.trace()))
            # EKFAC with reduced factors is not zero on their null space, where a basis is anybody's choice.
            if (network, sharing, ours) != ("conv", "reduce", cf.EKFAC):
                assert_close(got.to_dense(), expected, 1e-9)


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_nngeometry(network: str) -> None:
    """Its buffers are in single precision in places."""
    model, x = NETWORKS[network]()
    y = draw(4, 3)
    rows = rows_of(model, HalfSquaredError(), x, y)
    for representation, key in (
        (pspace.PMatDense, "full"),
        (pspace.PMatBlockDiag, "block-diagonal"),
        (pspace.PMatDiag, "diagonal"),
        (pspace.PMatKFAC, "kfac"),
        (pspace.PMatEKFAC, "ekfac"),
    ):
        loader = DataLoader(TensorDataset(x, y), batch_size=4)
        matrix = metrics.FIM(model, loader, representation, variant="regression")
        if key == "ekfac":
            matrix.update_diag(loader)
        assert_close(cf.make(key).update(rows).to_dense(), matrix.to_torch(), 1e-6)
