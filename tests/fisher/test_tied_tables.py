"""Tables that are looked up and multiplied with: their rows, and the one block that they have with Kronecker factors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fisher_cases import draw
from layer_cases import LAYERS
from oracle import DOUBLE, architecture
from torch import Tensor, nn
from torch.nn.functional import one_hot

import curvlab.fisher as cf
from curvlab.fisher.factors import TiedBlock
from curvlab.rows import Rows, merge, sqrt_fisher
from curvlab.rows.tied import TiedRows
from curvlab.testing.oracle import assert_close

CE = nn.CrossEntropyLoss()


class HeadFirst(nn.Module):
    """The head, with a bias in the same block, comes before the table that has its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.table = nn.Linear(3, 5), nn.Embedding(5, 3)
        self.table.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.table(x))).mT

    def hidden(self, embedded: Tensor) -> Tensor:
        return torch.tanh(embedded).cumsum(1)


def decoder() -> tuple[HeadFirst, Tensor, Tensor]:
    torch.manual_seed(0)
    return HeadFirst().double(), torch.randint(5, (3, 4)), torch.randint(5, (3, 4))


def tied() -> tuple[nn.Module, Any, Tensor, None]:
    model, inputs = architecture("tied").make(N=3)
    return model, inputs, torch.tensor([0, 2, 1]), None


def language_model() -> tuple[nn.Module, Any, Tensor, Callable[[Any], Tensor]]:
    model, inputs = next(case for case in LAYERS if case.name == "language-model").make(N=3)
    return model, inputs, torch.randint(5, (3, 4)), lambda returned: returned.logits.mT


def positions(model: HeadFirst, x: Tensor) -> Tensor:
    """Return what every position of a use adds to every exact row, `[p, 5, 4]` with the bias' column, by single derivatives."""
    embedded = model.table(x).detach().requires_grad_()
    hidden = model.hidden(embedded)
    z = model.head(hidden)
    found = []
    for n, t in torch.cartesian_prod(torch.arange(3), torch.arange(4)).tolist():
        p, a = z[n, t].detach().softmax(-1), torch.cat([hidden[n, t].detach(), torch.ones(1, dtype=DOUBLE)])
        values, vectors = torch.linalg.eigh(p.diag() - torch.outer(p, p))
        for h in vectors.T * (values.clamp_min(0) / x.numel()).sqrt()[:, None]:
            (g,) = torch.autograd.grad(z[n, t] @ h, embedded, retain_graph=True)
            found.append(torch.outer(h, a))
            found += [
                torch.outer(one_hot(x[n, s], 5).to(DOUBLE), torch.cat([g[n, s], torch.zeros(1, dtype=DOUBLE)]))
                for s in range(4)
            ]
    return torch.stack(found)


def only_block(structure: cf.Structure) -> TiedBlock:
    (block,) = structure._blocks
    assert isinstance(block, TiedBlock)
    return block


def test_the_block_has_the_partial_traces_of_all_positions() -> None:
    model, x, y = decoder()
    parts = positions(model, x)
    by_unit, width = parts.square().sum((0, 2)), torch.einsum("pui,puj->ij", parts, parts)
    rows, v, rho = sqrt_fisher(model, CE, x, y), draw(2, 20), 0.1
    block = only_block(cf.KFAC().update(rows))
    expected = torch.kron(by_unit.diag(), width) / width.trace()
    assert_close(block.to_dense(), expected)
    assert_close(block.solve(v, rho)[0], v @ torch.linalg.inv(expected + rho * torch.eye(20, dtype=DOUBLE)))
    units, pi = by_unit / width.trace(), (width.trace() / 4 * 5).sqrt()
    split = torch.kron((units + rho**0.5 / pi).diag(), width + rho**0.5 * pi * torch.eye(4, dtype=DOUBLE))
    block = only_block(cf.KFAC(factored_damping=True).update(rows))
    assert_close(block.solve(v, rho)[0], v @ torch.linalg.inv(split))


def test_ekfac_is_the_diagonal_in_the_basis_of_the_block() -> None:
    model, x, y = decoder()
    rows = sqrt_fisher(model, CE, x, y)
    vectors = torch.linalg.eigh(only_block(cf.KFAC().update(rows)).width.dense()[0]).eigenvectors
    basis = torch.kron(torch.eye(5, dtype=DOUBLE), vectors.contiguous())
    layer = rows.layers[0].dense()
    expected = basis @ (basis.T @ layer.T @ layer @ basis).diagonal().diag() @ basis.T
    assert_close(only_block(cf.EKFAC().update(rows)).to_dense(), expected)


@pytest.mark.parametrize("case", [tied, language_model])
@pytest.mark.parametrize(("key", "options"), [("kfac", {}), ("kfac", {"factored_damping": True}), ("ekfac", {})])
def test_verbs_agree(case: Callable[[], Any], key: str, options: dict[str, Any]) -> None:
    model, inputs, targets, output = case()
    rows = sqrt_fisher(model, CE, inputs, targets, output=output)
    structure, rho = cf.make(key, **options).update(rows), 0.05
    assert any(isinstance(block, TiedBlock) for block in structure._blocks)
    inverse = structure.space.flatten(structure.solve(structure.space.unflatten(torch.eye(rows.P, dtype=DOUBLE)), rho))
    if not options:
        assert_close(inverse, torch.linalg.inv(structure.to_dense() + rho * torch.eye(rows.P, dtype=DOUBLE)))
    c, J = draw(2, rows.R), rows.jacobian()
    assert_close(structure.space.flatten(structure.lift(c, rho)), c @ rows.dense() @ inverse)
    assert_close(structure.response(J, rho), J.dense() @ inverse @ J.dense().T / rows.count)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("key", ["kfac", "ekfac"])
def test_many_batches_and_a_stream_of_layers_are_one_batch(key: str, reduction: str) -> None:
    (model, x, y), loss = decoder(), nn.CrossEntropyLoss(reduction=reduction)
    whole = cf.make(key).update(sqrt_fisher(model, loss, x, y))
    for data in ((x, y), [(x[:1], y[:1]), (x[1:], y[1:])]):
        assert_close(type(whole).fit(model, loss, data).to_dense(), whole.to_dense())


def test_sequences_of_different_lengths_are_stacked() -> None:
    """Shorter ones are padded, in both uses."""
    model, x, y = decoder()

    def rows_of(x: Tensor, y: Tensor) -> Rows:
        return sqrt_fisher(model, CE, x, y, kind="empirical", rows="sample")

    parts = [rows_of(x[:2, :3], y[:2, :3]), rows_of(x[2:], y[2:])]
    both = merge(parts)
    (layer,) = both.layers
    assert isinstance(layer, TiedRows)
    dense = torch.cat([(part.terms / both.terms) ** 0.5 * part.dense() for part in parts])
    assert_close(both.dense(), dense)
    assert_close(both.gram(), dense @ dense.T)
    assert_close(both.gram(parts[1]), dense @ parts[1].dense().T)
    assert_close(layer.of_batch().dense()[0], layer.dense().sum(0))
    assert_close(layer.diagonal(), layer.dense().square().sum(0))


def test_states_are_kept() -> None:
    model, x, y = decoder()
    structure, other = cf.EKFAC().update(sqrt_fisher(model, CE, x, y)), cf.EKFAC()
    other.load_state_dict(structure.state_dict())
    assert_close(other.to_dense(), structure.to_dense())
