"""Numerical rank: how many singular values of the rows are not zero, and how sure that is.

A singular value is counted if it stays above `rtol·σ_max` whatever the errors of the route did to it, and it is deficient
if it stays below. What is neither is *undecided*, so that a rank comes with bounds:

    route      error that a decision allows for
    gram       R·ε·λ_max in the eigenvalues λ = σ²: nothing is seen below about 1e-8·σ_max, and nothing is deficient there
    svd        max(R, P)·ε·σ_max, which is also what `rtol` is by default: what is below counts as zero
    lanczos    that of gram, what a few steps leave open, and the 99 per cent interval of the estimate over probes

Rows in less than float64 are computed with in float64, but carry their own round-off: ε‖S‖_F, ε of their type, in every
singular value by Weyl's inequality. Rows that are exactly zero, and the one redundant row of a position under a softmax,
are known to be deficient without looking.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, inf, isfinite, log10, nan, sqrt
from statistics import fmean, stdev
from typing import Literal, get_args

import torch
from jaxtyping import Float
from scipy.stats import t as student
from torch import Tensor

from curvlab.errors import unknown_name
from curvlab.fisher.damping import Damping, absolute
from curvlab.rows import Rows
from curvlab.spectrum.lanczos import Product, Quadrature, quadrature
from curvlab.spectrum.selection import restricted
from curvlab.spectrum.singular import (
    EPS,
    Directions,
    check_finite,
    checked,
    descending,
    gram_bytes,
    gram_eigenvalues,
    sides,
    singular_bytes,
    singular_values,
    small_operator,
)
from curvlab.tools.generators import source_of
from curvlab.tools.shown import line

logger = logging.getLogger("curvlab")

Method = Literal["auto", "gram", "svd", "lanczos"]
CONFIDENCE = 0.99
"""Of the interval that a stochastic estimate gives for the rank."""


@dataclass(frozen=True, eq=False)
class Rank:
    """A numerical rank with what it was decided on.

    Attributes:
        rank: number of singular values that count; from "lanczos" an estimate, rounded.
        lower: smallest rank that the errors of the route leave possible.
        upper: largest rank that they leave possible.
        rows: R.
        columns: P; None for a given Gram matrix.
        attainable: largest rank that R, P, rows that are exactly zero and the loss admit.
        structural_zeros: directions of row space to which the loss gives no weight: one a sample (a position) for the
            exact rows of a cross-entropy, all rows of a sample that is ignored.
        singular_values: of the rows, descending, float64: all `min(R, P)` of them; from "lanczos" Ritz values.
        multiplicity: how many singular values each of these stands for: 1 unless from "lanczos".
        cut: singular values above it count.
        method: the route that was taken, "gram", "svd" or "lanczos".
        standard_error: of the estimate before rounding, over probes; 0 for exact routes.
    """

    rank: int
    lower: int
    upper: int
    rows: int
    columns: int | None
    attainable: int
    structural_zeros: int
    singular_values: Float[Tensor, " n"]
    multiplicity: Float[Tensor, " n"]
    cut: float
    method: Method
    standard_error: float = 0.0

    def __repr__(self) -> str:
        interval = f"between {self.lower} and {self.upper}" if self.undecided else ""
        sizes = {"attainable": self.attainable, "rows": self.rows, "columns": self.columns}
        return line(self, interval, rank=self.rank, **sizes, cut=self.cut, method=self.method)

    @property
    def undecided(self) -> int:
        """How many singular values cannot be told from zero, or from the threshold, by this route."""
        return self.upper - self.lower

    @property
    def full(self) -> bool | None:
        """Whether the rows have full row rank, apart from `structural_zeros`; None if that is undecided."""
        wanted = self.rows - self.structural_zeros
        if self.lower >= wanted:
            return True
        return False if self.upper < wanted else None

    @property
    def above(self) -> float | None:
        """Smallest singular value that counts; None if none does."""
        counted = self._attainable_values[self._attainable_values > self.cut]
        return float(counted[-1]) if len(counted) else None

    @property
    def below(self) -> float | None:
        """Largest singular value that does not count; None if all that are attainable do."""
        others = self._attainable_values[self._attainable_values <= self.cut]
        return float(others[0]) if len(others) else None

    @property
    def margin(self) -> float:
        """Decades between the cut and the nearest singular value: how far the cut could move at the same `rank`."""
        distances = [log10(self.above / self.cut)] if self.above and self.cut else []
        distances += [log10(self.cut / self.below)] if self.below else []
        return min(distances, default=inf)

    @property
    def condition(self) -> float:
        """`σ_max` over the smallest singular value that counts; nan for rank 0."""
        return float(self.singular_values[0]) / self.above if self.above else nan

    @property
    def condition_of_all(self) -> float:
        """`condition` if the row rank is `full`, inf if it is not, nan if that is undecided."""
        return nan if self.full is None else self.condition if self.full else inf

    @property
    def _attainable_values(self) -> Float[Tensor, " n"]:
        larger = self.multiplicity.cumsum(0) - self.multiplicity
        return self.singular_values[larger < self.attainable - 1e-6]

    def effective_dimension(self, damping: Damping) -> float:
        """Return `Σ λ/(λ + ρ)` over the eigenvalues `λ = σ²` of `SᵀS`; those that count, for ρ = 0.

        Args:
            damping: ρ, absolute or relative to λ_max ("rel:1e-6").
        """
        values = self.singular_values.square()
        rho = absolute(damping, lambda: float(values[0]))
        if rho == 0:
            return float(self.multiplicity[self.singular_values > self.cut].sum())
        return float((self.multiplicity * values / (values + rho)).sum())

    def __str__(self) -> str:
        redundant = f" ({self.structural_zeros} redundant by the loss)" if self.structural_zeros else ""
        of = f"{self.rows} rows{redundant}" + ("" if self.columns is None else f" and {self.columns} columns")
        about = f" ± {self.standard_error:.2g}" if self.standard_error else ""
        bounds = f", between {self.lower} and {self.upper}: {self.undecided} undecided" if self.undecided else ""
        verdict = {True: "full row rank", False: "not of full row rank", None: "full row rank undecided"}[self.full]
        if self.columns is not None and self.columns < self.rows - self.structural_zeros:
            verdict += f", which {self.columns} columns cannot give"
        around = [f"{value:.2e} {side} it" for value, side in ((self.above, "above"), (self.below, "below")) if value]
        near = f" ({', '.join(around)}, margin {self.margin:.1f} decades)" if around else ""
        return (
            f"rank {self.rank}{about} of {of}{bounds}; {verdict}. "
            f"Cut at {self.cut:.2e}{near}, condition {self.condition:.2e}, by {self.method}."
        )


def rank(
    rows_or_gram: Rows | Float[Tensor, "R R"],
    rtol: float | None = None,
    *,
    method: Method = "auto",
    parameters: str | Sequence[str] | None = None,
    memory: int = 2**31,
    probes: int = 16,
    steps: int = 128,
    generator: torch.Generator | None = None,
) -> Rank:
    """Return the numerical rank of rows, with bounds that follow from the errors of the computation.

    Args:
        rows_or_gram: rows, or a Gram matrix `SSᵀ`.
        rtol: singular values of the *rows* up to `rtol·σ_max` count as zero, also where a Gram matrix is given;
            `max(R, P)·ε` of float64 if None.
        method: "gram" for the eigenvalues of `SSᵀ` (or `SᵀS`, if that is smaller); "svd" for the singular values of the
            dense rows; "lanczos" for an estimate from products alone; "auto" for "gram", followed by "svd" if that can
            decide more, each if `memory` admits it, and "lanczos" if the first does not fit.
        parameters: columns to take, by the names of parameters or of whole modules; all if None.
        memory: bytes that "auto" may use.
        probes: random vectors of "lanczos".
        steps: products with each of them; about `√(λ_max/λ)` are needed to see an eigenvalue λ.
        generator: source of the random vectors; a fixed seed if None.

    Raises:
        ValueError: for data that are empty or not finite, a matrix that is not symmetric, unknown names, and options
            that are out of range or need rows where a Gram matrix was given.
        NotPositiveDefinite: for a Gram matrix with an eigenvalue below `-√ε·λ_max`.

    Cost: with `n = min(R, P)`, `n³` beside the Gram matrix ("gram"), `R·P·n` ("svd"), `probes·steps` pairs of products
    with the rows and `probes·steps²·n` ("lanczos").
    """
    _check_options(rtol, method, memory, probes, steps)
    source = source_of(generator)
    if isinstance(rows_or_gram, Tensor):
        return _rank_of_gram(rows_or_gram, rtol, method, parameters, (probes, steps, source))
    rows = restricted(rows_or_gram, parameters)
    layers = rows.layers
    if not layers or not rows.R:
        raise ValueError("There are no rows to take a rank of: the data are empty, or no parameter was chosen.")
    check_finite(layers)
    R, P = sides(layers)
    directions = Directions(layers, rows.root)
    question = _Question(
        rows=R,
        columns=P,
        attainable=min(directions.count, P),
        structural_zeros=_structural_zeros(rows),
        rtol=max(R, P) * EPS if rtol is None else rtol,
        rounding=0.0 if rows.dtype == torch.float64 else torch.finfo(rows.dtype).eps,
    )
    if method == "svd" or not question.attainable:
        return question.singular(singular_values(layers))
    if method == "lanczos" or (method == "auto" and gram_bytes(layers) > memory):
        logger.info("Rank of %d rows and %d columns by a stochastic Lanczos estimate.", R, P)
        operator, size = small_operator(layers)
        starts = (_draw(size, source, rows.device) for _ in range(probes))
        if R <= P:
            return question.estimated(operator, map(directions.project, starts), steps, directions.count)
        return question.estimated(operator, starts, steps, P)
    found = question.gram(gram_eigenvalues(layers))
    if method == "auto" and found.undecided and not question.rounding and singular_bytes(layers) <= memory:
        return question.singular(singular_values(layers))
    return found


def effective_dimension(rows_or_values: Rows | Float[Tensor, " n"] | Float[Tensor, "R R"], damping: Damping) -> float:
    """Return `Σ λ/(λ + ρ)`, the number of directions that damping leaves in place.

    Args:
        rows_or_values: rows, eigenvalues of a positive semi-definite matrix in any order, or a Gram matrix.
        damping: ρ, absolute or relative to λ_max ("rel:1e-6"); 0 counts the eigenvalues above round-off.

    Raises:
        ValueError: as `rank`.
        NotPositiveDefinite: for an eigenvalue below 0 by more than round-off.

    Cost: that of `rank`.
    """
    return _spectrum(rows_or_values).effective_dimension(damping)


def condition_number(rows_or_values: Rows | Float[Tensor, " n"] | Float[Tensor, "R R"]) -> float:
    """Return `λ_max/λ_min` of the Gram matrix over the eigenvalues that count, the square of `Rank.condition`.

    Arguments, errors and cost as `effective_dimension`.
    """
    return _spectrum(rows_or_values).condition ** 2


@dataclass(frozen=True)
class _Question:
    """What is to be decided, whatever the route.

    Attributes:
        rows, columns, attainable, structural_zeros: see `Rank`.
        rtol: relative threshold of singular values.
        rounding: ε of the rows' type, 0 if it is the type that is computed in.
    """

    rows: int
    columns: int | None
    attainable: int
    structural_zeros: int
    rtol: float
    rounding: float = 0.0

    def gram(self, eigenvalues: Float[Tensor, " n"], dtype: torch.dtype = torch.float64) -> Rank:
        """Decide on the descending eigenvalues of a matrix computed in some type; negative ones show its errors."""
        noise = max(self.rows * torch.finfo(dtype).eps * float(eigenvalues[0]), -float(eigenvalues[-1]))
        return self._exact(eigenvalues.clamp_min(0).sqrt(), "gram", noise=noise)

    def singular(self, values: Float[Tensor, " n"]) -> Rank:
        """Decide on descending singular values."""
        return self._exact(values, "svd", resolution=max(self.rows, self.columns or 0) * EPS * float(values[0]))

    def estimated(self, operator: Product, starts: Iterable[Tensor], steps: int, dimension: int) -> Rank:
        """Estimate from the measures that vectors of an invariant subspace see.

        Besides the interval of the estimate two bounds hold for certain: by interlacing, at least as many eigenvalues as
        Ritz values lie above a number, and below it.
        """
        measures = [quadrature(operator, start, steps) for start in starts]
        nodes = torch.cat([measure.nodes for measure in measures])
        weights = torch.cat([measure.weights for measure in measures]) * (dimension / len(measures))
        order = nodes.argsort(descending=True)
        values, multiplicity = descending(nodes, torch.float64).clamp_min(0), weights[order]
        noise = self.rows * EPS * float(values[0])
        cut, zero = self._limits(float(values[0]) ** 0.5, float(multiplicity @ values) ** 0.5, noise=noise)

        def mass(share: Callable[[Quadrature], float]) -> tuple[float, float]:
            each = [round(dimension * share(measure), 6) for measure in measures]
            return fmean(each), stdev(each) / sqrt(len(each))

        def at_least(number: float, view: Callable[[Quadrature], Quadrature]) -> tuple[int, int]:
            certain = max(int((view(measure).nodes > number).sum()) for measure in measures)
            counted, error = mass(lambda measure: view(measure).surely_above(number))
            return certain, ceil(counted - student.ppf((1 + CONFIDENCE) / 2, len(measures) - 1) * error)

        estimate, error = mass(lambda measure: float(measure.weights[measure.nodes > cut**2].sum()))
        above = at_least(cut**2, lambda measure: measure)
        below = at_least(-(zero**2), Quadrature.mirrored) if zero >= 0 else (0, 0)
        most = min(self.attainable, dimension - below[0])
        lower = min(max(above), most)
        upper = max(min(most, dimension - below[1]), lower)
        return self._rank(
            min(max(round(estimate), lower), upper), (lower, upper), values.sqrt(), multiplicity, cut, "lanczos", error
        )

    def _exact(
        self, values: Float[Tensor, " n"], method: Method, *, noise: float = 0.0, resolution: float = 0.0
    ) -> Rank:
        cut, zero = self._limits(float(values[0]), float(values.norm()), noise=noise, resolution=resolution)
        attainable = values[: self.attainable]
        counted, vanished = int((attainable > cut).sum()), int((attainable <= zero).sum())
        bounds = (counted, self.attainable - vanished)
        return self._rank(counted, bounds, values, torch.ones_like(values), cut, method)

    def _limits(
        self, largest: float, norm: float, *, noise: float = 0.0, resolution: float = 0.0
    ) -> tuple[float, float]:
        """Return the singular value above which all count, and that up to which all vanish, -1 if no value is that small.

        Args:
            largest: σ_max.
            norm: ‖S‖_F.
            noise: error of the squared singular values.
            resolution: smallest threshold that the values themselves admit.
        """
        threshold, rounding = self.rtol * largest, self.rounding * norm
        cut = sqrt((max(threshold, resolution) + rounding) ** 2 + noise)
        within = threshold >= max(resolution, rounding) and (threshold - rounding) ** 2 >= noise
        return cut, sqrt((threshold - rounding) ** 2 - noise) if within else -1.0

    def _rank(
        self,
        number: int,
        bounds: tuple[int, int],
        values: Float[Tensor, " n"],
        multiplicity: Float[Tensor, " n"],
        cut: float,
        method: Method,
        standard_error: float = 0.0,
    ) -> Rank:
        return Rank(
            rank=number,
            lower=bounds[0],
            upper=bounds[1],
            rows=self.rows,
            columns=self.columns,
            attainable=self.attainable,
            structural_zeros=self.structural_zeros,
            singular_values=values,
            multiplicity=multiplicity,
            cut=cut,
            method=method,
            standard_error=standard_error,
        )


def _rank_of_gram(
    gram: Float[Tensor, "R R"],
    rtol: float | None,
    method: Method,
    parameters: str | Sequence[str] | None,
    lanczos: tuple[int, int, torch.Generator],
) -> Rank:
    if method == "svd" or parameters is not None:
        option = "parameters=" if method != "svd" else "method='svd'"
        raise ValueError(f"{option} needs rows: a Gram matrix no longer tells their columns. Pass a curvlab.Rows.")
    matrix = checked(gram)
    R = len(matrix)
    question = _Question(rows=R, columns=None, attainable=R, structural_zeros=0, rtol=R * EPS if rtol is None else rtol)
    if method == "lanczos":
        probes, steps, generator = lanczos
        starts = (_draw(R, generator, matrix.device) for _ in range(probes))
        return question.estimated(lambda c: matrix @ c, starts, steps, R)
    return question.gram(descending(torch.linalg.eigvalsh(matrix), gram.dtype), gram.dtype)


def _spectrum(source: Rows | Tensor) -> Rank:
    if not isinstance(source, Tensor) or source.ndim != 1:
        return rank(source)
    n = len(source)
    if not n or not source.is_floating_point() or not bool(torch.isfinite(source).all()):
        raise ValueError("Eigenvalues are a vector of at least one finite floating-point number.")
    question = _Question(rows=n, columns=None, attainable=n, structural_zeros=0, rtol=n * EPS)
    return question.gram(descending(source, source.dtype), source.dtype)


def _structural_zeros(rows: Rows) -> int:
    """Count the directions of row space to which the loss gives no weight."""
    if rows.root is None:
        return rows.shape[0] * int((rows.sample_weights == 0).sum())
    weighed = rows.root.weighed
    redundant = 0
    for at, null in rows.root.nulls:
        C, N, X = null.shape
        redundant += int(weighed[at].view(C, X, N).any(0).sum())
    return redundant + int((~weighed).sum())


def _draw(size: int, generator: torch.Generator, device: torch.device) -> Float[Tensor, " n"]:
    return torch.randn(size, generator=generator, dtype=torch.float64, device=generator.device).to(device)


def _check_options(rtol: float | None, method: str, memory: int, probes: int, steps: int) -> None:
    if method not in get_args(Method):
        raise unknown_name("method", method, get_args(Method))
    if rtol is not None and not (isfinite(rtol) and 0 <= rtol < 1):
        raise ValueError(f"rtol is a share of the largest singular value, at least 0 and below 1, got {rtol}.")
    for name, value, least in (("memory", memory, 1), ("probes", probes, 2), ("steps", steps, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
