"""Low rank blocks whose small systems are sketched, as in the sketchy empirical natural gradient method (SENG).

A layer's block is `F = XᵀX = UUᵀ`, of the rank of its R rows X at most. With a selection W of its entries
(`curvlab.fisher.sketch`), a step is

    d = (1/ρ) [g − Xᵀ (X W Xᵀ + ρI)⁻¹ X W g] = (F W + ρI)⁻¹ g.

The Gram matrix and the products with g cost what the selected entries do, and the combination of rows is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.errors import unknown_name
from curvlab.fisher.block import Batch, Block, BlockState, RowRelation
from curvlab.fisher.full import RowStructure
from curvlab.fisher.row_block import RowBlock
from curvlab.fisher.side import RowSide
from curvlab.fisher.sketch import Scaling, Sketch, SketchedLayer, SketchedStack
from curvlab.fisher.stack import FactoredStack
from curvlab.rows import Rows
from curvlab.rows.factored import KroneckerRows
from curvlab.rows.layer import LayerRows
from curvlab.rows.parameters import Layout
from curvlab.rows.side_by_side import combine
from curvlab.tools.looks import Look

Product = Literal["exact", "published"]


class SketchedBlock(RowBlock):
    """`F W` of one layer, for F exact or of truncated rows, and W a selection of entries; F itself where all are kept.

    Args:
        name: of the layer.
        layout: of its parameters.
        config: see `RowSide`.
        sketch: how products are sketched.
        product: how rows are combined in solves with damping.
    """

    cut: SketchedLayer

    def __init__(self, name: str, layout: Layout, config: RowSide, sketch: Sketch, product: Product) -> None:
        super().__init__(name, [layout], config, SketchedLayer(sketch, name))
        self.product = product

    def update(self, batch: Batch) -> None:
        """Add a batch; unless it adds up with those before it, entries are selected anew."""
        if batch.decay != 1:
            self.cut = replace(self.cut, number=self.cut.number + 1)
        super().update(batch)

    def elements(self, batch: Batch) -> int:
        """Return how many numbers the Gram matrix has, and the selected entries where they are formed."""
        (layer,), sketch = batch.layers, self.cut.sketch
        q = sketch.selected(layer)
        formed = 0 if sketch.is_large(layer) or q == layer.size else layer.count * q
        return super().elements(batch) + formed

    def _other_side(self, batch: Batch) -> str:  # noqa: ARG002
        return ""

    @property
    def _whole(self) -> FactoredStack:
        """The rows X."""
        root = self.root
        if isinstance(root, SketchedStack):
            return root.whole
        assert isinstance(root, FactoredStack)
        return root

    @property
    def _exact(self) -> bool:
        """Whether the rows X are the rows S of the state."""
        return self._whole.layers[0] is self.layers[0]

    def _approximated(self) -> KroneckerRows | None:
        """Return the rows whose combinations in solves with damping are approximated, if they are."""
        (layer,) = self._whole.layers
        approximate = self.product == "published" and self.cut.sketch.is_large(layer)
        return layer if approximate and isinstance(layer, KroneckerRows) else None

    def _combined(self, c: Float[Tensor, "1 R K"]) -> Float[Tensor, "K P_b"]:
        layer = self._approximated()
        return super()._combined(c) if layer is None else separate_product(layer, c[0].T)

    def prefers_per_sample_gradients(self, layers: tuple[LayerRows, ...], damping: float) -> bool:
        """Whether the rows are exact and all their entries kept, so that gradients need not be formed."""
        plain = self.root is self._whole and self._exact and self._approximated() is None
        return plain and super().prefers_per_sample_gradients(layers, damping)

    def lift(self, c: Float[Tensor, "K R"], layers: tuple[LayerRows, ...], damping: float) -> Float[Tensor, "K P_b"]:
        """Return `(F W + ρI)⁻¹Sᵀc`, which is `Xᵀ(X W Xᵀ + ρI)⁻¹c` if X are the rows S."""
        if not self._exact or (damping == 0 and self._approximated() is not None):
            return self.solve(combine(layers, c), damping)[0]
        return super().lift(c, layers, damping)

    def sandwich(  # noqa: D102
        self,
        left: tuple[LayerRows, ...],
        right: tuple[LayerRows, ...],
        damping: float,
        relation: RowRelation,
    ) -> Float[Tensor, "Q R"]:
        root = self.root
        if isinstance(root, FactoredStack) and self._exact:
            return super().sandwich(left, right, damping, relation)
        a, b = self.cut.rows(left), self.cut.rows(right)
        seen = root.seen_from(right[0]) if isinstance(root, SketchedStack) else b.against(root)
        return self.system.sandwich(a.against(self._whole), seen, damping, lambda: a.against(b), summed=True)

    def trace(self) -> float:  # noqa: D102
        return float(self.system.matrix.diagonal(dim1=-2, dim2=-1).sum())

    def state(self) -> BlockState:  # noqa: D102
        return {**super().state(), "selection": float(self.cut.number)}

    def restore(self, state: BlockState) -> None:  # noqa: D102
        number = state["selection"]
        assert isinstance(number, float)
        self.cut = replace(self.cut, number=int(number))
        super().restore(state)


def separate_product(layer: KroneckerRows, c: Float[Tensor, "K R"]) -> Float[Tensor, "K P_l"]:
    """Return `(Σ √|c_r| g_r) (Σ c_r a_r)ᵀ / Σ √|c_r|` in place of `Σ c_r g_r a_rᵀ`, at the cost of one row.

    It is exact for a single row, and where all rows have the same g, which is why it can be far off.
    Source: the code of Yang et al. 2022.
    """
    c = c.view(-1, *layer.shape)
    root = c.abs().sqrt()
    total = root.sum((1, 2))
    g = torch.einsum("kvn,vntqo->ktqo", root, layer.g)
    a = torch.einsum("kn,ntqi->ktqi", c.sum(1), layer.a) / torch.where(total > 0, total, 1)[:, None, None, None]
    return torch.einsum("ktqo,ktqi->kqoi", g, a).flatten(1)


class Sketched(
    RowStructure,
    key="sketched",
    summary="one block a layer, of low rank, solved by some of its entries",
    look=Look("#C00000", "H", "sketched"),
):
    """Blocks `F = XᵀX` of layers, solved on the side of their rows X with products of selected entries (SENG).

    Layers with no more entries than are selected are exact: they, and all layers with `sketch=None`, are the low rank structure
    itself, which is `BlockDiagonal(side="rows")`. For others every verb is that of `F W`, where the diagonal matrix W has n/q at
    q of n entries, drawn uniformly without replacement, and 0 elsewhere, so that it is I on average: `solve(v, ρ)` is
    `(F W + ρI)⁻¹v`, which keeps what lies outside the span of the rows, `matvec(v)` is `F W v`, and `solve(matvec(v) + ρ v, ρ)` is
    v. `F W` is not symmetric, but it has the eigenvalues of the symmetric `W^{1/2} F W^{1/2}`, which the sketch stands for.
    Responses are `J (F W + ρI)⁻¹ Jᵀ/count`.

    Entries are drawn anew whenever the state is replaced or fades, not when batches are added up (decay 1).

    Args:
        sketch: s; of a layer with more than s² entries, s² are selected; of a large layer, s of either side of its rows, which
            stay factored. None keeps all.
        threshold: entries above which a layer is large.
        scaling: "unbiased" scales selected entries by √(n/q). "published" scales them by n/q, as the authors' code does:
            `solve(v, ρ)` then is the unbiased one with ρ in the outer division by ρ, and ρq/n in the system of the rows.
        rank: keep so many singular values of the output gradients at the positions of a large layer, such as a convolution, in
            place of all positions; all positions if None.
        product: "published" combines the rows of large layers in solves with damping as the authors' code does,
            `(Σ √|b| g) (Σ b a)ᵀ / Σ √|b|` in place of `Σ b g aᵀ`, which depends on v in a way that is not linear.
        seed: of the selections.
        window: keep the rows of the last `window` batches, each `decay` times the weight of the next.
        rtol: rank tolerance of undamped solves, relative to λ_max; n·ε if None.

    Cost: `R²q + R³` once per update, and `R q` and a combination of rows per solve.
    Source: Yang, Xu, Wen, Chen & Xu 2022.
    """

    within_layers = True
    of_optimiser = True

    def __init__(
        self,
        *,
        sketch: int | None = 256,
        threshold: int = 1_000_000,
        scaling: Scaling = "unbiased",
        rank: int | None = None,
        product: Product = "exact",
        seed: int = 0,
        window: int | None = None,
        rtol: float | None = None,
    ) -> None:
        super().__init__(side="rows", window=window, rtol=rtol)
        self._sketch = Sketch(sketch, threshold, scaling, rank, seed)
        if product not in get_args(Product):
            raise unknown_name("product", product, get_args(Product))
        self._product: Product = product

    @property
    def options(self) -> Mapping[str, object]:
        """The configuration."""
        sketch, kept = self._sketch, self._config
        return {
            "sketch": sketch.size,
            "threshold": sketch.threshold,
            "scaling": sketch.scaling,
            "rank": sketch.rank,
            "product": self._product,
            "seed": sketch.seed,
            "window": kept.window,
            "rtol": kept.rtol,
        }

    def _make_blocks(self, rows: Rows) -> list[Block]:
        return [
            SketchedBlock(layer.name, layer.layout, self._config, self._sketch, self._product) for layer in rows.layers
        ]
