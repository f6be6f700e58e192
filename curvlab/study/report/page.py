"""What all pages share: templates, signs of verdicts, names of places."""

from collections.abc import Mapping
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from curvlab.study.claims import Outcome
from curvlab.study.report import forest, text
from curvlab.tools.text import number

MARKS: Mapping[Outcome, tuple[str, str]] = {
    "supported": ("✓", "supported"),
    "refuted": ("✗", "refuted"),
    "inconclusive": ("?", "inconclusive"),
    "outside the assumptions": ("⊘", "outside"),
    "not measured": ("–", "unmeasured"),
}
"""A sign and a class of CSS for every outcome, so that none has to be told by its colour alone."""


def anchor(place: int) -> str:
    """The id of a finding's element on the page of its run, whatever characters its own has."""
    return f"claim-{place + 1}"


def template(name: str) -> Template:
    """A page, by its path in `curvlab.study`."""
    return _environment().get_template(name)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("curvlab.study", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["number"] = number
    environment.globals |= {"text": text, "forest": forest, "marks": MARKS}
    return environment
