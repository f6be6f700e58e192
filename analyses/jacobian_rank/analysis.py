"""The analysis as one object: its parts, claims and figures."""

from __future__ import annotations

from analyses.assembly import cells_of, claims_of, data_hash
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.figures import FIGURES
from analyses.jacobian_rank.parts import PARTS
from analyses.jacobian_rank.setting import ARGUMENTS
from analyses.part import Observations
from curvlab.study import Analysis, Cell


def _network(cell: Cell) -> list[str]:
    return [str(cell.coordinates.get(name, "")) for name in ("problem", *ARGUMENTS)]


def _data_hash(config: Config) -> str:
    takes = config.takes
    arguments = {"samples": config.samples}
    if not isinstance(takes.get("width"), int):
        arguments["width"] = config.swept_widths[0]
    return data_hash(config.problem, **{name: value for name, value in arguments.items() if name in takes})


def _measure(cell: Cell, config: Config) -> Observations:
    return PARTS[str(cell["part"])].measure(cell, config)


def _resources(cell: Cell, config: Config) -> tuple[float, float]:
    width = int(cell.coordinates.get("width", 0)) or 1024
    return PARTS[str(cell["part"])].seconds(width), 4e8 + 8.0 * width * (10 * config.samples + 1500)


ANALYSIS: Analysis[Config] = Analysis(
    name="jacobian_rank",
    version=2,
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
    cost="digits 0 and 1, N = 40, widths 256 to 16384, ReLU and erf, 12 seeds: about 5 minutes of processor time, spread over "
    "the cores, and 1 GiB a process.",
    config=Config,
    claims=claims_of(PARTS),
    cells=cells_of(PARTS, _network),
    data_hash=_data_hash,
    measure=_measure,
    resources=_resources,
    figures=FIGURES,
    axes=("widths", "activation", "structures"),
    memory_option="--widths",
)
