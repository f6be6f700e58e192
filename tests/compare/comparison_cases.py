"""What comparisons are tested on: a small network, and losses with their targets."""

import torch
from torch import nn

from curvlab.nn import HalfSquaredError


def small_model(width: int = 40) -> nn.Sequential:
    """Return a network with ten inputs and three outputs, always the same."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(10, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3)
    ).double()


X = torch.randn(12, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
LOSSES = {
    "mse": (nn.MSELoss(), Y),
    "half": (HalfSquaredError(), Y),
    "sum": (nn.MSELoss(reduction="sum"), torch.zeros(12, 3, dtype=torch.float64)),
    "cross-entropy": (nn.CrossEntropyLoss(label_smoothing=0.1), torch.arange(12) % 3),
    "bce": (nn.BCEWithLogitsLoss(), (torch.arange(36) % 2).double().view(12, 3)),
}
