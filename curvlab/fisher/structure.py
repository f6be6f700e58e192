"""The verbs that every structure shares.

    F ≈ SᵀS,   S = Λ^{1/2} J / √count

A structure is a list of blocks (`curvlab.fisher.block`). Vectors are parameters by name or one flat vector in
`named_parameters()` order; a leading axis is a block of vectors. Damping is `F + ρI`, never folded in silently.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf, log
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from curvlab.errors import NotPositiveDefinite, OutsideRange
from curvlab.fisher.block import Block, RowRelation
from curvlab.fisher.damping import Damping, SolveInfo, absolute
from curvlab.fisher.fitting import fit
from curvlab.fisher.kronecker import share_inverses
from curvlab.fisher.moment import Invert, inverses
from curvlab.fisher.power import Damps, Power, check_power
from curvlab.fisher.state import State
from curvlab.fisher.system import decompose, prepare
from curvlab.nn.modes import without_autocast
from curvlab.rows import Rows
from curvlab.rows.batches import as_batches
from curvlab.rows.layer import LayerRows
from curvlab.rows.loss import DiagonalRoot, Kind, RowPer
from curvlab.rows.parameters import Layout, Vector
from curvlab.rows.passes import Engine, Pass
from curvlab.rows.processes import Processes
from curvlab.rows.samples import NodeChoice
from curvlab.rows.sharded import whole
from curvlab.rows.sweep import PickOutput
from curvlab.tools.looks import REGISTRIES, WITHOUT_STRUCTURE, Look, distinct
from curvlab.tools.registry import Registry

Own = TypeVar("Own", bound="Structure")

STRUCTURES: Registry[type[Structure]] = Registry(
    "structure",
    "curvlab.structures",
    form="a Structure class",
    fits=lambda thing: isinstance(thing, type) and issubclass(thing, Structure),
)
"""Every structure by its key, ours and those of installed packages, which add to them by entry points of the group
``curvlab.structures``, and any other as ``module:Class``; the options, the tests and the documentation read this."""
REGISTRIES.append(STRUCTURES)

OUTSIDE_TOLERANCE = 1e-3
"""Share of a right-hand side's norm outside range(F) above which an undamped solve warns."""


