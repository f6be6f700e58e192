"""The verbs that every structure shares.

    F ≈ SᵀS,   S = Λ^{1/2} J / √count

A structure is a list of blocks (`curvlab.fisher.block`). Vectors are parameters by name or one flat vector in
`named_parameters()` order; a leading axis is a block of vectors. Damping is `F + ρI`, never folded in silently.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlab.errors import NotPositiveDefinite, OutsideRange, StateError
from curvlab.fisher.block import Batch, Block
from curvlab.fisher.damping import Damping, absolute
from curvlab.fisher.system import prepare
from curvlab.rows import Rows, merge, sqrt_fisher
from curvlab.rows.loss import Kind
from curvlab.rows.parameters import ParameterSpace, Vector

STRUCTURES: dict[str, type[Structure]] = {}
"""Every structure by its key; the options, the tests and the documentation read this."""

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

    def __init_subclass__(cls, key: str | None = None, summary: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if key is not None:
            cls.key, cls.summary = key, summary
            STRUCTURES[key] = cls

    def __init__(self) -> None:
        self._space: ParameterSpace | None = None
        self._blocks: list[Block] = []
        self._history: list[tuple[float, Rows]] = []
        self._merged: Rows | None = None
        self._count = 0.0
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
        state = f", P={self.space.size}, blocks={len(self._blocks)}" if self._space else ", not updated yet"
        notes = "".join(f", {note}" for note in self._notes())
        return f"{type(self).__name__}({options}{state}{notes})"

    def _notes(self) -> list[str]:
        """Return what a reader of the repr should know about the state."""
        return []

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        loss: nn.Module,
        data: tuple[Any, Tensor] | Iterable[tuple[Any, Tensor]],
        *,
        kind: Kind = "exact",
        samples: int = 1,
        generator: torch.Generator | None = None,
        output: Any = None,
        engine: Literal["auto", "backpack", "autograd"] = "auto",
        **options: Any,
    ) -> Self:
        """Return the structure of a whole data set; one batch and many batches give the same.

        Args:
            model: any module whose samples do not interact.
            loss: see `curvlab.sqrt_fisher`.
            data: one pair (inputs, targets), or an iterable of pairs such as a DataLoader.
            kind: see `curvlab.sqrt_fisher`.
            samples: see `curvlab.sqrt_fisher`.
            generator: see `curvlab.sqrt_fisher`.
            output: see `curvlab.sqrt_fisher`.
            engine: see `curvlab.sqrt_fisher`.
            options: the structure's own.

        Raises:
            ValueError: if the data are empty.
        """
        structure = cls(**options)

        def rows_of(batch: tuple[Any, Tensor]) -> Rows:
            inputs, targets = batch
            return sqrt_fisher(
                model,
                loss,
                inputs,
                targets,
                kind,
                samples=samples,
                generator=generator,
                output=output,
                engine=engine,
            )

        pair = isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[1], Tensor)
        batches: Any = [data] if pair else data
        start = None if generator is None else generator.get_state()

        def sweep() -> Iterator[Rows]:
            if generator is not None and start is not None:
                generator.set_state(start)
            return (rows_of(batch) for batch in batches)

        structure._fit(sweep)
        return structure

    def _fit(self, sweeps: Callable[[], Iterable[Rows]]) -> None:
        """Accumulate a data set; `sweeps` starts a pass over its batches."""
        decay = 0.0
        for rows in sweeps():
            self.update(rows, decay)
            decay = 1.0
        if decay == 0:
            raise ValueError("The data hold no batch.")

    def update(self, rows: Rows, decay: float = 0.0) -> Self:
        """Decay the state and add the rows of a batch.

        Args:
            rows: rows of S.
            decay: weight of the state so far: 0 replaces it, 1 accumulates a data set exactly, in between is a running
                average. Sums of losses add at 1 and average otherwise.

        Raises:
            ValueError: if decay is not in [0, 1], or the rows are those of a Jacobian or of other parameters.
            StateError: if a block that keeps rows cannot take this decay.
        """
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is a number in [0, 1], got {decay}.")
        if rows.kind == "jacobian":
            raise ValueError("A structure is built from rows of S (curvlab.sqrt_fisher), not of the Jacobian.")
        if self._space is None:
            self._space = rows.space
            self._blocks = self._make_blocks(rows)
        elif dict(rows.space.shapes) != dict(self._space.shapes):
            raise ValueError("The rows belong to other parameters than the structure's state.")
        decay = decay if self._history else 0.0
        for block in self._blocks:
            block.update(
                Batch(block.of(rows), rows.terms, decay, rows.reduction == "sum", rows.sample_weights)
            )
        kept = [(decay * weight, old) for weight, old in self._history] if self._keeps_rows() and decay else []
        window = self._window()
        self._history = [*kept, (1.0, rows)][-window if window else 0 :]
        means = rows.reduction == "mean"
        self._count = (decay * self._count + rows.count) if means else 1.0
        self._merged = self._largest = None
        if any(block.outgrown for block in self._blocks):
            self._ready()
        return self

    def _keeps_rows(self) -> bool:
        return any(block.keeps_rows for block in self._blocks)

    def _window(self) -> int | None:
        return None

    @property
    def space(self) -> ParameterSpace:
        """Names and shapes of the parameters.

        Raises:
            StateError: before the first update.
        """
        if self._space is None or not self._history:
            raise StateError(f"{type(self).__name__} has no state yet: call update(rows) or use fit(…).")
        return self._space

    @property
    def rows(self) -> Rows:
        """The rows that `lift` speaks of: all rows of the state where blocks keep rows, else those of the last batch."""
        self._ready()
        assert self._merged is not None
        return self._merged

    def _ready(self) -> None:
        """Hand merged rows to the blocks that keep rows."""
        _ = self.space
        if self._merged is not None:
            return
        rows = [rows for _, rows in self._history]
        self._merged = merge(rows, [weight for weight, _ in self._history])
        for block in self._blocks:
            if block.keeps_rows:
                additive = self._merged.reduction == "sum"
                block.set_rows(block.of(self._merged), self._merged.terms, additive=additive)
        if len(self._history) > 1 and not self._keeps_rows():
            self._history = self._history[-1:]
            self._merged = self._history[0][1]

    def _damping(self, damping: Damping) -> float:
        self._ready()
        rho = absolute(damping, self.largest_eigenvalue)
        prepare([system for block in self._blocks for system in block.systems()], rho)
        return rho

    def largest_eigenvalue(self) -> float:
        """Return λ_max(F), to which relative damping refers."""
        if self._largest is None:
            self._ready()
            self._largest = max(float(block.eigenvalues().max()) for block in self._blocks)
        return self._largest

    def matvec(self, vector: Vector) -> Vector:
        """Return `F v`."""
        self._ready()
        named, restore = self.space.unpack(vector)
        result: dict[str, Tensor] = {}
        for block in self._blocks:
            result.update(block.split(block.matvec(block.join(named))))
        return restore(result)

    @overload
    def solve(self, vector: Vector, damping: Damping, *, info: Literal[False] = False) -> Vector: ...

    @overload
    def solve(self, vector: Vector, damping: Damping, *, info: Literal[True]) -> tuple[Vector, SolveInfo]: ...

    def solve(
        self, vector: Vector, damping: Damping, *, info: bool = False
    ) -> Vector | tuple[Vector, SolveInfo]:
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
        outside, total = torch.zeros(()), torch.zeros(())
        for block in self._blocks:
            x = block.join(named)
            solution, missed = block.solve(x, rho)
            result.update(block.split(solution))
            outside, total = outside + missed.cpu(), total + x.square().sum(-1).cpu()
        share = (outside / torch.where(total > 0, total, 1)).sqrt()
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
        return {name: named[name].reshape(*lead, *shape) for name, shape in self.space.shapes.items()}

    def response(self, jacobian: Rows, damping: Damping, test: Rows | None = None) -> Float[Tensor, "Q R"]:
        """Return `M = J' (F + ρI)⁻¹ Jᵀ / count`: a step moves the outputs by `−η M ∂ℓ`.

        Here ∂ℓ holds the gradients of the loss terms with respect to the outputs, before the division by count.

        Args:
            jacobian: J, rows of the data whose gradients drive the step.
            damping: ρ, absolute or relative.
            test: J' of the outputs whose change is asked for; J itself if None.
        """
        rho = self._damping(damping)
        coefficients = self.rows.coefficients(jacobian) if self._history_is_whole() else None
        left = jacobian if test is None else test
        total = sum(
            block.sandwich(block.of(left), block.of(jacobian), rho, coefficients) for block in self._blocks
        )
        assert isinstance(total, Tensor)
        return total / self._count

    def _history_is_whole(self) -> bool:
        return self._keeps_rows() or len(self._history) == 1

    def to_dense(self) -> Float[Tensor, "P P"]:
        """Form F, in `named_parameters()` order. Memory `P²`."""
        self._ready()
        P = self.space.size
        index = self.space.unflatten(torch.arange(P, device=self.rows.device)[None])
        dense = torch.zeros(P, P, dtype=self.rows.dtype, device=self.rows.device)
        for block in self._blocks:
            at = block.join(index)[0]
            dense[at[:, None], at[None, :]] = block.to_dense()
        return dense

    def trace(self) -> float:
        """Return tr F."""
        self._ready()
        return sum(block.trace() for block in self._blocks)

    def eigvalsh(self) -> Float[Tensor, " P"]:
        """Return all P eigenvalues, ascending."""
        self._ready()
        values = torch.cat([block.eigenvalues() for block in self._blocks])
        return torch.cat([values.new_zeros(self.space.size - len(values)), values]).sort().values

    def logdet(self, damping: Damping) -> float:
        """Return log det(F + ρI); −∞ where that is singular.

        Raises:
            NotPositiveDefinite: if F + ρI has a negative eigenvalue.
        """
        rho = self._damping(damping)
        total = 0.0
        for block in self._blocks:
            values = block.eigenvalues().double()
            lowest = float(values.min()) + rho
            if lowest < 0:
                raise NotPositiveDefinite(
                    f"F + ρI of the {self.key} structure, layers {block.name}, has the eigenvalue {lowest:.3g} at "
                    f"ρ = {rho:.3g}. Use a damping above {-lowest + rho:.3g}, or a positive structure."
                )
            zeros = block.size - len(values)
            total += float((values + rho).log().sum())
            if zeros:
                total += zeros * float(torch.tensor(rho, dtype=torch.float64).log())
        return total

    def state_dict(self) -> dict[str, Any]:
        """Return the state; configuration is not part of it."""
        from curvlab.fisher.serialise import pack_rows

        _ = self.space
        return {
            "key": self.key,
            "history": [(weight, pack_rows(rows)) for weight, rows in self._history],
            "count": self._count,
            "blocks": [block.state() for block in self._blocks],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state into a structure of the same class and configuration.

        Raises:
            ValueError: if the state is that of another structure.
        """
        from curvlab.fisher.serialise import unpack_rows

        if state["key"] != self.key:
            raise ValueError(f"This is the state of a {state['key']!r} structure, not of {self.key!r}.")
        self._history = [(weight, unpack_rows(packed)) for weight, packed in state["history"]]
        last = self._history[-1][1]
        self._space, self._count = last.space, state["count"]
        self._blocks = self._make_blocks(last)
        for block, saved in zip(self._blocks, state["blocks"], strict=True):
            block.restore(saved)
        self._merged = self._largest = None
