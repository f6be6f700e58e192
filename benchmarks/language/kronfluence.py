"""K-FAC and EKFAC of a decoder by kronfluence (Grosse et al. 2023), called below its files and processes.

It factors `Linear` and `Conv2d`. Its metadata asks for torchvision, which it does not need here:
`pip install --no-deps kronfluence einops einconv opt-einsum accelerate`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

Compute = Callable[[], object]


def prepare(decoder: nn.Module, tokens: Tensor, targets: Tensor, *, largest: int, corrections: bool) -> Compute:
    """Return what fits the factors, and if asked for the corrections in a basis that is given.

    Args:
        decoder: the model.
        tokens: its inputs.
        targets: only their number counts, as targets are drawn.
        largest: rows of the largest factor that is formed.
        corrections: whether eigenvectors are made beforehand, and the diagonal in their basis is fitted, too.
    """
    from kronfluence.analyzer import prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
    from kronfluence.factor.eigen import fit_lambda_matrices_with_loader, perform_eigendecomposition
    from kronfluence.task import Task
    from kronfluence.utils.state import State

    class NextToken(Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(batch[0])
            drawn = torch.distributions.Categorical(logits=logits.detach()).sample() if sample else batch[1].flatten()
            return nn.functional.cross_entropy(logits, drawn, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            layers = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
            return [name for name, layer in layers.items() if max(layer.weight.shape) <= largest]

    task, state = NextToken(), State()
    model = prepare_model(decoder, task).to(tokens.device)
    loader = DataLoader(TensorDataset(tokens, targets.view(len(tokens), -1)), batch_size=len(tokens))
    options: dict[str, Any] = {"state": state, "factor_args": FactorArguments(), "disable_tqdm": True}

    def factors() -> Any:
        return fit_covariance_matrices_with_loader(model=model, task=task, loader=loader, **options)[1]

    if not corrections:
        return factors
    basis = perform_eigendecomposition(covariance_factors=factors(), model=model, **options)

    def both() -> object:
        return factors(), fit_lambda_matrices_with_loader(
            model=model, task=task, loader=loader, eigen_factors=basis, **options
        )

    return both
