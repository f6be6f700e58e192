"""The curvature of the loss on the batch: its largest eigenvalues, those that the optimiser sees, and its trace.

Eigenvalues go on from what the last measurement found, with few products a time: θ = max_v vᵀHv/vᵀv over the space that they
span, a lower bound of the largest eigenvalue, which lies within the residual of an eigenvalue. So the first measurements are too
low; those whose residual is small are called converged.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import median

import torch

from curvlab.fisher import Structure
from curvlab.monitor.events import Condition
from curvlab.monitor.quantity import Quantity
from curvlab.monitor.stepping import Stepping, Whitened
from curvlab.monitor.training import Training
from curvlab.spectrum import Eigenpairs, NotConverged, Operator, eigenpairs, trace

RISE = 1.5
"""Sharpening is a rise by this factor above the lowest sharpness so far."""
RECENT = 3
"""Measurements whose median counts, as batches differ."""


class _Largest(Quantity):
    """Largest eigenvalues, followed along the run.

    Args:
        k: how many.
        products: products with a vector a measurement, at least k.
        tolerance: residual relative to the eigenvalue, within which it counts as converged.
    """

    weight = 4.0
    passes = 20.0

    def __init__(self, k: int = 1, products: int = 4, tolerance: float = 0.05) -> None:
        if not 1 <= k <= products:
            raise ValueError(f"{k} eigenvalues need as many products at least, got {products}.")
        self.k, self.products, self.tolerance = k, products, tolerance
        self._start: Eigenpairs | None = None
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._lowest = float("inf")

    @abstractmethod
    def operator(self, training: Training) -> Operator:
        """Return the operator at present."""

    def measure(self, training: Training) -> dict[str, float]:
        """Return eigenvalues, and the residual of the largest relative to it."""
        operator = self.operator(training)
        if self._start is not None and self._start.subspace.shape[1] != operator.size:
            self._start = None
        k = min(self.k, operator.size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConverged)
            found = eigenpairs(
                operator, k, tolerance=self.tolerance, start=self._start, block=k, max_products=self.products
            )
        self._start = found
        names = ["sharpness", *(f"eigenvalue_{i + 1}" for i in range(1, k))]
        values = dict(zip(names, found.values.tolist(), strict=True))
        return values | {"residual": float(found.residuals[0]) / max(abs(values["sharpness"]), 1e-300)}

    def conditions(self, values: Mapping[str, float]) -> Iterable[Condition]:
        """Watch for sharpening."""
        if values["sharpness"] <= 0 or values["residual"] > self.tolerance:
            return
        self._recent.append(values["sharpness"])
        if len(self._recent) < RECENT:
            return
        present = median(self._recent)
        self._lowest = min(self._lowest, present)
        yield Condition(
            "sharpening",
            present / (RISE * self._lowest),
            f"the sharpness has risen from {self._lowest:.3g} to {present:.3g}. Where it rises to the edge, steps become "
            "unstable: be ready to lower the learning rate.",
        )


class Eigenvalues(_Largest, key="eigenvalues", summary="largest eigenvalues of the Hessian on the batch"):
    """Largest eigenvalues of the Hessian, the sharpness first."""

    def operator(self, training: Training) -> Operator:
        """Return the Hessian."""
        return training.hessian()


class Edge(
    _Largest, key="edge", summary="preconditioned sharpness λ_max(P⁻¹H) beside the edge, 2/η for gradient descent"
):
    """The sharpness that the optimiser sees, beside the largest one at which its steps are stable.

    The ratio of both is 1 at the edge. On a batch it is that of the loss of the batch, which is sharper than the mean over all.

    Args:
        k: eigenvalues.
        products: products with a vector a measurement.
        tolerance: see `Eigenvalues`.
        margin: how far below the edge the event is raised.
    """

    of_optimizer = True

    def __init__(self, k: int = 1, products: int = 4, tolerance: float = 0.05, margin: float = 0.05) -> None:
        super().__init__(k, products, tolerance)
        if not 0 <= margin < 1:
            raise ValueError(f"margin is a share of the edge, at least 0 and below 1, got {margin}.")
        self.margin = margin
        self._stepping: Stepping | None = None

    def operator(self, training: Training) -> Operator:
        """Return `P^{-1/2} H P^{-1/2}`."""
        self._stepping = training.stepping()
        names = tuple(self._stepping.space.shapes)
        hessian = training.hessian(None if names == tuple(training.space.shapes) else names)
        return Whitened(hessian, self._stepping)

    def measure(self, training: Training) -> dict[str, float]:
        """Return eigenvalues, the edge, and the ratio."""
        values = super().measure(training)
        assert self._stepping is not None
        edge = self._stepping.edge
        return values | {"edge": edge, "ratio": values["sharpness"] / edge}

    def conditions(self, values: Mapping[str, float]) -> Iterable[Condition]:
        """Watch for sharpening, the edge, and for curvature that a damped structure does not see."""
        yield from super().conditions(values)
        yield Condition(
            "at the edge",
            values["ratio"] / (1 - self.margin),
            f"the preconditioned sharpness {values['sharpness']:.3g} is {values['ratio']:.2f} of the edge {values['edge']:.3g}, "
            "beyond which steps are unstable. Lower the learning rate, or let it settle here if the loss still falls.",
        )
        stepping = self._stepping
        if stepping is not None and isinstance(stepping.preconditioner, Structure):
            yield Condition(
                "damping too small",
                values["sharpness"] / 2,
                f"in some direction the curvature is {values['sharpness']:.3g} times that of the damped "
                f"{stepping.preconditioner.key} structure, so a step with η = 1 makes the loss larger there. Raise the damping "
                f"above {stepping.damping:.3g}.",
            )


class Trace(Quantity, key="trace", summary="trace of the Hessian on the batch, an estimate with its standard error"):
    """Trace of the Hessian from random vectors, other ones in each measurement.

    Args:
        products: products with a vector, see `curvlab.spectrum.trace`.
        seed: of the vectors.
    """

    weight = 2.0

    def __init__(self, products: int = 8, seed: int = 0) -> None:
        if products < 4:
            raise ValueError(f"products must be at least 4, got {products}.")
        self.products = products
        self.passes = 6.0 + 3.0 * products
        self._generator = torch.Generator().manual_seed(seed)

    def measure(self, training: Training) -> dict[str, float]:
        """Return the estimate."""
        found = trace(training.hessian(), products=self.products, generator=self._generator)
        return {"value": found.value, "standard_error": found.standard_error}
