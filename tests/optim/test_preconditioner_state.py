"""What a preconditioner keeps from step to step: passes that accumulate, curvature that is refreshed, saved states."""

import copy
import gc
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from preconditioner_cases import RHO, data, network, now, options, reference, run
from torch import nn

from curvlab import sqrt_fisher
from curvlab.fisher import KFAC, STRUCTURES, Full, make
from curvlab.optim import Preconditioner
from curvlab.rows.collect import Collector
from curvlab.rows.loss import Kind
from curvlab.testing.oracle import assert_close


@pytest.mark.parametrize("key", ["kfac", "ekfac", "full", "block-diagonal", "diagonal", "unit-wise"])
def test_passes_before_a_step_accumulate(key: str) -> None:
    """Two halves of a batch give what the batch gives."""
    model, loss, (x, y) = network(), nn.CrossEntropyLoss(), data(8)
    pre = Preconditioner(model, loss, key, kind="exact", damping=RHO, kl_clip=None)
    model.zero_grad()
    for half in (slice(0, 4), slice(4, 8)):
        with pre.collect():
            (loss(model(x[half]), y[half]) / 2).backward()
    gradient = {name: p.grad.clone() for name, p in pre.parameters.items() if p.grad is not None}
    pre.precondition()
    rows = [sqrt_fisher(model, loss, x[half], y[half], "exact") for half in (slice(0, 4), slice(4, 8))]
    fitted = make(key).update(rows[0]).update(rows[1], 1.0)
    assert_close(now(pre), reference(fitted, gradient), 1e-8)


@pytest.mark.parametrize(("every", "refreshed"), [(2, (0, 2, 4, 6)), (lambda step: 1 if step < 3 else 3, (0, 1, 2, 5))])
def test_curvature_is_refreshed_averaged_and_reused(every: Any, refreshed: tuple[int, ...]) -> None:
    model, loss = network(), nn.CrossEntropyLoss()
    pre = Preconditioner(model, loss, "kfac", kind="exact", damping=RHO, decay=0.5, refresh_every=every, kl_clip=None)
    fitted = KFAC()
    for step in range(7):
        x, y = data(seed=step)
        rows = sqrt_fisher(model, loss, x, y, "exact")
        if step in refreshed:
            assert pre.due
            fitted.update(rows, 0.5)
            gradient = run(pre, x, y)
        else:
            assert not pre.due
            model.zero_grad()
            loss(model(x), y).backward()
            gradient = {name: p.grad.clone() for name, p in pre.parameters.items() if p.grad is not None}
        pre.precondition()
        assert_close(now(pre), reference(fitted, gradient), 1e-9)


def test_passes_that_were_given_up_are_forgotten() -> None:
    pre, expected = (
        Preconditioner(network(), nn.CrossEntropyLoss(), kind="exact", damping=RHO, kl_clip=None) for _ in range(2)
    )
    for seed in range(4):
        run(pre, *data(seed=seed))
    run(expected, *data(seed=3))
    pre.precondition()
    expected.precondition()
    assert torch.equal(now(pre), now(expected))


def test_a_state_from_before_the_first_step_begins_anew() -> None:
    pre, expected = (
        Preconditioner(network(), nn.CrossEntropyLoss(), kind="exact", damping=RHO, kl_clip=None) for _ in range(2)
    )
    blank = copy.deepcopy(pre.state_dict())
    run(pre, *data(seed=1))
    pre.precondition()
    run(pre, *data(seed=2))
    pre.load_state_dict(blank)
    for each in (pre, expected):
        run(each, *data(seed=3))
        each.precondition()
    assert torch.equal(now(pre), now(expected))


def test_a_structure_that_has_curvature_already_takes_the_first_batch() -> None:
    used, model, loss = Full(), network(), nn.CrossEntropyLoss()
    used.update(sqrt_fisher(model, loss, *data(seed=1)))
    pre = Preconditioner(model, loss, used, kind="exact", damping=RHO, kl_clip=None)
    gradient = run(pre, *data(seed=2))
    pre.precondition()
    fitted = Full().update(sqrt_fisher(model, loss, *data(seed=2)))
    assert_close(now(pre), reference(fitted, gradient), 1e-8)


@pytest.mark.parametrize("kind", ["mc", "empirical"])
def test_steps_leave_nothing_behind(kind: Kind) -> None:
    model, loss, (x, y) = network(), nn.CrossEntropyLoss(), data()
    pre = Preconditioner(model, loss, KFAC(), kind=kind, damping=RHO, seed=0, kl_clip=None)
    outputs = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            model.zero_grad()
            with pre.collect():
                z = model(x)
                loss(z, y).backward()
            pre.precondition()
            outputs.append(weakref.ref(z))
            del z
        assert [z() for z in outputs] == [None] * 3
        assert not [found for found in gc.get_objects() if type(found) is Collector and found._model is model]
        last = weakref.ref(model)
        del model, pre
        assert last() is None
    finally:
        gc.enable()


def test_inverses_are_made_in_turns_and_kept_in_between() -> None:
    model, loss = network(), nn.CrossEntropyLoss()
    structure = KFAC(factored_damping=True, invert_every=3)
    pre = Preconditioner(model, loss, structure, kind="exact", damping=RHO, kl_clip=None)
    kept = []
    for step in range(7):
        run(pre, *data(seed=step))
        pre.precondition()
        kept.append([block._inverses[0] for block in structure._blocks])  # type: ignore[attr-defined]
    made = [[a[k] is not b[k] for k in range(3)] for a, b in pairwise(kept)]
    assert [sum(step) for step in made] == [1] * 6
    assert all(sum(step[k] for step in made) == 2 for k in range(3))


@pytest.mark.parametrize("key", STRUCTURES)
def test_a_saved_state_continues_bit_for_bit(key: str) -> None:
    def make_one() -> Preconditioner:
        structure = KFAC(factored_damping=True, invert_every=3) if key == "kfac" else make(key, **options(key))
        return Preconditioner(network(), nn.CrossEntropyLoss(), structure, damping=RHO, refresh_every=2, kl_clip=None)

    first = make_one()
    for step in range(3):
        run(first, *data(seed=step))
        first.precondition()
    saved = copy.deepcopy(first.state_dict())
    second = make_one()
    second.load_state_dict(saved)
    for step in range(3, 8):
        for pre in (first, second):
            run(pre, *data(seed=step))
            pre.precondition()
        assert torch.equal(now(first), now(second))
