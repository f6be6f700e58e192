"""The figures of the isotropy analysis, drawn from a small synthetic table with the columns of a real run."""

from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba

from analyses.ntk_isotropy import ANALYSIS, panels
from analyses.ntk_isotropy.analysis import FIGURES
from analyses.ntk_isotropy.config import Config
from analyses.ntk_isotropy.setting import PUBLISHED
from curvlab.fisher import STRUCTURES
from curvlab.study import style
from curvlab.study.execution import Plan
from curvlab.study.measurements import tabulate
from curvlab.study.panels import NotStored, PanelGrid, at_base, take
from curvlab.tools.looks import WITHOUT_STRUCTURE

WIDTHS, SEEDS = (128, 512), (0, 1, 2)
ALPHA = {"full": 1, "block-diagonal": 3, "block-tridiagonal": 1, "layer-wise": 1.5, "kfac": 81, "unit-wise": 128}


def observations():
    """Every quantity that a figure draws, with values that a test can recognise."""

    def rows(experiment, quantities, **where):
        base = {"experiment": experiment, "width": 512, "depth": 3, "activation": "relu", "outputs": 1}
        for seed in SEEDS:
            at = {**base, **where, "seed": seed}
            names = (*base, "seed", "structure", "kind", "inputs")
            cell = str([at.get(name) for name in (*names, "fisher", "eta", "scale")])
            for name, value in quantities.items():
                yield {**at, "quantity": name, "value": value * (1 + 0.01 * seed), "cell": cell, "tolerance": 1e-9}

    for structure, width in product(("diagonal", "ekfac", *ALPHA), WIDTHS):
        at = {"structure": structure, "kind": "exact", "width": width}
        points = [(3, 1), *([(4, 1)] if structure in ("full", "kfac") and width == 128 else [])]
        points += [(3, 3)] if structure in ("kfac", "unit-wise") and width == 128 else []
        for depth, outputs in points:
            where = {**at, "depth": depth, "outputs": outputs}
            measured = {"alpha": 2, "anisotropy": 2e-14, "spread": 0.1}
            if structure in ALPHA:
                measured |= {"alpha_predicted": ALPHA[structure], "alpha_published": 7, "distance": 1e-14}
                measured |= {"alpha_over_published": 1}
            yield from rows("response", measured, **where)
            for layer in range(1, depth + 1):
                yield from rows("response", {"layer_alpha": 40 if layer < depth else 1}, layer=layer, **where)
    for structure, (scale, width), step in product(PUBLISHED, [(1.0, 128), (1.0, 512), (0.5, 512), (2.2, 512)], (1, 2)):
        at = {"structure": structure, "scale": scale, "width": width, "run": "network"}
        predicted = abs(1 - scale) ** step
        values = {"residual": predicted + 0.1, "residual_predicted": predicted, "train_error_network": 0.1}
        yield from rows("steps", values | {"test_error_network": 0.2}, step=step, **at)
        yield from rows("steps", {"test_loss": 0.04, "test_loss_predicted": 0.03}, step=step, **at)
        if step == 2:
            yield from rows("steps", {"jacobian_change": 0.3}, **at)
    for width in WIDTHS:
        yield from rows("gradient-descent", {"anisotropy": 3.0, "train_error_network": 0.02}, width=width)
        for mode in (1, 2):
            where = {"mode": mode, "predicted": 0.4 * mode, "run": "network", "width": width}
            yield from rows("gradient-descent", {"mode_ratio": 0.4 * mode}, **where)
    for rho in (1e-6, 1.0):
        for run in ("network", "linearised"):
            yield from rows("damping", {"loss_ratio": rho / 2}, run=run, rho_relative=rho, predicted=rho / 2)
        for depth in (2, 3):
            values = {"damped_alpha_ratio": 1, "damped_anisotropy": rho}
            yield from rows("tridiagonal", values, rho_relative=rho, depth=depth, width=128)
    yield from rows("tridiagonal", {"moved": 1.0}, depth=3, layer=2, width=128)
    yield from rows("tridiagonal", {"moved_though_still": 1e-14}, depth=3, layer=1, width=128)
    for inputs in ("raw", "forster", "narrow"):
        yield from rows("inputs", {"total_anisotropy": 0.1}, inputs=inputs)
        if inputs != "narrow":
            for sample in (0, 1):
                leverage = 20.0 if inputs == "forster" else 15.0 + 10 * sample
                where = {"inputs": inputs, "sample": sample, "predicted": leverage}
                yield from rows("inputs", {"leverage_response": leverage}, **where)
    variants = [("exact", 0.5), ("exact", 1.0), ("damped", 1.0), ("unweighted", 1.0)]
    for outputs, (fisher, eta), step in product((2, 3), variants, range(3)):
        at = {"outputs": outputs, "fisher": fisher, "eta": eta, "loss": "cross-entropy", "step": step}
        yield from rows("cross-entropy", {"loss": 0.5**step, "loss_predicted": 0.4**step}, **at)
        if step:
            yield from rows("cross-entropy", {"loss_ratio": 0.5}, predicted=0.4, **at)
    for structure, rate in product(("full", "block-diagonal"), (1.8, 2.2)):
        at = {"structure": structure, "activation": "erf"}
        if rate > 2:
            yield from rows("stability", {"fisher_top_over_alpha": 1.0, "hessian_top_over_alpha": 1.2}, **at)
        for step in range(3):
            yield from rows("stability", {"residual": 0.1**step}, step=step, rate=rate, **at)
    for inputs in ("distinct", "duplicated", "narrow"):
        yield from rows("positivity", {"decades": 10}, inputs=inputs, layer=1)
        yield from rows("positivity", {"decades_last": -3}, inputs=inputs, layer=2)


