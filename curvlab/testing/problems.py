"""Whether a function is a problem that every analysis can take."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from curvlab.problems import ARGUMENTS, Problem, digest_of
from curvlab.rows import sqrt_fisher
from curvlab.testing.failing import that


def check_problem(function: Callable[..., Problem], **arguments: Any) -> None:
    """Check a function that returns a `curvlab.problems.Problem`.

    It returns the same problem for the same seed and another network for another one, whatever random numbers were drawn
    before; its loss is finite, with a gradient for every trainable parameter; it works in float32 and float64, and its
    model and loss have curvature.

    Args:
        function: The function, as it is named by `--problem module:function`.
        arguments: For it, besides `seed`.

    Raises:
        AssertionError: something does not hold; the message says what.
    """
    name = getattr(function, "__name__", repr(function))
    with that("every argument has a default, or is one that analyses pass", name):
        for parameter in inspect.signature(function).parameters.values():
            known = parameter.name in ARGUMENTS or parameter.default is not parameter.empty
            assert known, f"{parameter.name} is none of {', '.join(ARGUMENTS)} and has no default"
    seeded = "seed" in inspect.signature(function).parameters

    def make(seed: int) -> Problem:
        return function(**arguments, **({"seed": seed} if seeded else {}))

    with that("it returns a Problem", name):
        problem = make(0)
        assert isinstance(problem, Problem), f"it returned {type(problem).__name__}"
    with that("the same seed gives the same data and the same network", name):
        torch.rand(3)
        assert digest_of(make(0)) == digest_of(problem), "two calls differ"
    with that("another seed gives another network or other data", name):
        assert seeded, "it takes no argument `seed`, so that every repetition would be the same"
        assert digest_of(make(1)) != digest_of(problem), "seeds 0 and 1 are the same"
    for dtype in (torch.float64, torch.float32):
        moved = problem.to("cpu", dtype)
        x, y = moved.train
        with that(f"the loss is finite and differentiable in {dtype}", name):
            value = moved.loss(moved.model(x), y)
            assert value.ndim == 0, f"the loss is {list(value.shape)}"
            assert bool(value.isfinite()), f"the loss is {float(value)}"
            value.backward()
            without = [own for own, p in moved.model.named_parameters() if p.requires_grad and p.grad is None]
            assert not without, f"no gradient reaches {', '.join(without)}"
        with that("the loss is finite on test data", name), torch.no_grad():
            value = moved.loss(moved.model(moved.test[0]), moved.test[1])
            assert bool(value.isfinite()), f"the loss is {float(value)}"
    with that("model and loss have curvature", name):
        x, y = problem.train
        few = len(x) if problem.model(x[:1]).shape[0] != 1 else min(len(x), 3)
        sqrt_fisher(problem.model, problem.loss, x[:few], y[:few], "empirical")
