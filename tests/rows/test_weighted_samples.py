"""Cross-entropy with a weight for every sample: weight 2 is a duplicated sample in every kind of rows and structure."""

from typing import Any

import pytest
import torch
from oracle import DOUBLE
from torch import nn

from curvlab import sqrt_fisher
from curvlab.fisher import KFAC, make
from curvlab.nn import WeightedCrossEntropy, gcn
from curvlab.optim import Preconditioner
from curvlab.testing.oracle import assert_close

COUNTS = torch.tensor([1, 2, 0, 3, 1])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(DOUBLE)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(5, 3, dtype=DOUBLE), torch.tensor([0, 2, 1, 1, 0])


@pytest.mark.parametrize("kind", ["exact", "ggn", "empirical"])
@pytest.mark.parametrize("key", ["full", "block-diagonal", "kfac", "diagonal"])
def test_a_weight_repeats_a_sample(kind: Any, key: str) -> None:
    model, (x, y) = network(), data()
    weighted = sqrt_fisher(model, WeightedCrossEntropy(COUNTS.to(DOUBLE)), x, y, kind)
    repeated = sqrt_fisher(
        model, nn.CrossEntropyLoss(), x.repeat_interleave(COUNTS, 0), y.repeat_interleave(COUNTS), kind
    )
    assert weighted.count == repeated.count == 7
    assert_close(make(key).update(weighted).to_dense(), make(key).update(repeated).to_dense())


def test_weights_that_do_not_fit_are_refused() -> None:
    model, (x, y) = network(), data()
    with pytest.raises(ValueError, match=r"weights of shape \(4,\) for targets of shape \(5,\)"):
        sqrt_fisher(model, WeightedCrossEntropy(torch.ones(4, dtype=DOUBLE)), x, y)
    with pytest.raises(ValueError, match="negative weights"):
        sqrt_fisher(model, WeightedCrossEntropy(-COUNTS.to(DOUBLE)), x, y)
    with pytest.raises(ValueError, match="No target carries weight"):
        sqrt_fisher(model, WeightedCrossEntropy(torch.zeros(5, dtype=DOUBLE)), x, y)


def graph_model() -> nn.Module:
    edges = torch.tensor([[0, 1, 2, 3, 4, 1], [1, 2, 3, 4, 0, 0]])
    generator = torch.Generator().manual_seed(1)
    return gcn(torch.randn(5, 3, generator=generator, dtype=DOUBLE), edges, (4, 3), generator=generator)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_graph_collects_its_whole_gradient_as_one_row(scale: float) -> None:
    """`KFAC(sharing="gradient")`: G = Σ g gᵀ/Σw with g = Σ_i w_i ∇ℓ_i at every node, whatever multiplies the loss."""
    model, y = graph_model(), torch.tensor([0, 2, 1, 1, 0])
    weights = COUNTS.to(DOUBLE)
    loss, structure = WeightedCrossEntropy(weights), KFAC(sharing="gradient", factored_damping="equal")
    preconditioner = Preconditioner(
        model, loss, structure, kind="empirical", damping=0.1, decay=0.0, graph=True, kl_clip=None
    )
    with preconditioner.collect():
        (scale * loss(model(torch.arange(5)), y)).backward()
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    gradient = torch.cat([last.weight.grad, last.bias.grad[:, None]], 1)  # type: ignore[list-item, index]
    preconditioner.precondition()
    seen: dict[str, torch.Tensor] = {}
    handle = last.register_forward_hook(lambda _, inputs, output: seen.update(a=inputs[0][0], h=output))
    summed = weights @ nn.functional.cross_entropy(model(torch.arange(5)), y, reduction="none")
    handle.remove()
    g = torch.autograd.grad(summed, seen["h"])[0][0]
    a = torch.cat([seen["a"].detach(), torch.ones(5, 1, dtype=DOUBLE)], 1)
    A, G = a.T @ a / weights.sum(), g.T @ g / weights.sum()
    root = 0.1**0.5
    inverses = [torch.linalg.inv(factor + root * torch.eye(len(factor), dtype=DOUBLE)) for factor in (G, A)]
    expected = inverses[0] @ gradient @ inverses[1]
    assert_close(torch.cat([last.weight.grad, last.bias.grad[:, None]], 1), expected)  # type: ignore[list-item, index]
    assert structure.shapes.shape == (1, 1)
