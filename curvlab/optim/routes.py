"""Routes from the gradient of a step to its direction `(F + ρI)⁻¹ grad`, the cheapest first.

    Lift                  Sᵀ(SSᵀ + ρI)⁻¹c    the structure keeps this pass' rows, and the gradient is Sᵀc
    PerSampleGradients    Σ_n B⁻¹g ⊗ A⁻¹a    Kronecker blocks, where a and g are smaller than the gradient; blocks of rows
                                             with the same a solve without forming the gradient
    Gradient              (F + ρI)⁻¹ grad    always

All agree to rounding. The first two need a gradient that is this pass' own: not accumulated, clipped or reduced, and of the
loss alone. Version counters and, wherever the host may look at numbers, the numbers tell (`curvlab.optim.sums`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from curvlab.fisher import Structure
from curvlab.fisher.power import Damps
from curvlab.optim.sums import adds_up, is_small
from curvlab.rows.collect import Collector
from curvlab.rows.layer import LayerRows


@dataclass(frozen=True)
class Step:
    """What a route knows of a step.

    Attributes:
        structure: the curvature.
        own: the pass that the gradients are of, if they are of one pass and nothing has touched them since.
        due: whether the rows of this pass go into the curvature.
        power: of the curvature, which is inverted; the first two routes are open for the first one.
        damps: what damping is added to, see `curvlab.fisher.power`.
    """

    structure: Structure
    own: Collector | None
    due: bool
    power: float = 1.0
    damps: Damps = "matrix"


class Route(ABC):
    """A way to the direction of a step."""

    def __init__(self, step: Step) -> None:
        self.structure = step.structure
        self._power, self._damps = step.power, step.damps

    @staticmethod
    @abstractmethod
    def applies(step: Step) -> bool:
        """Whether the route is open for a step."""

    @abstractmethod
    def sums(self, gradients: Mapping[str, Tensor], *, looks: bool) -> set[str]:
        """Return the parameters whose gradients are sums of rows of this pass; asked before the curvature is renewed.

        Args:
            gradients: by name.
            looks: whether numbers may decide.
        """

    @abstractmethod
    def direction(self, gradients: Mapping[str, Tensor], sums: set[str], damping: float) -> dict[str, Tensor]:
        """Return `(F + ρI)⁻¹ grad` for the absolute ρ."""


class Gradient(Route):
    """Solve with the gradient."""

    @staticmethod
    def applies(step: Step) -> bool:  # noqa: ARG004, D102
        return True

    def sums(self, gradients: Mapping[str, Tensor], *, looks: bool) -> set[str]:  # noqa: ARG002, D102
        return set()

    def direction(self, gradients: Mapping[str, Tensor], sums: set[str], damping: float) -> dict[str, Tensor]:  # noqa: ARG002, D102
        return self.structure.direction(gradients, damping, power=self._power, damps=self._damps)


class PerSampleGradients(Route):
    """Solve with per-sample gradients, which add up to the gradient, in the blocks where that is less work."""

    def __init__(self, step: Step) -> None:
        super().__init__(step)
        assert step.own is not None
        self.own = step.own

    @staticmethod
    def applies(step: Step) -> bool:  # noqa: D102
        return step.own is not None and step.power == 1

    def sums(self, gradients: Mapping[str, Tensor], *, looks: bool) -> set[str]:  # noqa: D102
        if not looks:
            return set(gradients)
        layers = (self.own.rows or self.structure.shapes).layers
        return {name for layer in layers if self._adds_up(layer, gradients) for name in layer.layout.names}

    def _adds_up(self, layer: LayerRows, gradients: Mapping[str, Tensor]) -> bool:
        worthwhile = not self.structure.averages or is_small(layer)
        per_sample_gradient = self.own.per_sample_gradient(layer.layout.names[0]) if worthwhile else None
        return per_sample_gradient is not None and adds_up(per_sample_gradient, gradients)

    def direction(self, gradients: Mapping[str, Tensor], sums: set[str], damping: float) -> dict[str, Tensor]:  # noqa: D102
        return self.structure.direction(
            gradients, damping, lambda n: self.own.per_sample_gradient(n) if n in sums else None
        )


class Lift(PerSampleGradients):
    """Lift the coefficients of the gradient in the rows of which the curvature is made."""

    @staticmethod
    def applies(step: Step) -> bool:  # noqa: D102
        own = step.own
        lifts = own is not None and own.coefficients is not None and not step.structure.averages
        return step.due and lifts and step.power == 1

    def _adds_up(self, layer: LayerRows, gradients: Mapping[str, Tensor]) -> bool:
        return adds_up(layer, gradients, self.own.coefficients)

    def direction(self, gradients: Mapping[str, Tensor], sums: set[str], damping: float) -> dict[str, Tensor]:
        """Lift if the whole gradient adds up and the state is made of these rows alone; else see `PerSampleGradients`."""
        if self.structure.rows is not self.own.rows or len(sums) < len(gradients):
            return super().direction(gradients, sums, damping)
        assert self.own.coefficients is not None
        return self.structure.lift(self.own.coefficients, damping)


ROUTES: tuple[type[Route], ...] = (Lift, PerSampleGradients, Gradient)
"""The first one that applies is taken."""


def route_of(step: Step) -> Route:
    """Return the cheapest route of a step."""
    return next(route(step) for route in ROUTES if route.applies(step))
