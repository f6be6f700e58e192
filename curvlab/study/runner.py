"""The command line of an analysis, from its options to its exit code."""

import contextlib
import logging
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from rich.console import Console

from curvlab.study import report
from curvlab.study.analysis import Analysis
from curvlab.study.environment import environment
from curvlab.study.execution import Measured, Plan, measure
from curvlab.study.judging import wants_seeds
from curvlab.study.logbook import recording
from curvlab.study.measurements import tabulate
from curvlab.study.options import C, parse, pop_option
from curvlab.study.publish import decided, draw, open_folder, publish
from curvlab.study.results import load, promote, write_figures
from curvlab.study.statistics.multiplicity import Looks
from curvlab.tools.errors import CommandError
from curvlab.tools.progress import progress, say
from curvlab.tools.storage import WriteError, make_folder
from curvlab.tools.text import duration, size

log = logging.getLogger(__name__)

IMPORTING = 3.0
"""Seconds in which the command itself starts."""
DONE, CONTRADICTED, FAILED, INTERRUPTED = 0, 1, 1, 130


def main(analysis: Analysis[C], argv: Sequence[str] | None = None) -> int:
    """Run an analysis from its command line: ``raise SystemExit(main(ANALYSIS))``.

    Args:
        analysis: The analysis.
        argv: Arguments; those of the process if None.

    Returns:
        The exit code: 0 done; 1 if no cell could be measured, or with ``--strict`` and a verdict that contradicts what the
        code expects; 2 wrong usage; 3 data, memory or disk space are missing; 130 interrupted or terminated, everything
        finished kept.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        config = parse(analysis.defaults, arguments, prog=analysis.command, description=analysis.description)
    except SystemExit as stop:
        return int(stop.code or 0)
    except CommandError as error:
        return _fail(error)
    console = Console(width=None if sys.stdout.isatty() else 150)
    try:
        with _terminable():
            return _dispatch(analysis, config, arguments, console)
    except CommandError as error:
        return _fail(error)
    except KeyboardInterrupt:
        print("interrupted; every finished cell is kept, the same command goes on", file=sys.stderr)
        return INTERRUPTED


def _dispatch(analysis: Analysis[C], config: C, arguments: Sequence[str], console: Console) -> int:
    if config.redraw:
        return _redraw(analysis, config.redraw, console)
    if config.list_claims:
        return _list_claims(analysis, config, console)
    plan = Plan.of(analysis, config)
    with contextlib.closing(plan.machines):
        if config.dry_run:
            return _dry_run(plan, console)
        if config.shard:
            return _run_shard(plan, arguments, console)
        return _run(plan, arguments, console)


def _run(plan: Plan[C], arguments: Sequence[str], console: Console) -> int:
    """Measure, judge, write, draw; the folder is partial until all of it is there."""
    analysis, config = plan.analysis, plan.config
    command = shlex.join([*shlex.split(analysis.command_for(config)), *arguments])
    facts = environment(analysis.file, config.device)
    partial = open_folder(plan, facts, command)
    with recording(partial / "log.txt"):
        log.info("%s", command)
        if plan.looks:
            plan, measured = _measure_until_decided(plan, plan.looks, console)
        else:
            measured = _measure(plan, console)
        published = publish(plan, measured, partial)
    if not measured.interrupted:
        promote(partial)

    found = published.findings
    for note in report.notes(found):
        say(console, note)
    console.print(report.console_table(found))
    say(console, report.summary(found))
    if measured.interrupted:
        say(console, "Interrupted: every finished cell is kept; the same command goes on.")
    if published.failures:
        count = len(published.failures)
        say(console, f"Cells without measurements: {count}, named in {published.folder / 'report.html'}")
    for figure in published.spoilt:
        say(console, f"Figure failed: {figure.name}: {figure.fault} (traceback in log.txt)")
    say(console, f"Report:  {published.folder / 'report.html'}")
    say(console, f"Results: {published.folder}")
    say(console, f"Redraw:  {published.redraw}")
    return _exit_code(measured, config.strict and any(finding.contradicted for finding in found))


def _measure_until_decided(plan: Plan[C], looks: Looks, console: Console) -> tuple[Plan[C], Measured]:
    """Measure at more and more seeds what claims need that are not decided yet; what was planned so far, and measured."""
    so_far = replace(plan, planned=(), cells=())
    measured = Measured({})
    claims = plan.claims
    for look, seeds in enumerate(looks.seeds):
        so_far = plan.until(looks.after(look), claims, so_far.planned)
        if not plan.config.quiet:
            say(console, f"{seeds} seeds for {len(claims)} claims that are not decided yet")
        measured = measured.extended(_measure(so_far, console), so_far.planned)
        if measured.interrupted or measured.shortage:
            break
        verdicts = decided(so_far, tabulate(measured.rows), measured.failures)
        claims = tuple(
            claim for claim, verdict in zip(plan.claims, verdicts, strict=True) if wants_seeds(claim, verdict)
        )
        if not claims:
            break
    return replace(so_far, cells=so_far.planned), measured


def _run_shard(plan: Plan[C], arguments: Sequence[str], console: Console) -> int:
    """Measure a share of the cells into the shared cache; no results folder."""
    name = f"shard-{str(plan.config.shard).replace('/', '-of-')}"
    path = plan.cache.folder / f"{name}.log"
    with recording(path):
        measured = _measure(plan, console)
    _, rest = pop_option("shard", arguments)
    say(console, f"{name}: {len(measured.rows)} of its {len(plan.cells)} cells are in the cache {plan.cache.folder}")
    for failure in measured.failures:
        say(console, f"failed: cell {failure.cell}: {failure.reason} (traceback in {path})")
    command = shlex.split(plan.analysis.command_for(plan.config))
    assemble = shlex.join([*command, *(word for word in rest if word != "--fresh")])
    say(console, f"When all shards are done, assemble: {assemble}")
    return _exit_code(measured, contradicted=False)


def _measure(plan: Plan[C], console: Console) -> Measured:
    make_folder(plan.cache.folder)
    cached = plan.cached()
    estimate = plan.estimate([cell for cell in plan.cells if cell not in cached])
    if not plan.config.quiet:
        say(console, f"{len(plan.cells)} cells, {len(cached)} cached, {len(estimate.costs)} to run ({estimate.time})")
    with progress(console, estimate.costs, plan.config.quiet) as advance:
        return measure(plan, cached, estimate, advance)


def _exit_code(measured: Measured, contradicted: bool) -> int:
    if measured.interrupted:
        return INTERRUPTED
    if measured.shortage:
        return _fail(measured.shortage)
    if measured.failures and not measured.rows:
        return FAILED
    return CONTRADICTED if contradicted else DONE


def _redraw(analysis: Analysis[C], folder: Path, console: Console) -> int:
    results = load(folder)
    drawn = []
    for name in analysis.figures:
        drawn.append(draw(analysis, name, results))
        say(console, f"drawn: {results.folder / 'figures' / name}.pdf and .png")
    write_figures(results.folder, drawn)
    report.write_reports(load(results.folder))
    say(console, f"written: {results.folder / 'report.html'} and .md")
    return DONE


def _list_claims(analysis: Analysis[C], config: C, console: Console) -> int:
    for claim in analysis.claims(config):
        say(console, f"{claim.id}  {claim.statement}")
        say(console, f"    source:   {claim.source}")
        say(console, f"    measured: {claim.measured}")
        say(console, f"    decided:  {claim.rule}")
        say(console, f"    expected: {claim.expected}")
    return DONE


def _dry_run(plan: Plan[C], console: Console) -> int:
    cached = plan.cached()
    estimate = plan.estimate([cell for cell in plan.cells if cell not in cached])
    say(console, f"cells:  {len(plan.cells)}, {len(cached)} cached, {len(estimate.costs)} to run")
    say(
        console, f"time:   {estimate.time}, after about {duration(IMPORTING)} to start; figures take a few seconds more"
    )
    where = f" for cell {estimate.largest}" if estimate.largest else ""
    others = f" and {estimate.workers - 1} more at the same time" if estimate.workers > 1 else ""
    free = f", {size(estimate.available)} available" if estimate.available is not None else ""
    say(console, f"memory: about {size(estimate.memory)}{where}{others}{free}")
    return DONE


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM stops the run as Ctrl-C does."""

    def stop(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _fail(error: CommandError) -> int:
    option = " with --results" if isinstance(error, WriteError) else ""
    print(f"error: {error}{option}", file=sys.stderr)
    return error.exit_code
