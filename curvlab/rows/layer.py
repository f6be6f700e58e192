"""The rows of one layer, kept factored.

Index notation: `v` output row of a sample, `n` sample, `t` position that shares the weights (1 for a dense layer on
vectors, H·W for a convolution, the sequence length; those of all its calls for a layer that is used several times), `q`
group of a grouped convolution, `o` output channel of a group, `i` input feature of a group (the last one is the bias).
Row `(v, n)` of a layer is the `[units, width]` matrix

    KroneckerRows   Σ_t g[v,n,t,q,o] a[n,t,q,i]       Linear, convolutions; unit = (q, o)
    EmbeddingRows   Σ_t g[v,n,t,i] 1[index[n,t] = u]  Embedding; unit = u, a row of the table
    TiedRows        the sum of the two                an embedding that is the weight of a Linear, too
    DenseRows       j[v,n,u,i]                        normalisations, bare parameters, whatever is left

A flattened row axis has `R = V·N` entries, `v` outermost. `[R, P_l]` is never formed unless it is the cheaper side of
an operation count. Costs below are multiply-adds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from curvlab.rows.grouping import Grouping
from curvlab.rows.parameters import Layout
from curvlab.rows.products import add_product, chunks
from curvlab.tools.shown import line, some

Own = TypeVar("Own", bound="LayerRows")
Shared = TypeVar("Shared", bound="SharedRows")

RowMap = Callable[[Tensor], Tensor]
"""A map of tensors `[V, N, …]` to `[W, N, …]`, linear in the row axis `v`."""


@dataclass(frozen=True, eq=False, repr=False)
class LayerRows(ABC):
    """Rows of one layer: the algebra that structures are built from."""

    name: str
    layout: Layout

    summands: ClassVar[int] = 1
    """How many factored rows each row is the sum of; so many factors carry the row index."""

    def __repr__(self) -> str:
        return line(
            self, some(self.layout.names), layer=self.name, V=self.shape[0], N=self.shape[1], P=self.layout.size
        )

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """`(V, N)`: rows a sample, samples."""

    @property
    @abstractmethod
    def factors(self) -> tuple[Tensor, ...]:
        """The tensors that determine the rows: `sample_factors`, then `row_factors`."""

    @property
    def sample_factors(self) -> tuple[Tensor, ...]:
        """Those that all rows of a sample share, `[N, …]`."""
        return self.factors[: -self.summands]

    @property
    def row_factors(self) -> tuple[Tensor, ...]:
        """Those that carry the row index, `[V, N, …]`."""
        return self.factors[-self.summands :]

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the rows."""
        return self.row_factors[-1].dtype

    @classmethod
    def of(cls: type[Own], name: str, layout: Layout, *factors: Tensor) -> Own:
        """Return rows with given factors, in the order of `factors`."""
        return cls(name, layout, *factors)

    def _with_factors(self: Own, *factors: Tensor) -> Own:
        return self.of(self.name, self.layout, *factors)

    def without_numbers(self: Own) -> Own:
        """Return rows of zeros with the same shapes, type and device, which take no memory."""
        return self._with_factors(*map(blank, self.factors))

    @abstractmethod
    def group(self, grouping: Grouping) -> LayerRows:
        """Return the rows of samples to which the present ones, of single entries, belong."""

    def of_batch(self) -> LayerRows:
        """Return the rows of one sample, the batch: the sums over samples."""
        return self.group(Grouping(torch.zeros(self.shape[1], dtype=torch.long, device=self.row_factors[-1].device), 1))

    @abstractmethod
    def restrict(self, names: Iterable[str]) -> LayerRows:
        """Keep the columns of some of the parameters."""

    @abstractmethod
    def at(self, units: Int[Tensor, " u"], columns: Int[Tensor, " w"]) -> LayerRows:
        """Return the rows' entries at some units of every group and some columns; factored where the rows are."""

    def entries(self, index: Int[Tensor, " q"]) -> DenseRows:
        """Return the rows' entries at some places of a block vector, formed. Memory `R·q`, and that of some formed rows."""
        V, N = self.shape
        parts = chunks(N, V * self.size)
        found = [self.select(part).dense()[:, index].view(V, -1, 1, len(index)) for part in parts]
        layout = Layout.of(1, {self.name: torch.Size([len(index)])})
        return DenseRows(self.name, layout, torch.cat(found, dim=1))

    @property
    def groups(self) -> int:
        """Number of groups of units that have inputs of their own."""
        return 1

    @abstractmethod
    def add_gram(self, out: Float[Tensor, "R S"], other: LayerRows) -> None:
        """Add `self @ otherᵀ` to `out`; if `other is self`, only blocks on and above the diagonal (see `mirror`)."""

    @abstractmethod
    def matvec(self, block: Float[Tensor, "K P_l"]) -> Float[Tensor, "K R"]:
        """Multiply the rows with block vectors."""

    @abstractmethod
    def rmatvec(self, coefficients: Float[Tensor, "K R"]) -> Float[Tensor, "K P_l"]:
        """Combine the rows with coefficients."""

    @abstractmethod
    def dense(self) -> Float[Tensor, "R P_l"]:
        """Form the rows. Memory `R·P_l`."""

    def formed(self) -> DenseRows:
        """Return the same rows, formed. Memory `R·P_l`."""
        rows = self.dense().view(*self.shape, self.layout.units, self.layout.width)
        return DenseRows(self.name, self.layout, rows)

    @property
    def count(self) -> int:
        """Number of rows `R = V·N`."""
        return self.shape[0] * self.shape[1]

    @property
    def size(self) -> int:
        """Number of parameters `P_l`."""
        return self.layout.size

    def map_rows(self: Own, function: RowMap) -> Own:
        """Apply a linear map of the row axis."""
        return self._with_factors(*self.sample_factors, *map(function, self.row_factors))

    def scale(self: Own, by: float) -> Own:
        """Multiply all rows by a number."""
        return self.map_rows(lambda rows: rows * by)

    def to(self: Own, dtype: torch.dtype) -> Own:
        """Convert the floating-point factors."""
        return self._with_factors(*(f.to(dtype) if f.is_floating_point() else f for f in self.factors))

    def select(self: Own, samples: slice) -> Own:
        """Keep some of the samples."""
        rows = (factor[:, samples] for factor in self.row_factors)
        return self._with_factors(*(factor[samples] for factor in self.sample_factors), *rows)

    def concatenate(self: Own, others: Sequence[LayerRows]) -> Own:
        """Append the samples of other rows of this layer."""
        parts: list[LayerRows] = [self, *others]
        shared = [torch.cat(factors, dim=0) for factors in zip(*(p.sample_factors for p in parts), strict=True)]
        rows = [torch.cat(factors, dim=1) for factors in zip(*(p.row_factors for p in parts), strict=True)]
        return self._with_factors(*shared, *rows)

    def same_as(self, other: LayerRows) -> bool:
        """Whether other rows hold equal factors. Cost: one pass over them."""
        return (
            type(self) is type(other)
            and self.layout == other.layout
            and all(a is b or torch.equal(a, b) for a, b in zip(self.factors, other.factors, strict=True))
        )

    def along(self, units: Float[Tensor, "U K"], width: Float[Tensor, "I K"]) -> Float[Tensor, "R K"]:
        """Multiply the rows with products `u_k ⊗ w_k`."""
        return self.matvec(torch.einsum("uk,ik->kui", units, width).flatten(1)).T

    def total(self) -> Float[Tensor, " P_l"]:
        """Add up the rows."""
        return self.rmatvec(self.row_factors[-1].new_ones(1, self.count))[0]

    def total_by_parameter(self) -> dict[str, Tensor]:
        """Add up the rows; the sum by parameter, where it can be in memory of its own, contiguous."""
        return self.layout.split(self.total())

    def times_total(self, other: LayerRows) -> Float[Tensor, " R"]:
        """Multiply the rows with the sum of others. Cost: that of their Gram matrix, or `2·(R + S)·P_l` if less."""
        return self.matvec(other.total()[None])[0]

    def minus(self: Own, other: LayerRows, coefficients: Float[Tensor, " S"]) -> Own:
        """Return rows that add up to `Σ self − otherᵀc`, for one row a sample and others of the same samples and inputs."""
        c = coefficients.view(other.shape)
        pairs = zip(self.row_factors, other.row_factors, strict=True)
        left = [mine - torch.einsum("vn,vn...->n...", c, theirs) for mine, theirs in pairs]
        return self._with_factors(*self.sample_factors, *left)

    def shares_inputs(self, other: LayerRows) -> bool:
        """Whether other rows are of the same kind, with the very same tensors but for the row index."""
        return type(self) is type(other) and all(
            mine is theirs for mine, theirs in zip(self.sample_factors, other.sample_factors, strict=True)
        )

    def unit_stack(self) -> Float[Tensor, "U R width"]:
        """Form the rows of every unit. Memory `R·P_l`."""
        return self.dense().reshape(self.count, self.layout.units, self.layout.width).transpose(0, 1)

    def diagonal(self) -> Float[Tensor, " P_l"]:
        """Return the diagonal of `SᵀS`. Cost `R·P_l` after `dense`, in chunks of samples."""
        total = self.row_factors[-1].new_zeros(self.size)
        for part in chunks(self.shape[1], self.shape[0] * self.size):
            total += self.select(part).dense().square().sum(0)
        return total

    def _add_dense_gram(self, out: Float[Tensor, "R S"], other: LayerRows) -> None:
        left = self.dense().view(*self.shape, -1)
        right = left if other is self else other.dense().view(*other.shape, -1)
        add_product(out, left, right, symmetric=other is self)


