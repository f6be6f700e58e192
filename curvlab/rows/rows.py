"""Rows of a whole model: the Jacobian J, and S with SᵀS the Fisher matrix.

    S = Λ^{1/2} J / √count

One backward sweep gives both. Rows stay factored per layer (`curvlab.rows.layer`); a flattened row axis has R = V·N
entries `(v, n)`, `v` outermost, in the same order in every layer and product.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlab.errors import StateError, unknown_name
from curvlab.nn import Linearized
from curvlab.rows import autograd, backpack
from curvlab.rows.layer import LayerRows
from curvlab.rows.loss import Kind, LossTerms, OutputFactor, Scaling, flat_outputs, identity_seeds
from curvlab.rows.owners import trainable
from curvlab.rows.parameters import ParameterSpace, Vector
from curvlab.rows.products import mirror
from curvlab.rows.samples import NodeChoice, Samples, samples_of
from curvlab.rows.sweep import (
    Arguments,
    PickOutput,
    Seed,
    Swept,
    as_arguments,
    call,
    check_finite,
    differentiable_recurrence,
    left_as_found,
    refuse,
    structural_twin,
    unfactored,
    without_factors,
    wrong_rows,
)

logger = logging.getLogger("curvlab")

Engine = Literal["auto", "backpack", "autograd"]
_announced: WeakSet[nn.Module] = WeakSet()


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
    """

    layers: tuple[LayerRows, ...]
    space: ParameterSpace
    kind: str
    count: float
    terms: float
    reduction: Literal["mean", "sum", "none"]
    sample_weights: Float[Tensor, " N"]
    _jacobian: Rows | None = field(default=None, repr=False)
    factor: OutputFactor | None = field(default=None, repr=False)

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
        return self.layers[0].factors[-1].device

    def __repr__(self) -> str:
        return (
            f"Rows(kind={self.kind!r}, V={self.shape[0]}, N={self.shape[1]}, P={self.P}, count={self.count:g}, "
            f"terms={self.terms:g}, layers=[{', '.join(layer.name for layer in self.layers)}], dtype={self.dtype})"
        )

    def jacobian(self) -> Rows:
        """Return the Jacobian's rows from the sweep that gave these.

        Raises:
            StateError: for "mc" and "empirical" rows, whose sweep did not visit every output.
        """
        if self.kind == "jacobian":
            return self
        if self._jacobian is None:
            raise StateError(
                f"Rows of kind {self.kind!r} do not determine the Jacobian; call curvlab.jacobian(model, inputs)."
            )
        return self._jacobian

    def coefficients(self, jacobian: Rows) -> OutputFactor | None:
        """Return C with `rows = C·S` for rows that are S itself, or the Jacobian behind it if Λ is invertible; else None.

        Cost: at most one pass over the factors of both.
        """
        if jacobian is self and self.factor is not None:
            return Scaling(torch.ones(*self.shape, 1, dtype=self.dtype, device=self.device))
        if self._jacobian is None or self.factor is None or self.shape != jacobian.shape:
            return None
        own = self._jacobian
        if own is not jacobian and not all(
            mine.same_as(theirs) for mine, theirs in zip(own.layers, jacobian.layers, strict=True)
        ):
            return None
        return self.factor.inverse()

    def dual(self, u: Float[Tensor, "... R"]) -> Float[Tensor, "... R"]:
        """Return the shortest c with `Sᵀc = Jᵀu`, for exact rows: what `Structure.lift` takes for a step.

        With `u = ∂L/∂z` in row order `(c, n)`, the gradient is `Jᵀu = Sᵀc`. Directions of the output to which the loss
        gives no weight (a common shift of the logits) are dropped: gradients have no part in them, unless the loss has slopes
        where it has no curvature, as the Huber loss (kind "ggn").

        Raises:
            StateError: for rows that do not determine the Jacobian.
        """
        if self.factor is None:
            raise StateError(
                f"Rows of kind {self.kind!r} do not span the outputs, so a step has no coefficients in them."
            )
        return self.factor.dual(u.reshape(-1, *self.shape)).reshape(u.shape)

    def gram(self, other: Rows | None = None) -> Float[Tensor, "R S"]:
        """Return `self @ otherᵀ`, `self @ selfᵀ` if `other` is None (the symmetric product is done once).

        Cost: see `LayerRows.add_gram`; memory `R·S`.
        """
        return gram(self.layers, self.layers if other is None else other.layers)

    def matvec(self, vector: Vector) -> Float[Tensor, "... R"]:
        """Multiply the rows with parameters (by name or flat; one leading axis is a block of vectors)."""
        named, _ = self.space.unpack(vector)
        blocked = (vector.ndim == 2) if isinstance(vector, Tensor) else _is_blocked(vector, self.space)
        product = sum(layer.matvec(layer.layout.join(named)) for layer in self.layers)
        assert isinstance(product, Tensor)
        return product if blocked else product[0]

    def rmatvec(self, coefficients: Float[Tensor, "... R"]) -> dict[str, Tensor]:
        """Combine rows: `Sᵀc` by parameter name; a leading axis of `c` is kept."""
        if coefficients.ndim not in (1, 2) or coefficients.shape[-1] != self.R:
            raise ValueError(f"Coefficients are [R] or [K, R] with R = {self.R}, got {tuple(coefficients.shape)}.")
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
            factor=None if self.factor is None else self.factor.to(dtype),
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
    out = left[0].factors[-1].new_zeros(left[0].count, right[0].count)
    for a, b in zip(left, right, strict=True):
        a.add_gram(out, b if symmetric or a is not b else replace(b))
    if symmetric:
        mirror(out, *left[0].shape)
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
        for what in ("kind", "reduction"):
            if getattr(part, what) != getattr(first, what):
                raise ValueError(f"Rows differ in {what}: {getattr(first, what)!r} and {getattr(part, what)!r}.")
        if dict(part.space.shapes) != dict(first.space.shapes):
            raise ValueError("Rows of different parameters cannot be stacked.")
        if part.shape[0] != first.shape[0]:
            raise ValueError(f"Rows a sample differ: {first.shape[0]} and {part.shape[0]}.")
    weights = [1.0] * len(parts) if decay is None else list(decay)
    if len(parts) == 1 and weights == [1.0]:
        return first
    scales = _merge_scales(parts, weights)
    stacked = [
        layers[0].scale(scales[0]).concatenate([x.scale(s) for x, s in zip(layers[1:], scales[1:], strict=True)])
        for layers in zip(*(part.layers for part in parts), strict=True)
    ]
    base = factor = None
    if all(part._jacobian is not None and part.factor is not None for part in parts):
        base = merge([part.jacobian() for part in parts])
        first_factor, *others = (part.factor for part in parts if part.factor is not None)
        factor = first_factor.joined(others, scales)
    means = first.reduction == "mean"
    return Rows(
        layers=tuple(stacked),
        space=first.space,
        kind=first.kind,
        count=sum(part.count for part in parts) if means else 1.0,
        terms=sum(w * part.terms for w, part in zip(weights, parts, strict=True)),
        reduction=first.reduction,
        sample_weights=torch.cat([w * part.sample_weights for w, part in zip(weights, parts, strict=True)]),
        _jacobian=base,
        factor=factor,
    )


