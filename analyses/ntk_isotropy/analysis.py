"""The analysis as one object: its experiments and figures."""

from functools import partial
from typing import Any

import torch

from analyses.ntk_isotropy import panels
from analyses.ntk_isotropy.config import Config
from analyses.ntk_isotropy.experiments.cross_entropy import CROSS_ENTROPY
from analyses.ntk_isotropy.experiments.damping import DAMPING
from analyses.ntk_isotropy.experiments.gradient_descent import GRADIENT_DESCENT
from analyses.ntk_isotropy.experiments.inputs import INPUTS
from analyses.ntk_isotropy.experiments.positivity import POSITIVITY
from analyses.ntk_isotropy.experiments.response import RESPONSE
from analyses.ntk_isotropy.experiments.stability import STABILITY
from analyses.ntk_isotropy.experiments.steps import PARAMETER_STEPS
from analyses.ntk_isotropy.experiments.tridiagonal import TRIDIAGONAL
from analyses.specs import classifies_nodes, described, squared
from curvlab.problems import ARGUMENTS, Problem, digest_of, instance
from curvlab.study import Analysis, UsageError
from curvlab.study.panels import PanelGrid


def _problem(config: Config) -> Problem:
    """The problem at the middle width."""
    wanted: dict[str, Any] = squared(config.problem)
    if not isinstance(config.takes.get("width"), int):
        wanted["width"] = config.middle_width or 1
    return instance(config.problem, **wanted)


def _subject(config: Config) -> dict[str, object]:
    widths = config.swept_widths
    swept: dict[str, object] = {"widths": widths, "depth": config.depth, "activation": config.activation}
    return described(_problem(config), **({} if widths == (0,) else {"network": ""} | swept))


def _data_hash(config: Config) -> str:
    problem = _problem(config)
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


_layout = partial(PanelGrid, "python -m analyses.ntk_isotropy")
_training_loss = partial(panels.loss_against_step, loss="training")
_after_steps = partial(panels.against_width, experiment="steps", scale=1.0, run="network")
CHANGE = partial(
    _after_steps, quantity="jacobian_change", ylabel="change of the Jacobian\n" r"$\|J_2-J_0\|_F\,/\,\|J_0\|_F$"
)
FIRST = partial(
    _after_steps,
    quantity="train_error_network",
    step=1,
    ylabel="training outputs from theory\n" r"$\|f_1-\hat f_1\|\,/\,\|f_0-y\|$",
)
TENTH = partial(
    panels.against_width,
    experiment="gradient-descent",
    quantity="train_error_network",
    ylabel="training outputs from theory\n" r"$\|f_{10}-\hat f_{10}\|\,/\,\|f_0-y\|$",
)
TEST = partial(
    _after_steps,
    quantity="test_error_network",
    step=1,
    ylabel="test outputs from theory\n" r"$\|f_1-\hat f_1\|\,/\,\|\hat f_1-f_0\|$",
)
TEST_LOSS = partial(
    _after_steps, quantity="test_loss", theory="test_loss_predicted", step=1, ylabel="test loss after one step"
)

FIGURES = {
    "isotropy": _layout(
        [[panels.scale_against_depth, panels.anisotropy_against_width]],
        claims=("isotropic-", "kfac-published", "anisotropic-diagonal", "anisotropic-ekfac"),
        height=3.1,
    ),
    "training": _layout(
        [[panels.residual_against_rate, *(partial(_training_loss, scale=scale) for scale in (0.5, 1.0))]],
        claims=("contraction-",),
        height=2.9,
        columns=6,
    ),
    "convergence": _layout([[FIRST, CHANGE]], claims=("training-", "convergence-", "jacobian-"), height=3.0),
    "test": _layout(
        [[TEST_LOSS, TEST]], claims=("test-full", "test-block", "test-kfac", "test-unit"), height=2.9, columns=6
    ),
    "damping": _layout([[panels.damped_loss]], claims=("damping-",), width="column", height=2.9),
    "tridiagonal": _layout(
        [[panels.damped_tridiagonal_scale, panels.damped_tridiagonal_anisotropy, panels.moved_layers]],
        claims=("tridiagonal-",),
        height=2.6,
    ),
    "kfac": _layout([[panels.kfac_layers, panels.leverages, panels.kfac_inputs]], claims=("kfac-",), height=2.6),
    "unit_wise": _layout([[panels.unit_wise_scale, panels.unit_wise_spread]], claims=("unit-wise-",), height=2.5),
    "cross_entropy": _layout(
        [
            [partial(panels.cross_entropy_loss, rank=rank) for rank in (0, 1)],
            [partial(panels.cross_entropy_ratio, rank=rank) for rank in (0, 1)],
        ],
        claims=("cross-entropy-",),
        height=2.3,
    ),
    "gradient_descent": _layout([[panels.modes, TENTH]], claims=("gradient-descent-",), height=2.4),
    "stability": _layout(
        [[panels.edge_of_stability, panels.sharpness]], claims=("preconditioned-", "stability-"), height=2.6
    ),
    "positivity": _layout(
        [[panels.positivity]], claims=("positive-", "duplicates-", "narrow-"), width="column", height=2.5
    ),
}

ANALYSIS: Analysis[Config] = Analysis(
    name="ntk_isotropy",
    version=4,
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
    cost="digits 0 and 1, N = 40, widths 128, 512 and 2048, 12 seeds: under 5 minutes on 2 cores (8 of processor time), "
    "and 1 GiB a process.",
    config=Config,
    experiments=(
        RESPONSE, TRIDIAGONAL, INPUTS, PARAMETER_STEPS, GRADIENT_DESCENT, DAMPING, POSITIVITY, CROSS_ENTROPY, STABILITY,
    ),
    subject=_subject,
    data_hash=_data_hash,
    figures=FIGURES,
    axes=(
        "widths", "depth", "activation", "structures", "other_depths", "other_activations", "other_kinds", "other_outputs",
        "step_scales",
    ),
    together=ARGUMENTS,
    memory_option="--widths",
)  # fmt: skip
