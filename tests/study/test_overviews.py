"""The scoreboard over all results, its page, and the commands that look at several runs."""

import dataclasses
import json
import re
import shutil
import subprocess
from urllib.parse import unquote

import pytest
import reported
from test_report import CHROMIUM, TRIAL, Page
from travelling import TRAVELLING

from curvlab.study import ANALYSES, UsageError, command, main
from curvlab.study.overviews.commands import scoreboard
from curvlab.study.overviews.standing import Run, finished, standings
from curvlab.study.results import latest

OPTIONS = ["--seeds", "6", "--scale", "0.3", "--quiet", "--workers", "1"]
REPORTED = dataclasses.replace(reported.ANALYSIS, figures={})


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(ANALYSES._things, "travelling", TRAVELLING)


def travelled(results, problem, *arguments):
    assert main(TRAVELLING, [*OPTIONS, "--problem", problem, "--results", str(results), *arguments]) == 0
    return latest(results, TRAVELLING.name)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two analyses, one of them on three problems."""
    results = tmp_path_factory.mktemp("all") / "results & more"
    for problem in ("plus-0", "plus-0.1", "plus--2"):
        travelled(results, problem)
    main(REPORTED, ["--seeds", "12", "--quiet", "--workers", "1", "--results", str(results)])
    return results


@pytest.fixture(scope="module")
def page(made):
    assert scoreboard(made) == 0
    return Page((made / "scoreboard.html").read_text())


def states(results):
    return {(one.first.run.analysis, one.claim): one.state for one in standings(finished(results)[0])}


def test_every_claim_has_a_state_over_the_problems(made):
    found = states(made)
    assert [found["travelling", f"D-{i}"] for i in range(1, 6)] == [*["contradicted"] * 3, "replicated", "replicated"]
    assert {found["reported", claim] for claim in ("level", "survives", "wide")} == {"open"}


def test_the_console_shows_every_claim_on_every_problem(made, capsys):
    assert command.main(["scoreboard", str(made)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "travelling plus--2 plus-0 plus-0.1 over problems" in out
    assert "D-5 refuted" in out
    assert "15 claims: 3 contradicted, 2 replicated, 10 open." in out
    assert f"Page: {made / 'scoreboard.html'}" in out


def test_the_page_shows_papers_as_sections_and_what_does_not_travel_before_them(page):
    text = page.text
    places = [
        text.index(part) for part in ("Does not travel", "Search the claims", "A. Nobody, On Nothing, 2026 travelling")
    ]
    assert places[0] < places[1] < text.index("A. Nobody, On Nothing, 2026", places[1])
    assert "D-1 , nowhere, Theorem 1" in text or "D-1, nowhere, Theorem 1" in text.replace(" ,", ",")
    assert "≠ contradicted does not travel: supported on plus-0 and plus-0.1, but refuted on plus--2" in text
    assert "= replicated refuted on 3 of 3 problems" in text
    assert reported.MARKUP in text


def test_verdicts_have_sign_effect_and_interval_and_lead_to_their_claim_in_the_report_of_the_run(made, page):
    assert re.search(r"✗ refuted against expectation -0\.\d+ \[-[\d.]+, -[\d.]+\]", page.text)
    links = [link for link in page.links if "report.html" in link]
    assert len(links) == 5 * 3 + 10
    reports = {}
    for link in links:
        path, _, anchor = unquote(link).partition("#")
        report = reports.setdefault(path, Page((made / path).read_text()))
        assert anchor in report.ids or not anchor


def test_the_page_asks_the_network_for_nothing(made, page):
    assert not re.search(r"(https?:)?//[a-z]", (made / "scoreboard.html").read_text())
    assert page.sources == []


def test_the_newest_run_of_a_problem_counts(tmp_path):
    travelled(tmp_path, "plus-0", "--first-seed", "50")
    assert states(tmp_path)["travelling", "D-1"] == "open"
    newer = travelled(tmp_path, "plus-0")
    [one, *_] = standings(finished(tmp_path)[0])
    assert one.first.run.results.folder == newer
    assert len(finished(tmp_path)[0]) == 2


def test_a_run_of_some_claims_hides_no_others(tmp_path):
    whole = travelled(tmp_path, "plus-0")
    part = travelled(tmp_path, "plus-0", "--claims", "D-4")
    folders = {one.claim: one.first.run.results.folder for one in standings(finished(tmp_path)[0])}
    assert folders == {"D-4": part, **dict.fromkeys(["D-1", "D-2", "D-3", "D-5"], whole)}


def test_claims_that_are_gone_from_an_analysis_leave_the_scoreboard_with_its_next_run(tmp_path):
    old = dataclasses.replace(
        TRAVELLING, experiments=tuple(
            dataclasses.replace(e, claims=[dataclasses.replace(c, id="old") for c in e.claims(TRAVELLING.defaults)[:1]])
            for e in TRAVELLING.experiments
        ),
    )  # fmt: skip
    main(old, [*OPTIONS, "--problem", "plus-0", "--results", str(tmp_path)])
    assert {claim for _, claim in states(tmp_path)} == {"old"}
    travelled(tmp_path, "plus-0")
    assert {claim for _, claim in states(tmp_path)} == {"D-1", "D-2", "D-3", "D-4", "D-5"}


def test_an_interrupted_run_and_leftovers_do_not_count(tmp_path):
    folder = travelled(tmp_path, "plus-0")
    shutil.copytree(folder, folder.with_name("2020-01-01-abc-partial"))
    shutil.copytree(folder, folder.with_name(".2020-01-01-abc.replaced"))
    assert len(finished(tmp_path)[0]) == 1


def test_a_damaged_folder_and_one_of_an_earlier_version_are_left_out_with_the_reason(tmp_path, capsys):
    folder = travelled(tmp_path, "plus-0")
    damaged, old = folder.with_name("damaged"), folder.with_name("old")
    shutil.copytree(folder, damaged)
    (damaged / "verdicts.json").write_text("[]")
    shutil.copytree(folder, old)
    content = json.loads((old / "verdicts.json").read_text())
    for row in content["verdicts"]:
        del row["scale"]
    (old / "verdicts.json").write_text(json.dumps(content))
    assert scoreboard(tmp_path) == 0
    out, text = capsys.readouterr().out, Page((tmp_path / "scoreboard.html").read_text()).text
    assert f"Left out: {damaged} is not a readable results folder" in out
    assert f"Left out: {old} is no run of this version of curvlab: the verdicts have no 'scale'" in out
    assert str(old) in text.partition("Left out")[2]
    with pytest.raises(UsageError, match="is no run of this version"):
        Run.of(old)
    shutil.rmtree(folder)
    (folder.parent / "latest").unlink()
    assert command.main(["scoreboard", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert f"error: no finished run of this version of curvlab lies in {tmp_path}; `curvlab run NAME` makes one" in err
    assert str(damaged) in err


def test_a_report_that_is_gone_is_not_linked_to(tmp_path):
    (travelled(tmp_path, "plus-0") / "report.html").unlink()
    assert scoreboard(tmp_path) == 0
    assert [link for link in Page((tmp_path / "scoreboard.html").read_text()).links if "report" in link] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scoreboard", "nowhere"], "error: no finished run of this version of curvlab lies in nowhere"),
        (["diff", "nowhere", "nowhere"], "nowhere is not a readable results folder"),
        (["diff", "one"], "usage: curvlab list"),
        (["preregister"], "usage: curvlab list"),
        (["preregister", "travellin"], "error: Unknown analysis 'travellin'. Did you mean 'travelling'?"),
        (["run", "travelling", "--problems"], "error: --problems needs one name at least"),
        (["run", "travelling", "--problems", "--quiet"], "error: --problems needs one name at least"),
        (["run", "travelling", "--problems", "a", "b", "a"], "error: --problems names a 2 times; name each once"),
        (
            ["run", "travelling", "--problems", "a", "--problem", "b"],
            "error: --problem and --problems exclude each other",
        ),
    ],
)
def test_wrong_usage_says_what_was_wrong(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_runs_on_several_problems_and_compares_runs(tmp_path, capsys):
    options = [*OPTIONS, "--results", str(tmp_path)]
    assert command.main(["preregister", "travelling", *options]) == 0
    assert command.main(["run", "travelling", "--problems", "plus-0", "plus--2", *options]) == 0
    out = capsys.readouterr().out
    assert f"Page: {tmp_path / 'travelling' / 'replication.html'}" in out
    assert "does not travel: supported on plus-0, but refuted on plus--2" in " ".join(out.split())
    runs = [str(run.results.folder) for run in finished(tmp_path)[0]]
    assert command.main(["diff", *runs]) == 0
    out = capsys.readouterr().out
    assert "option problem: plus--2 → plus-0" in out
    assert "more than noise" in out


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)")
def test_a_browser_shows_and_searches_the_scoreboard_without_an_error(made, page, tmp_path):
    """In a window of the width of a telephone: nothing is cut off, search and states sift the claims."""
    tried, frame = tmp_path / "tried.html", tmp_path / "narrow.html"
    trial = TRIAL.replace("article.claim", ".claim").replace(
        "document.documentElement.dataset.found =",
        """const kind = document.getElementById("kind");
  kind.value = "contradicted";
  kind.dispatchEvent(new Event("input", { bubbles: true }));
  found.contradicted = shown();
  document.documentElement.dataset.found =""",
    )
    tried.write_text((made / "scoreboard.html").read_text().replace("<head>", f"<head>{trial}", 1))
    frame.write_text(
        f'<iframe id="frame" width="400" height="800" src="{tried.name}"></iframe>'
        "<script>document.getElementById('frame').onload = (e) => { document.documentElement"
        ".dataset.found = e.target.contentDocument.documentElement.dataset.found; };</script>"
    )
    command_line = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
                    "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", frame.as_uri()]  # fmt: skip
    done = subprocess.run(command_line, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    stored = re.search(r"data-found=['\"](.*?)['\"]\s*[ >]", done.stdout.replace("&quot;", "§"))
    found = json.loads(stored[1].replace("§", '"'))
    assert found == {
        "all": 15, "width": 400, "wide": False, "focus": "words", "some": 0, "again": 15, "contradicted": 3,
    }  # fmt: skip
