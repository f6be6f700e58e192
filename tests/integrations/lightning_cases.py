"""A module of Lightning that trains as the plain loop does; only imported where Lightning is installed."""

from typing import Any

import torch
from integration_cases import OPTIMISERS, network
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from curvlab.integrations.lightning import CollectCurvature


class Digits(LightningModule):
    """Automatic optimisation."""

    def __init__(self, optimiser: str, model: nn.Module | None = None) -> None:
        super().__init__()
        self.net, self.loss, self.optimiser, self.losses = model or network(), nn.CrossEntropyLoss(), optimiser, []

    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        value: Tensor = self.loss(self.net(x), y)
        self.losses.append(float(value.detach()))
        return value

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMISERS[self.optimiser](self.net, self.loss)


class Manual(Digits):
    """Manual optimisation; `closes` says whether the pass is in a closure."""

    def __init__(self, optimiser: str, closes: bool = False) -> None:
        super().__init__(optimiser)
        self.automatic_optimization, self.closes = False, closes

    def training_step(self, batch: Any) -> None:
        optimizer = self.optimizers()

        def closure() -> None:
            optimizer.zero_grad()
            self.manual_backward(super(Manual, self).training_step(batch))

        if self.closes:
            optimizer.step(closure)
            return
        closure()
        optimizer.step()


def trainer(**options: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    one: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "callbacks": [CollectCurvature()]}
    return Trainer(**quiet | one | options)
