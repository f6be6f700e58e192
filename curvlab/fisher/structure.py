"""The verbs that every structure shares.

    F ≈ SᵀS,   S = Λ^{1/2} J / √count

A structure is a list of blocks (`curvlab.fisher.block`). Vectors are parameters by name or one flat vector in
`named_parameters()` order; a leading axis is a block of vectors. Damping is `F + ρI`, never folded in silently.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import accumulate
from math import inf, log
from operator import mul
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlab.errors import NotPositiveDefinite, OutsideRange, StateError, unknown_name
from curvlab.fisher.block import Batch, Block, RunningAverage, Total
from curvlab.fisher.damping import Damping, absolute
from curvlab.fisher.fitting import Checkpoint, Fitting, identity
from curvlab.fisher.serialise import pack_rows, unpack_rows
from curvlab.fisher.system import prepare
from curvlab.rows import Rows, merge, sqrt_fisher
from curvlab.rows.batches import as_batches
from curvlab.rows.layer import LayerRows
from curvlab.rows.loss import Kind, OutputFactor, Scaling
from curvlab.rows.parameters import ParameterSpace, Vector
from curvlab.rows.rows import Engine
from curvlab.rows.samples import NodeChoice
from curvlab.rows.sweep import PickOutput
from curvlab.study.environment import available_memory
from curvlab.study.units import size

Own = TypeVar("Own", bound="Structure")

STRUCTURES: dict[str, type[Structure]] = {}
"""Every structure by its key; the options, the tests and the documentation read this."""

WORTH_CHECKING = 1 << 28
"""Bytes from which on an update looks first at how much memory there is."""

OUTSIDE_TOLERANCE = 1e-3
"""Share of a right-hand side's norm outside range(F) above which an undamped solve warns."""


@dataclass(frozen=True)
class SolveInfo:
    """What a solve did.

    Attributes:
        damping: the absolute ρ.
        outside: share of the right-hand side's norm outside range(F), one a vector; 0 with damping.
    """

    damping: float
    outside: Float[Tensor, " K"]


