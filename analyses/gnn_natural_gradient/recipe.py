"""What a run is trained with: the one table of hyper-parameters, published values first, written before any run."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from curvlab.rows.loss import Kind

Optimiser = Literal["sgd", "adam"]


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of a run; the defaults are the published ones of Adam with K-FAC.

    Attributes:
        optimiser: SGD with momentum 0.9, or Adam.
        kfac: whether gradients are preconditioned.
        lr: learning rate.
        weight_decay: L2 term, added after the preconditioning.
        epsilon: damping ε, of which each factor gets the root.
        refresh: epochs from one curvature to the next.
        gamma: power of the schedule λ = (e/E)^γ; None for λ = 0.
        in_loss: whether λ weighs the predicted labels of unlabelled nodes in the loss.
        in_fisher: whether it weighs them in the number of nodes n by which factors are divided.
        width: hidden units.
        aggregated: whether layers see aggregated inputs, ÂX, or their outputs are aggregated.
        kind: rows of the Fisher matrix: of the given labels, or `mc`, of labels drawn from the model.
    """

    optimiser: Optimiser = "adam"
    kfac: bool = True
    lr: float = 0.01
    weight_decay: float = 5e-4
    epsilon: float = 0.01
    refresh: int = 50
    gamma: float | None = None
    in_loss: bool = True
    in_fisher: bool = True
    width: int = 16
    aggregated: bool = True
    kind: Kind = "empirical"

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in asdict(self).items())


@dataclass(frozen=True)
class Method:
    """A method that is tuned.

    Attributes:
        title: in words.
        recipes: configurations in the order in which they are tried, the published one first.
    """

    title: str
    recipes: tuple[Recipe, ...]


def _grid(base: Recipe, first: str, second: str, *values: tuple[float, float]) -> tuple[Recipe, ...]:
    options: list[dict[str, Any]] = [{first: a, second: b} for a, b in values]
    return tuple(replace(base, **point) for point in options)


SGD = Recipe("sgd", weight_decay=0.0)
ADAM = Recipe("adam")

METHODS: Mapping[str, Method] = {
    "sgd": Method(
        "SGD",
        _grid(
            replace(SGD, kfac=False), "lr", "weight_decay",
            (0.01, 0.0), (0.1, 0.0), (1.0, 0.0), (0.1, 5e-4), (1.0, 5e-4), (0.3, 5e-4), (0.3, 0.0), (0.03, 0.0),
        ),
    ),
    "sgd-kfac": Method(
        "SGD, K-FAC",
        _grid(
            SGD, "lr", "epsilon",
            (0.01, 0.01), (0.001, 0.01), (0.01, 0.1), (0.1, 0.1), (0.1, 1.0), (0.01, 1.0), (0.001, 0.001), (0.03, 0.1),
        ),
    ),
    "adam": Method(
        "Adam",
        _grid(
            replace(ADAM, kfac=False), "lr", "weight_decay",
            (0.01, 5e-4), (0.003, 5e-4), (0.03, 5e-4), (0.01, 5e-3), (0.03, 5e-3), (0.1, 5e-4), (0.003, 5e-3), (0.01, 5e-5),
        ),
    ),
    "adam-kfac": Method(
        "Adam, K-FAC",
        _grid(
            ADAM, "lr", "epsilon",
            (0.01, 0.01), (0.01, 0.1), (0.01, 1.0), (0.003, 0.1), (0.03, 0.1), (0.003, 0.01), (0.03, 0.01), (0.01, 0.001),
        ),
    ),
}  # fmt: skip
"""Every method by name; all have as many configurations."""

CONFIGURATIONS = min(len(method.recipes) for method in METHODS.values())
"""The most configurations that every method has."""
