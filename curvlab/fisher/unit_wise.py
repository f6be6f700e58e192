"""The unit-wise Fisher matrix: one block an output channel, a scale-shift pair, a row of an embedding.

A unit of a dense layer on vectors (T = 1) sees row `(v, n)` as `g[v,n,u] a[n]`. Its Fisher block is
`aᵀ diag(Σ_v g[v,n,u]²) a`, so its row side is `[N, N]` with the rows `x[n] = s[n,u] a[n]`, `s = (Σ_v g²)^{1/2}`, never
`[R, R]`. Other layers keep the stack `[U, R, width]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.fisher.block import Block, RowRelation
from curvlab.fisher.full import RowStructure
from curvlab.fisher.on_vectors import contract_units, is_on_vectors, vector_factors
from curvlab.fisher.row_block import RowBlock
from curvlab.fisher.side import RowSide
from curvlab.fisher.stack import Cut, DenseStack, Stack
from curvlab.rows import Rows
from curvlab.rows.factored import KroneckerRows
from curvlab.rows.layer import LayerRows
from curvlab.rows.parameters import Layout
from curvlab.rows.products import chunks
from curvlab.tools.looks import Look


@dataclass(frozen=True, eq=False)
class ScaledInputs(Stack):
    """Rows `s[n,u] a[n]` of the units of a dense layer on vectors."""

    a: Float[Tensor, "Q N I"]
    g: Float[Tensor, "V N U"]
    s: Float[Tensor, "N U"]

    scaled = True
    shortened = True

    @property
    def scale(self) -> Float[Tensor, "Q O N"]:
        """`s` by group, unit and sample."""
        return self.s.T.reshape(self.a.shape[0], -1, self.s.shape[0])

    def gram(self) -> Float[Tensor, "U N N"]:  # noqa: D102
        s, aa = self.scale, self.a @ self.a.mT
        gram: Tensor = s[..., :, None] * aa[:, None] * s[..., None, :]
        return gram.flatten(0, 1)

    def moment(self) -> Float[Tensor, "U I I"]:
        """Return `X_uᵀX_u`."""
        pieces = []
        Q, O, N = self.scale.shape  # noqa: E741
        for part in chunks(O, Q * N * self.a.shape[2]):
            x = self.scale[:, part, :, None] * self.a[:, None]
            pieces.append(x.mT @ x)
        return torch.cat(pieces, dim=1).flatten(0, 1)

    def times(self, x: Float[Tensor, "K P_b"]) -> Float[Tensor, "U N K"]:  # noqa: D102
        Q, _, I = self.a.shape  # noqa: E741
        return torch.einsum("qni,kqoi,qon->qonk", self.a, x.view(len(x), Q, -1, I), self.scale).flatten(0, 1)

    def combine(self, c: Float[Tensor, "U N K"]) -> Float[Tensor, "K P_b"]:  # noqa: D102
        scaled = c.unflatten(0, (self.a.shape[0], -1)) * self.scale[..., None]
        return torch.einsum("qni,qonk->kqoi", self.a, scaled).flatten(1)

    def coefficients(self, c: Float[Tensor, "K R"]) -> Float[Tensor, "U N K"]:  # noqa: D102
        summed = torch.einsum("vnu,kvn->unk", self.g, c.reshape(-1, *self.g.shape[:2]))
        s = self.s.T[..., None]
        return torch.where(s > 0, summed / torch.where(s > 0, s, 1), 0)

    def condition_number(self) -> float | None:
        """Return that of the inputs alone, as rows are scaled to one norm; None if samples depend on each other."""
        inputs = torch.nn.functional.normalize(self.a.double(), dim=-1)
        values = torch.linalg.svdvals(inputs)[..., : inputs.shape[1]].square()
        if inputs.shape[2] >= inputs.shape[1] and bool((values[..., -1] > 0).all()):
            return float((values[..., 0] / values[..., -1]).max())
        return None


@dataclass(frozen=True, eq=False)
class Units(Cut):
    """One block a unit of a layer."""

    count: int

    def rows(self, layers: Sequence[LayerRows]) -> DenseStack:  # noqa: D102
        return DenseStack(layers[0].unit_stack())

    def root(self, layers: Sequence[LayerRows]) -> Stack:  # noqa: D102
        (layer,) = layers
        return _scaled_inputs(layer) if is_on_vectors(layer) else self.rows(layers)

    def row_size(self, layers: Sequence[LayerRows]) -> int:  # noqa: D102
        return layers[0].shape[1] if is_on_vectors(layers[0]) else layers[0].count

    def moment(self, layers: Sequence[LayerRows]) -> Float[Tensor, "U width width"]:  # noqa: D102
        (layer,) = layers
        if is_on_vectors(layer):
            return _scaled_inputs(layer).moment()
        x = layer.unit_stack()
        return x.mT @ x

    def title(self, name: str) -> str:  # noqa: D102
        return f"units of layer {name!r}"


def _scaled_inputs(layer: KroneckerRows) -> ScaledInputs:
    a, g = vector_factors(layer)
    return ScaledInputs(a, g, g.square().sum(0).sqrt())


class UnitBlock(RowBlock):
    """The units of one layer; sandwiches of a dense layer on vectors never form the rows of units."""

    def __init__(self, name: str, layout: Layout, config: RowSide) -> None:
        super().__init__(name, [layout], config, Units(layout.units))

    def sandwich(  # noqa: D102
        self,
        left: tuple[LayerRows, ...],
        right: tuple[LayerRows, ...],
        damping: float,
        relation: RowRelation,
    ) -> Float[Tensor, "Q R"]:
        a, b = left[0], right[0]
        if is_on_vectors(a) and is_on_vectors(b) and not (self.keeps_rows and not is_on_vectors(self.layers[0])):
            return contract_units(a, self._kernels(a, b, damping), b)
        return super().sandwich(left, right, damping, relation)

    def _kernels(self, left: KroneckerRows, right: KroneckerRows, damping: float) -> Float[Tensor, "U N M"]:
        """Return `a' (F_u + ρI)⁻¹ aᵀ` for every unit, of inputs a' and a."""
        a, _ = vector_factors(left)
        b, g = vector_factors(right)
        O = self.count // len(a)  # noqa: E741
        if not self.keeps_rows:
            solved = self.system.solve(b.mT.repeat_interleave(O, dim=0), damping)
            return a.repeat_interleave(O, dim=0) @ solved
        root = self.root
        assert isinstance(root, ScaledInputs)
        s = root.s.T[:, None]
        x = (a @ root.a.mT).repeat_interleave(O, dim=0) * s
        if torch.equal(b, root.a) and bool(((root.s > 0) | (g == 0).all(0)).all()):
            return self.system.solve(x.mT, damping).mT * torch.where(s > 0, 1 / torch.where(s > 0, s, 1), 0)
        y = x if left is right else (b @ root.a.mT).repeat_interleave(O, dim=0) * s
        return self.system.sandwich(x, y, damping, lambda: (a @ b.mT).repeat_interleave(O, dim=0))


class UnitWise(RowStructure, key="unit-wise", summary="one block of F a unit", look=Look("#009E73", "D", "unit-wise")):
    """One block of `F` a unit: an output channel with its incoming weights and bias, a scale-shift pair, a table row.

    A bare parameter is one unit. Units of a dense layer on vectors are kept on a row side of `[N, N]`.

    Args:
        side: "rows" or "parameters", on which a block is kept and solved; "auto" for the smaller one.
        window: keep the rows of the last `window` batches, each `decay` times the weight of the next.
        rtol: rank tolerance of undamped solves, relative to λ_max; n·ε if None.

    Source: Karakida & Osawa 2020, section 3.3; Ollivier 2015.
    """

    costly = True
    within_layers = True

    def _make_blocks(self, rows: Rows) -> list[Block]:
        return [UnitBlock(layer.name, layer.layout, self._config) for layer in rows.layers]
