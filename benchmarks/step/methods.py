"""The training steps that are compared: each leaves in `.grad` what the optimiser subtracts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from benchmarks.operations import Layer
from benchmarks.step.operations import StepOperations, dual, gradient_descent, kfac
from benchmarks.step.plain import Factors, PlainKFAC
from curvlab.fisher import KFAC, Full, Structure
from curvlab.optim import Preconditioner

DAMPING = 1e-2
"""ρ."""

DECAY = 0.95
"""Weight of the running averages so far."""

MethodName = Literal["sgd", "kfac", "kfac-backpack", "kfac-curvlinops", "dual-empirical", "dual-mc", "dual-exact"]
Rows = Literal["mc", "exact", "empirical"]


@dataclass(frozen=True)
class Batch:
    """A chain and what it is trained on, in every step the same."""

    network: nn.Sequential
    inputs: Float[Tensor, "N ..."]
    targets: Int[Tensor, " N"]

    def loss(self) -> Float[Tensor, ""]:
        """Return the cross-entropy."""
        return nn.functional.cross_entropy(self.network(self.inputs), self.targets)


Compute = Callable[[], None]
Prepare = Callable[[Batch, Rows, int], Compute]
"""Does what comes before the first step, given the batch, the rows of the curvature and the steps from one inversion to
the next, and returns what a step does before the optimiser's own."""


@dataclass(frozen=True)
class Method:
    """One kind of training step.

    Attributes:
        title: its name in the table.
        prepare: sets it up.
        operations: what a step needs, given the layers, samples and outputs.
        rows: rows of the curvature that is timed.
        checked: rows of the curvature that is checked, without draws.
        inverts: whether it makes inverses once an interval.
        solves: whether its direction solves a system with the damped Fisher matrix, to rounding.
        expands: whether its factors of convolutions are those of K-FAC "expand", as curvlab's are.
        lr: learning rate of the steps.
    """

    title: str
    prepare: Prepare
    operations: Callable[[Sequence[Layer], int, int], StepOperations]
    rows: Rows = "mc"
    checked: Rows = "exact"
    inverts: bool = False
    solves: bool = False
    expands: bool = True
    lr: float = 1e-3


def _gradient(batch: Batch, _: Rows, __: int) -> Compute:
    def compute() -> None:
        batch.network.zero_grad()
        batch.loss().backward()

    return compute


def _curvlab(structure: Callable[[int], Structure], decay: float | None = None) -> Prepare:
    def prepare(batch: Batch, rows: Rows, interval: int) -> Compute:
        network, loss = batch.network, nn.CrossEntropyLoss()
        preconditioner = Preconditioner(
            network, loss, structure(interval), kind=rows, damping=DAMPING, decay=decay, kl_clip=None
        )

        def compute() -> None:
            network.zero_grad()
            with preconditioner.collect():
                loss(network(batch.inputs), batch.targets).backward()
            preconditioner.precondition()

        return compute

    return prepare


def _backpack(batch: Batch, rows: Rows, interval: int) -> Compute:
    """Take the factors from the backward pass of the gradient.

    Those of weights know no bias. B of convolutions is that of `Σ_t g`, A of every `a`: neither "expand" nor "reduce".
    """
    from backpack import backpack, extend
    from backpack.extensions import KFAC as SampledFactors  # noqa: N811
    from backpack.extensions import KFLR

    network, loss = extend(batch.network), extend(nn.CrossEntropyLoss())
    extension = SampledFactors(mc_samples=1) if rows == "mc" else KFLR()
    own = PlainKFAC(network, interval, DAMPING, DECAY)

    def factors() -> Iterator[Factors]:
        for layer in own.layers:
            outputs, inputs = getattr(layer.parameters[0], extension.savefield)
            yield outputs, inputs
            for parameter in layer.parameters:
                delattr(parameter, extension.savefield)

    def compute() -> None:
        network.zero_grad()
        with backpack(extension):
            loss(network(batch.inputs), batch.targets).backward()
        own.precondition(factors())

    return compute


