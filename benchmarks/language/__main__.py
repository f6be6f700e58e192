"""Command line of the benchmark of language models."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from rich.console import Console

from benchmarks.language import report
from benchmarks.language.methods import METHODS, MethodName
from benchmarks.language.models import SHAPES, ModelName
from benchmarks.language.report import Entry
from benchmarks.language.worker import Measurement, Request
from benchmarks.options import CommonOptions, command
from benchmarks.process import in_own_process
from curvlab.study.environment import environment


@dataclass(frozen=True)
class Options(CommonOptions):
    """Time fits, products and training steps on decoders with a loss per token, beside a gradient and other libraries.

    Every method runs in a process of its own. Exit code 1 if one fails; one that runs out of memory or time is reported as such.
    """

    repeats: int = 5
    """Timed calls of a method."""
    models: tuple[ModelName, ...] = ("gpt", "vocabulary", "gpt2-small")
    """Decoders."""
    methods: tuple[MethodName, ...] = get_args(MethodName)
    """What is computed; a forward and backward pass always is."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; returns the exit code."""
    return command("python -m benchmarks.language", Options, _measure, argv)


def _measure(options: Options, console: Console, progress: Console) -> int:
    models = []
    for model in options.models:
        with progress.status(str(SHAPES[model])) as status:
            entries = []
            for method in METHODS:
                if method == "plain" or method in options.methods:
                    status.update(f"{SHAPES[model]}: {METHODS[method].title}")
                    request = Request(method=method, model=model, **options.machine)
                    with tempfile.TemporaryDirectory() as folder:
                        found = in_own_process(
                            "benchmarks.language.worker", request, options.timeout, Path(folder), Measurement
                        )
                    entries.append(Entry(request, found))
        console.print(
            report.heading(entries), report.table(entries), *report.notes(entries), "", sep="\n", highlight=False
        )
        models.append(entries)
    console.print(report.LEGEND)
    if options.output is not None:
        report.save(options.output, models, environment(Path(__file__), options.device))
    return int(any(entry.measurement.outcome == "failed" for entries in models for entry in entries))


if __name__ == "__main__":
    sys.exit(main())
