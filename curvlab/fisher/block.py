"""Blocks: the parts of a structure that do not couple.

A block covers some of the columns of some layers (its *parts*). Its vectors are `[K, P_b]`, the block vectors of its parts
side by side. A structure is a list of blocks; the verbs of `Structure` are sums and concatenations over them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.errors import StateError
from curvlab.fisher.system import System, inverse_values
from curvlab.rows.layer import LayerRows
from curvlab.rows.loss import OutputFactor
from curvlab.rows.parameters import Layout, Parameters
from curvlab.rows.products import chunks
from curvlab.rows.rows import Rows, gram


@dataclass(frozen=True)
class Batch:
    """One update: the block's share of the rows of a batch, and how it merges.

    Attributes:
        layers: rows of the block's parts.
        terms: the batch's weight.
        decay: weight of the state so far.
        additive: whether the loss is a sum, so that matrices of batches add.
        sample_weights: ω_n.
    """

    layers: tuple[LayerRows, ...]
    terms: float
    decay: float
    additive: bool
    sample_weights: Float[Tensor, " N"]


class RunningAverage:
    """Σ_b w_b x_b / Σ_b w_b over batches, each update multiplying both sums by a decay first.

    For sum losses a decay of 1 adds, any other averages over batches.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.weight = 0.0

    def update(self, value: Tensor, weight: float, decay: float, *, additive: bool = False) -> None:
        """Decay the state and add a batch."""
        weight = 1.0 if additive else weight
        if self.total is None or decay == 0:
            self.total, self.weight = weight * value, weight
            return
        self.total = decay * self.total + weight * value
        if not (additive and decay == 1):
            self.weight = decay * self.weight + weight

    @property
    def value(self) -> Tensor:
        """The average."""
        assert self.total is not None
        return self.total / self.weight


