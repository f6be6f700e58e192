"""A problem's validation, linearisation and moves; problems by name and from user functions."""

import inspect

import pytest
import torch
from torch import nn

from curvlab.errors import CurvlabError
from curvlab.nn import HalfSquaredError, Linearized, ntk_mlp
from curvlab.problems import ARGUMENTS, GRAPHS, PROBLEMS, Problem, ProblemError, resolve, swept_arguments
from curvlab.problems.short_text import SHORT_TEXT


def make(model: nn.Module | None = None, **changes: object) -> Problem:
    fields = {
        "name": "made",
        "model": model or ntk_mlp((3, 4, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        "loss": HalfSquaredError(),
        "train": (torch.ones(5, 3, dtype=torch.float64), torch.zeros(5, 2, dtype=torch.float64)),
        "test": (torch.ones(4, 3, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64)),
    }
    return Problem(**{**fields, **changes})


def double(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def with_value(value: float) -> torch.Tensor:
    inputs = double(5, 3)
    inputs[3, 1] = value
    return inputs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": (double(0, 3), double(0, 2))}, "train holds inputs .*positive number of samples"),
        ({"test": (double(4, 3), double(3, 2))}, "test holds inputs .* and targets .*the same"),
        ({"train": (double(), double())}, "first axis"),
        ({"test": (double(4, 2), double(4, 2))}, r"training sample's inputs are \[3\] .* test sample's are \[2\]"),
        ({"test": (double(4, 3), double(4, 2).long())}, "targets are .*float64.*int64"),
        ({"train": (with_value(float("nan")), double(5, 2))}, "train inputs of sample 3 are not finite"),
        ({"train": (with_value(float("inf")), double(5, 2))}, "train inputs of sample 3 are not finite"),
        ({"test": (double(4, 3), double(4, 2) / 0)}, "test targets of sample 0 are not finite"),
        ({"model": ntk_mlp((3, 2), dtype=torch.float32)}, "are torch.float64, parameter 0.weight is torch.float32"),
        ({"model": ntk_mlp((3, 2), dtype=torch.float64, device="meta")}, "on cpu, .* is on meta; Problem.to"),
    ],
)
def test_inconsistent_problems_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"Problem 'made': .*{message}"):
        make(**changes)


def test_integer_data_fit_any_model():
    problem = make(
        nn.Sequential(nn.Embedding(6, 4, dtype=torch.float64), nn.Flatten(), nn.Linear(8, 3, dtype=torch.float64)),
        loss=nn.CrossEntropyLoss(),
        train=(torch.zeros(5, 2, dtype=torch.long), torch.arange(5) % 3),
        test=(torch.ones(2, 2, dtype=torch.long), torch.arange(2)),
    )
    moved = problem.to(dtype=torch.float32)
    assert moved.train[0].dtype == moved.train[1].dtype == torch.long
    assert moved.loss(moved.model(moved.train[0]), moved.train[1]).dtype == torch.float32


def test_problems_are_frozen():
    with pytest.raises(AttributeError, match="name"):
        make().name = "other"


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_linearized_keeps_everything_but_the_model():
    problem = make()
    linear = problem.linearized()
    assert isinstance(linear.model, Linearized)
    assert linear.name == "made (linearised)"
    assert (linear.loss, linear.train, linear.test) == (problem.loss, problem.train, problem.test)
    torch.testing.assert_close(linear.model(problem.train[0]), problem.model(problem.train[0]))


def test_to_returns_a_copy_and_leaves_the_problem_alone():
    problem = make(loss=nn.CrossEntropyLoss(weight=torch.ones(2, dtype=torch.float64)))
    single = problem.to(dtype=torch.float32, device="cpu")
    tensors = [*single.model.parameters(), single.loss.weight, *single.train, *single.test]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    tensors = [*problem.model.parameters(), problem.loss.weight, *problem.train, *problem.test]
    assert {tensor.dtype for tensor in tensors} == {torch.float64}
    same = problem.to()
    assert same.model is not problem.model
    assert same.train[0].dtype == torch.float64


def test_repr_is_one_line_without_data():
    assert repr(make()) == (
        "Problem('made', Sequential with 20 parameters, HalfSquaredError(reduction='mean'), "
        "train 5 × [3] -> [2], test 4 × [3] -> [2])"
    )


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A module `mine` as a user would write it."""
    (tmp_path / "mine.py").write_text(
        """
