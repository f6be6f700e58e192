"""What is computed, and by which methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.structures.kronecker import MethodName, Methods, ekfac, kfac
from benchmarks.structures.response import BLOCK_DIAGONAL, UNIT_WISE

QuantityName = Literal["kfac", "kfac-mc", "ekfac", "ekfac-mc", "block-diagonal", "unit-wise"]


@dataclass(frozen=True)
class Quantity:
    """What is computed.

    Attributes:
        title: in words, for headings.
        methods: the ways to compute it.
        samples: share of a task's samples.
        drawn: whether it depends on draws, which differ between methods.
    """

    title: str
    methods: Methods
    samples: float = 1.0
    drawn: bool = False


QUANTITIES: dict[QuantityName, Quantity] = {
    "kfac": Quantity("K-FAC, exact rows, fit and solve", kfac("exact")),
    "kfac-mc": Quantity("K-FAC, one draw a sample, fit and solve", kfac("mc"), drawn=True),
    "ekfac": Quantity("EKFAC, exact rows, fit and solve", ekfac("exact")),
    "ekfac-mc": Quantity("EKFAC, one draw a sample, fit and solve", ekfac("mc"), drawn=True),
    "block-diagonal": Quantity("Block-diagonal response", BLOCK_DIAGONAL, 0.25),
    "unit-wise": Quantity("Unit-wise response", UNIT_WISE, 0.25),
}

TITLES: dict[MethodName, str] = {
    "curvlab": "curvlab",
    "curvlinops": "curvlinops",
    "nngeometry": "nngeometry",
    "torch-func": "torch.func vmap(jacrev)",
    "nngeometry-blocks": "nngeometry PMatBlockDiag",
}
