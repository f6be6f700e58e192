"""A preconditioner whose model grows between two steps."""

import copy
import io

import pytest
import torch
from oracle import DOUBLE
from preconditioner_cases import network
from torch import Tensor, nn

from curvlab.errors import StateError
from curvlab.fisher import KFAC, STRUCTURES
from curvlab.optim import Preconditioner
from curvlab.testing.oracle import assert_close

LOSS = nn.CrossEntropyLoss()


def data(seed: int, N: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, 4, dtype=DOUBLE, generator=generator), torch.arange(N) % 3


def widen(model: nn.Sequential) -> None:
    """Give the first layer two more units, which the second one does not listen to yet."""
    first, second = model[0], model[2]
    torch.manual_seed(1)
    wider, listening = nn.Linear(4, 8).double(), nn.Linear(8, 5).double()
    with torch.no_grad():
        wider.weight[:6], wider.bias[:6] = first.weight, first.bias
        listening.weight[:, :6], listening.bias[:] = second.weight, second.bias
        listening.weight[:, 6:] = 0
    model[0], model[2] = wider, listening


def step(natural: Preconditioner, seed: int) -> dict[str, Tensor]:
    model, (x, y) = natural.model, data(seed)
    model.zero_grad()
    with natural.collect():
        natural.loss(model(x), y).backward()
    natural.precondition()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("key", STRUCTURES)
def test_a_step_of_a_grown_network_is_that_of_a_fresh_preconditioner(key: str) -> None:
    model = network()
    natural = Preconditioner(model, LOSS, key, kind="exact", damping=1.0, kl_clip=None)
    step(natural, 1)
    widen(model)
    with pytest.raises(StateError, match=r"0, 2 were replaced\. Call rebind\(\)"):
        step(natural, 2)
    natural.rebind()
    assert natural.due
    found, fresh = step(natural, 2), step(Preconditioner(model, LOSS, key, kind="exact", damping=1.0, kl_clip=None), 2)
    for name, expected in fresh.items():
        if not (STRUCTURES[key].averages and name.startswith("4.")):
            assert_close(found[name], expected, 1e-10)
    if STRUCTURES[key].averages:
        assert float((found["4.weight"] - fresh["4.weight"]).norm()) > 1e-4 * float(fresh["4.weight"].norm())
    assert natural.steps == 2
    again = step(natural, 3)
    assert all(bool(value.isfinite().all()) for value in again.values())


def test_a_layer_is_known_by_its_parameters_whatever_its_name() -> None:
    model = network()
    natural = Preconditioner(model, LOSS, KFAC(), kind="exact", decay=0.5, kl_clip=None)
    step(natural, 1)
    other = copy.deepcopy(natural)
    deeper = nn.Sequential(*model[:4], nn.Linear(5, 5).double(), nn.Tanh(), model[4])
    natural.rebind(deeper)
    found = step(natural, 2)
    fresh = step(Preconditioner(deeper, LOSS, KFAC(), kind="exact", kl_clip=None), 2)
    assert_close(found["4.weight"], fresh["4.weight"], 1e-10)
    for name in ("0.weight", "2.weight", "6.weight"):
        assert float((found[name] - fresh[name]).norm()) > 1e-4 * float(fresh[name].norm())
    # A copy of the model has other parameters: all start anew, unless they are named.
    renamed = {name: name.replace("4.", "6.") for name in dict(model.named_parameters())}
    for names, expected in ((None, fresh), (renamed, found)):
        copied = copy.deepcopy(other)
        copied.rebind(copy.deepcopy(deeper), names)
        got = step(copied, 2)
        for name, value in expected.items():
            assert_close(got[name], value, 1e-10)


def test_curvature_is_due_until_a_step_of_the_grown_network_was_usable() -> None:
    model = network()
    natural = Preconditioner(model, LOSS, KFAC(), refresh_every=10, kl_clip=None)
    step(natural, 1)
    assert not natural.due
    widen(model)
    natural.rebind()
    saved = natural.state_dict()
    x, y = data(2)
    with natural.collect():
        LOSS(model(x) * torch.nan, y).backward()
    natural.precondition()
    assert natural.skipped == 1
    assert natural.due
    step(natural, 2)
    assert not natural.due
    restored = Preconditioner(model, LOSS, KFAC(), refresh_every=10, kl_clip=None)
    restored.load_state_dict(saved)
    step(restored, 2)
    assert not restored.due


@pytest.mark.parametrize("key", [key for key, structure in STRUCTURES.items() if structure.averages])
def test_checkpoints_hold_no_batch(key: str) -> None:
    sizes = []
    for N in (50, 5000):
        natural = Preconditioner(network(), LOSS, key, kind="exact", kl_clip=None)
        x, y = data(1, N)
        with natural.collect():
            LOSS(natural.model(x), y).backward()
        natural.precondition()
        buffer = io.BytesIO()
        torch.save(natural.state_dict(), buffer)
        sizes.append(buffer.tell())
    assert sizes[1] < sizes[0] + 500
