"""A run and what is followed along it: loss, sharpness and how steps lie to the top eigenspace; gradient flow."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.integrate import solve_ivp
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from analyses.edge_of_stability.optimisers import Optimiser, momentum
from analyses.edge_of_stability.setting import Setting, flat
from analyses.edge_of_stability.windows import Edge
from curvlab.spectrum import Hessian, Operator, eigenpairs
from curvlab.study import Diverged, Trace, follow
from curvlab.study.loop import Seen

DIVERGED = 100.0
"""Loss, relative to the first, above which a run counts as diverged; it is stopped there and keeps what was measured."""
TOLERANCE = 1e-2
"""Residual of the eigenpairs, relative to the largest eigenvalue: a bound on the error of each."""
GUARDS = 6
"""Vectors of a block beyond those followed: near the edge eigenvalues stand close together. With two the tracking of a run
of 64-64-64-10 took twice the time."""


@dataclass(eq=False)
class TrackedDescent:
    """Training by an optimiser.

    Before every step and after the last are seen the `loss` and the `square` ‖g‖² of its gradient. Where it is measured also
    the leading eigenvalues of the curvature, `sharpness` and `second`, the bound `residual` on the error of the first, and the
    shares in their eigenspace of the squared norm of the gradient and of the step, `gradient_alignment` and `step_alignment`.
    The latter is in the inner product of the operator; under a preconditioner there is no `gradient_alignment`.

    Attributes:
        model: Is trained.
        setting: Its data.
        optimiser: What steps.
        measured: Step numbers before which it is measured.
        top: Eigenvalues that are followed; 0 for none.
        see: What else is seen of the model where it is measured.
        batches: Samples that a step uses, by its number; all if None.
        before: Called before every step with its number, such as a schedule.
    """

    model: nn.Module
    setting: Setting
    optimiser: Optimiser
    measured: Collection[int] = ()
    top: int = 2
    see: Callable[[nn.Module], Seen] = lambda _: {}
    batches: Callable[[int], Tensor | None] = lambda _: None
    before: Callable[[int], None] = lambda _: None
    _first: float | None = field(default=None, init=False)
    _subspace: Float[Tensor, "m P"] | None = field(default=None, init=False)
    _leading: tuple[Operator, Float[Tensor, "k P"]] | None = field(default=None, init=False)

    @cached_property
    def _hessian(self) -> Hessian:
        return self.setting.hessian(self.model)

    def look(self, step: int) -> Seen:
        """See the loss and, where it is measured, the curvature.

        Raises:
            Diverged: by the loss.
        """
        loss, gradient = self.setting.gradient(self.model)
        self._first = loss if self._first is None else self._first
        seen: dict[str, Any] = {"loss": loss, "square": float(gradient.square().sum())}
        if not math.isfinite(loss) or loss > DIVERGED * self._first:
            raise Diverged(seen)
        self.before(step)
        self._leading = None
        if step in self.measured:
            seen |= {**self.see(self.model), **self._curvature(gradient)}
        return seen

    def _curvature(self, gradient: Float[Tensor, " P"]) -> Seen:
        operator = self.optimiser.curvature(self._hessian) if self.top else None
        if operator is None:
            return {}
        found = eigenpairs(operator, self.top, start=self._subspace, tolerance=TOLERANCE, block=self.top + GUARDS)
        self._subspace, self._leading = found.subspace, (operator, found.vectors)
        values = zip(("sharpness", "second"), found.values.tolist(), strict=False)
        plain = {"gradient_alignment": share(operator, found.vectors, gradient)} if operator.euclidean else {}
        return {**dict(values), "residual": float(found.residuals[0]), **plain}

    def step(self, step: int) -> Seen | None:
        """Take a step and, where it is measured, see how it lies to the leading eigenvectors."""
        if (samples := self.batches(step)) is not None:
            self.setting.gradient(self.model, samples)
        if self._leading is None:
            self.optimiser.step()
            return None
        here = flat(self.model)
        self.optimiser.step()
        return {"step_alignment": share(*self._leading, flat(self.model) - here)}

    def state_dict(self) -> dict[str, Any]:
        """Parameters, the optimiser's state, the first loss and the last eigenvectors."""
        return {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.steps.state_dict(),
            "first": self._first,
            "subspace": self._subspace,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them up.

        Raises:
            ValueError: they are of another network.
        """
        subspace, size = state["subspace"], len(flat(self.model))
        if subspace is not None and subspace.shape[-1] != size:
            raise ValueError(f"the eigenvectors have {subspace.shape[-1]} entries and not {size}")
        self.model.load_state_dict(state["model"])
        self.optimiser.steps.load_state_dict(state["optimiser"])
        self._first, self._subspace = state["first"], subspace


def gradient_descent(
    setting: Setting, eta: float, measured: Collection[int] = (), top: int = 2, **options: Any
) -> TrackedDescent:
    """Gradient descent from the initialisation, with the options of a `TrackedDescent`."""
    model = setting.network()
    return TrackedDescent(model, setting, momentum(model, "gd", eta), measured, top, **options)


def share(operator: Operator, vectors: Float[Tensor, "k P"], vector: Float[Tensor, " P"]) -> float:
    """Share of a vector's squared norm in the span of orthonormal vectors, in the operator's inner product."""
    dual = operator.metric(vector[None])[0]
    return float((vectors @ dual).square().sum() / (vector @ dual))


def descend(
    process: TrackedDescent,
    steps: int,
    *,
    until: Callable[[Seen], bool] = lambda _: False,
    checkpoint: Path | None = None,
) -> Trace:
    """Train, see `curvlab.study.follow`; a run that is measured at its end takes one more step, to see how that lies.

    Cost: a gradient a step; a measurement takes two to four block products from the last eigenvectors.
    """
    trace = follow(process, steps, until=until, checkpoint=checkpoint)
    last = trace.seen[-1]
    if trace.diverged is None and "sharpness" in last:
        last |= process.step(last["step"]) or {}
    return trace


def edge_of(process: TrackedDescent, steps: int, **options: Any) -> Edge:
    """Train, see `descend`, and look at the run against the threshold of its optimiser."""
    return Edge(descend(process, steps, **options), process.optimiser.threshold, process.optimiser.eta)


def flow(
    model: nn.Module, setting: Setting, times: Float[np.ndarray, " T"], *, precision: float = 1e-4
) -> Float[np.ndarray, "T P"]:
    """Return the parameters along dθ/dt = −∇L from a model's own, at ascending times.

    By SciPy's explicit Runge–Kutta method of order 5, whose error control keeps the step below its stability limit.

    Args:
        model: its parameters are changed on the way.
        setting: its data.
        times: t, the first at least 0.
        precision: relative error a step.

    Raises:
        ArithmeticError: the integration failed; with its reason.
    """
    start = flat(model)

    def slope(_: float, parameters: Float[np.ndarray, " P"]) -> Float[np.ndarray, " P"]:
        vector_to_parameters(torch.from_numpy(parameters).to(start), model.parameters())
        return np.asarray(-setting.gradient(model)[1].numpy(force=True).astype(np.float64))

    solved = solve_ivp(
        slope,
        (0.0, float(times[-1])),
        start.numpy(force=True).astype(np.float64),
        t_eval=times,
        rtol=precision,
        atol=1e-2 * precision,
    )
    if not solved.success:
        raise ArithmeticError(f"The gradient flow could not be integrated: {solved.message}")
    return np.asarray(solved.y.T)
