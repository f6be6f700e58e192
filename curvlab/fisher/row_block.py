"""Stacks of equal exact blocks, solved on the smaller of two sides in one batched call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.fisher.block import RowRelation
from curvlab.fisher.power import Power
from curvlab.fisher.side import RowSide, SidedBlock
from curvlab.fisher.stack import Cut, FactoredStack, RowStack, Stack, WholeLayers
from curvlab.fisher.system import System, rank_tolerance
from curvlab.rows.layer import LayerRows
from curvlab.rows.loss import OutputRoot
from curvlab.rows.parameters import Layout
from curvlab.rows.products import cached, chunks
from curvlab.rows.side_by_side import combine


class RowBlock(SidedBlock):
    """`F_b = X_bᵀX_b`, exact, for B equal blocks, stored and solved on their smaller side.

    On the row side, with `K_b = X_b X_bᵀ`, the push-through identity `(F_b + ρI)⁻¹X_bᵀ = X_bᵀ(K_b + ρI)⁻¹` does everything.

    Args:
        name: names of the layers, for messages.
        parts: see `Block`.
        config: see `RowSide`.
        cut: how the layers fall into equal blocks; one block if None.
    """

    def __init__(self, name: str, parts: Sequence[Layout], config: RowSide, cut: Cut | None = None) -> None:
        self.cut = cut or WholeLayers()
        super().__init__(name, parts, config, self.cut.index)
        self._reset()

    @property
    def count(self) -> int:
        """Number of equal blocks B."""
        return self.cut.count

    def _reset(self) -> None:
        self._root: Stack | None = None
        self._system: System | None = None

    def _row_size(self, layers: Sequence[LayerRows]) -> int:
        return self.cut.row_size(layers)

    def _form(self, layers: Sequence[LayerRows]) -> Float[Tensor, "B w w"]:
        return self.cut.moment(layers)

    @property
    def root(self) -> Stack:
        """The matrices X_b, on the row side."""
        if self._root is None:
            self._root = self.cut.root(self.layers)
        return self._root

    @property
    def system(self) -> System:
        """The matrices that are solved: `K_b` on the row side, `F_b` on the parameter side."""
        if self._system is None:
            self._system = self._row_system() if self.keeps_rows else self._make_system(self.average.value)
        return self._system

    def _make_system(self, matrix: Float[Tensor, "B n n"]) -> System:
        return System(matrix, self.cut.title(self.name), self.config.rtol)

    def _row_system(self) -> System:
        root = self.root
        return System(
            root.gram(),
            self.cut.title(self.name),
            self.config.rtol,
            partial(self.cut.precise_gram, self.layers),
            scaled=root.scaled,
            symmetric=root.symmetric,
        )

    def systems(self) -> list[System]:  # noqa: D102
        return [self.system]

    def _columns(self, x: Float[Tensor, "K P_b"]) -> Float[Tensor, "B w K"]:
        """Lay vectors out as right-hand sides on the parameter side."""
        return x.view(len(x), self.count, self.width).permute(1, 2, 0)

    def matvec(self, x: Float[Tensor, "K P_b"]) -> Float[Tensor, "K P_b"]:  # noqa: D102
        if self.keeps_rows:
            return self.root.combine(self.root.times(x))
        return _vectors(self.average.value @ self._columns(x))

    def solve(self, x: Float[Tensor, "K P_b"], damping: float) -> tuple[Float[Tensor, "K P_b"], Float[Tensor, " K"]]:
        """Solve; on the row side with damping as `(x − Xᵀ(K + ρI)⁻¹Xx)/ρ`, which cancels in float32: see `lift`."""
        if not self.keeps_rows:
            solution = _vectors(self.system.solve(self._columns(x), damping))
            return solution, x.new_zeros(len(x)) if damping else self._null_energy(x)
        seen = self.root.times(x)
        if damping > 0:
            return (x - self._combined(self.system.solve(seen, damping))) / damping, x.new_zeros(len(x))
        eigen = self.system.eigen
        once = eigen.coordinates(seen.mT) * eigen.inverse(0.0)[:, None]
        both = torch.cat([once, once * eigen.inverse(0.0)[:, None]], dim=1) @ eigen.vectors.mT
        projection, solution = self.root.combine(both.mT.to(x)).split(len(x))
        return solution, (x - projection).square().sum(-1)

    def _combined(self, c: Float[Tensor, "B n K"]) -> Float[Tensor, "K P_b"]:
        """Combine rows with the solution of a system, to a step."""
        return self.root.combine(c)

    def _null_energy(self, x: Float[Tensor, "K P_b"]) -> Float[Tensor, " K"]:
        """Return the squared norm of x in null directions of the parameter side."""
        eigen = self.system.eigen
        energy = eigen.coordinates(self._columns(x).mT).square() * eigen.null[:, None]
        return energy.sum((0, 2)).to(x)

    def transform(self, x: Float[Tensor, "K P_b"], power: Power) -> Float[Tensor, "K P_b"]:
        """Return `f(F) x`; on the row side by `f(F) = f(0) + Xᵀ U (f(λ) − f(0))/λ Uᵀ X`, for `K = U λ Uᵀ`."""
        eigen, outside = self.system.eigen, power.outside
        values = power.of(eigen.values, eigen.null, self.name)
        if not self.keeps_rows:
            y = eigen.coordinates(self._columns(x).mT) * values[:, None]
            return _vectors((y @ eigen.vectors.mT).mT).to(x)
        noise = rank_tolerance(eigen.values, None, eigen.values.shape[-1], torch.float64)
        seen = ~eigen.null if power.drops else eigen.values > noise
        scale = torch.where(seen, (values - outside) / torch.where(seen, eigen.values, 1), 0)
        y = eigen.coordinates(self.root.times(x).mT) * scale[:, None]
        return self.root.combine((y @ eigen.vectors.mT).mT.to(x)) + outside * x

    def prefers_per_sample_gradients(self, layers: tuple[LayerRows, ...], damping: float) -> bool:  # noqa: ARG002, D102
        return self.cut.sums and self.keeps_rows and damping > 0

    def solve_sum(self, layers: tuple[LayerRows, ...], damping: float) -> dict[str, Tensor]:
        """Solve on the row side without forming x, if the rows share the inputs of the state's."""
        root = self.root if self.keeps_rows else None
        if not (isinstance(root, FactoredStack) and root.shares_inputs(layers)):
            return super().solve_sum(layers, damping)
        c = self.system.solve(root.times_total(layers), damping)
        return root.taken_from(layers, c, 1 / damping)

    def lift(self, c: Float[Tensor, "K R"], layers: tuple[LayerRows, ...], damping: float) -> Float[Tensor, "K P_b"]:
        """Return `(F + ρI)⁻¹Sᵀc`; on the row side `Xᵀ(K + ρI)⁻¹c`, accurate at any damping."""
        if self.keeps_rows:
            return self._combined(self.system.solve(self.root.coefficients(c), damping))
        combined = combine(layers, c)
        return self.solve(combined if self.index is None else combined[:, self.index], damping)[0]

    def sandwich(  # noqa: D102
        self,
        left: tuple[LayerRows, ...],
        right: tuple[LayerRows, ...],
        damping: float,
        relation: RowRelation,
    ) -> Float[Tensor, "Q R"]:
        same = all(x is y for x, y in zip(left, right, strict=True))
        a = self.cut.rows(left)
        b = a if same else self.cut.rows(right)
        if not self.keeps_rows:
            return a.contract(self.system.solve(b.dense().mT, damping))
        if (output_root := relation.behind(damping)) is not None:
            return self._behind(output_root, a, b, damping)
        seen = a.against(self.root)
        if relation.coefficients is not None and not self.root.shortened:
            return relation.coefficients.columns(self.system.solve(seen.mT, damping).sum(0).T)
        others = seen if a is b else b.against(self.root)
        return self.system.sandwich(seen, others, damping, lambda: a.against(b), summed=True)

    def _behind(self, output_root: OutputRoot, left: RowStack, right: RowStack, damping: float) -> Float[Tensor, "Q R"]:
        """Return `J'(F + ρI)⁻¹Jᵀ` for `F = (A·J)ᵀA·J`, given A, J' and J, some of the equal blocks at a time."""
        rows = self.layers[0].count
        shares = [
            self._share(output_root, left, right, damping, part)
            for part in chunks(self.count, rows**2, cached(self.layers[0].row_factors[-1].device))
        ]
        return shares[0] if len(shares) == 1 else torch.stack(shares).sum(0)

    def _share(
        self, output_root: OutputRoot, left: RowStack, right: RowStack, damping: float, part: slice
    ) -> Float[Tensor, "Q R"]:
        """Return the part of some of the equal blocks in `_behind`.

        S is A·J without the rows that A has to spare, which changes `SᵀS` in nothing. What it decomposes is not kept.
        """

        def precise() -> Tensor:
            exact = output_root.to(torch.float64)
            return exact.compressed(exact.compressed(self._row_system().precise()[part]).mT)

        products = left.against(right, part)
        own = products if left is right else right.against(right, part)
        seen = output_root.reduced(own).mT.contiguous()
        title = self.cut.title(self.name)
        system = System(output_root.reduced(seen), title, self.config.rtol, precise, symmetric=True)
        others = seen if left is right else output_root.reduced(products.mT).mT
        return system.sandwich(others, seen, damping, lambda: products, summed=True)

    def to_dense(self) -> Float[Tensor, "P_b P_b"]:  # noqa: D102
        stack = self._form(self.layers) if self.keeps_rows else self.average.value
        dense: Tensor = stack[0] if len(stack) == 1 else torch.block_diag(*stack)
        return dense

    def eigenvalues(self) -> Float[Tensor, " k"]:
        """Return the `min(n, w)` eigenvalues of every block that need not be zero."""
        eigen = self.system.eigen
        values = torch.where(eigen.null, 0, eigen.values)
        return values[:, -min(self.width, values.shape[1]) :].flatten()

    def largest_eigenvalue(self) -> float:  # noqa: D102
        return self.system.largest()

    def condition_number(self) -> float:
        """Return the largest condition number of a block on its range."""
        own = self.root.condition_number() if self.keeps_rows and self.config.rtol is None else None
        if own is not None:
            return own
        eigen = self.system.eigen
        smallest = torch.where(eigen.null, torch.inf, eigen.values).amin(-1)
        return max(1.0, float((eigen.values.amax(-1) / smallest).max()))

    def trace(self) -> float:  # noqa: D102
        if not self.keeps_rows:
            return float(self.average.value.diagonal(dim1=1, dim2=2).sum())
        diagonals = [layer.diagonal() for layer in self.layers]
        kept = diagonals if self.index is None else [diagonals[0][self.index]]
        return float(sum(diagonal.sum() for diagonal in kept))


def _vectors(columns: Float[Tensor, "B w K"]) -> Float[Tensor, "K P_b"]:
    return columns.permute(2, 0, 1).flatten(1)
