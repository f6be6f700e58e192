"""Which approximate Fisher behaves like the exact one on this model, and at which learning rate and damping?"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlab.fisher import STRUCTURES, Full, Structure, make
from curvlab.fisher.damping import Damping, absolute
from curvlab.rows import Rows
from curvlab.rows.loss import Kind, RowPer
from curvlab.rows.making import rows_of_loss
from curvlab.rows.parameters import Vector
from curvlab.rows.passes import Pass
from curvlab.rows.samples import NodeChoice
from curvlab.rows.sweep import PickOutput
from curvlab.rows.upstream import output_gradient

if TYPE_CHECKING:
    import pandas as pd


def compare(
    model: nn.Module,
    loss: nn.Module,
    data: tuple[Any, Any],
    structures: Sequence[str] | Mapping[str, Structure] | None = None,
    damping: Sequence[Damping] = ("rel:1e-6", "rel:1e-3"),
    *,
    kind: Kind = "exact",
    draws: int = 1,
    generator: torch.Generator | None = None,
    rows: RowPer | None = None,
    nodes: NodeChoice = None,
    output: PickOutput = None,
) -> pd.DataFrame:
    """Judge structures in function space, on one batch of data.

    A step `θ ← θ − η (F + ρI)⁻¹∇L` moves the outputs by the response. It is looked at in the metric of the loss,
    `M = S (F + ρI)⁻¹ Sᵀ` with S the exact rows, which for `HalfSquaredError` is `J (F + ρI)⁻¹ Jᵀ/N`. The undamped full
    matrix gives the projector P on the output directions that the loss weighs (all of them for squared errors, all but a
    common shift of the logits for a softmax), if the Jacobian has full row rank.

    Args:
        model: any module whose samples do not interact; it is left as it was found.
        loss: a module of `curvlab.rows.loss.LOSSES` or of one's own, see `curvlab.sqrt_fisher`.
        data: inputs and targets.
        structures: keys of `curvlab.fisher.STRUCTURES`, all if None, or structures by a name of your own.
        damping: values of ρ, absolute or relative to each structure's λ_max ("rel:1e-6"); 0 is the pseudo-inverse.
        kind: rows from which the structures are built; the response is always that of the exact rows.
        draws: random rows of a loss term, for "mc" and for signs.
        generator: source of the draws, required for them.
        rows: what a row stands for, where a sample has several loss terms: "term", "sample", "signs" or "batch", see
            `curvlab.sqrt_fisher`.
        nodes: of a graph, those that carry rows: a mask, indices, or a function of the inputs.
        output: which tensor of a structured output: a key, an attribute, an index or a function.

    Returns:
        One row a structure and damping, with the columns

        - `structure`, `damping` (as given), `rho` (absolute), `rho_rel` (ρ/λ_max of the structure);
        - `alpha`: tr M / tr P, the scale of the response; an isotropic one interpolates in one step at η = 1/α;
        - `anisotropy`: ‖M − αP‖_F / ‖αP‖_F, 0 for an isotropic response;
        - `cosine`: of the step with that of the full exact matrix at the same `damping`;
        - `lambda_max`: largest eigenvalue of M;
        - `eta_max`: 2/λ_max, the largest stable learning rate of the linearised model, for the first step;
        - `rank`: eigenvalues of the structure above P·ε·λ_max in modulus;
        - `seconds`: of building the structure and of one step; `mib`: of the state that it keeps.

    Raises:
        ValueError: for an unknown structure, with the nearest suggested, and where the Fisher matrix or a structure is
            zero; others as `curvlab.sqrt_fisher`.

    Cost: one exact sweep, one of `kind`, and for every structure the response of R = V·N rows, memory R².
    """
    inputs, targets = data
    how = Pass(kind, draws, generator, nodes, output, rows=rows)
    exact = rows_of_loss(
        model, loss, inputs, targets, how if kind == "ggn" else replace(how, kind="exact", draws=1, rows=None)
    )
    own = exact if how.spans_outputs else rows_of_loss(model, loss, inputs, targets, how)
    u = output_gradient(model, loss, inputs, targets, how)
    gradient = exact.jacobian().rmatvec(u)
    projector = _projector(exact)
    reference = Full().update(exact)
    if reference.largest_eigenvalue() == 0:
        raise ValueError(
            f"The exact Fisher matrix of {type(model).__name__} and {type(loss).__name__} on these data is zero, so no "
            "step moves an output that the loss weighs: there is nothing to compare. A softmax over one output is such a "
            "case (use BCEWithLogitsLoss or more outputs), saturated outputs are another."
        )
    coefficients = exact.dual(u)
    lifts = _agree(exact, exact.rmatvec(coefficients), gradient)

    def step_of(structure: Structure, rho: Damping) -> Vector:
        """Return the step, by `lift` where the gradient lies in the range of the structure's rows."""
        return (
            structure.lift(coefficients, rho) if lifts and structure.rows is exact else structure.solve(gradient, rho)
        )

    wanted = {rho: step_of(reference, rho) for rho in damping}
    table = []
    for name, structure in _chosen(structures).items():
        started = time.perf_counter()
        structure.update(own)
        built = time.perf_counter() - started
        largest = structure.largest_eigenvalue()
        if largest == 0:
            raise ValueError(
                f"The structure {name!r} of rows of kind {kind!r} is zero, or has no positive eigenvalue, on these data, so "
                "nothing is relative to its largest eigenvalue. Leave it out, or use kind='exact'."
            )
        values = structure.eigvalsh().abs()
        rank = int((values > exact.P * torch.finfo(values.dtype).eps * values.max()).sum())
        for rho in damping:
            started = time.perf_counter()
            step = step_of(structure, rho)
            seconds = built + time.perf_counter() - started
            absolute_rho = absolute(rho, structure.largest_eigenvalue)
            response = structure.response(exact, rho) * structure.count
            response = (response + response.T) / 2
            alpha = float(response.trace() / projector.trace())
            top = float(torch.linalg.eigvalsh(response).max())
            table.append(
                {
                    "structure": name,
                    "damping": rho,
                    "rho": absolute_rho,
                    "rho_rel": absolute_rho / largest,
                    "alpha": alpha,
                    "anisotropy": float((response - alpha * projector).norm() / (alpha * projector).norm()),
                    "cosine": _cosine(exact, step, wanted[rho]),
                    "lambda_max": top,
                    "eta_max": 2 / top,
                    "rank": rank,
                    "seconds": seconds,
                    "mib": _bytes(structure.state_dict()) / 2**20,
                }
            )
    import pandas as pd  # takes as long to import as all of curvlab

    return pd.DataFrame(table)


