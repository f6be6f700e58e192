"""Quadratics, where every threshold is known in closed form: torch's optimisers on both sides of it (claims 1 and 2)."""

import numpy as np
import torch
from jaxtyping import Float

from analyses.claims import claim
from analyses.edge_of_stability.config import Config
from analyses.edge_of_stability.points import page
from curvlab import study
from curvlab.theory import characteristic_roots, growth, sharpness_threshold
from curvlab.theory.stability import STEPPERS

NAME = "quadratic"
"""Of the experiment, and in place of a problem's."""
SIZE = 10
STEPS = 400
"""Growth is taken over the second half."""
BETAS = 3
"""Values of β that a seed draws, up to the highest."""
HIGHEST = 0.98
MARGINS = (1e-6, 0.01, 0.3)
"""Relative distances from the threshold at which the roots are looked at; the iterations take the middle one."""
ROUND_OFF = 1e-10
"""Of the recursion that the roots belong to, relative to ‖x‖."""


def _iterate(
    method: str, a: float, eta: float, beta: float, rng: np.random.Generator
) -> tuple[Float[np.ndarray, " T"], Float[np.ndarray, " T"]]:
    """Run torch's optimiser on a random quadratic; return x along the eigenvector of curvature a, and ‖x‖."""
    basis = torch.from_numpy(np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0])
    others = sharpness_threshold(method, eta, beta) * rng.uniform(0.1, 0.8, SIZE - 1)
    matrix = (basis * torch.from_numpy(np.array([a, *others]))) @ basis.T
    x = torch.from_numpy(rng.normal(size=SIZE)).requires_grad_()
    optimiser = torch.optim.SGD([x], lr=eta, momentum=beta, nesterov=method == "nesterov")
    along, lengths = [], []
    for _ in range(STEPS):
        x.grad = (matrix @ x).detach()
        optimiser.step()
        along.append(float(basis[:, 0] @ x.detach()))
        lengths.append(float(x.detach().norm()))
    return np.array(along), np.array(lengths)


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:  # noqa: ARG001
    method, seed = str(cell["optimiser"]), int(cell["seed"])
    rng = np.random.default_rng(study.stream(seed, NAME))
    eta = float(10 ** rng.uniform(-2, 1))
    rows = []
    for beta in (0.0,) if method == "gd" else rng.uniform(0.0, HIGHEST, BETAS):
        edge = sharpness_threshold(method, eta, beta)
        error = float(growth(method, [edge], eta, beta)[0]) - 1.0
        rows.append(study.observed("root_error", error, tolerance=1e-12, beta=beta))
        for margin in MARGINS:
            below, above = growth(method, [(1 - margin) * edge, (1 + margin) * edge], eta, beta)
            rows.append(study.observed("root_misses", float(below >= 1) + float(above <= 1), tolerance=0.0))
        for side in (1 - MARGINS[1], 1 + MARGINS[1]):
            x, lengths = _iterate(method, side * edge, eta, beta, rng)
            first, second = characteristic_roots(method, [side * edge], eta, beta)[0]
            broken = x[2:] - (first + second).real * x[1:-1] + (first * second).real * x[:-2]
            worst = float(np.abs(broken / lengths[:-2]).max())
            grown = np.hypot(x[-1], x[-2]) > np.hypot(x[STEPS // 2], x[STEPS // 2 - 1])
            rows += [
                study.observed("misses", float(grown != (side > 1)), tolerance=0.0, beta=beta),
                study.observed("recursion_error", worst, tolerance=ROUND_OFF, beta=beta),
            ]
    return rows


SIDES = study.Identity(("misses", "recursion_error"))

CLAIMS = [
    claim("quadratic-gd", page("claim 1"), SIDES,
          "On a quadratic, gradient descent diverges along an eigenvector of curvature a exactly if a > 2/η.",
          f"Wrong sides, and errors of the recursion with these roots, at a = (1 ± {MARGINS[1]:g})·2/η.",
          study.supported("x shrinks by |1 − ηa|."), group="paper", at={"optimiser": "gd"}),
    claim("quadratic-momentum", page("claim 2"), SIDES,
          "Heavy ball diverges exactly above (2 + 2β)/η, Nesterov exactly above (2 + 2β)/(η(1 + 2β)).",
          f"Wrong sides, and errors of the recursion, of torch.optim.SGD at (1 ± {MARGINS[1]:g}) times the threshold.",
          study.supported("Jury's conditions on the two-term recursions."),
          group="paper", at={"optimiser": ("heavy-ball", "nesterov")}),
    claim("quadratic-roots", page("claims 1 and 2"), study.Identity(("root_error", "root_misses")),
          "The larger characteristic root has modulus 1 at the threshold, less below and more above.",
          f"Modulus less 1 at the threshold, and wrong sides at relative distances {MARGINS}, over β and η.",
          study.supported("The root −1 is the first to leave the unit disc."), group="self-check"),
]  # fmt: skip

QUADRATIC: study.Experiment[Config] = study.Experiment(
    name=NAME,
    cells=[{"problem": NAME, "optimiser": method} for method in STEPPERS],
    measure=_measure,
    varies=("draws",),
    claims=CLAIMS,
    seconds=0.1,
    memory=3e8,
)
