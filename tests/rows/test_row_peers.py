"""Rows against other libraries, where they compute the same matrix."""

import curvlinops
import nngeometry.metrics
import pytest
import torch
from backpack import backpack, extend
from backpack.extensions import SqrtGGNExact
from nngeometry.gram import GramMatrix
from nngeometry.object import PMatDense
from oracle import architecture, chain, loss_case, ramp, vectors
from row_cases import fisher
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvlab.rows import jacobian, sqrt_fisher
from curvlab.testing.oracle import assert_close, outputs

NETWORKS = ["mlp", "conv2d", "batchnorm1d", "residual", "frozen-weight"]
OUTER = ["mse-mean", "mse-sum", "ce-mean", "ce-sum", "ce-smooth-mean", "ce-weights-sum", "bce-mean", "bce-sum"]


def dense(operator: curvlinops.GGNLinearOperator | curvlinops.EFLinearOperator) -> Tensor:
    return operator @ torch.eye(operator.shape[1], dtype=torch.float64)


def parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("loss_name", OUTER)
@pytest.mark.parametrize("network", NETWORKS)
def test_curvlinops_ggn(network: str, loss_name: str) -> None:
    model, x = architecture(network).make(N=3)
    name, _, reduction = loss_name.rpartition("-")
    loss, y = loss_case(name).make(outputs(model, x), reduction)
    operator = curvlinops.GGNLinearOperator(model, loss, parameters(model), [(x, y)])
    assert_close(fisher(sqrt_fisher(model, loss, x, y)), dense(operator))


@pytest.mark.parametrize("network", ["mlp", "residual"])
@pytest.mark.parametrize("loss_name", ["mse-sum", "mse-mean", "ce-mean", "ce-sum", "ce-smooth-mean", "bce-sum"])
def test_curvlinops_empirical_fisher(network: str, loss_name: str) -> None:
    model, x = architecture(network).make(N=3)
    name, _, reduction = loss_name.rpartition("-")
    loss, y = loss_case(name).make(outputs(model, x), reduction)
    operator = curvlinops.EFLinearOperator(model, loss, parameters(model), [(x, y)])
    assert_close(fisher(sqrt_fisher(model, loss, x, y, "empirical")), dense(operator))


@pytest.mark.parametrize("network", ["mlp", "conv2d", "batchnorm1d"])
def test_nngeometry(network: str) -> None:
    model, x = architecture(network).make(N=4)
    loader = DataLoader(TensorDataset(x), batch_size=4)
    gram = GramMatrix(model, loader, function=lambda batch: model(batch)).data
    V, N = gram.shape[:2]
    single = 1e-6  # nngeometry sums some layers in float32
    assert_close(jacobian(model, x).gram(), gram.reshape(V * N, V * N), single)
    regression = nngeometry.metrics.FIM(model, loader, PMatDense, variant="regression", function=lambda d: model(d))
    half, y = loss_case("half").make(outputs(model, x), "mean")
    rows = sqrt_fisher(model, half, x, y)
    assert_close(fisher(rows), regression.to_torch(), single)


@pytest.mark.parametrize(("network", "loss_name"), [("mlp", "ce"), ("conv2d", "ce"), ("mlp", "mse"), ("ntk", "mse")])
def test_backpack_materialised_rows(network: str, loss_name: str) -> None:
    if network == "ntk":
        model, x = chain(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3)).double(), vectors(4)(3)
    else:
        model, x = architecture(network).make(N=3)
    loss, y = loss_case(loss_name).make(outputs(model, x), "mean")
    rows = sqrt_fisher(model, loss, x, y)
    extended, extended_loss = extend(model), extend(loss)
    with backpack(SqrtGGNExact()):
        extended_loss(extended(x), y).backward()
    blocks = [p.sqrt_ggn_exact.flatten(2).flatten(0, 1) for p in model.parameters()]
    theirs = torch.cat(blocks, dim=1)
    assert_close(fisher(rows), theirs.T @ theirs)


def test_weights_are_where_peers_disagree() -> None:
    """Peers average class-weighted terms over N; the loss itself divides by the sum of the weights."""
    model, x = architecture("mlp").make(N=3)
    y = torch.tensor([0, 1, 1])
    loss = nn.CrossEntropyLoss(ramp(3))
    rows = sqrt_fisher(model, loss, x, y)
    assert rows.count == 2.5
    assert_close(fisher(rows), fisher(sqrt_fisher(model, nn.CrossEntropyLoss(ramp(3), reduction="sum"), x, y)) / 2.5)
