"""Natural gradients by every structure, for models that are trained by several processes."""

from collections.abc import Callable
from typing import Any

from torch import nn

from curvlab.fisher import (
    EKFAC,
    KFAC,
    BlockDiagonal,
    ComponentWise,
    Diagonal,
    Full,
    PartialTraces,
    PerLayer,
    RankOne,
    Structure,
    UnitWise,
)
from curvlab.optim import NaturalGradient

OF_LAYERS: dict[str, tuple[Callable[[], Structure], dict[str, Any]]] = {
    "kfac": (lambda: KFAC(factored_damping=True, invert_every=2), {"kind": "mc"}),
    "kfac-exact": (KFAC, {"kind": "exact"}),
    "kfac-long": (lambda: KFAC(max_factor=7, factored_damping=True), {"kind": "mc"}),
    "kfac-batch": (KFAC, {"kind": "empirical", "rows": "batch"}),
    "ekfac": (EKFAC, {"kind": "mc"}),
    "diagonal": (Diagonal, {"kind": "empirical"}),
    "diagonal-signs": (Diagonal, {"kind": "empirical", "rows": "signs", "draws": 2}),
    "component-wise": (ComponentWise, {"kind": "empirical"}),
    "partial-traces": (lambda: PartialTraces(factored_damping=True), {"kind": "empirical"}),
    "rank-one-batch": (RankOne, {"kind": "empirical", "rows": "batch"}),
    "block-diagonal": (BlockDiagonal, {"kind": "mc"}),
    "unit-wise": (UnitWise, {"kind": "mc"}),
    "per-layer": (lambda: PerLayer({"*3": EKFAC(), "*0": Diagonal(), "*": KFAC()}), {"kind": "mc"}),
}
"""Structures that do not couple layers, and the rows that they are made of."""
STRUCTURES = {
    **OF_LAYERS,
    "full": (Full, {"kind": "exact"}),
    "full-batch": (Full, {"kind": "empirical", "rows": "batch"}),
}


def natural(model: nn.Module, name: str, loss: nn.Module | None = None, **options: Any) -> NaturalGradient:
    structure, rows = STRUCTURES[name]
    loss = loss or nn.CrossEntropyLoss()
    return NaturalGradient(
        model, loss, 0.2, structure=structure(), damping=0.1, refresh_every=2, **{"kl_clip": None} | rows | options
    )
