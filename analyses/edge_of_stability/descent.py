"""A run and what is followed along it: loss, sharpness and how steps lie to the top eigenspace; gradient flow."""

from __future__ import annotations

import copy
import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.integrate import solve_ivp
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from analyses.checkpoints import take_up
from analyses.edge_of_stability.optimisers import Optimiser, Steps
from analyses.edge_of_stability.setting import Setting, flat
from curvlab.spectrum import Operator, eigenpairs
from curvlab.tools.storage import write

DIVERGED = 100.0
"""Loss, relative to the first, above which a run counts as diverged; it is stopped there and keeps what was measured."""
TOLERANCE = 1e-2
"""Residual of the eigenpairs, relative to the largest eigenvalue: a bound on the error of each."""
GUARDS = 6
"""Vectors of a block beyond those followed: near the edge eigenvalues stand close together. With two the tracking of a run
of 64-64-64-10 took twice the time."""
SAVED = 60.0
"""Seconds between checkpoints of a run; shorter runs write none."""


@dataclass(frozen=True)
class Point:
    """What is measured before a step.

    Attributes:
        step: number of steps before it.
        eigenvalues: leading ones of the curvature, descending.
        residual: bound on the error of the first.
        gradient_share: share of the gradient's squared norm in their eigenspace; None under a preconditioner.
        step_share: the same for the step taken, in the operator's inner product.
    """

    step: int
    eigenvalues: tuple[float, ...]
    residual: float
    gradient_share: float | None
    step_share: float


@dataclass
class Run:
    """What was seen of a run.

    Attributes:
        losses: before every step, and after the last.
        squares: ‖g‖² before every step, and after the last.
        points: measurements.
        diverged: the step at which it diverged, None if it did not.
    """

    losses: list[float] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    diverged: int | None = None


def descend(
    model: nn.Module,
    setting: Setting,
    optimiser: Optimiser,
    steps: int,
    measured: Sequence[int],
    *,
    top: int = 2,
    batches: Callable[[int], Tensor | None] = lambda _: None,
    observe: Callable[[int, nn.Module], None] = lambda *_: None,
    before: Callable[[int], None] = lambda _: None,
    until: Callable[[nn.Module], bool] = lambda _: False,
    checkpoint: Path | None = None,
) -> Run:
    """Train, and measure before chosen steps.

    Args:
        model: is trained.
        setting: its data.
        optimiser: what steps.
        steps: how many; fewer if the run diverges.
        measured: step numbers before which the curvature is measured.
        top: eigenvalues that are followed.
        batches: samples that a step uses, by its number; all if None.
        observe: called before every step with its number and the model.
        before: called before every step with its number, such as a schedule.
        until: asked at every measurement; the run ends there if it holds.
        checkpoint: where the run is saved every minute and taken up from; removed at its end.

    Cost: a gradient a step; a measurement takes two to four block products from the last eigenvectors.
    """
    run, start, subspace = _resume(checkpoint, model, setting, optimiser)
    chosen, saved = frozenset(measured), time.monotonic()
    hessian = setting.hessian(model)
    for step in range(start, steps + 1):
        if checkpoint is not None and time.monotonic() - saved > SAVED:
            _save(checkpoint, run, step, subspace, model, optimiser)
            saved = time.monotonic()
        loss, gradient = setting.gradient(model)
        run.losses.append(loss)
        run.squares.append(float(gradient.square().sum()))
        if not math.isfinite(loss) or loss > DIVERGED * run.losses[0]:
            run.diverged = step
            break
        before(step)
        observe(step, model)
        operator = optimiser.curvature(hessian) if step in chosen else None
        found = None
        if operator is not None:
            found = eigenpairs(operator, top, start=subspace, tolerance=TOLERANCE, block=top + GUARDS)
            subspace = found.subspace
        ended = step == steps or (step in chosen and until(model))
        if ended and found is None:
            break
        if (samples := batches(step)) is not None:
            setting.gradient(model, samples)
        if operator is None or found is None:
            optimiser.steps.step()
        else:
            here = flat(model)
            optimiser.steps.step()
            plain = share(operator, found.vectors, gradient) if operator.euclidean else None
            moved = share(operator, found.vectors, flat(model) - here)
            values = tuple(float(value) for value in found.values)
            run.points.append(Point(step, values, float(found.residuals[0]), plain, moved))
        if ended:
            break
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return run


def share(operator: Operator, vectors: Float[Tensor, "k P"], vector: Float[Tensor, " P"]) -> float:
    """Share of a vector's squared norm in the span of orthonormal vectors, in the operator's inner product."""
    dual = operator.metric(vector[None])[0]
    return float((vectors @ dual).square().sum() / (vector @ dual))


def _save(path: Path, run: Run, step: int, subspace: Tensor | None, model: nn.Module, optimiser: Optimiser) -> None:
    buffer = io.BytesIO()
    state = {
        "run": asdict(run),
        "step": step,
        "subspace": subspace,
        "model": model.state_dict(),
        "optimiser": optimiser.steps.state_dict(),
    }
    torch.save(state, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, buffer.getvalue())


def _resume(
    path: Path | None, model: nn.Module, setting: Setting, optimiser: Optimiser
) -> tuple[Run, int, Tensor | None]:
    def rehearse(state: dict[str, Any]) -> None:
        loss = setting.problem.loss
        trial, steps = copy.deepcopy((model, optimiser.steps), {id(loss): loss})
        _, _, subspace = _restore(state, trial, steps)
        if subspace is not None and subspace.shape[-1] != len(flat(trial)):
            raise ValueError(f"the eigenvectors have {subspace.shape[-1]} entries and not {len(flat(trial))}")
        setting.gradient(trial)
        steps.step()

    return take_up(path, rehearse, lambda state: _restore(state, model, optimiser.steps)) or (Run(), 0, None)


def _restore(state: dict[str, Any], model: nn.Module, steps: Steps) -> tuple[Run, int, Tensor | None]:
    seen, step = state["run"], int(state["step"])
    if not len(seen["losses"]) == len(seen["squares"]) == step:
        raise ValueError(f"{len(seen['losses'])} losses do not lead to step {step}")
    points = [Point(**point) for point in seen["points"]]
    model.load_state_dict(state["model"])
    steps.load_state_dict(state["optimiser"])
    return Run(seen["losses"], seen["squares"], points, seen["diverged"]), step, state["subspace"]


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
