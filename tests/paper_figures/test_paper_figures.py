"""The command line of the papers' figures: listing, drawing from stored results, and what is missing."""

import dataclasses
import json
import os
from itertools import product
from typing import get_args

import pandas as pd
import pytest

import paper_figures
from analyses.ntk_isotropy.setting import PUBLISHED
from curvlab.study import Analysis, CommonOptions, Experiment, UsageError, load, style
from curvlab.study import main as run
from curvlab.study.claims import Outcome
from paper_figures import Paper, find, names
from paper_figures.__main__ import main
from paper_figures.karakida_osawa_2020 import scales
from paper_figures.zhang_martens_grosse_2019 import constants

KARAKIDA = "karakida_osawa_2020"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Options of an analysis that measures at once."""

    problem: str = "own"
    structures: tuple[str, ...] = ("full", "kfac", "diagonal")


def _measure(cell, context):
    return [{"quantity": "number", "value": 3.0}]


@pytest.fixture
def nothing_shipped(monkeypatch, tmp_path):
    """Papers are drawn from what was measured only."""
    monkeypatch.setattr(paper_figures, "PUBLISHED", tmp_path / "nothing")


def _analysis():
    return Analysis(
        name="tiny",
        version=1,
        question="Is it?",
        paper="A. Nobody",
        examples=("--seeds 1", "--seeds 2"),
        cost="nothing",
        config=Options,
        experiments=(
            Experiment(name="number", cells=lambda _: [{"structure": "full", "seed": 0}], measure=_measure, varies=()),
        ),
        data_hash=lambda _: "data",
    )


def draw(measurements, verdicts):
    figure, grid = style.canvas()
    style.measured(grid[0, 0], measurements.assign(width=1), "width", "full")
    grid[0, 0].set(xlabel="width", ylabel="number")
    return figure


PAPER = Paper(
    title="A. Nobody 2026, On Nothing",
    analysis=_analysis(),
    settings={"problem": "own", "structures": ("full", "kfac"), "extras": ()},
    figures={"number": draw},
    tables={"numbers": lambda measurements: measurements[["quantity", "value"]]},
)


def store(results, name, **options):
    """A results folder with nothing but what decides whether it fits."""
    folder = results / "tiny" / name
    folder.mkdir(parents=True)
    config = {"problem": "own", "structures": ["full", "kfac"], "extras": [], "claims": []} | options
    pd.DataFrame([{"quantity": "number", "value": 3.0, "seed": 0}]).to_parquet(folder / "measurements.parquet")
    for file, content in {
        "config.json": config,
        "environment.json": {},
        "verdicts.json": {"verdicts": [], "failures": [], "complete": True},
    }.items():
        (folder / file).write_text(json.dumps(content))
    return folder


def test_papers_are_the_modules_of_the_package():
    assert KARAKIDA in names()
    assert all(not name.startswith("_") for name in names())
    for name in names():
        paper = find(name)
        assert paper.title
        assert paper.figures


def test_a_new_paper_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "nobody_2026.py").write_text("PAPER = 'the paper'\n")
    monkeypatch.setattr(paper_figures, "__path__", [*paper_figures.__path__, str(tmp_path)])
    assert "nobody_2026" in names()
    assert find("nobody_2026") == "the paper"


def test_an_unknown_paper_suggests_the_nearest(capsys):
    assert main(["karakida_2020"]) == 2
    assert f"Unknown paper 'karakida_2020'. Did you mean {KARAKIDA!r}?" in capsys.readouterr().err
    with pytest.raises(UsageError, match="Unknown paper"):
        find("__main__")


@pytest.mark.usefixtures("nothing_shipped")
def test_the_list_names_figures_and_the_command_of_what_is_missing(tmp_path, capsys):
    assert main(["--list", "--results", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert KARAKIDA in text
    assert "losses" in text
    assert "missing: python -m analyses.ntk_isotropy --problem karakida-osawa" in text
    assert "missing: python -m analyses.gnn_natural_gradient --problem pubmed" in text


@pytest.mark.usefixtures("nothing_shipped")
def test_missing_results_are_named_with_their_command(tmp_path, capsys):
    assert main([KARAKIDA, "--results", str(tmp_path / "none"), "--output", str(tmp_path / "figures")]) == 3
    text = capsys.readouterr().err
    assert "python -m analyses.ntk_isotropy --problem karakida-osawa --structures full block-diagonal" in text
    assert f"--results {tmp_path / 'none'}" in text
    assert "--run" in text
    assert not (tmp_path / "figures").exists()


def test_the_command_is_one_that_the_analysis_accepts(tmp_path, capsys):
    """The command in the message, on a problem that needs no files."""
    paper = find(KARAKIDA)
    paper = dataclasses.replace(paper, settings={**paper.settings, "problem": "digits"})
    assert run(paper.analysis, [*paper.arguments(tmp_path), "--dry-run"]) == 0
    assert "cells:" in capsys.readouterr().out


def test_stored_results_fit_by_problem_and_hold_at_least_the_structures(tmp_path):
    assert PAPER.stored(tmp_path) is None
    store(tmp_path, "other-problem", problem="digits")
    store(tmp_path, "one-claim", claims=["D-1"])
    store(tmp_path, "one-structure", structures=["full"])
    store(tmp_path, "2026-01-01-aaaa-partial")
    assert PAPER.stored(tmp_path) is None
    older = store(tmp_path, "older", structures=["diagonal", "full", "kfac"])
    newer = store(tmp_path, "newer")
    for age, folder in enumerate((newer, older)):
        os.utime(folder, (1e9 - age, 1e9 - age))
    assert PAPER.stored(tmp_path).folder == newer.resolve()


def test_results_that_cannot_be_read_are_a_usage_error(tmp_path):
    (store(tmp_path, "broken") / "measurements.parquet").write_text("no table")
    with pytest.raises(UsageError, match="not a readable results folder"):
        PAPER.stored(tmp_path)


def test_run_measures_what_is_missing_and_draws(tmp_path, monkeypatch, capsys):
    paper = dataclasses.replace(PAPER, settings={"problem": "own", "structures": ("full", "kfac")})
    monkeypatch.setattr("paper_figures.__main__.find", lambda _: paper)
    arguments = ["nobody_2026", "--results", str(tmp_path / "results"), "--output", str(tmp_path / "figures")]
    assert main(arguments) == 3
    assert main([*arguments, "--run"]) == 0
    assert main(arguments) == 0
    folder = tmp_path / "figures" / "nobody_2026"
    assert (folder / "number.png").stat().st_size > 0
    content = (folder / "number.pdf").read_bytes()
    assert b"/Type /Font" in content
    assert b"/Type3" not in content, "text stays text"
    assert "number & 3.0" in " ".join((folder / "numbers.tex").read_text().split())
    assert "drawn: " in capsys.readouterr().out


def test_a_run_that_fails_hands_on_its_exit_code(tmp_path, monkeypatch):
    paper = dataclasses.replace(PAPER, settings={"problem": "own", "no_such_option": "1"})
    monkeypatch.setattr("paper_figures.__main__.find", lambda _: paper)
    assert main(["nobody_2026", "--results", str(tmp_path), "--run"]) == 2


def test_settings_are_options_of_the_command_and_the_least_that_a_run_holds(tmp_path):
    paper = dataclasses.replace(PAPER, settings={"problem": "own", "published": True, "seeds": 12})
    assert paper.command(tmp_path).endswith(f"--problem own --published --seeds 12 --results {tmp_path}")
    for name, options in {
        "few": {"published": True, "seeds": 8},
        "unpublished": {"published": False, "seeds": 24},
        "sequential": {"published": True, "seeds": "auto"},
        "old": {"seeds": 24},
    }.items():
        store(tmp_path, name, **options)
    assert paper.stored(tmp_path) is None
    store(tmp_path, "enough", published=True, seeds=24)
    assert paper.stored(tmp_path).folder.name == "enough"


def test_what_was_measured_goes_before_what_comes_with_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(paper_figures, "PUBLISHED", tmp_path / "shipped")
    store(tmp_path / "shipped", "own")
    assert PAPER.stored(tmp_path / "results").folder.parent.parent.name == "shipped"
    store(tmp_path / "results", "2026-01-01-aaaa")
    assert PAPER.stored(tmp_path / "results").folder.name == "2026-01-01-aaaa"


def test_a_paper_with_several_problems_is_drawn_on_each(tmp_path, monkeypatch, capsys):
    paper = dataclasses.replace(PAPER, others={"else": ("number",)})
    monkeypatch.setattr("paper_figures.__main__.find", lambda _: paper)
    monkeypatch.setattr("paper_figures.__main__.names", lambda: ["nobody_2026"])
    for problem in ("own", "else"):
        store(tmp_path / "results", problem, problem=problem)
    assert main(["--results", str(tmp_path / "results"), "--output", str(tmp_path)]) == 0
    assert (tmp_path / "nobody_2026" / "number.png").exists()
    assert (tmp_path / "nobody_2026-else" / "number.png").exists()
    assert f"from {tmp_path / 'results' / 'tiny' / 'else'} (claims: none)" in capsys.readouterr().out


@pytest.mark.usefixtures("nothing_shipped")
def test_another_problem_takes_the_place_of_the_papers_own(tmp_path, capsys):
    assert main([KARAKIDA, "--problem", "digits", "--results", str(tmp_path)]) == 3
    text = capsys.readouterr().err
    assert "--problem digits" in text
    assert "karakida-osawa" not in text


def test_the_table_of_scales_has_published_derived_and_measured_values():
    rows = []
    for structure, seed in ((s, seed) for s in PUBLISHED for seed in range(3)):
        at = {"experiment": "response", "structure": structure, "kind": "exact", "width": 64, "depth": 3, "outputs": 1}
        at |= {"activation": "relu", "seed": seed, "cell": f"{structure}{seed}"}
        quantities = {"alpha": 3.0 + seed, "anisotropy": 1e-14, "alpha_predicted": 4.0}
        if structure != "full":
            quantities["alpha_published"] = 120.0
        rows += [{**at, "quantity": name, "value": value} for name, value in quantities.items()]
    table = scales(pd.DataFrame(rows))
    assert set(table["approximation"]) == {style.look(structure).label for structure in PUBLISHED}
    assert table[r"$\alpha$ published"].tolist() == ["--", "120", "120", "120", "120"]
    assert set(table[r"$\alpha$ derived"]) == {"4"}
    assert set(table[r"$\alpha$ measured"]) == {r"$4 \pm 2$"}


def test_the_table_of_condition_2_has_a_row_an_activation_and_width():
    rows = [
        {"experiment": "training", "data": "own", "eta": 0.5, "activation": activation, "width": width, "seed": seed}
        | {"quantity": quantity, "value": value + seed}
        for activation, width, seed in product(("erf", "relu"), (64, 256), range(3))
        for quantity, value in (("constant_trajectory", 1.0), ("constant_ball_random", 3.0))
    ]
    table = constants(pd.DataFrame(rows))
    assert list(zip(table["activation"], table["width"], strict=True)) == list(product(("relu", "erf"), ("64", "256")))
    assert set(table["along the run"]) == {r"$2.00 \pm 2.48$"}
    assert set(table["in the ball"]) == {r"$4.00 \pm 2.48$"}


def shipped():
    """The folders of results that come with the package."""
    return sorted(path.parent for path in paper_figures.PUBLISHED.glob("*/*/verdicts.json"))


def test_what_comes_with_the_package_is_small_and_says_where_it_is_from():
    files = [path for path in paper_figures.PUBLISHED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6
    names = {"config.json", "environment.json", "measurements.parquet", "verdicts.json"}
    for folder in shipped():
        assert {path.name for path in folder.iterdir()} == names
        results = load(folder)
        origin = results.environment
        assert results.complete
        assert not results.failures
        assert folder.parent.name == origin["analysis"]
        assert origin["git"]["commit"]
        assert not origin["git"]["dirty"]
        assert {"torch", "curvlab"} <= origin["packages"].keys()
        assert origin["command"].startswith(f"python -m analyses.{origin['analysis']} ")
        assert "/" not in origin["command"], "it runs anywhere"
        assert set(results.verdicts["outcome"]) <= set(get_args(Outcome))


@pytest.mark.parametrize("name", names())
def test_a_paper_is_drawn_at_once(name, tmp_path, capsys):
    """From nothing but the package, on all of its problems."""
    assert main([name, "--results", str(tmp_path / "none"), "--output", str(tmp_path)]) == 0
    paper = find(name)
    parts = {name: tuple(paper.figures)} | {f"{name}-{problem}": drawn for problem, drawn in paper.others.items()}
    for part, figures in parts.items():
        for figure in figures:
            assert (tmp_path / part / f"{figure}.pdf").stat().st_size > 0
        for table in paper.tables:
            assert "tabular" in (tmp_path / part / f"{table}.tex").read_text()
    assert str(paper_figures.PUBLISHED) in capsys.readouterr().out


def test_the_published_scales_are_found_again(tmp_path):
    """At width 4096 on 100 images of MNIST; K-FAC's is N(L − 1) + 1, and not the N·L of the paper."""
    table = scales(find(KARAKIDA).stored(tmp_path).measurements).set_index("approximation")
    published, derived = table[r"$\alpha$ published"], table[r"$\alpha$ derived"]
    assert published.to_dict() == {
        "full": "1",
        "block-diagonal": "3",
        "block-tridiagonal": "1",
        "unit-wise": "4096",
        "K-FAC": "300",
    }
    assert derived["K-FAC"] == "201"
    for name in ("full", "block-diagonal", "block-tridiagonal", "K-FAC"):
        assert table[r"$\alpha$ measured"][name].startswith(rf"${derived[name]} \pm")
