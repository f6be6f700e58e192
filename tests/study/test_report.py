"""What the reports of a results folder tell, and that the page needs nothing but the folder."""

import csv
import dataclasses
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pandas as pd
import pytest
import reported

from curvlab.study import UsageError, load, main
from curvlab.study.report import findings, html, markdown
from curvlab.study.report.answer import answer, how_far
from curvlab.study.report.findings import Finding
from curvlab.study.report.forest import AXIS, MARGIN, WIDTH, strip
from curvlab.study.results import rows_of

VOID = {"meta", "link", "input", "img", "rect", "line", "circle", "path", "br"}


class Page(HTMLParser):
    """Reads a page strictly: every element is closed in its turn, ids are unique, links inside it lead somewhere."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.links, self.sources, self.words, self.tags = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        assert len(set(self.ids)) == len(self.ids)
        assert {link[1:] for link in self.links if link.startswith("#")} <= set(self.ids)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        entries = dict(attributes)
        self.ids += [entries["id"]] if "id" in entries else []
        self.links += [entries["href"]] if "href" in entries else []
        self.sources += [entries["src"]] if "src" in entries else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & {*self.open}:
            self.words.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made(tmp_path_factory.mktemp("run"))


def made(results, *arguments):
    """Run the analysis; the newest folder that this leaves, finished or not."""
    main(reported.ANALYSIS, ["--quiet", "--workers", "1", *arguments, "--results", str(results)])
    return max((results / "reported").glob("2*"), key=lambda path: path.stat().st_mtime)


@pytest.fixture(scope="module")
def results(folder):
    return load(folder)


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "report.html").read_text())


def found_in(results, claim):
    return next(finding for finding in findings(results.verdicts) if finding.claim == claim)


def test_five_sentences_answer_the_question(results):
    assert answer(results, findings(results.verdicts)) == [
        "The question: Does a report tell what was learnt, on what, and how surely?",
        "Of the 4 claims of the paper, 2 hold, 1 fails and 1 is undecided; most telling, “At most runs the step survives” "
        "fails and “The level is 1” holds; of claims derived from the paper, 2 hold and 1 lies outside its assumptions; of "
        "explorations beyond the paper, 1 holds; of checks of the code against itself, 1 holds.",
        "Two verdicts contradict what was expected: “At most runs the step survives” fails and “The number never exceeds "
        "1” holds; one claim is undecided although a verdict was expected.",
        "The verdicts stand on 12 seeds, which vary the initialisation of the weights and the random draws of the method, "
        "so that they carry to other initialisations and other draws, but not to other data, other splits or other orders "
        "of the batches.",
        "One claim was not measured, because the configuration plans no cell with experiment numbers, width 7.",
    ]


def test_what_seeds_vary_in_some_experiments_only_is_said(results):
    found = findings(results.verdicts)
    some = [dataclasses.replace(found[0], varies=("data",), seeds=24), *found[1:]]
    assert "12 to 24 seeds, which vary" in how_far(some)
    assert "not all of it in every experiment" in how_far(some)
    assert how_far([found[4]]) == "No verdict stands on any seed."


def test_both_reports_tell_what_contradicts_the_expectation_before_all_else(folder, page):
    for text in ((folder / "report.md").read_text(), page.text.partition("The question:")[2]):
        places = [
            text.index(part) for part in ("Against expectation", "Expected", "Measured on", "Claims of the paper")
        ]
        assert places == sorted(places)


def test_groups_stand_in_their_order_and_every_measured_claim_in_one(page, results):
    groups = [
        "Claims of the paper",
        "Claims derived from the paper",
        "Explorations beyond the paper",
        "Checks of the code",
    ]
    text = page.text.partition("Search the claims")[2]
    assert [text.index(group) for group in groups] == sorted(text.index(group) for group in groups)
    assert page.tags.count("article") == sum(finding.is_measured for finding in findings(results.verdicts)) == 9


def test_the_page_tells_of_a_claim_what_a_reader_has_to_know(page):
    for words in (
        "geometric mean 0.",
        "corrected [",
        "(bound from equation (3))",
        "With 12 seeds its test finds, with a probability of 80 %, a factor of",
        "supported at half the margin, supported at twice the margin",
        "supported. the paper says so (set after seeds 0 to 11 were seen)",
        "the network is narrower than the theorem allows",
        "It holds at width 7, too. unplanned",
        "data set made up",
        "widths 8, 16",
        "seeds 12, from 1000 to 1011",
        "for 12 cells",
        "spoilt could not be drawn: ValueError: nothing to draw",
        "Only if level holds",
    ):
        assert words in page.text, words


def test_every_claim_leads_to_the_rows_that_it_reads(folder, page, results):
    linked = [link for link in page.links if link.startswith("rows/")]
    assert len(linked) == 9
    with (folder / "rows" / "bounded.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 * 20
    assert {row["quantity"] for row in rows} == {"bounded"}
    assert max(float(row["value"]) for row in rows) == found_in(results, "bounded").estimate
    assert rows_of(folder, "a/b c").parent == folder / "rows"


def test_figures_have_captions_with_seeds_and_confidence_and_their_claims_lead_to_them(page):
    assert (
        "levels. The level, of every seed & arm. Means over the 12 seeds of the run, geometric on logarithmic axes; bars "
        "are t-intervals of 95 %, not corrected for the number of claims."
    ) in page.text
    assert "#figure-levels" in page.links


def test_the_page_asks_the_network_for_nothing(folder, page):
    text = (folder / "report.html").read_text()
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    assert all(source.startswith("data:") for source in page.sources)
    assert all(re.match(r"#|rows/|data:", link) for link in page.links)
    assert page.tags.count("script") == 1


def test_markup_in_statements_stays_text(page):
    assert reported.MARKUP in page.text
    assert "On <Nothing>, 2026" in page.text


@pytest.mark.parametrize("arguments", [["--problem", "nan"], ["--problem", "failing"], ["--problem", "stopped"],
                                       ["--problem", "no-claims"], ["--seeds", "1"], ["--claims", "residual"]],
                         ids=" ".join)  # fmt: skip
def test_reports_of_runs_in_which_something_is_missing(tmp_path, arguments):
    folder = made(tmp_path, *arguments)
    page, text = Page((folder / "report.html").read_text()), (folder / "report.md").read_text()
    said = {
        "nan": ["Non-finite values (1)", "level = nan"],
        "failing": ["Cells without measurements (1)", "RuntimeError: this cell always fails"],
        "stopped": ["The run was interrupted", "not measured yet, the run was interrupted"],
        "no-claims": ["No claim of the paper was measured", "Nothing was claimed"],
        "1": ["one seed has no interval", "The verdicts stand on 1 seed,"],
        "residual": ["No claim of the paper was measured; of checks of the code against itself, 1 holds."],
    }[arguments[-1]]
    for words in said:
        assert words in page.text, words
        assert words in text or words == "The run was interrupted", words


def test_reports_are_made_again_from_the_folder_alone(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "results" / "reported" / folder.name)
    before = (copy / "report.html").read_text()
    for name in ("report.html", "report.md", "figures.json"):
        (copy / name).unlink()
    undrawable = dataclasses.replace(reported.ANALYSIS, figures={"levels": reported.ANALYSIS.figures["levels"]})
    assert main(undrawable, ["--redraw", str(copy)]) == 0
    after = Page((copy / "report.html").read_text())
    assert Page(before).text.partition("Figures ")[0] == after.text.partition("Figures ")[0]
    assert (copy / "report.md").exists()


def test_a_folder_of_an_earlier_version_is_refused_with_the_reason(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / folder.name)
    content = json.loads((copy / "verdicts.json").read_text())
    for row in content["verdicts"]:
        del row["group"]
    (copy / "verdicts.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="no 'group'.*run the analysis again"):
        findings(load(copy).verdicts)


def test_stored_verdicts_are_read_back_as_they_were(results):
    ratio, spread = found_in(results, "ratio"), found_in(results, "spread")
    assert (ratio.region, ratio.logarithmic, ratio.estimand) == ((-math.inf, 1.0), True, "geometric mean")
    assert ratio.estimate == pytest.approx(math.exp(pd.Series(ratio.values).map(math.log).mean()))
    assert len(ratio.values) == len(spread.by_seed) == 12
    assert len(spread.values) == 36
    assert math.isnan(found_in(results, "narrow").estimate)
    assert found_in(results, "residual").effect == max(found_in(results, "residual").values) < 1


def test_an_identity_without_a_tolerance_may_be_broken(results):
    """What it takes of its tolerance is infinite, for which JSON has no number."""
    table = results.verdicts.set_index("claim", drop=False)
    table["values"] = table["values"].where(
        table.index != "residual", pd.Series([[None] * 12] * len(table), table.index)
    )
    found = next(finding for finding in findings(table.reset_index(drop=True)) if finding.claim == "residual")
    assert found.effect == math.inf
    assert strip(found) is None


def drawn(results, claim, **changes):
    return strip(dataclasses.replace(found_in(results, claim), **changes))


def test_a_strip_is_on_the_scale_of_its_claim(results):
    """Ratios have equal distances where the claim is of a geometric mean, differences elsewhere."""
    parts = {
        "values": (0.01, 0.1, 1.0),
        "estimate": 0.1,
        "low_95": 0.01,
        "high_95": 1.0,
        "low": 0.01,
        "high": 1.0,
        "seeds": 3,
    }
    for claim, middle in (("ratio", 0.5), ("wide", 0.09 / 0.99)):
        found = drawn(results, claim, **parts, region=(-math.inf, 1.0))
        low, mid, high = (x for x, _, _ in found.seeds)
        assert (mid - low) / (high - low) == pytest.approx(middle)
        assert found.estimate == pytest.approx(mid)
        assert found.interval.low == pytest.approx(low)
        assert found.limits == [pytest.approx(high)]


def test_intervals_that_leave_the_strip_end_in_arrows_and_leave_the_seeds_legible(results):
    found = drawn(results, "wide", low=-math.inf, high=math.inf, low_95=-1e6, high_95=1e6)
    assert (found.corrected.more_below, found.corrected.more_above) == (True, True)
    assert found.interval.more_below
    places = [x for x, _, _ in found.seeds]
    assert max(places) - min(places) > 0.3 * WIDTH
    assert found.region.more_above


@pytest.mark.parametrize("changes", [
    {"values": (0.0, 0.0), "estimate": 0.0},
    {"values": (1.0, 1.0), "estimate": 1.0, "region": (1.0, math.inf)},
    {"values": (1e-300, 1e300), "estimate": 1.0},
    {"values": (-1.0, 2.0), "estimate": 0.5, "region": (0.5, 1.5)},
])  # fmt: skip
@pytest.mark.parametrize("claim", ["ratio", "wide"])
def test_all_of_a_strip_lies_inside_it(results, claim, changes):
    found = drawn(
        results, claim, **{"low": math.nan, "high": math.nan, "low_95": math.nan, "high_95": math.nan} | changes
    )
    assert len(found.seeds) == 2
    for x, y, _ in found.seeds:
        assert MARGIN <= x <= WIDTH - MARGIN
        assert 0 < y < AXIS
    assert MARGIN <= found.estimate <= WIDTH - MARGIN
    assert all(MARGIN <= x <= WIDTH - MARGIN for x, _ in found.ticks)
    assert (found.interval, found.corrected) == (None, None)


def test_many_seeds_at_one_place_are_stacked_and_none_is_hidden(results):
    found = drawn(results, "survives", values=(0.0,) * 47 + (1.0,), seeds=48)
    assert len({(x, y) for x, y, _ in found.seeds}) == 48
    assert all(0 < y < AXIS for _, y, _ in found.seeds)


def test_there_is_no_strip_without_an_estimate(results):
    assert strip(found_in(results, "narrow")) is None


def test_expected_verdicts_that_are_open_are_flagged(results):
    found = {finding.claim: finding for finding in findings(results.verdicts)}
    assert [name for name, finding in found.items() if finding.awaited] == ["wide"]
    assert [name for name, finding in found.items() if finding.contradicted] == ["survives", "bounded"]
    assert isinstance(found["wide"], Finding)


CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
TRIAL = """
<script>
onerror = (message) => { document.documentElement.dataset.trouble = message; };
addEventListener("load", () => {
  const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const shown = () => [...document.querySelectorAll("article.claim")].filter((claim) => claim.checkVisibility()).length;
  const words = document.getElementById("words"), found = { all: shown(), width: innerWidth };
  found.wide = document.documentElement.scrollWidth > innerWidth;
  press("/");
  found.focus = document.activeElement.id;
  words.value = "PAPER says";
  words.dispatchEvent(new Event("input", { bubbles: true }));
  found.some = shown();
  press("Escape");
  found.again = shown();
  document.documentElement.dataset.found = JSON.stringify(found);
});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)")
def test_a_browser_shows_and_searches_the_page_without_an_error(folder, tmp_path):
    """In a window of the width of a telephone: nothing is cut off, / leads to the search, Escape clears it."""
    tried, frame = tmp_path / "tried.html", tmp_path / "narrow.html"
    tried.write_text((folder / "report.html").read_text().replace("<head>", f"<head>{TRIAL}", 1))
    frame.write_text(f'<iframe id="frame" width="400" height="800" src="{tried.name}"></iframe>')
    for page in (tried, frame):
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
                   "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]  # fmt: skip
        if page is frame:
            page.write_text(
                page.read_text() + "<script>document.getElementById('frame').onload = (e) => { document.documentElement"
                ".dataset.found = e.target.contentDocument.documentElement.dataset.found; };</script>"
            )
        done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
        assert "CONSOLE" not in done.stderr, done.stderr
        assert "data-trouble" not in done.stdout
        stored = re.search(r"data-found=['\"](.*?)['\"]\s*[ >]", done.stdout.replace("&quot;", "§"))
        found = json.loads(stored[1].replace("§", '"'))
        assert found.pop("width") == 400 or page is tried
        assert found == {"all": 9, "wide": False, "focus": "words", "some": 1, "again": 9}


def test_a_report_is_the_same_whenever_it_is_made(results):
    found = findings(results.verdicts)
    assert html(results, found) == html(results, found)
    assert markdown(results, found) == markdown(results, found)
