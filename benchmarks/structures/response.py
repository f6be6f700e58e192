"""Responses `J (F + ρI)⁻¹ Jᵀ / N` of block-diagonal and unit-wise structures, F that of the mean cross-entropy.

No library has them. Its user forms the rows of J, sample by sample, and does the rest in plain torch: with
`F = Jᵀ Λ J`, `Λ = AᵀA` the output Hessian over N, and `H = J Jᵀ` of a block,

    J (F + ρI)⁻¹ Jᵀ = (H − H Aᵀ (A H Aᵀ + ρI)⁻¹ A H)/ρ

costs one factorisation of `[R, R]` a block. Units with fewer inputs than rows are solved
by the Cholesky factors of their `[width, width]` blocks. Only nngeometry's own block-diagonal matrix `PMatBlockDiag`
forms `[P_l, P_l]`. No library has unit-wise blocks: nngeometry's `PMatQuasiDiag` keeps a unit's diagonal and its
covariance with the bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks.structures.kronecker import DAMPING, Compute, Methods, Prepare
from benchmarks.structures.networks import trained
from benchmarks.structures.tasks import Batch
from curvlab import sqrt_fisher
from curvlab.fisher import BlockDiagonal, Structure, UnitWise

Rows = Float[Tensor, "R U width"]
"""Rows `(c, n)` of J for one layer, by unit."""

Form = Callable[[], Iterator[Rows]]
"""Yields the rows of every layer."""

AT_ONCE = 1 << 26
"""Elements of the matrices of units that are solved in one call."""


def curvlab(structure: type[Structure]) -> Prepare:
    """Form the rows, which know J, too, and ask the structure."""

    def prepare(batch: Batch) -> Compute:
        def compute() -> Tensor:
            rows = sqrt_fisher(batch.network, nn.CrossEntropyLoss(), batch.inputs, batch.targets)
            return structure().update(rows).response(rows.jacobian(), DAMPING)

        return compute

    return prepare


def by_layer(form: Callable[[Batch], Form]) -> Prepare:
    """Solve on the row side of every layer."""
    return _prepare(form, lambda J, weigh: _on_rows(J.flatten(1)[None], weigh))


def by_unit(form: Callable[[Batch], Form]) -> Prepare:
    """Solve on the smaller side of every unit."""
    return _prepare(form, _of_units)


Weigh = Callable[[Float[Tensor, "B R K"]], Float[Tensor, "B R K"]]
"""Multiplies with A."""


def _prepare(form: Callable[[Batch], Form], response: Callable[[Rows, Weigh], Tensor]) -> Prepare:
    def prepare(batch: Batch) -> Compute:
        rows = form(batch)

        def compute() -> Tensor:
            weigh = _output_root(batch)
            return torch.stack([response(J, weigh) for J in rows()]).sum(0) / len(batch.inputs)

        return compute

    return prepare


def _output_root(batch: Batch) -> Weigh:
    with torch.no_grad():
        p = batch.network(batch.inputs).softmax(1)
    N, C = p.shape
    root = (p / N).sqrt()[:, :, None] * (torch.eye(C, dtype=p.dtype, device=p.device) - p[:, None])
    return lambda x: torch.einsum("ncd,bdnk->bcnk", root, x.reshape(len(x), C, N, -1)).reshape(x.shape)


def _on_rows(J: Float[Tensor, "U R width"], weigh: Weigh) -> Float[Tensor, "R R"]:
    H = J @ J.mT
    seen = weigh(H)
    half = _half(weigh(seen.mT), seen)
    return (H.sum(0) - half.T @ half) / DAMPING


def _on_inputs(J: Float[Tensor, "U R width"], weigh: Weigh) -> Float[Tensor, "R R"]:
    S = weigh(J)
    half = _half(S.mT @ S, J.mT)
    return half.T @ half


def _half(matrix: Float[Tensor, "U n n"], right: Float[Tensor, "U n R"]) -> Float[Tensor, "Un R"]:
    """Return `L⁻¹ right` of all units, `LLᵀ = matrix + ρI`."""
    matrix.diagonal(dim1=1, dim2=2).add_(DAMPING)
    half: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(matrix), right, upper=False)
    return half.flatten(0, 1)


def _of_units(J: Rows, weigh: Weigh) -> Float[Tensor, "R R"]:
    R, _, width = J.shape
    solve = _on_rows if width > R else _on_inputs
    together = max(1, AT_ONCE // (R * max(width, R)))
    return torch.stack([solve(part.transpose(0, 1), weigh) for part in J.split(together, dim=1)]).sum(0)


def layers_of(network: nn.Module) -> list[list[str]]:
    """Return the names of the trainable parameters of every layer."""
    names: dict[str, list[str]] = {}
    for name in trained(network):
        names.setdefault(name.rpartition(".")[0], []).append(name)
    return list(names.values())


def _joined(parameters: Iterable[Float[Tensor, "C N ..."]]) -> Rows:
    """Join gradients `[C, N, units, …]` of a layer's parameters by unit."""
    return torch.cat([g.flatten(0, 1).flatten(2) if g.ndim > 3 else g.flatten(0, 1)[..., None] for g in parameters], 2)


