"""The log of a run, ``log.txt``."""

import contextlib
import logging
import logging.handlers
import queue
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from curvlab.tools.errors import CommandError
from curvlab.tools.storage import make_folder, writing

log = logging.getLogger(__name__)

RECORDED = ("curvlab", "analyses")
"""Loggers whose progress is recorded besides everyone's warnings."""


class _LogFile(logging.FileHandler):
    """A log file that a full disk silences; the run itself reports the full disk where it matters."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


@contextlib.contextmanager
def recording(path: Path) -> Iterator[None]:
    """Record what the libraries log, and every warning, in a file; append if it exists."""
    make_folder(path.parent)
    with writing(path):
        handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    loggers = {logging.getLogger(name): logging.getLogger(name).level for name in RECORDED}
    for logger in loggers:
        logger.setLevel(logging.INFO)
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    except CommandError as error:
        log.error("%s", error)
        raise
    finally:
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(handler)
        for logger, level in loggers.items():
            logger.setLevel(level)
        handler.close()


_logged: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
"""What this process has logged and not yet forwarded."""


def forward() -> None:
    """Keep what `recording` would write, for another process to `replay`; for good."""
    for name in RECORDED:
        logging.getLogger(name).setLevel(logging.INFO)
    root = logging.getLogger()
    for inherited in [handler for handler in root.handlers if isinstance(handler, _LogFile)]:  # by a fork
        root.removeHandler(inherited)
    root.addHandler(logging.handlers.QueueHandler(_logged))
    logging.captureWarnings(True)


def forwarded() -> tuple[logging.LogRecord, ...]:
    """What was logged since the last call, if this process forwards that."""
    records = []
    with contextlib.suppress(queue.Empty):
        while True:
            records.append(_logged.get_nowait())
    return tuple(records)


def replay(records: Iterable[logging.LogRecord]) -> None:
    """Log what another process has logged."""
    for record in records:
        logging.getLogger(record.name).handle(record)
