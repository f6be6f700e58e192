"""K-FAC: `F_l ≈ B ⊗ A` for every layer whose rows are sums of `g ⊗ a`.

    B = Σ_{v,n,t} g gᵀ,   A = Σ_n ω_n (1/T) Σ_t a aᵀ / Σ_n ω_n

with g carrying Λ^{1/2}/√count and ω_n the sample's loss weight. For weights shared over positions t this is K-FAC
*expand*; *reduce* sums g and averages a over t first. Over batches, A averages by Σω and B by the terms of the loss. An
embedding has one-hot inputs, so its A is diagonal. An embedding that is the weight of a Linear, too, has one block for both
uses, see `curvlab.fisher.factors.TiedBlock`. Normalisations and bare parameters keep exact blocks.

In a graph, the positions are its nodes, labelled or not. *gradient* adds the rows of a sample before B is formed, so that
g is the gradient of the total loss at a position, and sums A over all positions:

    B = Σ_{n,t} (Σ_v g)(Σ_v g)ᵀ,   A = Σ_n Σ_t a aᵀ / Σ_n ω_n

With `empirical` rows, inputs that `curvlab.nn.Propagation` has aggregated and `factored_damping="equal"` this is the
preconditioner of Izadi et al. 2020 for L labelled nodes, ω their number: unlabelled nodes enter A with unit weight.
`curvlab.optim` then collects one row a sample, its whole gradient; where loss terms have weights, only that is g.

Source: Martens & Grosse 2015; Grosse & Martens 2016 (convolutions); Eschenhagen et al. 2023 (expand and reduce);
Izadi et al. 2020 (graphs).
"""

from __future__ import annotations

from typing import Literal

from curvlab.fisher.factors import EmbeddingBlock, LinearBlock, TiedBlock
from curvlab.fisher.kronecker import KFACBlock, KroneckerOptions, Sharing
from curvlab.fisher.kronecker_structure import KroneckerStructure
from curvlab.tools.looks import Look


class _LinearKFAC(LinearBlock, KFACBlock):
    """K-FAC of Linear and convolutions."""


class _EmbeddingKFAC(EmbeddingBlock, KFACBlock):
    """K-FAC of an embedding."""


class _TiedKFAC(TiedBlock, KFACBlock):
    """K-FAC of a table that is looked up and multiplied with."""


class KFAC(
    KroneckerStructure, key="kfac", summary="B ⊗ A, one Kronecker product a layer", look=Look("#E69F00", "P", "K-FAC")
):
    """Kronecker-factored blocks.

    Args:
        sharing: "expand", "reduce" or "gradient", for weights that are shared over positions.
        factored_damping: put `√ρ·π` on A and `√ρ/π` on B, `π² = (tr A/dim A)/(tr B/dim B)` (Martens & Grosse 2015,
            section 6.3), instead of ρ on the product; "equal" puts √ρ on both.
        max_block: layers without Kronecker factors keep an exact block up to this size, a diagonal one above it.
        rtol: rank tolerance of the factors in undamped solves, relative to their λ_max.
        max_factor: largest side of a factor that is a matrix. A longer one, such as that of outputs to a vocabulary, is diagonal;
            the repr names its layer.
        invert_every: with factored damping, updates after which the inverses of a layer's factors, and the factorisation of an
            exact block, are made anew; solves in between use the old ones if the damping is the same. Layers take turns.
        output_groups: cut the outputs of linear layers into so many equal groups, as the packed queries, keys and values of
            attention into 3 or into `3·heads`: B is block-diagonal, A is one. Choose such layers by `PerLayer`.
    """

    linear: type[LinearBlock] = _LinearKFAC
    embedding: type[EmbeddingBlock] = _EmbeddingKFAC
    tied: type[TiedBlock] = _TiedKFAC

    def __init__(
        self,
        *,
        sharing: Sharing = "expand",
        factored_damping: bool | Literal["equal"] = False,
        max_block: int = 1024,
        max_factor: int = 8192,
        rtol: float | None = None,
        invert_every: int = 1,
        output_groups: int = 1,
    ) -> None:
        super().__init__(
            KroneckerOptions(sharing, factored_damping, max_block, max_factor, rtol, invert_every, output_groups)
        )
        self.joins_positions = sharing == "gradient"