@pytest.fixture(scope="module")
def measurements():
    return pd.DataFrame(observations())


VERDICTS = pd.DataFrame(
    {"claim": ["isotropic-full", "training-full", "damping-linear"], "outcome": ["supported", "refuted", "supported"]}
)


@pytest.fixture
def axes():
    with style.use():
        figure, grid = style.canvas()
        yield grid[0, 0]
    plt.close(figure)


def drawn(name, measurements, verdicts=VERDICTS):
    with style.use():
        figure = FIGURES[name](measurements, verdicts)
    plt.close(figure)
    return figure


def points(axes):
    """Positions, means and colours of the error bars."""
    return [(*container.lines[0].get_data(), container.lines[0].get_color()) for container in axes.containers]


@pytest.mark.parametrize("name", FIGURES)
def test_every_panel_is_drawn_from_complete_results(name, measurements):
    figure = drawn(name, measurements)
    figure.canvas.draw()
    for axes in figure.axes:
        assert axes.axison, [text.get_text() for text in axes.texts]
        assert axes.containers or axes.images
        assert axes.get_ylabel()


@pytest.mark.parametrize("name", FIGURES)
def test_what_is_missing_is_said_with_the_command(name, measurements):
    """A run of other claims, such as with --claims, has none of a figure's measurements."""
    figure = drawn(name, measurements[measurements["experiment"] == "no such experiment"])
    for axes in figure.axes:
        assert not axes.axison
        assert "python -m analyses.ntk_isotropy" in axes.texts[0].get_text()


@pytest.mark.parametrize("name", FIGURES)
def test_one_seed_one_width_and_no_verdicts_are_enough(name, measurements):
    table = measurements[(measurements["seed"] == 0) & (measurements["width"] == 512)]
    drawn(name, table, pd.DataFrame([]))


def test_a_problem_with_its_own_width_has_no_width_axis(measurements):
    table = measurements[measurements["width"] == 512].assign(width=0)
    left, right = drawn("test", table).axes
    assert "the problem has its own" in left.texts[0].get_text()
    assert not right.axison