def _curvlinops(batch: Batch, rows: Rows, interval: int) -> Compute:
    """Take the factors from an operator, which makes passes of its own and is made anew as parameters change."""
    from curvlinops import KFACLinearOperator

    network, loss = batch.network, nn.CrossEntropyLoss()
    parameters = [p for p in network.parameters() if p.requires_grad]
    own = PlainKFAC(network, interval, DAMPING, DECAY)

    def compute() -> None:
        network.zero_grad()
        loss(network(batch.inputs), batch.targets).backward()
        operator = KFACLinearOperator(
            network,
            loss,
            parameters,
            [(batch.inputs, batch.targets)],
            check_deterministic=False,
            seed=own.steps,
            fisher_type="mc" if rows == "mc" else "type-2",
            separate_weight_and_bias=False,
            num_data=len(batch.inputs),
            num_per_example_loss_terms=1,
        )
        operator.compute_kronecker_factors()
        outputs, inputs = operator._gradient_covariances, operator._input_covariances
        own.precondition((outputs[name], inputs[name]) for name in inputs)

    return compute


def _dual(rows: Rows, checked: Rows = "exact") -> Method:
    def count(layers: Sequence[Layer], N: int, C: int) -> StepOperations:
        V = C if rows == "exact" else 1
        return dual(layers, N, V, sweeps=0 if rows == "empirical" else V, projects=rows == "mc")

    title = f"natural gradient, dual, {rows}"
    return Method(title, _curvlab(lambda _: Full()), count, rows=rows, checked=checked, solves=True)


def _kfac_operations(layers: Sequence[Layer], N: int, _: int) -> StepOperations:
    return kfac(layers, N, 1)


def _kfac(interval: int) -> Structure:
    return KFAC(factored_damping=True, invert_every=interval)


METHODS: dict[MethodName, Method] = {
    "sgd": Method("SGD with momentum", _gradient, lambda layers, N, _: gradient_descent(layers, N), lr=0.01),
    "kfac": Method("K-FAC, curvlab", _curvlab(_kfac, DECAY), _kfac_operations, inverts=True),
    "kfac-backpack": Method("K-FAC, BackPACK factors", _backpack, _kfac_operations, inverts=True, expands=False),
    "kfac-curvlinops": Method("K-FAC, curvlinops factors", _curvlinops, _kfac_operations, inverts=True),
    "dual-empirical": _dual("empirical", checked="empirical"),
    "dual-mc": _dual("mc"),
    "dual-exact": _dual("exact"),
}


def residual(batch: Batch, rows: Rows) -> float:
    """Return ‖(F + ρI)d − ∇L‖/‖∇L‖ for the direction d in `.grad`, F by products of `torch.func`."""
    from torch.func import functional_call, jvp, vjp

    parameters = {name: p.detach() for name, p in batch.network.named_parameters() if p.requires_grad}
    direction = {name: p.grad for name, p in batch.network.named_parameters() if p.grad is not None}
    N = len(batch.inputs)

    def outputs(values: dict[str, Tensor]) -> Tensor:
        z: Tensor = functional_call(batch.network, values, (batch.inputs,))
        return z

    def losses(values: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs(values), batch.targets, reduction="none")

    seen = losses if rows == "empirical" else outputs
    values, moved, *_ = jvp(seen, (parameters,), (direction,))
    if rows != "empirical":
        p = values.softmax(1)
        moved = p * (moved - (p * moved).sum(1, keepdim=True))
    (product,) = vjp(seen, parameters)[1](moved / N)
    (gradient,) = vjp(losses, parameters)[1](moved.new_full((N,), 1 / N))
    missed = torch.cat([(product[n] + DAMPING * direction[n] - gradient[n]).flatten() for n in parameters])
    return float(missed.norm() / torch.cat([g.flatten() for g in gradient.values()]).norm())
