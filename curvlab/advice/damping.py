"""The interval of dampings at which a step lowers the loss of its own batch, and that of others by more than their noise.

Steps are real ones of the optimiser, from the present weights, one a damping. A damping is too small where the quadratic model
does not hold over the step, so that the batch's loss does not fall, and where the step follows what is particular to the batch,
so that the fall of other batches drowns in the noise between them. It is too large where less than half of the best fall is left.
"""

from __future__ import annotations

import copy
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
from curvlab.rows.sweep import PickOutput, as_arguments, select_output

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

    def value(of: nn.Module, data: Batch) -> float:
        inputs, targets = data
        args, kwargs = as_arguments(inputs)
        with torch.no_grad(), replayed(state):
            returned = of(*args, **kwargs)
            return float(loss(returned if output is None else select_output(returned, output), targets))

    seen, before = [], []
    for data in (batch, *others):
        with suppress(ValueError):  # of batch normalisation that is given one sample
            before.append(value(copy.deepcopy(model), data))
            seen.append(data)
    if not seen or seen[0] is not batch:
        return None

    def tried(one: Candidate) -> tuple[Entrant, Tried]:
        entrant = Entrant.of(one, model, loss, output, graph=graph)
        with replayed(state):
            entrant.run([batch], -inf, clock)
        falls = [b - value(entrant.model, data) for b, data in zip(before, seen, strict=True)]
        other = torch.tensor(falls[1:], dtype=torch.float64)
        mean = float(other.mean()) if len(other) else nan
        error = float(other.std() / len(other) ** 0.5) if len(other) > 1 else nan
        return entrant, Tried(nan, falls[0] if entrant.trouble is None else -inf, mean, error)

    entrant, first = tried(candidate)
    assert isinstance(entrant.optimizer, NaturalGradient)
    start = entrant.optimizer.log().get("damping")
    if entrant.trouble is not None or not start:
        return None
    found = [replace(first, damping=start)]
    for distance in range(1, FURTHEST + 1):
        for sign in (1, -1):
            if clock() >= until:
                break
            damping = start * 10 ** (sign * distance / 2)
            _, one = tried(replace(candidate, settings={**candidate.settings, "damping": damping}))
            found.append(replace(one, damping=damping))
    return Dampings(tuple(sorted(found, key=lambda one: one.damping)), start, len(seen) - 1)
