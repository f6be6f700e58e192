"""The optimiser against itself after a restart, and copies of it."""

import copy
import pickle
from typing import Any

import pytest
import torch
from optimiser_cases import RHO, data, flat, network, optimiser, take
from torch import nn

from curvlab.fisher import KFAC
from curvlab.optim import LevenbergMarquardt


@pytest.mark.parametrize("damping", [RHO, LevenbergMarquardt(every=1)])
def test_copies_and_pickles_go_on_alike(damping: Any) -> None:
    made = optimiser(network(), structure="kfac", kind="mc", momentum=0.5, damping=damping)
    take(made, *data(seed=0))
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        original = copy.deepcopy(made)
        for seed in (1, 2):
            take(original, *data(seed=seed))
            take(other, *data(seed=seed))
        assert torch.equal(flat(original.preconditioner.model), flat(other.preconditioner.model))
        assert other.damping == original.damping


def test_copies_of_a_scheduled_optimiser_move_the_model_that_was_copied() -> None:
    model, loss = network(), nn.CrossEntropyLoss()
    made = optimiser(model, loss, structure="kfac")
    scheduler = torch.optim.lr_scheduler.StepLR(made, 2)
    made.register_step_post_hook(lambda *_: None)
    take(made, *data(seed=0))
    scheduler.step()
    before = flat(model)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        twin = other.preconditioner.model
        take(other, *data(seed=1))
        assert torch.equal(flat(model), before)
        assert not torch.equal(flat(twin), before)
        assert not other._optimizer_step_post_hooks
    take(made, *data(seed=1))
    assert torch.equal(flat(model), flat(twin))


def test_the_state_of_another_optimiser_is_refused_before_anything_changes() -> None:
    model = network()
    made = optimiser(model, momentum=0.5)
    take(made, *data())
    before = copy.deepcopy(made.state_dict())
    with pytest.raises(ValueError, match=r"has no 'preconditioner' and no 'rho', so it is that of another optimiser"):
        made.load_state_dict(torch.optim.SGD(model.parameters(), lr=7.0).state_dict())
    assert made.param_groups[0]["lr"] == before["param_groups"][0]["lr"]
    assert made.preconditioner.steps == 1
    assert len(made.state) == len(before["state"])


@pytest.mark.parametrize(
    "options",
    [
        {"structure": "full", "momentum": 0.9},
        {"structure": "ekfac", "kind": "mc", "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
        {"structure": "kfac", "damping": LevenbergMarquardt(every=2), "momentum": 0.5},
        {"structure": "kfac", "damping": LevenbergMarquardt(every=2), "lr": "quadratic"},
        {"structure": "diagonal", "kind": "mc", "refresh_every": 3, "kl_clip": 1e-2},
    ],
)
def test_a_saved_state_continues_bit_for_bit(options: dict[str, Any]) -> None:
    model = network()
    made = optimiser(model, **options)
    for step in range(4):
        take(made, *data(seed=step))
    twin = network()
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    other = optimiser(twin, **options)
    other.load_state_dict(copy.deepcopy(made.state_dict()))
    for step in range(4, 9):
        take(made, *data(seed=step))
        take(other, *data(seed=step))
        assert torch.equal(flat(model), flat(twin))
    assert made.damping == other.damping


def test_a_state_survives_a_file(tmp_path: Any) -> None:
    model = network()
    made = optimiser(model, structure=KFAC(factored_damping=True, invert_every=3), momentum=0.5)
    take(made, *data())
    torch.save(made.state_dict(), tmp_path / "state.pt")
    other = optimiser(model, structure=KFAC(factored_damping=True, invert_every=3), momentum=0.5)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.preconditioner.steps == 1