class Block(ABC):
    """A symmetric matrix over some parameters.

    Args:
        name: names of the layers, for messages.
        parts: which columns of which layers the block covers.
    """

    def __init__(self, name: str, parts: Sequence[Layout]) -> None:
        self.name = name
        self.parts = tuple(parts)

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
        picked = []
        for part in self.parts:
            layer = next(layer for layer in rows.layers if part.names[0] in layer.layout.names)
            picked.append(layer if layer.layout.names == part.names else layer.restrict(part.names))
        return tuple(picked)

    keeps_rows: bool = False
    """Whether the state of the block is the rows themselves, handed over by `set_rows`."""

    outgrown: bool = False
    """Whether the rows of the state have become larger than the matrix they stand for."""

    def set_rows(self, layers: tuple[LayerRows, ...], terms: float, *, additive: bool) -> None:  # noqa: B027
        """Take the merged rows of all batches in the state; called before a verb if `keeps_rows`."""

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
        """Return `(F + ρI)⁻¹x`, or `F⁺x` for ρ = 0, and the squared norm of x outside range(F)."""

    @abstractmethod
    def lift(self, c: Float[Tensor, "K R"], layers: tuple[LayerRows, ...], damping: float) -> Float[Tensor, "K P_b"]:
        """Return `(F + ρI)⁻¹Sᵀc` for rows of the last batch, or for all rows of the state if `keeps_rows`."""

    @abstractmethod
    def sandwich(
        self,
        left: tuple[LayerRows, ...],
        right: tuple[LayerRows, ...],
        damping: float,
        coefficients: OutputFactor | None,
    ) -> Float[Tensor, "Q R"]:
        """Return `left (F + ρI)⁻¹ rightᵀ`; `coefficients` says that `right = C·S`, S the rows of the state."""

    @abstractmethod
    def to_dense(self) -> Float[Tensor, "P_b P_b"]:
        """Form the matrix."""

    @abstractmethod
    def eigenvalues(self) -> Float[Tensor, " k"]:
        """Return the eigenvalues that need not be zero; the other `P_b − k` are."""

    @abstractmethod
    def trace(self) -> float:
        """Return the trace."""

    @abstractmethod
    def state(self) -> dict[str, Tensor | float | None]:
        """Return what `restore` needs, besides rows."""

    @abstractmethod
    def restore(self, state: dict[str, Tensor | float | None]) -> None:
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
        if self.side not in ("auto", "rows", "parameters"):
            raise ValueError(f"side is 'auto', 'rows' or 'parameters', got {self.side!r}.")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is a number of batches ≥ 1, got {self.window}.")
        if self.window is not None and self.side == "parameters":
            raise ValueError("window keeps rows; it cannot be combined with side='parameters'.")
        if self.rtol is not None and not 0 <= self.rtol < 1:
            raise ValueError(f"rtol is a number in [0, 1), got {self.rtol}.")


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

    def update(self, batch: Batch) -> None:  # noqa: D102
        self._reset()
        rows = self._row_size(batch.layers)
        held = 0 if batch.decay == 0 else self._rows_held
        if self.average.total is not None and batch.decay != 0:
            self._average(batch)
            return
        fading = batch.decay not in (0.0, 1.0) and self.config.window is None
        self.average = RunningAverage()
        if self.config.side == "parameters" or (self.config.side == "auto" and fading and self._side_size() <= rows):
            self._average(batch)
        elif fading:
            raise StateError(
                f"Block {self.name!r} keeps {rows} rows, which take decay 0 or 1, not {batch.decay}. Set window=k to keep "
                f"the last k batches, or side='parameters' for a matrix of {self._side_size()} × {self._side_size()} "
                f"({self._side_size() * self.size * batch.layers[0].factors[-1].element_size() / 2**30:.3g} GiB)."
            )
        else:
            self._rows_held = held + rows

    def _row_size(self, layers: Sequence[LayerRows]) -> int:
        """Size of the matrix on the row side."""
        return layers[0].count

    def _average(self, batch: Batch) -> None:
        self._rows_held = 0
        self.average.update(self._form(batch.layers), batch.terms, batch.decay, additive=batch.additive)

    @property
    def keeps_rows(self) -> bool:  # type: ignore[override]
        """Whether the block is stored on its row side."""
        return self.average.total is None

    @property
    def outgrown(self) -> bool:  # type: ignore[override]
        """Whether the parameter side has become the smaller one and may be taken."""
        free = self.config.side == "auto" and self.config.window is None
        return free and self.keeps_rows and self._side_size() <= self._rows_held

    def set_rows(self, layers: tuple[LayerRows, ...], terms: float, *, additive: bool) -> None:
        """Take the merged rows; move to the parameter side once that is smaller."""
        self._reset()
        if self.outgrown:
            self.average.update(self._form(layers), terms, 0.0, additive=additive)
            self._rows_held = 0
        else:
            self.layers = layers

    def _reset(self) -> None:
        """Forget what was computed from the state."""
        self._system = None

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
            layers = self.layers
            self._system = (
                System(
                    gram(layers, layers),
                    self.name,
                    self.config.rtol,
                    lambda: gram64(layers),
                )
                if self.keeps_rows
                else System(self.average.value, self.name, self.config.rtol)
            )
        return self._system

    def systems(self) -> list[System]:  # noqa: D102
        return [self.system]

    def _times(self, x: Float[Tensor, "K P_b"]) -> Float[Tensor, "K R"]:
        return times(self.layers, x)

    def _combine(self, c: Float[Tensor, "K R"]) -> Float[Tensor, "K P_b"]:
        return torch.cat([layer.rmatvec(c) for layer in self.layers], dim=-1)

    def matvec(self, x: Float[Tensor, "K P_b"]) -> Float[Tensor, "K P_b"]:  # noqa: D102
        return self._combine(self._times(x)) if self.keeps_rows else x @ self.average.value

    def solve(self, x: Float[Tensor, "K P_b"], damping: float) -> tuple[Float[Tensor, "K P_b"], Float[Tensor, " K"]]:
        """Solve; on the row side with damping as `(x − Sᵀ(K + ρI)⁻¹Sx)/ρ`, which cancels in float32: see `lift`."""
        if not self.keeps_rows:
            solution = self.system.solve(x.T, damping).T
            return solution, _outside(self.system, x) if damping == 0 else x.new_zeros(len(x))
        seen = self._times(x)
        if damping > 0:
            return (x - self._combine(self.system.solve(seen.T, damping).T)) / damping, x.new_zeros(len(x))
        eigen = self.system.eigen
        inverse = inverse_values(eigen.values, 0.0, eigen.null)
        coordinates = seen @ eigen.vectors
        inside = (coordinates.square() * inverse).sum(-1)
        solution = self._combine((coordinates * inverse.square()) @ eigen.vectors.T)
        return solution, (x.square().sum(-1) - inside).clamp_min(0)

    def lift(self, c: Float[Tensor, "K R"], layers: tuple[LayerRows, ...], damping: float) -> Float[Tensor, "K P_b"]:
        """Return `(F + ρI)⁻¹Sᵀc`; on the row side `Sᵀ(K + ρI)⁻¹c`, accurate at any damping."""
        if self.keeps_rows:
            return self._combine(self.system.solve(c.T, damping).T)
        return self.solve(torch.cat([layer.rmatvec(c) for layer in layers], dim=-1), damping)[0]

    def sandwich(  # noqa: D102
        self,
        left: tuple[LayerRows, ...],
        right: tuple[LayerRows, ...],
        damping: float,
        coefficients: OutputFactor | None,
    ) -> Float[Tensor, "Q R"]:
        if not self.keeps_rows:
            solved = self.solve(torch.cat([layer.dense() for layer in right], dim=-1), damping)[0]
            return times(left, solved).T
        seen = gram(left, self.layers)
        if coefficients is not None:
            V, N = self.layers[0].shape
            return coefficients.apply(self.system.solve(seen.T, damping).view(V, N, -1)).flatten(0, 1).T
        eigen = self.system.eigen
        inverse = inverse_values(eigen.values, 0.0, eigen.null)
        a, b = seen @ eigen.vectors, gram(right, self.layers) @ eigen.vectors
        if damping == 0:
            return (a * inverse.square()) @ b.T
        within = (a * inverse * inverse_values(eigen.values, damping, None)) @ b.T
        return within + (gram(left, right) - (a * inverse) @ b.T) / damping

    def to_dense(self) -> Float[Tensor, "P_b P_b"]:  # noqa: D102
        return self._form(self.layers) if self.keeps_rows else self.average.value

    def eigenvalues(self) -> Float[Tensor, " k"]:
        """Return the `min(R, P_b)` eigenvalues that need not be zero."""
        return self.system.eigen.values[-min(self.size, len(self.system.eigen.values)) :]

    def trace(self) -> float:  # noqa: D102
        if self.keeps_rows:
            return float(sum(layer.diagonal().sum() for layer in self.layers))
        return float(self.average.value.trace())

    def state(self) -> dict[str, Tensor | float | None]:  # noqa: D102
        return {"total": self.average.total, "weight": self.average.weight, "rows_held": float(self._rows_held)}

    def restore(self, state: dict[str, Tensor | float | None]) -> None:  # noqa: D102
        total, weight, held = state["total"], state["weight"], state["rows_held"]
        assert isinstance(weight, float) and isinstance(held, float)
        assert total is None or isinstance(total, Tensor)
        self.average.total, self.average.weight, self._rows_held = total, weight, int(held)
        self._reset()


def times(layers: Sequence[LayerRows], x: Float[Tensor, "K P_b"]) -> Float[Tensor, "K R"]:
    """Multiply rows with a block's vectors."""
    pieces = x.split([layer.size for layer in layers], dim=-1)
    products = [layer.matvec(piece) for layer, piece in zip(layers, pieces, strict=True)]
    return torch.stack(products).sum(0)


def moment(layers: Sequence[LayerRows]) -> Float[Tensor, "P_b P_b"]:
    size = sum(layer.size for layer in layers)
    V, N = layers[0].shape
    total = layers[0].factors[-1].new_zeros(size, size)
    for part in chunks(N, V * size):
        rows = torch.cat([layer.select(part).dense() for layer in layers], dim=-1)
        total.addmm_(rows.T, rows)
    return total


def gram64(layers: Sequence[LayerRows]) -> Float[Tensor, "R R"]:
    precise = [layer.to(torch.float64) for layer in layers]
    return gram(precise, precise)


def _outside(system: System, x: Float[Tensor, "K n"]) -> Float[Tensor, " K"]:
    eigen = system.eigen
    return ((x @ eigen.vectors).square() * eigen.null).sum(-1)
