"""Output Hessians of loss terms, without their weights, and draws from the distributions behind them.

A likelihood says what the Hessian H of a term is, of what form its square root, and what a random row with covariance H
is. Where the Hessian of a term depends on its target, it is no Fisher matrix: kind "exact" refuses, and rows of kind "mc"
come from targets that the model's distribution draws, so that their covariance is the Fisher matrix, or are refused where
there is no distribution.

    Elementwise    H = h, given; no distribution
    Independent    H = h, which depends on no target; Gaussian noise √h ε
    PoissonRate    H = y/(λ + ε)²; score 1 − ŷ/(λ + ε), ŷ ~ Poisson(λ)
    Probability    H = y/p² + (1 − y)/(1 − p)²; score (p − ŷ)/(p(1 − p)), ŷ ~ Bernoulli(p)
    Softmax        H = diag(p) − ppᵀ; p − e_ŷ
    Computed       H by automatic differentiation; no distribution
    Several        likelihoods of different outputs

Shapes: all tensors are `[N, ·, X]`, so that one function brings them into another layout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curvlab.errors import NotPositiveDefinite, StateError
from curvlab.rows.loss.root import BlockRoot, DiagonalRoot, EigenRoot, OutputRoot, SoftmaxRoot
from curvlab.rows.products import pieces

Own = TypeVar("Own", bound="Likelihood")

Lay = Callable[[Tensor], Tensor]
"""Brings a tensor `[N, ·, X]` into another layout of samples and positions."""


@dataclass(frozen=True)
class Draws:
    """How many random rows are drawn, and from what.

    Attributes:
        count: draws a loss term.
        generator: source of the draws.
        share: where these samples start in a batch that several processes share, and how many it has. Processes whose
            generators agree then draw what one would for the whole.
    """

    count: int
    generator: torch.Generator
    share: tuple[int, int] | None = None

    def of(self, how: Callable[..., Tensor], like: Float[Tensor, "N ..."]) -> Float[Tensor, "S N ..."]:
        """Return random numbers of the shape of a tensor, `how` being `torch.rand` or `torch.randn`."""
        N, *rest = like.shape
        start, total = self.share or (0, N)
        source = self.generator
        drawn = how(self.count, total, *rest, generator=source, dtype=like.dtype, device=source.device)
        return drawn[:, start : start + N].to(like.device)


class Likelihood(ABC):
    """What the Hessian of a loss term is, and how to draw rows."""

    is_fisher: ClassVar[bool] = True
    is_drawn: ClassVar[bool] = True

    @property
    def exact(self) -> bool:
        """Whether the Hessian is the Fisher matrix of a distribution of the targets."""
        return self.is_fisher

    @property
    def drawable(self) -> bool:
        """Whether there is a distribution of the targets to draw from."""
        return self.is_drawn

    @abstractmethod
    def root(self, weight: Float[Tensor, "N K X"]) -> OutputRoot:
        """Return A with `AᵀA = weight·H`."""

    def draw(self, draws: Draws) -> Float[Tensor, "S N C X"]:
        """Return scores at targets of the model's distribution, or other rows of their covariance.

        Raises:
            StateError: if there is no distribution.
        """
        raise StateError(f"{type(self).__name__} has no distribution, so {draws.count} draws do not exist.")

    def relaid(self: Own, lay: Lay) -> Own:
        """Bring all tensors into another layout."""
        tensors = {item.name: getattr(self, item.name) for item in fields(self)}  # type: ignore[arg-type]
        changed = {name: lay(value) for name, value in tensors.items() if isinstance(value, Tensor)}
        return replace(self, **changed)  # type: ignore[type-var]


@dataclass(frozen=True)
class Elementwise(Likelihood):
    """Elements with Hessians of their own.

    Attributes:
        curvature: h.
    """

    curvature: Float[Tensor, "N C X"]

    is_fisher: ClassVar[bool] = False
    is_drawn: ClassVar[bool] = False

    def root(self, weight: Float[Tensor, "N K X"]) -> DiagonalRoot:  # noqa: D102
        return DiagonalRoot((weight.sqrt() * self.curvature.sqrt()).transpose(0, 1))


@dataclass(frozen=True)
class Independent(Elementwise):
    """Elements whose Hessians depend on no target, as in an exponential family with its natural parameter."""

    is_fisher: ClassVar[bool] = True
    is_drawn: ClassVar[bool] = True

    def draw(self, draws: Draws) -> Float[Tensor, "S N C X"]:  # noqa: D102
        return draws.of(torch.randn, self.curvature) * self.curvature.sqrt()


@dataclass(frozen=True)
class Softmax(Likelihood):
    """A class a position, with probabilities p."""

    p: Float[Tensor, "N C X"]

    def root(self, weight: Float[Tensor, "N K X"]) -> SoftmaxRoot:  # noqa: D102
        sqrt_p = self.p.sqrt().transpose(0, 1)
        return SoftmaxRoot(weight[:, :1].sqrt().transpose(0, 1).expand_as(sqrt_p), sqrt_p)

    def draw(self, draws: Draws) -> Float[Tensor, "S N C X"]:  # noqa: D102
        classes = classes_at(self.p, draws.of(torch.rand, self.p[:, 0]))[:, :, None]
        rows = self.p.repeat(draws.count, 1, 1, 1)
        return rows.scatter_add_(2, classes, -torch.ones_like(classes, dtype=self.p.dtype))


@dataclass(frozen=True)
class PoissonRate(Elementwise):
    """Counts with rate λ that is itself the output.

    Attributes:
        rate: λ.
        eps: ε, which the loss adds to λ in the logarithm.
    """

    rate: Float[Tensor, "N C X"]
    eps: float

    is_drawn: ClassVar[bool] = True

    def draw(self, draws: Draws) -> Float[Tensor, "S N C X"]:  # noqa: D102
        # Takes a second to import, which would be a third of curvlab's own.
        from scipy.stats import poisson

        uniform = draws.of(torch.rand, self.rate)
        counts = poisson.ppf(uniform.double().cpu().numpy(), self.rate.double().cpu().numpy())
        return 1 - torch.as_tensor(counts, device="cpu").clamp_min(0).to(self.rate) / (self.rate + self.eps)


@dataclass(frozen=True)
class Probability(Elementwise):
    """Binary targets with probability p that is itself the output."""

    p: Float[Tensor, "N C X"]

    is_drawn: ClassVar[bool] = True

    def draw(self, draws: Draws) -> Float[Tensor, "S N C X"]:  # noqa: D102
        labels = (draws.of(torch.rand, self.p) < self.p).to(self.p)
        spread = self.p * (1 - self.p)
        return (self.p - labels) / torch.where(spread > 0, spread, 1)


@dataclass(frozen=True)
class Computed(Likelihood):
    """A Hessian that is computed when it is asked for.

    Attributes:
        hessian: returns H of every sample as `[N, C·C, X]`.
        lay: brings that into the layout of the other tensors.
    """

    hessian: Callable[[], Float[Tensor, "N CC X"]]
    lay: Lay = field(default=lambda tensor: tensor)

    is_fisher: ClassVar[bool] = False
    is_drawn: ClassVar[bool] = False

    def root(self, weight: Float[Tensor, "N K X"]) -> EigenRoot:
        """Return A by an eigendecomposition in float64.

        Raises:
            NotPositiveDefinite: for an indefinite Hessian; names the sample and the eigenvalue.

        Cost: `9·C³` a position.
        """
        H = self.hessian()
        C = round(H.shape[1] ** 0.5)
        values, vectors = torch.linalg.eigh(H.double().unflatten(1, (C, C)).movedim(-1, 1))
        largest = float(values.abs().max())
        round_off = 10 * C * torch.finfo(H.dtype).eps * largest
        lowest = values.flatten(1).amin(1)
        if bool((lowest < -round_off).any()):
            sample = int(lowest.argmin())
            raise NotPositiveDefinite(
                f"The Hessian of the loss with respect to the outputs of sample {sample} has the eigenvalue "
                f"{float(lowest[sample]):.3g}, so it has no square root and there are no rows. Use kind='empirical', or "
                "the operators of curvlab.spectrum, which take indefinite Hessians."
            )
        roots = torch.where(values > round_off, values, 0).sqrt().transpose(1, 2).to(H)
        scale = self.lay(roots) * weight[:, :1].sqrt()
        basis = self.lay(vectors.mT.flatten(2).transpose(1, 2).to(H))
        return EigenRoot(scale.transpose(0, 1), basis.unflatten(1, (C, C)).permute(1, 2, 0, 3))

    def relaid(self, lay: Lay) -> Computed:  # noqa: D102
        return replace(self, lay=lambda tensor: lay(self.lay(tensor)))


@dataclass(frozen=True)
class Several(Likelihood):
    """Likelihoods of different outputs.

    Attributes:
        parts: the outputs of each, and itself.
        outputs: C; outputs that belong to no part have no curvature.
    """

    parts: tuple[tuple[slice, Likelihood], ...]
    outputs: int

    @property
    def exact(self) -> bool:  # noqa: D102
        return all(part.exact for _, part in self.parts)

    @property
    def drawable(self) -> bool:  # noqa: D102
        return all(part.drawable for _, part in self.parts)

    def root(self, weight: Float[Tensor, "N K X"]) -> BlockRoot:  # noqa: D102
        X = weight.shape[2]
        roots = [(slice(at.start * X, at.stop * X), part.root(weight[:, at])) for at, part in self.parts]
        return BlockRoot(tuple(roots), self.outputs * X)

    def draw(self, draws: Draws) -> Float[Tensor, "S N C X"]:  # noqa: D102
        found = [part.draw(draws) for _, part in self.parts]
        S, N, _, X = found[0].shape
        out = found[0].new_zeros(S, N, self.outputs, X)
        for (at, _), rows in zip(self.parts, found, strict=True):
            out[:, :, at] = rows
        return out

    def relaid(self, lay: Lay) -> Several:  # noqa: D102
        return replace(self, parts=tuple((at, part.relaid(lay)) for at, part in self.parts))


def classes_at(p: Float[Tensor, "N C X"], uniform: Float[Tensor, "K N X"]) -> Int[Tensor, "K N X"]:
    """Return the classes at which the distribution function passes uniform numbers."""
    found = torch.empty_like(uniform, dtype=torch.long)
    for n, x in pieces(p):
        found[:, n, x] = (p[n, :, x].cumsum(1)[:, :-1] <= uniform[:, n, None, x]).sum(2)
    return found
