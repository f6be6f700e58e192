"""Whether the kernels of the layers are positive definite (claim 12)."""

from __future__ import annotations

import numpy as np
import torch

import curvlab
from analyses.assembly import classifies_nodes
from analyses.estimates import least_by_seed, worst_by_seed
from analyses.ntk_isotropy.config import Config
from analyses.ntk_isotropy.part import PAPER, Part, cells_of
from analyses.ntk_isotropy.setting import setting_of
from analyses.part import Observations, where
from curvlab.nn import ntk_mlp
from curvlab.rows.rows import gram
from curvlab.study import Cell, Claim, Inequality

NAME = "positivity"


def _cells(config: Config) -> list[Cell]:
    points = [{"inputs": "distinct", "width": width} for width in config.swept_widths]
    points.append({"inputs": "duplicated"})
    if "width" in config.takes and not classifies_nodes(config.problem):
        points.append({"inputs": "narrow"})
    return cells_of(NAME, config, points)


def _measure(cell: Cell, config: Config) -> Observations:
    """Compare λ_min(Θ_l) with the round-off R·ε·λ_max(Θ_l), below which a float64 Gram matrix cannot decide."""
    setting = setting_of(cell, config)
    model, x = setting.problem.model, setting.inputs
    if cell["inputs"] == "duplicated":
        x = torch.cat([x, x[:1]])
    if cell["inputs"] == "narrow":
        width = len(x) // 2
        generator = torch.Generator().manual_seed(int(cell["seed"]))
        sizes = (x.flatten(1).shape[1], *(width,) * (setting.depth - 1), setting.targets.shape[1])
        model = ntk_mlp(sizes, setting.activation, generator=generator, dtype=x.dtype, device=x.device)
        x = x.flatten(1)
    rows: list[dict[str, object]] = []
    layers = curvlab.jacobian(model, x).layers
    for index, layer in enumerate(layers):
        values = torch.linalg.eigvalsh(gram([layer], [layer])).numpy(force=True)
        floor = len(values) * np.finfo(values.dtype).eps * values[-1]
        decades = float(np.log10(max(values[0], floor * 1e-3) / floor))
        last = index == len(layers) - 1
        rows.append(
            {
                "quantity": "decades_last" if last else "decades",
                "value": decades,
                "layer": index + 1,
                "smallest": float(values[0]),
                "largest": float(values[-1]),
            }
        )
    return rows


def _claims(config: Config) -> list[Claim]:
    claims = [
        Claim(
            id="positive-kernels",
            statement="For distinct inputs every layer's kernel is positive definite.",
            source=f"{PAPER}, section 2 (recalled; theory file, claim 12)",
            measured="log10 of λ_min(Θ_l) over R·ε·λ_max(Θ_l), smallest over layers and widths.",
            rule=Inequality(1.0, "greater"),
            estimate=least_by_seed,
            expected="supported",
            reason="Non-polynomial activation, distinct unit-norm inputs, widths above N.",
            needs=where(NAME, inputs="distinct"),
            quantities=("decades", "decades_last"),
        ),
        Claim(
            id="duplicates-break-positivity",
            statement="A duplicated input makes every layer's kernel singular.",
            source="derived (theory file, claim 12)",
            measured="log10 of λ_min(Θ_l) over R·ε·λ_max(Θ_l), largest over the layers.",
            rule=Inequality(1.0, "less"),
            estimate=worst_by_seed,
            expected="supported",
            reason="Two rows of every layer's Jacobian are equal.",
            needs=where(NAME, inputs="duplicated"),
            quantities=("decades", "decades_last"),
        ),
    ]
    if "width" in config.takes:
        claims.append(
            Claim(
                id="narrow-last-layer",
                statement="The last layer's kernel is singular where the last hidden layer has fewer units than samples.",
                source="derived (theory file, claim 12)",
                measured="log10 of λ_min(Θ_L) over R·ε·λ_max(Θ_L) at width N/2.",
                rule=Inequality(1.0, "less"),
                estimate=worst_by_seed,
                expected="supported",
                reason="Θ_L has rank at most M_{L−1}.",
                needs=where(NAME, inputs="narrow"),
                quantities=("decades_last",),
            )
        )
    return claims


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda width: 0.03 + 0.3 * (width / 2048) ** 2)
