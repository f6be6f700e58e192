"""Closures and contexts as frameworks have them: closures that do nothing, gradients cleared late, contexts in contexts."""

import pytest
import torch
from optimiser_cases import data, flat, network, optimiser
from preconditioner_cases import RHO, now, run
from torch import nn

from curvlab.errors import StateError
from curvlab.optim import Preconditioner
from curvlab.optim.routes import Gradient


def test_a_closure_that_does_nothing_is_a_step_after_the_pass_before_it() -> None:
    for made in (plain := optimiser(network()), closed := optimiser(network())):
        for seed in range(3):
            run(made.preconditioner, *data(seed=seed))
            assert made.step(None if made is plain else lambda: None) is None
    assert torch.equal(flat(plain.preconditioner.model), flat(closed.preconditioner.model))


def test_a_closure_that_does_nothing_without_a_pass_before_it_is_refused() -> None:
    with pytest.raises(StateError, match="No rows were collected: call the Sequential"):
        optimiser(network()).step(lambda: None)


def test_a_closure_that_calls_the_model_and_not_the_loss_is_refused_after_a_pass() -> None:
    made = optimiser(network())
    run(made.preconditioner, *data())
    with pytest.raises(StateError, match="No rows were collected: call the CrossEntropyLoss"):
        made.step(lambda: made.preconditioner.model(data()[0]))


def test_a_context_within_a_context_is_the_same_one() -> None:
    once, twice = (Preconditioner(network(), nn.CrossEntropyLoss(), damping=RHO) for _ in range(2))
    run(once, *data())
    with twice.collect():
        run(twice, *data())
    for pre in (once, twice):
        pre.precondition()
    assert torch.equal(now(once), now(twice))


def test_a_context_is_closed_by_an_error() -> None:
    pre = Preconditioner(network(), nn.CrossEntropyLoss(), damping=RHO)
    with pytest.raises(ZeroDivisionError), pre.collect():
        raise ZeroDivisionError
    run(pre, *data())
    pre.precondition()
    assert pre.steps == 1


@pytest.mark.parametrize("key", ["kfac", "full"])
def test_gradients_cleared_between_forward_and_backward_pass_keep_the_cheap_route(key, monkeypatch) -> None:
    """The loss is called while gradients of the step before are still there, as in Lightning."""
    early, late = (Preconditioner(network(), nn.CrossEntropyLoss(), key, kind="exact", damping=RHO) for _ in range(2))
    monkeypatch.delattr(Gradient, "direction")
    for seed in range(3):
        run(early, *data(seed=seed))
        with late.collect():
            value = late.loss(late.model(data(seed=seed)[0]), data(seed=seed)[1])
            late.model.zero_grad()
            value.backward()
        for pre in (early, late):
            pre.precondition()
        assert torch.equal(now(early), now(late))
