"""The contraction of exact natural gradient through the optimiser, on the two-layer network of the theorems."""

from analyses.claims import claim
from analyses.jacobian_rank.descent import contraction, excess
from analyses.training.config import Config
from analyses.training.run import FullBatch
from curvlab import study, theory
from curvlab.optim import NaturalGradient
from curvlab.problems import resolve

PAPER = "Zhang, Martens & Grosse 2019"
WIDTH = 4096
RATES = (0.25, 0.5)
STEPS = 8


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    eta = float(cell["eta"])
    problem = resolve("two-layer", width=WIDTH, seed=int(cell["seed"])).to(context.config.device)
    optimiser = NaturalGradient(problem.model, problem.loss, eta, structure="full", kind="exact", damping=0.0)
    path = study.follow(FullBatch(problem, [optimiser]), STEPS).series("squared")
    return [
        study.observed("excess", excess(path, theory.ngd_rate_bound(eta))),
        study.observed("rate_ratio", contraction(path) / theory.ngd_linear_ratio(eta)),
        *(study.observed("squared", value / path[0], step=step) for step, value in enumerate(path.tolist())),
    ]


POINTS = [{"eta": eta} for eta in RATES]


CLAIMS = [
    claim("contraction-bound", f"{PAPER}, theorem 1 (docs/theory/zhang_martens_grosse_2019.md, claim 3)",
          study.Equivalence("excess", 0.0, 1e-6),
          "Exact natural gradient contracts ‖u − y‖² by 1 − η or more in every step, through the optimiser.",
          f"Largest excess of ‖r(k)‖²/‖r(0)‖² over (1 − η)^k at η = 0.25 and 0.5, two-layer ReLU network of width {WIDTH}.",
          study.supported("It is a theorem where its conditions hold, and held beyond them in the Jacobian-rank analysis."),
          estimate=study.worst_by_seed),
    claim("contraction-rate",
          f"{PAPER}, theorem 1 in the linear limit (docs/theory/zhang_martens_grosse_2019.md, claim 4, derived)",
          study.Equivalence("rate_ratio", 1.0, 0.1),
          "The squared residual of a wide network contracts by (1 − η)² per step.",
          "Geometric mean over the steps of ‖r(k+1)‖²/‖r(k)‖², over (1 − η)², at both η.",
          study.supported("The change of J is small at this width.")),
]  # fmt: skip

CONTRACTION: study.Experiment[Config] = study.Experiment(
    name="contraction", cells=POINTS, measure=_measure, claims=CLAIMS, seconds=0.3, memory=8e8
)
