"""Rows of layers that keep their inputs and the gradients at their outputs; `curvlab.rows.layer` has the index notation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curvlab.rows.aligned import product
from curvlab.rows.layer import LayerRows, SharedRows, blank, part_of
from curvlab.rows.parameters import Layout
from curvlab.rows.products import add_pairs, add_product, cached, chunks, pairs_cost

PIECE = 1 << 21
"""Elements of inputs that are unfolded at once where that may be done in pieces."""

REDUCING_OVERHEAD = 4
"""Time of a QR decomposition of vectors of positions, relative to the multiply-adds of their Gram matrix."""

PAIRING_OVERHEAD = 2
"""Time of a multiply-add of pairs of positions, whose products are small, relative to one of formed rows."""


@dataclass(frozen=True, eq=False, repr=False)
class KroneckerRows(SharedRows):
    """Rows `Σ_t g ⊗ a` of a layer whose output is linear in its parameters: Linear and convolutions.

    Attributes:
        a: inputs of the layer, unfolded, with the bias' column.
        g: back-propagated rows at the layer's output.
    """

    a: Float[Tensor, "N T Q I"]
    g: Float[Tensor, "V N T Q O"]
    lengths: Int[Tensor, "N ..."] | None = None

    @classmethod
    def deferred(
        cls, name: str, layout: Layout, unfold: Callable[[slice], Tensor], g: Float[Tensor, "V N T Q O"]
    ) -> KroneckerRows:
        """Return rows whose inputs are formed when they are first asked for, from what must not change until then.

        Args:
            name: see `LayerRows`.
            layout: see `LayerRows`.
            unfold: forms the inputs of some samples.
            g: see above.
        """
        rows = object.__new__(cls)
        for field, value in {"name": name, "layout": layout, "g": g, "lengths": None, "_unfold": unfold}.items():
            object.__setattr__(rows, field, value)
        return rows

    @property
    def _waiting(self) -> Callable[[slice], Tensor] | None:
        """What forms the inputs, while nobody has asked for them."""
        return self.__dict__.get("_unfold")

    def __getattr__(self, name: str) -> Any:
        if name != "a" or self._waiting is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        object.__setattr__(self, "a", self._waiting(slice(None)))
        object.__setattr__(self, "_unfold", None)
        return self.a

    @property
    def inputs(self) -> Tensor:  # noqa: D102
        return self.a

    def to(self, dtype: torch.dtype) -> KroneckerRows:  # noqa: D102
        if (unfold := self._waiting) is None:
            return super().to(dtype)
        return self.deferred(self.name, self.layout, lambda part: unfold(part).to(dtype), self.g.to(dtype))

    def select(self, samples: slice) -> KroneckerRows:  # noqa: D102
        if (unfold := self._waiting) is None:
            return super().select(samples)
        return self.deferred(self.name, self.layout, lambda part: unfold(samples)[part], self.g[:, samples])

    def without_numbers(self) -> KroneckerRows:  # noqa: D102
        if self._waiting is None:
            return super().without_numbers()
        inputs = self.g.new_zeros(()).expand(*self.g.shape[1:4], self.layout.width)
        return KroneckerRows(self.name, self.layout, inputs, blank(self.g))

    def pieces(self) -> Iterable[slice]:
        """Cut the samples, where their inputs are not formed yet, so that those of a piece stay small."""
        if self._waiting is None:
            return [slice(None)]
        _, N, T, Q, _ = self.g.shape
        return chunks(N, T * Q * self.layout.width, PIECE)

    def restrict(self, names: Iterable[str]) -> KroneckerRows:  # noqa: D102
        layout, columns = self.layout.restrict(names)
        return replace(self, layout=layout, a=self.a[..., columns])

    @property
    def groups(self) -> int:  # noqa: D102
        return self.g.shape[3]

    def at(self, units: Int[Tensor, " u"], columns: Int[Tensor, " w"]) -> KroneckerRows:  # noqa: D102
        return replace(self, layout=part_of(self, units, columns), a=self.a[..., columns], g=self.g[..., units])

    def truncated(self, rank: int) -> KroneckerRows:
        """Return rows of one position a singular value of `g[v,n,:,q,:]`, the largest ones: `Σ_t g ⊗ a` of that rank nearest in g.

        Every row is a sample of its own, as singular vectors mix the inputs' positions: `V = 1`, and `N` is the number of rows.
        Cost: `R·Q` decompositions of `[T, O]`; memory `R·rank·Q·(O + I)`.
        """
        u, s, v = torch.linalg.svd(self.g.transpose(2, 3), full_matrices=False)
        kept = slice(min(rank, s.shape[-1]))
        a = torch.einsum("vnqtk,ntqi->vnkqi", u[..., kept], self.a)
        g = (s[..., kept, None] * v[..., kept, :]).transpose(2, 3)
        return KroneckerRows(self.name, self.layout, a.flatten(0, 1), g.flatten(0, 1)[None])

    def add_gram(self, out: Float[Tensor, "R S"], other: LayerRows) -> None:
        """Add `self @ otherᵀ`.

        For `T = 1` this is `(g gᵀ) ∘ (a aᵀ)`, at `Q·(R·S·O + N·M·I)`; `a aᵀ` of one and the same inputs is kept where it
        takes no more memory than they. For `T > 1` it is the faster of forming the rows, `(R·T + S·U + R·S)·Q·O·I`, and of
        the pairs of positions, `Q·N·M·T·(U·I + W·O·(U + V))`.
        """
        if not isinstance(other, KroneckerRows):
            self._add_dense_gram(out, other)
        elif self.positions == other.positions == 1:
            N, _, Q, I = self.a.shape  # noqa: E741
            kept = self._similarities if other.a is self.a and N <= I else None
            for q in range(Q):
                weight = kept[q] if kept else self.a[:, 0, q] @ other.a[:, 0, q].T
                add_product(out, self.g[:, :, 0, q], other.g[:, :, 0, q], weight, symmetric=other is self)
        elif self._forming_cost(other) <= PAIRING_OVERHEAD * self._pairing_cost(other):
            self._add_formed_gram(out, other)
        else:
            self._add_pairwise_gram(out, other)

    @cached_property
    def _similarities(self) -> list[Float[Tensor, "N N"]]:
        """Inner products of the inputs of samples at one position each, one matrix a group."""
        return [a @ a.T for a in self.a[:, 0].unbind(1)]

    def _forming_cost(self, other: KroneckerRows) -> int:
        return (self.count * (self.positions + other.count) + other.count * other.positions) * self.size

    def _pairing_cost(self, other: KroneckerRows) -> int:
        similarity = self.shape[1] * self.positions * other.shape[1] * other.positions * self.a.shape[3]
        return self.a.shape[2] * (similarity + pairs_cost(self.g[:, :, :, 0], other.g[:, :, :, 0]))

    def _add_formed_gram(self, out: Float[Tensor, "R S"], other: KroneckerRows) -> None:
        _, _, _, Q, O = self.g.shape  # noqa: E741
        for q in range(Q):
            for part in chunks(O, max(self.count, other.count) * self.a.shape[3]):
                left = _form(self.a[:, :, q], self.g[:, :, :, q, part])
                right = left if other is self else _form(other.a[:, :, q], other.g[:, :, :, q, part])
                add_product(out, left, right, symmetric=other is self)

    def _add_pairwise_gram(self, out: Float[Tensor, "R S"], other: KroneckerRows) -> None:
        for q in range(self.a.shape[2]):
            alike = partial(_inner_products, self.a[:, :, q], other.a[:, :, q])
            add_pairs(out, self.g[:, :, :, q], other.g[:, :, :, q], alike, symmetric=other is self)

    def matvec(self, block: Float[Tensor, "K P_l"]) -> Float[Tensor, "K R"]:
        """Multiply. Cost `K·N·T·Q·O·(I + V)`, or that of forming the rows and `K·R·P_l` if less."""
        if self._worth_forming(len(block)):
            (V, N), K = self.shape, len(block)
            pieces = [(block @ self.select(part).dense().T).view(K, V, -1) for part in chunks(N, V * self.size)]
            return torch.cat(pieces, dim=2).flatten(1)
        Q, O, I = self.a.shape[2], self.g.shape[4], self.a.shape[3]  # noqa: E741
        moved = torch.einsum("ntqi,kqoi->kntqo", self.a, block.view(-1, Q, O, I))
        return torch.einsum("vntqo,kntqo->kvn", self.g, moved).flatten(1)

    def rmatvec(self, coefficients: Float[Tensor, "K R"]) -> Float[Tensor, "K P_l"]:
        """Combine. Cost as in `matvec`."""
        (V, N), c = self.shape, coefficients.view(-1, *self.shape)
        if self._worth_forming(len(c)):
            parts = chunks(N, V * self.size)
            return sum((c[:, :, part].flatten(1) @ self.select(part).dense() for part in parts), c.new_zeros(()))
        combined = torch.einsum("kvn,vntqo->kntqo", c, self.g)
        return torch.einsum("kntqo,ntqi->kqoi", combined, self.a).flatten(1)

    def _worth_forming(self, vectors: int) -> bool:
        """Whether products with so many vectors cost less with the rows formed."""
        V, T, I = self.shape[0], self.positions, self.a.shape[3]  # noqa: E741
        return V * T * I + vectors * V * I < vectors * T * (I + V)

    def along(self, units: Float[Tensor, "U K"], width: Float[Tensor, "I K"]) -> Float[Tensor, "R K"]:  # noqa: D102
        if self.g.shape[3] == 1:
            g = (self.g.flatten(0, 3) @ units).view(*self.g.shape[:4], -1)
        else:
            g = torch.einsum("vntqo,qok->vntqk", self.g, units.view(*self.g.shape[3:], -1))
        return (g * (self.a.flatten(0, 2) @ width).view(*self.a.shape[:3], -1)).sum((2, 3)).flatten(0, 1)

    def total(self) -> Float[Tensor, " P_l"]:  # noqa: D102
        return _sum_of_products(self._over_v(), self.a, product).flatten()

    def total_by_parameter(self) -> dict[str, Tensor]:  # noqa: D102
        g = self._over_v()
        return {
            slot.name: slot.shaped(_sum_of_products(g, self.a[..., slot.start : slot.stop], torch.mm))
            for slot in self.layout.slots
        }

    def _over_v(self) -> Float[Tensor, "N T Q O"]:
        return self.g[0] if len(self.g) == 1 else self.g.sum(0)

    def times_total(self, other: LayerRows) -> Float[Tensor, " R"]:  # noqa: D102
        O, I = self.g.shape[4], self.a.shape[3]  # noqa: E741
        few = isinstance(other, KroneckerRows) and self.positions == other.positions == 1
        if not (few and other.count * (O + I) < 2 * O * I):
            return super().times_total(other)
        products = self.g.new_zeros(self.count, other.count)
        self.add_gram(products, other)
        return products.sum(1)

    def dense(self) -> Float[Tensor, "R P_l"]:  # noqa: D102
        return torch.einsum("vntqo,ntqi->vnqoi", self.g, self.a).flatten(2).flatten(0, 1)

    def unit_stack(self) -> Float[Tensor, "U R width"]:  # noqa: D102
        if self.positions == 1:
            return super().unit_stack()
        (V, N, _, Q, O), I = self.g.shape, self.a.shape[3]  # noqa: E741
        stack = self.g.new_empty(Q, O, V, N, I)
        for part in chunks(O, V * N * self.positions):
            for q in range(Q):
                g = self.g[:, :, :, q, part].permute(1, 3, 0, 2).flatten(1, 2)
                torch.bmm(g, self.a[:, :, q], out=stack[q, part].view(-1, N, I).transpose(0, 1))
        return stack.view(Q * O, V * N, I)

    def diagonal(self) -> Float[Tensor, " P_l"]:
        """Return the diagonal of `SᵀS`. Cost `N·Q·(V·O + O·I)` for `T = 1`, else `R·T·Q·O·I`, in chunks of samples."""
        if self.positions == 1:
            energy = self.g[:, :, 0].square().sum(0)
            return torch.einsum("nqo,nqi->qoi", energy, self.a[:, 0].square()).flatten()
        (V, N, _, Q, O), I = self.g.shape, self.a.shape[3]  # noqa: E741
        total = self.g.new_zeros(Q, O, I)
        for part in chunks(N, V * self.size, cached(self.g.device)):
            g = self.g[:, part].permute(1, 3, 0, 4, 2).flatten(2, 3)
            formed = (g @ self.a[part].transpose(1, 2)).square_()
            total += formed.unflatten(2, (V, O)).sum((0, 2))
        return total.flatten()

    def input_root(
        self, sample_weights: Float[Tensor, "N ..."], *, reduce: bool
    ) -> tuple[Float[Tensor, "Q N T I"], float]:
        """Return X and s with `s·XᵀX = Σ_n ω_n (1/T) Σ_t a aᵀ` (expand), or with a averaged over t first (reduce).

        T is the number of positions of a sample, or of a group of it.
        """
        T = self.sizes()
        by_sample = sample_weights.to(self.dtype).view(*sample_weights.shape, *(1,) * (T.ndim - sample_weights.ndim))
        weights = by_sample / (T.square() if reduce else T)
        a = self.a.sum(1, keepdim=True) if reduce else self.a
        if bool((weights == weights.flatten()[0]).all()):
            return a.movedim(2, 0), float(weights.flatten()[0])
        return (a * weights.sqrt().view(len(a), 1, -1, 1)).movedim(2, 0), 1.0

    def output_root(self, *, reduce: bool) -> Float[Tensor, "Q R T O"]:
        """Return X with `XᵀX = Σ_{v,n,t} g gᵀ` (expand), or with g summed over t first (reduce)."""
        g = self.g.sum(2, keepdim=True) if reduce else self.g
        return g.flatten(0, 1).movedim(2, 0)

    def trace_roots(
        self, *, units: bool = True, width: bool = True, in_pieces: bool = True
    ) -> Iterator[tuple[Float[Tensor, "Q m t O"] | None, Float[Tensor, "Q m t I"] | None]]:
        """Yield X and Y with `XᵀX = Σ_r M_r M_rᵀ` and `YᵀY = Σ_r M_rᵀ M_r` over the rows M `[O, I]` of some samples.

        Args:
            units: whether X is wanted; None otherwise.
            width: whether Y is wanted; None otherwise.
            in_pieces: whether to go through few samples at a time, so that what is formed stays small; else through all.

        Cost: `R·Q·T·O·I` for rows that are formed. Where that is less work, the vectors of T positions on one side are replaced
        by T coordinates in their span, at `N·Q·T²·I` or `R·Q·T²·O`: norms for T = 1, where no row is formed.
        """
        (V, N, T, Q, O), I = self.g.shape, self.layout.width  # noqa: E741
        short_inputs = units and _worth_reducing(T, I, V * O * (T + O))
        short_outputs = width and _worth_reducing(T, V * O, I * (T + I))
        forming = (units and not short_inputs) or (width and not short_outputs)
        each = V * self.size if forming else V * Q * T * (O + I)
        for part in chunks(N, each) if in_pieces else [slice(0, N)]:
            some = self.select(part)
            a, g = some.a.movedim(2, 0), some.g.movedim(3, 0)
            formed = torch.einsum("qvnto,qnti->qvnoi", g, a).flatten(1, 2) if forming else None
            X = Y = None
            if short_inputs:
                X = torch.einsum("qvnto,qntk->qvnko", g, _coordinates(a)).flatten(1, 2)
            elif units and formed is not None:
                X = formed.mT
            if short_outputs:
                Y = torch.einsum("qntk,qnti->qnki", _coordinates(g.movedim(1, 3).flatten(3)), a)
            elif width:
                Y = formed
            yield X, Y


def _worth_reducing(T: int, length: int, saved: int) -> bool:
    """Whether T vectors of some length are better replaced by T coordinates, if each entry less saves so many operations."""
    return REDUCING_OVERHEAD * T**2 * length < saved * (length - T)


def _coordinates(x: Float[Tensor, "*B T d"]) -> Float[Tensor, "*B T T"]:
    """Return vectors with the same inner products."""
    if x.shape[-2] == 1:
        norms: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return norms
    triangle: Tensor = torch.linalg.qr(x.mT, mode="r").R
    return triangle.mT


def _sum_of_products(
    g: Float[Tensor, "N T Q O"], a: Float[Tensor, "N T Q I"], multiply: Callable[[Tensor, Tensor], Tensor]
) -> Float[Tensor, "U I"]:
    """Return `Σ_{n,t} g ⊗ a`."""
    if g.shape[2] == 1:
        return multiply(g.flatten(0, 2).T, a.flatten(0, 2))
    return torch.einsum("ntqo,ntqi->qoi", g, a).flatten(0, 1)


def _inner_products(
    left: Float[Tensor, "N T I"], right: Float[Tensor, "M U I"], n: slice, m: slice
) -> Float[Tensor, "n t m u"]:
    """Compare the positions of some samples with those of others."""
    return torch.einsum("nti,mui->ntmu", left[n], right[m])


def _form(a: Float[Tensor, "N T I"], g: Float[Tensor, "V N T O"]) -> Float[Tensor, "V N P"]:
    """Form the rows of one group."""
    return torch.einsum("vnto,nti->vnoi", g, a).flatten(2).contiguous()


@dataclass(frozen=True, eq=False, repr=False)
class EmbeddingRows(SharedRows):
    """Rows of an embedding: position t adds `g[v,n,t]` to the table row `index[n,t]`.

    Attributes:
        index: table rows that were looked up.
        g: back-propagated rows at the output, zero where the padding index was looked up.
    """

    index: Int[Tensor, "N T"]
    g: Float[Tensor, "V N T I"]
    lengths: Int[Tensor, " N"] | None = None

    @property
    def inputs(self) -> Tensor:  # noqa: D102
        return self.index

    def restrict(self, names: Iterable[str]) -> EmbeddingRows:  # noqa: ARG002
        """Return the rows themselves: an embedding has one parameter."""
        return self

    def at(self, units: Int[Tensor, " u"], columns: Int[Tensor, " w"]) -> EmbeddingRows:  # noqa: D102
        place = self.index.new_full((self.layout.units,), -1).index_copy_(0, units, torch.arange(len(units)).to(units))
        index = place[self.index]
        g = self.g[..., columns] * (index >= 0)[..., None]
        return replace(self, layout=part_of(self, units, columns), index=index.clamp_min(0), g=g)

    def add_gram(self, out: Float[Tensor, "R S"], other: LayerRows) -> None:
        """Add `self @ otherᵀ`: the cheaper of forming the rows, `R·S·P_l`, and of the pairs of positions."""
        forming = self.count * other.count * self.size
        if isinstance(other, EmbeddingRows) and pairs_cost(self.g, other.g) < forming:
            self._add_pairwise_gram(out, other)
        else:
            self._add_dense_gram(out, other)

    def _add_pairwise_gram(self, out: Float[Tensor, "R S"], other: EmbeddingRows) -> None:
        def alike(n: slice, m: slice) -> Tensor:
            return (self.index[n, :, None, None] == other.index[m]).to(self.dtype)

        add_pairs(out, self.g, other.g, alike, symmetric=other is self)

    def matvec(self, block: Float[Tensor, "K P_l"]) -> Float[Tensor, "K R"]:  # noqa: D102
        looked_up = block.view(-1, self.layout.units, self.layout.width)[:, self.index]
        return torch.einsum("vnti,knti->kvn", self.g, looked_up).flatten(1)

    def rmatvec(self, coefficients: Float[Tensor, "K R"]) -> Float[Tensor, "K P_l"]:  # noqa: D102
        combined = torch.einsum("kvn,vnti->knti", coefficients.view(-1, *self.shape), self.g)
        table = combined.new_zeros(combined.shape[0], self.layout.units, self.layout.width)
        return table.index_add_(1, self.index.flatten(), combined.flatten(1, 2)).flatten(1)

    def dense(self) -> Float[Tensor, "R P_l"]:  # noqa: D102
        V, N, T, I = self.g.shape  # noqa: E741
        table = self.g.new_zeros(V, N, self.layout.units, I)
        return table.scatter_add_(2, self.index.expand(V, N, T)[..., None].expand_as(self.g), self.g).view(V * N, -1)

    def frequency(self, sample_weights: Float[Tensor, " N"]) -> Float[Tensor, " U"]:
        """Return the diagonal of K-FAC's A, `Σ_n ω_n (1/T) Σ_t 1[index = u]`, of the one-hot inputs."""
        T = self.positions
        weights = (sample_weights / self.sizes())[:, None].expand(-1, T).to(self.dtype)
        if self.lengths is not None:
            weights = weights * (torch.arange(T, device=weights.device) < self.lengths[:, None])
        return self.g.new_zeros(self.layout.units).index_add_(0, self.index.flatten(), weights.flatten())

    def output_root(self) -> Float[Tensor, "R T I"]:
        """Return X with `XᵀX = Σ_{v,n,t} g gᵀ`."""
        return self.g.flatten(0, 1)

    def by_entry(self) -> tuple[Int[Tensor, " k"], Float[Tensor, "V k I"]]:
        """Return the table row of every row of every sample that is not zero, and these, summed over positions."""
        N, U = self.shape[1], self.layout.units
        of_sample = self.index + U * torch.arange(N, device=self.index.device)[:, None]
        met, place = torch.unique(of_sample, return_inverse=True)
        summed = self.g.new_zeros(len(self.g), len(met), self.g.shape[3])
        return met % U, summed.index_add_(1, place.flatten(), self.g.flatten(1, 2))
