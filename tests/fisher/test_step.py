"""Steps of natural gradient against the dense pseudo-inverse, and on models where one step is enough."""

import copy

import pytest
import torch
from oracle import DOUBLE, LOSSES, LossCase
from torch import Tensor, nn

from curvlab.fisher import KFAC, BlockDiagonal, Diagonal, Full, UnitWise, natural_gradient_step
from curvlab.nn import HalfSquaredError
from curvlab.testing.oracle import assert_close, dense_ggn, dense_jacobian


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def flat(step: dict[str, Tensor]) -> Tensor:
    return torch.cat([entry.flatten() for entry in step.values()])


@pytest.mark.parametrize("damping", [0.1, 1e-6])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", LOSSES, ids=lambda case: case.name)
def test_a_damped_step_is_the_dense_solve(case: LossCase, reduction: str, damping: float) -> None:
    model, inputs = network(), torch.randn(5, 4, dtype=DOUBLE)
    z = model(inputs).detach()
    loss, targets = case.make(z, reduction)
    before = copy.deepcopy(model.state_dict())
    step = natural_gradient_step(Full(), model, loss, inputs, targets, damping=damping)
    gradient = torch.autograd.grad(loss(model(inputs), targets), list(model.parameters()))
    F = dense_ggn(dense_jacobian(model, inputs), loss, z, targets)
    expected = torch.linalg.solve(F + damping * torch.eye(len(F), dtype=DOUBLE), flat(dict(enumerate(gradient))))
    assert_close(flat(step), expected, 1e-8)
    assert list(step) == [name for name, _ in model.named_parameters()]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("structure", [Full, BlockDiagonal, UnitWise, KFAC])
def test_one_step_solves_a_linear_model(structure: type, reduction: str) -> None:
    """More parameters than samples, one layer and one output: every one of these structures is exact or equal to it."""
    model = nn.Linear(9, 1, bias=False).double()
    inputs, targets = torch.randn(6, 9, dtype=DOUBLE), torch.randn(6, 1, dtype=DOUBLE)
    step = natural_gradient_step(structure(), model, HalfSquaredError(reduction), inputs, targets)
    with torch.no_grad():
        model.weight -= step["weight"]
    assert_close(model(inputs).detach(), targets, 1e-10)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_in_the_metric_of_the_outputs_a_step_is_gradient_descent_on_them(reduction: str) -> None:
    """For any loss, here one that no Fisher matrix is known of: u moves by −η ∇_u of the summed loss."""

    class Curved(nn.Module):
        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            terms = torch.nn.functional.softplus(-y * z) + 0.1 * z.square()
            return terms.mean() if reduction == "mean" else terms.sum()

    model = nn.Linear(9, 1, bias=False).double()
    inputs, targets = torch.randn(6, 9, dtype=DOUBLE), torch.randn(6, 1, dtype=DOUBLE).sign()
    z = model(inputs)
    u = z.detach().requires_grad_()
    (slope,) = torch.autograd.grad(Curved()(u, targets) * (6 if reduction == "mean" else 1), u)
    metric = HalfSquaredError(reduction)
    step = natural_gradient_step(Full(), model, Curved(), inputs, targets, metric=metric)
    with torch.no_grad():
        model.weight -= 0.3 * step["weight"]
        assert_close(model(inputs), z - 0.3 * slope, 1e-10)


def test_another_structure_gives_another_step() -> None:
    model, inputs, targets = network(), torch.randn(5, 4, dtype=DOUBLE), torch.randn(5, 3, dtype=DOUBLE)
    full, diagonal = (
        flat(natural_gradient_step(structure(), model, nn.MSELoss(), inputs, targets, damping="rel:1e-3"))
        for structure in (Full, Diagonal)
    )
    assert float(torch.cosine_similarity(full, diagonal, dim=0)) < 0.9


def test_a_structured_output_is_picked() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2).double()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.layer(x), "other": x}

    model, inputs, labels = Named(), torch.randn(5, 4, dtype=DOUBLE), torch.randint(0, 2, (5,))
    step = natural_gradient_step(
        Full(), model, nn.CrossEntropyLoss(), inputs, labels, damping=0.1, output=lambda result: result["logits"]
    )
    plain = natural_gradient_step(Full(), model.layer, nn.CrossEntropyLoss(), inputs, labels, damping=0.1)
    assert_close(flat(step), flat(plain))
