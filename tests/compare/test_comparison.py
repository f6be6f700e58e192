"""A comparison as text, as a table, as a figure and while it is made."""

import pandas as pd
import pytest
from comparison_cases import LOSSES, X, small_model

import curvlab
from curvlab.compare.printing import note_lines
from curvlab.fisher import EKFAC, KFAC


@pytest.fixture(scope="module")
def comparison() -> curvlab.Comparison:
    loss, y = LOSSES["cross-entropy"]
    structures = {"kfac": KFAC(), "a longer name": EKFAC()}
    return curvlab.compare(small_model(8), loss, [(X, y), (X + 0.1, y)], structures, [1e-2, "rel:1e-1"])


@pytest.mark.parametrize("width", [20, 40, 80, 120, 300])
def test_every_number_is_printed_at_any_width(comparison: curvlab.Comparison, width: int) -> None:
    text = comparison.text(width)
    assert all(name in text for name in comparison.table if name not in ("structure", "damping", "note"))
    assert max(map(len, text.splitlines())) <= max(width, 30)
    first = text.split("\n\n")[2].splitlines()[0]
    if width >= 80:
        assert all(name in first for name in ("structure", "damping", "eta", "fall", "eta_repeated", "eta_second"))
    best = comparison.best()
    assert f"{best['structure']} at damping {best['damping']}" in " ".join(text.split())


def test_a_note_that_names_several_things_stays_in_one_piece() -> None:
    """Whatever punctuation it has; structures that share it stand before it."""
    long = "not measured: it needs 2 GiB; 1 GiB are left."
    records = [
        {"structure": name, "damping": rho, "notes": notes}
        for name, rho, notes in (
            ("full", 0.1, (long,)),
            ("full", 1.0, (long, "late")),
            ("kfac", 0.1, ()),
            ("kfac", 1.0, ("late",)),
        )
    ]
    assert note_lines(records) == [
        "full: not measured: it needs 2 GiB; 1 GiB are left.",
        "full at 1.0, kfac at 1.0: late.",
    ]


def test_print_shows_the_table_and_the_repr_is_one_line(comparison: curvlab.Comparison, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    assert str(comparison) == comparison.text(90)
    assert "\n" not in repr(comparison)
    html = comparison._repr_html_()
    assert html.count("<tr") == 5
    assert "a longer name" in html
    assert isinstance(comparison.table, pd.DataFrame)
    assert comparison.best()["fall"] == comparison.table["fall"].max()


def test_figures_show_every_candidate(comparison: curvlab.Comparison) -> None:
    left, right = comparison.plot().axes
    assert [label.get_text() for label in right.get_yticklabels()] == [
        "kfac, 0.01" if name == "kfac" and rho == 1e-2 else f"{name}, {rho}"
        for name, rho in zip(["K-FAC"] * 2 + ["a longer name"] * 2, comparison.table["damping"], strict=True)
    ]
    assert len(left.lines) == 5, "a line a candidate, and one at zero"
    loss, y = LOSSES["half"]
    scale, anisotropy = curvlab.compare(small_model(4), loss, (X, y), ["full", "kfac"], 1.0, steps=0).plot().axes
    assert len(scale.lines) == len(anisotropy.lines) == 2


def test_progress_says_what_there_is_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    loss, y = LOSSES["cross-entropy"]
    curvlab.compare(small_model(4), loss, (X, y), ["full", "kfac"], [1e-2], progress=True)
    shown = capsys.readouterr().err
    assert "Comparing 2 candidates (2 structures × 1 dampings): P = 79, R = 18 rows" in shown
    assert "response measured" in shown
    assert "momentum" in shown
