"""The same on ReLU networks, which no theorem of the paper covers: skip connections, depth and labels in gradient descent."""

from collections.abc import Iterable

import torch
from torch import nn

from analyses.claims import claim
from analyses.gnn_acceleration.config import Config
from analyses.gnn_acceleration.networks import Loss, MultiscaleNetwork, descent, gradients, loss_of
from analyses.gnn_acceleration.points import memory, page, varies
from analyses.gnn_acceleration.setting import Setting, setting_of
from curvlab import study

PUBLISHED_DEPTHS = (2, 4, 6)
LOSSES = ("squared", "cross-entropy")
WIDTH = 32
ETA = 0.1
"""Learning rate, in 1/λ_max of the tangent kernel of the multiscale network at the start."""
STEPS = 50


def _points(config: Config) -> list[study.Point]:
    depths = [depth for depth in config.swept_depths if depth in PUBLISHED_DEPTHS]
    return [{"aggregation": aggregation, "depth": depth} for aggregation in config.aggregation for depth in depths]


def _network(setting: Setting, depth: int, scales: Iterable[int], seed: int) -> MultiscaleNetwork:
    """A network with zero heads; those of a seed share their first layers, whatever the depth."""
    widths = [setting.features.shape[1], *[WIDTH] * depth]
    generator = torch.Generator().manual_seed(seed)
    return MultiscaleNetwork(setting.propagation, widths, setting.graph.classes, scales, nn.ReLU(), generator)


def _rate(model: MultiscaleNetwork, setting: Setting) -> float:
    """ETA over λ_max of the kernel Σ_l h_l h_lᵀ of the training outputs at zero heads."""
    with torch.no_grad():
        hidden = torch.cat([h[setting.nodes] for h in model.hidden(setting.features)], 1)
        return ETA / float(torch.linalg.matrix_norm(hidden, 2)) ** 2


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    setting, depth, seed = setting_of(cell, context.config), int(cell["depth"]), int(cell["seed"])
    labels, classes = setting.graph.labels[setting.nodes], setting.graph.classes
    order = torch.randperm(len(labels), generator=study.generator(seed, "permutation"))
    rows = []
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
            losses = study.follow(descent(model, setting.features, setting.nodes, target, eta), STEPS).series("loss")
            left[which] = losses[-1] / losses[0]
            if which in ("multi", "single"):
                rows += [
                    study.observed("loss", value / losses[0], step=step, model=which, loss=name)
                    for step, value in enumerate(losses)
                    if step % 10 == 0
                ]
        rows += [
            *(
                study.observed(f"{effect}_ratio", left["multi"] / left[other], loss=name)
                for effect, other in (("skip", "single"), ("depth", "shallow"), ("labels", "permuted"))
            ),
            study.observed("slow_down", _slow_down(models["single"], setting, loss), tolerance=1e-12, loss=name),
        ]
    return rows


def _slow_down(single: MultiscaleNetwork, setting: Setting, loss: Loss) -> float:
    """Relative loss of speed when a trained single-scale network gets zero heads at all other scales."""

    def speed(model: MultiscaleNetwork) -> float:
        _, heads, layers = gradients(model, setting.features, setting.nodes, loss)
        return float(sum(g.square().sum() for g in (*heads, *layers)))

    depth = len(single.layers)
    multi = _network(setting, depth, range(depth + 1), 0)
    with torch.no_grad():
        for mine, theirs in zip((*multi.layers, multi.heads[depth]), (*single.layers, single.heads[0]), strict=True):
            mine.copy_(theirs)
    return max(0.0, speed(single) / speed(multi) - 1)


EFFECTS = {
    "skip": ("Skip connections accelerate", 5, "multiscale over single-scale"),
    "depth": ("One more layer accelerates", 6, "with over without the last layer, multiscale"),
    "labels": ("True labels train faster than permuted ones", 8, "true over permuted labels, multiscale"),
}
"""By quantity: the claim in words, its number on the page of theory, and what is compared."""


def _claims(config: Config) -> list[study.Claim]:
    return [
        *(
            claim(f"relu-{effect}-{aggregation}", page("experiments", f"claim {number}, without a theorem"),
                  study.Inequality(f"{effect}_ratio", "less", 1.0, centre="geometric mean"),
                  f"{words} in gradient descent on ReLU networks with {aggregation.upper()} aggregation.",
                  f"Loss left after {STEPS} steps at η = {ETA:g}/λ_max, {what}, from zero heads; the "
                  "geometric mean over depths and over squared error and cross-entropy.",
                  study.undecided("The linear argument applies at zero heads; training leaves them."),
                  group="derived", bound_from="equal losses", at={"aggregation": aggregation},
                  estimate=study.geometric_by_seed)
            for aggregation in config.aggregation
            for effect, (words, number, what) in EFFECTS.items()
        ),
        claim("relu-zero", page("section 4", "claim 5, derived for ReLU"), study.Identity("slow_down"),
              "Skip connections with zero heads accelerate a trained ReLU network at equal outputs.",
              "Relative loss of speed −dL/dt by autodiff.",
              study.supported("Zero heads change no gradient and add their own."), group="self-check"),
    ]  # fmt: skip


RELU: study.Experiment[Config] = study.Experiment(
    name="relu",
    cells=_points,
    measure=_measure,
    varies=varies,
    claims=_claims,
    seconds=lambda cell, _: 0.1 + 0.1 * int(cell["depth"]),
    memory=memory,
)
