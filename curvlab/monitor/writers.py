"""Where measurements go: any `log(values)` or `log(values, step)`, and the writers here, which are such functions.

Values are numbers by name, ``quantity/number``, such as ``edge/ratio``.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

Values = Mapping[str, float]
Log = Callable[[Values, int], object]
"""Takes values and the step."""

HEADER = "step,name,value\n"


def as_log(writer: Callable[..., object]) -> Log:
    """Return a writer as a function of values and step.

    Raises:
        TypeError: if it is no function of one or two arguments.
    """
    if not callable(writer):
        raise TypeError(f"A writer is called as log(values) or log(values, step), got a {type(writer).__name__}.")
    try:
        signature = inspect.signature(writer)
    except (TypeError, ValueError):
        return writer
    for number in (2, 1):
        try:
            signature.bind(*range(number))
        except TypeError:
            continue
        return writer if number == 2 else lambda values, step: writer({**values, "step": step})
    raise TypeError(f"A writer is called as log(values) or log(values, step), but {writer!r} takes {signature}.")


class CSV:
    """Appends to a file with the columns step, name and value, one line a number.

    So a quantity that is measured later, or another one after the run has been resumed, needs no new column. The lines of a
    measurement are written at once; half a line, which a machine that stopped has left, is cut off when the file is opened again.

    Args:
        path: of the file, which is made if it is not there.

    Raises:
        ValueError: if it is another file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_bytes() if self.path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if whole and not whole.startswith(HEADER.encode()):
            raise ValueError(f"{self.path} begins with another line than {HEADER.strip()!r}: give another file.")
        if len(whole) < len(text):
            os.truncate(self.path, len(whole))
        if not whole:
            self._append(HEADER)

    def __call__(self, values: Values, step: int) -> None:
        """Append the numbers of a step."""
        self._append("".join(f"{step},{_quoted(name)},{value!r}\n" for name, value in values.items()))

    def _append(self, text: str) -> None:
        with self.path.open("ab", buffering=0) as file:
            file.write(text.encode())


class TensorBoard:
    """Adds scalars to a `torch.utils.tensorboard.SummaryWriter`.

    Args:
        writer: one that there is, or the folder for a new one.

    Raises:
        ImportError: for a folder, without the package tensorboard.
    """

    def __init__(self, writer: Any) -> None:
        if isinstance(writer, str | Path):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(_missing("TensorBoard", "tensorboard")) from error
            writer = SummaryWriter(str(writer))
        self.writer = writer

    def __call__(self, values: Values, step: int) -> None:
        """Add the numbers of a step."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)


@runtime_checkable
class LogsData(Protocol):
    """What has a method `log`, such as a run of Weights & Biases."""

    def log(self, data: dict[str, Any]) -> object:
        """Log values by name."""


class WandB:
    """Logs to a run of Weights & Biases.

    The step goes along as ``monitor/step``, so that the run's own count of steps, which has to rise, stays with the loop.

    Args:
        run: what `wandb.init` returned.
    """

    def __init__(self, run: LogsData) -> None:
        self.run = run

    def __call__(self, values: Values, step: int) -> None:
        """Log the numbers of a step."""
        self.run.log({**values, "monitor/step": step})


class MLflow:
    """Logs metrics to the active run of MLflow.

    Args:
        run_id: of another run.

    Raises:
        ImportError: without the package mlflow.
    """

    def __init__(self, run_id: str | None = None) -> None:
        try:
            import mlflow
        except ImportError as error:
            raise ImportError(_missing("MLflow", "mlflow")) from error
        self.run_id, self._log = run_id, mlflow.log_metrics

    def __call__(self, values: Values, step: int) -> None:
        """Log the numbers of a step."""
        self._log(dict(values), step=step, run_id=self.run_id)


class Trackio:
    """Logs to the active run of trackio, after `trackio.init`.

    Raises:
        ImportError: without the package trackio.
    """

    def __init__(self) -> None:
        try:
            import trackio
        except ImportError as error:
            raise ImportError(_missing("Trackio", "trackio")) from error
        self._log = trackio.log

    def __call__(self, values: Values, step: int) -> None:
        """Log the numbers of a step."""
        self._log(dict(values), step=step)


def _missing(writer: str, package: str) -> str:
    return f"{writer} needs the package {package}: pip install {package}. CSV(path) needs none."


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"' if set(name) & set(',"\n') else name
