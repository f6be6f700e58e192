"""Whether the kernels of the layers are positive definite (claim 12)."""

import numpy as np
import torch

import curvlab
from analyses.claims import claim
from analyses.ntk_isotropy.config import Config
from analyses.ntk_isotropy.points import PAPER, experiment, page, seconds
from analyses.ntk_isotropy.setting import Setting, on_inputs
from analyses.specs import classifies_nodes
from curvlab import study
from curvlab.rows.rows import gram


def _points(config: Config) -> list[study.Point]:
    wanted: list[study.Point] = [{"inputs": "distinct", "width": width} for width in config.swept_widths]
    wanted.append({"inputs": "duplicated"})
    if "width" in config.takes and not classifies_nodes(config.problem):
        wanted.append({"inputs": "narrow"})
    return wanted


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    """Compare λ_min(Θ_l) with the round-off R·ε·λ_max(Θ_l), below which a float64 Gram matrix cannot decide."""
    setting = Setting.of(cell, context.config)
    if cell["inputs"] == "narrow":
        setting = on_inputs(setting, setting.inputs.flatten(1), setting.samples // 2, int(cell["seed"]))
    x = setting.inputs
    if cell["inputs"] == "duplicated":
        x = torch.cat([x, x[:1]])
    rows = []
    layers = curvlab.jacobian(setting.problem.model, x).layers
    for index, layer in enumerate(layers):
        values = torch.linalg.eigvalsh(gram([layer], [layer])).numpy(force=True)
        floor = len(values) * np.finfo(values.dtype).eps * values[-1]
        decades = float(np.log10(max(values[0], floor * 1e-3) / floor))
        quantity = "decades_last" if index == len(layers) - 1 else "decades"
        ends = {"smallest": float(values[0]), "largest": float(values[-1])}
        rows.append(study.observed(quantity, decades, layer=index + 1, **ends))
    return rows


FLOOR = "a decade above the round-off of a Gram matrix"

CLAIMS = [
    claim("positive-kernels", f"{PAPER}, section 2 (recalled; docs/theory/karakida_osawa_2020.md, claim 12)",
          study.Always(("decades", "decades_last"), "greater", 1.0),
          "For distinct inputs every layer's kernel is positive definite.",
          "log10 of λ_min(Θ_l) over R·ε·λ_max(Θ_l), every layer and width.",
          study.supported("Non-polynomial activation, distinct unit-norm inputs, widths above N."), group="paper",
          at={"inputs": "distinct"}, bound_from=FLOOR),
    claim("duplicates-break-positivity", page("derived", "claim 12"), study.Always(("decades", "decades_last"), "less", 1.0),
          "A duplicated input makes every layer's kernel singular.",
          "log10 of λ_min(Θ_l) over R·ε·λ_max(Θ_l), every layer.",
          study.supported("Two rows of every layer's Jacobian are equal."), group="derived", at={"inputs": "duplicated"},
          bound_from=FLOOR),
    claim("narrow-last-layer", page("derived", "claim 12"), study.Always("decades_last", "less", 1.0),
          "The last layer's kernel is singular where the last hidden layer has fewer units than samples.",
          "log10 of λ_min(Θ_L) over R·ε·λ_max(Θ_L) at width N/2.",
          study.supported("Θ_L has rank at most M_{L−1}."), group="derived", at={"inputs": "narrow"}, bound_from=FLOOR),
]  # fmt: skip

POSITIVITY = experiment(_points, name="positivity", measure=_measure, claims=CLAIMS, seconds=seconds(0.03, 0.3))
