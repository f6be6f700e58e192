"""Candidates, each a structure at a damping, and what is measured of them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from math import inf, nan

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.compare.batches import Batches
from curvlab.compare.deadline import Deadline, OutOfTime
from curvlab.compare.landscape import Landscape, Weights
from curvlab.compare.memory import state_bytes, too_large
from curvlab.compare.response import (
    Linearised,
    Response,
    curvature_along,
    projector_of,
    response_of,
    slope_along,
)
from curvlab.compare.trials import Trial, held, largest, repeated, trial
from curvlab.errors import IllConditioned, OutsideRange
from curvlab.fisher import Full, Structure
from curvlab.fisher.damping import Damping
from curvlab.fisher.memory import matrix_elements
from curvlab.rows import Rows
from curvlab.rows.passes import Pass
from curvlab.tools.live_memory import Live

RANKED = 1 << 23
"""Numbers that the matrices of a structure may hold for its rank to be told: their eigenvalues take seconds."""
SHARE = 0.6
"""Share of the time after which no further response is begun."""
TRIES = 8
"""Learning rates at which steps are taken in a row, each half of the one before."""
FROZEN_STEPS = 10
"""Steps in a row with the structure left as it is."""
MOMENTUM = 0.9
"""Momentum that is tried."""


@dataclass(eq=False)
class Candidate:
    """A structure at a damping, and what has been measured of it; NaN stands for what has not.

    Attributes:
        name: of the structure.
        damping: as given.
        fresh: the structure as it was given, copied for every update.
        fitted: the structure with the rows of the batch.
        step: its direction at the present weights.
        response: in the linearised model.
        trial: single real steps.
        eta_repeated: largest rate that holds for steps in a row.
        momentum: factor by which momentum changes the rate that holds.
        rank: of the structure.
        seconds: of building it and of one step.
        state: bytes that it holds from step to step.
        peak: bytes of tensors at once while it is built and takes a step.
        notes: what was not measured, and why.
    """

    name: str
    damping: Damping
    fresh: Structure
    fitted: Structure | None = None
    step: Weights | None = None
    response: Response | None = None
    trial: Trial | None = None
    eta_repeated: float = nan
    momentum: float = nan
    rank: float = nan
    seconds: float = nan
    state: float = nan
    peak: float = nan
    notes: list[str] = field(default_factory=list)

    @property
    def promise(self) -> float:
        """The largest fall of the second batch's loss in a single step."""
        if self.trial is None:
            return -inf
        best = self.trial.best(self.trial.eta_batch)
        return -inf if best is None else self.trial.fall(best)

    def remark(self, text: str) -> str:
        """Add a note, and return it."""
        self.notes.append(text)
        return text


