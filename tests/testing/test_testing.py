"""The checks pass for what is curvlab's own, and say of what is broken what is."""

import pytest
import torch
from torch import nn

from curvlab.fisher import STRUCTURES, Diagonal
from curvlab.nn import NTKLinear
from curvlab.problems import image_problem, resolve
from curvlab.rows.modules import RULES
from curvlab.testing import check_layer, check_problem, check_structure


def sigma(layers):
    return torch.eye(layers, dtype=torch.float64) + 0.1


OPTIONS = {"layer-wise": {"sigma": sigma}}
"""Options without which a structure cannot be made."""


@pytest.mark.parametrize("key", STRUCTURES)
def test_every_structure_keeps_the_contract(key):
    check_structure(STRUCTURES[key], **OPTIONS.get(key, {}))


def test_a_structure_is_held_to_its_definition():
    check_structure(Diagonal, definition=lambda exact, _: exact.diagonal().diag())
    with pytest.raises(AssertionError, match="Diagonal on a perceptron, .* matrix of the definition does not hold"):
        check_structure(Diagonal, definition=lambda exact, _: 2 * exact)


@pytest.fixture
def broken():
    """A diagonal with one verb replaced, which is out of the registry again afterwards."""

    def make(**verbs):
        return type("Broken", (Diagonal,), verbs, key="broken", summary="a diagonal that is wrong")

    yield make
    STRUCTURES.unregister("broken")


@pytest.mark.parametrize(
    ("verbs", "statement"),
    [
        ({"solve": lambda self, v, damping, info=False: v}, r"solve\(v, ρ\) = \(F \+ ρI\)⁻¹v, absolute and relative ρ"),
        ({"trace": lambda self: 1.0}, r"trace\(\), eigvalsh\(\) and largest_eigenvalue\(\) are those of F"),
        ({"update": lambda self, rows, decay=0.0, total=None: None}, r"update\(rows\) returns the structure itself"),
        ({"state_dict": lambda self: {}}, "copies, pickles and stored states are the structure"),
    ],
)
def test_a_broken_verb_is_named(broken, verbs, statement):
    with pytest.raises(AssertionError, match=f"Broken on a perceptron, .*: {statement} does not hold"):
        check_structure(broken(**verbs))


def test_options_are_those_of_the_constructor(broken):
    def init(self, *, parts=2):
        super(cls, self).__init__(rtol=1.0 / (10 * parts))

    cls = broken(__init__=init)
    with pytest.raises(
        AssertionError, match=r"the constructor takes \['parts'\], options returns \['rtol'\]: override"
    ):
        check_structure(cls)


LAYERS = {
    nn.Bilinear: None,
    nn.Embedding: (lambda: nn.Embedding(5, 3), lambda: torch.randint(5, (3, 4))),
    nn.EmbeddingBag: (lambda: nn.EmbeddingBag(5, 3), lambda: torch.randint(5, (3, 4))),
    nn.PReLU: (lambda: nn.PReLU(4), lambda: torch.randn(3, 4)),
    nn.LayerNorm: (lambda: nn.LayerNorm(4), lambda: torch.randn(3, 2, 4)),
    nn.RMSNorm: (lambda: nn.RMSNorm(4), lambda: torch.randn(3, 2, 4)),
    nn.GroupNorm: (lambda: nn.GroupNorm(2, 4), lambda: torch.randn(3, 4, 5)),
}
"""How layers are made that are not made by two widths; None for one that takes two inputs."""


def made(kind):
    if kind in LAYERS:
        return LAYERS[kind]
    if kind in (nn.Linear, NTKLinear):
        return lambda: kind(4, 3), lambda: torch.randn(3, 4)
    axes = int(kind.__name__[-2])
    options = {"affine": True} if "Norm" in kind.__name__ else {}
    arguments = (4,) if options else (4, 3, 2)
    return lambda: kind(*arguments, **options), lambda: torch.randn(3, 4, *(3,) * axes)


@pytest.mark.parametrize("kind", [kind for kind in RULES if made(kind)], ids=lambda kind: kind.__name__)
def test_every_layer_of_the_table_has_right_rows(kind):
    build, inputs = made(kind)
    check_layer(build(), inputs(), factored=True)


class Scaled(nn.Module):
    """A layer without a rule."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return x * self.scale


class Wrong(nn.Linear):
    """A layer that says it is linear, and lets samples interact."""

    def forward(self, x):
        return super().forward(x) * x.mean()


def test_layers_without_a_rule_are_right_and_said_to_have_none():
    check_layer(Scaled(), torch.randn(3, 4), factored=False)
    with pytest.raises(AssertionError, match="Scaled: the layer has a rule does not hold"):
        check_layer(Scaled(), torch.randn(3, 4), factored=True)
    with pytest.raises(AssertionError, match="Wrong: rows of J are the derivatives of the outputs"):
        check_layer(Wrong(4, 3), torch.randn(3, 4))
    with pytest.raises(AssertionError, match="two samples at least"):
        check_layer(Scaled(), torch.randn(1, 4))


def digits(*, width=4, seed=0):
    return image_problem("digits", samples=6, width=width, seed=seed)


def seedless(*, seed=0):
    return resolve("digits", samples=6, width=4, seed=0)


def drawn(*, seed=0):
    problem = digits(seed=seed)
    with torch.no_grad():
        next(problem.model.parameters()).add_(torch.rand(()))
    return problem


def unused(*, seed=0):
    problem = digits(seed=seed)
    problem.model.extra = nn.Parameter(torch.zeros(2))
    return problem


def demanding(*, seed=0, colour):
    return digits(seed=seed)


def unseeded():
    return digits()


def nothing(*, seed=0):
    return None


def test_a_problem_keeps_the_contract():
    check_problem(digits)


@pytest.mark.parametrize(
    ("function", "statement"),
    [
        (seedless, "another seed gives another network or other data"),
        (drawn, "the same seed gives the same data and the same network"),
        (unused, "the loss is finite and differentiable in torch.float64 .* no gradient reaches extra"),
        (demanding, "every argument has a default, or is one that analyses pass .* colour is none of"),
        (nothing, "it returns a Problem"),
        (unseeded, "another seed gives another network or other data .* takes no argument `seed`"),
    ],
)
def test_what_is_wrong_with_a_problem_is_named(function, statement):
    with pytest.raises(AssertionError, match=f"{function.__name__}: {statement}"):
        check_problem(function)