class Structure(State):
    """An approximation of the Fisher matrix; subclasses say which blocks it has.

    Configuration is given at construction and frozen; the state comes from `update` or `fit`.
    """

    look: ClassVar[Look]
    """How it is drawn in figures."""

    def __init_subclass__(
        cls, key: str | None = None, summary: str = "", look: Look | None = None, **kwargs: Any
    ) -> None:
        """Register a subclass that has a key.

        Args:
            key: what options, tables and results call the structure.
            summary: what it is, in a few words.
            look: how it is drawn in figures; colour and marker that no other structure has if None.
            kwargs: of other base classes.

        Warns:
            UserWarning: another structure has that colour or marker; a spare one is taken instead.
        """
        super().__init_subclass__(**kwargs)
        if key is not None:
            cls.key, cls.summary = key, summary
            STRUCTURES.register(key, cls)
            others = {name: other.look for name, other in STRUCTURES.loaded.items() if name != key}
            cls.look = distinct(key, look, others | WITHOUT_STRUCTURE)

    @classmethod
    @without_autocast()
    def fit(
        cls: type[Own],
        model: nn.Module,
        loss: nn.Module,
        data: Sequence[Any] | Iterable[Sequence[Any]],
        *,
        kind: Kind = "exact",
        draws: int = 1,
        generator: torch.Generator | None = None,
        rows: RowPer | None = None,
        nodes: NodeChoice = None,
        output: PickOutput = None,
        engine: Engine = "auto",
        progress: bool = False,
        checkpoint: str | Path | None = None,
        checkpoint_every: float = 60.0,
        group: ProcessGroup | None = None,
        **options: Any,
    ) -> Own:
        """Return the structure of a whole data set; one batch and many batches give the same, but for rows of batches.

        Args:
            model: any module whose samples do not interact; one under `fully_shard` is gathered in every process.
            loss: a module of `curvlab.rows.loss.LOSSES` or of one's own, see `curvlab.sqrt_fisher`.
            data: one pair (inputs, targets), or an iterable of pairs such as a DataLoader; an iterator that can be
                passed once only will not do for a structure that goes over the data twice.
            kind: "exact", "ggn", "mc" or "empirical", see `curvlab.sqrt_fisher`.
            draws: random rows of a loss term, for "mc" and for signs.
            generator: source of the draws, required for them; every pass over the data starts from its present state.
            rows: what a row stands for, where a sample has several loss terms: "term", "sample", "signs" or "batch", see
                `curvlab.sqrt_fisher`.
            nodes: of a graph, those that carry rows: a mask, indices, or a function that chooses in every batch anew.
            output: which tensor of a structured output: a key, an attribute, an index or a function.
            engine: "auto", "backpack" or "autograd", see `curvlab.jacobian`.
            progress: whether to show it, on stderr.
            checkpoint: file that keeps the state, so that a fit that was interrupted goes on when it is called again, and
                ends in the same state to the last bit. It stays when the fit is done.
            checkpoint_every: seconds between two writings.
            group: processes that call this with a part of the data each, such as `torch.distributed.group.WORLD`; all get the
                structure of all data. Batches may differ in number. Generators should be in states of their own, for draws
                that are independent.
            options: the structure's own.

        Raises:
            ValueError: if the data are empty, cannot be passed as often as needed, or differ between passes; for a checkpoint or a
                window of several processes.
            StateError: if the checkpoint is damaged, is that of another fit, or cannot be written; if another process failed.
            UnsupportedModel: see `curvlab.sqrt_fisher`; for dropout and batch normalisation in training mode, too.
        """
        structure = cls(**options)
        how = Pass(kind, draws, generator, nodes, output, engine, keep_jacobian=not structure.averages, rows=rows)
        kept = None if checkpoint is None else (Path(checkpoint), checkpoint_every)
        fit(structure, whole(model), loss, as_batches(data), how, kept, Processes.of(group), shows=progress)
        structure.forget_batch()
        return structure

    def _damping(self, damping: Damping) -> float:
        self._ready()
        rho = absolute(damping, self.largest_eigenvalue)
        self._prepare(rho)
        return rho

    def _inverse(self, damping: Damping, power: float, damps: Damps) -> Power:
        """Return the function that a solve applies, with the absolute ρ, once all factorisations are made in batched calls."""
        check_power(power, damps)
        if power == 1:
            return Power(1.0, inverse=True, damping=self._damping(damping))
        self._ready()
        decompose([system for block in self._blocks for system in block.systems()])
        of = power if damps == "power" else 1.0
        rho = absolute(damping, lambda: self.largest_eigenvalue() ** of)
        return Power(power, inverse=True, damping=rho, damps=damps)

    def _prepare(self, damping: float) -> None:
        """Factorise what solves of all blocks need, so that matrices of equal size go in one batched call."""
        prepare([system for block in self._blocks for system in block.systems()], damping)
        self.share_inverses(damping, inverses)

    def work(self, layout: Layout, *, table: bool = False) -> float:  # noqa: ARG002
        """Return roughly how many operations a layer's block takes in every factorisation, to share layers out by it.

        Args:
            layout: of its parameters.
            table: whether its units are looked up, as those of an embedding.
        """
        return float(layout.size)

    def share_inverses(self, damping: float, invert: Invert) -> None:
        """Make the inverses of damped Kronecker factors that are due, as several processes can by sharing the work.

        Args:
            damping: ρ.
            invert: inverts factors, such as `curvlab.fisher.moment.inverses`.
        """
        share_inverses(self._blocks, damping, invert)

    def largest_eigenvalue(self) -> float:
        """Return λ_max(F), to which relative damping refers."""
        if self._largest is None:
            self._ready()
            self._largest = max(0.0, *(block.largest_eigenvalue() for block in self._blocks))
        return self._largest

    def matvec(self, vector: Vector, *, power: float = 1.0) -> Vector:
        """Return `F v`, or `F^p v` for another power p > 0.

        Raises:
            NotPositiveDefinite: if there is a negative eigenvalue, and p no whole number.
            NotImplementedError: for another power, if a block does not implement `Block.transform`.
        """
        check_power(power)
        self._ready()
        named, restore = self._unpacked(vector)
        result: dict[str, Tensor] = {}
        for block in self._blocks:
            x = block.join(named)
            block.put(block.matvec(x) if power == 1 else block.transform(x, Power(power)), result)
        return restore(result)

    def _unpacked(self, vector: Vector) -> tuple[dict[str, Tensor], Callable[[Mapping[str, Tensor]], Vector]]:
        """Return a vector by name, in the type of the rows, and the function that brings a result back to the form given."""
        dtype, (named, restore) = self.dtype, self.space.unpack(vector)
        for name, value in named.items():
            if torch.promote_types(value.dtype, dtype) != dtype:
                raise ValueError(
                    f"The vector is {value.dtype} at {name!r}, the structure {dtype}. Convert the vector, or the rows before "
                    f"they are added: rows.to({value.dtype})."
                )
        return {name: value.to(dtype) for name, value in named.items()}, restore

    @overload
    def solve(
        self,
        vector: Vector,
        damping: Damping,
        *,
        power: float = 1.0,
        damps: Damps = "matrix",
        info: Literal[False] = False,
    ) -> Vector: ...

    @overload
    def solve(
        self, vector: Vector, damping: Damping, *, power: float = 1.0, damps: Damps = "matrix", info: Literal[True]
    ) -> tuple[Vector, SolveInfo]: ...

    def solve(
        self, vector: Vector, damping: Damping, *, power: float = 1.0, damps: Damps = "matrix", info: bool = False
    ) -> Vector | tuple[Vector, SolveInfo]:
        """Return `(F + ρI)⁻¹ v`, for ρ = 0 the pseudo-inverse `F⁺ v`; for other powers p likewise.

        Args:
            vector: right-hand side.
            damping: ρ, absolute or relative ("rel:1e-6", of λ_max, or of its power where that is what is damped).
            power: p > 0.
            damps: "matrix" for `(F + ρI)^{-p}`, as in Shampoo; "power" for `(F^p + ρI)⁻¹`, as Adam's ε beside the root.
            info: whether to return a `SolveInfo`, too.

        Raises:
            NotPositiveDefinite: if a power that is no whole number would be taken of a negative eigenvalue.
            NotImplementedError: for another power, if a block does not implement `Block.transform`.

        Warns:
            IllConditioned: if a system needed more than a Cholesky factorisation.
            OutsideRange: if ρ = 0 and more than 1e-3 of the norm of v lies outside range(F).

        Cost: for powers other than 1 an eigendecomposition, kept until the next update.
        """
        inverse = self._inverse(damping, power, damps)
        rho = inverse.damping
        named, restore = self._unpacked(vector)
        result: dict[str, Tensor] = {}
        outside, total = [], []
        for block in self._blocks:
            x = block.join(named)
            solution, missed = block.invert(x, inverse)
            block.put(solution, result)
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

        Raises:
            StateError: if the state keeps no rows and the last batch is forgotten.
        """
        rows = self.rows
        if coefficients.ndim not in (1, 2) or coefficients.shape[-1] != rows.R:
            raise ValueError(f"Coefficients are [R] or [K, R] with R = {rows.R}, got {tuple(coefficients.shape)}.")
        if coefficients.dtype != rows.dtype:
            raise ValueError(
                f"The coefficients are {coefficients.dtype}, the structure {rows.dtype}. Convert the former."
            )
        rho = self._damping(damping)
        c = coefficients.reshape(-1, rows.R)
        named: dict[str, Tensor] = {}
        for block in self._blocks:
            block.put(block.lift(c, block.of(rows), rho), named)
        lead = coefficients.shape[:-1]
        return {name: named[name].reshape((*lead, *shape)) for name, shape in self.space.shapes.items()}

    def direction(
        self,
        gradient: Mapping[str, Tensor],
        damping: Damping,
        per_sample_gradients: Callable[[str], LayerRows | None] | None = None,
        *,
        power: float = 1.0,
        damps: Damps = "matrix",
    ) -> dict[str, Tensor]:
        """Return `(F + ρI)⁻¹g` as `solve` does, by a cheaper route where one is open and without its report.

        Args:
            gradient: g by name; where other processes hold blocks (`hold`), only of the parameters of those that are here.
            damping: ρ, absolute or relative.
            per_sample_gradients: returns, for the name of a parameter, rows of its layer that add up to g there, one a
                sample: the layer's inputs, and the gradients at its outputs; None if there are none. Blocks with Kronecker
                factors multiply with their inverses what takes fewer operations, the factors of these rows or g; blocks of
                rows with the same inputs never form g. All agree to rounding. For the first power only.
            power: see `solve`.
            damps: see `solve`.
        """
        inverse = self._inverse(damping, power, damps)
        found: dict[str, Tensor] = {}
        for block in self._blocks:
            layers = None if power != 1 else self._per_sample_gradients(block, inverse.damping, per_sample_gradients)
            if layers is not None:
                found.update({name: value[None] for name, value in block.solve_sum(layers, inverse.damping).items()})
            else:
                solution, _ = block.invert(block.join({name: gradient[name][None] for name in block.names}), inverse)
                block.put(solution, found)
        return {name: found[name][0] for name in self.space.shapes if name in found}

    def _per_sample_gradients(
        self, block: Block, damping: float, per_sample_gradients: Callable[[str], LayerRows | None] | None
    ) -> tuple[LayerRows, ...] | None:
        """Return the rows that add up to a block's share of a gradient, if it takes whole layers and wants them."""
        if per_sample_gradients is None or not block.prefers_per_sample_gradients(block.of(self.shapes), damping):
            return None
        layers = [per_sample_gradients(part.names[0]) for part in block.parts]
        fitting = [layer for layer, part in zip(layers, block.parts, strict=True) if layer and layer.layout == part]
        return tuple(fitting) if len(fitting) == len(layers) else None

    def response(
        self,
        jacobian: Rows,
        damping: Damping,
        test: Rows | None = None,
        *,
        power: float = 1.0,
        damps: Damps = "matrix",
    ) -> Float[Tensor, "Q R"]:
        """Return `M = J' (F + ρI)⁻¹ Jᵀ / count`: a step moves the outputs by `−η M ∂ℓ`.

        Here ∂ℓ holds the gradients of the loss terms with respect to the outputs, before the division by `count`.

        Args:
            jacobian: J, rows of the data whose gradients drive the step; any rows will do.
            damping: ρ, absolute or relative.
            test: J' of the outputs whose change is asked for; J itself if None.
            power: of the matrix that is inverted, see `solve`; others than 1 form the rows of one block after the other.
            damps: see `solve`.

        Raises:
            ValueError: if the rows belong to other parameters.
        """
        self._ready()
        left = jacobian if test is None else test
        for rows in (left, jacobian):
            if dict(rows.space.shapes) != dict(self.space.shapes):
                raise ValueError("The rows belong to other parameters than the structure's state.")
        if power != 1:
            inverse = self._inverse(damping, power, damps)
            pairs = [block.sandwich_power(block.of(left), block.of(jacobian), inverse) for block in self._blocks]
            return torch.stack(pairs).sum(0) / self.count
        rho = absolute(damping, self.largest_eigenvalue)
        relation = self._relation(jacobian)
        if self.averages or relation.behind(rho) is None:
            self._prepare(rho)
        products = [block.sandwich(block.of(left), block.of(jacobian), rho, relation) for block in self._blocks]
        return torch.stack(products).sum(0) / self.count

    def _relation(self, right: Rows) -> RowRelation:
        """Return what rows have to do with the rows that `lift` speaks of."""
        rows = self._merged or self._latest
        if rows is None:
            return RowRelation(None, None)
        if right is rows:
            return RowRelation(DiagonalRoot(torch.ones(*right.shape, 1, dtype=right.dtype, device=right.device)), None)
        root = rows.root if rows.stems_from(right) else None
        return RowRelation(None if root is None else root.inverse(), root)

    def to_dense(self) -> Float[Tensor, "P P"]:
        """Form F, in `named_parameters()` order. Memory `P²`."""
        self._ready()
        P, device = self.space.size, self.device
        index = self.space.unflatten(torch.arange(P, dtype=torch.float64, device=device)[None])
        dense = torch.zeros(P, P, dtype=self.dtype, device=device)
        for block in self._blocks:
            at = block.join(index)[0].long()
            dense[at[:, None], at[None, :]] = block.to_dense()
        return dense

    def trace(self) -> float:
        """Return tr F."""
        self._ready()
        return sum(block.trace() for block in self._blocks)

    def eigvalsh(self) -> Float[Tensor, " P"]:
        """Return all P eigenvalues, ascending, in float64; those that count as null are exactly 0."""
        self._ready()
        values = torch.cat([block.eigenvalues().double() for block in self._blocks])
        return torch.cat([values.new_zeros(self.space.size - len(values)), values]).sort().values

    def condition_number(self) -> float:
        """Return the largest condition number of a block on its range, of which undamped solves lose the digits."""
        self._ready()
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
