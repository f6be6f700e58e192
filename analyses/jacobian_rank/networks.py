"""Networks with all layers trained, beside the two-layer one of the theorems."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import isqrt

import torch
from torch import Tensor, nn

from analyses.jacobian_rank.setting import Setting
from curvlab.nn import ntk_mlp
from curvlab.study import Cell

WIDTH = 64
CHANNELS = 8


class _Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.branch(x)
        return result


def _seeded(build: Callable[[int], nn.Module]) -> Callable[[int, int], nn.Module]:
    def seeded(features: int, seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return build(features)

    return seeded


def _mlp(features: int, depth: int) -> nn.Module:
    return ntk_mlp((features, *[WIDTH] * (depth - 1), 1))


def _convolutional(features: int) -> nn.Module:
    side = isqrt(features)
    if side**2 != features:
        raise ValueError(f"The convolutional network takes square images, not {features} features.")
    return nn.Sequential(
        nn.Unflatten(1, (1, side, side)),
        nn.Conv2d(1, CHANNELS, 3), nn.ReLU(),
        nn.Conv2d(CHANNELS, CHANNELS, 3), nn.ReLU(),
        nn.Flatten(),
        nn.Linear(CHANNELS * (side - 4) ** 2, 1),
    )  # fmt: skip


def _residual(features: int) -> nn.Module:
    def block() -> nn.Module:
        return _Residual(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)))

    return nn.Sequential(nn.Linear(features, WIDTH), block(), block(), nn.Linear(WIDTH, 1))


NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "mlp": _seeded(partial(_mlp, depth=3)),
    "mlp-2": _seeded(partial(_mlp, depth=2)),
    "mlp-6": _seeded(partial(_mlp, depth=6)),
    "mlp-10": _seeded(partial(_mlp, depth=10)),
    "convolutional": _seeded(_convolutional),
    "residual": _seeded(_residual),
}
"""By name, functions of the number of input features and the seed, with one output; MLPs by their number of layers."""


def network_of(setting: Setting, cell: Cell) -> nn.Module:
    """Return the network that a cell names, for the data of a setting."""
    return NETWORKS[str(cell["network"])](setting.inputs.shape[1], int(cell["seed"])).to(setting.inputs)
