"""The optimisers that are compared, and the configurations that each is tuned over: the one table, written before any run.

Those of curvlab as they are by default have one configuration, and are tuned over none.

The configurations were laid around what trains the MLP on digits from one start, seed 1000, for every method alike; that seed
is not judged.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlab.fisher import KFAC, STRUCTURES, LayerWise, Structure
from curvlab.integrations import attach
from curvlab.optim import LevenbergMarquardt, NaturalGradient, Preconditioner
from curvlab.rows.loss import Kind

Point = Mapping[str, float]
"""One configuration: hyper-parameters by name."""

Family = Literal["first order", "structure", "default", "ingredient"]

KL_CLIP = 1e-2
"""Bound of the trust region where there is one."""
INVERT_EVERY = 10
PASSES = 4
"""Batches of a step where it has several."""

Build = Callable[[nn.Module, nn.Module, Point, Kind, int], Sequence[torch.optim.Optimizer]]
"""Makes the optimisers of a model, for a loss, with a configuration, the kind of rows and the seed of their draws."""


@dataclass(frozen=True)
class Entrant:
    """An optimiser, or several that share a model out among them, and its configurations.

    Attributes:
        name: the coordinate `method` of its cells.
        family: what it is compared as.
        build: makes it.
        points: configurations in the order in which they are tried; a run takes the first ones.
        structure: key of its structure, "" for first order.
        base: the method that an ingredient is compared with; it differs in the ingredient alone.
        passes: batches of a step.
        autocast: whether its passes are under autocast, with a scaled loss.
    """

    name: str
    family: Family
    build: Build
    points: Sequence[Point]
    structure: str = ""
    base: str = ""
    passes: int = 1
    autocast: bool = False

    @property
    def title(self) -> str:
        """What claims call it."""
        return f"{self.name} {'by default' if self.family == 'default' else 'natural gradient'}"

    @property
    def tuned(self) -> bool:
        """Whether there is a choice of configurations."""
        return len(self.points) > 1

    @property
    def keeps_rows(self) -> bool:
        """Whether it is made of the rows of single samples, which there are none of where samples interact."""
        return bool(self.structure) and not STRUCTURES[self.structure].averages


def _rival(
    optimiser: Callable[..., torch.optim.Optimizer], model: nn.Module, _: nn.Module, point: Point, *__: object
) -> Sequence[torch.optim.Optimizer]:
    return [optimiser(model.parameters(), **point)]


def _muon(model: nn.Module, _: nn.Module, point: Point, *__: object) -> Sequence[torch.optim.Optimizer]:
    """Muon on the weights of linear layers, AdamW on everything else."""
    matrices = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    taken = {id(weight) for weight in matrices}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    muon = torch.optim.Muon(matrices, lr=point["lr"], weight_decay=0.0)
    return [muon, torch.optim.AdamW(rest, lr=point["adamw_lr"])]


def _natural(
    model: nn.Module,
    loss: nn.Module,
    point: Point,
    kind: Kind,
    seed: int,
    *,
    structure: Callable[[], Structure],
    adapted: bool = False,
    plain: Callable[[nn.Module], Sequence[str]] = lambda _: (),
    **options: Any,
) -> Sequence[torch.optim.Optimizer]:
    """Natural gradient without momentum; a configuration without lr takes step and momentum from the quadratic model."""
    options = {"kl_clip": None, **options, "kind": kind, "seed": seed, "plain": plain(model)}
    damping = LevenbergMarquardt(initial=point["damping"]) if adapted else point["damping"]
    lr = cast('float | Literal["quadratic"]', point.get("lr", "quadratic"))
    return [NaturalGradient(model, loss, lr, structure=structure(), damping=damping, **options)]


def _as_it_is(
    model: nn.Module,
    loss: nn.Module,
    _: Point,
    __: Kind,
    seed: int,
    *,
    structure: Callable[[], Structure] | None = None,
    **otherwise: Any,
) -> Sequence[torch.optim.Optimizer]:
    """Natural gradient with no argument beside model and loss, but for the seed of its draws and what is to be otherwise."""
    return [NaturalGradient(model, loss, seed=seed, structure=structure and structure(), **otherwise)]


def _before_sgd(model: nn.Module, loss: nn.Module, point: Point, _: Kind, seed: int) -> Sequence[torch.optim.Optimizer]:
    """The preconditioner with no argument beside model and loss, but for the seed of its draws, before SGD with momentum."""
    sgd = torch.optim.SGD(model.parameters(), lr=point["lr"], momentum=point["momentum"])
    return [attach(Preconditioner(model, loss, seed=seed), sgd)]


def output_layer(model: nn.Module) -> str:
    """Return the name of the last module with parameters of its own."""
    own: list[str] = [n for n, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]
    return own[-1]


def half_coupled(layers: int) -> Float[Tensor, "L L"]:
    """Σ of the layer-wise structure half-way between the full and the block-diagonal one, (I + 1 1ᵀ)/2."""
    return 0.5 * torch.eye(layers) + 0.5


OPTIONS: Mapping[str, Mapping[str, Any]] = {LayerWise.key: {"sigma": half_coupled}}
"""Of structures that are not run as they are by default."""


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


def _of_structure(key: str) -> Entrant:
    structure = partial(STRUCTURES[key], **OPTIONS.get(key, {}))
    return Entrant(key, "structure", partial(_natural, structure=structure), NATURAL, key)


def _ingredients() -> Iterator[Entrant]:
    def ingredient(
        name: str,
        *,
        points: Sequence[Point] = NATURAL,
        base: str = KFAC.key,
        structure: Callable[[], Structure] = KFAC,
        passes: int = 1,
        autocast: bool = False,
        **options: Any,
    ) -> Entrant:
        build = partial(_natural, structure=structure, **options)
        return Entrant(f"kfac-{name}", "ingredient", build, points, KFAC.key, base, passes, autocast)

    split = partial(KFAC, factored_damping=True)
    yield ingredient("adapted", adapted=True)
    yield ingredient("quadratic", points=QUADRATIC)
    yield ingredient("clipped", kl_clip=KL_CLIP)
    yield ingredient("split", structure=split)
    yield ingredient("latest", decay=0.0)
    yield ingredient("rare", base="kfac-split", structure=partial(split, invert_every=INVERT_EVERY))
    yield ingredient("accumulated", passes=PASSES)
    yield ingredient("autocast", autocast=True)
    yield ingredient("plain", plain=lambda model: (output_layer(model),))


DEFAULT = "natural-gradient"
UNTUNED: tuple[Point, ...] = ({},)
DEFAULTS = {
    DEFAULT: Entrant(DEFAULT, "default", _as_it_is, UNTUNED, KFAC.key),
    "preconditioned-sgd": Entrant(
        "preconditioned-sgd", "default", _before_sgd, ({"lr": 0.1, "momentum": 0.9},), KFAC.key
    ),
}
"""`NaturalGradient(model, loss)` and, before the SGD of README, `Preconditioner(model, loss)`."""


def _lacking() -> Iterator[Entrant]:
    def lacking(name: str, *, base: str = DEFAULT, **otherwise: Any) -> Entrant:
        build = partial(_as_it_is, **otherwise)
        return Entrant(f"{DEFAULT}-{name}", "ingredient", build, UNTUNED, KFAC.key, base)

    yield lacking("unclipped", kl_clip=None)
    yield lacking("steady", damping=LevenbergMarquardt(omega=1.0))
    yield lacking("fresh", structure=partial(KFAC, factored_damping=True))
    yield lacking("product", base=f"{DEFAULT}-fresh", structure=KFAC)


RIVALS = {name: Entrant(name, "first order", build, points) for name, (build, points) in FIRST_ORDER.items()}
"""First-order methods by name."""
VARIANTS = {method.name: method for method in (*_ingredients(), *_lacking())}
"""Variants of K-FAC, and of natural gradient by default, by name."""


class _Methods(Mapping[str, Entrant]):
    """Every method by name: rivals, each structure that is registered or named as ``module:Class``, defaults, and ingredients.

    Raises:
        UnknownName: on looking up a name that is none of them.
    """

    def __getitem__(self, name: str) -> Entrant:
        known = RIVALS | DEFAULTS | VARIANTS
        return known[name] if name in known else _of_structure(name)

    def __iter__(self) -> Iterator[str]:
        yield from (*RIVALS, *STRUCTURES, *DEFAULTS, *VARIANTS)

    def __len__(self) -> int:
        return len(RIVALS) + len(STRUCTURES) + len(DEFAULTS) + len(VARIANTS)


METHODS: Mapping[str, Entrant] = _Methods()

CONFIGURATIONS = min(map(len, (NATURAL, QUADRATIC, *(points for _, points in FIRST_ORDER.values()))))
"""The most configurations that every method has that is tuned."""


def in_order(names: Collection[str]) -> list[str]:
    """Return names of methods in the order of the table, structures that are not registered by a key after it."""
    return [*(name for name in METHODS if name in names), *(name for name in names if name not in {*METHODS})]


def described(point: Point) -> str:
    """Return a configuration in words, e.g. `lr=0.1, damping=0.01`."""
    return ", ".join(f"{name}={value:g}" for name, value in point.items()) or "untuned"
