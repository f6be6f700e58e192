"""The layer-wise family `F_Σ = S̃ᵀ(Σ ⊗ I_R)S̃`, with `S̃ = blockdiag(S_1, …, S_L)` and any symmetric Σ.

Σ = 1 1ᵀ is the full matrix, Σ = I the block-diagonal one, a band of ones the block-tridiagonal *F* (not the tridiagonal
*F⁻¹* of Martens & Grosse 2015). F_Σ has the blocks `Σ_lm S_lᵀS_m` and is indefinite where Σ is.

On the row side the push-through identity gives, for `D = blockdiag(S_l S_lᵀ)` and any d,

    (F_Σ + ρI)⁻¹ S̃ᵀd = S̃ᵀ[(Σ ⊗ I)D + ρI]⁻¹d = S̃ᵀ U λ^{-1/2} (H + ρI)⁻¹ λ^{1/2} Uᵀd,   S_l S_lᵀ = U_l λ_l U_lᵀ,

with the symmetric H of blocks `Σ_lm λ_l^{1/2} U_lᵀ U_m λ_m^{1/2}`, of size L·R: F_Σ in the coordinates `λ^{-1/2} Uᵀ S̃x`.
Gram matrices, bases and H are in float64, whatever the rows are in, since undamped steps are largest along the smallest
directions of every layer. With damping, a λ below round-off is raised to it: the error is round-off of λ/ρ, that of
leaving such directions out would be its root. Without damping they are null and left out.

Source: Karakida & Osawa 2020, section 3 (the family and its isotropy).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.errors import IllConditioned
from curvlab.fisher.block import Block, RowRelation
from curvlab.fisher.full import RowStructure, as_partition, partition_parts
from curvlab.fisher.power import Power
from curvlab.fisher.side import RowSide, Side, SidedBlock
from curvlab.fisher.system import Eigen, condition_limit, rank_tolerance
from curvlab.rows import Rows
from curvlab.rows.layer import LayerRows
from curvlab.rows.parameters import Layout
from curvlab.rows.rows import gram
from curvlab.rows.side_by_side import combine, dense, gram64, moment, times
from curvlab.tools.looks import Look

Sigma = Sequence[Sequence[float]] | Callable[[int], Tensor]
"""Σ itself, or a function that returns Σ for a number of layers."""


@dataclass(frozen=True)
class RowCoordinates:
    """Coordinates `λ^{-1/2} Uᵀ S̃x` of vectors x, in float64.

    Attributes:
        vectors: U.
        root: λ^{1/2}.
        inverse_root: λ^{-1/2}, both 0 for directions that are left out.
    """

    vectors: Float[Tensor, "L R R"]
    root: Float[Tensor, "L 1 R"]
    inverse_root: Float[Tensor, "L 1 R"]

    @classmethod
    def of_grams(cls, grams: Float[Tensor, "L R R"], damped: bool) -> RowCoordinates:
        """Decompose the Gram matrices of the groups; λ that is round-off is raised to it if damped, else left out."""
        values, vectors = torch.linalg.eigh((grams + grams.mT) / 2)
        noise = rank_tolerance(values, None, values.shape[1], torch.float64)
        seen = ((values > noise) | (damped & (noise > 0)))[:, None]
        root = torch.maximum(values, noise).sqrt()[:, None]
        return cls(vectors, torch.where(seen, root, 0), torch.where(seen, 1 / root, 0))

    def of(self, products: Float[Tensor, "L K R"]) -> Float[Tensor, "K r"]:
        """Return the coordinates of vectors x, from `S̃x`."""
        return (products.to(self.vectors) @ self.vectors * self.inverse_root).transpose(0, 1).flatten(1)

    def of_combination(self, c: Float[Tensor, "K R"]) -> Float[Tensor, "K r"]:
        """Return the coordinates of `Sᵀc = S̃ᵀ(1 ⊗ c)`."""
        return (c.to(self.vectors) @ self.vectors * self.root).transpose(0, 1).flatten(1)

    def combination(self, y: Float[Tensor, "K r"]) -> Float[Tensor, "L K R"]:
        """Return d such that `S̃ᵀd` are the vectors of given coordinates."""
        by_group = y.view(len(y), len(self.vectors), -1).transpose(0, 1)
        return by_group * self.inverse_root @ self.vectors.mT

    def matrix(self, sigma: Float[Tensor, "L L"]) -> Float[Tensor, "r r"]:
        """Return H."""
        roots = self.vectors * self.root
        return torch.einsum("lm,lri,mrj->limj", sigma.to(roots), roots, roots).flatten(2).flatten(0, 1)


class LayerWiseBlock(SidedBlock):
    """All layers, coupled by Σ.

    Args:
        name: names of the layers.
        groups: parts of each group of layers.
        sigma: `[L, L]`, symmetric.
        config: see `RowSide`.
    """

    def __init__(
        self, name: str, groups: Sequence[Sequence[Layout]], sigma: Float[Tensor, "L L"], config: RowSide
    ) -> None:
        super().__init__(name, [part for group in groups for part in group], config)
        self.sigma = sigma
        self._group_sizes = [len(group) for group in groups]
        self._reset()

    def _reset(self) -> None:
        self._coordinates: dict[bool, RowCoordinates] = {}
        self._eigen: dict[bool, Eigen] = {}

    def _row_size(self, layers: Sequence[LayerRows]) -> int:
        return layers[0].count * len(self._group_sizes)

    def _form(self, layers: Sequence[LayerRows]) -> Tensor:
        sizes = [sum(layer.size for layer in group) for group in self._grouped(layers)]
        of = (
            torch.arange(len(sizes), device="cpu")
            .repeat_interleave(torch.tensor(sizes, device="cpu"))
            .to(self.sigma.device)
        )
        full = moment(layers)
        return full * self.sigma.to(full)[of[:, None], of[None, :]]

    def _grouped(self, layers: Sequence[LayerRows]) -> list[Sequence[LayerRows]]:
        return [layers[start:stop] for start, stop in pairwise(accumulate(self._group_sizes, initial=0))]

    def coordinates(self, damped: bool) -> RowCoordinates:
        """Coordinates of the rows."""
        if damped not in self._coordinates:
            grams = torch.stack([gram64(group) for group in self._grouped(self.layers)])
            self._coordinates[damped] = RowCoordinates.of_grams(grams, damped)
        return self._coordinates[damped]

    def eigen(self, damped: bool) -> Eigen:
        """Eigendecomposition of H, or of F_Σ itself on the parameter side; eigenvalues may be negative."""
        damped = damped and self.keeps_rows
        if damped not in self._eigen:
            matrix = self.coordinates(damped).matrix(self.sigma) if self.keeps_rows else self.average.value.double()
            values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
            null = values.abs() <= rank_tolerance(values, self.config.rtol, len(values), self._dtype)
            self._eigen[damped] = Eigen(values, vectors, null)
        return self._eigen[damped]

    @property
    def _dtype(self) -> torch.dtype:
        """Floating-point type of the state."""
        return self.layers[0].dtype if self.keeps_rows else self.average.value.dtype

    def _inverse(self, y: Float[Tensor, "K r"], damping: float) -> Float[Tensor, "K r"]:
        """Apply `(H + ρI)⁻¹`."""
        eigen = self.eigen(damping > 0)
        if damping > 0:
            # What the eigenvalues carry: float64 on the row side, the state's precision on the parameter side.
            precision = torch.float64 if self.keeps_rows else self._dtype
            moduli = (eigen.values + damping).abs()
            condition = float(moduli.max() / moduli.min())
            if condition > condition_limit(precision):
                warnings.warn(
                    f"block {self.name!r}: condition number about {condition:.1e} at damping {damping:.1e}, an "
                    "eigenvalue of F being close to 0 or to −ρ; solved by an eigendecomposition. Use another damping.",
                    IllConditioned,
                    stacklevel=2,
                )
        return (eigen.coordinates(y) * eigen.inverse(damping)) @ eigen.vectors.T

    def _spread(self, d: Float[Tensor, "L K R"]) -> Float[Tensor, "K P_b"]:
        """Multiply with `S̃ᵀ`."""
        pairs = zip(d.to(self._dtype), self._grouped(self.layers), strict=True)
        return torch.cat([combine(group, c) for c, group in pairs], dim=-1)

    def _seen(self, x: Float[Tensor, "K P_b"]) -> Float[Tensor, "L K R"]:
        """Multiply with S̃."""
        groups = self._grouped(self.layers)
        sizes = [sum(layer.size for layer in group) for group in groups]
        return torch.stack([times(group, piece) for group, piece in zip(groups, x.split(sizes, dim=-1), strict=True)])

    def matvec(self, x: Float[Tensor, "K P_b"]) -> Float[Tensor, "K P_b"]:  # noqa: D102
        if not self.keeps_rows:
            return x @ self.average.value
        seen = self._seen(x)
        return self._spread(torch.einsum("lm,mkr->lkr", self.sigma.to(seen), seen))

    def solve(self, x: Float[Tensor, "K P_b"], damping: float) -> tuple[Float[Tensor, "K P_b"], Float[Tensor, " K"]]:
        """Solve by the eigendecomposition of H, never by Cholesky."""
        if not self.keeps_rows:
            outside = x.new_zeros(len(x)) if damping else self._null_energy(x)
            return self._inverse(x.double(), damping).to(x), outside
        coordinates = self.coordinates(damping > 0)
        y = coordinates.of(self._seen(x))
        solved = self._inverse(y, damping)
        if damping > 0:
            part = self._spread(coordinates.combination(solved - y / damping))
            return part + x / damping, x.new_zeros(len(x))
        eigen = self.eigen(damped=False)
        projection = (eigen.coordinates(y) * ~eigen.null) @ eigen.vectors.T
        inside, solution = self._spread(coordinates.combination(torch.cat([projection, solved]))).split(len(x))
        return solution, (x - inside).square().sum(-1)

    def transform(self, x: Float[Tensor, "K P_b"], power: Power) -> Float[Tensor, "K P_b"]:  # noqa: D102
        damped, outside = not power.drops, power.outside
        eigen = self.eigen(damped)
        values = power.of(eigen.values, eigen.null, self.name)
        if not self.keeps_rows:
            return ((eigen.coordinates(x) * values) @ eigen.vectors.T).to(x)
        coordinates = self.coordinates(damped)
        y = eigen.coordinates(coordinates.of(self._seen(x))) * (values - outside)
        return self._spread(coordinates.combination(y @ eigen.vectors.T)) + outside * x

    def _null_energy(self, x: Float[Tensor, "K P_b"]) -> Float[Tensor, " K"]:
        eigen = self.eigen(damped=False)
        return (eigen.coordinates(x).square() * eigen.null).sum(-1).to(x)

    def lift(self, c: Float[Tensor, "K R"], layers: tuple[LayerRows, ...], damping: float) -> Float[Tensor, "K P_b"]:
        """Return `(F_Σ + ρI)⁻¹Sᵀc`, with `Sᵀ = S̃ᵀ(1 ⊗ I)`."""
        if not self.keeps_rows:
            return self.solve(combine(layers, c), damping)[0]
        coordinates = self.coordinates(damping > 0)
        return self._spread(coordinates.combination(self._inverse(coordinates.of_combination(c), damping)))

    def sandwich(  # noqa: D102
        self,
        left: tuple[LayerRows, ...],
        right: tuple[LayerRows, ...],
        damping: float,
        relation: RowRelation,
    ) -> Float[Tensor, "Q R"]:
        if not self.keeps_rows:
            return times(left, self.solve(dense(right), damping)[0]).T
        coordinates = self.coordinates(damping > 0)
        a = coordinates.of(self._crosses(left))
        if relation.coefficients is not None:
            V, N = self.layers[0].shape
            identity = torch.eye(V * N, dtype=self._dtype, device=a.device)
            b = coordinates.of_combination(relation.coefficients.apply(identity.view(V, N, -1)).flatten(0, 1))
            return (a @ self._inverse(b, damping).T).to(self._dtype)
        b = coordinates.of(self._crosses(right))
        within = a @ self._inverse(b, damping).T
        outside = 0 if damping == 0 else (gram(left, right) - a @ b.T) / damping
        return (within + outside).to(self._dtype)

    def _crosses(self, layers: Sequence[LayerRows]) -> Float[Tensor, "L Q R"]:
        """Return `S̃ · layersᵀ`, transposed."""
        pairs = zip(self._grouped(layers), self._grouped(self.layers), strict=True)
        return torch.stack([gram(theirs, ours) for theirs, ours in pairs])

    def to_dense(self) -> Float[Tensor, "P_b P_b"]:  # noqa: D102
        return self._form(self.layers) if self.keeps_rows else self.average.value

    def eigenvalues(self) -> Float[Tensor, " k"]:
        """Return the eigenvalues of H that do not count as null; the others are zero."""
        eigen = self.eigen(damped=False)
        return eigen.values[~eigen.null]

    def largest_eigenvalue(self) -> float:  # noqa: D102
        return float(self.eigen(damped=True).values.max())

    def trace(self) -> float:  # noqa: D102
        if not self.keeps_rows:
            return float(self.average.value.trace())
        groups = self._grouped(self.layers)
        traces = [float(sum(layer.diagonal().sum() for layer in group)) for group in groups]
        return float(sum(w * trace for w, trace in zip(self.sigma.diagonal().tolist(), traces, strict=True)))


class LayerWise(
    RowStructure,
    key="layer-wise",
    summary="the family S̃ᵀ(Σ ⊗ I)S̃ for any symmetric Σ",
    look=Look("#F0E442", "v", "layer-wise"),
):
    """The layer-wise family for a symmetric Σ.

    Args:
        sigma: `[L, L]`, or a function of L that returns it; the identity (block-diagonal) if None.
        partition: groups of parameter names that take the place of layers.
        side: "rows" or "parameters", on which a block is kept and solved; "auto" for the smaller one.
        window: keep the rows of the last `window` batches, each `decay` times the weight of the next.
        rtol: rank tolerance of undamped solves, relative to λ_max; n·ε if None.

    Raises:
        ValueError: at construction if Σ is not square, symmetric and finite; at the first update if its size is not the
            number of layers.
    """

    costly = True

    def __init__(
        self,
        sigma: Sigma | None = None,
        *,
        partition: Sequence[str | Sequence[str]] | None = None,
        side: Side = "auto",
        window: int | None = None,
        rtol: float | None = None,
    ) -> None:
        super().__init__(side=side, window=window, rtol=rtol)
        self._partition = as_partition(partition)
        self._sigma: Callable[[int], Tensor]
        if sigma is None:
            self._sigma = _identity
        elif callable(sigma):
            self._sigma = sigma
        else:
            self._sigma = partial(_fixed, _checked(torch.as_tensor(sigma, dtype=torch.float64, device="cpu")))
        self._given = sigma

    @property
    def options(self) -> Mapping[str, object]:
        """The configuration."""
        return {"sigma": self._given, "partition": self._partition, **super().options}

    def _make_blocks(self, rows: Rows) -> list[Block]:
        groups = partition_parts(rows, self._partition)
        sigma = _checked(torch.as_tensor(self._sigma(len(groups)), dtype=torch.float64, device="cpu"))
        if len(sigma) != len(groups):
            raise ValueError(f"sigma is {len(sigma)} × {len(sigma)}, but there are {len(groups)} groups of layers.")
        name = ", ".join(group for group, _ in groups)
        return [LayerWiseBlock(name, [parts for _, parts in groups], sigma.to(rows.device), self._config)]


class BlockTridiagonal(
    LayerWise,
    key="block-tridiagonal",
    summary="F restricted to a layer and its neighbours",
    look=Look("#D55E00", "^", "block-tridiagonal"),
):
    """The blocks of `F` between a layer and its neighbours; indefinite for three layers and more.

    Args:
        partition: groups of parameter names that take the place of layers.
        side: "rows" or "parameters", on which a block is kept and solved; "auto" for the smaller one.
        window: keep the rows of the last `window` batches, each `decay` times the weight of the next.
        rtol: rank tolerance of undamped solves, relative to λ_max; n·ε if None.
    """

    def __init__(
        self,
        *,
        partition: Sequence[str | Sequence[str]] | None = None,
        side: Side = "auto",
        window: int | None = None,
        rtol: float | None = None,
    ) -> None:
        super().__init__(tridiagonal, partition=partition, side=side, window=window, rtol=rtol)

    @property
    def options(self) -> Mapping[str, object]:
        """The configuration."""
        return {name: value for name, value in super().options.items() if name != "sigma"}


def tridiagonal(L: int) -> Float[Tensor, "L L"]:
    """Return the matrix with ones on its three central diagonals."""
    index = torch.arange(L, device="cpu")
    return ((index[:, None] - index[None, :]).abs() <= 1).double()


def _identity(L: int) -> Float[Tensor, "L L"]:
    return torch.eye(L, dtype=torch.float64, device="cpu")


def _fixed(sigma: Float[Tensor, "L L"], _: int) -> Float[Tensor, "L L"]:
    return sigma


def _checked(sigma: Tensor) -> Float[Tensor, "L L"]:
    square = sigma.ndim == 2 and sigma.shape[0] == sigma.shape[1]
    if not square or not bool(torch.isfinite(sigma).all()) or not torch.equal(sigma, sigma.T):
        raise ValueError("sigma must be a finite, symmetric square matrix with one row a layer.")
    return sigma
