"""What is measured along a run: one class a quantity, in one registry that is open to others.

A quantity of one's own takes a class:

    class Norm(Quantity, key="norm", summary="norm of all parameters"):
        def measure(self, training):
            return {"norm": float(training.parameters.norm())}
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from curvlab.monitor.events import Condition
from curvlab.monitor.training import Training
from curvlab.tools.registry import Registry


class Quantity(ABC):
    """A quantity with its state, such as what the last measurement found; an instance belongs to one run."""

    key: ClassVar[str]
    summary: ClassVar[str]
    weight: float = 1.0
    """Its part of the budget, beside those of the others."""
    passes: float = 4.0
    """Forward and backward passes that the first measurement takes at most; later ones are planned by what they took."""
    of_optimizer: ClassVar[bool] = False
    """Whether it needs the optimiser."""
    of_step: ClassVar[bool] = False
    """Whether it needs what the step did, `Training.change`."""

    def __init_subclass__(cls, key: str | None = None, summary: str = "", **kwargs: Any) -> None:
        """Register a subclass that has a key, by which it is asked for."""
        super().__init_subclass__(**kwargs)
        if key is not None:
            cls.key, cls.summary = key, summary
            QUANTITIES.register(key, cls)

    @abstractmethod
    def measure(self, training: Training) -> Mapping[str, float]:
        """Return numbers by name; raises whatever makes it impossible, and is then dropped with a warning."""

    def conditions(self, values: Mapping[str, float]) -> Iterable[Condition]:  # noqa: ARG002
        """Return what this quantity watches, given what it measured."""
        return ()


QUANTITIES: Registry[type[Quantity]] = Registry(
    "quantity",
    "curvlab.quantities",
    form="a Quantity class",
    fits=lambda thing: isinstance(thing, type) and issubclass(thing, Quantity),
)
"""Every quantity by its key, ours and those of installed packages, which add to them by entry points of the group
``curvlab.quantities``, and any other as ``module:Class``."""
