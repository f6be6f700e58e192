"""Blocks of exact rows, stored on the smaller of two sides: their rows, or their parameters."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from jaxtyping import Int
from torch import Tensor

from curvlab.errors import StateError, unknown_name
from curvlab.fisher.block import Batch, Block, BlockState, RunningAverage, Total, check_rtol
from curvlab.rows.layer import LayerRows
from curvlab.rows.parameters import Layout

Side = Literal["auto", "rows", "parameters"]


@dataclass(frozen=True)
class RowSide:
    """How a block of exact rows is stored.

    Attributes:
        side: "rows" keeps the factored rows and solves with `[R, R]`; "parameters" keeps `[P_b, P_b]`; "auto" takes the
            smaller.
        window: number of batches that rows are kept of, each `decay` times the weight of the next.
        rtol: eigenvalues up to `rtol·λ_max` count as zero where there is no damping; n·ε if None.
    """

    side: Side = "auto"
    window: int | None = None
    rtol: float | None = None

    def __post_init__(self) -> None:
        if self.side not in get_args(Side):
            raise unknown_name("side", self.side, get_args(Side))
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is a number of batches ≥ 1, got {self.window}.")
        if self.window is not None and self.side == "parameters":
            raise ValueError("window keeps rows; it cannot be combined with side='parameters'.")
        check_rtol(self.rtol)


class SidedBlock(Block):
    """A block whose state is its rows, or a running average of matrices on the parameter side.

    Args:
        name: names of the layers, for messages.
        parts: see `Block`.
        config: see `RowSide`.
        index: see `Block`.
    """

    def __init__(
        self, name: str, parts: Sequence[Layout], config: RowSide, index: Int[Tensor, " P_b"] | None = None
    ) -> None:
        super().__init__(name, parts, index)
        self.config = config
        self.average = RunningAverage()
        self.layers: tuple[LayerRows, ...] = ()
        self._rows_held = 0

    @property
    def width(self) -> int:
        """Size of such a matrix on the parameter side."""
        return self.size // self.count

    @abstractmethod
    def _row_size(self, layers: Sequence[LayerRows]) -> int:
        """Size of such a matrix on the row side."""

    @abstractmethod
    def _form(self, layers: Sequence[LayerRows]) -> Tensor:
        """Form the parameter side."""

    @abstractmethod
    def _reset(self) -> None:
        """Forget what was computed from the state."""

    @property
    def keeps_rows(self) -> bool:
        """Whether the block is stored on its row side."""
        return self.average.total is None

    def will_keep_rows(self, batch: Batch) -> bool:  # noqa: D102
        if batch.decay != 0 and not self.keeps_rows:
            return False
        rows = self._row_size(batch.layers) + (0 if batch.decay == 0 else self._rows_held)
        side, window, width = self.config.side, self.config.window, self.width
        if side == "parameters" or (side == "auto" and window is None and width <= rows):
            return False
        if batch.fading and window is None:
            raise StateError(
                f"Block {self.name!r} keeps {rows} rows, which take decay 0 or 1, not {batch.decay}. Set window=k to "
                f"keep the last k batches{self._other_side(batch)}."
            )
        return True

    def _other_side(self, batch: Batch) -> str:
        """Return the end of a message: what the parameter side would take."""
        memory = self.width * self.size * batch.layers[0].row_factors[-1].element_size() / 2**30
        return (
            f", or side='parameters' for a matrix of {self.width} × {self.width} "
            f"({'' if self.count == 1 else f'{self.count} of them, '}{memory:.3g} GiB)"
        )

    def elements(self, batch: Batch) -> int:  # noqa: D102
        held = 0 if batch.decay == 0 else self._rows_held
        side = self._row_size(batch.layers) + held if self.will_keep_rows(batch) else self.width
        return side**2 * self.count

    def update(self, batch: Batch) -> None:  # noqa: D102
        self._reset()
        keeps = self.will_keep_rows(batch)
        if batch.decay == 0:
            self.average, self._rows_held = RunningAverage(), 0
        if keeps:
            self._rows_held += self._row_size(batch.layers)
        else:
            self.layers = ()
            batch.average(self.average, self._form(batch.layers))

    def add_up(self, total: Total) -> None:  # noqa: D102
        self._reset()
        self.average.add_up(total)

    def set_rows(self, layers: tuple[LayerRows, ...]) -> None:  # noqa: D102
        self._reset()
        self.layers = layers

    def leave_rows(self, weight: float) -> None:  # noqa: D102
        self.average.update(weight * self._form(self.layers), weight, 0.0)
        self.layers, self._rows_held = (), 0

    def state(self) -> BlockState:  # noqa: D102
        return {**self.average.state(), "rows_held": float(self._rows_held)}

    def restore(self, state: BlockState) -> None:  # noqa: D102
        held = state["rows_held"]
        assert isinstance(held, float)
        self.average.restore(state)
        self._rows_held = int(held)
        self._reset()
