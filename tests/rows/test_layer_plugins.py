"""Layers that a user or an installed package adds."""

import sys

import pytest
import torch
from torch import nn

import curvlab
from curvlab.rows import modules
from curvlab.rows.factored import KroneckerRows
from curvlab.rows.layer import DenseRows
from curvlab.testing import check_layer
from curvlab.testing.oracle import assert_close, dense_jacobian


class Scaled(nn.Linear):
    """A linear layer with a scale of its own, so that the rule of `nn.Linear` does not cover it."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.fixture
def as_it_was(monkeypatch):
    monkeypatch.setattr(modules, "RULES", dict(modules.RULES))
    yield
    modules.load_plugins.cache_clear()


FOREIGN = """
from torch import nn
from curvlab.rows.modules import Rule
from curvlab.rows.modules.linear import LINEAR

class Foreign(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)

def rows(use, inputs, g):
    return LINEAR.rows(use, inputs, 2 * g)

LAYERS = {Foreign: Rule(LINEAR.units, rows)}
"""


def test_a_registered_rule_is_used(as_it_was):
    check_layer(Scaled(4, 3), torch.randn(3, 4), factored=False)
    linear = modules.RULES[nn.Linear]
    modules.register(Scaled, modules.Rule(linear.units, lambda use, inputs, g: linear.rows(use, inputs, 2 * g)))
    check_layer(Scaled(4, 3), torch.randn(3, 4), factored=True)
    [layer] = curvlab.jacobian(Scaled(4, 3), torch.randn(3, 4)).layers
    assert isinstance(layer, KroneckerRows)


class OfList(nn.Linear):
    """A linear layer that is called on a list of one tensor."""

    def forward(self, xs):
        return super().forward(xs[0])


class OnList(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = OfList(4, 3)

    def forward(self, x):
        return self.inner([x])


def test_a_layer_with_a_rule_that_is_called_on_no_tensor_has_dense_rows(as_it_was):
    modules.register(OfList, modules.RULES[nn.Linear])
    model, x = OnList().double(), torch.randn(3, 4).double()
    rows = curvlab.jacobian(model, x)
    assert isinstance(rows.layers[0], DenseRows)
    assert_close(rows.dense(), dense_jacobian(model, x))


def test_a_package_adds_layers_and_one_that_fails_is_named(as_it_was, tmp_path, monkeypatch):
    (tmp_path / "foreign_layers.py").write_text(FOREIGN)
    info = tmp_path / "foreign-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign\nVersion: 1.0\n")
    points = "[curvlab.layers]\nlayers = foreign_layers:LAYERS\nbroken = foreign_layers:NOTHING\n"
    (info / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(tmp_path))
    modules.load_plugins.cache_clear()
    with pytest.warns(UserWarning, match="the layers 'broken' of the package foreign .* cannot be loaded"):
        assert "Foreign" in modules.supported_layers()
    foreign = sys.modules.pop("foreign_layers")
    check_layer(foreign.Foreign(4, 3), torch.randn(3, 4), factored=True)
