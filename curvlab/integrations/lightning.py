"""PyTorch Lightning: a callback that collects curvature from the passes of a `Trainer`.

    def configure_optimizers(self):
        return NaturalGradient(self.net, self.loss, lr=0.1)
        # or attach(Preconditioner(self.net, self.loss), torch.optim.AdamW(self.net.parameters()))

    Trainer(callbacks=[CollectCurvature()])

Lightning calls `training_step`, then clears the gradients, then goes backward. All of it is in the collecting context, which hooks
open when a batch starts and close after the backward pass, under every precision and with accumulated gradients.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from curvlab.integrations.attaching import numbers_of, preconditioner_of
from curvlab.optim import Preconditioner


class _GivenUp(Exception):
    """Closes a context without a pass."""


class CollectCurvature(Callback):
    """Collects from every pass of `Trainer.fit` for the one optimiser that is a `NaturalGradient` or has a preconditioner.

    `training_step` calls the model and the loss module that the optimiser was made for. With manual optimisation, each
    `self.manual_backward(loss)` ends a pass. Clipping by the trainer is that of plain gradients, before they are preconditioned.

    Args:
        log: whether to log the numbers of every step, such as "curvature/damping".

    Raises:
        ValueError: when training starts, unless there is one such optimiser, and if it was made for the LightningModule itself
            where that is wrapped, as by "ddp".
    """

    def __init__(self, *, log: bool = True) -> None:
        self._log = log
        self._preconditioner: Preconditioner | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._context: AbstractContextManager[None] | None = None
        self._handles: list[Any] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the optimiser."""
        found = [optimizer for optimizer in trainer.optimizers if preconditioner_of(optimizer) is not None]
        if len(found) != 1:
            raise ValueError(
                f"CollectCurvature needs one optimiser that is a NaturalGradient or has a preconditioner attached, and "
                f"configure_optimizers() returned {len(found)}. Without the callback, open `with optimizer.collect()` in "
                "training_step yourself, with manual optimisation."
            )
        self._optimizer = found[0]
        self._preconditioner = preconditioner_of(found[0])
        assert self._preconditioner is not None
        if self._preconditioner.model is pl_module and trainer.strategy.model is not pl_module:
            raise ValueError(
                f"The optimiser was made for the {type(pl_module).__name__} itself, whose call the "
                f"{type(trainer.strategy).__name__} redirects to training_step. Make it for a module "
                "within, such as self.net, that training_step calls."
            )
        if not pl_module.automatic_optimization:
            # A training step may go on with further passes after a step.
            before = found[0].register_step_pre_hook(lambda *_: self._give_up())
            after = found[0].register_step_post_hook(lambda *_: self._open())
            self._handles = [before, after]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Begin to collect."""
        self._open()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """End a pass."""
        if self._context is None:
            return
        context, self._context = self._context, None
        context.__exit__(None, None, None)
        if not pl_module.automatic_optimization:
            self._open()

    def on_train_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Log the numbers of the step."""
        self._give_up()
        if self._log and self._optimizer is not None:
            numbers = numbers_of(self._optimizer)
            pl_module.log_dict({f"curvature/{name}": value for name, value in numbers.items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Leave the model and the optimiser as they were."""
        self._give_up()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Leave the model and the optimiser as they were."""
        self.on_train_end(trainer, pl_module)

    def _open(self) -> None:
        self._give_up()
        assert self._preconditioner is not None
        self._context = self._preconditioner.collect()
        self._context.__enter__()

    def _give_up(self) -> None:
        if self._context is not None:
            context, self._context = self._context, None
            given_up = _GivenUp()
            context.__exit__(_GivenUp, given_up, None)