def _chosen(structures: Sequence[str] | Mapping[str, Structure] | None) -> dict[str, Structure]:
    if isinstance(structures, Mapping):
        return dict(structures)
    return {name: make(name) for name in (STRUCTURES if structures is None else structures)}


def _projector(exact: Rows) -> Float[Tensor, "R R"]:
    """Projector on the rows' directions that the loss weighs."""
    assert exact.root is not None
    within = exact.root.projector()
    V, N, _ = within.shape
    out = within.new_zeros(V, N, V, N)
    n = torch.arange(N, device=within.device)
    out[:, n, :, n] = within.transpose(0, 1)
    return out.view(V * N, V * N)


def _agree(rows: Rows, a: Any, b: Any) -> bool:
    """Whether two vectors agree to half of the digits: the gradient, and what rows that may lack some of it make of it."""
    x, y = rows.space.flatten(a), rows.space.flatten(b)
    return bool((x - y).norm() <= torch.finfo(rows.dtype).eps ** 0.5 * y.norm())


def _cosine(rows: Rows, a: Any, b: Any) -> float:
    x, y = rows.space.flatten(a), rows.space.flatten(b)
    return float(x @ y / (x.norm() * y.norm()))


def _bytes(state: Any) -> int:
    """Memory of the tensors in nested containers, storage that is shared counted once."""
    seen: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, Mapping):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)

    visit(state)
    return sum(seen.values())
