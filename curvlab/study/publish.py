"""From measured cells to a results folder: judge, write, draw."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from curvlab.study import report, style
from curvlab.study.analysis import Analysis, Draw
from curvlab.study.claims import Failure, Verdict
from curvlab.study.execution import Measured, Plan
from curvlab.study.judging import judge
from curvlab.study.measurements import tabulate
from curvlab.study.options import C, recorded
from curvlab.study.panels import PanelGrid
from curvlab.study.preregistration import fingerprint, fingerprints, registered, registration
from curvlab.study.report import Finding
from curvlab.study.results import (
    PARTIAL,
    Drawn,
    Results,
    final_name,
    load,
    verdict_table,
    write_figures,
    write_measurements,
    write_rows,
    write_verdicts,
)
from curvlab.tools.errors import CommandError
from curvlab.tools.storage import digest, make_folder, write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """What a run leaves behind.

    Attributes:
        folder: The results folder.
        findings: The claims that were asked for and what became of them.
        failures: Cells without measurements.
        redraw: The command that redraws figures and reports.
        spoilt: Figures that could not be drawn.
    """

    folder: Path
    findings: list[Finding]
    failures: list[Failure]
    redraw: str
    spoilt: list[Drawn]


def open_folder(plan: Plan[C], facts: dict[str, object], command: str) -> Path:
    """The partial folder in which a run works, with ``config.json`` and ``environment.json``."""
    analysis, config = plan.analysis, plan.config
    claims = registered(analysis, config)
    before = registration(analysis, config)
    identity = [recorded(config), analysis.version, plan.data, facts["git"], fingerprint(claims)]
    partial = config.results / analysis.name / f"{datetime.now():%Y-%m-%d}-{digest(identity)[:8]}{PARTIAL}"
    make_folder(partial)
    origin = {
        "analysis": analysis.name,
        "question": analysis.question,
        "paper": analysis.paper,
        "program": analysis.command_for(config),
        "subject": {name: _plain(entry) for name, entry in analysis.subject(config).items()},
        "version": analysis.version,
        "data": plan.data,
        "command": command,
        "fingerprint": fingerprint(claims),
        "claims": {name: one[:12] for name, one in fingerprints(claims).items()},
        "preregistered": {
            "file": before.path.name,
            "written": before.written,
            "otherwise": {name: then for name, (then, _) in before.differing(config).items()},
        }
        if before
        else None,
    }
    write_json(partial / "config.json", recorded(config))
    write_json(partial / "environment.json", origin | facts)
    return partial


def publish(plan: Plan[C], measured: Measured, partial: Path) -> Published:
    """Judge what was measured and write it all into ``partial``, the name of which the caller makes final.

    Raises:
        StorageFull: no space left; every finished cell is in the cache.
    """
    analysis = plan.analysis
    complete = not measured.interrupted
    failures = [*measured.failures, *_untried(plan, measured)]
    measurements = tabulate(measured.rows)
    found = zip(plan.claims, decided(plan, measurements, failures), strict=True)
    shown = [(claim, verdict) for claim, verdict in found if claim.id in plan.shown]
    claims, verdicts = [claim for claim, _ in shown], [verdict for _, verdict in shown]
    for verdict in verdicts:
        log.info("claim %s: %s %s", verdict.claim, verdict.outcome, verdict.note)
    write_measurements(partial, measurements)
    write_verdicts(partial, verdict_table(claims, verdicts), failures, complete)
    write_rows(partial, claims, measurements)
    _write_work(plan, measured, partial)
    drawn = _draw_all(analysis, load(partial)) if complete else []
    write_figures(partial, drawn)
    results = load(partial)
    report.write_reports(results)
    folder = final_name(partial) if complete else partial
    spoilt = [figure for figure in drawn if figure.fault]
    return Published(folder, report.findings(results.verdicts), failures, report.redraw(results), spoilt)


def _plain(entry: object) -> object:
    """An entry of the subject as JSON has it."""
    if isinstance(entry, list | tuple):
        return [_plain(one) for one in entry]
    return entry if isinstance(entry, str | int | float | bool) else str(entry)


def _write_work(plan: Plan[C], measured: Measured, folder: Path) -> None:
    """Add to ``environment.json`` how long the run took, for how many cells, and since when these have been measured."""
    facts = json.loads((folder / "environment.json").read_text())
    seconds = (datetime.now().astimezone() - datetime.fromisoformat(facts["started"])).total_seconds()
    cached = len(measured.rows) - measured.work
    facts["run"] = {"seconds": round(max(seconds, 0.0), 1), "measured": measured.work, "cached": cached}
    facts["measured_since"] = plan.cache.since(measured.rows)
    write_json(folder / "environment.json", facts)


def decided(plan: Plan[C], measurements: pd.DataFrame, failures: Sequence[Failure]) -> list[Verdict]:
    """The verdicts on the claims of a plan, those among them that were not asked for."""
    return judge(plan.claims, measurements, failures, planned=plan.planned, left_out=plan.left_out, looks=plan.looks)


def figure_of(draw: Draw, results: Results) -> Figure:
    """Draw a figure from stored results; a layout knows the cells that failed."""
    knowing = replace(draw, failures=results.failures) if isinstance(draw, PanelGrid) else draw
    return knowing(results.measurements, results.verdicts)


def draw(analysis: Analysis[C], name: str, results: Results) -> Drawn:
    """Draw one figure from stored results into their folder, as PDF and PNG."""
    drawing = analysis.figures[name]
    with style.use():
        figure = figure_of(drawing, results)
        try:
            make_folder(results.folder / "figures")
            style.save(figure, results.folder / "figures" / name)
            caption = str(figure.get_label())
        finally:
            plt.close(figure)
    shown = drawing.claims if isinstance(drawing, PanelGrid) else ()
    claims = tuple(claim for claim in results.by_claim if shown and claim.startswith(shown))
    return Drawn(name, caption, claims)


def _draw_all(analysis: Analysis[C], results: Results) -> list[Drawn]:
    """Draw every figure; one that fails costs neither the others nor the results."""
    drawn = []
    for name in analysis.figures:
        try:
            drawn.append(draw(analysis, name, results))
        except CommandError:
            raise
        except Exception as error:
            log.exception("figure %s failed", name)
            drawn.append(Drawn(name, fault=f"{type(error).__name__}: {error}"))
    return drawn


def _untried(plan: Plan[C], measured: Measured) -> list[Failure]:
    """The cells that an interrupted run did not come to."""
    tried = measured.rows.keys() | {failure.cell for failure in measured.failures}
    return [Failure(cell, "not measured yet, the run was interrupted") for cell in plan.cells if cell not in tried]