class SharedRows(LayerRows):
    """Rows of a layer that is applied at T positions of a sample: inputs `[N, T, …]` and rows g `[V, N, T, …]`.

    Attributes:
        lengths: number of positions of every sample, or of every group of every sample, T if None; both factors are zero beyond.
    """

    g: Tensor
    lengths: Int[Tensor, "N ..."] | None

    @property
    @abstractmethod
    def inputs(self) -> Tensor:
        """What the layer sees at its positions."""

    @classmethod
    def of(cls: type[Shared], name: str, layout: Layout, *factors: Tensor) -> Shared:  # noqa: D102
        inputs, *lengths, rows = factors
        return cls(name, layout, inputs, rows, *lengths)  # type: ignore[call-arg]

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return self.g.shape[0], self.g.shape[1]

    @property
    def positions(self) -> int:
        """Number of positions `T` that share the weights, of the longest sample."""
        return self.inputs.shape[1]

    @property
    def factors(self) -> tuple[Tensor, ...]:  # noqa: D102
        return (self.inputs, self.g) if self.lengths is None else (self.inputs, self.lengths, self.g)

    @property
    def row_factors(self) -> tuple[Tensor, ...]:  # noqa: D102
        return (self.g,)

    def sizes(self) -> Float[Tensor, "N ..."]:
        """Return the number of positions of every sample, or of every group of every sample, 1 for one without any."""
        if self.lengths is None:
            return self.g.new_full(self.g.shape[1:2], self.positions)
        return self.lengths.to(self.dtype).clamp_min(1)

    def group(self: Shared, grouping: Grouping) -> Shared:
        """Return the rows of samples whose positions are those of their entries."""
        inputs = grouping.spread(self.inputs, 0).flatten(1, 2)
        lengths = grouping.lengths * self.positions
        ragged = [lengths] if bool((lengths != inputs.shape[1]).any()) else []
        return self._with_factors(inputs, *ragged, grouping.spread(self.g, 1).flatten(2, 3))

    def of_batch(self) -> LayerRows:
        """Return the rows of one sample, whose positions are those of all samples."""
        if self.lengths is None:
            return super().of_batch()
        if self.lengths.ndim == 2:
            lengths = self.lengths.sum(0, keepdim=True)
            return self._with_factors(self.inputs.flatten(0, 1)[None], lengths, self.g.flatten(1, 2)[:, None])
        present = torch.arange(self.positions, device=self.g.device) < self.lengths[:, None]
        inputs, g = self.inputs[present][None], self.g[:, present][:, None]
        return type(self)(self.name, self.layout, inputs, g)  # type: ignore[call-arg]

    def concatenate(self: Shared, others: Sequence[LayerRows]) -> Shared:
        """Append the samples of other rows of this layer; shorter samples are padded."""
        parts = [self, *(other for other in others if isinstance(other, type(self)))]
        T = max(part.positions for part in parts)
        if any(part.positions < T or part.lengths is not None for part in parts):
            parts = [part.padded(T) for part in parts]
        return super(SharedRows, parts[0]).concatenate(parts[1:])

    def padded(self: Shared, T: int) -> Shared:
        """Return the same rows at T positions, with the number that every sample has."""
        lengths = self.lengths
        if lengths is None:
            lengths = torch.full(self.g.shape[1:2], self.positions, device=self.g.device)
        more = T - self.positions

        def pad(factor: Tensor, axis: int) -> Tensor:
            return F.pad(factor, (0, 0) * (factor.ndim - axis - 1) + (0, more))

        return self._with_factors(pad(self.inputs, 1), lengths, pad(self.g, 2))


