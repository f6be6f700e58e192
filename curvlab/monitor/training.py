"""A training run as it is after a step, as quantities see it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlab.errors import UnsupportedModel
from curvlab.monitor.stepping import Stepping, stepping_of
from curvlab.nn.modes import eagerly, evaluating, without_autocast
from curvlab.optim import Preconditioner
from curvlab.rows import Rows, sqrt_fisher
from curvlab.rows.owners import trainable
from curvlab.rows.packed import leaves, length, part_of
from curvlab.rows.parameters import ParameterSpace
from curvlab.rows.sweep import PickOutput
from curvlab.spectrum import Hessian

Change = Mapping[str, Tensor]


@dataclass(eq=False)
class Training:
    """A training run as it is after a step.

    Attributes:
        model: in evaluation mode while quantities are measured.
        loss: as the loop calls it.
        optimizer: what moves the parameters, if the monitor was given it.
        preconditioner: what turns gradients before it, if anything.
        output: which tensor of a structured output the loss takes.
        step: number of steps taken.
        inputs: of the batch of this step.
        targets: of the batch of this step.
        change: what the step added to the parameters, by name; None where no quantity asked for it.
    """

    model: nn.Module
    loss: Any
    optimizer: torch.optim.Optimizer | None = None
    preconditioner: Preconditioner | None = None
    output: PickOutput = None
    step: int = 0
    inputs: Any = None
    targets: Any = None
    change: Change | None = None
    _data: list[tuple[Any, Any]] = field(default_factory=list)  # of the Hessians: the batch of the present step
    _hessians: dict[tuple[str, ...] | None, Hessian] = field(default_factory=dict)

    @property
    def space(self) -> ParameterSpace:
        """Names and shapes of the trainable parameters."""
        return ParameterSpace({name: p.shape for name, p in trainable(self.model).items()})

    @property
    def parameters(self) -> Float[Tensor, " P"]:
        """The trainable parameters as they are after the step, detached."""
        return self.space.flatten({name: p.detach() for name, p in trainable(self.model).items()})

    def hessian(self, names: tuple[str, ...] | None = None) -> Hessian:
        """Return the Hessian of the loss on the batch, at the parameters as they are.

        Args:
            names: of some of the parameters; of all trainable ones if None.

        Cost: the first time two gradients and two products, by which the operator checks itself.
        """
        self._data[:] = [(self.inputs, self.targets)]
        if names not in self._hessians:
            self._hessians[names] = Hessian(
                self.model, self.loss, self._data, parameters=names, output=self.output, batched=False
            )
        return self._hessians[names]

    def gradient(self) -> dict[str, Tensor]:
        """Return the gradient that the training pass left, or that at the present parameters where it did not.

        With a `Preconditioner`, what is left is no gradient any more. Clipping and what accumulated are in what is left.
        """
        left = {name: p.grad for name, p in trainable(self.model).items()}
        found = {name: grad.detach() for name, grad in left.items() if grad is not None}
        if self.preconditioner is None and len(found) == len(left):
            return found
        hessian = self.hessian()
        return hessian.space.unflatten(hessian.objective.gradient()[1])

    def gradient_before(self) -> dict[str, Tensor]:
        """Return the gradient of the batch before the step: what the training pass left, or by another pass where it did not.

        Raises:
            UnsupportedModel: if nobody asked for the change in time.
        """
        if self.preconditioner is None and all(p.grad is not None for p in trainable(self.model).values()):
            return self.gradient()
        if self.change is None:
            raise UnsupportedModel("What the step changed is not known: set of_step = True in the quantity.")
        hessian = self.hessian()
        back = hessian.space.flatten(self.change)
        return hessian.space.unflatten(hessian.objective.moved(back, -1.0)[1])

    def stepping(self) -> Stepping:
        """Return how the optimiser makes steps at present.

        Raises:
            UnsupportedModel: without an optimiser, and for one whose steps are not known.
        """
        if self.optimizer is None:
            raise UnsupportedModel("The monitor was given no optimiser: call curvlab.monitor(…, optimizer=optimizer).")
        return stepping_of(self.model, self.optimizer, self.preconditioner)

    def rows(self, kind: Literal["exact", "ggn", "empirical"], samples: int | None = None) -> Rows:
        """Return rows of S on the batch, one a sample if they are empirical.

        Args:
            kind: see `curvlab.sqrt_fisher`.
            samples: take the first so many only.
        """
        inputs, targets = first_samples((self.inputs, self.targets), samples)
        per: Literal["sample"] | None = "sample" if kind == "empirical" else None
        return sqrt_fisher(self.model, self.loss, inputs, targets, kind, rows=per, output=self.output)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Measure in evaluation mode, in the parameters' type, and leave modes and random numbers as they were."""
        device = next(self.model.parameters()).device
        devices = [device] if device.type == "cuda" else []
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices))
            stack.enter_context(without_autocast())
            stack.enter_context(eagerly())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(evaluating(self.model))
            yield


def first_samples(data: Any, samples: int | None) -> Any:
    """Return data of the first samples only; their number is the first axis of the first tensor."""
    total = next((n for n in map(length, leaves(data)) if n is not None), 0)
    return data if samples is None or samples >= total else part_of(data, slice(0, samples), total)