def _merge_scales(parts: Sequence[Rows], weights: Sequence[float]) -> list[float]:
    if parts[0].reduction == "mean":
        total = sum(w * part.terms for w, part in zip(weights, parts, strict=True))
        return [(w * part.terms / total) ** 0.5 for w, part in zip(weights, parts, strict=True)]
    return [w**0.5 for w in weights]


def jacobian(
    model: nn.Module,
    inputs: Any,
    *,
    nodes: NodeChoice = None,
    output: PickOutput = None,
    engine: Engine = "auto",
    dtype: torch.dtype | None = None,
) -> Rows:
    """Return the rows of J, the Jacobian of the outputs with respect to the trainable parameters.

    Row `(c, n)` is the gradient of output c of sample n, unscaled; extra output axes follow c, innermost last.

    Args:
        model: any module whose samples do not interact, or a graph network. It is left as it was found.
        inputs: a tensor, a tuple (unpacked), a dict (keywords), or torch-geometric's `Data` or `Batch`, which the model is
            called on. The first axis is the sample. In a batch of separate graphs with one output vector each, the graph
            is; the batch is known by the names `edge_index` and `batch` of `Data`, of keywords or of the model's arguments.
        nodes: for outputs `[N, C]` of the nodes of a graph, which interact: a mask or indices of those that carry rows, or a
            function that chooses them given the inputs. Rows `(c, n)` of the L chosen nodes are `V = C·L` rows of one
            sample, the graph, in the same order.
        output: which tensor of a structured output to use: a key, an attribute, an index or a function.
        engine: "backpack" for chains of modules that BackPACK knows, "autograd" for any architecture, "auto" for the
            first that applies.
        dtype: floating-point type of the rows and of all products with them; that of the parameters if None. The sweep is in
            the model's own type, or in that of `torch.autocast`, whose round-off it keeps: relative errors of rows and Gram
            matrices are a small multiple of 4e-3 for bfloat16, of 6e-8 for float32.

    Raises:
        UnsupportedModel: names the layer, the reason and the remedy.
        ValueError: for no samples, non-finite outputs or an unknown engine.

    Cost: one forward and one batched backward pass with V = C rows; memory `V` times the layers' outputs.
    """
    reading = read(model, inputs, nodes)
    return _converted(_jacobian_rows(model, _sweep(model, reading, output, engine, _every_output(reading[1]))), dtype)


