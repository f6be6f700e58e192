"""The analysis as one object: its parts, claims and figures."""

from __future__ import annotations

from analyses.assembly import cells_of, claims_of, digest_of, problem_faults
from analyses.assembly import data_hash as hash_of
from analyses.edge_of_stability.config import Config
from analyses.edge_of_stability.figures import FIGURES
from analyses.edge_of_stability.parts import PARTS, published
from analyses.edge_of_stability.setting import ARGUMENTS, setting_of
from analyses.part import Observations
from curvlab.problems.images import IMAGE_SETS, load_images
from curvlab.study import Analysis, Cell, UsageError


def _network(cell: Cell) -> list[str]:
    return [str(cell.coordinates.get(name, "")) for name in ("problem", "seed", *ARGUMENTS)]


@problem_faults()
def _data_hash(config: Config) -> str:
    if config.published:
        load_images(str(published.SETTING["problem"]))
    if config.problem not in IMAGE_SETS:
        return hash_of(config.problem)
    try:
        setting = setting_of(Cell({"problem": config.problem, "seed": 0}), config)
    except ValueError as error:
        raise UsageError(f"--problem {config.problem} with --samples {config.samples}: {error}") from error
    return digest_of(setting.problem)


def _measure(cell: Cell, config: Config) -> Observations:
    return PARTS[str(cell["part"])].measure(cell, config)


def _resources(cell: Cell, config: Config) -> tuple[float, float]:
    part = PARTS[str(cell["part"])]
    if cell["problem"] != config.problem:
        return part.seconds(config.width), 1e9 if part is published.PART else 3e8
    work = config.width**2 * (config.depth - 1) * config.samples * config.steps / (2 * 64**2 * 128 * 800)
    return part.seconds(config.width) * max(0.3, work), 5e8 + 8.0 * config.samples * (3072 + 60 * config.width)


ANALYSIS: Analysis[Config] = Analysis(
    name="edge_of_stability",
    version=3,
    question=(
        "Does full-batch training sharpen until its optimiser is just stable, and stay there? And do natural gradient and its "
        "approximations have an edge of their own?"
    ),
    paper="Cohen, Kaur, Li, Kolter & Talwalkar 2021, Gradient Descent on Neural Networks Typically Occurs at the Edge of "
    "Stability (arXiv 2103.00065)",
    examples=(
        "--seeds 4 --steps 500  # a quick look",
        "--problem cifar10-5k --scaling standardised --samples 5000 --width 200 --etas 0.01 0.02 --steps 9000 --dtype float32 "
        "--device cuda  # the paper's network",
    ),
    cost="digits, N = 128, tanh network 64-64-64-10, runs of 800 steps, 10 seeds: about 7 minutes of processor time, spread over "
    "the cores.",
    config=Config,
    claims=claims_of(PARTS),
    cells=cells_of(PARTS, _network),
    data_hash=_data_hash,
    measure=_measure,
    resources=_resources,
    figures=FIGURES,
    axes=("heavy_ball", "nesterov", "adam", "batch_size", "preconditioners"),
    memory_option="--samples",
)
