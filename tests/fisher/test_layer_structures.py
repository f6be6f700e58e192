"""Structures of layers that consist of others, against the same network written out in Linear layers."""

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from fisher_cases import draw, rows_of
from fisher_oracle import DENSE_LAYERS, Reference, dense_structure, kronecker_block, positions, reference
from layer_cases import CrossAttention, Recurrent, layer_case
from oracle import CLASSES, DOUBLE, loss_case
from torch import Tensor, nn

import curvlab.fisher as cf
from curvlab.rows import jacobian
from curvlab.rows.factored import KroneckerRows
from curvlab.testing.oracle import assert_close, outputs, trainable

SPECS = ("block-diagonal", "unit-wise", "diagonal", "kfac", "kfac-reduce", "ekfac")
OPTIONS = {"kfac-reduce": {"sharing": "reduce"}}

Renaming = dict[str, str]
"""Names of the parameters of the network that is written out, to the other's."""


def structure(spec: str, model: nn.Module, loss: nn.Module, inputs: Tensor, targets: Tensor) -> cf.Structure:
    key = spec.partition("-reduce")[0]
    return cf.make(key, **OPTIONS.get(spec, {})).update(rows_of(model, loss, inputs, targets))


def permutation(model: nn.Module, written: nn.Module, names: Renaming) -> Tensor:
    """Return the places in the written-out network's vectors of the entries of the other's."""
    place = positions(written)
    back = {theirs: mine for mine, theirs in names.items()}
    return torch.cat([place[back.get(name, name)] for name in trainable(model)])


class WrittenAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward, self.last = nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        heads = (y.unflatten(-1, (2, 2)).transpose(1, 2) for y in self.inward(x).chunk(3, dim=-1))
        q, k, v = heads
        y = torch.softmax(q @ k.mT / 2**0.5, dim=-1) @ v
        return self.last(self.outward(y.transpose(1, 2).flatten(2))).sum(1)


class OwnAttention(CrossAttention):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.attend(x, x, x)[0]).sum(1)


ATTENTION = {
    "inward.weight": "attend.in_proj_weight",
    "inward.bias": "attend.in_proj_bias",
    "outward.weight": "attend.out_proj.weight",
    "outward.bias": "attend.out_proj.bias",
}


