"""The interval of dampings at which a step lowers the loss of its own batch, and that of others by more than their noise.

Steps are real ones of the optimiser, from the present weights, one a damping. A damping is too small where the quadratic model
does not hold over the step, so that the batch's loss does not fall, and where the step follows what is particular to the batch,
so that the fall of other batches drowns in the noise between them. It is too large where less than half of the best fall is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from math import inf, isfinite, nan
from typing import TYPE_CHECKING

import torch
from torch import nn

from curvlab.advice.candidates import Candidate
from curvlab.advice.race import Clock, Entrant
from curvlab.compare.batches import Batch
from curvlab.nn.modes import random_state, replayed
from curvlab.optim import NaturalGradient
from curvlab.rows.sweep import PickOutput

if TYPE_CHECKING:
    import pandas as pd

FURTHEST = 10
"""Half decades of damping on either side of the one that training starts with."""
ERRORS = 2.0
"""Standard errors between batches by which the mean fall of other batches has to exceed zero."""


@dataclass(frozen=True)
class Tried:
    """What one step at a damping did.

    Attributes:
        damping: ρ.
        fall: by how much the loss of the step's own batch fell.
        others: by how much that of other batches fell, their mean; not a number without others.
        error: its standard error between them; not a number for fewer than two.
    """

    damping: float
    fall: float
    others: float
    error: float

    @property
    def holds(self) -> bool:
        """Whether the loss of the own batch fell, and that of the others by more than their noise."""
        noise = ERRORS * self.error if isfinite(self.error) else 0.0
        return self.fall > 0 and not self.others <= noise

    @property
    def merit(self) -> float:
        """The fall of other batches, of the own one without others."""
        return self.others if isfinite(self.others) else self.fall


@dataclass(frozen=True)
class Dampings:
    """Steps at a grid of dampings.

    Attributes:
        tried: by damping, ascending, half decades apart.
        start: the damping that training starts with.
        batches: how many other batches were looked at.
    """

    tried: tuple[Tried, ...]
    start: float
    batches: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """The least and the largest damping that hold around the best one, with half of its fall or more; None if none holds."""
        holding = [place for place, one in enumerate(self.tried) if one.holds]
        if not holding:
            return None
        best = max(holding, key=lambda place: self.tried[place].merit)

        def good(one: Tried) -> bool:
            return one.holds and one.merit >= self.tried[best].merit / 2

        above = list(takewhile(good, self.tried[best:]))
        below = list(takewhile(good, reversed(self.tried[: best + 1])))
        return below[-1].damping, above[-1].damping

    @property
    def table(self) -> pd.DataFrame:
        """One row a damping: `damping`, `fall`, `others`, `error`, `holds`."""
        import pandas as pd  # takes as long to import as all of curvlab

        return pd.DataFrame([{**vars(one), "holds": one.holds} for one in self.tried])

    def __str__(self) -> str:
        what = (
            f"lowers the loss of its batch, and that of {self.batches} others by more than twice the noise between them"
            if self.batches > 1
            else "lowers the loss of its batch"
            + (" and of another one" if self.batches else "; there is no other to tell noise by")
        )
        found = self.interval
        if len(self.tried) == 1:
            whether = f"a step {what}" if found else f"it does not hold that a step {what}"
            return f"At the damping {self.start:.2g} that training starts at {whether}. There was no time for other dampings."
        if found is None:
            return f"No damping was found at which a step {what}."
        low, high = (
            f"{'below ' if found[0] == self.tried[0].damping else ''}{found[0]:.2g}",
            f"{'above ' if found[1] == self.tried[-1].damping else ''}{found[1]:.2g}",
        )
        inside = "inside" if found[0] <= self.start <= found[1] else "outside"
        return (
            f"A step {what}, and by half of the best or more, at dampings from {low} to {high}; training starts at "
            f"{self.start:.2g}, {inside}."
        )


def dampings(
    candidate: Candidate,
    model: nn.Module,
    loss: nn.Module,
    batch: Batch,
    others: Sequence[Batch],
    *,
    output: PickOutput,
    graph: bool,
    until: float,
    clock: Clock,
) -> Dampings | None:
    """Take one step from the present weights at each of a grid of dampings, from the one that training starts with outwards.

    Args:
        candidate: natural gradient.
        model: at the weights that steps start from; it is left as it was.
        loss: its loss.
        batch: that is stepped on.
        others: of which the loss is looked at.
        output: which tensor of a structured output the loss is called on.
        graph: whether samples are nodes of one graph.
        until: the time at which no further damping is tried.
        clock: tells it.

    Returns:
        What came of it; None if not even the first step can be taken.

    Cost: a first step of the optimiser and a forward pass a batch for each damping.
    """
    state = random_state(model)

    def value(entrant: Entrant, data: Batch) -> float:
        with torch.no_grad(), replayed(state):
            return float(entrant.value(data))

    def enter(damping: float | None = None) -> Entrant:
        own = {} if damping is None else {"damping": damping}
        settings = {**candidate.settings, **own}
        return Entrant.of(replace(candidate, settings=settings), model, loss, output, graph=graph)

    start, before = enter(), []
    for data in (batch, *others):
        with suppress(ValueError):  # of batch normalisation that is given one sample
            before.append((data, value(start, data)))
    if not before or before[0][0] is not batch:
        return None

    def step(entrant: Entrant) -> tuple[float, float, float]:
        with replayed(state):
            entrant.run([batch], -inf, clock)
        own, *apart = [b - value(entrant, data) for data, b in before]
        falls = torch.tensor(apart, dtype=torch.float64)
        mean = float(falls.mean()) if apart else nan
        error = float(falls.std() / len(apart) ** 0.5) if len(apart) > 1 else nan
        return own if entrant.trouble is None else -inf, mean, error

    first = step(entrant := enter())
    assert isinstance(entrant.optimizer, NaturalGradient)
    usual = entrant.optimizer.log().get("damping")
    if entrant.trouble is not None or not usual:
        return None
    outwards = [usual * 10 ** (sign * distance / 2) for distance in range(1, FURTHEST + 1) for sign in (1, -1)]
    found = [Tried(usual, *first), *(Tried(rho, *step(enter(rho))) for rho in outwards if clock() < until)]
    return Dampings(tuple(sorted(found, key=lambda one: one.damping)), usual, len(before) - 1)