import torch
from torch import nn
from curvlab.problems import Problem

constant = 3

def problem(width=4, seed=0, scale=1.0):
    torch.manual_seed(seed)
    data = (scale * torch.rand(6, 3), torch.rand(6, 2))
    return Problem(f"mine {width} {seed}", nn.Linear(3, width), nn.MSELoss(), data, data)

def demanding(width, path):
    return problem(width)

def wrong(seed=0):
    return seed

def failing(width=4):
    raise KeyError("pixels")

def hungry():
    raise MemoryError("no room")
"""
    )
    (tmp_path / "broken.py").write_text("import a_module_that_is_not_there\n")
    (tmp_path / "unfinished.py").write_text("width = depth\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_user_function_gets_the_arguments_that_it_names(user_module):
    assert resolve("mine:problem", width=7, seed=2, depth=9, activation="tanh").name == "mine 7 2"
    assert resolve("mine:problem").name == "mine 4 0"
    assert swept_arguments("mine:problem") == {"width": 4, "seed": 0}
    assert swept_arguments("mine:demanding") == {"width": inspect.Parameter.empty}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digitz", "Unknown problem 'digitz'. Did you mean 'digits'.* module:function"),
        ("nowhere:problem", "importing 'nowhere' failed .*PYTHONPATH"),
        ("broken:problem", "importing 'broken' failed .*a_module_that_is_not_there"),
        ("unfinished:problem", "importing 'unfinished' raised NameError: name 'depth' is not defined"),
        ("mine:problm", "Unknown function of mine 'problm'. Did you mean 'problem'"),
        ("mine:constant", "constant is int, not a function"),
        ("mine:demanding", r"missing a required argument: 'path'.*called with \['width'\]"),
        ("mine:wrong", "returned int; it must return a curvlab.problems.Problem"),
    ],
)
def test_specs_that_lead_nowhere_are_explained(user_module, spec, message):
    with pytest.raises(ProblemError, match=message) as caught:
        resolve(spec, width=5)
    assert isinstance(caught.value, CurvlabError)
    assert isinstance(caught.value, ValueError)


def test_what_a_users_function_raises_is_named_and_chained(user_module):
    with pytest.raises(
        ProblemError, match=r"'mine:failing'.* raised KeyError: 'pixels' \(in failing, .*mine.py:\d+\)"
    ) as caught:
        resolve("mine:failing", width=5)
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(MemoryError):
        resolve("mine:hungry")


def test_misspelt_argument_is_refused():
    with pytest.raises(ValueError, match=r"Unknown argument of a problem 'widht'\. Did you mean 'width'"):
        resolve("digits", widht=3)


def test_registered_problems_take_the_arguments_that_an_analysis_may_pass():
    on_images = {"digits", "mnist", "fashion-mnist", "cifar10", "cifar10-5k", "karakida-osawa"}
    networks = {
        "digits-mlp",
        "digits-residual",
        "fashion-mlp",
        "fashion-lenet",
        "cifar10-5k-cnn",
        "cifar10-5k-residual",
    }
    trained = networks | {"characters", "chebyshev", *SHORT_TEXT}
    two_layer = {"two-layer", "synthetic-two-layer"}
    assert set(PROBLEMS) == on_images | two_layer | trained | {f"{graph}-gcn" for graph in GRAPHS}
    for name in on_images:
        others = {"weight_std", "similarity", "dimension", "split", "dropout"}
        assert set(ARGUMENTS) - set(swept_arguments(name)) == others
    for name in PROBLEMS:
        assert {"seed", "dtype"} <= set(swept_arguments(name))
    for name in set(PROBLEMS) - trained:
        assert {"width", "activation", "samples", "test_samples", "seed", "dtype"} <= set(swept_arguments(name))
    assert {"depth", "outputs", "loss"}.isdisjoint(swept_arguments("two-layer"))
    assert swept_arguments("synthetic-two-layer")["similarity"] == 0.5
    assert {"width", "depth", "seed", "activation", "outputs", "samples"} < set(ARGUMENTS)
    assert swept_arguments("digits")["samples"] == 40
    paper = swept_arguments("karakida-osawa")
    assert (paper["width"], paper["depth"], paper["samples"], paper["test_samples"]) == (4096, 3, 100, 50)
