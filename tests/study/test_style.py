"""The look of figures."""

import re
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from scipy import stats

from curvlab.fisher import STRUCTURES
from curvlab.study import style
from curvlab.study.panels import PanelGrid
from curvlab.tools.looks import SPARE, WITHOUT_STRUCTURE, Look, distinct

DRAWN = {key: cls.look for key, cls in STRUCTURES.items()} | WITHOUT_STRUCTURE


@pytest.fixture
def axes():
    with style.use():
        figure, grid = style.canvas()
        yield grid[0, 0]
    plt.close(figure)


def seeds(*points, count=12):
    """``count`` seeds of noise around a mean per width."""
    generator = np.random.default_rng(7)
    return pd.DataFrame(
        [
            {"width": width, "seed": seed, "value": mean * np.exp(0.3 * generator.normal())}
            for width, mean in points
            for seed in range(count)
        ]
    )


def test_every_structure_has_a_look_of_its_own():
    assert style.in_order(reversed(DRAWN)) == list(DRAWN)
    for field in ("color", "marker", "label"):
        assert len({getattr(look, field) for look in DRAWN.values()}) == len(DRAWN)
    for field, spare in SPARE.items():
        assert not {getattr(look, field) for look in DRAWN.values()} & set(spare)


def test_what_brings_no_look_gets_one_that_nobody_has():
    others = dict(DRAWN)
    for key in ("one", "two", "three"):
        others[key] = distinct(key, None, others)
        assert others[key].label == key
    for field in ("color", "marker"):
        assert len({getattr(look, field) for look in others.values()}) == len(others)
    for number in range(20):  # when nothing is spare, things look alike
        others[f"more {number}"] = distinct(f"more {number}", None, others)
    assert others["more 19"] == Look("#999999", "o", "more 19")


def test_a_look_that_is_taken_is_changed_with_a_warning_that_names_both():
    free = Look("#123456", "$x$", "mine")
    assert distinct("mine", free, DRAWN) is free
    with pytest.warns(
        UserWarning, match=r"look of 'mine': its color #E69F00 is that of 'kfac', so it is drawn with #44AA99"
    ):
        found = distinct("mine", Look("#E69F00", "$x$", "mine"), DRAWN)
    assert found == Look("#44AA99", "$x$", "mine")
    with pytest.warns(
        UserWarning, match="its color .* 'kfac', .*; its marker s is that of 'block-diagonal', .* with d"
    ):
        distinct("mine", Look("#E69F00", "s", "mine"), DRAWN)


def test_a_structure_of_a_module_has_its_look_in_figures():
    assert style.look("curvlab.fisher:KFAC") is STRUCTURES["kfac"].look
    assert style.look("no_such_module:Mine").label == "no_such_module:Mine"


def test_what_has_no_look_is_drawn_all_the_same():
    assert style.look("mine").label == "mine"
    assert style.in_order(["mine", "kfac", "full", "mine"]) == ["full", "kfac", "mine"]


def drawn(container):
    """Positions, means, lower and upper ends of an error bar."""
    points, _, (bars,) = container.lines
    ends = np.array(bars.get_segments())[:, :, 1]
    return points.get_xdata(), points.get_ydata(), ends[:, 0], ends[:, 1]


def test_points_are_means_with_t_intervals(axes):
    table = seeds((128, 1.0), (512, 2.0))
    positions, means, low, high = drawn(style.measured(axes, table, "width", "kfac"))
    assert list(positions) == [128, 512]
    for index, (_, group) in enumerate(table.groupby("width")):
        expected = stats.t.interval(0.95, 11, group["value"].mean(), stats.sem(group["value"]))
        assert means[index] == pytest.approx(group["value"].mean())
        assert (low[index], high[index]) == pytest.approx(expected)


def test_on_a_logarithmic_axis_the_interval_is_that_of_the_logarithm(axes):
    axes.set_yscale("log")
    table = seeds((128, 1.0))
    _, means, low, high = drawn(style.measured(axes, table, "width", "kfac"))
    logs = np.log(table["value"])
    assert np.log(means[0]) == pytest.approx(logs.mean())
    assert (np.log(low[0]), np.log(high[0])) == pytest.approx(stats.t.interval(0.95, 11, logs.mean(), stats.sem(logs)))
    with pytest.raises(ValueError, match="values ≤ 0"):
        style.measured(axes, table.assign(value=0.0), "width", "kfac")


def test_what_cannot_be_drawn_is_said(axes):
    table = seeds((128, 1.0), count=4)
    table.loc[2, "value"] = np.inf
    container = style.measured(axes, table, "width", "ekfac")
    assert container.get_label() == "EKFAC (1 of 4 not finite)"
    with pytest.raises(ValueError, match="several rows per width and seed"):
        style.measured(axes, pd.concat([table, table]), "width", "full")


def test_a_single_seed_is_a_point_without_an_interval(axes):
    container = style.measured(axes, seeds((128, 1.0), count=1), "width", "full")
    point, _, (bars,) = container.lines
    assert np.isfinite(point.get_ydata()).all()
    assert [len(segment) for segment in bars.get_segments()] == [0]


def test_theory_is_a_line_without_markers_in_the_colour_of_its_structure(axes):
    line = style.theory(axes, [1, 2], [1.0, 4.0], "unit-wise")
    assert line.get_linestyle() == "-"
    assert line.get_marker() == "None"
    assert line.get_color() == style.look("unit-wise").color
    assert not axes.get_legend_handles_labels()[1]


