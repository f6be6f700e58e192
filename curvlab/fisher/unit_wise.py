"""The unit-wise Fisher matrix: one block an output channel, a scale-shift pair, a row of an embedding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.fisher.block import Block, Relation
from curvlab.fisher.full import _RowStructure
from curvlab.fisher.row_block import RowBlock
from curvlab.fisher.system import System
from curvlab.fisher.unit_rows import (
    PlainRoots,
    UnitRoots,
    contract_units,
    is_plain,
    plain_factors,
    unit_roots,
)
from curvlab.rows import Rows
from curvlab.rows.layer import KroneckerRows, LayerRows
from curvlab.rows.loss import OutputFactor
from curvlab.rows.products import cached, chunks


def _gram_in_float64(layer: LayerRows) -> Float[Tensor, "U n n"]:
    return unit_roots(layer.to(torch.float64)).gram()


class UnitBlock(RowBlock):
    """The units of one layer, a stack of equal blocks solved in one batched call."""

    def _reset(self) -> None:
        super()._reset()
        self._roots: UnitRoots | None = None

    @property
    def roots(self) -> UnitRoots:
        """The units' rows."""
        if self._roots is None:
            self._roots = unit_roots(self.layers[0])
        return self._roots

    @property
    def _width(self) -> int:
        return self.parts[0].width

    @property
    def _units(self) -> int:
        return self.parts[0].units

    def prefers_summands(self, layers: tuple[LayerRows, ...], damping: float) -> bool:  # noqa: ARG002, D102
        return False

    def _side_size(self) -> int:
        return self._width

    def _row_size(self, layers: Sequence[LayerRows]) -> int:
        return layers[0].shape[1] if is_plain(layers[0]) else layers[0].count

    def _form(self, layers: Sequence[LayerRows]) -> Tensor:
        return unit_roots(layers[0]).moment()

    @property
    def _title(self) -> str:
        return f"units of layer {self.name!r}"

    def _row_system(self) -> System:
        """Return the stack of row sides; samples that hardly excite a unit have short rows there, but not null ones."""
        again = partial(_gram_in_float64, self.layers[0])
        return System(
            self.roots.gram(), self._title, self.config.rtol, again, scaled=isinstance(self.roots, PlainRoots)
        )

    def _by_unit(self, x: Float[Tensor, "K P_b"]) -> Float[Tensor, "K U width"]:
        return x.reshape(len(x), self._units, self._width)

    def matvec(self, x: Float[Tensor, "K P_b"]) -> Float[Tensor, "K P_b"]:  # noqa: D102
        units = self._by_unit(x)
        if self.keeps_rows:
            return self.roots.combine(self.roots.times(units)).flatten(1)
        return torch.einsum("uij,kuj->kui", self.average.value, units).flatten(1)

    def solve(self, x: Float[Tensor, "K P_b"], damping: float) -> tuple[Float[Tensor, "K P_b"], Float[Tensor, " K"]]:
        """Solve every unit on its smaller side; see `RowBlock.solve`."""
        units = self._by_unit(x)
        nothing = x.new_zeros(len(x))
        if not self.keeps_rows:
            rhs = units.permute(1, 2, 0)
            solution = self.system.solve(rhs, damping).permute(2, 0, 1).flatten(1)
            return solution, nothing if damping else self._null_energy(units)
        seen = self.roots.times(units)
        if damping > 0:
            return (x - self.roots.combine(self.system.solve(seen, damping)).flatten(1)) / damping, nothing
        eigen = self.system.eigen
        once = eigen.coordinates(seen.mT) * eigen.inverse(0.0)[:, None]
        both = torch.cat([once, once * eigen.inverse(0.0)[:, None]], dim=1) @ eigen.vectors.mT
        projection, solution = self.roots.combine(both.mT.to(x)).flatten(1).split(len(x))
        return solution, (x - projection).square().sum(-1)

    def _null_energy(self, units: Float[Tensor, "K U width"]) -> Float[Tensor, " K"]:
        eigen = self.system.eigen
        energy = eigen.coordinates(units.transpose(0, 1)).square() * eigen.null[:, None]
        return energy.sum((0, 2)).to(units)

    def lift(self, c: Float[Tensor, "K R"], layers: tuple[LayerRows, ...], damping: float) -> Float[Tensor, "K P_b"]:
        """Return `(F + ρI)⁻¹Sᵀc`, unit by unit on the row side."""
        if not self.keeps_rows:
            return super().lift(c, layers, damping)
        return self.roots.combine(self.system.solve(self.roots.coefficients(c), damping)).flatten(1)

    def sandwich(  # noqa: D102
        self,
        left: tuple[LayerRows, ...],
        right: tuple[LayerRows, ...],
        damping: float,
        relation: Relation,
    ) -> Float[Tensor, "Q R"]:
        a, b = left[0], right[0]
        stacked = self.keeps_rows and not is_plain(self.layers[0])
        if is_plain(a) and is_plain(b) and not stacked:
            return contract_units(a, self._kernels(a, b, damping), b)
        if not self.keeps_rows:
            solved = self.system.solve(b.unit_stack().mT, damping)
            return (a.unit_stack() @ solved).sum(0)
        left_stack = a.unit_stack()
        right_stack = left_stack if a is b else b.unit_stack()
        if (factor := relation.behind(damping)) is not None:
            total = left_stack.new_zeros(a.count, b.count)
            for part in chunks(self._units, b.count**2, cached(total.device)):
                some = right_stack[part]
                total += self._share(factor, some if a is b else left_stack[part], some, damping, part)
            return total
        x = self.roots.times(left_stack.transpose(0, 1)).mT
        if stacked and relation.coefficients is not None:
            return relation.coefficients.columns(self.system.solve(x.mT, damping).sum(0).T)
        y = x if a is b else self.roots.times(right_stack.transpose(0, 1)).mT
        return self.system.sandwich(x, y, damping, lambda: left_stack @ right_stack.mT, summed=True)

    def _share(
        self,
        factor: OutputFactor,
        left: Float[Tensor, "U Q width"],
        right: Float[Tensor, "U R width"],
        damping: float,
        part: slice,
    ) -> Float[Tensor, "Q R"]:
        """Return the sum over some units of `J'(F_u + ρI)⁻¹Jᵀ` for `F_u = (A·J)ᵀA·J`, given A, J' and J."""
        products = left @ right.mT
        own = products if left is right else right @ right.mT
        system, x, y = self._behind(factor, products, own, part)
        return system.sandwich(x, y, damping, lambda: products, summed=True)

    def _kernels(self, left: KroneckerRows, right: KroneckerRows, damping: float) -> Float[Tensor, "U N M"]:
        """Return `a' (F_u + ρI)⁻¹ aᵀ` for every unit, of inputs a' and a."""
        a, _ = plain_factors(left)
        b, g = plain_factors(right)
        O = self._units // len(a)  # noqa: E741
        if not self.keeps_rows:
            solved = self.system.solve(b.mT.repeat_interleave(O, dim=0), damping)
            return a.repeat_interleave(O, dim=0) @ solved
        roots = self.roots
        assert isinstance(roots, PlainRoots)
        s = roots.s.T[:, None]
        x = (a @ roots.a.mT).repeat_interleave(O, dim=0) * s
        if torch.equal(b, roots.a) and bool(((roots.s > 0) | (g == 0).all(0)).all()):
            return self.system.solve(x.mT, damping).mT * torch.where(s > 0, 1 / torch.where(s > 0, s, 1), 0)
        y = x if left is right else (b @ roots.a.mT).repeat_interleave(O, dim=0) * s
        return self.system.sandwich(x, y, damping, lambda: (a @ b.mT).repeat_interleave(O, dim=0))

    def to_dense(self) -> Float[Tensor, "P_b P_b"]:  # noqa: D102
        dense: Tensor = torch.block_diag(*(self._form(self.layers) if self.keeps_rows else self.average.value))
        return dense

    def eigenvalues(self) -> Float[Tensor, " k"]:  # noqa: D102
        eigen = self.system.eigen
        values = torch.where(eigen.null, 0, eigen.values)
        return values[:, -min(self._width, values.shape[1]) :].flatten()

    def condition_number(self) -> float:
        """Return the largest condition number of a unit; of its inputs alone where rows are scaled to one norm."""
        if self.keeps_rows and isinstance(self.roots, PlainRoots) and self.config.rtol is None:
            inputs = torch.nn.functional.normalize(self.roots.a.double(), dim=-1)
            values = torch.linalg.svdvals(inputs)[..., : inputs.shape[1]].square()
            if inputs.shape[2] >= inputs.shape[1] and bool((values[..., -1] > 0).all()):
                return float((values[..., 0] / values[..., -1]).max())
        eigen = self.system.eigen
        smallest = torch.where(eigen.null, torch.inf, eigen.values).amin(-1)
        return max(1.0, float((eigen.values.amax(-1) / smallest).max()))

    def trace(self) -> float:  # noqa: D102
        if self.keeps_rows:
            return super().trace()
        return float(self.average.value.diagonal(dim1=1, dim2=2).sum())


class UnitWise(_RowStructure, key="unit-wise", summary="one block of F a unit"):
    """One block of `F` a unit: an output channel with its incoming weights and bias, a scale-shift pair, a table row.

    A bare parameter is one unit. Units of a dense layer on vectors are kept on a row side of `[N, N]`.

    Args:
        side: see `Full`.
        window: see `Full`.
        rtol: see `Full`.

    Source: Karakida & Osawa 2020, section 3.3; Ollivier 2015.
    """

    def _make_blocks(self, rows: Rows) -> list[Block]:
        return [UnitBlock(layer.name, [layer.layout], self._config) for layer in rows.layers]