class Structure(ABC):
    """An approximation of the Fisher matrix; subclasses say which blocks it has.

    Configuration is given at construction and frozen; the state comes from `update` or `fit`.
    """

    key: ClassVar[str]
    summary: ClassVar[str]
    averages: ClassVar[bool] = False
    """Whether the state are averages of layers' moments, which take any decay and stay defined where samples interact."""
    passes: ClassVar[int] = 1
    """How often `fit` goes over the data."""
    adds: ClassVar[bool] = False
    """Whether the state are sums over samples, so that processes can add theirs: `update` takes `total`."""

    joins_positions: bool = False
    """Whether only the sum of a sample's rows is used, so that one row, its whole gradient, says as much."""

    def __init_subclass__(cls, key: str | None = None, summary: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if key is not None:
            cls.key, cls.summary = key, summary
            STRUCTURES[key] = cls

    def __init__(self) -> None:
        self._blocks: list[Block] = []
        self._history: list[tuple[float, Rows]] = []  # batches, each with the decay of those before it
        self._counts = RunningAverage()
        self._merged: Rows | None = None
        self._largest: float | None = None

    @property
    @abstractmethod
    def options(self) -> Mapping[str, object]:
        """The configuration, by the constructor's argument names."""

    @abstractmethod
    def _make_blocks(self, rows: Rows) -> list[Block]:
        """Cut the parameters into blocks; every parameter belongs to exactly one."""

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        state = f"P={self.space.size}, blocks={len(self._blocks)}" if self._history else "not updated yet"
        return f"{type(self).__name__}({'; '.join([options, state, *self._notes()])})"

    def _notes(self) -> list[str]:
        """Return what a reader of the repr should know about the state."""
        return []

    @classmethod
    def fit(
        cls: type[Own],
        model: nn.Module,
        loss: nn.Module,
        data: Sequence[Any] | Iterable[Sequence[Any]],
        *,
        kind: Kind = "exact",
        samples: int = 1,
        generator: torch.Generator | None = None,
        nodes: NodeChoice = None,
        output: PickOutput = None,
        engine: Engine = "auto",
        progress: bool = False,
        checkpoint: str | Path | None = None,
        checkpoint_every: float = 60.0,
        **options: Any,
    ) -> Own:
        """Return the structure of a whole data set; one batch and many batches give the same.

        Args:
            model: any module whose samples do not interact.
            loss: see `curvlab.sqrt_fisher`.
            data: one pair (inputs, targets), or an iterable of pairs such as a DataLoader; an iterator that can be
                passed once only will not do for a structure that goes over the data twice.
            kind: see `curvlab.sqrt_fisher`.
            samples: see `curvlab.sqrt_fisher`.
            generator: see `curvlab.sqrt_fisher`; every pass over the data starts from its present state.
            nodes: see `curvlab.sqrt_fisher`; a function chooses anew in every batch.
            output: see `curvlab.sqrt_fisher`.
            engine: see `curvlab.sqrt_fisher`.
            progress: whether to show it, on stderr.
            checkpoint: file that keeps the state, so that a fit that was interrupted goes on when it is called again, and
                ends in the same state to the last bit. It stays when the fit is done.
            checkpoint_every: seconds between two writings.
            options: the structure's own.

        Raises:
            ValueError: if the data are empty, cannot be passed as often as needed, or differ between passes.
            StateError: if the checkpoint is that of another fit, or cannot be written.
            UnsupportedModel: see `curvlab.sqrt_fisher`; for dropout and batch normalisation in training mode, too.
        """
        structure = cls(**options)

        def rows_of(batch: Sequence[Any]) -> Rows:
            inputs, targets = batch
            return sqrt_fisher(
                model,
                loss,
                inputs,
                targets,
                kind,
                samples=samples,
                generator=generator,
                nodes=nodes,
                output=output,
                engine=engine,
            )

        kept = None
        if checkpoint is not None:
            same = identity(structure, model, loss, kind, samples)
            kept = Checkpoint(Path(checkpoint), checkpoint_every, same)
        Fitting(structure, rows_of, as_batches(data), generator, kept, progress).run()
        return structure

    def _absorb(self, rows: Rows, number: int, *, first: bool) -> None:  # noqa: ARG002
        """Add a batch of a data set.

        Args:
            rows: of the batch.
            number: of the pass over the data, from 0.
            first: whether the batch is the first of its pass.
        """
        self.update(rows, 1.0)

    def update(self: Own, rows: Rows, decay: float = 0.0, *, total: Total | None = None) -> Own:
        """Decay the state and add the rows of a batch.

        Args:
            rows: rows of S.
            decay: weight of the state so far: 0 replaces it, 1 accumulates a data set exactly, in between is a running
                average. Sums of losses add at 1 and average otherwise.
            total: sums a tensor over processes, each of which holds the rows of some samples of the batch; for K-FAC
                and the diagonal, whose state are sums over samples.

        Raises:
            ValueError: if decay is not in [0, 1], or the rows are those of a Jacobian or of other parameters.
            StateError: if a block that keeps rows cannot take this decay.
            MemoryError: if the structure does not fit; the message says how large it is.
        """
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is a number in [0, 1], got {decay}.")
        if rows.kind == "jacobian":
            raise ValueError("A structure is built from rows of S (curvlab.sqrt_fisher), not of the Jacobian.")
        if self._history:
            self._check_fits(rows, decay)
        else:
            decay = 0.0
        blocks = self._blocks or self._make_blocks(rows)
        batches = batches_of(blocks, rows, decay, total)
        self._check_memory(blocks, batches)
        staying = [block.will_keep_rows(batch) for block, batch in zip(blocks, batches, strict=True)]
        leaving = [
            block for block, stays in zip(blocks, staying, strict=True) if decay and block.keeps_rows and not stays
        ]
        if leaving:
            earlier = self.rows
            for block in leaving:
                block.leave_rows(1.0 if earlier.reduction == "sum" else earlier.terms)
        self._blocks = blocks
        self._update_blocks(batches)
        kept = self._history if decay and any(staying) else []
        self._history = [*kept, (decay, rows)][-(self._window or 0) :]
        if kept:
            self._counts = RunningAverage()
        for step, batch in self._history if kept else [(decay, rows)]:
            count = torch.tensor(batch.count, dtype=torch.float64)
            self._counts.update(count if total is None else total(count), 1.0, step, additive=True)
        self._merged = self._largest = None
        return self

    def _check_memory(self, blocks: Sequence[Block], batches: Sequence[Batch]) -> None:
        """Raise `MemoryError` before an allocation that cannot succeed: matrices, and as much again to factorise them."""
        elements = {block: block.elements(batch) for block, batch in zip(blocks, batches, strict=True)}
        rows = batches[0].layers[0].factors[-1]
        needed = 2 * sum(elements.values()) * rows.element_size()
        if needed < WORTH_CHECKING:
            return
        available = available_memory(str(rows.device))
        if available is not None and needed > available:
            largest = max(elements, key=elements.__getitem__)
            raise MemoryError(
                f"The {self.key} structure needs {size(needed)} for its matrices and their factorisation, {size(available)} "
                f"are available; the largest is that of {largest.name!r}. Use a structure of smaller blocks, such as 'kfac' "
                "or 'diagonal', or fewer rows (kind='mc', smaller batches)."
            )

    def _check_fits(self, rows: Rows, decay: float) -> None:
        last = self._history[-1][1]
        if dict(rows.space.shapes) != dict(last.space.shapes):
            raise ValueError("The rows belong to other parameters than the structure's state.")
        if decay == 0:
            return
        for what in ("kind", "reduction"):
            if getattr(rows, what) != getattr(last, what):
                raise ValueError(
                    f"Rows of {what} {getattr(rows, what)!r} cannot be added to a state of {what} "
                    f"{getattr(last, what)!r}. Use decay=0 to start afresh."
                )
        if self._keeps_rows and rows.shape[0] != last.shape[0]:
            raise ValueError(
                f"Blocks that keep rows need as many rows a sample in every batch, got {last.shape[0]} and then "
                f"{rows.shape[0]}. Use side='parameters'."
            )

    def _update_blocks(self, batches: list[Batch]) -> None:
        for block, batch in zip(self._blocks, batches, strict=True):
            block.update(batch)

    @property
    def _keeps_rows(self) -> bool:
        return any(block.keeps_rows for block in self._blocks)

    @property
    def _window(self) -> int | None:
        """Number of batches that rows are kept of, all if None."""
        return None

    @property
    def updated(self) -> bool:
        """Whether there is a state."""
        return bool(self._history)

    @property
    def space(self) -> ParameterSpace:
        """Names and shapes of the parameters.

        Raises:
            StateError: before the first update.
        """
        if not self._history:
            raise StateError(f"{type(self).__name__} has no state yet: call update(rows) or use fit(…).")
        return self._history[-1][1].space

    @property
    def count(self) -> float:
        """Divisor that the loss applied to the data of the state.

        Counts of batches add where batches do (decay 1) and are averaged in a running average; 1 for sums.
        """
        _ = self.space
        return 1.0 if self._history[-1][1].reduction == "sum" else float(self._counts.value)

    @property
    def rows(self) -> Rows:
        """The rows that `lift` speaks of: all rows of the state where blocks keep rows, else the last batch's."""
        _ = self.space
        if self._merged is None:
            weights = list(accumulate((decay for decay, _ in reversed(self._history[1:])), mul, initial=1.0))[::-1]
            # Sums of losses add up at decay 1 and are averaged otherwise, as their counts are.
            scale = 1 / self._counts.weight if self._keeps_rows else 1.0
            self._merged = merge([rows for _, rows in self._history], [scale * weight for weight in weights])
            if self._window is None:
                self._history = [(0.0, self._merged)]
            for block in self._blocks:
                if block.keeps_rows:
                    block.set_rows(block.of(self._merged))
        return self._merged

    def _damping(self, damping: Damping) -> float:
        _ = self.rows
        rho = absolute(damping, self.largest_eigenvalue)
        self._prepare(rho)
        return rho

    def _prepare(self, damping: float) -> None:
        """Factorise what solves of all blocks need, so that matrices of equal size go in one batched call."""
        prepare([system for block in self._blocks for system in block.systems()], damping)

    def largest_eigenvalue(self) -> float:
        """Return λ_max(F), to which relative damping refers."""
        if self._largest is None:
            _ = self.rows
            self._largest = max(0.0, *(block.largest_eigenvalue() for block in self._blocks))
        return self._largest

    def matvec(self, vector: Vector) -> Vector:
        """Return `F v`."""
        _ = self.rows
        named, restore = self.space.unpack(vector)
        result: dict[str, Tensor] = {}
        for block in self._blocks:
            result.update(block.split(block.matvec(block.join(named))))
        return restore(result)

    @overload
    def solve(self, vector: Vector, damping: Damping, *, info: Literal[False] = False) -> Vector: ...

    @overload
    def solve(self, vector: Vector, damping: Damping, *, info: Literal[True]) -> tuple[Vector, SolveInfo]: ...

    def solve(self, vector: Vector, damping: Damping, *, info: bool = False) -> Vector | tuple[Vector, SolveInfo]:
        """Return `(F + ρI)⁻¹ v`, for ρ = 0 the pseudo-inverse `F⁺ v`.

        Args:
            vector: right-hand side.
            damping: ρ, absolute or relative ("rel:1e-6").
            info: whether to return a `SolveInfo`, too.

        Warns:
            IllConditioned: if a system needed more than a Cholesky factorisation.
            OutsideRange: if ρ = 0 and more than 1e-3 of the norm of v lies outside range(F).
        """
        rho = self._damping(damping)
        named, restore = self.space.unpack(vector)
        result: dict[str, Tensor] = {}
        outside, total = [], []
        for block in self._blocks:
            x = block.join(named)
            solution, missed = block.solve(x, rho)
            result.update(block.split(solution))
            outside.append(missed)
            total.append(x.square().sum(-1))
        norm = torch.stack(total).sum(0).sqrt()
        share = torch.stack(outside).sum(0).sqrt() / torch.where(norm > 0, norm, 1)
        if rho == 0 and bool((share > OUTSIDE_TOLERANCE).any()):
            warnings.warn(
                f"{float(share.max()):.2g} of the right-hand side's norm lies outside the range of the undamped "
                f"{self.key} structure and is ignored. Use damping > 0 to keep it.",
                OutsideRange,
                stacklevel=2,
            )
        return (restore(result), SolveInfo(rho, share)) if info else restore(result)

    def lift(self, coefficients: Float[Tensor, "... R"], damping: Damping) -> dict[str, Tensor]:
        """Return `(F + ρI)⁻¹Sᵀc` for the rows S that `rows` returns.

        This is what steps use when the gradient is `g = Sᵀc`. On the row side it is `Sᵀ(SSᵀ + ρI)⁻¹c`, which keeps its
        digits at any damping, while the push-through form on g subtracts nearly equal vectors and divides by ρ.

        Args:
            coefficients: `[R]` or `[K, R]`.
            damping: ρ, absolute or relative.
        """
        rows = self.rows
        if coefficients.ndim not in (1, 2) or coefficients.shape[-1] != rows.R:
            raise ValueError(f"Coefficients are [R] or [K, R] with R = {rows.R}, got {tuple(coefficients.shape)}.")
        rho = self._damping(damping)
        c = coefficients.reshape(-1, rows.R)
        named: dict[str, Tensor] = {}
        for block in self._blocks:
            named.update(block.split(block.lift(c, block.of(rows), rho)))
        lead = coefficients.shape[:-1]
        return {name: named[name].reshape((*lead, *shape)) for name, shape in self.space.shapes.items()}

    def direction(
        self,
        gradient: Mapping[str, Tensor],
        damping: Damping,
        summands: Callable[[str], LayerRows | None] | None = None,
    ) -> dict[str, Tensor]:
        """Return `(F + ρI)⁻¹g` as `solve` does, by a cheaper route where one is open and without its report.

        Args:
            gradient: g by name.
            damping: ρ, absolute or relative.
            summands: returns, for the name of a parameter, rows of its layer that add up to g there, one a sample: the
                layer's inputs, and the gradients at its outputs; None if there are none. Blocks with Kronecker factors
                multiply with their inverses what takes fewer operations, the factors of these rows or g; blocks of rows
                with the same inputs never form g. All agree to rounding.
        """
        rho = self._damping(damping)
        found: dict[str, Tensor] = {}
        for block in self._blocks:
            layers = self._summands(block, rho, summands) if summands is not None else None
            if layers is not None:
                solution = block.solve_sum(layers, rho)
            else:
                solution, _ = block.solve(block.join({name: gradient[name][None] for name in block.names}), rho)
            found.update(block.split(solution))
        return {name: found[name][0] for name in self.space.shapes}

    def _summands(
        self, block: Block, damping: float, summands: Callable[[str], LayerRows | None]
    ) -> tuple[LayerRows, ...] | None:
        """Return the rows that add up to a block's share of a gradient, if it takes whole layers and wants them."""
        if not block.prefers_summands(block.of(self.rows), damping):
            return None
        layers = [summands(part.names[0]) for part in block.parts]
        fitting = [layer for layer, part in zip(layers, block.parts, strict=True) if layer and layer.layout == part]
        return tuple(fitting) if len(fitting) == len(layers) else None

    def response(self, jacobian: Rows, damping: Damping, test: Rows | None = None) -> Float[Tensor, "Q R"]:
        """Return `M = J' (F + ρI)⁻¹ Jᵀ / count`: a step moves the outputs by `−η M ∂ℓ`.

        Here ∂ℓ holds the gradients of the loss terms with respect to the outputs, before the division by `count`.

        Args:
            jacobian: J, rows of the data whose gradients drive the step; any rows will do.
            damping: ρ, absolute or relative.
            test: J' of the outputs whose change is asked for; J itself if None.

        Raises:
            ValueError: if the rows belong to other parameters.
        """
        rho = self._damping(damping)
        left = jacobian if test is None else test
        for rows in (left, jacobian):
            if dict(rows.space.shapes) != dict(self.space.shapes):
                raise ValueError("The rows belong to other parameters than the structure's state.")
        coefficients = self._coefficients(jacobian)
        products = [block.sandwich(block.of(left), block.of(jacobian), rho, coefficients) for block in self._blocks]
        return torch.stack(products).sum(0) / self.count

    def _coefficients(self, right: Rows) -> OutputFactor | None:
        """Return C with `right = C·S` for the rows S that `lift` speaks of, None if it is not of the simple form."""
        if right is self.rows:
            return Scaling(torch.ones(*right.shape, 1, dtype=right.dtype, device=right.device))
        return self.rows.coefficients(right)

    def to_dense(self) -> Float[Tensor, "P P"]:
        """Form F, in `named_parameters()` order. Memory `P²`."""
        P, device = self.space.size, self.rows.device
        index = self.space.unflatten(torch.arange(P, dtype=torch.float64, device=device)[None])
        dense = torch.zeros(P, P, dtype=self.rows.dtype, device=device)
        for block in self._blocks:
            at = block.join(index)[0].long()
            dense[at[:, None], at[None, :]] = block.to_dense()
        return dense

    def trace(self) -> float:
        """Return tr F."""
        _ = self.rows
        return sum(block.trace() for block in self._blocks)

    def eigvalsh(self) -> Float[Tensor, " P"]:
        """Return all P eigenvalues, ascending, in float64; those that count as null are exactly 0."""
        _ = self.rows
        values = torch.cat([block.eigenvalues().double() for block in self._blocks])
        return torch.cat([values.new_zeros(self.space.size - len(values)), values]).sort().values

    def condition_number(self) -> float:
        """Return the largest condition number of a block on its range, of which undamped solves lose the digits."""
        _ = self.rows
        return max(block.condition_number() for block in self._blocks)

    def logdet(self, damping: Damping) -> float:
        """Return log det(F + ρI); −∞ where that is singular.

        Raises:
            NotPositiveDefinite: if F + ρI has a negative eigenvalue.
        """
        rho = self._damping(damping)
        total = 0.0
        for block in self._blocks:
            values = block.eigenvalues().double()
            lowest = min(values.tolist(), default=0.0) + rho
            if lowest < 0:
                raise NotPositiveDefinite(
                    f"F + ρI of the {self.key} structure, layers {block.name}, has the eigenvalue {lowest:.3g} at "
                    f"ρ = {rho:.3g}. Use a damping above {-lowest + rho:.3g}, or a positive structure."
                )
            zeros = block.size - len(values)
            total += float((values + rho).log().sum()) + (zeros * log(rho) if zeros and rho else 0.0)
            if zeros and rho == 0:
                return -inf
        return total

    def state_dict(self) -> dict[str, Any]:
        """Return the state, in containers that `torch.load(…, weights_only=True)` accepts; without configuration.

        Raises:
            StateError: before the first update.
        """
        _ = self.space
        return {
            "key": self.key,
            "history": [(decay, pack_rows(rows)) for decay, rows in self._history],
            "counts": self._counts.state(),
            "blocks": [(repr(block), block.state()) for block in self._blocks],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state into a structure of the same class and configuration.

        Raises:
            ValueError: if the state is that of another structure, or its blocks are not those of this configuration.
        """
        if state["key"] != self.key:
            raise ValueError(f"This is the state of a {state['key']!r} structure, not of {self.key!r}.")
        history = [(decay, unpack_rows(packed)) for decay, packed in state["history"]]
        blocks = self._make_blocks(history[-1][1])
        made, saved = [repr(block) for block in blocks], [name for name, _ in state["blocks"]]
        if made != saved:
            raise ValueError(f"The state has the blocks {saved}, but this configuration makes {made}.")
        for block, (_, content) in zip(blocks, state["blocks"], strict=True):
            block.restore(content)
        self._history, self._blocks = history, blocks
        self._counts.restore(state["counts"])
        self._merged = self._largest = None


def make(key: str, **options: Any) -> Structure:
    """Return a structure by its key in `STRUCTURES`, with the options of its class.

    Raises:
        ValueError: for an unknown key or option, with the nearest known one suggested.
    """
    if key not in STRUCTURES:
        raise unknown_name("structure", key, STRUCTURES)
    known = signature(STRUCTURES[key]).parameters
    for name in options:
        if name not in known:
            raise unknown_name(f"option of {key!r}", name, known)
    return STRUCTURES[key](**options)


def batches_of(blocks: Iterable[Block], rows: Rows, decay: float, total: Total | None = None) -> list[Batch]:
    """Cut rows into the shares of blocks."""
    additive = rows.reduction == "sum"
    return [Batch(block.of(rows), rows.terms, decay, additive, rows.sample_weights, total) for block in blocks]
