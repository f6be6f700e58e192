"""Blocks: the parts of a structure that do not couple.

A block covers some of the columns of some layers (its *parts*). Its vectors are `[K, P_b]`, the block vectors of its
parts side by side. A structure is a list of blocks; the verbs of `Structure` are sums and concatenations over them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.errors import StateError, unknown_name
from curvlab.fisher.system import Eigen, System
from curvlab.rows.layer import LayerRows
from curvlab.rows.loss import OutputFactor
from curvlab.rows.parameters import Layout, Parameters
from curvlab.rows.products import chunks
from curvlab.rows.rows import Rows, gram

State = dict[str, Tensor | float | None]
"""What a block keeps, besides rows; plain tensors and numbers."""


Total = Callable[[Tensor], Tensor]
"""Sums a tensor over the processes that share a batch."""


@dataclass(frozen=True)
class Batch:
    """One update: the block's share of the rows of a batch, and how it merges.

    Attributes:
        layers: rows of the block's parts.
        terms: the batch's weight if the loss is a mean.
        decay: weight of the state so far.
        additive: whether the loss is a sum, so that matrices of batches add.
        sample_weights: ω_n.
        total: sums over processes, each of which holds some samples of the batch; None if this one holds all.
    """

    layers: tuple[LayerRows, ...]
    terms: float
    decay: float
    additive: bool
    sample_weights: Float[Tensor, " N"]
    total: Total | None = None

    def average(self, average: RunningAverage, value: Tensor) -> None:
        """Add the batch's matrix, of which this process has its samples' share, to a running average."""
        weight = self.weight
        if self.total is not None:
            value = self.total(weight * value)
            weight = 1.0 if self.additive else float(self.total(value.new_tensor(weight)))
            value = value / weight
        average.update(value, weight, self.decay, additive=self.additive)

    @property
    def weight(self) -> float:
        """The batch's weight in a running average."""
        return 1.0 if self.additive else self.terms

    @property
    def fading(self) -> bool:
        """Whether the state so far is neither dropped nor kept as it is."""
        return self.decay not in (0.0, 1.0)


