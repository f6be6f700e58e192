"""How an optimiser turns gradients into steps, θ ← θ − η P⁻¹ m with m the momentum, and the curvature at which it is unstable.

| optimiser | P | edge |
|---|---|---|
| SGD with momentum β | I | (2 + 2β)/η, with Nesterov's (2 + 2β)/(η(1 + 2β)) |
| Adam, AdamW | diag(√v̂ + ε) | (2 + 2β₁)/(η(1 − β₁)), its momentum being an average |
| NaturalGradient, Preconditioner before SGD | F + ρI | as SGD |

The edge is the largest λ_max(P⁻¹H) at which the recursion of θ is stable where the loss is quadratic and P constant. Coupled
weight decay λ is a part of the loss, H + λI. Decoupled one, which adds ηλ ≪ 1, is left out.

Source: Cohen et al. 2021 (SGD), 2022, Adaptive gradient methods at the edge of stability (Adam).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import inf

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlab.errors import UnsupportedModel
from curvlab.fisher import Structure
from curvlab.fisher.reading import parts_of
from curvlab.optim import NaturalGradient, Preconditioner
from curvlab.rows.owners import trainable
from curvlab.rows.parameters import ParameterSpace
from curvlab.spectrum import DiagonalPreconditioner
from curvlab.spectrum.operator import Operator
from curvlab.theory.stability import sharpness_threshold


@dataclass(frozen=True, eq=False)
class Stepping:
    """How steps are made at present.

    Attributes:
        space: the parameters that it is about.
        preconditioner: P without its damping; None for the identity.
        damping: ρ of P; of a structure only.
        eta: step size η, the largest of all parameter groups; a smaller one of a group is a part of P.
        edge: λ_max(P⁻¹H) at which steps are no longer stable.
        decay: λ of coupled weight decay by parameter.
    """

    space: ParameterSpace
    preconditioner: Structure | DiagonalPreconditioner | None
    damping: float
    eta: float
    edge: float
    decay: Mapping[str, float]

    def solve(self, block: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
        """Return `P⁻¹ v`."""
        if self.preconditioner is None:
            return block
        found = self.preconditioner.solve(block, self.damping)
        assert isinstance(found, Tensor)
        return found

    def half(self, block: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
        """Return `P^{-1/2} v`."""
        if self.preconditioner is None:
            return block
        if isinstance(self.preconditioner, DiagonalPreconditioner):
            return block / self.preconditioner.diagonal.sqrt()
        found = self.preconditioner.solve(block, self.damping, power=0.5)
        assert isinstance(found, Tensor)
        return found


class Whitened(Operator):
    """`P^{-1/2} (H + Λ) P^{-1/2}`, with the eigenvalues of P⁻¹(H + Λ), Λ the coupled weight decay.

    Unlike `curvlab.spectrum.Preconditioned` it needs no product with P, which K-FAC with factored damping does not have.
    """

    def __init__(self, operator: Operator, stepping: Stepping) -> None:
        self.operator, self.stepping = operator, stepping
        self.space, self.dtype, self.device = operator.space, operator.dtype, operator.device
        decay = [torch.full(shape, stepping.decay.get(name, 0.0)) for name, shape in self.space.shapes.items()]
        self._decay = torch.cat([part.flatten() for part in decay]).to(self.device, self.dtype)

    def held(self) -> AbstractContextManager[None]:  # noqa: D102
        return self.operator.held()

    def matmat(self, block: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:  # noqa: D102
        inner = self.stepping.half(block)
        return self.stepping.half(self.operator.matmat(inner) + self._decay * inner)


Groups = list[tuple[list[str], dict[str, object]]]
Read = Callable[[nn.Module, torch.optim.Optimizer], Stepping]


def stepping_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, preconditioner: Preconditioner | None = None
) -> Stepping:
    """Return how an optimiser makes steps at present.

    Args:
        model: whose parameters it moves.
        optimizer: of a class in `READERS`, or derived from one.
        preconditioner: what turns gradients before it.

    Raises:
        UnsupportedModel: for another optimiser, and options under which the recursion is another one.
    """
    if preconditioner is not None:
        return _behind(preconditioner, optimizer)
    for kind in type(optimizer).__mro__:
        if kind in READERS:
            return READERS[kind](model, optimizer)
    known = ", ".join(kind.__name__ for kind in READERS)
    raise UnsupportedModel(
        f"It is not known how {type(optimizer).__name__} makes steps, only for {known}. Add a function that returns its "
        "Stepping to curvlab.monitor.stepping.READERS."
    )


def _groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> Groups:
    """Return names of trainable parameters and options, by parameter group."""
    parts = parts_of(optimizer, model)
    groups = [([part.name for part in parts if part.group is group], group) for group in optimizer.param_groups]
    if any(group.get("maximize") for _, group in groups):
        raise UnsupportedModel(
            f"{type(optimizer).__name__} maximises: give it the negative loss, as the monitor has it."
        )
    return [(own, group) for own, group in groups if own]


def _same(optimizer: torch.optim.Optimizer, groups: Groups, *options: str) -> list[object]:
    """Return options that all groups have in common."""
    for option in options:
        if any(group[option] != groups[0][1][option] for _, group in groups):
            raise UnsupportedModel(
                f"The parameter groups of {type(optimizer).__name__} differ in {option}, so there is no one edge. Use the same."
            )
    return [groups[0][1][option] for option in options]


def _edge(eta: float, beta: float, *, nesterov: bool = False) -> float:
    method = "nesterov" if nesterov else "heavy-ball"
    return sharpness_threshold(method, eta, beta) if eta > 0 else inf


def _made(
    model: nn.Module,
    groups: Groups,
    diagonal: DiagonalPreconditioner | None,
    coupled: bool,
    edge: Callable[[float], float],
) -> Stepping:
    """Put together a diagonal P with the step sizes of groups, relative to the largest."""
    space = ParameterSpace({name: p.shape for name, p in trainable(model).items()})
    rates = {name: float(group["lr"]) for own, group in groups for name in own}  # type: ignore[arg-type]
    eta = max(rates.values())
    if any(rate == 0 < eta for rate in rates.values()):
        raise UnsupportedModel("A parameter group has the learning rate 0: freeze its parameters instead.")
    if len(set(rates.values())) > 1:
        parameters = trainable(model)
        own = diagonal.space.unflatten(diagonal.diagonal) if diagonal is not None else {}
        scaled = {n: own.get(n, torch.ones_like(p)).detach() * (eta / rates[n]) for n, p in parameters.items()}
        diagonal = DiagonalPreconditioner(scaled)
    decay = {name: float(group["weight_decay"]) for own, group in groups for name in own}  # type: ignore[arg-type]
    return Stepping(space, diagonal, 0.0, eta, edge(eta), decay if coupled else {})


def _sgd(model: nn.Module, optimizer: torch.optim.Optimizer) -> Stepping:
    groups = _groups(model, optimizer)
    return _made(model, groups, None, True, lambda eta: _edge_of_sgd(optimizer, groups, eta))


def _edge_of_sgd(optimizer: torch.optim.Optimizer, groups: Groups, eta: float) -> float:
    beta, dampening, nesterov = _same(optimizer, groups, "momentum", "dampening", "nesterov")
    kept = 1 - float(dampening) if beta else 1.0  # type: ignore[arg-type]
    return _edge(eta * kept, float(beta), nesterov=bool(nesterov))  # type: ignore[arg-type]


def _adam(model: nn.Module, optimizer: torch.optim.Optimizer) -> Stepping:
    groups = _groups(model, optimizer)
    diagonal = DiagonalPreconditioner.adam(model, optimizer)
    decoupled = isinstance(optimizer, torch.optim.AdamW) or bool(groups[0][1].get("decoupled_weight_decay"))
    (betas,) = _same(optimizer, groups, "betas")
    beta = float(betas[0])  # type: ignore[index]
    return _made(model, groups, diagonal, not decoupled, lambda eta: _edge(eta * (1 - beta), beta))


def _natural(model: nn.Module, optimizer: torch.optim.Optimizer) -> Stepping:
    assert isinstance(optimizer, NaturalGradient)
    if optimizer.chooses_step:
        raise UnsupportedModel('With lr="quadratic" the step size follows from the curvature, so there is no edge.')
    groups = _groups(model, optimizer)
    eta, beta, nesterov = _same(optimizer, groups, "lr", "momentum", "nesterov")
    decay = {} if optimizer.decoupled else {n: float(g["weight_decay"]) for own, g in groups for n in own}  # type: ignore[arg-type]
    edge = _edge(float(eta), float(beta), nesterov=bool(nesterov))  # type: ignore[arg-type]
    return _of_structure(optimizer.preconditioner, float(eta), edge, decay)  # type: ignore[arg-type]


def _behind(preconditioner: Preconditioner, optimizer: torch.optim.Optimizer) -> Stepping:
    """Return the steps of SGD along preconditioned gradients."""
    if not isinstance(optimizer, torch.optim.SGD):
        raise UnsupportedModel(
            f"{type(optimizer).__name__} behind a Preconditioner preconditions once more, so P is not known: use SGD there."
        )
    groups = _groups(preconditioner.model, optimizer)
    (rate,) = _same(optimizer, groups, "lr")
    eta = float(rate)  # type: ignore[arg-type]
    return _of_structure(preconditioner, eta, _edge_of_sgd(optimizer, groups, eta), {})


def _of_structure(preconditioner: Preconditioner, eta: float, edge: float, decay: Mapping[str, float]) -> Stepping:
    structure = preconditioner.structure
    if not structure.updated:
        raise UnsupportedModel("The preconditioner has no curvature yet: take a step first.")
    damping = preconditioner.damping.at(preconditioner.steps)
    space = ParameterSpace({name: p.shape for name, p in preconditioner.parameters.items()})
    return Stepping(space, structure, damping, eta, edge, decay)


READERS: dict[type[torch.optim.Optimizer], Read] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    NaturalGradient: _natural,
}
"""How steps of an optimiser are read, by its class; add your own."""
