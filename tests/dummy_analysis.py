"""A tiny analysis that exercises the runner: does a noisy number lie where its structure says?

``DUMMY_SLEEP`` (seconds per cell) makes it slow enough to be interrupted, ``DUMMY_CLAIM`` is how many seconds it claims
that a cell takes, ``DUMMY_LOG`` names a file in which every measured cell leaves a line.
"""

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from curvlab.study import (
    Analysis,
    Cell,
    Claim,
    CommonOptions,
    Context,
    Equivalence,
    Experiment,
    Identity,
    Inequality,
    Point,
    main,
    refuted,
    style,
    supported,
    undecided,
)
from curvlab.tools.errors import DataUnavailable

TRUTH = {"full": 1.0, "block-diagonal": 3.0}


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Options of the dummy."""

    first_seed: int = 0
    problem: str = "noise"
    """What goes wrong: noise (nothing), failing, nan, diverging, memory, tensor, huge, absent or killed."""
    offsets: tuple[float, ...] = (0.0, 1.0)
    """Offsets that are added to the truth (unit: that of the truth)."""
    scale: float = 0.1
    """Standard deviation of the noise (unit: that of the truth)."""


def claims(config: Options) -> Sequence[Claim]:
    def residual(rows: pd.DataFrame) -> pd.DataFrame:
        return rows.assign(tolerance=1e-12)

    full, blocks = ({"structure": structure, "offset": 0.0} for structure in TRUTH)
    shared = {"source": "nowhere, Theorem 1", "measured": "the noisy number", "group": "paper"}
    made, off = "it was made so", {"structure": "full", "offset": 1.0}
    return [
        Claim(id="D-1", statement="The full number is 1.", rule=Equivalence("alpha", 1.0, 0.5, centre="mean"),
              expected=supported(made), at=full, **shared),
        Claim(id="D-2", statement="The block-diagonal number is above 2.", rule=Inequality("alpha", "greater", 2.0, centre="mean"),
              expected=supported(made), at=blocks, **shared),
        Claim(id="D-3", statement="The block-diagonal number is below 2.", rule=Inequality("alpha", "less", 2.0, centre="mean"),
              expected=refuted(made), at=blocks, **shared),
        Claim(id="D-4", statement="The residual vanishes.", rule=Identity("residual"), estimate=residual,
              expected=supported(made), **shared),
        Claim(id="D-5", statement="An offset of 1 does not matter.", rule=Equivalence("alpha", 1.0, 0.5, centre="mean"),
              expected=(undecided if config.scale < 1 else supported)(made), at=off, **shared),
    ]  # fmt: skip


def points(config: Options) -> list[Point]:
    return [{"structure": structure, "offset": offset} for offset in config.offsets for structure in TRUTH]


def data_hash(config: Options) -> str:
    if config.problem == "absent":
        raise DataUnavailable("the data set 'absent' is not in the data folder; --problem noise needs none")
    return f"data of {config.problem}"


def measure(cell: Cell, context: Context[Options]) -> list[dict[str, object]]:
    config = context.config
    time.sleep(float(os.environ.get("DUMMY_SLEEP", "0")))
    if "DUMMY_LOG" in os.environ:
        with Path(os.environ["DUMMY_LOG"]).open("a") as file:
            file.write(f"{cell}\n")
    structure, offset, seed = cell["structure"], float(cell["offset"]), int(cell["seed"])
    struck = structure == "full" and offset == 0.0 and seed == 1
    if struck and config.problem in ("failing", "killed"):
        raise RuntimeError("this cell always fails")
    if struck and config.problem == "memory":
        raise MemoryError("tried to allocate 80 GiB")
    if struck and config.problem == "tensor":
        return [{"quantity": "alpha", "value": np.zeros(3)}]
    if config.problem == "killed" and structure == "full" and offset == 0.0 and seed in (2, 3):
        os.kill(os.getpid(), signal.SIGKILL)
    noise = np.random.default_rng([seed, int(offset), list(TRUTH).index(str(structure))]).normal() * config.scale
    alpha = {"quantity": "alpha", "value": TRUTH[str(structure)] + offset + noise, "layer": 2, "sample": 7}
    if struck and config.problem == "nan":
        alpha["value"] = float("nan")
    if config.problem == "diverging":
        alpha["status"] = "diverged" if struck else "ok"
        alpha["value"] = float("inf") if struck else alpha["value"]
    return [alpha, {"quantity": "residual", "value": np.float64(1e-14), "layer": "all"}]


def measure_in(environment: Mapping[str, str], cell: Cell, context: Context[Options]) -> list[dict[str, object]]:
    """`measure` with these variables, for processes that do not inherit them."""
    os.environ.update(environment)
    return measure(cell, context)


def seconds(cell: Cell, config: Options) -> float:
    return float(os.environ.get("DUMMY_CLAIM", "0.1"))


def memory(cell: Cell, config: Options) -> float:
    return 1e18 if config.problem == "huge" and cell["seed"] == 0 else 3 * 2.0**20


def alphas(measurements: pd.DataFrame, verdicts: pd.DataFrame) -> Figure:
    figure, axes = style.canvas()
    table = measurements[measurements["quantity"] == "alpha"]
    for structure, truth in TRUTH.items():
        style.theory(axes[0, 0], [0.0, 1.0], [truth, truth + 1], structure)
        style.measured(axes[0, 0], table[table["structure"] == structure], "offset", structure)
    axes[0, 0].set(xlabel="offset", ylabel="number")
    axes[0, 0].legend()
    style.caption(figure, "The number against the offset, of each structure.", measurements)
    return figure


def spoilt(measurements: pd.DataFrame, verdicts: pd.DataFrame) -> Figure:
    if (measurements["quantity"] == "residual").any() and not np.isfinite(measurements["value"]).all():
        raise ValueError("nothing finite to draw")
    figure, _ = style.canvas()
    return figure


NUMBERS = Experiment(
    name="numbers",
    cells=points,
    measure=measure,
    varies=("draws",),
    claims=claims,
    seconds=seconds,
    memory=memory,
)

ANALYSIS = Analysis(
    name="dummy",
    version=1,
    question="Does a noisy number lie where its structure says?",
    paper="A. Nobody, On Nothing, 2026",
    examples=("--seeds 5", "--claims D-1 --dry-run"),
    cost="48 cells, about a second",
    config=Options,
    experiments=(NUMBERS,),
    data_hash=data_hash,
    figures={"alphas": alphas, "spoilt": spoilt},
    axes=("offsets",),
    together=("seed", "offset"),
    memory_option="--offsets",
)


UNDRAWN = replace(ANALYSIS, figures={})
"""It without figures, which take most of the time."""


def changed(**fields: object) -> Analysis:
    """It without figures, and with another experiment."""
    return replace(UNDRAWN, experiments=(replace(NUMBERS, **fields),))


def process(environment: Mapping[str, str], output: Path, errors: Path, arguments: Sequence[str]) -> None:
    """Run it as the leader of a process group that Ctrl-C can reach, with standard output and errors in files."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.environ.update(environment)
    for descriptor, path in ((1, output), (2, errors)):
        with path.open("w") as file:
            os.dup2(file.fileno(), descriptor)
    sys.stdout.reconfigure(line_buffering=True)
    raise SystemExit(main(ANALYSIS, arguments))


if __name__ == "__main__":
    raise SystemExit(main(ANALYSIS))
