"""The tables of claims on the pages of `docs/theory` are those of the code."""

import importlib.util
import pkgutil
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

import analyses
from curvlab.study import undecided
from curvlab.study.report.markdown import table

DOCS = Path(__file__).parents[2] / "docs"
SPEC = importlib.util.spec_from_file_location("claims", DOCS / "claims.py")
claims = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(claims)

PAGES = {page.name: page.read_text() for page in sorted(claims.PAGES.glob("*.md"))}


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if claims.analyses_of(text)])
def test_a_page_shows_the_claims_of_the_code(page):
    assert claims.updated(PAGES[page]) == PAGES[page], "run: python docs/claims.py"


def test_every_analysis_has_a_page():
    shown = [name for text in PAGES.values() for name in claims.analyses_of(text)]
    modules = [import_module(f"analyses.{module.name}") for module in pkgutil.iter_modules(analyses.__path__)]
    assert sorted(shown) == sorted(module.ANALYSIS.name for module in modules if hasattr(module, "ANALYSIS"))


def claim(name, statement, source="paper", rule="mean < 1"):
    return SimpleNamespace(id=name, statement=statement, source=source, rule=rule, expected=undecided("r"))


def test_claims_that_differ_by_a_word_share_a_row():
    family = [claim(f"trace-{key}-0.5", f"The {key} trace of {key}.") for key in ("full", "block-diagonal", "kfac")]
    alone = claim("other", "The full other.")
    rows = [(name, text) for name, text, _ in claims.folded([family[0], alone, *family[1:]])]
    assert rows == [("trace-{full, block-diagonal, kfac}-0.5", "The … trace of …."), ("other", "The full other.")]


def test_a_word_may_end_as_the_others_do():
    keys = ("unit-wise", "component-wise", "block-diagonal", "diagonal", "block-tridiagonal")
    rows = [(name, text) for name, text, _ in claims.folded([claim(f"of-{key}", f"Of {key}.") for key in keys])]
    assert rows == [(f"of-{{{', '.join(keys)}}}", "Of ….")]


@pytest.mark.parametrize(
    "other",
    [
        claim("trace-kfac", "The kfac trace."),
        claim("trace-kfac", "The kfac norm of it."),
        claim("norm-kfac", "The kfac trace of it."),
        claim("trace-kfac", "The kfac trace of it.", source="another"),
        claim("trace-kfac", "The kfac trace of it.", rule="mean < 2"),
    ],
)
def test_claims_that_differ_otherwise_have_rows_of_their_own(other):
    assert len(claims.folded([claim("trace-full", "The full trace of it."), other])) == 2


def test_bars_do_not_break_a_row():
    header, _, row = table(["claim", "statement"], [["|x| < 1", "y"]]).splitlines()
    assert (header, row) == ("| claim | statement |", r"| \|x\| < 1 | y |")
