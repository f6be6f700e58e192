"""The analysis as one object: its parts, claims and figures."""

from __future__ import annotations

from typing import Any

import torch

from analyses.assembly import cells_of, claims_of, classifies_nodes, digest_of, instance, squared
from analyses.ntk_isotropy.config import Config
from analyses.ntk_isotropy.figures import FIGURES
from analyses.ntk_isotropy.part import network
from analyses.ntk_isotropy.parts import PARTS
from analyses.part import Observations
from curvlab.problems import Problem
from curvlab.study import Analysis, Cell, UsageError


def _data_hash(config: Config) -> str:
    wanted: dict[str, Any] = squared(config.problem)
    if not isinstance(config.takes.get("width"), int):
        wanted["width"] = config.middle_width or 1
    problem = instance(config.problem, **wanted)
    digest = digest_of(problem)
    _check_loss(config.problem, problem)
    return digest


def _check_loss(spec: str, problem: Problem) -> None:
    """Refuse a loss that the predictions do not hold for.

    Raises:
        UsageError: its output Hessian is not the identity over the number of samples.
    """
    x, y = problem.train
    with torch.no_grad():
        outputs = problem.model(x if classifies_nodes(spec) else x[:2])[:2]
    try:
        hessian = torch.autograd.functional.hessian(lambda z: problem.loss(z, y[:2]), outputs)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UsageError(f"--problem {spec}: the loss {problem.loss} refuses the model's outputs: {error}") from error
    size = outputs.numel()
    expected = torch.eye(size, dtype=outputs.dtype, device=outputs.device) / len(outputs)
    if not torch.allclose(hessian.reshape(size, size), expected, rtol=1e-4, atol=1e-6):
        raise UsageError(
            f"--problem {spec} has the loss {problem.loss}, but every prediction assumes a squared error whose Hessian in the "
            "outputs is I/N. Use curvlab.nn.HalfSquaredError, with targets shaped like the outputs; or give your function an "
            "argument `loss` with the default 'cross-entropy', and return such a problem when it is called with 'half-squared'"
        )


def _measure(cell: Cell, config: Config) -> Observations:
    return PARTS[str(cell["part"])].measure(cell, config)


def _resources(cell: Cell, config: Config) -> tuple[float, float]:  # noqa: ARG001
    part = PARTS[str(cell["part"])]
    width = int(cell["width"]) or 512
    depth = int(cell["depth"]) or 3
    parameters = (depth - 2) * width**2 + 1000 * width
    return part.seconds(width) * max(1, depth - 2), 4e8 + 8.0 * parameters * 16


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
    claims=claims_of(PARTS),
    cells=cells_of(PARTS, network),
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
