"""What is worth telling about a run: conditions that a quantity watches, and events when one begins to hold."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

logger = logging.getLogger("curvlab")

OVER = 0.9
"""A condition that holds is over once its level falls below this, so that noise around 1 is one event and not many."""


@dataclass(frozen=True)
class Condition:
    """Something that a quantity watches.

    Attributes:
        name: such as "at the edge".
        level: how close it is; it holds from 1 on.
        message: what that means for the run, with numbers and a remedy.
        where: the layer that it is about; empty for the whole model.
    """

    name: str
    level: float
    message: str
    where: str = ""


@dataclass(frozen=True)
class Event:
    """A condition that began to hold.

    Attributes:
        step: number of steps taken.
        name: of the condition.
        quantity: key of the quantity that watches it.
        message: see `Condition`.
        where: the layer that it is about; empty for the whole model.
    """

    step: int
    name: str
    quantity: str
    message: str
    where: str = ""


@dataclass
class Onsets:
    """Tells when conditions begin to hold: once, until they are over and begin again."""

    _holding: set[tuple[str, str, str]] = field(default_factory=set)

    def of(self, step: int, quantity: str, conditions: Iterable[Condition]) -> list[Event]:
        """Return the events of a measurement, and log them."""
        events = []
        for condition in conditions:
            which = (quantity, condition.name, condition.where)
            if condition.level >= 1 and which not in self._holding:
                self._holding.add(which)
                events.append(Event(step, condition.name, quantity, condition.message, condition.where))
            elif condition.level < OVER:
                self._holding.discard(which)
        for event in events:
            logger.warning("Step %d, %s: %s", event.step, event.name, event.message)
        return events
