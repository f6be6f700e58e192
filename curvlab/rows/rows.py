"""Rows of a whole model and their algebra.

    S = Λ^{1/2} J / √count

Rows stay factored per layer (`curvlab.rows.layer`); a flattened row axis has R = V·N entries `(v, n)`, `v` outermost, in
the same order in every layer and product. `curvlab.rows.making` forms them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.errors import StateError
from curvlab.rows.layer import LayerRows
from curvlab.rows.loss import OutputRoot, RowPer
from curvlab.rows.parameters import ParameterSpace, Vector
from curvlab.rows.products import mirror
from curvlab.tools.shown import line, some, table

IN_COMMON = {"kind": "kind", "reduction": "reduction", "what a row stands for": "per"}
"""What rows that are stacked or averaged have in common, by how messages call it."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of J or S for every trainable parameter.

    Attributes:
        layers: the rows of each layer.
        space: names and shapes of the trainable parameters.
        kind: "jacobian", "exact", "ggn", "mc" or "empirical".
        count: divisor that the loss applied (1 for a sum and for a Jacobian).
        terms: weight when batches merge; equals `count` for means.
        reduction: how batches merge: Fisher matrices of means as Σ terms·F / Σ terms, those of sums by adding; rows of
            a Jacobian are only stacked.
        sample_weights: ω_n, the loss' weight of every sample, 0 if ignored.
        per: what a row stands for: a loss term ("term"), a sample, a draw of signs, or the batch, which is one sample then.
    """

    layers: tuple[LayerRows, ...]
    space: ParameterSpace
    kind: str
    count: float
    terms: float
    reduction: Literal["mean", "sum", "none"]
    sample_weights: Float[Tensor, " N"]
    _jacobian: Rows | None = field(default=None, repr=False)
    root: OutputRoot | None = field(default=None, repr=False)
    per: RowPer = "term"

    @property
    def shape(self) -> tuple[int, int]:
        """`(V, N)`: rows a sample, samples."""
        return self.layers[0].shape

    @property
    def R(self) -> int:
        """Number of rows `R = V·N`."""
        return self.layers[0].count

    @property
    def P(self) -> int:
        """Number of trainable parameters."""
        return self.space.size

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the rows."""
        return self.layers[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of the rows."""
        return self.layers[0].row_factors[-1].device

    def __repr__(self) -> str:
        sizes = {"V": self.shape[0], "N": self.shape[1], "dtype": self.dtype} if self.layers else {}
        layers = f"layers {some(layer.name or repr('') for layer in self.layers)}" if self.layers else "no layers"
        about = {"kind": self.kind, "per": self.per, "P": self.P, "count": self.count, "terms": self.terms}
        return line(self, layers, **about | sizes)

    def _repr_html_(self) -> str:
        rows = ((layer.name, ", ".join(layer.layout.names), layer.layout.size) for layer in self.layers)
        return table(self, ("layer", "parameters", "P"), rows)

    def jacobian(self) -> Rows:
        """Return the Jacobian's rows from the sweep that gave these.

        Raises:
            StateError: for "mc" and "empirical" rows, whose sweep did not visit every output, and for rows that were made
                without keeping it.
        """
        if self.kind == "jacobian":
            return self
        if self._jacobian is None:
            raise StateError(
                f"These rows of kind {self.kind!r} do not hold the Jacobian; call curvlab.jacobian(model, inputs)."
            )
        return self._jacobian

    def stems_from(self, jacobian: Rows) -> bool:
        """Whether these rows are S = A·J of a Jacobian J, A their `root`. Cost: at most one pass over the rows of both.

        Compared to the last bit: on some processors a Jacobian that was computed in other batches does not count.
        """
        own = self._jacobian
        if own is None or self.root is None or self.shape != jacobian.shape:
            return False
        return own is jacobian or all(
            mine.same_as(theirs) for mine, theirs in zip(own.layers, jacobian.layers, strict=True)
        )

    def dual(self, u: Float[Tensor, "... R"]) -> Float[Tensor, "... R"]:
        """Return the shortest c with `Sᵀc = Jᵀu`, for exact rows: what `Structure.lift` takes for a step.

        With `u = ∂L/∂z` in row order `(c, n)`, the gradient is `Jᵀu = Sᵀc`. Directions of the output to which the loss
        gives no weight (a common shift of the logits) are dropped: gradients have no part in them, unless the loss has slopes
        where it has no curvature, as the Huber loss (kind "ggn").

        Raises:
            StateError: for rows that do not determine the Jacobian.
        """
        if self.root is None:
            raise StateError(
                f"Rows of kind {self.kind!r} do not span the outputs, so a step has no coefficients in them."
            )
        return self.root.dual(u.reshape(-1, *self.shape)).reshape(u.shape)

    def gram(self, other: Rows | None = None) -> Float[Tensor, "R S"]:
        """Return `self @ otherᵀ`, `self @ selfᵀ` if `other` is None (the symmetric product is done once).

        Cost: see `LayerRows.add_gram`; memory `R·S`.
        """
        return gram(self.layers, self.layers if other is None else other.layers)

    def _check_type(self, what: str, dtype: torch.dtype) -> None:
        if dtype != self.dtype:
            raise ValueError(
                f"The {what}: {dtype}, the rows: {self.dtype}. Convert one of them; rows.to({dtype}) converts these."
            )

    def matvec(self, vector: Vector) -> Float[Tensor, "... R"]:
        """Multiply the rows with parameters (by name or flat; one leading axis is a block of vectors)."""
        named, _ = self.space.unpack(vector)
        for name, value in named.items():
            self._check_type(f"vector at {name!r}", value.dtype)
        blocked = (vector.ndim == 2) if isinstance(vector, Tensor) else _is_blocked(vector, self.space)
        product = sum(layer.matvec(layer.layout.join(named)) for layer in self.layers)
        assert isinstance(product, Tensor)
        return product if blocked else product[0]

    def rmatvec(self, coefficients: Float[Tensor, "... R"]) -> dict[str, Tensor]:
        """Combine rows: `Sᵀc` by parameter name; a leading axis of `c` is kept."""
        if coefficients.ndim not in (1, 2) or coefficients.shape[-1] != self.R:
            raise ValueError(f"Coefficients are [R] or [K, R] with R = {self.R}, got {tuple(coefficients.shape)}.")
        self._check_type("coefficients", coefficients.dtype)
        block = coefficients.reshape(-1, self.R)
        named: dict[str, Tensor] = {}
        for layer in self.layers:
            named.update(layer.layout.split(layer.rmatvec(block)))
        lead = coefficients.shape[:-1]
        return {name: named[name].reshape((*lead, *shape)) for name, shape in self.space.shapes.items()}

    def dense(self) -> Float[Tensor, "R P"]:
        """Form the rows, columns in `named_parameters()` order. Memory `R·P`."""
        named: dict[str, Tensor] = {}
        for layer in self.layers:
            named.update(layer.layout.split(layer.dense()))
        return self.space.flatten(named)

    def to(self, dtype: torch.dtype) -> Rows:
        """Convert to another floating-point type."""
        return replace(
            self,
            layers=tuple(layer.to(dtype) for layer in self.layers),
            sample_weights=self.sample_weights.to(dtype),
            _jacobian=None if self._jacobian is None else self._jacobian.to(dtype),
            root=None if self.root is None else self.root.to(dtype),
        )

    def __add__(self, other: Rows) -> Rows:
        """Concatenate samples: the result's SᵀS is the Fisher matrix of both batches together."""
        return merge([self, other])


def _is_blocked(vector: Any, space: ParameterSpace) -> bool:
    name, shape = next(iter(space.shapes.items()))
    return bool(vector[name].ndim > len(shape))


def gram(left: Sequence[LayerRows], right: Sequence[LayerRows]) -> Float[Tensor, "R S"]:
    """Return `Σ_l left_l @ right_lᵀ` over the layers of two row sets."""
    symmetric = all(a is b for a, b in zip(left, right, strict=True))
    out = left[0].row_factors[-1].new_zeros(left[0].count, right[0].count)
    for a, b in zip(left, right, strict=True):
        a.add_gram(out, b if symmetric or a is not b else replace(b))
    if symmetric:
        mirror(out)
    return out


def merge(parts: Sequence[Rows], decay: Sequence[float] | None = None) -> Rows:
    """Stack batches so that SᵀS is the (weighted) Fisher matrix of all.

    Args:
        parts: rows of one kind over the same parameters with the same number of rows a sample.
        decay: weight of each batch, ones if None.

    Raises:
        ValueError: if there are no parts, or they do not fit together.
    """
    if not parts:
        raise ValueError("There is nothing to stack: merge needs the rows of at least one batch.")
    first = parts[0]
    for part in parts[1:]:
        for what, name in IN_COMMON.items():
            if getattr(part, name) != getattr(first, name):
                raise ValueError(f"Rows differ in {what}: {getattr(first, name)!r} and {getattr(part, name)!r}.")
        if dict(part.space.shapes) != dict(first.space.shapes):
            raise ValueError("Rows of different parameters cannot be stacked.")
        if part.shape[0] != first.shape[0]:
            raise ValueError(f"Rows a sample differ: {first.shape[0]} and {part.shape[0]}.")
    weights = [1.0] * len(parts) if decay is None else list(decay)
    if len(parts) == 1 and weights == [1.0]:
        return first
    scales = _merge_scales(parts, weights)
    stacked = [
        _stacked([layer.scale(scale) for layer, scale in zip(layers, scales, strict=True)])
        for layers in zip(*(part.layers for part in parts), strict=True)
    ]
    bases = [part._jacobian for part in parts if part._jacobian is not None]
    roots = [part.root for part in parts if part.root is not None]
    means = first.reduction == "mean"
    return Rows(
        layers=tuple(stacked),
        space=first.space,
        kind=first.kind,
        count=sum(part.count for part in parts) if means else 1.0,
        terms=sum(w * part.terms for w, part in zip(weights, parts, strict=True)),
        reduction=first.reduction,
        per=first.per,
        sample_weights=torch.cat([w * part.sample_weights for w, part in zip(weights, parts, strict=True)]),
        _jacobian=merge(bases) if len(bases) == len(parts) else None,
        root=roots[0].joined(roots[1:], scales) if len(roots) == len(parts) else None,
    )


def batch_row(parts: Sequence[Rows]) -> Rows:
    """Return one row, the gradient of the loss of a batch, of its parts with a row each.

    Cost: that of `merge`; the row is kept as the positions of all samples.
    """
    if len(parts) == 1 and parts[0].shape == (1, 1):
        return parts[0]
    whole = merge(parts)
    shares = _merge_scales(parts, [1.0] * len(parts)) if len(parts) > 1 else [1.0]
    weights = whole.layers[0].row_factors[-1].new_tensor(shares)
    layers = [
        layer.map_rows(lambda rows: rows * weights.view(-1, *(1,) * (rows.ndim - 2))).of_batch()
        for layer in whole.layers
    ]
    return replace(whole, layers=tuple(layers), sample_weights=whole.sample_weights.sum(0, keepdim=True))


def _stacked(layers: Sequence[LayerRows]) -> LayerRows:
    """Stack the rows of one layer, formed where they are factored in some of the batches only."""
    if len({type(layer) for layer in layers}) > 1:
        layers = [layer.formed() for layer in layers]
    return layers[0].concatenate(layers[1:])


def _merge_scales(parts: Sequence[Rows], weights: Sequence[float]) -> list[float]:
    if parts[0].reduction == "mean":
        total = sum(w * part.terms for w, part in zip(weights, parts, strict=True)) or 1.0
        return [(w * part.terms / total) ** 0.5 for w, part in zip(weights, parts, strict=True)]
    return [w**0.5 for w in weights]
