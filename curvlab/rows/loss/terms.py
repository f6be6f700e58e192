"""The terms of a loss at given outputs and targets, and the rows at the output that follow from them.

A loss is a sum over terms i (a sample, a position of a sample, or an element), divided by `count`. Term i has a weight
`w_i` and an output Hessian `H_i = w_i · H(likelihood)`. Every kind of rows follows from `w_i`, the likelihood and the score
s_i, the gradient of term i without its weight:

    exact, ggn  columns of Λ^{1/2}, with Λ = H_i/count
    mc          √(w_i/count) times a random row: a score at a target that the model draws, Λ^{1/2}ε for squared errors
    empirical   √(w_i/count) s_i, element-wise losses summed over the C elements of a position

What a row stands for, where a sample has several terms (positions of an output with extra axes):

    term    a row a term
    sample  one row a sample. mc: the sum of its terms' draws, which are independent, so that their covariances add up.
            empirical: Σ_i w_i s_i/√count, another matrix, made of whole gradients of samples
    signs   empirical: one row a draw, Σ_i ε_i √(w_i/count) s_i with random signs; the expectation is that of a row a term
    batch   empirical: one row, the gradient of the loss of the batch

Shapes: outputs `[N, C, X]` with X the product of the extra axes (1 without any); cotangents `[V, N, C, X]`, rows of one
position v-ordered as (k, x), x innermost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.errors import UnsupportedModel, Weightless
from curvlab.rows.loss.likelihood import Draws, Lay, Likelihood
from curvlab.rows.loss.root import OutputRoot

Kind = Literal["exact", "ggn", "mc", "empirical"]
RowPer = Literal["term", "sample", "signs", "batch"]
Reduction = Literal["mean", "sum"]

Measure = Literal["nats", "nats from 0 on", "squares"]
"""What values of a loss are."""


@dataclass(frozen=True)
class LossTerms:
    """A loss at given outputs and targets.

    Attributes:
        name: of the loss, for messages.
        likelihood: what the Hessian of a term is.
        z: outputs `[N, C, X]`; `[N, C·X, 1]` if a term takes all positions of a sample.
        weight: `w_i`, `[N, 1, X]` for a softmax, `[N, C, X]` for element-wise losses.
        score: `s_i`, gradient of each term without its weight.
        count: divisor that the loss applies.
        reduction: "mean" or "sum"; says how batches merge.
        measure: what its values are: log-likelihoods in nats, such that are at least 0, or squares in units of the targets.
    """

    name: str
    likelihood: Likelihood
    z: Float[Tensor, "N C X"]
    weight: Float[Tensor, "N K X"]
    score: Float[Tensor, "N C X"]
    count: float
    reduction: Reduction
    measure: Measure = "nats"

    @property
    def sample_weights(self) -> Float[Tensor, " N"]:
        """Weight ω_n of a sample: the sum over its positions, the mean over the elements of one."""
        return self.weight.mean(1).sum(1)

    @property
    def terms(self) -> float:
        """Weight for merging batches: `count` for means; a sum counts its samples."""
        return self.count if self.reduction == "mean" else float(self.z.shape[0])

    def check(self, kind: Kind, *, part: bool = False) -> None:
        """Refuse rows of a kind that the loss does not have.

        Args:
            kind: of the rows.
            part: whether the samples are part of a larger batch, so that they may have no weight.

        Raises:
            UnsupportedModel: for kinds "exact" and "mc" of losses whose Hessian is no Fisher matrix; see `Likelihood`.
            Weightless: if no target carries weight.
        """
        if self.count == 0 and not part:
            raise weightless()
        if kind == "exact" and not self.likelihood.exact:
            raise UnsupportedModel(
                f"The Hessian of {self.name} is not known to be a Fisher matrix. Use kind='ggn' for the generalised "
                "Gauss-Newton matrix, or kind='empirical'."
            )
        if kind == "mc" and not self.likelihood.drawable:
            raise UnsupportedModel(
                f"{self.name} has no distribution of the targets to draw from. Use kind='ggn' or kind='empirical'."
            )

    @property
    def _divisor(self) -> float:
        """`count`, or 1 where there is nothing to divide."""
        return self.count or 1.0

    def root(self) -> OutputRoot:
        """Return Λ^{1/2}/√count."""
        return self.likelihood.root(self.weight / self._divisor)

    def sampled(self, draws: Draws) -> Float[Tensor, "S N C X"]:
        """Draw rows whose covariance is Λ/count, divided by √draws; draws of different positions are independent."""
        return self.likelihood.draw(draws).mul_((self.weight / (self._divisor * draws.count)).sqrt())

    def empirical(self, per: RowPer = "term", draws: Draws | None = None) -> Float[Tensor, "V N C X"]:
        """Return the scaled gradients of the loss terms, or sums of them.

        Args:
            per: what a row stands for, see above.
            draws: of the signs.
        """
        if per == "signs":
            assert draws is not None
            rows = (self.weight / (self._divisor * draws.count)).sqrt() * self.score
            return rows * (2 * draws.of(torch.rand, self.score[:, :1]).round() - 1)
        if per == "term":
            return ((self.weight / self._divisor).sqrt() * self.score)[None]
        row: Tensor = self.weight * self.score / self._divisor ** (0.5 if per == "sample" else 1.0)
        return row[None]

    def relaid(self, lay: Lay) -> LossTerms:
        """Bring the terms into another layout of samples and positions."""
        z, weight, score = (lay(part) for part in (self.z, self.weight, self.score))
        return replace(self, likelihood=self.likelihood.relaid(lay), z=z, weight=weight, score=score)


def weightless() -> Weightless:
    """Return the error for targets that all have no weight."""
    return Weightless("No target carries weight (all ignored, or class weights of zero), so the mean does not exist.")


def one_row_a_position(rows: Float[Tensor, "K N C X"]) -> Float[Tensor, "V N C X"]:
    """Give every position its own row: `[K, N, C, X] → [K·X, N, C, X]`."""
    return torch.diag_embed(rows, dim1=1, dim2=-1).flatten(0, 1)


def identity_cotangents(z: Float[Tensor, "N C X"]) -> Float[Tensor, "V N C X"]:
    """Return the cotangents of J: one row an output element, (c, x) with x innermost."""
    N, C, X = z.shape
    eye = torch.eye(C * X, dtype=z.dtype, device=z.device)
    return eye.view(C * X, 1, C, X).expand(C * X, N, C, X)


def flat_outputs(z: Float[Tensor, "N ..."]) -> Float[Tensor, "N C X"]:
    """Flatten the extra axes of an output, X = 1 if it has none; C = 1 for one number a sample, `[N]`."""
    if z.ndim > 2:
        return z.flatten(2)
    return z[..., None] if z.ndim == 2 else z[:, None, None]
