"""What matrix-free operators refuse, and what they say."""

from typing import Any

import pytest
import torch
from operator_cases import network, samples
from oracle import DOUBLE, chain, mlp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvlab.errors import UnsupportedModel
from curvlab.nn import HalfSquaredError
from curvlab.spectrum import GGN, Fisher, Hessian


@pytest.mark.usefixtures("unchecked_types")
class TestErrors:
    LOSS = nn.CrossEntropyLoss()

    @pytest.mark.parametrize("kind", [Hessian, GGN])
    def test_random_models(self, kind: Any) -> None:
        model, data = chain(*network(), nn.Dropout(0.5)).train(), samples(6)
        with pytest.raises(UnsupportedModel, match=r"differ by .*Dropout '3' in training mode: call model\.eval\(\)"):
            kind(model, self.LOSS, data)
        kind(model.eval(), self.LOSS, data)

    def test_shuffled_batches_that_matter(self) -> None:
        model = chain(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
        loader = DataLoader(TensorDataset(*samples(8)), batch_size=4, shuffle=True)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            with pytest.raises(UnsupportedModel, match=r"BatchNorm1d '1' in training mode.*The loader shuffles"):
                Hessian(model, self.LOSS, loader)

    def test_random_otherwise(self) -> None:
        model = network()
        with pytest.raises(UnsupportedModel, match="Model, loss or data are random, or keep a state"):
            Hessian(model, lambda z, y: self.LOSS(z, y) * torch.rand(()), samples(5))

    @pytest.mark.parametrize("kind", [Hessian, Fisher])
    def test_data(self, kind: Any) -> None:
        x, y = samples(6)
        with pytest.raises(ValueError, match="The data hold no batch"):
            kind(network(), self.LOSS, [])
        with pytest.raises(ValueError, match=r"The data are a generator, which can be passed once only.*list\(…\)"):
            kind(network(), self.LOSS, (pair for pair in [(x, y)]))
        with pytest.raises(ValueError, match="zero samples"):
            kind(network(), self.LOSS, (x[:0], y[:0]))
        bad = x.clone()
        bad[2, 1] = torch.nan
        with pytest.raises(ValueError, match="first at sample 2"):
            kind(network(), self.LOSS, (bad, y))

    def test_a_batch_that_is_no_pair(self) -> None:
        with pytest.raises(ValueError, match=r"A batch is a pair \(inputs, targets\), got a Tensor"):
            Hessian(network(), nn.MSELoss(), [samples(3)[0]])

    def test_derivatives_that_are_not_finite(self) -> None:
        model, x = nn.Linear(4, 3, bias=False).double(), torch.zeros(2, 4, dtype=DOUBLE)
        with pytest.raises(ValueError, match=r"The gradient of weight is not finite, although the loss is"):
            Hessian(model, lambda z, y: (z - y).norm(dim=1).sqrt().sum(), (x, torch.zeros(2, 3, dtype=DOUBLE)))

    def test_losses(self) -> None:
        x, y = samples(6)
        with pytest.raises(ValueError, match="CrossEntropyLoss returns no scalar"):
            Hessian(network(), nn.CrossEntropyLoss(reduction="none"), (x, y))
        batches = [(x[:3], y[:3]), (x[3:], y[3:])]
        with pytest.raises(ValueError, match=r"cross_entropy does not say how several batches merge\. Give it an attr"):
            Hessian(network(), nn.functional.cross_entropy, batches)

        class Uneven(nn.Module):
            reduction = "mean"

            def forward(self, z: Tensor, y: Tensor) -> Tensor:
                return (z - y).square().mean() if self.reduction == "mean" else (z - y).pow(4).sum()

        zeros = [(a, torch.zeros(3, 3, dtype=DOUBLE)) for a, _ in batches]
        with pytest.raises(ValueError, match="The divisor of Uneven on a batch cannot be told"):
            Hessian(nn.Linear(4, 3, bias=False).double(), Uneven(), zeros)

    def test_models_without_trainable_parameters(self) -> None:
        with pytest.raises(UnsupportedModel, match="no trainable parameter"):
            Hessian(mlp().requires_grad_(False), self.LOSS, samples(3))

    def test_options(self) -> None:
        with pytest.raises(ValueError, match="chunk_size is a number of vectors"):
            Hessian(network(), self.LOSS, samples(3), chunk_size=0)
        with pytest.raises(ValueError, match=r"pass generator=torch\.Generator"):
            Fisher(network(), self.LOSS, samples(3), kind="mc")
        with pytest.raises(ValueError, match="Unknown kind 'empirial'"):
            Fisher(network(), HalfSquaredError(), samples(3), kind="empirial")
