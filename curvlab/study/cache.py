"""Finished cells on disk, so that a run which is interrupted, sharded or extended computes nothing twice.

An entry is one JSON file, ``<results>/.cache/<analysis>/<digest>.json``, under the digest of everything that
the measurement depends on. It carries a checksum: an entry that was damaged is reported, and computed again.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from curvlab.study.cells import Cell
from curvlab.study.measurements import Row
from curvlab.tools.storage import digest, write

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CellCache:
    """Cache of one analysis.

    Attributes:
        folder: Where the entries lie.
        context: What the measurement of every cell depends on besides its coordinates: analysis, version,
            configuration, data, dtype, device.
        run: Which run uses it; entries remember the run that stored them.
    """

    folder: Path
    context: Mapping[str, object]
    run: str = ""

    def checkpoint(self, cell: Cell) -> Path:
        """Where a long run of ``cell`` may keep its state."""
        return self.folder / "checkpoints" / f"{digest(self._key(cell))[:40]}.pt"

    def path(self, cell: Cell) -> Path:
        """Where the entry of ``cell`` lies."""
        return self.folder / f"{digest(self._key(cell))[:40]}.json"

    def load(self, cell: Cell, *, of_this_run: bool = False) -> list[Row] | None:
        """The observations of ``cell``; None if there is no entry, a damaged one, or one of another run than is asked for."""
        path = self.path(cell)
        if not path.exists():
            return None
        try:
            entry = json.loads(path.read_bytes())
            if entry["checksum"] != digest([entry["key"], entry["rows"]]) or entry["key"] != self._key(cell):
                raise ValueError("its checksum does not match")
            rows: list[Row] = entry["rows"]
            if of_this_run and entry["run"] != self.run:
                return None
        except (ValueError, KeyError, TypeError, OSError) as error:
            log.warning("cache entry %s of cell %s is damaged (%s); computing it again", path.name, cell, error)
            return None
        return rows

    def store(self, cell: Cell, rows: Sequence[Row]) -> None:
        """Keep the observations of ``cell``, atomically.

        Raises:
            StorageFull: no space left; the other entries are untouched.
        """
        key = self._key(cell)
        entry = {"key": key, "run": self.run, "rows": list(rows), "checksum": digest([key, list(rows)])}
        write(self.path(cell), json.dumps(entry, ensure_ascii=False).encode())

    def since(self, cells: Iterable[Cell]) -> str | None:
        """When the first of some cells was measured, by the date of its file, in ISO format; None if none was."""
        dates = [path.stat().st_mtime for path in map(self.path, cells) if path.exists()]
        return datetime.fromtimestamp(min(dates)).astimezone().isoformat(timespec="milliseconds") if dates else None

    def _key(self, cell: Cell) -> dict[str, object]:
        return {**self.context, "coordinates": dict(cell.coordinates)}
