"""How objects show themselves: one line in a console, a table or a small figure in a notebook.

    def __repr__(self):
        return line(self, k=2, values=self.values)      # Eigenpairs(k=2, values=[4.48, 2.56])

Pages are HTML and SVG in the colours of the notebook, and need nothing beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from inspect import Parameter, signature

from torch import Tensor

WIDTH = 200
"""Characters that a line has at most."""

FEW = 4
"""Entries of a vector, or names, that are shown."""

MOST_ROWS = 20
"""Rows that a table shows."""


def line(thing: object, *notes: str, **figures: object) -> str:
    """Return `Name(figure=value, …; note; note)` in at most `WIDTH` characters.

    Args:
        thing: whose class it names.
        notes: what a reader should know beside the figures; empty ones are left out.
        figures: by name, see `shown`.
    """
    first = ", ".join(f"{name}={shown(value)}" for name, value in figures.items())
    return _cut(f"{type(thing).__name__}({'; '.join(part for part in (first, *notes) if part)})", WIDTH)


def shown(value: object) -> str:
    """Return a number to four digits, a tensor by a few entries or its shape, a function by its name, the rest cut short."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, str):
        return _cut(repr(value), WIDTH // 2)
    if isinstance(value, Mapping):
        return f"{{{some(f'{key}: {shown(entry)}' for key, entry in value.items())}}}"
    if isinstance(value, Sequence):
        return f"[{some(map(shown, value))}]"
    name = getattr(value, "__name__", None)
    return name if isinstance(name, str) else _cut(" ".join(repr(value).split()), WIDTH // 2)


def some(names: Iterable[str]) -> str:
    """Return the first few of some names, and how many they are if that is not all."""
    names = list(names)
    return _few(names, len(names))


def changed(thing: object, options: Mapping[str, object]) -> dict[str, object]:
    """Return the options that differ from the defaults of what the class is called with."""
    parameters = signature(type(thing)).parameters
    default = {name: parameters[name].default if name in parameters else Parameter.empty for name in options}
    return {name: value for name, value in options.items() if value is not default[name] and value != default[name]}


def table(thing: object, header: Sequence[str], rows: Iterable[Sequence[object]], **options: object) -> str:
    """Return a page with a thing's line, its options, and a table below them, of at most `MOST_ROWS` rows."""
    rows = list(rows)
    title = "; ".join([repr(thing), *(f"{name}={shown(value)}" for name, value in options.items())])
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows[:MOST_ROWS])
    left = len(rows) - MOST_ROWS
    more = f'<tr><td colspan="{len(header)}">… {left} more</td></tr>' if left > 0 else ""
    return f"<div><code>{escape(title)}</code><table><thead><tr>{head}</tr></thead><tbody>{body}{more}</tbody></table></div>"


def curve(thing: object, x: Sequence[float], y: Sequence[float]) -> str:
    """Return a page with a thing's line and a curve over ascending x below it, from zero up."""
    width, height = 360, 90
    span, top = (x[-1] - x[0]) or 1.0, max(y) or 1.0
    points = " ".join(
        f"{(a - x[0]) / span * width:.1f},{(1 - b / top) * height:.1f}" for a, b in zip(x, y, strict=True)
    )
    return (
        f"<div><code>{escape(repr(thing))}</code><br/>"
        f'<svg width="{width}" height="{height + 18}" viewBox="0 -2 {width} {height + 18}">'
        f'<g stroke="currentColor" fill="none"><polyline points="{points}"/><path d="M0 {height}H{width}" opacity=".4"/></g>'
        f'<g fill="currentColor" font-size="11"><text y="{height + 13}">{x[0]:.3g}</text>'
        f'<text x="{width}" y="{height + 13}" text-anchor="end">{x[-1]:.3g}</text></g></svg></div>'
    )


def _tensor(value: Tensor) -> str:
    if value.ndim > 1 or value.is_meta:
        return f"{' × '.join(map(str, value.shape))} {str(value.dtype).removeprefix('torch.')}"
    if value.ndim == 0:
        return shown(value.item())
    return f"[{_few([shown(entry) for entry in value[:FEW].tolist()], len(value))}]"


def _few(first: Sequence[str], total: int) -> str:
    """Join the first of so many entries, all of them if they are few."""
    return ", ".join(first) if total <= FEW else f"{', '.join(first[: FEW - 1])}, … {total} in all"


def _cell(value: object) -> str:
    text = value if isinstance(value, str) else shown(value)
    return f"<td>{escape(text)}</td>"


def _cut(text: str, width: int) -> str:
    closing = text[-1:] if text[-1:] in ")]}'" else ""
    return text if len(text) <= width else f"{text[: width - 1 - len(closing)]}…{closing}"
