"""Cases in which other libraries are known to give wrong numbers without a word."""

from typing import Any

import pytest
import torch
from oracle import DOUBLE, architecture, mlp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvlab
from curvlab.fisher import STRUCTURES, Full
from curvlab.nn import Scaled
from curvlab.rows import sqrt_fisher
from curvlab.rows.collect import Collector
from curvlab.rows.owners import owners_of
from curvlab.rows.passes import Pass
from curvlab.spectrum import GGN
from curvlab.testing.oracle import assert_close, dense_ggn, dense_jacobian, outputs

WEIGHTS = torch.tensor([0.5, 1.0, 3.0], dtype=DOUBLE)
LABELS = torch.tensor([0, 2, 2, 1, -1, 2, 0, -1, 1, 1, -1])


def network() -> tuple[nn.Module, Tensor]:
    return architecture("mlp").make(N=11)


def reference(loss: nn.Module, N: int = 11) -> Tensor:
    """Return the GGN of the loss on the first samples at once, by automatic differentiation."""
    model, x = network()
    return dense_ggn(dense_jacobian(model, x[:N]), loss, outputs(model, x[:N]), LABELS[:N])


LOSSES = {
    "plain": nn.CrossEntropyLoss(ignore_index=-1),
    "class weights": nn.CrossEntropyLoss(WEIGHTS, ignore_index=-1),
    "smoothed": nn.CrossEntropyLoss(WEIGHTS, ignore_index=-1, label_smoothing=0.1),
    "twice": Scaled(nn.CrossEntropyLoss(WEIGHTS, ignore_index=-1), 2.0),
}


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_means_over_batches_of_different_weight(name: str, drop_last: bool) -> None:
    """A mean of batch means is wrong where batches hold different numbers, weights or ignored targets.

    Under `drop_last`, `len(dataset)` is wrong as a divisor, too.
    """
    model, x = network()
    loss = LOSSES[name]
    loader = DataLoader(TensorDataset(x, LABELS), batch_size=4, drop_last=drop_last)
    expected = reference(loss, 8 if drop_last else 11)
    assert_close(Full.fit(model, loss, loader).to_dense(), expected)
    assert_close(GGN(model, loss, loader).to_dense(), expected)
    naive = torch.stack([dense_ggn(dense_jacobian(model, a), loss, outputs(model, a), b) for a, b in loader]).mean(0)
    assert float((naive - expected).norm()) > 0.01 * float(expected.norm())


@pytest.mark.parametrize("engine", ["backpack", "autograd"])
def test_a_scaled_loss_scales_the_curvature(engine: Any) -> None:
    """Hooks on a loss module do not see what multiplies it afterwards."""
    model, x = network()
    twice = reference(LOSSES["twice"])
    assert_close(twice, 2 * reference(LOSSES["class weights"]))
    S = sqrt_fisher(model, LOSSES["twice"], x, LABELS, engine=engine).dense()
    assert_close(S.T @ S, twice)


def test_a_factor_outside_the_loss_module_is_part_of_the_gradient_only() -> None:
    """In a training step `(2 * loss).backward()`: the rows are those of the loss that was given, and Sᵀc the gradient."""
    model, x = network()
    loss = LOSSES["class weights"]
    with Collector(model, loss, owners_of(model), Pass("exact")) as found:
        (2 * loss(model(x), LABELS)).backward()
    assert found.rows is not None
    assert found.coefficients is not None
    S = found.rows.dense()
    assert_close(S.T @ S, reference(loss))
    assert_close(
        found.coefficients @ S, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    )


@pytest.mark.parametrize(
    "key", [key for key in STRUCTURES if key not in ("adaptive-inverse", "input-side")]
)  # an identity and inputs do not scale
def test_structures_scale_with_the_loss(key: str) -> None:
    model, x = network()
    once, twice = (STRUCTURES[key].fit(model, LOSSES[name], (x, LABELS)) for name in ("class weights", "twice"))
    assert_close(twice.to_dense(), 2 * once.to_dense(), 1e-9)


def test_a_reused_layer() -> None:
    """Rows of the last call alone are wrong."""
    model, x = architecture("reused").make(N=4)
    loss, y = nn.CrossEntropyLoss(), torch.tensor([0, 1, 2, 0])
    S = sqrt_fisher(model, loss, x, y).dense()
    assert_close(S.T @ S, dense_ggn(dense_jacobian(model, x), loss, outputs(model, x), y))


def test_the_model_works_as_before() -> None:
    """No hook is left that breaks `torch.func`, and the mode is the user's."""
    model, x = mlp().double().train(), torch.randn(4, 4, dtype=DOUBLE)
    before = torch.func.vmap(torch.func.jacrev(model))(x)
    curvlab.jacobian(model, x, engine="backpack")
    assert torch.equal(torch.func.vmap(torch.func.jacrev(model))(x), before)
    assert model.training
