"""Which parameters an operator or a rank is restricted to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from curvlab.errors import unknown_name
from curvlab.rows import Rows
from curvlab.rows.parameters import ParameterSpace
from curvlab.tools.text import as_names


def choose(known: Iterable[str], wanted: str | Sequence[str] | None) -> list[str]:
    """Return the parameters that are meant, in their own order.

    Args:
        known: names of all trainable parameters.
        wanted: names of parameters, or of modules for all parameters below them; everything if None.

    Raises:
        ValueError: for an unknown name, with the nearest known one suggested.
    """
    known = list(known)
    if wanted is None:
        return known
    chosen: set[str] = set()
    for name in as_names(wanted, "parameters"):
        below = [parameter for parameter in known if f"{parameter}.".startswith(f"{name}.")]
        if not below:
            modules = {parameter.rpartition(".")[0] for parameter in known} - {""}
            raise unknown_name("parameter", name, [*known, *sorted(modules)])
        chosen.update(below)
    return [parameter for parameter in known if parameter in chosen]


def restricted(rows: Rows, wanted: str | Sequence[str] | None) -> Rows:
    """Keep the columns of some parameters, chosen as in `choose`."""
    if wanted is None:
        return rows
    names = choose(rows.space.shapes, wanted)
    kept = [layer.restrict(names) for layer in rows.layers if set(names) & set(layer.layout.names)]
    return replace(rows, layers=tuple(kept), space=ParameterSpace({name: rows.space.shapes[name] for name in names}))
