"""Components of layers: which there are, and that F is masked by them."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fisher_cases import KINDS, NETWORKS, Case, case, draw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import DOUBLE, LOSSES
from torch import Tensor, nn

import curvlab.fisher as cf
from curvlab.errors import PartitionError
from curvlab.nn import HalfSquaredError
from curvlab.optim import Preconditioner
from curvlab.rows import sqrt_fisher
from curvlab.rows.parameters import Layout
from curvlab.testing.oracle import assert_close


def components(module: nn.Module, x: Tensor, partition: Any = "semantic") -> Counter[int]:
    """Return how many components of every size the parameters of a layer fall into."""
    rows = sqrt_fisher(module, HalfSquaredError(), x, torch.zeros_like(module(x)), "empirical")
    pattern = cf.ComponentWise(partition=partition).update(rows).to_dense() != 0
    labels = pattern.double().argmax(1)  # the first parameter to which one is coupled
    return Counter(labels.unique(return_counts=True)[1].tolist())


@pytest.mark.parametrize(
    ("module", "x", "partition", "sizes"),
    [
        (nn.Conv2d(2, 3, 3), draw(9, 2, 5, 5), "semantic", {9: 6, 3: 1}),
        (nn.Conv2d(2, 3, 3), draw(9, 2, 5, 5), "kernel", {9: 6, 1: 3}),
        (nn.Conv2d(4, 6, 3, groups=2), draw(9, 4, 5, 5), "kernel", {9: 12, 1: 6}),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), draw(9, 4, 3, 3), "kernel", {9: 12, 1: 6}),
        (nn.Linear(16, 4), draw(20, 16), "semantic", {16: 4, 4: 1}),
        (nn.Linear(17, 4), draw(20, 17), "semantic", {1: 68, 4: 1}),
        (nn.Linear(5, 4), draw(20, 5), "kernel", {1: 24}),
        (nn.Linear(5, 4), draw(20, 5), "unit", {6: 4}),
        (nn.Linear(5, 4), draw(20, 5), 7, {7: 3, 3: 1}),
        (nn.LayerNorm(5), draw(20, 5), "semantic", {1: 10}),
    ],
)
def test_components_are_as_many_and_as_large_as_the_rule_says(
    module: nn.Module, x: Tensor, partition: Any, sizes: dict[int, int]
) -> None:
    assert components(module.double(), x, partition) == sizes


def test_single_weights_of_a_linear_layer_on_its_own_are_the_diagonal() -> None:
    data = case("mlp", "mse")
    kernel = cf.ComponentWise(partition="kernel").update(data.rows)
    assert_close(kernel.to_dense(), cf.Diagonal().update(data.rows).to_dense())


@pytest.mark.parametrize("network", NETWORKS)
def test_units_and_single_parameters_are_the_structures_of_that_name(network: str) -> None:
    data = case(network, "ce-all")
    v, c, jacobian = draw(2, data.reference.P), draw(data.rows.R), data.elsewhere[0]
    for made, other in (
        (cf.ComponentWise(partition="unit"), cf.UnitWise()),
        (cf.ComponentWise(partition=1), cf.Diagonal()),
    ):
        made.update(data.rows)
        other.update(data.rows)
        assert_close(made.to_dense(), other.to_dense(), 1e-14)
        for rho in (0.1, "rel:1e-4"):
            assert_close(made.solve(v, rho), other.solve(v, rho), 1e-11)
            assert_close(made.response(jacobian, rho), other.response(jacobian, rho), 1e-11)
            lifted, expected = (made.space.flatten(s.lift(c, rho)) for s in (made, other))
            assert_close(lifted, expected, 1e-11)
        assert made.logdet(0.1) == pytest.approx(other.logdet(0.1))


class AtRandom:
    """Labels that are drawn."""

    def __init__(self, groups: int, seed: int) -> None:
        self.groups, self.seed = groups, seed

    def __call__(self, name: str, layout: Layout) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + len(name))
        return torch.randint(self.groups, (layout.units, layout.width), generator=generator)


def masked(data: Case, rule: AtRandom) -> Tensor:
    F, layers = data.reference.F, data.rows.layers
    mask = torch.zeros_like(F)
    for layer, reference in zip(layers, data.reference.layers, strict=True):
        at, label = reference.at.flatten(), rule(layer.name, layer.layout).flatten()
        mask[at[:, None], at[None, :]] = (label[:, None] == label).to(DOUBLE)
    return F * mask


@settings(max_examples=40, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    network=st.sampled_from(list(NETWORKS)),
    loss=st.sampled_from([loss.name for loss in LOSSES]),
    kind=st.sampled_from(KINDS),
    side=st.sampled_from(["rows", "parameters", "auto"]),
    groups=st.integers(2, 9),
    seed=st.integers(0, 99),
)
def test_components_drawn_at_random_mask_the_matrix(
    network: str, loss: str, kind: str, side: Any, groups: int, seed: int
) -> None:
    data = case(network, loss, kind="exact" if kind == "ggn" else kind)
    rule = AtRandom(groups, seed)
    structure = cf.ComponentWise(partition=rule, side=side).update(data.rows)
    dense = masked(data, rule)
    assert_close(structure.to_dense(), dense)
    rho = 0.05 * float(torch.linalg.eigvalsh(dense).max()) + 1e-6
    damped = dense + rho * torch.eye(len(dense), dtype=DOUBLE)
    v, c, (other, J) = draw(2, len(dense)), draw(data.rows.R), data.elsewhere
    assert_close(structure.matvec(v), v @ dense)
    assert_close(structure.solve(v, rho), torch.linalg.solve(damped, v.T).T, 1e-9)
    lifted = torch.linalg.solve(damped, data.rows.dense().T @ c)
    assert_close(structure.space.flatten(structure.lift(c, rho)), lifted, 1e-9)
    assert_close(structure.response(other, rho) * structure.count, J @ torch.linalg.solve(damped, J.T), 1e-9)
    assert structure.trace() == pytest.approx(float(dense.trace()))
    assert_close(structure.eigvalsh(), torch.linalg.eigvalsh(dense), 1e-9)


@pytest.mark.parametrize("partition", ["semantic", "kernel", 5])
def test_a_preconditioner_steps_with_components(partition: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 4)).double()
    x, y, loss = draw(12, 1, 5, 5), torch.arange(12) % 4, nn.CrossEntropyLoss()
    natural = Preconditioner(
        model, loss, cf.ComponentWise(partition=partition), kind="empirical", damping=0.1, kl_clip=None
    )
    with natural.collect():
        loss(model(x), y).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    dense = cf.ComponentWise(partition=partition).update(sqrt_fisher(model, loss, x, y, "empirical")).to_dense()
    natural.precondition()
    step = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert_close(step, torch.linalg.solve(dense + 0.1 * torch.eye(len(dense), dtype=DOUBLE), gradient), 1e-10)


@pytest.mark.usefixtures("unchecked_types")
def test_partitions_that_are_none_are_refused() -> None:
    rows = case("mlp").rows
    with pytest.raises(ValueError, match=r"Unknown partition 'kernels'\. Did you mean 'kernel'\?"):
        cf.ComponentWise(partition="kernels")
    with pytest.raises(ValueError, match="partition is a number of parameters ≥ 1, got 0"):
        cf.ComponentWise(partition=0)
    with pytest.raises(ValueError, match=r"a function, got \[\['0\.weight'\]\]\. Blocks of whole .* BlockDiagonal"):
        cf.ComponentWise(partition=[["0.weight"]])
    for rule, found in (
        (lambda _, layout: torch.zeros(layout.size, dtype=torch.long), r"torch\.int64 \[25\]"),
        (lambda _, layout: torch.zeros(layout.units, layout.width), r"torch\.float32 \[5, 5\]"),
        (lambda _, layout: [0] * layout.size, "list"),
    ):
        with pytest.raises(PartitionError, match=rf"layer '0' is a tensor of integers \[5, 5\].*returned {found}"):
            cf.ComponentWise(partition=rule).update(rows)


def shifted(by: int) -> Callable[[str, Layout], torch.Tensor]:
    """Return the partition of a layer's entries into pairs, from another start."""
    return lambda _, layout: ((torch.arange(layout.size) + by) % layout.size // 2).view(layout.units, layout.width)


def test_a_state_of_another_partition_is_refused() -> None:
    rows = case("mlp", "mse").rows
    state = cf.ComponentWise(partition=shifted(0)).update(rows).state_dict()
    cf.ComponentWise(partition=shifted(0)).load_state_dict(state)
    with pytest.raises(ValueError, match="covers other parameters than that of this configuration"):
        cf.ComponentWise(partition=shifted(1)).load_state_dict(state)
    names = list(rows.space.shapes)
    blocks = cf.BlockDiagonal(partition=[names[:1], names[1:2], names[2:]]).update(rows)
    with pytest.raises(ValueError, match="this configuration"):
        cf.BlockDiagonal(partition=[names[:2], names[2:]]).load_state_dict(blocks.state_dict())
    reordered = cf.BlockDiagonal(partition=[names[1:2], names[:1], names[2:]])
    reordered.load_state_dict(blocks.state_dict())
    assert_close(reordered.to_dense(), blocks.to_dense())
