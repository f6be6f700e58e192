"""Blocks: the parts of a structure that do not couple.

A block covers some of the columns of some layers (its *parts*), or some entries of these (its *index*). Its vectors are
`[K, P_b]`: the block vectors of its parts side by side, or their entries at the index. A structure is a list of blocks;
the verbs of `Structure` are sums and concatenations over them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curvlab.fisher.power import RANGE, Power
from curvlab.fisher.system import System
from curvlab.rows.layer import LayerRows
from curvlab.rows.loss import OutputRoot
from curvlab.rows.parameters import Layout, Parameters
from curvlab.rows.rows import Rows
from curvlab.rows.side_by_side import dense, times

BlockState = dict[str, Tensor | float | None]
"""What a block keeps, besides rows; plain tensors and numbers."""


Total = Callable[[Tensor], Tensor]
"""Sums a tensor over the processes that share a batch."""


@dataclass(frozen=True)
class RowRelation:
    """What rows J have to do with the rows S of a state.

    Attributes:
        coefficients: C with `J = C·S`, None if there is none of the simple form.
        root: A with `S = A·J`, None if there is none.
    """

    coefficients: OutputRoot | None
    root: OutputRoot | None

    def behind(self, damping: float) -> OutputRoot | None:
        """Return A if a response is to be made of A and products of J with itself, without SSᵀ."""
        return self.root if self.coefficients is None and damping > 0 else None


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
        further: whether these are more rows of the samples of the update before, whose weights are in the state.
    """

    layers: tuple[LayerRows, ...]
    terms: float
    decay: float
    additive: bool
    sample_weights: Float[Tensor, " N"]
    total: Total | None = None
    further: bool = False

    def average(self, average: RunningAverage, value: Tensor) -> None:
        """Add the batch's matrix, of which this process has its samples' share, to a running average."""
        amount = self.weight * value
        average.update(amount, self.fresh_weight, self.decay, additive=self.additive, total=self.total)

    @property
    def weight(self) -> float:
        """The batch's weight in a running average."""
        return 1.0 if self.additive else self.terms

    @property
    def fresh_weight(self) -> float:
        """What it adds to the weight of a running average: nothing for more rows of the same samples."""
        return 0.0 if self.further else self.weight

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
        self.additive = False

    def update(
        self, amount: Tensor, weight: float, decay: float, *, additive: bool = False, total: Total | None = None
    ) -> None:
        """Decay the state and add `w x` and w of a batch; more of the last one has the weight 0 and decay 1.

        With `total`, what several processes give adds up to that of their batch.
        """
        self.additive = additive
        if total is not None:
            amount, weight = total(amount), weight_of_batch(weight, additive, total, amount)
        if self.total is None or decay == 0:
            self.total, self.weight = amount, weight
            return
        self.total = decay * self.total + amount
        if not (additive and decay == 1):
            self.weight = decay * self.weight + weight

    def add_up(self, total: Total) -> None:
        """Turn the average over a part of a data set into that over the parts of all processes."""
        assert self.total is not None
        self.total = total(self.total)
        self.weight = weight_of_all(self.weight, self.additive, total, self.total)

    @property
    def value(self) -> Tensor:
        """The average, 0 while no batch had any weight."""
        assert self.total is not None
        return self.total / (self.weight or 1.0)

    def state(self) -> BlockState:
        """Return what `restore` needs."""
        return {"total": self.total, "weight": self.weight}

    def restore(self, state: BlockState) -> None:
        """Bring a saved state back."""
        total, weight = state["total"], state["weight"]
        assert not isinstance(total, float)
        assert isinstance(weight, float)
        self.total, self.weight = total, weight


def weight_of_batch(weight: float, additive: bool, total: Total, like: Tensor) -> float:
    """Return the weight of a batch of which each process has a share: their sum, or that of each where sums add."""
    return weight if additive else float(total(like.new_tensor(weight)))