class RunningAverage:
    """Σ_b w_b x_b / Σ_b w_b over batches, each update multiplying both sums by a decay first.

    For sums of losses (`additive`) a decay of 1 adds; any other averages over what has been added up so far.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.weight = 0.0

    def update(self, value: Tensor, weight: float, decay: float, *, additive: bool = False) -> None:
        """Decay the state and add a batch."""
        if self.total is None or decay == 0:
            self.total, self.weight = weight * value, weight
            return
        self.total = decay * self.total + weight * value
        if not (additive and decay == 1):
            self.weight = decay * self.weight + weight

    @property
    def value(self) -> Tensor:
        """The average, 0 while no batch had any weight."""
        assert self.total is not None
        return self.total / (self.weight or 1.0)

    def state(self) -> State:
        """Return what `restore` needs."""
        return {"total": self.total, "weight": self.weight}

    def restore(self, state: State) -> None:
        """Bring a saved state back."""
        total, weight = state["total"], state["weight"]
        assert not isinstance(total, float)
        assert isinstance(weight, float)
        self.total, self.weight = total, weight


class Block(ABC):
    """A symmetric matrix over some parameters.

    Args:
        name: names of the layers, for messages.
        parts: which columns of which layers the block covers.
    """

    def __init__(self, name: str, parts: Sequence[Layout]) -> None:
        self.name = name
        self.parts = tuple(parts)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.size} parameters)"

    @property
    def size(self) -> int:
        """Number of parameters `P_b`."""
        return sum(part.size for part in self.parts)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return tuple(name for part in self.parts for name in part.names)

    def join(self, named: Parameters) -> Float[Tensor, "K P_b"]:
        """Assemble the block's vectors."""
        return torch.cat([part.join(named) for part in self.parts], dim=-1)

    def split(self, vectors: Float[Tensor, "K P_b"]) -> dict[str, Tensor]:
        """Cut the block's vectors into parameters."""
        named: dict[str, Tensor] = {}
        for part, piece in zip(self.parts, vectors.split([part.size for part in self.parts], dim=-1), strict=True):
            named.update(part.split(piece))
        return named

    def of(self, rows: Rows) -> tuple[LayerRows, ...]:
        """Pick the block's share of the rows of a model."""
        owner = {slot.name: layer for layer in rows.layers for slot in layer.layout.slots}
        picked = [(owner[part.slots[0].name], part) for part in self.parts]
        return tuple(layer if layer.layout == part else layer.restrict(part.names) for layer, part in picked)

    @property
    def keeps_rows(self) -> bool:
        """Whether the state of the block is the rows themselves, handed over by `set_rows`."""
        return False

    def set_rows(self, layers: tuple[LayerRows, ...]) -> None:  # noqa: B027
        """Take the merged rows of all batches in the state; called before a verb if `keeps_rows`."""

    def will_keep_rows(self, batch: Batch) -> bool:  # noqa: ARG002
        """Return whether the block will keep rows after an update with this batch.

        Raises:
            StateError: if rows cannot take the batch's decay.
        """
        return False

    def elements(self, batch: Batch) -> int:  # noqa: ARG002
        """Return how many numbers the matrices of the block will hold after an update with this batch."""
        return self.size

    def leave_rows(self, weight: float) -> None:  # noqa: B027
        """Form the matrix of the rows that were set, whose weight in the running average is given."""

    def systems(self) -> list[System]:
        """Return the matrices that a solve factorises, so that those of equal size go in one batched call."""
        return []

    @abstractmethod
    def update(self, batch: Batch) -> None:
        """Add a batch to the state."""

    @abstractmethod
    def matvec(self, x: Float[Tensor, "K P_b"]) -> Float[Tensor, "K P_b"]:
        """Multiply."""

    @abstractmethod
    def solve(self, x: Float[Tensor, "K P_b"], damping: float) -> tuple[Float[Tensor, "K P_b"], Float[Tensor, " K"]]:
        """Return `(F + ρI)⁻¹x`, or `F⁺x` for ρ = 0, and the squared norm of x outside range(F) if ρ = 0, else 0."""

    @abstractmethod
    def lift(self, c: Float[Tensor, "K R"], layers: tuple[LayerRows, ...], damping: float) -> Float[Tensor, "K P_b"]:
        """Return `(F + ρI)⁻¹Sᵀc` for rows of the last batch, or for all rows of the state if `keeps_rows`."""

    def prefers_summands(self, layers: tuple[LayerRows, ...], damping: float) -> bool:  # noqa: ARG002
        """Whether `solve_sum` takes fewer operations than `solve`.

        Args:
            layers: rows of the state's last batch; summands have their shape, with one row a sample.
            damping: ρ.
        """
        return False

    def solve_sum(self, layers: tuple[LayerRows, ...], damping: float) -> Float[Tensor, "1 P_b"]:
        """Return `(F + ρI)⁻¹x` for x the sum of rows."""
        return self.solve(torch.cat([layer.total() for layer in layers])[None], damping)[0]

    @abstractmethod
    def sandwich(
        self,
        left: tuple[LayerRows, ...],
        right: tuple[LayerRows, ...],
        damping: float,
        coefficients: OutputFactor | None,
    ) -> Float[Tensor, "Q R"]:
        """Return `left (F + ρI)⁻¹ rightᵀ`; `coefficients` says that `right = C·S` for the rows S that `lift` takes."""

    @abstractmethod
    def to_dense(self) -> Float[Tensor, "P_b P_b"]:
        """Form the matrix."""

    @abstractmethod
    def eigenvalues(self) -> Float[Tensor, " k"]:
        """Return the eigenvalues that need not be zero, null ones exactly 0; the other `P_b − k` are zero, too."""

    def largest_eigenvalue(self) -> float:
        """Return λ_max."""
        return float(self.eigenvalues().max())

    def condition_number(self) -> float:
        """Return the largest over the smallest modulus of the eigenvalues that do not count as null; 1 if all do."""
        kept = self.eigenvalues().abs()
        kept = kept[kept > 0]
        return float(kept.max() / kept.min()) if len(kept) else 1.0

    @abstractmethod
    def trace(self) -> float:
        """Return the trace."""

    @abstractmethod
    def state(self) -> State:
        """Return what `restore` needs, besides rows."""

    @abstractmethod
    def restore(self, state: State) -> None:
        """Bring a saved state back."""


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


