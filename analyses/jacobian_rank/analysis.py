"""The analysis as one object: its parts, claims and figures."""

from __future__ import annotations

import hashlib

from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.figures import FIGURES
from analyses.jacobian_rank.parts import PARTS
from analyses.jacobian_rank.setting import ARGUMENTS
from analyses.part import Observations
from curvlab.problems import DataUnavailable, ProblemError, resolve
from curvlab.study import Analysis, Cell, Claim, UsageError
from curvlab.study import DataUnavailable as StudyDataUnavailable


def _claims(config: Config) -> list[Claim]:
    return [claim for part in PARTS.values() for claim in part.claims(config)]


def _cells(config: Config) -> list[Cell]:
    try:
        cells = [cell for part in PARTS.values() for cell in part.cells(config)]
    except ProblemError as error:
        raise UsageError(f"--problem: {error}") from error
    return sorted(cells, key=lambda cell: [str(cell.coordinates.get(name, "")) for name in ("problem", *ARGUMENTS)])


def _data_hash(config: Config) -> str:
    arguments = {name: value for name, value in (("width", 1), ("samples", config.samples)) if name in config.takes}
    try:
        problem = resolve(config.problem, **arguments)
    except ProblemError as error:
        raise UsageError(f"--problem: {error}") from error
    except DataUnavailable as error:
        raise StudyDataUnavailable(str(error)) from error
    digest = hashlib.sha256()
    for tensor in (*problem.train, *problem.test):
        digest.update(tensor.numpy(force=True).tobytes())
    return digest.hexdigest()


def _measure(cell: Cell, config: Config) -> Observations:
    return PARTS[str(cell["part"])].measure(cell, config)


def _resources(cell: Cell, config: Config) -> tuple[float, float]:
    width = int(cell.coordinates.get("width", 0)) or 1024
    return PARTS[str(cell["part"])].seconds(width), 5e8 + 8.0 * width * (20 * config.samples + 6 * 1000)


ANALYSIS: Analysis[Config] = Analysis(
    name="jacobian_rank",
    version=1,
    question=(
        "Has the Jacobian of a network full row rank, does it stay so, and does natural gradient then converge at a rate that "
        "knows nothing of the data?"
    ),
    paper="Zhang, Martens & Grosse 2019, Fast Convergence of Natural Gradient Descent for Overparameterized Neural Networks "
    "(arXiv 1905.10961)",
    examples=(
        "--widths 256 1024 --seeds 5    # a quick look at two widths",
        "--activation erf --samples 80  # the smooth twin alone, with more samples",
    ),
    cost="digits 0 and 1, N = 40, widths 256 to 16384, ReLU and erf, 12 seeds: about 4 minutes of processor time, spread over "
    "the cores, and 1 GiB a process.",
    config=Config,
    claims=_claims,
    cells=_cells,
    data_hash=_data_hash,
    measure=_measure,
    resources=_resources,
    figures=FIGURES,
    axes=("widths", "activation", "structures"),
    memory_option="--widths",
)
