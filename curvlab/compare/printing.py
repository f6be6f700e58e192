"""A table as text of any width: groups of columns below each other, each with the names of the rows."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

KEYS = 2
"""Columns at the left, which every group repeats."""
GAP = "  "


def terminal_width() -> int:
    """Characters in a line of the terminal, 80 where there is none."""
    return shutil.get_terminal_size((80, 24)).columns


def page(
    above: Sequence[str], names: Sequence[str], rows: Sequence[Sequence[str]], below: Sequence[str], width: int
) -> str:
    """Return paragraphs, a table and paragraphs, no line longer than the width unless one entry is.

    Args:
        above: paragraphs before the table.
        names: of the columns, of which the first two say what a row is.
        rows: entries.
        below: paragraphs after it.
        width: characters in a line.
    """
    before, after = ([textwrap.fill(text, max(width, 1)) for text in texts] for texts in (above, below))
    return "\n\n".join([*before, *_groups(names, rows, width), *after])


def _groups(names: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    sizes = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    left = sum(sizes[:KEYS]) + len(GAP) * (KEYS - 1)
    if left + len(GAP) + max(sizes[KEYS:]) > width:
        return _transposed(names, rows)
    groups: list[list[int]] = []
    used = width
    for column in range(KEYS, len(names)):
        if used + len(GAP) + sizes[column] > width:
            groups.append([])
            used = left
        groups[-1].append(column)
        used += len(GAP) + sizes[column]
    return [
        "\n".join(
            GAP.join(
                row[c].ljust(sizes[c]) if c < KEYS else row[c].rjust(sizes[c]) for c in (*range(KEYS), *group)
            ).rstrip()
            for row in (names, *rows)
        )
        for group in groups
    ]


def _transposed(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a block a row, a line an entry."""
    left = max(map(len, names[KEYS:]))
    return [
        "\n".join(
            [
                " ".join(row[:KEYS]),
                *(f" {name.ljust(left)} {entry}" for name, entry in zip(names[KEYS:], row[KEYS:], strict=True)),
            ]
        )
        for row in rows
    ]


def note_lines(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one line a note, with the candidates that it is about: a structure alone stands for all its dampings."""
    about: dict[str, dict[str, list[str]]] = {}
    dampings: dict[str, int] = {}
    for record in records:
        dampings[record["structure"]] = dampings.get(record["structure"], 0) + 1
        for note in record["notes"]:
            about.setdefault(note, {}).setdefault(record["structure"], []).append(str(record["damping"]))
    return [
        ", ".join(
            name if len(of) == dampings[name] else f"{name} at {' and '.join(of)}" for name, of in structures.items()
        )
        + f": {note.removesuffix('.')}."
        for note, structures in about.items()
    ]