def check_rtol(rtol: float | None) -> None:
    """Raise `ValueError` for a rank tolerance outside [0, 1)."""
    if rtol is not None and not 0 <= rtol < 1:
        raise ValueError(f"rtol is a number in [0, 1), got {rtol}.")


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

    def _make_system(self, matrix: Tensor, in_float64: Callable[[], Tensor] | None = None) -> System:
        return System(matrix, f"block {self.name!r}", self.config.rtol, in_float64)

    def _row_system(self) -> System:
        layers = self.layers
        return self._make_system(gram(layers, layers), lambda: gram64(layers))

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

    def solve_sum(self, layers: tuple[LayerRows, ...], damping: float) -> Float[Tensor, "1 P_b"]:
        """Solve on the row side without forming x, if the rows share the inputs of the state's."""
        pairs = list(zip(self.layers, layers, strict=True))
        if not (self.keeps_rows and all(mine.shares_inputs(theirs) for mine, theirs in pairs)):
            return super().solve_sum(layers, damping)
        seen = torch.stack([mine.times_total(theirs) for mine, theirs in pairs]).sum(0)
        c = self.system.solve(seen[:, None], damping)[:, 0]
        return torch.cat([theirs.minus(mine, c).scale(1 / damping).total() for mine, theirs in pairs])[None]

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
        coefficients: OutputFactor | None,
    ) -> Float[Tensor, "Q R"]:
        if not self.keeps_rows:
            return times(left, self.solve(dense(right), damping)[0]).T
        seen = gram(left, self.layers)
        if coefficients is not None:
            V, N = self.layers[0].shape
            return coefficients.apply(self.system.solve(seen.T, damping).view(V, N, -1)).flatten(0, 1).T
        same = all(x is y for x, y in zip(left, right, strict=True))
        others = seen if same else gram(right, self.layers)
        return self.system.sandwich(seen, others, damping, lambda: gram(left, right))

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


def times(layers: Sequence[LayerRows], x: Float[Tensor, "K P_b"]) -> Float[Tensor, "K R"]:
    """Multiply rows with a block's vectors."""
    pieces = x.split([layer.size for layer in layers], dim=-1)
    products = [layer.matvec(piece) for layer, piece in zip(layers, pieces, strict=True)]
    return torch.stack(products).sum(0)


def combine(layers: Sequence[LayerRows], c: Float[Tensor, "K R"]) -> Float[Tensor, "K P_b"]:
    """Combine rows with coefficients."""
    return torch.cat([layer.rmatvec(c) for layer in layers], dim=-1)


def dense(layers: Sequence[LayerRows]) -> Float[Tensor, "R P_b"]:
    """Form the rows. Memory `R·P_b`."""
    return torch.cat([layer.dense() for layer in layers], dim=-1)


def moment(layers: Sequence[LayerRows]) -> Float[Tensor, "P_b P_b"]:
    """Form `SᵀS`, in chunks of samples. Cost `R·P_b²`."""
    size = sum(layer.size for layer in layers)
    V, N = layers[0].shape
    total = layers[0].factors[-1].new_zeros(size, size)
    for part in chunks(N, V * size):
        rows = dense([layer.select(part) for layer in layers])
        total.addmm_(rows.T, rows)
    return total


def gram64(layers: Sequence[LayerRows]) -> Float[Tensor, "R R"]:
    """Return `SSᵀ` in float64."""
    precise = [layer.to(torch.float64) for layer in layers]
    return gram(precise, precise)


def null_energy(eigen: Eigen, x: Float[Tensor, "K n"]) -> Float[Tensor, " K"]:
    """Return the squared norm of x in null directions."""
    return (eigen.coordinates(x).square() * eigen.null).sum(-1).to(x)
