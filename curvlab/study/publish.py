"""From measured cells to a results folder: judge, write, draw."""

import logging
import shlex
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from curvlab.study import report, style
from curvlab.study.analysis import Analysis, Draw
from curvlab.study.claims import Failure, Verdict
from curvlab.study.execution import Measured, Plan
from curvlab.study.judging import judge
from curvlab.study.measurements import tabulate
from curvlab.study.options import C, recorded
from curvlab.study.panels import PanelGrid
from curvlab.study.results import PARTIAL, Results, final_name, load, verdict_table, write_measurements, write_verdicts
from curvlab.tools.errors import CommandError
from curvlab.tools.storage import digest, make_folder, write, write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """What a run leaves behind.

    Attributes:
        folder: The results folder.
        verdicts: One per claim of the plan.
        failures: Cells without measurements.
        redraw: The command that redraws the figures.
        spoilt: Figures that could not be drawn, each with the reason.
    """

    folder: Path
    verdicts: list[Verdict]
    failures: list[Failure]
    redraw: str
    spoilt: list[str]


def open_folder(plan: Plan[C], facts: dict[str, object], command: str) -> Path:
    """The partial folder in which a run works, with ``config.json`` and ``environment.json``."""
    analysis, config = plan.analysis, plan.config
    identity = [recorded(config), analysis.version, plan.data, facts["git"]]
    partial = config.results / analysis.name / f"{datetime.now():%Y-%m-%d}-{digest(identity)[:8]}{PARTIAL}"
    make_folder(partial)
    origin = {"analysis": analysis.name, "version": analysis.version, "data": plan.data, "command": command}
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
    verdicts = judge(plan.claims, measurements, failures, planned=plan.planned)
    for verdict in verdicts:
        log.info("claim %s: %s %s", verdict.claim, verdict.outcome, verdict.note)
    write_measurements(partial, measurements)
    write_verdicts(partial, verdict_table(plan.claims, verdicts), failures, complete)
    drawn, spoilt = _draw_all(analysis, load(partial)) if complete else ([], [])
    folder = final_name(partial) if complete else partial
    again = ["--config", str(folder / "config.json"), "--results", str(plan.config.results)]
    redraw = f"{analysis.command_for(plan.config)} --redraw {shlex.quote(str(folder))}"
    text = report.markdown(
        plan,
        analysis.name if complete else f"{analysis.name} (partial: the run was interrupted)",
        verdicts,
        measurements,
        failures,
        drawn,
        commands={
            "Redraw the figures": redraw,
            "Run it again": f"{analysis.command_for(plan.config)} {shlex.join(again)}",
        },
    )
    write(partial / "report.md", text.encode())
    return Published(folder, verdicts, failures, redraw, spoilt)


def figure_of(draw: Draw, results: Results) -> Figure:
    """Draw a figure from stored results; a layout knows the cells that failed."""
    knowing = replace(draw, failures=results.failures) if isinstance(draw, PanelGrid) else draw
    return knowing(results.measurements, results.verdicts)


def draw(analysis: Analysis[C], name: str, results: Results) -> None:
    """Draw one figure from stored results into their folder, as PDF and PNG."""
    with style.use():
        figure = figure_of(analysis.figures[name], results)
        try:
            make_folder(results.folder / "figures")
            style.save(figure, results.folder / "figures" / name)
        finally:
            plt.close(figure)


def _draw_all(analysis: Analysis[C], results: Results) -> tuple[list[str], list[str]]:
    """Draw every figure; one that fails costs neither the others nor the results."""
    drawn, spoilt = [], []
    for name in analysis.figures:
        try:
            draw(analysis, name, results)
            drawn.append(name)
        except CommandError:
            raise
        except Exception as error:
            log.exception("figure %s failed", name)
            spoilt.append(f"{name}: {type(error).__name__}: {error}")
    return drawn, spoilt


def _untried(plan: Plan[C], measured: Measured) -> list[Failure]:
    """The cells that an interrupted run did not come to."""
    tried = measured.rows.keys() | {failure.cell for failure in measured.failures}
    return [Failure(cell, "not measured yet, the run was interrupted") for cell in plan.cells if cell not in tried]
