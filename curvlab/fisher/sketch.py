"""Some of a layer's entries, by which products with its rows are estimated.

A selection Ω keeps q of n entries, drawn uniformly without replacement and scaled, so that for rows X the Gram matrix is
`(ΩXᵀ)ᵀΩXᵀ = X W Xᵀ` and the product with a vector `(ΩXᵀ)ᵀΩx = X W x`, with the diagonal matrix `W = ΩᵀΩ`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args
from zlib import crc32

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curvlab.errors import unknown_name
from curvlab.fisher.stack import FactoredStack, Stack, WholeLayers
from curvlab.rows.factored import KroneckerRows
from curvlab.rows.layer import LayerRows

Scaling = Literal["unbiased", "published"]


@dataclass(frozen=True)
class Sketch:
    """How the products of a layer's rows are sketched.

    Attributes:
        size: entries of either factor that are selected, its square of a layer that is not large; all if None.
        threshold: entries above which a layer is large, so that the selected rows stay factored.
        scaling: of the selected entries: "unbiased" for √(n/q), so that W is I on average; "published" for n/q.
        rank: largest number of singular values of the output gradients of a large layer that are kept; all if None.
        seed: of the selections.
    """

    size: int | None = 256
    threshold: int = 1_000_000
    scaling: Scaling = "unbiased"
    rank: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (("sketch", self.size, 1), ("threshold", self.threshold, 0), ("rank", self.rank, 1)):
            if value is not None and value < least:
                raise ValueError(f"{name} is a whole number ≥ {least}, got {value}.")
        if self.scaling not in get_args(Scaling):
            raise unknown_name("scaling", self.scaling, get_args(Scaling))

    def generator(self, layer: str, number: int) -> torch.Generator:
        """Return the source of a layer's selection of some number, the same in every run."""
        return torch.Generator().manual_seed(crc32(f"{self.seed}/{number}/{layer}".encode()))

    def is_large(self, layer: LayerRows) -> bool:
        """Whether the rows of a layer, and of its selected entries, stay factored."""
        return layer.size > self.threshold

    def rows(self, layer: LayerRows) -> LayerRows:
        """Return the rows, approximated by some with fewer positions where they are to be."""
        if self.rank is None or not (self.is_large(layer) and isinstance(layer, KroneckerRows)):
            return layer
        return layer.truncated(self.rank) if layer.positions > self.rank else layer

    def selected(self, layer: LayerRows) -> int:
        """Return how many entries of a layer are selected."""
        if self.size is None:
            return layer.size
        if not self.is_large(layer):
            return min(layer.size, self.size**2)
        per_group = layer.layout.units // layer.groups
        return layer.groups * min(per_group, self.size) * min(layer.layout.width, self.size)

    def select(self, layer: LayerRows, generator: torch.Generator) -> Selection | None:
        """Select some of a layer's entries; None if all of them are to be kept."""
        n, q = layer.size, self.selected(layer)
        if self.size is None or q == n:
            return None
        weight = (n / q) ** (1 if self.scaling == "unbiased" else 2)
        device = layer.row_factors[-1].device
        if not self.is_large(layer):
            return Selection(weight, _choice(n, q, generator).to(device))
        per_group, width = layer.layout.units // layer.groups, layer.layout.width
        units = _choice(per_group, self.size, generator).to(device)
        columns = _choice(width, self.size, generator).to(device)
        places = torch.arange(n, device=device).view(layer.groups, per_group, width)
        return Selection(weight, places[:, units][:, :, columns].flatten(), (units, columns))


def _choice(total: int, some: int, generator: torch.Generator) -> Int[Tensor, " q"]:
    """Draw some of the numbers below a total, in ascending order."""
    return torch.randperm(total, generator=generator, device="cpu")[:some].sort().values


@dataclass(frozen=True, eq=False)
class Selection:
    """Some of a layer's entries.

    Attributes:
        weight: what W has at each of them.
        index: their places in the layer's block vector.
        factors: the units of every group and the columns at whose crossings they lie, where rows stay factored.
    """

    weight: float
    index: Int[Tensor, " q"]
    factors: tuple[Int[Tensor, " u"], Int[Tensor, " w"]] | None = None

    def of(self, layer: LayerRows) -> FactoredStack:
        """Return rows of the layer there, not scaled."""
        return FactoredStack([layer.entries(self.index) if self.factors is None else layer.at(*self.factors)])

    def diagonal(self, layer: LayerRows) -> Float[Tensor, " P_l"]:
        """Return the diagonal of W."""
        return layer.row_factors[-1].new_zeros(layer.size).index_fill_(0, self.index, self.weight)


@dataclass(frozen=True, eq=False)
class SketchedStack(Stack):
    """Rows X of one layer whose products are those of some of their entries; combinations are exact.

    Attributes:
        whole: the rows.
        selection: which entries.
        seen: the rows there.
    """

    whole: FactoredStack
    selection: Selection
    seen: FactoredStack

    symmetric = True

    def gram(self) -> Float[Tensor, "1 R R"]:
        """Return `X W Xᵀ`."""
        return self.seen.gram().mul_(self.selection.weight)

    def times(self, x: Float[Tensor, "K P_b"]) -> Float[Tensor, "1 R K"]:
        """Return `X W x`."""
        return self.selection.weight * self.seen.times(x[:, self.selection.index])

    def combine(self, c: Float[Tensor, "1 R K"]) -> Float[Tensor, "K P_b"]:  # noqa: D102
        return self.whole.combine(c)

    def seen_from(self, layer: LayerRows) -> Float[Tensor, "1 Q R"]:
        """Return `Y W Xᵀ` with other rows Y of the layer."""
        return self.selection.of(layer).against(self.seen).mul_(self.selection.weight)


@dataclass(frozen=True, eq=False)
class SketchedLayer(WholeLayers):
    """One block of a whole layer, with sketched products.

    Attributes:
        sketch: how.
        name: of the layer, on which the selection depends.
        number: of the selection.
    """

    sketch: Sketch
    name: str
    number: int = 0

    def root(self, layers: Sequence[LayerRows]) -> FactoredStack | SketchedStack:
        """Return the rows, with the products of some of their entries where not all are selected."""
        layer = self.sketch.rows(layers[0])
        selection = self.sketch.select(layer, self.sketch.generator(self.name, self.number))
        whole = FactoredStack([layer])
        return whole if selection is None else SketchedStack(whole, selection, selection.of(layer))

    def moment(self, layers: Sequence[LayerRows]) -> Float[Tensor, "1 P_b P_b"]:
        """Form `XᵀX W`."""
        root = self.root(layers)
        if isinstance(root, FactoredStack):
            return super().moment(root.layers)
        return super().moment(root.whole.layers) * root.selection.diagonal(root.whole.layers[0])

    def precise_gram(self, layers: Sequence[LayerRows]) -> Float[Tensor, "1 R R"]:  # noqa: D102
        return self.root([layer.to(torch.float64) for layer in layers]).gram()