def test_a_shift_moves_the_drawing_and_not_the_data(axes):
    table = seeds((128, 1.0), (512, 2.0))
    here, there = (style.measured(axes, table, "width", "full", shift=shift) for shift in (0.0, 7.2))
    assert list(drawn(here)[0]) == list(drawn(there)[0])
    pixels = [container.lines[0].get_transform().transform((128.0, 1.0)) for container in (here, there)]
    assert pixels[1] - pixels[0] == pytest.approx([0.1 * axes.figure.dpi, 0.0])
    low, high = axes.get_ylim()
    assert low < min(drawn(there)[2])
    assert high > max(drawn(there)[3])


def test_ticks_are_where_something_was_measured(axes):
    style.log_ticks(axes, (128, 512))
    assert axes.get_xscale() == "log"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["128", "512"]
    assert list(axes.xaxis.get_minorticklocs()) == []


def test_the_legend_has_every_label_once():
    figure, grid = style.canvas(1, 2)
    for panel in grid.flat:
        style.measured(panel, seeds((128, 1.0)), "width", "kfac")
    style.theory(grid[0, 1], [128, 512], [1.0, 1.0], "kfac", label="theory")
    style.legend(figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["K-FAC", "theory"]
    plt.close(figure)


@pytest.mark.parametrize(("draw", "said"), [
    (lambda axes, table: style.measured(axes, table, "width", "full"), "Means over the 12 seeds of the run, .*; bars are "),
    (lambda axes, table: style.band(axes, table, "width", color="k"), "Means over the 12 seeds of the run, .*; bands are "),
    (lambda axes, table: axes.plot([1, 2]), "Drawn from the 12 seeds of the run"),
])  # fmt: skip
def test_a_caption_says_what_is_shown_over_how_many_seeds_and_how_surely(axes, draw, said):
    table = seeds((128, 1.0), (512, 2.0))
    draw(axes, table)
    style.caption(axes.figure, "The number against width.", table)
    assert re.match(f"The number against width. {said}", axes.figure.get_label())
    assert ("95 %" in axes.figure.get_label()) == ("Means" in said)
    assert not axes.figure.get_supxlabel(), "the files of a figure stay without it"


def test_a_layout_is_described_by_its_panels_each_kind_once():
    def first(axes, measurements):
        """Number against width, at 2 < η.

        With more for those who read the code.
        """

    def second(axes, measurements, *, rank):
        """The other one."""

    table = seeds((128, 1.0), count=1)
    labels = []
    for panels, caption in (([[first], [partial(second, rank=0)]], ""), ([[first, first]], ""), ([[first]], "Mine.")):
        with style.use():
            figure = PanelGrid("python x.py", panels, claims=(), caption=caption)(table, table)
        labels.append(figure.get_label())
        plt.close(figure)
    assert labels == [
        "Row by row, from left to right: Number against width, at 2 < η — The other one. Drawn from one seed.",
        "Number against width, at 2 < η. Drawn from one seed.",
        "Mine. Drawn from one seed.",
    ]


def test_colours_stand_out_from_the_paper_and_from_each_other():
    """No two colours closer than a quarter of the RGB cube's side, none almost white."""
    colours = np.array([to_rgb(look.color) for look in DRAWN.values()])
    distances = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    assert distances[np.triu_indices(len(colours), 1)].min() > 0.25
    assert np.linalg.norm(1 - colours, axis=1).min() > 0.25


def test_a_saved_figure_has_the_width_of_a_column_and_text_as_text(tmp_path):
    with style.use():
        figure, grid = style.canvas(1, 2, width="double")
        for index, structure in enumerate(DRAWN):
            points = [(width, (index + 1) * width**-0.5) for width in (128, 512, 2048)]
            for panel, count in zip(grid.flat, (12, 3), strict=True):
                panel.set(yscale="log", xlabel="width", ylabel="distance from isotropy")
                style.theory(panel, *zip(*points, strict=True), structure)
                style.measured(panel, seeds(*points, count=count), "width", structure, shift=3.0 * (index - 4))
                style.log_ticks(panel, [128, 512, 2048])
        style.legend(figure, columns=5)
        style.caption(figure, "All structures.", seeds((128, 1.0)))
        pdf, png = style.save(figure, tmp_path / "all.structures")
        plt.close(figure)
    assert (pdf.name, png.name) == ("all.structures.pdf", "all.structures.png")
    assert plt.imread(png).shape[1] == pytest.approx(style.DOUBLE * 300, abs=1)
    content = pdf.read_bytes()
    assert f"/MediaBox [ 0 0 {style.DOUBLE * 72:g} ".encode() in content
    assert b"/Type3" not in content, "fonts are embedded as TrueType, so that text stays text"
    assert b"/FontFile2" in content


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_bands_and_points_across_are_means_with_t_intervals(axes, scale):
    axes.set(xscale=scale, yscale=scale)
    of, back = (np.log, np.exp) if scale == "log" else (np.asarray, np.asarray)
    table = seeds((128, 1.0), (512, 2.0), count=4)
    left_out = table[(table["width"] != 512) | (table["seed"] != 3)]
    assert list(style.band(axes, left_out, "width", color="k").index) == [128]
    means = style.band(axes, table, "width", color="k")
    assert means[512] == pytest.approx(back(of(table.loc[table["width"] == 512, "value"]).mean()))
    values = table.loc[table["width"] == 128, "value"]
    low, high = back(np.array(stats.t.interval(0.95, 3, of(values).mean(), stats.sem(of(values)))))
    band = axes.collections[-1].get_paths()[0].vertices
    assert (band[band[:, 0] == 128, 1].min(), band[:, 1][band[:, 0] == 128].max()) == pytest.approx((low, high))
    style.across(axes, values, 0.0, style.look("kfac"))
    (bar,) = axes.containers[-1].lines[2][0].get_segments()
    assert (bar[0, 0], bar[1, 0]) == pytest.approx((low, high))
