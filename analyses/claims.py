"""Claims as rows of a table: what is said of each in one order, so that many stand below one another and are compared."""

from typing import Any

from curvlab.study import Claim, Expected
from curvlab.study.statistics.rules import Rule


def claim(
    id_: str, source: str, rule: Rule, statement: str, measured: str, expected: Expected, **further: Any
) -> Claim:
    """Return a claim; `further` are those of its attributes that few claims have, such as `at` and `estimate`."""
    return Claim(id=id_, source=source, rule=rule, statement=statement, measured=measured, expected=expected, **further)
