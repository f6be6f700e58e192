"""The analysis as one object: its parts, claims and figures."""

from __future__ import annotations

import hashlib

from analyses.ntk_isotropy.config import Config
from analyses.ntk_isotropy.figures import FIGURES
from analyses.ntk_isotropy.part import network
from analyses.ntk_isotropy.parts import PARTS
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
    return sorted(cells, key=network)


def _data_hash(config: Config) -> str:
    try:
        problem = resolve(config.problem, width=config.middle_width or 1)
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


def _resources(cell: Cell, config: Config) -> tuple[float, float]:  # noqa: ARG001
    part = PARTS[str(cell["part"])]
    width = int(cell["width"]) or 512
    depth = int(cell["depth"]) or 3
    parameters = (depth - 2) * width**2 + 1000 * width
    return part.seconds(width) * max(1, depth - 2), 4e8 + 8.0 * parameters * 45


ANALYSIS: Analysis[Config] = Analysis(
    name="ntk_isotropy",
    version=2,
    question=(
        "Does one step of natural gradient with an approximate Fisher move the outputs of a wide network by the same "
        "factor in every direction, so that approximate and exact natural gradient train alike?"
    ),
    paper="Karakida & Osawa 2020, Understanding Approximate Fisher Information for Fast Convergence of Natural Gradient "
    "Descent in Wide Neural Networks (arXiv 2010.00879)",
    examples=(
        "--widths 128 512 --seeds 5    # a quick look at two widths",
        "--problem karakida-osawa      # the paper's own setting: MNIST 0/1, N = 100, width 4096",
    ),
    cost="digits 0 and 1, N = 40, widths 128, 512 and 2048, 12 seeds: under 3 minutes on 2 cores (5 of processor time), "
    "and 1 GiB a process.",
    config=Config,
    claims=_claims,
    cells=_cells,
    data_hash=_data_hash,
    measure=_measure,
    resources=_resources,
    figures=FIGURES,
    axes=(
        "widths",
        "depth",
        "activation",
        "structures",
        "other_depths",
        "other_activations",
        "other_kinds",
        "other_outputs",
        "step_scales",
    ),
    memory_option="--widths",
)
