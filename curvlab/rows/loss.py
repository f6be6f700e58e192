"""Losses: the output Hessian's square root, sampled and empirical rows at the model's output.

A loss is a sum over terms i (a sample, a position of a sample, or an element), divided by `count`. Term i has a weight
`w_i` and an output Hessian `H_i = w_i · H(likelihood)`:

    half-squared error  H = 1        squared error  H = 2
    softmax             H = diag(p) − ppᵀ
    Bernoulli (logits)  H = σ(1 − σ)

Every kind of rows follows from `w_i`, the likelihood and the score s_i, the gradient of term i without its weight:

    exact      columns of Λ^{1/2}, with Λ = H_i/count
    mc         √(w_i/count) (p − e_ŷ) for a softmax, Λ^{1/2}ε otherwise
    empirical  √(w_i/count) s_i, element-wise losses summed over the C elements of a position

Shapes: outputs `[N, C, X]` with X the product of the extra axes (1 without any); seeds `[V, N, C, X]`, rows of one
position v-ordered as (k, x), x innermost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from curvlab.errors import UnsupportedModel
from curvlab.nn import HalfSquaredError, WeightedCrossEntropy

Kind = Literal["exact", "ggn", "mc", "empirical"]


@dataclass(frozen=True)
class OutputFactor:
    """Λ^{1/2}/√count at the output, which turns rows (c, x, n) of J into rows of S in the same order.

    Element-wise losses rescale rows by `scale`. A softmax mixes the C rows of a position by
    `scale √p_k (δ_kc − p_c)`: K = C rows again, one of which is redundant.

    Attributes:
        scale: `[C, N, X]`.
        root: `√p` of a softmax, `[C, N, X]`; None for element-wise losses.
    """

    scale: Float[Tensor, "C N X"]
    root: Float[Tensor, "C N X"] | None = None

    def apply(self, rows: Float[Tensor, "V N ..."]) -> Float[Tensor, "V N ..."]:
        """Weight rows of J. Cost `V·N` times the elements of a row."""
        X = self.scale.shape[-1]
        split = rows.reshape(-1, X, *rows.shape[1:])

        def spread(weight: Tensor) -> Tensor:
            return weight.transpose(1, 2).reshape(*split.shape[:3], *(1,) * (rows.ndim - 2))

        if self.root is not None:
            split = (split - (spread(self.root.square()) * split).sum(0)) * spread(self.root)
        return (split * spread(self.scale)).flatten(0, 1)

    def inverse(self) -> OutputFactor | None:
        """Return the factor that turns S back into J, or None if some direction of the output has no weight."""
        if self.root is not None or bool((self.scale == 0).any()):
            return None
        return OutputFactor(self.scale.reciprocal())

    def dual(self, u: Float[Tensor, "K C X N"]) -> Float[Tensor, "K C X N"]:
        """Return the shortest c with `Sᵀc = Jᵀu`; for a softmax, with u reduced to entries that sum to zero.

        Directions without weight, which no c reaches, are dropped.
        """
        scale = self.scale.transpose(1, 2)
        if self.root is not None:
            root = self.root.transpose(1, 2)
            scale = scale * root
            u = u - root.square() * u.sum(1, keepdim=True)
        return torch.where(scale != 0, u / torch.where(scale != 0, scale, 1), 0)

    def projector(self) -> Float[Tensor, "C X N C"]:
        """Return the projector on the range of `Λ^{1/2}` at every position: ones, or `I − √p√pᵀ` for a softmax."""
        C = self.scale.shape[0]
        weighted = (self.scale != 0).to(self.scale).transpose(1, 2)
        projector = torch.eye(C, dtype=self.scale.dtype, device=self.scale.device)[:, None, None] * weighted[..., None]
        if self.root is None:
            return projector
        root = self.root.transpose(1, 2)
        return projector - weighted[..., None] * root[..., None] * root.permute(1, 2, 0)

    def to(self, dtype: torch.dtype) -> OutputFactor:
        """Convert to another floating-point type."""
        return OutputFactor(self.scale.to(dtype), None if self.root is None else self.root.to(dtype))

    @staticmethod
    def concatenate(parts: Sequence[OutputFactor], scales: Sequence[float]) -> OutputFactor:
        """Stack the samples of several batches, each multiplied by a number."""
        scale = torch.cat([part.scale * number for part, number in zip(parts, scales, strict=True)], dim=1)
        roots = [part.root for part in parts if part.root is not None]
        return OutputFactor(scale, torch.cat(roots, dim=1) if roots else None)


@dataclass(frozen=True)
class LossTerms:
    """A loss at given outputs and targets.

    Attributes:
        likelihood: what the Hessian of a term is.
        z: outputs `[N, C, X]`.
        weight: `w_i`, `[N, 1, X]` for a softmax, `[N, C, X]` for element-wise losses.
        score: `s_i`, gradient of each term without its weight.
        count: divisor that the loss applies.
        reduction: "mean" or "sum"; says how batches merge.
        hessian: constant Hessian of a squared error.
    """

    likelihood: Literal["gaussian", "softmax", "bernoulli"]
    z: Float[Tensor, "N C X"]
    weight: Float[Tensor, "N K X"]
    score: Float[Tensor, "N C X"]
    count: float
    reduction: Literal["mean", "sum"]
    hessian: float = 1.0

    @property
    def sample_weights(self) -> Float[Tensor, " N"]:
        """Weight ω_n of a sample: the sum over its positions, the mean over the elements of one."""
        return self.weight.mean(1).sum(1)

    @property
    def terms(self) -> float:
        """Weight for merging batches: `count` for means; a sum counts its samples."""
        return self.count if self.reduction == "mean" else float(self.z.shape[0])

    def exact(self) -> OutputFactor:
        """Return Λ^{1/2}/√count."""
        scale = (self.weight / self.count).sqrt().transpose(0, 1)
        if self.likelihood == "softmax":
            root = self.z.softmax(1).sqrt().transpose(0, 1)
            return OutputFactor(scale.expand_as(root), root)
        return OutputFactor(scale * self._curvature().sqrt().transpose(0, 1))

    def sampled(
        self,
        samples: int,
        generator: torch.Generator,
        *,
        joint: bool = False,
        share: tuple[int, int] | None = None,
    ) -> Float[Tensor, "V N C X"]:
        """Draw rows whose covariance is Λ/count, divided by √samples.

        Args:
            samples: draws a loss term.
            generator: source of the draws.
            joint: whether all positions of a sample share a row, as draws of different positions are independent, or
                each has its own.
            share: where these samples start in a batch that several processes share, and how many it has. Processes
                whose generators agree then draw what one would for the whole.
        """
        N, C, X = self.z.shape
        start, total = share or (0, N)
        scaled = (self.weight / (self.count * samples)).sqrt()
        if self.likelihood == "softmax":
            p = self.z.softmax(1)
            uniform = torch.rand(samples, total, X, generator=generator, dtype=p.dtype, device=generator.device)
            uniform = uniform[:, start : start + N].to(p.device)
            labels = nn.functional.one_hot(classes_at(p, uniform), C).to(p.dtype).movedim(-1, 2)
            rows = (p[None] - labels) * scaled
        else:
            noise = torch.randn(samples, total, C, X, generator=generator, dtype=self.z.dtype, device=generator.device)
            rows = noise[:, start : start + N].to(self.z.device) * (scaled * self._curvature().sqrt())
        return rows if joint else _one_row_a_position(rows)

    def empirical(self, *, joint: bool = False) -> Float[Tensor, "V N C X"]:
        """Return the scaled gradients of the loss terms, or if `joint` those of samples: w_i s_i/√count over positions."""
        if joint:
            row: Tensor = self.weight * self.score / self.count**0.5
            return row[None]
        return _one_row_a_position(((self.weight / self.count).sqrt() * self.score)[None])

    def _curvature(self) -> Float[Tensor, "N C X"]:
        if self.likelihood == "bernoulli":
            s = self.z.sigmoid()
            return s * (1 - s)
        return torch.full_like(self.z, self.hessian)


def classes_at(p: Float[Tensor, "N C X"], uniform: Float[Tensor, "K N X"]) -> Int[Tensor, "K N X"]:
    """Return the classes at which the distribution function passes uniform numbers."""
    return (p.cumsum(1)[:, :-1] <= uniform[:, :, None]).sum(2)


def _one_row_a_position(rows: Float[Tensor, "K N C X"]) -> Float[Tensor, "V N C X"]:
    """Give every position its own row: `[K, N, C, X] → [K·X, N, C, X]`."""
    return torch.diag_embed(rows, dim1=1, dim2=-1).flatten(0, 1)


def identity_seeds(z: Float[Tensor, "N C X"]) -> Float[Tensor, "V N C X"]:
    """Return the seeds of J: one row an output element, (c, x) with x innermost."""
    N, C, X = z.shape
    eye = torch.eye(C * X, dtype=z.dtype, device=z.device)
    return eye.view(C * X, 1, C, X).expand(C * X, N, C, X)


def flat_outputs(z: Float[Tensor, "N C ..."]) -> Float[Tensor, "N C X"]:
    """Flatten the extra axes of an output, X = 1 if it has none."""
    return z.reshape(*z.shape[:2], -1)


def loss_terms(loss: nn.Module, z: Float[Tensor, "N C ..."], targets: Tensor) -> LossTerms:
    """Take a loss module apart at given outputs and targets.

    Args:
        loss: a module whose exact type stands in `LOSSES`.
        z: outputs.
        targets: as the loss takes them.

    Raises:
        UnsupportedModel: if the loss or its reduction is not covered.
        ValueError: if targets do not fit, are not finite, or carry no weight at all, or if weights are negative.
    """
    reader = LOSSES.get(type(loss))
    if reader is None:
        raise UnsupportedModel(
            f"{type(loss).__name__} is not a loss that curvlab knows. Use one of: "
            f"{', '.join(kind.__name__ for kind in LOSSES)}."
        )
    if targets.is_floating_point() and not torch.isfinite(targets).all():
        sample = int((~torch.isfinite(targets)).reshape(len(targets), -1).any(1).nonzero()[0])
        raise ValueError(f"The targets are not finite, first at sample {sample}.")
    terms = reader(loss, z, targets)
    if bool((terms.weight < 0).any()):
        raise ValueError(f"{type(loss).__name__} has negative weights, so the curvature has no square root.")
    if terms.count == 0:
        raise ValueError(
            "No target carries weight (all ignored, or class weights of zero), so the mean does not exist."
        )
    return terms


def _reduction(loss: nn.Module) -> Literal["mean", "sum"]:
    if loss.reduction == "mean":
        return "mean"
    if loss.reduction == "sum":
        return "sum"
    raise UnsupportedModel(
        f"{type(loss).__name__} has reduction={loss.reduction!r}; a Fisher matrix needs 'mean' or 'sum'."
    )


def _same_shape(loss: nn.Module, z: Tensor, targets: Tensor) -> Tensor:
    if targets.shape != z.shape:
        raise ValueError(
            f"{type(loss).__name__} needs targets of the output's shape {tuple(z.shape)}, got {tuple(targets.shape)}."
        )
    return targets.to(z.dtype)


def _squared(loss: nn.Module, z: Tensor, targets: Tensor) -> LossTerms:
    assert isinstance(loss, nn.MSELoss | HalfSquaredError)
    residual = flat_outputs(z - _same_shape(loss, z, targets))
    half = isinstance(loss, HalfSquaredError)
    hessian = 1.0 if half else 2.0
    divisor = z.shape[0] if half else z.numel()
    return LossTerms(
        likelihood="gaussian",
        z=flat_outputs(z),
        weight=torch.ones_like(residual),
        score=hessian * residual,
        count=float(divisor) if loss.reduction == "mean" else 1.0,
        reduction=_reduction(loss),
        hessian=hessian,
    )


def _cross_entropy(loss: nn.Module, z: Tensor, targets: Tensor) -> LossTerms:
    assert isinstance(loss, nn.CrossEntropyLoss)
    if targets.is_floating_point():
        raise UnsupportedModel(
            "CrossEntropyLoss with class probabilities as targets is not covered; pass class indices."
        )
    positions = (z.shape[0], *z.shape[2:])
    if targets.shape != positions:
        raise ValueError(f"CrossEntropyLoss needs class indices of shape {positions}, got {tuple(targets.shape)}.")
    logits = flat_outputs(z)
    N, C, X = logits.shape
    y = targets.long().reshape(N, X)
    counted = y != loss.ignore_index
    outside = counted & ((y < 0) | (y >= C))
    if outside.any():
        n, x = outside.nonzero()[0].tolist()
        raise ValueError(f"Target {int(y[n, x])} of sample {n} is neither one of the {C} classes nor ignore_index.")
    class_weight = z.new_ones(C) if loss.weight is None else loss.weight.to(z)
    label = torch.where(counted, y, 0)
    own = class_weight[label] * counted
    mass = loss.label_smoothing / C * class_weight * counted[..., None]
    mass = mass.scatter_add(2, label[..., None], (1 - loss.label_smoothing) * own[..., None]).transpose(1, 2)
    weight = mass.sum(1, keepdim=True)
    return LossTerms(
        likelihood="softmax",
        z=logits,
        weight=weight,
        score=logits.softmax(1) - mass / torch.where(weight > 0, weight, 1),
        count=float(own.sum()) if loss.reduction == "mean" else 1.0,
        reduction=_reduction(loss),
    )


def _weighted_cross_entropy(loss: nn.Module, z: Tensor, targets: Tensor) -> LossTerms:
    assert isinstance(loss, WeightedCrossEntropy)
    terms = _cross_entropy(nn.CrossEntropyLoss(), z, targets)
    if loss.weights.shape != targets.shape:
        raise ValueError(
            f"WeightedCrossEntropy has weights of shape {tuple(loss.weights.shape)} for targets of shape "
            f"{tuple(targets.shape)}; it needs one for each."
        )
    weight = loss.weights.to(z).view_as(terms.weight)
    return replace(terms, weight=weight, count=float(loss.weights.sum()))


def _bernoulli(loss: nn.Module, z: Tensor, targets: Tensor) -> LossTerms:
    assert isinstance(loss, nn.BCEWithLogitsLoss)
    y = _same_shape(loss, z, targets)
    if bool(((y < 0) | (y > 1)).any()):
        raise ValueError("BCEWithLogitsLoss needs targets between 0 and 1.")
    positive = y if loss.pos_weight is None else loss.pos_weight.to(z) * y
    mass = positive + 1 - y
    weight = mass if loss.weight is None else mass * loss.weight.to(z)
    return LossTerms(
        likelihood="bernoulli",
        z=flat_outputs(z),
        weight=flat_outputs(weight.expand_as(z)),
        score=flat_outputs(z.sigmoid() - positive / torch.where(mass > 0, mass, 1)),
        count=float(z.numel()) if loss.reduction == "mean" else 1.0,
        reduction=_reduction(loss),
    )


LOSSES: dict[type[nn.Module], Callable[[nn.Module, Tensor, Tensor], LossTerms]] = {
    nn.MSELoss: _squared,
    HalfSquaredError: _squared,
    nn.CrossEntropyLoss: _cross_entropy,
    WeightedCrossEntropy: _weighted_cross_entropy,
    nn.BCEWithLogitsLoss: _bernoulli,
}