def sqrt_fisher(
    model: nn.Module,
    loss: nn.Module,
    inputs: Any,
    targets: Any,
    kind: Kind = "exact",
    *,
    samples: int = 1,
    generator: torch.Generator | None = None,
    share: tuple[int, int] | None = None,
    nodes: NodeChoice = None,
    output: PickOutput = None,
    engine: Engine = "auto",
    dtype: torch.dtype | None = None,
) -> Rows:
    """Return the rows of S, with `SᵀS` the Fisher matrix of the loss that is passed, its own factors included.

    Args:
        model: as in `jacobian`.
        loss: one of `curvlab.rows.loss.LOSSES` with reduction "mean" or "sum", or any twice-differentiable loss of one
            output tensor that has an attribute `reduction`, such as `curvlab.nn.PerSample(function)`.
        inputs: as in `jacobian`.
        targets: as the loss takes them; with `nodes=`, those of the chosen nodes.
        kind: "exact" for the Fisher matrix of the model's own distribution (type 2, equal to the GGN for these losses);
            "ggn" for the generalised Gauss-Newton matrix, also of losses whose Hessian depends on the targets and is no
            Fisher matrix, which "exact" refuses; "mc" for a Monte-Carlo estimate of it; "empirical" for the
            gradients with the given targets (type 1), one row a loss term.
        samples: draws a loss term, for "mc".
        generator: source of the draws, required for "mc".
        share: where these samples start in a larger batch that is drawn in parts, and how many it has: with the generator in
            one state for all parts, their draws are those of the whole. A part may lack targets that count.
        nodes: as in `jacobian`.
        output: as in `jacobian`.
        engine: as in `jacobian`.
        dtype: as in `jacobian`; the loss is taken apart in it, too.

    Raises:
        UnsupportedModel: as in `jacobian`, for a loss that is not covered, and for one that has no rows of this kind.
        NotPositiveDefinite: for a loss of one's own with an indefinite Hessian at the outputs of some sample.
        ValueError: for targets that do not fit the outputs, and for options that contradict each other.

    Cost: as `jacobian` with V = C rows ("exact", "ggn"), `samples` rows ("mc") or one ("empirical") a position.

    Source: `exact` and `empirical` as in Kunstner, Hennig & Balles 2019; count and weights as the loss applies them.
    """
    if kind not in get_args(Kind):
        raise unknown_name("kind", kind, get_args(Kind))
    if kind != "mc" and samples != 1:
        raise ValueError(f"samples={samples} has a meaning for kind='mc' only, not for {kind!r}.")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}.")
    reading = read(model, inputs, nodes)
    first = next(iter(trainable(model).values()))

    def terms_of(z: Tensor) -> LossTerms:
        terms = reading[1].terms(loss, z.to(dtype or torch.promote_types(z.dtype, first.dtype)), targets)
        terms.check(kind, part=share is not None)
        return terms

    base: Rows | None = None
    factor: OutputFactor | None = None
    if kind in ("exact", "ggn"):
        swept = _sweep(model, reading, output, engine, _every_output(reading[1]))
        base = _converted(_jacobian_rows(model, swept), dtype)
        terms = terms_of(swept.output)
        factor = terms.root()
        layers = tuple(layer.map_rows(factor.apply) for layer in base.layers)
    else:
        draw = _sampler(kind, samples, generator, share)

        def seed(z: Tensor) -> Tensor:
            return draw(terms_of(z)).view(-1, *reading[1].lay_out(z).shape).to(z.dtype)

        swept = _sweep(model, reading, output, engine, seed)
        terms = terms_of(swept.output)
        layers = tuple(layer if dtype is None else layer.to(dtype) for layer in swept.layers)
    return Rows(
        layers=layers,
        space=_space(model),
        kind=kind,
        count=terms.count,
        terms=terms.terms,
        reduction=terms.reduction,
        sample_weights=terms.sample_weights,
        _jacobian=base,
        factor=factor,
    )