def weight_of_all(weight: float, additive: bool, total: Total, like: Tensor) -> float:
    """Return the weight of averages that are added up: their sum, or that of each where the averages are sums that add."""
    summed, adding = total(like.new_tensor([weight, float(additive)], dtype=torch.float64)).tolist()
    return weight if adding else summed


class Block(ABC):
    """A symmetric matrix over some parameters.

    Args:
        name: names of the layers, for messages.
        parts: which columns of which layers the block covers.
        index: which entries of the block vector of its only part it covers; all entries of all parts if None.
    """

    def __init__(self, name: str, parts: Sequence[Layout], index: Int[Tensor, " P_b"] | None = None) -> None:
        self.name = name
        self.parts = tuple(parts)
        self.index = index

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.size} parameters)"

    @property
    def size(self) -> int:
        """Number of parameters `P_b`."""
        return sum(part.size for part in self.parts) if self.index is None else len(self.index)

    def covered(self) -> Int[Tensor, " _"]:
        """Return which entries of its layer it covers, none for all."""
        return torch.empty(0, dtype=torch.long) if self.index is None else self.index.cpu()

    @property
    def count(self) -> int:
        """Number of equal matrices of which the block is made."""
        return 1

    def stands_for(self, other: Block, names: Mapping[str, str]) -> bool:
        """Whether another block covers the same entries of parameters, called by their names here in `names`."""

        def known(part: Layout) -> Layout:
            return replace(part, slots=tuple(replace(slot, name=names.get(slot.name, "")) for slot in part.slots))

        mine, theirs = self.index, other.index
        return (
            type(self) is type(other)
            and self.count == other.count
            and self.parts == tuple(map(known, other.parts))
            and (mine is theirs or (mine is not None and theirs is not None and torch.equal(mine, theirs)))
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return tuple(name for part in self.parts for name in part.names)

    def join(self, named: Parameters) -> Float[Tensor, "K P_b"]:
        """Assemble the block's vectors."""
        whole = torch.cat([part.join(named) for part in self.parts], dim=-1)
        return whole if self.index is None else whole[:, self.index]

    def put(self, vectors: Float[Tensor, "K P_b"], named: dict[str, Tensor]) -> None:
        """Write the block's vectors into parameters by name; blocks that share a layer fill it one after another."""
        if self.index is not None:
            (part,) = self.parts
            whole = part.join(named) if part.names[0] in named else vectors.new_zeros(len(vectors), part.size)
            vectors = whole.index_copy_(1, self.index, vectors)
        for part, piece in zip(self.parts, vectors.split([part.size for part in self.parts], dim=-1), strict=True):
            named.update(part.split(piece))

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

    def refine(self, batch: Batch) -> None:  # noqa: B027
        """Add what is measured against the averages of `update`, which then are those of all batches where possible."""

    def add_up(self, total: Total) -> None:
        """Turn the state of a part of a data set into that of the parts of all processes.

        Raises:
            NotImplementedError: if the block does not implement this, so that one process has to see all data.
        """
        raise NotImplementedError(
            f"{type(self).__name__} of layers {self.name} cannot be added up over processes, as it does not implement add_up(). "
            "Fit it in one process; whoever writes the block, implement Block.add_up."
        )

    def add_up_refined(self, total: Total) -> None:  # noqa: B027
        """Do the same for what `refine` has added, after the second pass."""

    @abstractmethod
    def matvec(self, x: Float[Tensor, "K P_b"]) -> Float[Tensor, "K P_b"]:
        """Multiply."""

    @abstractmethod
    def solve(self, x: Float[Tensor, "K P_b"], damping: float) -> tuple[Float[Tensor, "K P_b"], Float[Tensor, " K"]]:
        """Return `(F + ρI)⁻¹x`, or `F⁺x` for ρ = 0, and the squared norm of x outside range(F) if ρ = 0, else 0."""

    def invert(self, x: Float[Tensor, "K P_b"], inverse: Power) -> tuple[Float[Tensor, "K P_b"], Float[Tensor, " K"]]:
        """Return what `solve` does, for any inverse power, the first one by the block's own way."""
        return self.solve(x, inverse.damping) if inverse.exponent == 1 else self.solve_power(x, inverse)

    def solve_power(
        self, x: Float[Tensor, "K P_b"], inverse: Power
    ) -> tuple[Float[Tensor, "K P_b"], Float[Tensor, " K"]]:
        """Return what `solve` does, for any inverse power."""
        missed = x.new_zeros(len(x)) if inverse.damping else (x - self.transform(x, RANGE)).square().sum(-1)
        return self.transform(x, inverse), missed

    def transform(self, x: Float[Tensor, "K P_b"], power: Power) -> Float[Tensor, "K P_b"]:
        """Return `f(F) x` for a function of eigenvalues.

        Raises:
            NotImplementedError: if the block does not implement this, so that its first power is all it has.
            NotPositiveDefinite: see `Power.of`.
        """
        raise NotImplementedError(
            f"{type(self).__name__} of layers {self.name} has no power but the first, as it does not implement transform(). "
            "Use another structure, such as 'kfac' or 'diagonal'; whoever writes the block, implement Block.transform."
        )

    @abstractmethod
    def lift(self, c: Float[Tensor, "K R"], layers: tuple[LayerRows, ...], damping: float) -> Float[Tensor, "K P_b"]:
        """Return `(F + ρI)⁻¹Sᵀc` for rows of the last batch, or for all rows of the state if `keeps_rows`."""

    def prefers_per_sample_gradients(self, layers: tuple[LayerRows, ...], damping: float) -> bool:  # noqa: ARG002
        """Whether `solve_sum` takes fewer operations than `solve`.

        Args:
            layers: rows of the state's last batch; per-sample gradients have their shape, with one row a sample.
            damping: ρ.
        """
        return False

    def solve_sum(self, layers: tuple[LayerRows, ...], damping: float) -> dict[str, Tensor]:
        """Return `(F + ρI)⁻¹x` by parameter, for x the sum of rows."""
        named: dict[str, Tensor] = {}
        self.put(self.solve(torch.cat([layer.total() for layer in layers])[None], damping)[0], named)
        return {name: value[0] for name, value in named.items()}

    @abstractmethod
    def sandwich(
        self,
        left: tuple[LayerRows, ...],
        right: tuple[LayerRows, ...],
        damping: float,
        relation: RowRelation,
    ) -> Float[Tensor, "Q R"]:
        """Return `left (F + ρI)⁻¹ rightᵀ`; the relation is that of `right` to the rows S that `lift` takes."""

    def sandwich_power(
        self, left: tuple[LayerRows, ...], right: tuple[LayerRows, ...], inverse: Power
    ) -> Float[Tensor, "Q R"]:
        """Return `left f(F) rightᵀ` for an inverse power f. Memory `R·P_b`."""
        rows = dense(right)
        if self.index is None:
            return times(left, self.transform(rows, inverse)).T
        seen = self.transform(rows[:, self.index], inverse)
        return times(left, torch.zeros_like(rows).index_copy_(1, self.index, seen)).T

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
    def state(self) -> BlockState:
        """Return what `restore` needs, besides rows."""

    @abstractmethod
    def restore(self, state: BlockState) -> None:
        """Bring a saved state back."""


def check_rtol(rtol: float | None) -> None:
    """Raise `ValueError` for a rank tolerance outside [0, 1)."""
    if rtol is not None and not 0 <= rtol < 1:
        raise ValueError(f"rtol is a number in [0, 1), got {rtol}.")


def batches_of(blocks: Iterable[Block], rows: Rows, decay: float, total: Total | None = None) -> list[Batch]:
    """Cut rows into the shares of blocks."""
    additive = rows.reduction == "sum"
    return [Batch(block.of(rows), rows.terms, decay, additive, rows.sample_weights, total) for block in blocks]
