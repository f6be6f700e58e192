"""The contraction of exact natural gradient through the optimiser, on the two-layer network of the theorems."""

from analyses.claims import claim
from analyses.training.config import Config
from analyses.training.run import FullBatch
from curvlab import study, theory
from curvlab.optim import NaturalGradient
from curvlab.problems import resolve

PAPER = "Zhang, Martens & Grosse 2019, theorem 1"
WIDTH = 4096
RATES = (0.25, 0.5)
STEPS = 8


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    eta = float(cell["eta"])
    problem = resolve("two-layer", width=WIDTH, seed=int(cell["seed"])).to(context.config.device)
    optimiser = NaturalGradient(
        problem.model, problem.loss, eta, structure="full", kind="exact", damping=0.0, kl_clip=None
    )
    path = study.follow(FullBatch(problem, [optimiser]), STEPS).series("squared")
    left = path / path[0]
    rows = [study.observed("rate_ratio", left[-1] ** (1 / STEPS) / theory.ngd_linear_ratio(eta))]
    for step, value in enumerate(left.tolist()):
        rows.append(study.observed("squared", value, step=step))
        if step:
            rows.append(study.observed("bound_ratio", value / theory.ngd_rate_bound(eta) ** step, step=step))
    return rows


CLAIMS = [
    claim("contraction-bound", f"{PAPER} (docs/theory/zhang_martens_grosse_2019.md, claim 3), through the optimiser",
          study.Always("bound_ratio", "less", 1.0),
          "The optimiser with the exact Fisher matrix contracts ‖u − y‖² by 1 − η or more in every step.",
          f"‖r(k)‖²/‖r(0)‖² over (1 − η)^k at {STEPS} steps with η = 0.25 and 0.5, two-layer ReLU network of width {WIDTH}.",
          study.supported("It is a theorem where its conditions hold, and held beyond them in the Jacobian-rank analysis."),
          group="self-check", bound_from="theorem 1"),
    claim("contraction-rate",
          f"{PAPER} in the linear limit (docs/theory/zhang_martens_grosse_2019.md, claim 4, derived), through the optimiser",
          study.Equivalence("rate_ratio", 1.0, 0.1, centre="geometric mean"),
          "The optimiser with the exact Fisher matrix contracts the squared residual of a wide network by (1 − η)² per step.",
          "Geometric mean over the steps of ‖r(k+1)‖²/‖r(k)‖², over (1 − η)², at both η.",
          study.supported("The change of J is small at this width."), group="self-check"),
]  # fmt: skip

CONTRACTION: study.Experiment[Config] = study.Experiment(
    name="contraction",
    cells=[{"eta": eta} for eta in RATES],
    measure=_measure,
    varies=("initialisation",),
    claims=CLAIMS,
    seconds=0.3,
    memory=8e8,
)