def test_the_synthetic_table_names_what_the_experiments_measure(measurements):
    """Every experiment's quantities and columns that the figures draw are among those of a real cell."""
    config = Config(widths=(48,), seeds=1, other_depths=(4,), other_activations=(), other_kinds=(), other_outputs=(3,))
    task = Plan.of(ANALYSIS, config).task()
    for experiment in ANALYSIS.experiments:
        name, cells = experiment.name, experiment.planned(config)
        named = [
            next((c for c in cells if c.coordinates.get("structure") == key), cells[0]) for key in ("full", "kfac")
        ]
        chosen = [*named, cells[-1]]
        chosen += [cell for cell in cells if cell.coordinates.get("inputs") == "raw"]
        real = tabulate({cell: task.observe(cell) for cell in chosen})
        used = measurements[measurements["experiment"] == name].dropna(axis="columns", how="all")
        if name == "response":
            used = used[used["structure"] != "unit-wise"]
        assert set(used["quantity"]) <= set(real["quantity"]), name
        assert set(used.columns) - set(real.columns) <= {"cell", "tolerance"}, name


def test_a_structure_has_its_colour_in_every_figure(measurements):
    known = {
        to_rgba(look.color): look for look in (*(cls.look for cls in STRUCTURES.values()), *WITHOUT_STRUCTURE.values())
    }
    for name in FIGURES:
        for axes in drawn(name, measurements).axes:
            for container in axes.containers:
                line = container.lines[0]
                assert line.get_marker() == known[to_rgba(line.get_color())].marker, name


def test_residuals_after_a_step_lie_on_the_predicted_curve(axes, measurements):
    table = measurements[~((measurements["quantity"] == "residual") & (measurements["scale"] == 1.0))]
    panels.residual_against_rate(axes, table)
    curve = next(line for line in axes.get_lines() if line.get_label() == "theory for all")
    rates, theory = curve.get_data()
    assert theory == pytest.approx(np.maximum(abs(1 - rates), panels.FLOOR))
    for positions, means, _ in points(axes):
        assert positions == pytest.approx([0.5, 2.2])
        assert means == pytest.approx([0.6, 1.3], rel=0.02)


def test_training_losses_are_squared_residuals_from_one(axes, measurements):
    panels.loss_against_step(axes, measurements, loss="training", scale=0.5)
    for positions, means, _ in points(axes):
        assert list(positions) == [0, 1, 2]
        assert means == pytest.approx([1.0, 0.36, 0.1225], rel=0.03)
    curve = next(line for line in axes.get_lines() if line.get_label() == "theory for all")
    assert curve.get_ydata() == pytest.approx([1.0, 0.25, 0.0625], rel=0.03)
    with pytest.raises(NotStored, match="steps: residual"):
        panels.loss_against_step(axes, measurements, loss="training", scale=0.3)


def test_kfac_is_derived_and_published_layer_by_layer(axes, measurements):
    panels.kfac_layers(axes, measurements)
    derived, published = (axes.get_lines()[0].get_ydata(), axes.get_lines()[-1].get_ydata())
    assert list(derived) == [40, 40, 40, 1]
    assert set(published) == {40}


def test_the_base_point_is_the_most_frequent_one():
    table = pd.DataFrame({"depth": [3, 3, 4], "activation": ["relu", "erf", "relu"], "outputs": 1, "value": 1.0})
    assert at_base(table, "depth")["depth"].tolist() == [3, 3]
    whole = table.assign(experiment="p", quantity="q", value=[1.0, np.inf, 2.0])
    assert take(whole, "p", "q")["value"].tolist() == [1.0, 2.0]
    assert take(whole, "p", "q", depth=(4, 5))["value"].tolist() == [2.0]
    with pytest.raises(NotStored, match="p: q"):
        take(whole, "p", "q", absent=1)


def test_a_figure_without_legend_entries_has_no_legend(measurements):
    layout = PanelGrid("python -m analyses.ntk_isotropy", [[panels.moved_layers]], claims=())
    with style.use():
        figure = layout(measurements, VERDICTS)
    plt.close(figure)
    assert not figure.legends
