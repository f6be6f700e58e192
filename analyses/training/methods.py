"""The optimisers that are compared, and the configurations that each is tuned over: the one table, written before any run.

The configurations were laid around what trains the MLP on digits from one start, the tuning seed, for every method alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from curvlab.fisher import KFAC, STRUCTURES, LayerWise, Structure, make
from curvlab.optim import LevenbergMarquardt, NaturalGradient
from curvlab.rows.loss import Kind

Point = Mapping[str, float]
"""One configuration: hyper-parameters by name."""

Family = Literal["first order", "structure", "ingredient"]

KL_CLIP = 1e-2
"""Bound of the trust region where there is one."""
INVERT_EVERY = 10
PASSES = 4
"""Batches of a step where it has several."""


class Closure(Protocol):
    """Runs a forward and a backward pass on a batch and returns the loss."""

    def __call__(self, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """With a scaler, the forward pass is under autocast and gradients are scaled."""


class Optimiser(Protocol):
    """What a run asks of an optimiser."""

    @property
    def step(self) -> Callable[..., Any]:
        """What takes a step, given a closure for each batch of the step, and returns their mean loss."""

    def state_dict(self) -> dict[str, Any]:
        """Return what continues the run."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a run."""


class Together:
    """Optimisers that share the parameters of a model out among them."""

    def __init__(self, *optimisers: torch.optim.Optimizer) -> None:
        self.optimisers = optimisers

    def step(self, closure: Closure) -> Tensor:
        """Run the closure once, then step each."""
        loss = closure()
        for optimiser in self.optimisers:
            optimiser.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return all states."""
        return {str(index): optimiser.state_dict() for index, optimiser in enumerate(self.optimisers)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore all states."""
        for index, optimiser in enumerate(self.optimisers):
            optimiser.load_state_dict(state_dict[str(index)])


class Accumulating:
    """Natural gradient on several passes a step: gradients and curvature are means over all of them."""

    def __init__(self, optimiser: NaturalGradient) -> None:
        self.optimiser = optimiser
        self.state_dict, self.load_state_dict = optimiser.state_dict, optimiser.load_state_dict

    def step(self, *closures: Closure) -> Tensor:
        """Collect from every pass, then step."""
        losses = []
        for closure in closures:
            with self.optimiser.collect():
                losses.append(closure().detach())
        for parameter in self.optimiser.preconditioner.model.parameters():
            if parameter.grad is not None:
                parameter.grad /= len(closures)
        self.optimiser.step()
        return torch.stack(losses).mean()


class MixedPrecision:
    """Natural gradient from a forward pass under autocast, with a scaled loss."""

    def __init__(self, optimiser: NaturalGradient) -> None:
        self.optimiser = optimiser
        self.scaler = torch.amp.GradScaler(next(optimiser.preconditioner.model.parameters()).device.type)

    def step(self, closure: Closure) -> Tensor:
        """Collect from the pass; the step is skipped where gradients overflow, and the scale lowered."""
        with self.optimiser.collect():
            loss = closure(self.scaler)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the states of optimiser and scaler."""
        return {"optimiser": self.optimiser.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both."""
        self.optimiser.load_state_dict(state_dict["optimiser"])
        self.scaler.load_state_dict(state_dict["scaler"])


Build = Callable[[nn.Module, nn.Module, Point, Kind, int], Optimiser]
"""Makes an optimiser of a model, for a loss, with a configuration, the kind of its rows and the seed of their draws."""


@dataclass(frozen=True)
class Method:
    """An optimiser and its configurations.

    Attributes:
        name: the coordinate `method` of its cells.
        family: what it is compared as.
        build: makes it.
        points: configurations in the order in which they are tried; a run takes the first ones.
        structure: key of its structure, "" for first order.
        base: the method that an ingredient is compared with; it differs in the ingredient alone.
        passes: batches of a step.
    """

    name: str
    family: Family
    build: Build
    points: Sequence[Point]
    structure: str = ""
    base: str = ""
    passes: int = 1


def _rival(
    optimiser: type[torch.optim.Optimizer], model: nn.Module, _: nn.Module, point: Point, *__: object
) -> Optimiser:
    options: dict[str, Any] = dict(point)
    return cast("Optimiser", optimiser(model.parameters(), **options))


def _muon(model: nn.Module, _: nn.Module, point: Point, *__: object) -> Optimiser:
    """Muon on the weights of linear layers, AdamW on everything else."""
    matrices = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    taken = {id(weight) for weight in matrices}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    muon = torch.optim.Muon(matrices, lr=point["lr"], weight_decay=0.0)
    return Together(muon, torch.optim.AdamW(rest, lr=point["adamw_lr"]))


def half_coupled(model: nn.Module) -> Structure:
    """Return the layer-wise structure half-way between the full and the block-diagonal one: Σ = (I + 1 1ᵀ)/2."""
    layers = sum(any(True for _ in module.parameters(recurse=False)) for module in model.modules())
    return LayerWise((0.5 * torch.eye(layers) + 0.5).tolist())


def _structure(key: str, model: nn.Module) -> Structure:
    return half_coupled(model) if key == "layer-wise" else make(key)