@dataclass(eq=False)
class Setting:
    """What candidates share while they are measured.

    Attributes:
        landscape: the loss at other weights.
        batches: the batch, and the second one.
        exact: exact rows of the batch.
        linearised: rows that structures are built from, and the gradient.
        projector: on the rows' directions that the loss weighs.
        wanted: steps of the full exact matrix by damping.
        steps: real steps in a row.
        deadline: after which nothing is begun.
        left: bytes for matrices of a structure, beside rows and responses; None where that is unknown.
    """

    landscape: Landscape
    batches: Batches
    exact: Rows
    linearised: Linearised
    projector: Float[Tensor, "R R"]
    wanted: dict[Damping, Weights]
    steps: int
    deadline: Deadline
    left: float | None

    @classmethod
    def begin(
        cls,
        landscape: Landscape,
        batches: Batches,
        how: Pass,
        dampings: Sequence[Damping],
        steps: int,
        deadline: Deadline,
        left: float | None,
    ) -> Setting:
        """Form the rows of the batch and the steps of the full exact matrix.

        Args:
            landscape: the loss at other weights.
            batches: the batch, and the second one.
            how: how exact rows are made.
            dampings: of all candidates.
            steps: real steps in a row.
            deadline: after which nothing is begun.
            left: bytes for matrices of a structure.

        Raises:
            ValueError: if the exact Fisher matrix is zero.
        """
        exact = Linearised.at(landscape, landscape.here, batches.first, how)
        reference = Full().update(exact.rows)
        if reference.largest_eigenvalue() == 0:
            raise ValueError(
                f"The exact Fisher matrix of {type(landscape.model).__name__} and {type(landscape.loss).__name__} on these data is "
                "zero, so no step moves an output that the loss weighs: there is nothing to compare. A softmax over one output is "
                "such a case (use BCEWithLogitsLoss or more outputs), saturated outputs are another."
            )
        own = exact if landscape.how.spans_outputs else Linearised.at(landscape, landscape.here, batches.first)
        wanted = {rho: exact.step(reference, rho) for rho in dampings}
        return cls(landscape, batches, exact.rows, own, projector_of(exact.rows), wanted, steps, deadline, left)

    @property
    def _late(self) -> bool:
        """Whether no further response is begun: some time is kept for steps in a row."""
        return self.deadline.passed(SHARE if self.steps else 1.0)

    def measure(self, name: str, fresh: Structure, left_out: str = "") -> list[Candidate]:
        """Measure responses and single real steps of a structure at every damping.

        Args:
            name: of the structure.
            fresh: the structure as it was given.
            left_out: why it is not to be measured, if it is not.

        Raises:
            ValueError: if the structure is zero.
        """
        candidates = [Candidate(name, damping, fresh) for damping in self.wanted]
        late = self.deadline.over if self._late else ""
        left_out = left_out or late or too_large(fresh, self.linearised.rows, self.left)
        if not left_out:
            try:
                self._respond(candidates)
            except (MemoryError, torch.OutOfMemoryError) as error:
                left_out = str(error)
        for candidate in candidates:
            if candidate.response is None:
                candidate.remark(f"not measured: {left_out or self.deadline.over}")
        return candidates

    def _respond(self, candidates: Sequence[Candidate]) -> None:
        structure = deepcopy(candidates[0].fresh)
        started = time.perf_counter()
        with Live() as live:
            structure.update(self.linearised.rows)
            largest_eigenvalue = structure.largest_eigenvalue()
        built = time.perf_counter() - started
        name = candidates[0].name
        if largest_eigenvalue == 0:
            raise ValueError(
                f"The structure {name!r} of rows of kind {self.linearised.rows.kind!r} is zero, or has no positive eigenvalue, on "
                "these data, so nothing is relative to its largest eigenvalue. Leave it out, or use kind='exact'."
            )
        rank, state = self._rank(structure), state_bytes(structure, self.linearised.rows)
        for candidate in candidates:
            if candidate is not candidates[0] and self._late:
                return
            started = time.perf_counter()
            with live:
                step = self.linearised.step(structure, candidate.damping)
            candidate.seconds = built + time.perf_counter() - started
            candidate.step, candidate.fitted = step, structure
            candidate.rank, candidate.state, candidate.peak = rank, state, live.peak
            response = response_of(
                structure, candidate.damping, self.exact, self.projector, step, self.wanted[candidate.damping]
            )
            if self.steps:
                candidate.trial = trial(
                    self.landscape,
                    self.batches,
                    step,
                    slope_along(self.linearised, step),
                    curvature_along(self.exact, step),
                    2 * response.eta_linear,
                )
            candidate.response = response

    def _rank(self, structure: Structure) -> float:
        if matrix_elements(structure, self.linearised.rows) > RANKED:
            return nan
        values = structure.eigvalsh().abs()
        return float((values > self.exact.P * torch.finfo(values.dtype).eps * values.max()).sum())

    def repeat(self, candidate: Candidate) -> str:
        """Find the largest rate that holds for steps in a row, the structure fitted anew before each; return what became of it."""

        def refitted(weights: Weights) -> Weights:
            averages = candidate.fresh.averages
            there = Linearised.at(self.landscape, weights, self.batches.first, lifts=not averages)
            structure = deepcopy(candidate.fresh).update(there.rows)
            return there.step(structure, candidate.damping)

        assert candidate.trial is not None
        try:
            candidate.eta_repeated = self._largest(candidate, refitted, candidate.trial.eta_batch, self.steps)
        except OutOfTime:
            return candidate.remark(f"steps in a row not measured: {self.deadline.over}")
        return f"learning rates up to {candidate.eta_repeated:.3g} hold"

    def with_momentum(self, candidate: Candidate) -> str:
        """Find by how much momentum changes the rate that holds while the structure stays; return what became of it."""
        structure = candidate.fitted
        assert structure is not None
        assert candidate.trial is not None

        def frozen(weights: Weights) -> Weights:
            gradient = self.landscape.slope(weights, self.batches.first).gradient
            return structure.direction(gradient, candidate.damping)

        try:
            plain = self._largest(candidate, frozen, candidate.trial.eta_batch, FROZEN_STEPS)
            heavy = self._largest(candidate, frozen, 2 * plain, FROZEN_STEPS, MOMENTUM)
        except OutOfTime:
            return candidate.remark(f"momentum not measured: {self.deadline.over}")
        if not plain:
            return candidate.remark(f"no learning rate holds for {FROZEN_STEPS} steps with the structure left as it is")
        candidate.momentum = heavy / plain
        return f"momentum changes the learning rate by {candidate.momentum:.3g}"

    def _largest(
        self, candidate: Candidate, make: Callable[[Weights], Weights], top: float, steps: int, momentum: float = 0.0
    ) -> float:
        """Return the first of a learning rate, a half of it, … that holds for some steps in a row; 0 if none does."""

        def direction(weights: Weights) -> Weights | None:
            self.deadline.check()
            try:
                return make(weights)
            except (torch.linalg.LinAlgError, ValueError):  # type: ignore[attr-defined]  # weights have run away; wrong options were refused at the present ones
                return None

        def holds(rate: float) -> bool:
            self.deadline.check()
            assert candidate.step is not None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", IllConditioned)
                warnings.simplefilter("ignore", OutsideRange)
                losses = repeated(self.landscape, self.batches, candidate.step, direction, rate, steps, momentum)
            return held(losses, steps)

        return largest(holds, [top / 2**k for k in range(TRIES)] if top else [])
