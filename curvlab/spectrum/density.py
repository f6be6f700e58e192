"""Spectral density and functions of the spectrum by stochastic Lanczos quadrature, with error bars over random probes.

Source: Ubaru, Chen & Saad 2017, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature; Lin, Saad & Yang 2016,
Approximating spectral densities of large matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import pi, sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.errors import NotPositiveDefinite
from curvlab.fisher.damping import Damping, absolute
from curvlab.spectrum.eigen import eigenpairs
from curvlab.spectrum.estimates import Estimate
from curvlab.spectrum.lanczos import Quadrature, quadratures
from curvlab.spectrum.operator import Operator, check_operator
from curvlab.tools.generators import source_of
from curvlab.tools.shown import curve, line

BASIS_ELEMENTS = 2**27
"""Numbers that the bases of the probes that run together may hold."""


@dataclass(frozen=True, eq=False)
class Density:
    """The distribution of an operator's eigenvalues, as its random probes see it.

    Attributes:
        size: number of eigenvalues P.
        probes: one quadrature a probe; its nodes and weights are the distribution in the mean over probes.
        products: products with single vectors that it took.
    """

    size: int
    probes: tuple[Quadrature, ...]
    products: int

    def __repr__(self) -> str:
        low, high = float(self.nodes[0]), float(self.nodes[-1])
        return line(self, P=self.size, eigenvalues=[low, high], probes=len(self.probes), products=self.products)

    def _repr_html_(self) -> str:
        grid = torch.linspace(float(self.nodes[0]), float(self.nodes[-1]), 181, dtype=torch.float64)
        return curve(self, grid.tolist(), self.on(grid)[0].tolist())

    @property
    def nodes(self) -> Float[Tensor, " m"]:
        """Nodes of all probes, ascending, in float64."""
        return torch.cat([probe.nodes for probe in self.probes]).sort().values

    @property
    def weights(self) -> Float[Tensor, " m"]:
        """Weights of `nodes`: shares of the eigenvalues, summing to 1."""
        order = torch.cat([probe.nodes for probe in self.probes]).argsort()
        return torch.cat([probe.weights for probe in self.probes])[order] / len(self.probes)

    @property
    def width(self) -> float:
        """Kernel width that `on` uses by default: a hundredth of the distance between the outermost nodes.

        A hundredth of the modulus where all nodes agree, and of 1 where they are zero.
        """
        distance, largest = float(self.nodes[-1] - self.nodes[0]), float(self.nodes.abs().max())
        return (distance if distance > 1e-9 * largest else largest or 1.0) / 100

    def on(
        self, grid: Float[Tensor, " G"], width: float | None = None
    ) -> tuple[Float[Tensor, " G"], Float[Tensor, " G"]]:
        """Return the density on a grid, and its standard error over probes.

        Args:
            grid: eigenvalues to evaluate at.
            width: standard deviation of the Gaussian that stands for every node, in units of eigenvalues. What is finer
                than the distance of nodes, about `4·spread/steps`, is the probes' and not the spectrum's.

        Returns:
            The density, of integral 1, in units of one over eigenvalue.
        """
        sigma = self.width if width is None else width
        if not sigma > 0:
            raise ValueError(f"width must be positive, got {width}.")
        x = grid.double().cpu()[:, None]
        each = [
            (probe.weights * (-0.5 * ((x - probe.nodes) / sigma).square()).exp()).sum(1) / (sigma * sqrt(2 * pi))
            for probe in self.probes
        ]
        return _mean(torch.stack(each))

    def sum(self, function: Callable[[Float[Tensor, " m"]], Float[Tensor, " m"]]) -> Estimate:
        """Return `Σ_i f(λ_i) = tr f(A)`, the sum over all P eigenvalues.

        Args:
            function: f, of a vector of eigenvalues. Polynomials up to degree `2·steps − 1` are integrated without error
                beside that over probes; what varies faster near the spectrum is not.
        """
        value, error = _mean(torch.stack([(probe.weights * function(probe.nodes)).sum() for probe in self.probes]))
        return Estimate(self.size * float(value), self.size * float(error), self.products)


def density(
    operator: Operator, *, probes: int = 8, steps: int = 64, generator: torch.Generator | None = None
) -> Density:
    """Return the spectral density of an operator.

    Args:
        operator: symmetric in the Euclidean inner product.
        probes: random vectors; standard errors fall with their square root.
        steps: Lanczos steps, which set the resolution: isolated eigenvalues at the ends come out exactly.
        generator: source of the random vectors; a fixed seed if None.

    Raises:
        ValueError: for another inner product, fewer than 2 probes, no steps, and products that are not finite.

    Cost: `probes·steps` products, in blocks of as many probes as memory admits, and `2·probes·steps²·P` operations;
    memory `steps·P` for each probe of a block.
    """
    check_operator(operator)
    if not operator.euclidean:
        raise ValueError(f"{operator!r} is not symmetric in the Euclidean inner product, which the density relies on.")
    if probes < 2:
        raise ValueError(f"probes must be at least 2, for an error bar; got {probes}.")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    source = source_of(generator)
    drawn = torch.randn(probes, operator.size, generator=source, dtype=operator.dtype, device=source.device)
    together = max(1, BASIS_ELEMENTS // (min(steps, operator.size) * operator.size))
    found = [
        gauss
        for starts in drawn.to(operator.device).split(together)
        for gauss in quadratures(operator.checked_matmat, starts, steps)
    ]
    return Density(operator.size, tuple(found), sum(len(gauss.nodes) for gauss in found))


def logdet(
    operator: Operator,
    damping: Damping = 0.0,
    *,
    probes: int = 16,
    steps: int = 64,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Return `log det(A + ρI)`.

    Args:
        operator: A, symmetric in the Euclidean inner product.
        damping: ρ, absolute or relative to λ_max(A).
        probes: random vectors; standard errors fall with their square root.
        steps: Lanczos steps of each.
        generator: source of the random vectors; a fixed seed if None.

    Raises:
        NotPositiveDefinite: if a Ritz value shows an eigenvalue of A + ρI that is not above round-off.

    Cost: that of `density`. The standard error is that over probes. The quadrature's own error falls by about
    `exp(−4/√κ)` a step, κ being the condition number of A + ρI, and makes the result too large.
    """
    rho = absolute(damping, lambda: float(eigenpairs(operator, 1).values[0]))
    measured = density(operator, probes=probes, steps=steps, generator=generator)
    lowest, largest = float(measured.nodes[0]) + rho, float(measured.nodes.abs().max())
    if lowest <= operator.size * torch.finfo(operator.dtype).eps * max(largest, rho):
        raise NotPositiveDefinite(
            f"A + ρI has an eigenvalue at or below {lowest:.3g}, at ρ = {rho:.3g}, so it has no log-determinant. Use a "
            f"damping well above {rho - lowest:.3g}."
        )
    return measured.sum(lambda values: (values + rho).log())


def _mean(each: Float[Tensor, K * G]) -> tuple[Float[Tensor, "*G"], Float[Tensor, "*G"]]:
    """Return mean and standard error over the first axis."""
    return each.mean(0), each.std(0) / sqrt(len(each))