def _every_output(samples: Samples) -> Seed:
    def seed(z: Tensor) -> Tensor:
        laid_out = samples.lay_out(z)
        return identity_seeds(flat_outputs(laid_out)).view(-1, *laid_out.shape)

    return seed


def _sampler(
    kind: Kind, samples: int, generator: torch.Generator | None, share: tuple[int, int] | None
) -> Callable[[LossTerms], Tensor]:
    if kind == "empirical":
        return LossTerms.empirical
    if generator is None:
        raise ValueError("kind='mc' draws at random: pass generator=torch.Generator().manual_seed(…).")
    return lambda terms: terms.sampled(samples, generator, share=share)


def _converted(rows: Rows, dtype: torch.dtype | None) -> Rows:
    return rows if dtype is None else rows.to(dtype)


def _space(model: nn.Module) -> ParameterSpace:
    return ParameterSpace({name: parameter.shape for name, parameter in trainable(model).items()})


def _jacobian_rows(model: nn.Module, swept: Swept) -> Rows:
    samples = swept.seeds.shape[1]
    return Rows(
        layers=swept.layers,
        space=_space(model),
        kind="jacobian",
        count=1.0,
        terms=float(samples),
        reduction="none",
        sample_weights=swept.output.new_ones(samples),
    )


Reading = tuple[Arguments, Samples]
"""The model's arguments, and what a sample is in them."""


def read(model: nn.Module, inputs: Any, nodes: NodeChoice) -> Reading:
    """Tell the arguments of a model, and what a sample is."""
    arguments = as_arguments(inputs)
    return arguments, samples_of(model.base if isinstance(model, Linearized) else model, inputs, arguments, nodes)


def _sweep(model: nn.Module, reading: Reading, pick: PickOutput, engine: Engine, seed: Seed) -> Swept:
    """Run one engine, checked; a linearised model is swept at its origin and seeded at its own output."""
    if not isinstance(model, Linearized):
        return _checked_sweep(model, reading, pick, engine, seed, model)
    arguments, samples = reading
    with torch.no_grad(), left_as_found(model.base):
        z = samples.choose(call(model, arguments, pick))
    base = structural_twin(model.base, {name: p.requires_grad for name, p in model.named_parameters()})
    swept = _checked_sweep(base, reading, pick, engine, lambda _: seed(z), model)
    return replace(swept, output=z)


def _checked_sweep(
    model: nn.Module, reading: Reading, pick: PickOutput, engine: Engine, seed: Seed, once_for: nn.Module
) -> Swept:
    chosen = _choose(model, pick, engine, once_for)
    arguments, samples = reading

    def forward() -> Tensor:
        with differentiable_recurrence(model):
            return samples.lay_out(samples.choose(call(model, arguments, pick)))

    def sweep() -> tuple[Swept, tuple[str, ...]]:
        if chosen == "backpack":
            swept = backpack.sweep(model, arguments, pick, seed, samples)
        else:
            swept = autograd.sweep(model, arguments, pick, seed, samples, unfactored(once_for))
        check_finite(swept)
        return swept, wrong_rows(model, forward, swept, chosen, once_for)

    with left_as_found(model):
        swept, wrong = sweep()
        if wrong and chosen == "autograd":
            with without_factors(once_for, wrong):
                swept, wrong = sweep()
                refuse(wrong)
        refuse(wrong)
    return swept


def _choose(model: nn.Module, pick: PickOutput, engine: Engine, announced_for: nn.Module) -> str:
    if engine not in get_args(Engine):
        raise unknown_name("engine", engine, get_args(Engine))
    if engine != "auto":
        return engine
    reason = backpack.obstacle(model, pick)
    if announced_for not in _announced:
        _announced.add(announced_for)
        if reason is None:
            logger.info("Rows by the BackPACK engine: the model is a chain of modules that it knows.")
        else:
            logger.info("Rows by the autograd engine: %s.", reason)
    return "autograd" if reason else "backpack"
