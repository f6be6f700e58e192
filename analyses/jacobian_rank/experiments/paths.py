"""Paths of single samples in output space: natural gradient goes straight to the targets (the paper's figure 1)."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from analyses.claims import claim
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.descent import descend
from analyses.jacobian_rank.points import BOTH, experiment, page
from analyses.jacobian_rank.setting import Setting
from curvlab import study, theory
from curvlab.fisher import Full

CLASSES, SAMPLES, DEPTH = (4, 9), 20, 3
WIDTHS = {"digits": 1024, "mnist": 6000}
"""Units of both hidden layers, by image set; the latter is the paper's setting."""
NOISE = 0.3
"""Standard deviation of the noise on the targets ±½."""
NATURAL, DESCENT = "natural-gradient", "gradient-descent"
RUNS = {NATURAL: (0.3, 15), DESCENT: (1.0, 200)}
"""η and number of steps; η of gradient descent in units of 1/λ_max(G)."""
SHOWN_SAMPLES, SHOWN_POINTS = 6, 40
"""Samples and points of a path that are stored for the figure."""


def _points(config: Config) -> list[study.Point]:
    images = ("digits", "mnist") if config.published else ("digits",)
    at = {"samples": SAMPLES, "outputs": len(CLASSES), "depth": DEPTH}
    return [{"problem": name, "width": WIDTHS[name], **at} for name in images]


def _setting(cell: study.Cell, config: Config) -> Setting:
    """Two classes with the targets of the paper's figure: one-hot less ½, and noise."""
    setting = Setting.of(cell, config, classes=CLASSES)
    x, y = setting.problem.train
    noise = torch.randn(y.shape, generator=study.generator(int(cell["seed"]), "targets"), dtype=torch.float64)
    return Setting(replace(setting.problem, train=(x, y - 0.5 + NOISE * noise.to(y))))


def _by_sample(path: Float[np.ndarray, "T R"]) -> Float[np.ndarray, "T N C"]:
    """Rows are ordered (output, sample)."""
    return path.reshape(len(path), len(CLASSES), -1).transpose(0, 2, 1)


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    setting = _setting(cell, context.config)
    rows = []
    targets = _by_sample(setting.targets.numpy(force=True)[None])[0]
    for run, (rate, steps) in RUNS.items():
        direction = setting.natural(Full()) if run == NATURAL else setting.gradient()
        eta = rate if run == NATURAL else rate / float(setting.eigenvalues[-1])
        path = _by_sample(descend(setting, direction, eta, steps))
        remaining = np.linalg.norm(path[-1] - targets) / np.linalg.norm(path[0] - targets)
        rows.append(study.observed("straightness", np.exp(np.log(theory.path_straightness(path)).mean()), run=run))
        rows.append(study.observed("remaining", remaining, run=run))
        shown = np.unique([0, *np.geomspace(1, steps, SHOWN_POINTS).round().astype(int)])
        chosen = np.linspace(0, path.shape[1] - 1, SHOWN_SAMPLES).round().astype(int)
        rows += [
            study.observed(f"output_{c + 1}", path[step, n, c], target=targets[n, c], sample=n, step=step, run=run)
            for n in chosen
            for step in shown
            for c in range(len(CLASSES))
        ]
    return rows


def _straightness(images: str) -> list[study.Claim]:
    prefix, on = ("", "") if images == "digits" else ("published-", " on MNIST, as published")
    source = page("figure 1", "published experiments; ratio derived")
    measured = f"Length of a sample's path in output space over the distance of its ends, the mean over samples of {images} 4, 9."
    at: dict[str, Any] = {"group": "paper", "at": {"problem": images}}
    return [
        claim(f"{prefix}paths-natural", source, study.Equivalence("straightness", 1.0, 0.05, centre="geometric mean"),
              f"Under natural gradient every sample's outputs go straight to their target{on}.", measured,
              study.supported("All residuals shrink by 1 − η per step."),
              estimate=study.among(study.by_seed, run=NATURAL), **at),
        claim(f"{prefix}paths-descent", source, study.Inequality("straightness", "greater", 1.05, centre="geometric mean"),
              f"Under gradient descent the paths of single samples are bent{on}.", measured,
              study.supported("Modes of the kernel contract one after the other."),
              estimate=study.among(study.by_seed, run=DESCENT), bound_from="what counts as straight", **at),
    ]  # fmt: skip


def _seconds(cell: study.Cell, _: Config) -> float:
    return 3.5 * (int(cell["width"]) / WIDTHS["digits"]) ** 2


def _memory(cell: study.Cell, _: Config) -> float:
    return 4e8 + 48.0 * int(cell["width"]) ** 2


PATHS = experiment(_points, varies=BOTH, name="paths", measure=_measure, seconds=_seconds, memory=_memory,
                   claims=[one for images in WIDTHS for one in _straightness(images)])  # fmt: skip
