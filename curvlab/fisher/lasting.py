"""Exact blocks beside Kronecker factors, whose factorisation lasts as long as the factors' inverses do."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from curvlab.fisher.block import Batch, BlockState
from curvlab.fisher.row_block import RowBlock
from curvlab.fisher.side import RowSide
from curvlab.fisher.system import System, prepare
from curvlab.rows.parameters import Layout


class LastingBlock(RowBlock):
    """An exact block on the parameter side; damped solves with one damping keep a factorisation for some updates.

    Args:
        name: of the layer.
        layout: of its parameters.
        rtol: rank tolerance of undamped solves.
        lasts: updates after which the factorisation is made anew.
    """

    def __init__(self, name: str, layout: Layout, rtol: float | None, lasts: int) -> None:
        super().__init__(name, [layout], RowSide("parameters", rtol=rtol))
        self.lasts = lasts
        self._lasting: System | None = None
        self._age = 0

    def stagger(self, turn: int, turns: int) -> None:
        """Let the factorisation age ahead of other blocks', so that not all are made anew at once."""
        self._age = turn * self.lasts // turns

    def update(self, batch: Batch) -> None:  # noqa: D102
        super().update(batch)
        self._age += not batch.further
        if self._age >= self.lasts:
            self._lasting, self._age = None, 0

    def systems(self) -> list[System]:  # noqa: D102
        return super().systems() if self._lasting is None else []

    def solve(self, x: Float[Tensor, "K P_b"], damping: float) -> tuple[Float[Tensor, "K P_b"], Float[Tensor, " K"]]:  # noqa: D102
        if damping == 0:
            return super().solve(x, damping)
        if self._lasting is None or self._lasting.damping != damping:
            self._lasting = self.system
        return self._lasting.solve(x.mT[None], damping)[0].mT, x.new_zeros(len(x))

    def state(self) -> BlockState:  # noqa: D102
        lasting = self._lasting
        return {
            **super().state(),
            "lasting.matrix": None if lasting is None else lasting.matrix,
            "lasting.damping": None if lasting is None else lasting.damping,
            "age": float(self._age),
        }

    def restore(self, state: BlockState) -> None:  # noqa: D102
        super().restore(state)
        matrix, damping, age = state["lasting.matrix"], state["lasting.damping"], state["age"]
        assert isinstance(age, float)
        self._age, self._lasting = int(age), None
        if isinstance(matrix, Tensor) and isinstance(damping, float):
            self._lasting = System(matrix, self.cut.title(self.name), self.config.rtol, symmetric=True)
            prepare([self._lasting], damping)
