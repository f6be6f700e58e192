"""The `Trainer` of Hugging Face, with curvature collected from its passes.

    loss = torch.nn.CrossEntropyLoss()
    optimizer = NaturalGradient(model, loss, lr=0.1)
    NaturalTrainer(model, args, train_dataset=data, optimizers=(optimizer, None)).train()

or, with the optimiser that the arguments ask for,

    NaturalTrainer(model, args, train_dataset=data, preconditioner=Preconditioner(model, loss)).train()

Models of the library make their loss from labels by a function, which shows neither outputs nor targets. So labels are taken out
of the batch, as for a `compute_loss_func`, and the loss module is called on the model's logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from curvlab.integrations.attaching import attach, numbers_of, preconditioner_of
from curvlab.optim import Preconditioner

IGNORED = -100
"""The label of what carries no loss, by which the library counts."""


class NaturalTrainer(Trainer):
    """A `Trainer` that collects from every pass, for a `NaturalGradient` or an optimiser with a preconditioner attached.

    Nothing needs to be overridden. The loss is the preconditioner's loss module on `logits`; for causal language models, labels are
    one place ahead. Of several batches that one step accumulates, each weighs as many labels as it has, as in the library. Clipping
    by `max_grad_norm` is that of plain gradients, before they are preconditioned. Checkpoints hold the state of curvature, and logs
    the numbers of the last step, such as "curvature/damping".

    Args:
        *args: see `Trainer`.
        preconditioner: is attached to the optimiser that `create_optimizer` makes; None if `optimizers` has one already.
        **kwargs: see `Trainer`. A `compute_loss_func` calls the preconditioner's loss module itself.

    Raises:
        ValueError: without preconditioner; if the loss has not the label smoothing of the arguments; and for several devices in
            one process.
    """

    def __init__(self, *args: Any, preconditioner: Preconditioner | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._attached = preconditioner
        found = preconditioner or (None if self.optimizer is None else preconditioner_of(self.optimizer))
        if found is None:
            raise ValueError(
                "NaturalTrainer needs optimizers=(optimizer, None) with a NaturalGradient or an optimiser that a preconditioner is "
                "attached to, or preconditioner=."
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} devices in one process train by DataParallel, whose copies of the model have no rows: start "
                "one process a device by torchrun."
            )
        self.preconditioner = found
        if self.compute_loss_func is None:
            smoothing = getattr(found.loss, "label_smoothing", 0.0)
            if self.args.label_smoothing_factor != smoothing:
                raise ValueError(
                    f"label_smoothing_factor={self.args.label_smoothing_factor:g}, and the {type(found.loss).__name__} of the "
                    f"preconditioner has a label smoothing of {smoothing:g}: give both the same."
                )
            self.compute_loss_func = self._loss_of
            # The trainer counts labels by this, and knows it of some models only by their names.
            self._loss_shifts_labels = self._loss_shifts_labels or _is_causal(self.model)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the optimiser, and attach the preconditioner that was given."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if self._attached is not None and preconditioner_of(optimizer) is not self._attached:
            attach(self._attached, optimizer)
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take the forward and the backward pass of a batch, in a collecting context."""
        with self.preconditioner.collect():
            loss: Tensor = super().training_step(*args, **kwargs)
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss from logits; models that make the decoder's inputs from labels are given them."""
        shift = getattr(self.accelerator.unwrap_model(model), "prepare_decoder_input_ids_from_labels", None)
        if shift is not None and "labels" in inputs and "decoder_input_ids" not in inputs:
            inputs = {**inputs, "decoder_input_ids": shift(labels=inputs["labels"])}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log what the trainer logs, and the numbers of the last step beside the training loss."""
        if "loss" in logs and self.optimizer is not None:
            numbers = numbers_of(getattr(self.optimizer, "optimizer", self.optimizer))
            logs = logs | {f"curvature/{name}": value for name, value in numbers.items()}
        super().log(logs, *args, **kwargs)

    def _loss_of(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the share of a batch in the loss of the step that it belongs to."""
        if labels is None:
            raise ValueError(
                'The batch has no "labels": name the targets so, or give compute_loss_func= that calls the loss module.'
            )
        logits = outputs if isinstance(outputs, Tensor) else _logits(outputs)
        if self._loss_shifts_labels:
            logits, labels = logits[:, :-1], labels[:, 1:]
        if labels.is_floating_point():
            labels = labels.view_as(logits).to(logits.dtype)
        elif labels.ndim > 1 and logits.shape[:-1] == labels.shape:
            logits, labels = logits.flatten(0, -2), labels.flatten()
        loss, counting = self.preconditioner.loss, labels.ne(IGNORED).sum()
        value: Tensor = loss(logits, labels)
        if num_items_in_batch is None:
            return value / self.current_gradient_accumulation_steps if self.preconditioner.model.training else value
        return (value if getattr(loss, "reduction", "mean") == "sum" else value * counting) / num_items_in_batch


def _is_causal(model: Any) -> bool:
    """Whether a model of the library, or the one that an adapter is in, predicts the next token."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _logits(outputs: Mapping[str, Any] | tuple[Any, ...]) -> Tensor:
    logits: Tensor = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    return logits
