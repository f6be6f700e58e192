"""The unit-wise Fisher matrix: one block an output channel, a scale-shift pair, a row of an embedding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.fisher.block import Block, RowBlock
from curvlab.fisher.full import _RowStructure
from curvlab.fisher.system import System, inverse_values
from curvlab.fisher.unit_rows import PlainRoots, UnitRoots, contract_units, is_plain, plain_factors, unit_roots
from curvlab.rows import Rows
from curvlab.rows.layer import KroneckerRows, LayerRows
from curvlab.rows.loss import OutputFactor
from curvlab.rows.rows import gram


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

    def _side_size(self) -> int:
        return self._width

    def _row_size(self, layers: Sequence[LayerRows]) -> int:
        return layers[0].shape[1] if is_plain(layers[0]) else layers[0].count

    def _form(self, layers: Sequence[LayerRows]) -> Tensor:
        return unit_roots(layers[0]).moment()

    @property
    def system(self) -> System:
        """The stack that is solved: `[U, n, n]` on the row side, `[U, width, width]` on the parameter side."""
        if self._system is None:
            name = f"units of layer {self.name!r}"
            if self.keeps_rows:
                layer = self.layers[0]
                self._system = System(
                    self.roots.gram(), name, self.config.rtol, lambda: unit_roots(layer.to(torch.float64)).gram()
                )
            else:
                self._system = System(self.average.value, name, self.config.rtol)
        return self._system

    def _by_unit(self, x: Float[Tensor, "K P_b"]) -> Float[Tensor, "K U width"]:
        return x.unflatten(1, (self._units, self._width))

    def matvec(self, x: Float[Tensor, "K P_b"]) -> Float[Tensor, "K P_b"]:  # noqa: D102
        units = self._by_unit(x)
        if self.keeps_rows:
            return self.roots.combine(self.roots.times(units)).flatten(1)
        return torch.einsum("uij,kuj->kui", self.average.value, units).flatten(1)

    def solve(self, x: Float[Tensor, "K P_b"], damping: float) -> tuple[Float[Tensor, "K P_b"], Float[Tensor, " K"]]:
        """Solve every unit on its smaller side; see `RowBlock.solve`."""
        units = self._by_unit(x)
        eigen = self.system.eigen if damping == 0 else None
        nothing = x.new_zeros(len(x))
        if not self.keeps_rows:
            rhs = units.permute(1, 2, 0)
            solution = self.system.solve(rhs, damping).permute(2, 0, 1).flatten(1)
            if eigen is None:
                return solution, nothing
            return solution, ((eigen.vectors.mT @ rhs).square() * eigen.null[..., None]).sum((0, 1))
        seen = self.roots.times(units)
        if eigen is None:
            return (x - self.roots.combine(self.system.solve(seen, damping)).flatten(1)) / damping, nothing
        inverse = inverse_values(eigen.values, 0.0, eigen.null)[..., None]
        coordinates = eigen.vectors.mT @ seen
        inside = (coordinates.square() * inverse).sum((0, 1))
        solution = self.roots.combine(eigen.vectors @ (coordinates * inverse.square())).flatten(1)
        return solution, (x.square().sum(-1) - inside).clamp_min(0)

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
        coefficients: OutputFactor | None,
    ) -> Float[Tensor, "Q R"]:
        a, b = left[0], right[0]
        if is_plain(a) and is_plain(b) and (not self.keeps_rows or isinstance(self.roots, PlainRoots)):
            return contract_units(a, self._kernels(a, b, damping), b)
        if not self.keeps_rows:
            solved = self.system.solve(b.unit_stack().mT, damping)
            return (a.unit_stack() @ solved).sum(0)
        x = self.roots.times(a.unit_stack().transpose(0, 1))
        if coefficients is not None:
            V, N = self.layers[0].shape
            solved = self.system.solve(x, damping).sum(0)
            return coefficients.apply(solved.view(V, N, -1)).flatten(0, 1).T
        y = self.roots.times(b.unit_stack().transpose(0, 1))
        return self._sandwich_values(x.mT, y.mT, damping).sum(0) + (
            (gram(left, right) - self._projected(x.mT, y.mT).sum(0)) / damping if damping else 0
        )

    def _kernels(self, left: KroneckerRows, right: KroneckerRows, damping: float) -> Float[Tensor, "U N M"]:
        """Return `a' (F_u + ρI)⁻¹ aᵀ` for every unit."""
        a, _ = plain_factors(left)
        b, g = plain_factors(right)
        O = self._units // len(a)  # noqa: E741
        if not self.keeps_rows:
            solved = self.system.solve(b.mT.repeat_interleave(O, dim=0), damping)
            return a.repeat_interleave(O, dim=0) @ solved
        roots = self.roots
        assert isinstance(roots, PlainRoots)
        s = roots.s.T[:, None, :]
        x = (a @ roots.a.mT).repeat_interleave(O, dim=0) * s
        reached = bool(((s[:, 0].T > 0) | (g == 0).all(0)).all())
        if reached and torch.equal(b, roots.a):
            scale = torch.where(s > 0, 1 / torch.where(s > 0, s, 1), 0)
            return self.system.solve(x.mT, damping).mT * scale
        y = (b @ roots.a.mT).repeat_interleave(O, dim=0) * s
        kernels = self._sandwich_values(x, y, damping)
        if damping:
            kernels += ((a @ b.mT).repeat_interleave(O, dim=0) - self._projected(x, y)) / damping
        return kernels

    def _sandwich_values(
        self, x: Float[Tensor, "U A n"], y: Float[Tensor, "U B n"], damping: float
    ) -> Float[Tensor, "U A B"]:
        """Return the part of `left (F + ρI)⁻¹ rightᵀ` within range(F), from `left Xᵀ` and `right Xᵀ`."""
        eigen = self.system.eigen
        inverse = inverse_values(eigen.values, 0.0, eigen.null)
        scaled = inverse * (inverse if damping == 0 else inverse_values(eigen.values, damping, None))
        return (x @ eigen.vectors * scaled[:, None]) @ (y @ eigen.vectors).mT

    def _projected(self, x: Float[Tensor, "U A n"], y: Float[Tensor, "U B n"]) -> Float[Tensor, "U A B"]:
        """Return `left P rightᵀ`, P the projector on range(F)."""
        eigen = self.system.eigen
        inverse = inverse_values(eigen.values, 0.0, eigen.null)
        return (x @ eigen.vectors * inverse[:, None]) @ (y @ eigen.vectors).mT

    def to_dense(self) -> Float[Tensor, "P_b P_b"]:  # noqa: D102
        stack = self._form(self.layers) if self.keeps_rows else self.average.value
        return torch.block_diag(*stack)

    def eigenvalues(self) -> Float[Tensor, " k"]:  # noqa: D102
        values = self.system.eigen.values
        return values[:, -min(self._width, values.shape[1]) :].flatten()

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
