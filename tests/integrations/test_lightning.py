"""Training by Lightning against the same training in a plain loop."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchrun
from integration_cases import OPTIMISERS, flat, loader, network, plain
from torch import Tensor, nn

from curvlab.errors import StateError

pytest.importorskip("lightning", reason="lightning is not installed: pip install curvlab[lightning]")
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore"
    ),  # Lightning and the libraries behind it warn of loaders, loggers and deprecations
    pytest.mark.parametrize("optimiser", OPTIMISERS),
]

from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from lightning_cases import Digits, Manual, trainer  # noqa: E402

from curvlab.integrations.lightning import CollectCurvature  # noqa: E402

BATCHES = 6


def assert_trained_alike(module: Digits, optimiser: str, accumulate: int = 1) -> None:
    model, losses = plain(optimiser, BATCHES, accumulate)
    torch.testing.assert_close(flat(module.net), flat(model), rtol=1e-9, atol=1e-10)
    assert module.losses == pytest.approx(losses, rel=1e-9)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("collects", [True, False])
def test_automatic_optimisation_is_the_plain_loop(optimiser: str, collects: bool) -> None:
    """Without the callback, too, as closures are passed to the step."""
    made = trainer() if collects else trainer(callbacks=[])
    made.fit(module := Digits(optimiser), loader(BATCHES))
    assert_trained_alike(module, optimiser)
    assert not module.net._forward_pre_hooks
    assert not module.loss._forward_hooks


@pytest.mark.parametrize("closes", [True, False])
def test_manual_optimisation_is_the_plain_loop(optimiser: str, closes: bool) -> None:
    made = trainer()
    made.fit(module := Manual(optimiser, closes), loader(BATCHES))
    assert_trained_alike(module, optimiser)
    assert not module.net._forward_pre_hooks


class Contexts(Manual):
    """Opens the contexts itself."""

    def training_step(self, batch: Any) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        with optimizer.preconditioner.collect():
            self.manual_backward(Digits.training_step(self, batch))
        optimizer.step()


@pytest.mark.parametrize("collects", [True, False])
def test_contexts_of_the_users_own_are_the_plain_loop(optimiser: str, collects: bool) -> None:
    made = trainer() if collects else trainer(callbacks=[])
    made.fit(module := Contexts(optimiser), loader(BATCHES))
    assert_trained_alike(module, optimiser)


class SeveralSteps(Manual):
    """Takes two steps a batch of the loader, each on half of it."""

    def training_step(self, batch: Any) -> None:
        for half in zip(*(part.chunk(2) for part in batch), strict=True):
            super().training_step(half)


def test_several_steps_within_a_training_step_are_the_plain_loop(optimiser: str) -> None:
    data = loader(BATCHES).dataset
    made = trainer()
    made.fit(module := SeveralSteps(optimiser), torch.utils.data.DataLoader(data, batch_size=64))
    assert_trained_alike(module, optimiser)


def test_accumulated_gradients_are_the_plain_loop(optimiser: str) -> None:
    made = trainer(accumulate_grad_batches=2)
    made.fit(module := Digits(optimiser), loader(BATCHES))
    assert_trained_alike(module, optimiser, accumulate=2)


def test_a_run_from_a_checkpoint_is_the_uninterrupted_one_bit_for_bit(optimiser: str, tmp_path: Path) -> None:
    whole, first, second = Digits(optimiser), Digits(optimiser), Digits(optimiser)
    trainer(max_epochs=2).fit(whole, loader(BATCHES))
    made = trainer()
    made.fit(first, loader(BATCHES))
    made.save_checkpoint(tmp_path / "run.ckpt")
    trainer(max_epochs=2).fit(second, loader(BATCHES), ckpt_path=tmp_path / "run.ckpt")
    assert torch.equal(flat(second.net), flat(whole.net))
    assert first.losses + second.losses == whole.losses


def test_bfloat16_is_the_plain_loop(optimiser: str) -> None:
    made = trainer(precision="bf16-mixed")
    made.fit(module := Digits(optimiser, network().float()), loader(BATCHES, torch.float32))
    model, losses = plain(optimiser, BATCHES, half=True)
    torch.testing.assert_close(flat(module.net), flat(model), rtol=1e-4, atol=1e-5)
    assert module.losses == pytest.approx(losses, rel=1e-4)


def test_a_scaled_loss_moves_parameters_as_an_unscaled_one(optimiser: str) -> None:
    trained: list[Tensor] = []
    for scale in (1.0, 2.0**10):
        module, scaler = Digits(optimiser, network().float()), torch.amp.GradScaler("cpu", init_scale=scale)
        made = trainer(plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        made.fit(module, loader(BATCHES, torch.float32))
        assert module.losses[-1] < 0.9 * module.losses[0]
        trained.append(flat(module.net))
    way = torch.linalg.norm(trained[1] - flat(network().float()))
    assert torch.linalg.norm(trained[0] - trained[1]) < 0.02 * way


def test_steps_that_overflow_are_left_out(optimiser: str) -> None:
    module = Digits(optimiser, network().float())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    made = trainer(plugins=[MixedPrecision("16-mixed", "cpu", scaler)], max_epochs=8)
    made.fit(module, loader(BATCHES, torch.float32))
    assert scaler.get_scale() < 2.0**20
    assert flat(module.net).isfinite().all()
    assert module.losses[-1] < 0.8 * module.losses[0]


def test_numbers_of_the_steps_are_logged(optimiser: str) -> None:
    made = trainer()
    made.fit(Digits(optimiser), loader(1))
    assert made.callback_metrics["curvature/damping"] == pytest.approx(0.05)


class Plain(Digits):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


def test_a_module_without_curvature_is_refused(optimiser: str) -> None:
    with pytest.raises(ValueError, match=r"CollectCurvature needs one optimiser .* returned 0"):
        trainer().fit(Plain(optimiser), loader(1))


def test_a_module_whose_own_call_is_redirected_is_refused(optimiser: str, unchecked_types: None) -> None:
    module = Digits(optimiser)
    made = OPTIMISERS[optimiser](module, module.loss)
    fake: Any = SimpleNamespace(optimizers=[made], strategy=SimpleNamespace(model=nn.Sequential(module)))
    with pytest.raises(ValueError, match=r"made for the Digits itself.* such as self\.net, that training_step calls"):
        CollectCurvature().on_train_start(fake, module)


class Failing(Digits):
    def training_step(self, batch: Any) -> Tensor:
        self.net(batch[0])
        raise ZeroDivisionError


def test_an_error_leaves_no_hook_behind(optimiser: str) -> None:
    module = Failing(optimiser)
    with pytest.raises(ZeroDivisionError):
        trainer().fit(module, loader(1))
    assert not module.net._forward_pre_hooks
    assert not module.loss._forward_hooks


class Functional(Digits):
    def training_step(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


def test_a_loss_that_is_not_the_one_given_is_named(optimiser: str) -> None:
    with pytest.raises(StateError, match="No rows were collected: call the CrossEntropyLoss"):
        trainer().fit(Functional(optimiser), loader(1))


@pytest.mark.study
def test_two_processes_are_the_plain_loop(optimiser: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("lightning_training.py")
    model, _ = plain(optimiser, BATCHES)
    for found in torchrun.run(script, 2, tmp_path / "found", optimiser):
        torch.testing.assert_close(found, flat(model), rtol=1e-5, atol=1e-8)  # Adam divides what is rounded by itself
