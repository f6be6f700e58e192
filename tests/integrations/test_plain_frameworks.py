"""Loops that prepare model, optimiser and data by accelerate or Fabric and are plain otherwise need no help of ours."""

from pathlib import Path
from typing import Any

import pytest
import torch
from integration_cases import OPTIMISERS, flat, loader, network, plain
from torch import nn

BATCHES = 6
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.parametrize("optimiser", OPTIMISERS)]


def accelerated(optimiser: str, accelerator: Any, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[float]]:
    model, loss, losses = network().to(dtype), nn.CrossEntropyLoss(), []
    made = OPTIMISERS[optimiser](model, loss)
    run, stepper, data = accelerator.prepare(model, made, loader(BATCHES, dtype))
    for x, y in data:
        with accelerator.accumulate(run):
            with made.preconditioner.collect():
                value = loss(run(x), y)
                accelerator.backward(value)
            stepper.step()
            stepper.zero_grad()
            losses.append(float(value.detach()))
    return model, losses


@pytest.fixture
def accelerate() -> Any:
    found = pytest.importorskip("accelerate", reason="accelerate is not installed")
    yield found
    found.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate_is_the_plain_loop(optimiser: str, accumulate: int, accelerate: Any) -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model, losses = accelerated(optimiser, accelerator)
    expected, of_batches = plain(optimiser, BATCHES, accumulate)
    torch.testing.assert_close(flat(model), flat(expected), rtol=1e-9, atol=1e-10)
    assert losses == pytest.approx(of_batches, rel=1e-9)
    assert losses[-1] < 0.9 * losses[0]


def test_accelerate_in_half_precision_is_the_plain_loop(optimiser: str, accelerate: Any) -> None:
    model, losses = accelerated(optimiser, accelerate.Accelerator(cpu=True, mixed_precision="bf16"), torch.float32)
    expected, of_batches = plain(optimiser, BATCHES, half=True)
    torch.testing.assert_close(flat(model), flat(expected), rtol=1e-4, atol=1e-5)
    assert losses == pytest.approx(of_batches, rel=1e-4)


def test_accelerate_saves_and_restores_curvature_with_the_optimiser(
    optimiser: str, accelerate: Any, tmp_path: Path
) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model, loss = network(), nn.CrossEntropyLoss()
    made = OPTIMISERS[optimiser](model, loss)
    run, stepper = accelerator.prepare(model, made)
    trained = []
    for position, (x, y) in enumerate([*loader(BATCHES), *list(loader(BATCHES))[3:]]):
        if position == 3:
            accelerator.save_state(str(tmp_path))
        if position == BATCHES:
            accelerator.load_state(str(tmp_path))
        stepper.zero_grad()
        with made.preconditioner.collect():
            accelerator.backward(loss(run(x), y))
        stepper.step()
        trained.append(flat(model))
    assert torch.equal(trained[5], trained[8])


@pytest.mark.parametrize("closes", [True, False])
def test_fabric_is_the_plain_loop(optimiser: str, closes: bool) -> None:
    fabrics = pytest.importorskip(
        "lightning.fabric", reason="lightning is not installed: pip install curvlab[lightning]"
    )
    fabric = fabrics.Fabric(accelerator="cpu", devices=1)
    model, loss = network(), nn.CrossEntropyLoss()
    run, stepper = fabric.setup(model, made := OPTIMISERS[optimiser](model, loss))
    for x, y in fabric.setup_dataloaders(loader(BATCHES)):

        def closure(x: Any = x, y: Any = y) -> Any:
            stepper.zero_grad()
            value = loss(run(x), y)
            fabric.backward(value)
            return value

        if closes:
            stepper.step(closure)
        else:
            with made.preconditioner.collect():
                closure()
            stepper.step()
    torch.testing.assert_close(flat(model), flat(plain(optimiser, BATCHES)[0]), rtol=1e-9, atol=1e-10)
