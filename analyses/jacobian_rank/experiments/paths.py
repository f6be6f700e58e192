"""Paths of single samples in output space: natural gradient goes straight to the targets (the paper's figure 1)."""

import numpy as np
from jaxtyping import Float

from analyses.claims import claim
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.descent import descend
from analyses.jacobian_rank.points import PAPER, experiment, page
from analyses.jacobian_rank.setting import Setting
from curvlab import study, theory
from curvlab.fisher import Full

WIDTH, SAMPLES, CLASSES = 512, 20, 2
NATURAL, DESCENT = "natural-gradient", "gradient-descent"
RUNS = {NATURAL: (0.3, 15), DESCENT: (1.0, 200)}
"""η and number of steps; η of gradient descent in units of 1/λ_max(G)."""
SHOWN_SAMPLES, SHOWN_POINTS = 6, 40
"""Samples and points of a path that are stored for the figure."""


def _by_sample(path: Float[np.ndarray, "T R"]) -> Float[np.ndarray, "T N C"]:
    """Rows are ordered (output, sample)."""
    return path.reshape(len(path), CLASSES, -1).transpose(0, 2, 1)


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    setting = Setting.of(cell, context.config)
    rows = []
    targets = _by_sample(setting.targets.numpy(force=True)[None])[0]
    for run, (rate, steps) in RUNS.items():
        direction = setting.natural(Full()) if run == NATURAL else setting.gradient()
        eta = rate if run == NATURAL else rate / float(setting.eigenvalues[-1])
        path = _by_sample(descend(setting, direction, eta, steps))
        remaining = np.linalg.norm(path[-1] - targets) / np.linalg.norm(path[0] - targets)
        rows.append(study.observed("straightness", theory.path_straightness(path).mean(), run=run))
        rows.append(study.observed("remaining", remaining, run=run))
        shown = np.unique([0, *np.geomspace(1, steps, SHOWN_POINTS).round().astype(int)])
        chosen = np.linspace(0, path.shape[1] - 1, SHOWN_SAMPLES).round().astype(int)
        rows += [
            study.observed(f"output_{c + 1}", path[step, n, c], target=targets[n, c], sample=n, step=step, run=run)
            for n in chosen
            for step in shown
            for c in range(CLASSES)
        ]
    return rows


def _straightness(
    name: str, run: str, rule: study.Equivalence | study.Inequality, statement: str, reason: str
) -> study.Claim:
    return claim(
        f"paths-{name}", page(f"{PAPER}, figure 1", "published experiments; ratio derived"), rule,
        statement,
        "Length of a sample's path in output space over the distance of its ends, the mean over samples.",
        study.supported(reason), estimate=study.among(study.by_seed, run=run),
    )  # fmt: skip


CLAIMS = [
    _straightness(
        "natural",
        NATURAL,
        study.Equivalence("straightness", 1.0, 0.05),
        "Under natural gradient every sample's outputs go straight to their target.",
        "All residuals shrink by 1 − η per step.",
    ),
    _straightness(
        "descent",
        DESCENT,
        study.Inequality("straightness", "greater", 1.05),
        "Under gradient descent the paths of single samples are bent.",
        "Modes of the kernel contract one after the other.",
    ),
]

POINTS = [{"problem": "digits", "width": WIDTH, "samples": SAMPLES, "outputs": CLASSES}]

PATHS = experiment(lambda _: POINTS, name="paths", measure=_measure, claims=CLAIMS, seconds=0.9)
