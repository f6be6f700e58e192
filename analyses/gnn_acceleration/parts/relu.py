"""The same on ReLU networks, which no theorem of the paper covers: skip connections, depth and labels in gradient descent."""

from __future__ import annotations

from collections.abc import Iterable
from math import log10

import torch
from torch import nn

from analyses.estimates import by_seed, identities
from analyses.gnn_acceleration.config import Config
from analyses.gnn_acceleration.networks import GraphNetwork, Loss, descend, gradients
from analyses.gnn_acceleration.part import PAPER, Part, cells_of
from analyses.gnn_acceleration.parts.identities import loss_of
from analyses.gnn_acceleration.setting import Setting, setting_of
from analyses.part import Observations, where
from curvlab.study import Cell, Claim, Identity, Inequality

NAME = "relu"
PUBLISHED_DEPTHS = (2, 4, 6)
LOSSES = ("squared", "cross-entropy")
WIDTH = 32
ETA = 0.1
"""Learning rate, in 1/λ_max of the tangent kernel of the multiscale network at the start."""
STEPS = 50


def _cells(config: Config) -> list[Cell]:
    depths = [depth for depth in config.swept_depths if depth in PUBLISHED_DEPTHS]
    points = [{"aggregation": aggregation, "depth": depth} for aggregation in config.aggregation for depth in depths]
    return cells_of(NAME, config, points)


def _network(setting: Setting, depth: int, scales: Iterable[int], seed: int) -> GraphNetwork:
    """A network with zero heads; those of a seed share their first layers, whatever the depth."""
    widths = [setting.features.shape[1], *[WIDTH] * depth]
    generator = torch.Generator().manual_seed(seed)
    return GraphNetwork(setting.propagation, widths, setting.graph.classes, scales, nn.ReLU(), generator)


def _rate(model: GraphNetwork, setting: Setting) -> float:
    """ETA over λ_max of the kernel Σ_l h_l h_lᵀ of the training outputs at zero heads."""
    with torch.no_grad():
        hidden = torch.cat([h[setting.nodes] for h in model.hidden(setting.features)], 1)
        return ETA / float(torch.linalg.matrix_norm(hidden, 2)) ** 2


def _measure(cell: Cell, config: Config) -> Observations:
    setting, depth, seed = setting_of(cell, config), int(cell["depth"]), int(cell["seed"])
    labels, classes = setting.graph.labels[setting.nodes], setting.graph.classes
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rows: list[dict[str, object]] = []
    for name in LOSSES:
        loss, permuted = loss_of(name, labels, classes), loss_of(name, labels[order], classes)
        models = {
            "multi": _network(setting, depth, range(depth + 1), seed),
            "single": _network(setting, depth, [depth], seed),
            "shallow": _network(setting, depth - 1, range(depth), seed),
            "permuted": _network(setting, depth, range(depth + 1), seed),
        }
        eta = _rate(models["multi"], setting)
        left = {}
        for which, model in models.items():
            target = permuted if which == "permuted" else loss
            losses = descend(model, setting.features, setting.nodes, target, eta, STEPS)
            left[which] = log10(losses[-1] / losses[0])
            if which in ("multi", "single"):
                rows += [
                    {"quantity": "loss", "value": value / losses[0], "step": step, "model": which, "loss": name}
                    for step, value in enumerate(losses)
                    if step % 10 == 0
                ]
        rows += [
            {"quantity": "skip_log_ratio", "value": left["multi"] - left["single"], "loss": name},
            {"quantity": "depth_log_ratio", "value": left["multi"] - left["shallow"], "loss": name},
            {"quantity": "labels_log_ratio", "value": left["multi"] - left["permuted"], "loss": name},
            {
                "quantity": "slow_down",
                "value": _slow_down(models["single"], setting, loss),
                "tolerance": 1e-12,
                "loss": name,
            },
        ]
    return rows


def _slow_down(single: GraphNetwork, setting: Setting, loss: Loss) -> float:
    """Relative loss of speed when a trained single-scale network gets zero heads at all other scales."""

    def speed(model: GraphNetwork) -> float:
        _, heads, layers = gradients(model, setting.features, setting.nodes, loss)
        return float(sum(g.square().sum() for g in (*heads, *layers)))

    depth = len(single.layers)
    widths = [setting.features.shape[1], *[WIDTH] * depth]
    multi = GraphNetwork(
        setting.propagation, widths, setting.graph.classes, range(depth + 1), single.activation, torch.Generator()
    )
    with torch.no_grad():
        for mine, theirs in zip((*multi.layers, multi.heads[depth]), (*single.layers, single.heads[0]), strict=True):
            mine.copy_(theirs)
    return max(0.0, speed(single) / speed(multi) - 1)


EFFECTS = {
    "skip": ("Skip connections accelerate", 5, "multiscale over single-scale"),
    "depth": ("One more layer accelerates", 6, "with over without the last layer, multiscale"),
    "labels": ("True labels train faster than permuted ones", 8, "true over permuted labels, multiscale"),
}
"""By quantity: the claim in words, its number in the theory file, and what is compared."""


def _claims(config: Config) -> list[Claim]:
    if not _cells(config):
        return []
    claims = [
        Claim(
            id=f"relu-{effect}-{aggregation}",
            statement=f"{words} in gradient descent on ReLU networks with {aggregation.upper()} aggregation.",
            source=f"{PAPER}, experiments (theory file, claim {number}, without a theorem)",
            measured=f"log10 of the losses left after {STEPS} steps at η = {ETA:g}/λ_max, {what}, from zero heads; the mean over "
            "depths and over squared error and cross-entropy.",
            rule=Inequality(0.0, "less"),
            estimate=by_seed,
            expected="open",
            reason="The linear argument applies at zero heads; training leaves them.",
            needs=where(NAME, aggregation=aggregation),
            quantities=(f"{effect}_log_ratio",),
        )
        for aggregation in config.aggregation
        for effect, (words, number, what) in EFFECTS.items()
    ]
    return [
        *claims,
        Claim(
            id="relu-zero",
            statement="Skip connections with zero heads accelerate a trained ReLU network at equal outputs.",
            source=f"{PAPER}, section 4 (theory file, claim 5, derived for ReLU)",
            measured="Relative loss of speed −dL/dt by autodiff.",
            rule=Identity(),
            estimate=identities,
            expected="supported",
            reason="Zero heads change no gradient and add their own.",
            needs=where(NAME),
            quantities=("slow_down",),
        ),
    ]


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda depth: 0.4 + 0.3 * depth)
