"""An analysis of one's own in one file: how far the gradient is from the natural gradient, and does width matter?

    python examples/analysis.py --help
    python examples/analysis.py --seeds 6

It has the options, cache, statistics, report and figures of curvlab's own analyses.
"""

from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from pandas import DataFrame

import curvlab
from curvlab import study
from curvlab.fisher import make
from curvlab.problems import data_hash, resolve
from curvlab.study.panels import PanelGrid, take


@dataclass(frozen=True, kw_only=True)
class Options(study.CommonOptions):
    """Options of this analysis, beside those that all have."""

    problem: str = "digits"
    """Data set and model: a name, or module:function that returns a Problem."""
    widths: tuple[int, ...] = (8, 64)
    """Hidden widths (unit: neurons)."""


def cosine(cell: study.Cell, context: study.Context[Options]) -> study.Observations:
    """Measure the cosine between the gradient and a natural gradient in the parameters."""
    problem = resolve(context.config.problem, width=int(cell["width"]), seed=int(cell["seed"]))
    problem = problem.to(context.config.device, getattr(torch, context.config.dtype))
    rows = curvlab.sqrt_fisher(problem.model, problem.loss, *problem.train)
    problem.loss(problem.model(problem.train[0]), problem.train[1]).backward()
    gradient = rows.space.flatten({name: p.grad for name, p in problem.model.named_parameters()})
    natural = make(str(cell["structure"])).update(rows).solve(gradient, damping="rel:1e-3")
    value = torch.nn.functional.cosine_similarity(gradient, natural, dim=0)
    return [{"quantity": "cosine", "value": float(value)}]


def claims(config: Options) -> list[study.Claim]:
    """State what is claimed, before anything is measured."""
    measured, source = "Cosine of the two directions at initialisation.", "no paper; an example"
    return [
        study.Claim(
            id="diagonal-nearer",
            statement="The diagonal structure turns the gradient less than K-FAC does.",
            rule=study.Wins("cosine", "greater"),
            group="exploration",
            source=source,
            measured=f"{measured} Difference between the two structures.",
            expected=study.undecided("No theorem covers it."),
            estimate=lambda table: study.difference_by_seed(table, "structure", "diagonal", "kfac"),
            at={"width": config.widths[0]},
        ),
        study.Claim(
            id="uphill",
            statement="A natural gradient is a direction of ascent.",
            rule=study.Always("cosine", "greater", 0.0),
            group="derived",
            source=source,
            measured=measured,
            expected=study.supported("(F + ρI)⁻¹ is positive definite."),
        ),
    ]


def cosines(axes: Axes, table: DataFrame) -> None:
    """Draw the cosine against the width."""
    for structure, rows in take(table, "cosine", "cosine").groupby("structure"):
        study.style.measured(axes, rows, "width", str(structure))
    study.style.log_ticks(axes, [int(width) for width in sorted(table["width"].unique())])
    axes.set(xlabel="hidden width (units)", ylabel="cosine with the gradient")


ANALYSIS = study.Analysis(
    name="direction",
    question="How far does natural gradient turn the gradient?",
    config=Options,
    experiments=(
        study.Experiment(
            name="cosine",
            cells=lambda config: [{"structure": s, "width": w} for s in ("kfac", "diagonal") for w in config.widths],
            measure=cosine,
            varies=("initialisation",),
            claims=claims,
            seconds=0.1,
        ),
    ),
    figures={"cosine": PanelGrid("python examples/analysis.py", [[cosines]], claims=("",), width="column")},
    data_hash=lambda config: data_hash(config.problem, width=1),
    axes=("widths",),
    version=1,  # raise it when a measurement changes its meaning
)

if __name__ == "__main__":
    raise SystemExit(study.main(ANALYSIS))