@dataclass(frozen=True, eq=False, repr=False)
class DenseRows(LayerRows):
    """Rows that were formed: normalisations, bare parameters, and layers without a factored form."""

    j: Float[Tensor, "V N U I"]

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return self.j.shape[0], self.j.shape[1]

    @property
    def factors(self) -> tuple[Tensor, ...]:  # noqa: D102
        return (self.j,)

    def group(self, grouping: Grouping) -> DenseRows:
        """Return the sums over the entries of every sample."""
        return replace(self, j=grouping.add(self.j, 1))

    def restrict(self, names: Iterable[str]) -> DenseRows:  # noqa: D102
        layout, columns = self.layout.restrict(names)
        return replace(self, layout=layout, j=self.j[..., columns])

    def at(self, units: Int[Tensor, " u"], columns: Int[Tensor, " w"]) -> DenseRows:  # noqa: D102
        return replace(self, layout=part_of(self, units, columns), j=self.j[:, :, units][..., columns])

    def add_gram(self, out: Float[Tensor, "R S"], other: LayerRows) -> None:
        """Add `self @ otherᵀ` at `R·S·P_l`."""
        self._add_dense_gram(out, other)

    def matvec(self, block: Float[Tensor, "K P_l"]) -> Float[Tensor, "K R"]:  # noqa: D102
        return block @ self.dense().T

    def rmatvec(self, coefficients: Float[Tensor, "K R"]) -> Float[Tensor, "K P_l"]:  # noqa: D102
        return coefficients @ self.dense()

    def dense(self) -> Float[Tensor, "R P_l"]:  # noqa: D102
        return self.j.flatten(2).flatten(0, 1)


def part_of(rows: LayerRows, units: Int[Tensor, " u"], columns: Int[Tensor, " w"]) -> Layout:
    """Return the layout of what `LayerRows.at` returns, which is a parameter by itself."""
    kept = len(units) * rows.groups
    return Layout.of(kept, {rows.name: torch.Size([kept, len(columns)])})


def blank(tensor: Tensor) -> Tensor:
    """Return zeros that share one entry of memory."""
    return tensor.new_zeros(()).expand(tensor.shape)
