"""Figures with a panel for every structure show all that were measured, those from outside among them."""

from collections.abc import Iterator
from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.figure import Figure

from analyses.edge_of_stability.analysis import ANALYSIS as EDGE
from analyses.edge_of_stability.experiments.structures import HESSIAN
from analyses.specs import members
from analyses.spectrum.analysis import ANALYSIS as SPECTRUM
from curvlab.fisher import STRUCTURES, Diagonal
from curvlab.study import Analysis, Cell
from curvlab.study.claims import Failure
from curvlab.study.panels import NotStored, PanelGrid, one_each
from curvlab.tools.looks import look

UNJUDGED = pd.DataFrame(columns=["claim", "outcome"])


@pytest.fixture
def everyone() -> Iterator[list[str]]:
    """All structures, one that is registered from outside and one that is named by its module."""
    type("Outsider", (Diagonal,), {}, key="outsider", summary="from outside")
    yield [*members(), "curvlab.fisher:Full"]
    STRUCTURES.unregister("outsider")


def titles(figure: Figure) -> list[str]:
    plt.close(figure)
    return [axes.get_title() for axes in figure.axes if axes.axison]


def drawn(analysis: Analysis, name: str, rows: list[dict[str, object]]) -> list[str]:
    return titles(analysis.figures[name](pd.DataFrame(rows), UNJUDGED))


def test_densities(everyone: list[str]) -> None:
    rows = [
        {"experiment": "spectra", "quantity": "density", "matrix": matrix, "seed": 0, "place": place, "eigenvalue": x, "value": 0.1}
        for matrix in ("hessian", "ggn", *reversed(everyone))
        for place, x in enumerate((-1.0, 0.0, 1.0))
    ]  # fmt: skip
    assert "outsider" in everyone
    assert drawn(SPECTRUM, "density", rows) == ["Hessian", "GGN", *(look(name).label for name in everyone)]


def test_largest_eigenvalues_along_gradient_descent(everyone: list[str]) -> None:
    rows = [
        {"experiment": "structures", "quantity": "largest", "approximation": name, "seed": seed, "step": step, "eta": 0.1,
         "value": 1.0}
        for name in (HESSIAN, *everyone, "mc", "empirical")
        for seed in (0, 1)
        for step in (0, 10)
    ]  # fmt: skip
    expected = [*(look(name).label for name in everyone), "mc Fisher", "empirical Fisher"]
    assert drawn(EDGE, "structures", rows) == expected


@pytest.mark.parametrize(("analysis", "name"), [(SPECTRUM, "density"), (EDGE, "structures")])
def test_without_measurements_a_figure_says_so(analysis: Analysis, name: str) -> None:
    figure = analysis.figures[name](
        pd.DataFrame({"experiment": ["other"], "quantity": ["x"], "value": [1.0]}), UNJUDGED
    )
    plt.close(figure)
    (axes,) = figure.axes
    assert "is not among the stored results" in axes.texts[0].get_text()


def test_a_panel_says_which_cells_failed_and_why() -> None:
    rows = [
        {
            "experiment": "spectra",
            "quantity": "trace",
            "matrix": "full",
            "layer": "all",
            "seed": 0,
            "value": 1.0,
            "index": 0,
        }
    ]
    failures = tuple(
        Failure(Cell({"experiment": name, "matrix": "kfac", "seed": seed}), f"ValueError: nothing in {name}")
        for name in ("others", "spectra")
        for seed in (3, 4)
    )
    figure = replace(SPECTRUM.figures["top"], failures=failures)(pd.DataFrame(rows), UNJUDGED)
    plt.close(figure)
    top, _ = figure.axes
    (said,) = (" ".join(text.get_text().split()) for text in top.texts)
    assert said == (
        "spectra: eigenvalue is not among the stored results. Failed: cell experiment=spectra, matrix=kfac, seed=3: "
        "ValueError: nothing in spectra (and 1 more)"
    )
    of_full = NotStored("spectra: eigenvalue", {"experiment": "spectra", "matrix": ("full", "ggn"), "layer": "all"})
    assert of_full.because(failures) == ""
    assert NotStored("spectra", {"experiment": "spectra", "matrix": "kfac", "layer": "all"}).because(failures)


def test_a_last_row_may_be_short() -> None:
    def panel(axes: plt.Axes, _: pd.DataFrame) -> None:
        axes.set_title("drawn")

    def absent(axes: plt.Axes, _: pd.DataFrame) -> None:
        raise NotStored("something")

    rows = one_each([panel, panel, panel, absent, panel])
    assert [len(row) for row in rows] == [3, 2]
    figure = PanelGrid("command", rows, claims=())(pd.DataFrame(), UNJUDGED)
    assert len(figure.axes) == 6
    assert titles(figure) == ["drawn"] * 4
