"""Networks with all layers trained, beside the two-layer one of the theorems."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import isqrt

from torch import nn

from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.setting import Setting
from curvlab.nn import ACTIVATIONS, ntk_mlp
from curvlab.problems.vision import Residual, seeded
from curvlab.study import Cell


def _mlp(features: int, units: int, activation: str, *, depth: int) -> nn.Module:
    return ntk_mlp((features, *[units] * (depth - 1), 1), activation)


def _convolutional(features: int, units: int, activation: str) -> nn.Module:
    side = isqrt(features)
    if side**2 != features:
        raise ValueError(f"The convolutional network takes square images, not {features} features.")
    return nn.Sequential(
        nn.Unflatten(1, (1, side, side)),
        nn.Conv2d(1, units, 3), ACTIVATIONS[activation](),
        nn.Conv2d(units, units, 3), ACTIVATIONS[activation](),
        nn.Flatten(),
        nn.Linear(units * (side - 4) ** 2, 1),
    )  # fmt: skip


def _residual(features: int, units: int, activation: str) -> nn.Module:
    def block() -> nn.Module:
        return Residual(nn.Sequential(nn.Linear(units, units), ACTIVATIONS[activation](), nn.Linear(units, units)))

    return nn.Sequential(nn.Linear(features, units), block(), block(), nn.Linear(units, 1))


NETWORKS: Mapping[str, Callable[[int, int, str], nn.Module]] = {
    "mlp": partial(_mlp, depth=3),
    "mlp-2": partial(_mlp, depth=2),
    "mlp-6": partial(_mlp, depth=6),
    "mlp-10": partial(_mlp, depth=10),
    "convolutional": _convolutional,
    "residual": _residual,
}
"""By name, functions of the number of input features, of hidden units or channels, and of the activation, with one
output; MLPs by their number of layers."""

UNITS: Mapping[str, int] = dict.fromkeys(NETWORKS, 64) | {"convolutional": 8}
"""Hidden units or channels where a cell does not say."""

TRAINED = ("mlp", "convolutional", "residual")
"""The networks that are followed along steps."""


def network_of(setting: Setting, cell: Cell) -> nn.Module:
    """Return the network that a cell names, for the data of a setting; a ReLU network if the cell names no activation."""
    name = str(cell["network"])
    units = int(cell.coordinates.get("units", UNITS[name]))
    activation = str(cell.coordinates.get("activation", "relu"))
    build = partial(NETWORKS[name], setting.inputs.shape[1], units, activation)
    return seeded(build, int(cell["seed"]), setting.inputs.dtype).to(setting.inputs.device)


def network_setting(cell: Cell, config: Config) -> Setting:
    """Return a cell's data with the network that it names."""
    setting = Setting.of(cell, config)
    return Setting(replace(setting.problem, model=network_of(setting, cell)))
