"""K-FAC and EKFAC: fit on a batch, and one solve.

All libraries approximate the Fisher matrix of the mean cross-entropy, one factor pair a layer, the bias' input with the
others, positions as in "expand". Their definitions differ in what is set here:

    curvlinops   keeps the bias apart unless `separate_weight_and_bias=False`; has the damping of K-FAC split over the
                 factors on request (`use_heuristic_damping`), and EKFAC's on the eigenvalues only
    nngeometry   splits K-FAC's damping likewise; puts 1/T on the outputs' factor instead of the inputs', and √C on the
                 inputs', which neither the product nor the split notices

Only `Linear` and `Conv2d` are trained, as curvlinops refuses other parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks.structures.networks import flattened, freeze_normalisations, trained
from benchmarks.structures.tasks import Batch
from curvlab.fisher import EKFAC, KFAC

DAMPING = 1e-2
"""ρ."""

Rows = Literal["exact", "mc"]

MethodName = Literal["curvlab", "curvlinops", "nngeometry", "torch-func", "nngeometry-blocks"]

Compute = Callable[[], Tensor]
Prepare = Callable[[Batch], Compute]
"""Does what is not timed, given a batch, and returns what is."""

Methods = Mapping[MethodName, Prepare]
"""The ways to compute a quantity, curvlab's first."""


def vector(network: nn.Module) -> Float[Tensor, " P"]:
    """Return the right-hand side, the same in every process."""
    like = next(network.parameters())
    size = sum(p.numel() for p in trained(network).values())
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(like)


def _split(x: Float[Tensor, " P"], network: nn.Module) -> dict[str, Tensor]:
    parameters = trained(network)
    pieces = x.split([p.numel() for p in parameters.values()])
    return {name: piece.view_as(p) for (name, p), piece in zip(parameters.items(), pieces, strict=True)}


def fit(batch: Batch, structure: type[KFAC], rows: Rows, **options: Any) -> KFAC:
    """Fit curvlab's structure."""
    generator = torch.Generator(batch.inputs.device).manual_seed(0) if rows == "mc" else None
    data = (batch.inputs, batch.targets)
    return structure.fit(batch.network, nn.CrossEntropyLoss(), data, kind=rows, generator=generator, **options)


def operator(batch: Batch, name: str, rows: Rows) -> Any:
    """Return curvlinops' operator, whose factors wait until they are asked for."""
    import curvlinops as library

    return getattr(library, name)(
        batch.network,
        nn.CrossEntropyLoss(),
        list(trained(batch.network).values()),
        [(batch.inputs, batch.targets)],
        check_deterministic=False,
        fisher_type="mc" if rows == "mc" else "type-2",
        separate_weight_and_bias=False,
        num_data=len(batch.inputs),
        num_per_example_loss_terms=1,
    )


def layers_of(network: nn.Module) -> Any:
    """Return nngeometry's list of the layers that have Kronecker factors."""
    from nngeometry.layercollection import LayerCollection

    layers = LayerCollection()
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            layers.add_layer_from_model(network, module)
    return layers


def matrix(batch: Batch, representation: str, rows: Rows, layers: Any) -> Any:
    """Compute nngeometry's matrix."""
    from nngeometry import metrics
    from nngeometry import object as objects

    made = metrics.FIM_MonteCarlo if rows == "mc" else metrics.FIM
    return made(
        batch.network,
        (batch.inputs,),
        getattr(objects, representation),
        device=str(batch.inputs.device),
        layer_collection=layers,
    )


def curvlab(structure: type[KFAC], rows: Rows, **options: Any) -> Prepare:
    """Fit and solve."""

    def prepare(batch: Batch) -> Compute:
        freeze_normalisations(batch.network)
        x = vector(batch.network)

        def compute() -> Tensor:
            solution = fit(batch, structure, rows, **options).solve(x, DAMPING)
            assert isinstance(solution, Tensor)
            return solution

        return compute

    return prepare


def curvlinops(name: str, rows: Rows, **options: Any) -> Prepare:
    """Apply the inverse of the operator."""

    def prepare(batch: Batch) -> Compute:
        from curvlinops import KFACInverseLinearOperator

        freeze_normalisations(batch.network)
        x = list(_split(vector(batch.network), batch.network).values())

        def compute() -> Tensor:
            inverse = KFACInverseLinearOperator(operator(batch, name, rows), damping=DAMPING, **options)
            return flattened(dict(zip(trained(batch.network), inverse @ x, strict=True)), batch.network)

        return compute

    return prepare


def nngeometry(representation: str, rows: Rows) -> Prepare:
    """Multiply with the inverse of the matrix, which costs less than the library's `solve`."""

    def prepare(batch: Batch) -> Compute:
        from nngeometry.object import PVector

        freeze_normalisations(batch.network)
        layers, named = layers_of(batch.network), _split(vector(batch.network), batch.network)

        def names(layer: str) -> list[str]:
            return [name for name in (f"{layer}.weight", f"{layer}.bias") if name in named]

        parts = {layer: tuple(named[name] for name in names(layer)) for layer in layers.layers}
        x = PVector(layers, dict_repr=parts)

        def compute() -> Tensor:
            found = matrix(batch, representation, rows, layers)
            if representation == "PMatEKFAC":
                found.update_diag((batch.inputs,))
            solution = found.inverse(regul=DAMPING).mv(x).to_dict()
            pairs = (zip(names(layer), values, strict=True) for layer, values in solution.items())
            return flattened({name: value for pair in pairs for name, value in pair}, batch.network)

        return compute

    return prepare


def kfac(rows: Rows) -> Methods:
    """Return the libraries' K-FAC with damping split over the factors."""
    return {
        "curvlab": curvlab(KFAC, rows, factored_damping=True),
        "curvlinops": curvlinops("KFACLinearOperator", rows, use_heuristic_damping=True),
        "nngeometry": nngeometry("PMatKFAC", rows),
    }


def ekfac(rows: Rows) -> Methods:
    """Return the libraries' EKFAC with damping on its eigenvalues."""
    return {
        "curvlab": curvlab(EKFAC, rows),
        "curvlinops": curvlinops("EKFACLinearOperator", rows, use_exact_damping=True),
        "nngeometry": nngeometry("PMatEKFAC", rows),
    }
