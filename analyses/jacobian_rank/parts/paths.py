"""Paths of single samples in output space: natural gradient goes straight to the targets (the paper's figure 1)."""

from __future__ import annotations

import copy

import numpy as np
from jaxtyping import Float

from analyses.estimates import by_seed
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.descent import descend, gradient, natural
from analyses.jacobian_rank.part import PAPER, Part, cells_of
from analyses.jacobian_rank.setting import setting_of
from analyses.part import Observations, where
from curvlab import theory
from curvlab.fisher import Full
from curvlab.study import Cell, Claim, Equivalence, Inequality

NAME = "paths"
WIDTH, SAMPLES, CLASSES = 512, 20, 2
NATURAL, DESCENT = "natural-gradient", "gradient-descent"
RUNS = {NATURAL: (0.3, 15), DESCENT: (1.0, 200)}
"""η and number of steps; η of gradient descent in units of 1/λ_max(G)."""
SHOWN_SAMPLES, SHOWN_POINTS = 6, 40
"""Samples and points of a path that are stored for the figure."""


def _cells(config: Config) -> list[Cell]:
    at = {"problem": "digits", "width": WIDTH, "samples": SAMPLES, "outputs": CLASSES}
    return cells_of(NAME, config, [at])


def _by_sample(path: Float[np.ndarray, "T R"]) -> Float[np.ndarray, "T N C"]:
    """Rows are ordered (output, sample)."""
    return path.reshape(len(path), CLASSES, -1).transpose(0, 2, 1)


def _measure(cell: Cell, config: Config) -> Observations:
    setting = setting_of(cell, config)
    rows: list[dict[str, object]] = []
    targets = _by_sample(setting.targets.numpy(force=True)[None])[0]
    for run, (rate, steps) in RUNS.items():
        direction = natural(Full(), setting) if run == NATURAL else gradient(setting)
        eta = rate if run == NATURAL else rate / float(setting.eigenvalues[-1])
        path = _by_sample(descend(copy.deepcopy(setting.problem.model), setting, direction, eta, steps))
        straightness = theory.path_straightness(path)
        rows.append({"quantity": "straightness", "value": float(straightness.mean()), "run": run})
        remaining = np.linalg.norm(path[-1] - targets) / np.linalg.norm(path[0] - targets)
        rows.append({"quantity": "remaining", "value": float(remaining), "run": run})
        shown = np.unique([0, *np.geomspace(1, steps, SHOWN_POINTS).round().astype(int)])
        chosen = np.linspace(0, path.shape[1] - 1, SHOWN_SAMPLES).round().astype(int)
        rows += [
            {
                "quantity": f"output_{c + 1}",
                "value": float(path[step, n, c]),
                "target": float(targets[n, c]),
                "sample": int(n),
                "step": int(step),
                "run": run,
            }
            for n in chosen
            for step in shown
            for c in range(CLASSES)
        ]
    return rows


def _claims(config: Config) -> list[Claim]:  # noqa: ARG001
    def claim(id_: str, run: str, rule: Equivalence | Inequality, statement: str, reason: str) -> Claim:
        return Claim(
            id=id_,
            statement=statement,
            source=f"{PAPER}, figure 1 (theory file, published experiments; ratio derived)",
            measured="Length of a sample's path in output space over the distance of its ends, the mean over samples.",
            rule=rule,
            estimate=lambda table: by_seed(table[table["run"] == run]),
            expected="supported",
            reason=reason,
            needs=where(NAME),
            quantities=("straightness",),
        )

    return [
        claim(
            "paths-natural",
            NATURAL,
            Equivalence(1.0, 0.05),
            "Under natural gradient every sample's outputs go straight to their target.",
            "All residuals shrink by 1 − η per step.",
        ),
        claim(
            "paths-descent",
            DESCENT,
            Inequality(1.05, "greater"),
            "Under gradient descent the paths of single samples are bent.",
            "Modes of the kernel contract one after the other.",
        ),
    ]


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda _: 0.9)
