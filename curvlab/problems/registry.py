"""Problems by name, and from the user's own functions."""

import inspect
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from curvlab.errors import CurvlabError, unknown_name
from curvlab.problems.chebyshev import chebyshev_problem
from curvlab.problems.classification import image_problem
from curvlab.problems.graphs import GRAPHS, graph_problem
from curvlab.problems.images import IMAGE_SETS
from curvlab.problems.problem import Problem
from curvlab.problems.short_text import SHORT_TEXT
from curvlab.problems.text import character_problem
from curvlab.problems.two_layer import synthetic_two_layer_problem, two_layer_problem
from curvlab.problems.vision import (
    cifar_cnn_problem,
    cifar_residual_problem,
    digits_mlp_problem,
    digits_residual_problem,
    fashion_mlp_problem,
    lenet_problem,
)
from curvlab.tools.errors import CommandError, DataUnavailable
from curvlab.tools.registry import BrokenPlugin, Registry, UnknownName

ARGUMENTS = tuple(
    dict.fromkeys(
        name
        for function in (image_problem, two_layer_problem, synthetic_two_layer_problem, graph_problem)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name != "name"
    )
)
"""What an analysis may pass to a problem; each function gets those that its signature names."""

_OURS: Mapping[str, Callable[..., Problem]] = {
    **{images: partial(image_problem, images) for images in IMAGE_SETS},
    "digits": partial(image_problem, "digits", samples=40),
    "karakida-osawa": partial(image_problem, "mnist", name="karakida-osawa", width=4096),
    "two-layer": partial(two_layer_problem, "digits"),
    "synthetic-two-layer": synthetic_two_layer_problem,
    "chebyshev": chebyshev_problem,
    **{f"{graph}-gcn": partial(graph_problem, graph) for graph in GRAPHS},
    "digits-mlp": digits_mlp_problem,
    "digits-residual": digits_residual_problem,
    "fashion-mlp": fashion_mlp_problem,
    "fashion-lenet": lenet_problem,
    "cifar10-5k-cnn": cifar_cnn_problem,
    "cifar10-5k-residual": cifar_residual_problem,
    "characters": character_problem,
    **SHORT_TEXT,
}
"""`digits` needs no file: classes 0 and 1, N = 40, below the rank that 64 pixels allow.
`karakida-osawa` is the paper's own setting: MNIST 0 and 1, N = 100, 50 test samples, width 4096, depth 3.
`two-layer` has the data of `digits`, `synthetic-two-layer` random inputs; both have the network of Zhang,
Martens & Grosse. `karate-gcn`, `cora-gcn`, `citeseer-gcn` and `pubmed-gcn` classify the nodes of a graph; karate needs
no file. `digits-mlp`, `digits-residual`, `fashion-mlp`, `fashion-lenet`, `cifar10-5k-cnn`, `cifar10-5k-residual` and
`characters` are whole training tasks,
`short-text`, `short-text-cnn`, `short-text-mlp` and `short-text-mixer` four small networks on the same text, `chebyshev` a
regression in one variable."""

PROBLEMS: Registry[Callable[..., Problem]] = Registry(
    "problem", "curvlab.problems", _OURS, form="a function", fits=callable
)
"""Problems by name, ours and those of installed packages, which add to them by entry points of the group
``curvlab.problems``, or by `PROBLEMS.register`."""


class ProblemError(CurvlabError, CommandError, ValueError):
    """A problem that cannot be made from what the user named; the message says why."""


def resolve(spec: str, **arguments: Any) -> Problem:
    """Return the problem that a user named.

    Args:
        spec: A key of `PROBLEMS`, or "module:function" for a function that returns a `Problem`.
        arguments: Any of `ARGUMENTS`. Those that the function's signature does not name are left out.

    Raises:
        ProblemError: The name is unknown, the module or function does not exist or is not a function, it
            needs an argument that is not given, raises, or returns something else.
        ValueError: An argument is not one of `ARGUMENTS`, or the function refuses its value.
        DataUnavailable: The problem's data are absent and cannot be fetched, or are damaged.
    """
    for name in arguments:
        if name not in ARGUMENTS:
            raise unknown_name("argument of a problem", name, ARGUMENTS)
    function = _function(spec)
    signature = inspect.signature(function)
    passed = {name: value for name, value in arguments.items() if name in signature.parameters}
    try:
        signature.bind(**passed)
    except TypeError as error:
        raise ProblemError(
            f"Problem {spec!r}: {error}. It was called with {sorted(passed)}; other arguments need a default."
        ) from error
    problem = _called(spec, function, passed)
    if not isinstance(problem, Problem):
        raise ProblemError(
            f"Problem {spec!r} returned {type(problem).__name__}; it must return a curvlab.problems.Problem."
        )
    return problem


def _called(spec: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Return what the function returns; what a user's own raises is named, but for a shortage of data or memory."""
    if ":" not in spec:
        return function(**arguments)
    try:
        return function(**arguments)
    except (DataUnavailable, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        *_, (frame, line) = traceback.walk_tb(error.__traceback__)
        raise ProblemError(
            f"Problem {spec!r}: the function raised {type(error).__name__}: {error} "
            f"(in {frame.f_code.co_name}, {frame.f_code.co_filename}:{line}), called with {dict(arguments)}."
        ) from error


def swept_arguments(spec: str) -> dict[str, Any]:
    """Return those of `ARGUMENTS` that a problem takes, with their defaults.

    A required argument has `inspect.Parameter.empty`.

    Raises:
        ProblemError: The problem does not exist, see `resolve`.
    """
    parameters = inspect.signature(_function(spec)).parameters
    return {name: parameters[name].default for name in ARGUMENTS if name in parameters}


def _function(spec: str) -> Callable[..., Any]:
    """Return the function behind a spec."""
    try:
        return PROBLEMS[spec]
    except UnknownName as error:
        raise ProblemError(str(error)) from None
    except BrokenPlugin as error:
        raise ProblemError(str(error)) from error
