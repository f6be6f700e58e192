"""A model, its loss and its data: what every analysis takes."""

import copy
import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from curvlab.nn import linearize


@dataclass(frozen=True, eq=False)
class Problem:
    """A model with a loss, training data and test data.

    Attributes:
        name: Shown in reports.
        model: Maps inputs [N, ...] to outputs [N, C] or [N, C, *].
        loss: Called as `loss(outputs, targets)`; its own factors and reduction are honoured.
        train: Inputs and targets of the training samples, first axis N.
        test: Inputs and targets of the test samples, shaped alike but for N.

    Raises:
        ValueError: A set is empty, its inputs and targets differ in length, a value is not finite, training
            and test samples differ in shape or type, or data and model in device or floating-point type.
    """

    name: str
    model: nn.Module
    loss: nn.Module
    train: tuple[Shaped[Tensor, "..."], Shaped[Tensor, "..."]]
    test: tuple[Shaped[Tensor, "..."], Shaped[Tensor, "..."]]

    def __post_init__(self) -> None:
        for part, (inputs, targets) in (("train", self.train), ("test", self.test)):
            if min(inputs.ndim, targets.ndim) < 1 or not 0 < len(inputs) == len(targets):
                raise self._error(
                    f"{part} holds inputs {list(inputs.shape)} and targets {list(targets.shape)}; both need "
                    "the same, positive number of samples on their first axis"
                )
        for role, train, test in zip(("inputs", "targets"), self.train, self.test, strict=True):
            if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
                raise self._error(
                    f"a training sample's {role} are {list(train.shape[1:])} {train.dtype}, a test sample's "
                    f"are {list(test.shape[1:])} {test.dtype}"
                )
            self._check_values(f"train {role}", train)
            self._check_values(f"test {role}", test)

    def _check_values(self, what: str, values: Tensor) -> None:
        finite = values.isfinite().reshape(len(values), -1).all(dim=1)
        if not finite.all():
            raise self._error(f"{what} of sample {int((~finite).nonzero()[0])} are not finite")
        for name, parameter in self.model.named_parameters():
            if parameter.device != values.device:
                raise self._error(
                    f"{what} are on {values.device}, parameter {name} is on {parameter.device}; "
                    "Problem.to moves a problem as a whole"
                )
            if values.is_floating_point() and parameter.dtype != values.dtype:
                raise self._error(
                    f"{what} are {values.dtype}, parameter {name} is {parameter.dtype}; make both the same"
                )

    def _error(self, message: str) -> ValueError:
        return ValueError(f"Problem {self.name!r}: {message}.")

    def linearized(self) -> "Problem":
        """Return the same problem with the model's first-order expansion at its present parameters.

        Raises:
            UnsupportedModel: See `curvlab.nn.linearize`.
        """
        return dataclasses.replace(self, name=f"{self.name} (linearised)", model=linearize(self.model))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Problem":
        """Return a copy on a device and in a floating-point type; None keeps either, integers stay so."""

        def moved(data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            inputs, targets = (
                values.to(device=device, dtype=dtype if values.is_floating_point() else None) for values in data
            )
            return inputs, targets

        return dataclasses.replace(
            self,
            model=copy.deepcopy(self.model).to(device=device, dtype=dtype),
            loss=copy.deepcopy(self.loss).to(device=device, dtype=dtype),
            train=moved(self.train),
            test=moved(self.test),
        )

    def __repr__(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        train, test = (
            f"{len(inputs)} × {list(inputs.shape[1:])} -> {list(targets.shape[1:])}"
            for inputs, targets in (self.train, self.test)
        )
        return (
            f"Problem({self.name!r}, {type(self.model).__name__} with {parameters} parameters, {self.loss}, "
            f"train {train}, test {test})"
        )