class WrittenGRU(nn.Module):
    """A GRU whose fed-back map is one module a step, with equal values."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.own, self.last = nn.Linear(3, 12), nn.Linear(4, CLASSES)
        self.fed_back = nn.ModuleList([nn.Linear(4, 12) for _ in range(steps)])

    def forward(self, x: Tensor) -> Tensor:
        own = self.own(x)
        h, states = x.new_zeros(len(x), 4), []
        for now, layer in zip(own.unbind(1), self.fed_back, strict=True):
            (r, z, n), (r_h, z_h, n_h) = now.chunk(3, dim=-1), layer(h).chunk(3, dim=-1)
            update = torch.sigmoid(z + z_h)
            h = (1 - update) * torch.tanh(n + torch.sigmoid(r + r_h) * n_h) + update * h
            states.append(h)
        return self.last(torch.stack(states, 1)).sum(1) + h.square().sum(1, keepdim=True)


@pytest.mark.parametrize("spec", SPECS)
def test_attention_is_its_two_linear_layers(spec: str) -> None:
    torch.manual_seed(0)
    model, written = OwnAttention("one").double(), WrittenAttention().double()
    values = model.state_dict()
    written.load_state_dict({name: values[ATTENTION.get(name, name)] for name in written.state_dict()})
    x, (loss, y) = draw(4, 3, 4), loss_case("mse").make(draw(4, CLASSES), "mean")
    mine, theirs = (structure(spec, m, loss, x, y).to_dense() for m in (model, written))
    at = permutation(model, written, ATTENTION)
    assert_close(mine, theirs[at[:, None], at])
    ref = reference(written, loss, x, y)
    assert_close(theirs, dense_structure(spec, ref, positions(written)), 1e-9)


@pytest.mark.parametrize("spec", ["block-diagonal", "kfac", "kfac-reduce", "ekfac"])
def test_a_layer_that_is_used_several_times_has_its_uses_as_positions(spec: str) -> None:
    torch.manual_seed(0)
    T = 3
    model, written = Recurrent(nn.GRU, batch_first=True).double(), WrittenGRU(T).double()
    names = {"own.weight": "net.weight_ih_l0", "own.bias": "net.bias_ih_l0"} | {
        f"fed_back.{t}.{kind}": f"net.{kind}_hh_l0" for t in range(T) for kind in ("weight", "bias")
    }
    values = model.state_dict()
    written.load_state_dict({name: values[names.get(name, name)] for name in written.state_dict()})
    x, (loss, y) = draw(5, T, 3), loss_case("ce").make(draw(5, CLASSES), "mean")
    assert_close(outputs(model, x), outputs(written, x))
    block = structure(spec, model, loss, x, y).to_dense()
    at = torch.cat([positions(model)[name] for name in ("net.weight_hh_l0", "net.bias_hh_l0")])
    order = torch.cat([torch.arange(12 * 4).view(12, 4), 48 + torch.arange(12).view(12, 1)], 1).flatten()
    assert_close(block[at[:, None], at][order[:, None], order], shared(spec, reference(written, loss, x, y), T), 1e-9)


def shared(spec: str, ref: Reference, T: int) -> Tensor:
    """Return the block of the layers 1, …, T of a reference, as one layer."""
    layers = ref.layers[2 : 2 + T] if ref.layers[1].at.shape[0] == CLASSES else ref.layers[1 : 1 + T]
    assert {layer.at.shape for layer in layers} == {(12, 5)}
    total = torch.stack([ref.J[..., layer.at.flatten()] for layer in layers]).sum(0)
    exact = torch.einsum("nvp,nvw,nwq->pq", total, ref.moment, total)
    if spec == "block-diagonal":
        return exact
    if spec == "kfac-reduce":
        a = torch.stack([layer.a for layer in layers if layer.a is not None]).mean(0)
        G = torch.stack([layer.G for layer in layers if layer.G is not None]).sum(0)
        B = torch.einsum("nvtqo,nvw,nwtqp->qop", G, ref.moment, G)
        A = torch.einsum("n,ntqi,ntqj->qij", ref.omega, a, a)
    else:
        both = [ref.factors(layer) for layer in layers]
        B, A = sum(b for b, _ in both) + torch.zeros(1, dtype=DOUBLE), sum(a for _, a in both) / T
    return kronecker_block(layers[0], B, A / ref.omega.sum(), exact if spec == "ekfac" else None)


FACTORED = ["conv3d", "conv3d-same", "transposed1d", "transposed2d", "transposed3d"]
EXACT = ["groupnorm", "instancenorm1d", "instancenorm2d-tracked", "rmsnorm", "prelu", "batchnorm3d"]


@pytest.mark.parametrize("name", [*FACTORED, *EXACT])
def test_every_other_layer(name: str) -> None:
    model, inputs = layer_case(name).make(3)
    loss, targets = loss_case("mse").make(outputs(model, inputs), "mean")
    ref = reference(model, loss, inputs, targets)
    for spec in SPECS:
        found = structure(spec, model, loss, inputs, targets)
        assert_close(found.to_dense(), dense_structure(spec, ref, positions(model)), 1e-9)
        v = draw(ref.P)
        assert_close(found.matvec(v), found.to_dense() @ v, 1e-9)


@pytest.mark.parametrize(
    "name", ["transposed1d", "self-attention", "cross-attention", "lstm-all", "tied-bias", "bilinear"]
)
@pytest.mark.parametrize("spec", ["kfac", "ekfac", "unit-wise"])
def test_solve_and_response_of_one_matrix(name: str, spec: str) -> None:
    model, inputs = layer_case(name).make(3)
    loss, targets = loss_case("mse").make(outputs(model, inputs), "mean")
    rows, J = rows_of(model, loss, inputs, targets), jacobian(model, inputs)
    found, rho = cf.make(spec).update(rows), 0.1
    inverse = torch.linalg.inv(found.to_dense() + rho * torch.eye(rows.P, dtype=DOUBLE))
    v = draw(rows.P)
    assert_close(found.solve(v, rho), inverse @ v, 1e-9)
    assert_close(found.response(J, rho), J.dense() @ inverse @ J.dense().T / rows.count, 1e-9)
    again = cf.make(spec)
    again.load_state_dict(found.state_dict())
    assert_close(again.solve(v, rho), found.solve(v, rho))


def test_the_deep_linear_identity_holds_for_transposed_convolutions() -> None:
    """K-FAC is exact for one position and the squared error of a deep linear network (Bernacchia et al. 2018)."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (4, 1)), nn.ConvTranspose1d(4, 6, 1), nn.Flatten(), nn.Linear(6, CLASSES)
    ).double()
    loss, y = loss_case("mse").make(draw(5, CLASSES), "mean")
    rows = rows_of(model, loss, draw(5, 4), y)
    assert all(isinstance(layer, KroneckerRows) for layer in rows.layers)
    assert_close(cf.KFAC().update(rows).to_dense(), cf.BlockDiagonal().update(rows).to_dense(), 1e-9)


def test_dense_layers_of_the_reference_are_those_with_kronecker_rows() -> None:
    made: Callable[[str], nn.Module] = lambda name: layer_case(name).make(1)[0][0]  # noqa: E731
    assert {type(made(name)) for name in FACTORED} <= set(get_args(DENSE_LAYERS))
