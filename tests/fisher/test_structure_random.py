"""Hypothesis draws structure × kind × loss × network × batch split × side × damping."""

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from fisher_cases import KINDS, NETWORKS, Case, case, draw, rows_of
from fisher_oracle import (
    SPECS,
    Derivatives,
    Reference,
    beside_identity,
    build,
    dense_structure,
    derivatives,
    kronecker_block,
    positions,
    reference,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracle import DOUBLE, LOSSES
from torch import Tensor, nn

from curvlab.rows import Rows
from curvlab.testing.oracle import assert_close

SAMPLES = 5
CUTS = st.lists(st.integers(1, SAMPLES - 1), max_size=3, unique=True).map(lambda cuts: (0, *sorted(cuts), SAMPLES))


@cache
def derivatives_of(model: nn.Module, inputs: Tensor, start: int, stop: int) -> Derivatives:
    return derivatives(model, inputs[start:stop])


@cache
def part(data: Case, start: int, stop: int) -> tuple[Rows, Reference]:
    x, y = data.inputs[start:stop], data.targets[start:stop]
    known = derivatives_of(data.model, data.inputs, start, stop)
    return (
        rows_of(data.model, data.loss, x, y, data.kind, seed=start),
        reference(data.model, data.loss, x, y, data.kind, seed=start, known=known),
    )


def merged(spec: str, place: dict[str, Tensor], references: list[Reference], mean: bool) -> Tensor:
    """Return the structure of all batches: Σ count·F / Σ count for means, the sum for sums; of factors for K-FAC."""
    counts = torch.tensor([ref.count if mean else 1.0 for ref in references], dtype=DOUBLE)
    weights = counts / counts.sum() if mean else counts
    if spec == "adaptive-inverse":
        return beside_identity(merged("full", place, references, mean), float(counts.sum()) if mean else 1.0)
    total = sum(w * dense_structure(spec, ref, place) for w, ref in zip(weights, references, strict=True))
    assert isinstance(total, Tensor)
    if spec.startswith("kfac"):
        mass = sum(float(ref.omega.sum()) for ref in references)
        for k, layer in enumerate(references[0].layers):
            if layer.a is not None:
                factors = [ref.factors(ref.layers[k], SPECS[spec][1].get("sharing", "expand")) for ref in references]
                B = sum(w * B for w, (B, _) in zip(weights, factors, strict=True))
                A = sum(A for _, A in factors) / mass
                at = layer.at.flatten()
                total[at[:, None], at[None, :]] = kronecker_block(layer, B, A)
    return total


COMBINATIONS = given(
    spec=st.sampled_from([spec for spec in SPECS if spec != "ekfac"]),
    network=st.sampled_from(list(NETWORKS)),
    loss=st.sampled_from([loss.name for loss in LOSSES]),
    reduction=st.sampled_from(["mean", "sum"]),
    kind=st.sampled_from(KINDS),
    cuts=CUTS,
    damping=st.floats(-3, 2),
    seed=st.integers(0, 2),
)


@settings(max_examples=300, derandomize=True, suppress_health_check=list(HealthCheck))
@COMBINATIONS
def test_any_combination(**drawn: Any) -> None:
    check_combination(**drawn)


@pytest.mark.study
@settings(max_examples=1000, suppress_health_check=list(HealthCheck))
@COMBINATIONS
def test_any_combination_at_length(**drawn: Any) -> None:
    check_combination(**drawn)


def check_combination(
    spec: str, network: str, loss: str, reduction: str, kind: str, cuts: tuple[int, ...], damping: float, seed: int
) -> None:
    data = case(network, loss, reduction, "exact" if kind == "ggn" else kind, SAMPLES, seed)
    slices = list(pairwise(cuts))
    assume(all(weighted(data, *cut) for cut in slices))
    parts = [part(data, *cut) for cut in slices]
    place: dict[str, Any] = positions(data.model)
    structure = build(spec, list(place))
    for rows, _ in parts:
        structure.update(rows, 1.0)
    dense = merged(spec, place, [ref for _, ref in parts], reduction == "mean")

    assert_close(structure.to_dense(), dense, 1e-9)
    values = torch.linalg.eigvalsh(dense)
    rho = float(10**damping * values.max() + 1.5 * values.min().clamp_max(0).abs())
    damped = dense + rho * torch.eye(len(dense), dtype=DOUBLE)
    v, c = draw(len(dense), seed=seed), draw(structure.rows.R, seed=seed)
    assert_close(structure.solve(v, rho), torch.linalg.solve(damped, v), 1e-8)
    lifted = torch.linalg.solve(damped, structure.rows.dense().T @ c)
    assert_close(structure.space.flatten(structure.lift(c, rho)), lifted, 1e-8)
    other, J = data.elsewhere
    assert_close(structure.response(other, rho) * structure.count, J @ torch.linalg.solve(damped, J.T), 1e-8)


def weighted(data: Case, start: int, stop: int) -> bool:
    """Return whether a slice has any target that counts."""
    targets = data.targets[start:stop]
    return targets.is_floating_point() or bool((targets >= 0).any())
