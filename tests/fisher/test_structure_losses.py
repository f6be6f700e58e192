"""Losses × reductions on one network: every structure against its definition, with the loss' own factors and weights."""

import pytest
import torch
from fisher_cases import case
from fisher_oracle import OPTIMISERS, PLAIN_SPECS, SPECS, build, dense_structure, positions
from oracle import LOSSES
from torch import nn

from curvlab.rows import sqrt_fisher
from curvlab.testing.oracle import assert_close


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", [loss.name for loss in LOSSES])
def test_structures_of_every_loss(loss: str, reduction: str, kind: str) -> None:
    data = case("mlp", loss, reduction, kind)
    place = positions(data.model)
    for spec in (*PLAIN_SPECS, "partial-traces", "input-side"):
        structure = build(spec, list(place)).update(data.rows)
        assert_close(structure.to_dense(), dense_structure(spec, data.reference, place), 1e-9)
        assert structure.count == pytest.approx(data.reference.count)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["ce-all", "bce-all", "mse"])
def test_structures_of_losses_with_extra_axes(loss: str, reduction: str, kind: str) -> None:
    data = case("sequence", loss, reduction, kind)
    place = positions(data.model)
    for spec in PLAIN_SPECS:
        structure = build(spec, list(place)).update(data.rows)
        assert_close(structure.to_dense(), dense_structure(spec, data.reference, place), 1e-9)


@pytest.mark.parametrize("spec", [*SPECS, *OPTIMISERS])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_weight_two_is_a_duplicated_sample(spec: str, kind: str) -> None:
    """Class weights of 1, 1 and 2 on distinct samples are the same as the samples of class 2 being there twice."""
    data = case("mlp", "ce", "sum", kind)
    targets = torch.tensor([0, 2, 1, 2])
    weights = torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64)
    weighted = sqrt_fisher(data.model, nn.CrossEntropyLoss(weights), data.inputs, targets, kind)
    twice = torch.cat([torch.arange(4), torch.tensor([1, 3])])
    repeated = sqrt_fisher(data.model, nn.CrossEntropyLoss(), data.inputs[twice], targets[twice], kind)
    names = list(positions(data.model))
    once, more = build(spec, names).update(weighted), build(spec, names).update(repeated)
    assert_close(once.to_dense(), more.to_dense())
    assert once.count == pytest.approx(more.count)


@pytest.mark.parametrize("spec", [*SPECS, *OPTIMISERS])
def test_an_ignored_sample_changes_nothing(spec: str) -> None:
    data = case("mlp", "ce", "sum")
    loss = nn.CrossEntropyLoss(ignore_index=-1)
    rows = sqrt_fisher(data.model, loss, data.inputs, torch.tensor([0, -1, 1, -1]))
    fewer = sqrt_fisher(data.model, loss, data.inputs[::2], torch.tensor([0, 1]))
    names = list(positions(data.model))
    assert_close(build(spec, names).update(rows).to_dense(), build(spec, names).update(fewer).to_dense())


@pytest.mark.parametrize("spec", PLAIN_SPECS)
def test_the_mean_of_monte_carlo_structures_tends_to_the_exact_one(spec: str) -> None:
    """F is linear in the rows' second moment, so a mean of many draws converges at 1/√draws; K-FAC's B, too."""
    data = case("mlp", "ce-weights")
    generator = torch.Generator().manual_seed(1)
    rows = sqrt_fisher(data.model, data.loss, data.inputs, data.targets, "mc", draws=3000, generator=generator)
    names = list(positions(data.model))
    exact = build(spec, names).update(data.rows).to_dense()
    error = build(spec, names).update(rows).to_dense() - exact
    assert float(error.norm() / exact.norm()) < 0.05