def torch_func(batch: Batch) -> Form:
    """Jacobians of single samples, of all parameters in one pass."""
    from torch.func import functional_call, jacrev, vmap

    values = {name: p.detach() for name, p in batch.network.named_parameters()}
    of = {name: values.pop(name) for name in trained(batch.network)}

    def outputs(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        z: Tensor = functional_call(batch.network, {**values, **parameters}, (sample[None],))
        return z[0]

    of_samples = vmap(jacrev(outputs), in_dims=(None, 0), out_dims=1)

    def form() -> Iterator[Rows]:
        found = of_samples(of, batch.inputs)
        for names in layers_of(batch.network):
            yield _joined(found.pop(name) for name in names)

    return form


def nngeometry(batch: Batch) -> Form:
    """The library's Jacobian, of all parameters."""
    from nngeometry.jacobian import Jacobian

    def form() -> Iterator[Rows]:
        for _, parts in Jacobian(batch.network, (batch.inputs,)).iter_by_module():
            yield _joined(parts)

    return form


def curvlinops(batch: Batch) -> Form:
    """The library's transposed Jacobian, applied to unit vectors."""
    from curvlinops import TransposedJacobianLinearOperator

    def form() -> Iterator[Rows]:
        parameters, N = trained(batch.network), len(batch.inputs)
        operator = TransposedJacobianLinearOperator(
            batch.network, list(parameters.values()), [(batch.inputs, batch.targets)], check_deterministic=False
        )
        units = torch.eye(operator.shape[1], dtype=batch.inputs.dtype, device=batch.inputs.device)
        pieces = (operator @ units).split([p.numel() for p in parameters.values()])
        found = dict(zip(parameters, pieces, strict=True))
        for names in layers_of(batch.network):
            # Columns are numbered (n, c).
            yield _joined(found.pop(name).T.reshape(N, -1, *parameters[name].shape).transpose(0, 1) for name in names)

    return form


def nngeometry_blocks(batch: Batch) -> Compute:
    """Solve with the library's own blocks `[P_l, P_l]`, for the rows of its Jacobian."""
    from nngeometry.jacobian import Jacobian
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatBlockDiag

    def compute() -> Tensor:
        blocks = FIM(batch.network, (batch.inputs,), PMatBlockDiag, device=str(batch.inputs.device)).data
        products = []
        for layer, parts in Jacobian(batch.network, (batch.inputs,)).iter_by_module():
            J = torch.cat([g.flatten(0, 1).flatten(1) for g in parts], dim=1)
            damped = blocks.pop(layer)
            damped.diagonal().add_(DAMPING)
            products.append(J @ torch.linalg.solve(damped, J.T))
        return torch.stack(products).sum(0) / len(batch.inputs)

    return compute


BLOCK_DIAGONAL: Methods = {
    "curvlab": curvlab(BlockDiagonal),
    "torch-func": by_layer(torch_func),
    "nngeometry": by_layer(nngeometry),
    "curvlinops": by_layer(curvlinops),
    "nngeometry-blocks": nngeometry_blocks,
}

UNIT_WISE: Methods = {
    "curvlab": curvlab(UnitWise),
    "torch-func": by_unit(torch_func),
    "nngeometry": by_unit(nngeometry),
    "curvlinops": by_unit(curvlinops),
}
