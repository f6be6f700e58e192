"""Blocks that are solved on the smaller of two sides: by their rows, or by their parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.errors import StateError, unknown_name
from curvlab.fisher.block import Batch, Block, Relation, RunningAverage, State, check_rtol
from curvlab.fisher.system import Eigen, System
from curvlab.rows.layer import LayerRows
from curvlab.rows.loss import OutputFactor
from curvlab.rows.parameters import Layout
from curvlab.rows.rows import gram
from curvlab.rows.side_by_side import combine, dense, gram64, moment, times

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


class RowBlock(Block):
    """`F_b = S_bᵀS_b`, exact, stored and solved on its smaller side.

    On the row side, with `K = S_b S_bᵀ`, the push-through identity `(F + ρI)⁻¹Sᵀ = Sᵀ(K + ρI)⁻¹` does everything.
    """

    def __init__(self, name: str, parts: Sequence[Layout], config: RowSide) -> None:
        super().__init__(name, parts)
        self.config = config
        self.average = RunningAverage()
        self.layers: tuple[LayerRows, ...] = ()
        self._system: System | None = None
        self._rows_held = 0

    @property
    def keeps_rows(self) -> bool:
        """Whether the block is stored on its row side."""
        return self.average.total is None

    def will_keep_rows(self, batch: Batch) -> bool:  # noqa: D102
        if batch.decay != 0 and not self.keeps_rows:
            return False
        rows = self._row_size(batch.layers) + (0 if batch.decay == 0 else self._rows_held)
        side, window, size = self.config.side, self.config.window, self._side_size()
        if side == "parameters" or (side == "auto" and window is None and size <= rows):
            return False
        if batch.fading and window is None:
            memory = size * self.size * batch.layers[0].factors[-1].element_size() / 2**30
            raise StateError(
                f"Block {self.name!r} keeps {rows} rows, which take decay 0 or 1, not {batch.decay}. Set window=k to "
                f"keep the last k batches, or side='parameters' for a matrix of {size} × {size} "
                f"({'' if size == self.size else f'{self.size // size} of them, '}{memory:.3g} GiB)."
            )
        return True

    def elements(self, batch: Batch) -> int:  # noqa: D102
        held = 0 if batch.decay == 0 else self._rows_held
        side = self._row_size(batch.layers) + held if self.will_keep_rows(batch) else self._side_size()
        return side**2 * (self.size // self._side_size())

    def update(self, batch: Batch) -> None:  # noqa: D102
        self._reset()
        keeps = self.will_keep_rows(batch)
        if batch.decay == 0:
            self.average, self._rows_held = RunningAverage(), 0
        if keeps:
            self._rows_held += self._row_size(batch.layers)
        else:
            batch.average(self.average, self._form(batch.layers))

    def set_rows(self, layers: tuple[LayerRows, ...]) -> None:  # noqa: D102
        self._reset()
        self.layers = layers

    def leave_rows(self, weight: float) -> None:  # noqa: D102
        self.average.update(self._form(self.layers), weight, 0.0)
        self.layers, self._rows_held = (), 0

    def _reset(self) -> None:
        """Forget what was computed from the state."""
        self._system = None

    def _row_size(self, layers: Sequence[LayerRows]) -> int:
        """Size of the matrix on the row side."""
        return layers[0].count

    def _side_size(self) -> int:
        """Size of the matrix on the parameter side."""
        return self.size

    def _form(self, layers: Sequence[LayerRows]) -> Tensor:
        """Form the matrix on the parameter side."""
        return moment(layers)

    @property
    def system(self) -> System:
        """The matrix that is solved: `K` on the row side, `F_b` on the parameter side."""
        if self._system is None:
            self._system = self._row_system() if self.keeps_rows else self._make_system(self.average.value)
        return self._system

    def _make_system(
        self, matrix: Tensor, in_float64: Callable[[], Tensor] | None = None, *, symmetric: bool = False
    ) -> System:
        return System(matrix, self._title, self.config.rtol, in_float64, symmetric=symmetric)

    @property
    def _title(self) -> str:
        """What messages call the system."""
        return f"block {self.name!r}"

    def _row_system(self) -> System:
        layers = self.layers
        return self._make_system(gram(layers, layers), partial(gram64, layers), symmetric=True)

    def systems(self) -> list[System]:  # noqa: D102
        return [self.system]

    def _times(self, x: Float[Tensor, "K P_b"]) -> Float[Tensor, "K R"]:
        return times(self.layers, x)

    def _combine(self, c: Float[Tensor, "K R"]) -> Float[Tensor, "K P_b"]:
        return combine(self.layers, c)

    def matvec(self, x: Float[Tensor, "K P_b"]) -> Float[Tensor, "K P_b"]:  # noqa: D102
        return self._combine(self._times(x)) if self.keeps_rows else x @ self.average.value

    def solve(self, x: Float[Tensor, "K P_b"], damping: float) -> tuple[Float[Tensor, "K P_b"], Float[Tensor, " K"]]:
        """Solve; on the row side with damping as `(x − Sᵀ(K + ρI)⁻¹Sx)/ρ`, which cancels in float32: see `lift`."""
        if not self.keeps_rows:
            solution = self.system.solve(x.T, damping).T
            return solution, x.new_zeros(len(x)) if damping else null_energy(self.system.eigen, x)
        seen = self._times(x)
        if damping > 0:
            return (x - self._combine(self.system.solve(seen.T, damping).T)) / damping, x.new_zeros(len(x))
        eigen = self.system.eigen
        once = eigen.coordinates(seen) * eigen.inverse(0.0)
        both = torch.cat([once, once * eigen.inverse(0.0)]) @ eigen.vectors.T
        projection, solution = self._combine(both.to(x)).split(len(x))
        return solution, (x - projection).square().sum(-1)

    def prefers_summands(self, layers: tuple[LayerRows, ...], damping: float) -> bool:  # noqa: ARG002, D102
        return self.keeps_rows and damping > 0

    def solve_sum(self, layers: tuple[LayerRows, ...], damping: float) -> dict[str, Tensor]:
        """Solve on the row side without forming x, if the rows share the inputs of the state's."""
        pairs = list(zip(self.layers, layers, strict=True))
        if not (self.keeps_rows and all(mine.shares_inputs(theirs) for mine, theirs in pairs)):
            return super().solve_sum(layers, damping)
        seen = torch.stack([mine.times_total(theirs) for mine, theirs in pairs]).sum(0)
        c = self.system.solve(seen[:, None], damping)[:, 0]
        found: dict[str, Tensor] = {}
        for mine, theirs in pairs:
            found.update(theirs.minus(mine, c).scale(1 / damping).total_by_parameter())
        return found

    def lift(self, c: Float[Tensor, "K R"], layers: tuple[LayerRows, ...], damping: float) -> Float[Tensor, "K P_b"]:
        """Return `(F + ρI)⁻¹Sᵀc`; on the row side `Sᵀ(K + ρI)⁻¹c`, accurate at any damping."""
        if self.keeps_rows:
            return self._combine(self.system.solve(c.T, damping).T)
        return self.solve(combine(layers, c), damping)[0]

    def sandwich(  # noqa: D102
        self,
        left: tuple[LayerRows, ...],
        right: tuple[LayerRows, ...],
        damping: float,
        relation: Relation,
    ) -> Float[Tensor, "Q R"]:
        if not self.keeps_rows:
            return times(left, self.solve(dense(right), damping)[0]).T
        same = all(x is y for x, y in zip(left, right, strict=True))
        if relation.coefficients is not None:
            solved = self.system.solve(gram(left, self.layers).T, damping)
            return relation.coefficients.columns(solved.T)
        if (factor := relation.behind(damping)) is not None:
            products = gram(left, right)
            own = products if same else gram(right, right)
            system, left_seen, right_seen = self._behind(factor, products, own)
            return system.sandwich(left_seen, right_seen, damping, lambda: products)
        seen = gram(left, self.layers)
        others = seen if same else gram(right, self.layers)
        return self.system.sandwich(seen, others, damping, lambda: gram(left, right))

    def _behind(
        self,
        factor: OutputFactor,
        products: Float[Tensor, "*B Q R"],
        own: Float[Tensor, "*B R R"],
        part: slice = slice(None),
    ) -> tuple[System, Float[Tensor, "*B Q W"], Float[Tensor, "*B R W"]]:
        """Return `SSᵀ`, `J'Sᵀ` and `JSᵀ`, given A, `J'Jᵀ` and `JJᵀ`; it forgets what it decomposes.

        S is A·J without the rows that A has to spare, which changes `SᵀS` in nothing.

        Args:
            factor: A.
            products: `J'Jᵀ`.
            own: `JJᵀ`.
            part: which of a stack these are.
        """

        def precise() -> Tensor:
            exact = factor.to(torch.float64)
            return exact.compressed(exact.compressed(self._row_system().precise()[part]).mT)

        seen = factor.reduced(own).mT.contiguous()
        system = self._make_system(factor.reduced(seen), precise, symmetric=True)
        return system, seen if products is own else factor.reduced(products.mT).mT, seen

    def to_dense(self) -> Float[Tensor, "P_b P_b"]:  # noqa: D102
        return self._form(self.layers) if self.keeps_rows else self.average.value

    def eigenvalues(self) -> Float[Tensor, " k"]:
        """Return the `min(R, P_b)` eigenvalues that need not be zero."""
        eigen = self.system.eigen
        return torch.where(eigen.null, 0, eigen.values)[-min(self.size, len(eigen.values)) :]

    def largest_eigenvalue(self) -> float:  # noqa: D102
        return self.system.largest()

    def trace(self) -> float:  # noqa: D102
        if self.keeps_rows:
            return float(sum(layer.diagonal().sum() for layer in self.layers))
        return float(self.average.value.trace())

    def state(self) -> State:  # noqa: D102
        return {**self.average.state(), "rows_held": float(self._rows_held)}

    def restore(self, state: State) -> None:  # noqa: D102
        held = state["rows_held"]
        assert isinstance(held, float)
        self.average.restore(state)
        self._rows_held = int(held)
        self._reset()


def null_energy(eigen: Eigen, x: Float[Tensor, "K n"]) -> Float[Tensor, " K"]:
    """Return the squared norm of x in null directions."""
    return (eigen.coordinates(x).square() * eigen.null).sum(-1).to(x)