def _natural(
    model: nn.Module,
    loss: nn.Module,
    point: Point,
    kind: Kind,
    seed: int,
    *,
    structure: Callable[[nn.Module], Structure],
    adapted: bool = False,
    **options: Any,
) -> NaturalGradient:
    """Natural gradient without momentum; a configuration without lr takes step and momentum from the quadratic model."""
    damping = LevenbergMarquardt(initial=point["damping"]) if adapted else point["damping"]
    lr = cast('float | Literal["quadratic"]', point.get("lr", "quadratic"))
    return NaturalGradient(
        model, loss, lr, structure=structure(model), kind=kind, damping=damping, seed=seed, **options
    )


def output_layer(model: nn.Module) -> str:
    """Return the name of the last module with parameters of its own."""
    own: list[str] = [n for n, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]
    return own[-1]


def _plain_output(model: nn.Module, *arguments: Any, **options: Any) -> Optimiser:
    return _natural(model, *arguments, plain=(output_layer(model),), **options)


def _accumulating(*arguments: Any, **options: Any) -> Optimiser:
    return Accumulating(_natural(*arguments, **options))


def _mixed(*arguments: Any, **options: Any) -> Optimiser:
    return MixedPrecision(_natural(*arguments, **options))


def _kfac(_: nn.Module, **options: Any) -> Structure:
    return KFAC(**options)


def _pairs(first: str, second: str, *values: tuple[float, float]) -> tuple[Point, ...]:
    return tuple({first: a, second: b} for a, b in values)


NATURAL = _pairs(
    "lr", "damping",
    (0.1, 0.1), (0.3, 0.3), (0.03, 0.03), (1.0, 1.0), (0.3, 0.1), (0.1, 0.03), (0.1, 0.3), (0.03, 0.01),
)  # fmt: skip
"""Of every structure and every ingredient with a step size of its own. Where damping rules, lr/damping is the learning rate
of plain gradient descent."""

QUADRATIC = tuple({"damping": damping} for damping in (0.1, 0.3, 0.03, 1.0, 0.01, 3.0, 0.003, 10.0))

FIRST_ORDER: Mapping[str, tuple[Build, tuple[Point, ...]]] = {
    "sgd": (
        partial(_rival, torch.optim.SGD),
        _pairs(
            "lr", "momentum",
            (0.1, 0.9), (0.03, 0.9), (0.3, 0.5), (0.1, 0.95), (0.3, 0.9), (0.03, 0.95), (0.01, 0.9), (1.0, 0.0),
        ),
    ),
    "adam": (
        partial(_rival, torch.optim.Adam),
        tuple({"lr": lr} for lr in (0.003, 0.01, 0.03, 0.001, 0.002, 0.006, 0.02, 0.0003)),
    ),
    "adamw": (
        partial(_rival, torch.optim.AdamW),
        _pairs(
            "lr", "weight_decay",
            (0.003, 0.01), (0.01, 0.01), (0.03, 0.01), (0.01, 0.1), (0.001, 0.01), (0.003, 0.1), (0.001, 0.1), (0.006, 0.03),
        ),
    ),
    "muon": (
        _muon,
        _pairs(
            "lr", "adamw_lr",
            (0.02, 0.003), (0.02, 0.01), (0.05, 0.01), (0.1, 0.01), (0.05, 0.003), (0.1, 0.003), (0.01, 0.003), (0.005, 0.001),
        ),
    ),
}  # fmt: skip
"""Rivals from `torch.optim`: what makes them, and learning rate × momentum, weight decay or the rest's learning rate."""


def _methods() -> Iterator[Method]:
    for name, (build, points) in FIRST_ORDER.items():
        yield Method(name, "first order", build, points)
    for key in STRUCTURES:
        build = partial(_natural, structure=partial(_structure, key))
        yield Method(key, "structure", build, NATURAL, key)

    def ingredient(
        name: str,
        points: Sequence[Point] = NATURAL,
        base: str = "kfac",
        *,
        build: Callable[..., Optimiser] = _natural,
        passes: int = 1,
        **options: Any,
    ) -> Method:
        factory = partial(
            _kfac, **{key: options.pop(key) for key in ("factored_damping", "invert_every") if key in options}
        )
        return Method(name, "ingredient", partial(build, structure=factory, **options), points, "kfac", base, passes)

    yield ingredient("kfac-adapted", adapted=True)
    yield ingredient("kfac-quadratic", QUADRATIC)
    yield ingredient("kfac-clipped", kl_clip=KL_CLIP)
    yield ingredient("kfac-split", factored_damping=True)
    yield ingredient("kfac-latest", decay=0.0)
    yield ingredient("kfac-rare", base="kfac-split", factored_damping=True, invert_every=INVERT_EVERY)
    yield ingredient("kfac-accumulated", build=_accumulating, passes=PASSES)
    yield ingredient("kfac-autocast", build=_mixed)
    yield ingredient("kfac-plain", build=_plain_output)


METHODS: Mapping[str, Method] = {method.name: method for method in _methods()}
"""Every method by name."""

CONFIGURATIONS = min(len(method.points) for method in METHODS.values())
"""The most configurations that every method has."""


def of_family(family: Family) -> list[Method]:
    """Return the methods of a family."""
    return [method for method in METHODS.values() if method.family == family]


def described(point: Point) -> str:
    """Return a configuration in words, e.g. `lr=0.1, damping=0.01`."""
    return ", ".join(f"{name}={value:g}" for name, value in point.items())
