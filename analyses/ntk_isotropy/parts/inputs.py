"""K-FAC where a factor is short of rank: inputs of low dimension, the Forster transform, narrow layers (claims 4, 5)."""

from __future__ import annotations

import torch

import curvlab
from analyses.assembly import classifies_nodes
from analyses.estimates import identities, least_by_seed
from analyses.ntk_isotropy.config import Config
from analyses.ntk_isotropy.part import PAPER, Part, cells_of
from analyses.ntk_isotropy.parts.response import anisotropy
from analyses.ntk_isotropy.setting import rows_of_full_rank, setting_of
from analyses.part import TOLERANCE_FACTOR, Observations, where
from curvlab import theory
from curvlab.fisher import KFAC
from curvlab.nn import HalfSquaredError, ntk_mlp
from curvlab.rows.layer import KroneckerRows
from curvlab.study import Cell, Claim, Identity, Inequality

NAME = "inputs"


def _cells(config: Config) -> list[Cell]:
    if "kfac" not in config.structures or "width" not in config.takes or classifies_nodes(config.problem):
        return []
    return cells_of(NAME, config, [{"inputs": inputs} for inputs in ("raw", "forster", "narrow")])


def _measure(cell: Cell, config: Config) -> Observations:
    """Build the network on inputs reduced to N/2 principal coordinates, or with hidden layers of N/2 units."""
    setting = setting_of(cell, config)
    x = setting.inputs.flatten(1)
    N, C = len(x), setting.targets.shape[1]
    width = int(cell["width"])
    low = N // 2
    if cell["inputs"] == "narrow":
        width = low
    else:
        _, _, axes = torch.linalg.svd(x, full_matrices=False)
        points = (x @ axes[:low].T).numpy(force=True)
        if cell["inputs"] == "forster":
            transform = theory.forster_transform(points)
            points = transform.apply(points)
        x = torch.nn.functional.normalize(torch.as_tensor(points, dtype=x.dtype, device=x.device), dim=1)
    generator = torch.Generator().manual_seed(int(cell["seed"]))
    sizes = (x.shape[1], *(width,) * max(setting.depth - 1, 1), C)
    model = ntk_mlp(sizes, str(cell["activation"]) or "relu", generator=generator, dtype=x.dtype, device=x.device)
    rows = curvlab.sqrt_fisher(model, HalfSquaredError(), x, setting.targets)
    structure = KFAC().update(rows)
    J = rows.jacobian()
    identity = torch.eye(J.R, dtype=J.dtype, device=J.device)
    step = structure.lift(rows.dual(identity / N), 0.0)
    shares = [layer.matvec(layer.layout.join(step)).T for layer in J.layers]
    total = torch.stack(shares).sum(0)
    mean = float(total.diagonal().mean())
    observations: list[dict[str, object]] = [{"quantity": "total_anisotropy", "value": anisotropy(total, mean)}]
    if cell["inputs"] == "narrow":
        return observations
    leverages = torch.as_tensor(theory.leverages(x.numpy(force=True)), dtype=x.dtype, device=x.device)
    expected = (N * leverages).repeat(C).diag()
    if cell["inputs"] == "forster":
        expected = torch.full((N * C,), float(low), dtype=x.dtype, device=x.device).diag()
    tolerance = TOLERANCE_FACTOR * J.R * torch.finfo(J.dtype).eps * structure.condition_number()
    if cell["inputs"] == "forster":
        tolerance += theory.forster_transform(points).deviation * low**0.5
    (layer, *_) = J.layers
    assert isinstance(layer, KroneckerRows)
    kept = f"first_layer_{cell['inputs']}{'' if rows_of_full_rank(layer) else '_short_of_rank'}"
    first = float((shares[0] - expected).norm() / expected.norm())
    observations.append({"quantity": kept, "value": first, "tolerance": tolerance})
    observations += [
        {"quantity": "leverage_response", "value": float(v), "sample": n, "predicted": float(N * leverages[n])}
        for n, v in enumerate(shares[0].diagonal()[:N])
    ]
    return observations


def _claims(config: Config) -> list[Claim]:
    if "kfac" not in config.structures:
        return []
    return [
        Claim(
            id="kfac-leverage",
            statement="With fewer inputs than samples, K-FAC's first layer responds by diag(N × leverage).",
            source=f"derived from {PAPER}, section 3.2 (theory file, claim 5)",
            measured="Relative distance of the first layer's response from diag(N h_n), inputs reduced to N/2 dimensions.",
            rule=Identity(),
            estimate=identities,
            expected="supported",
            reason="The h-part is N xᵀ(XᵀX)⁻¹x', the δ-part is N·I, and the product is element-wise. Networks where δ is short of "
            "rank on the samples are outside the assumptions and left out.",
            needs=where(NAME, inputs="raw"),
            quantities=("first_layer_raw",),
        ),
        Claim(
            id="kfac-forster",
            statement="After a Forster transform of the inputs K-FAC's first layer responds by M_0 I.",
            source=f"{PAPER}, section 3.2 and published code (theory file, claim 5)",
            measured="Relative distance of the first layer's response from M_0 I.",
            rule=Identity(),
            estimate=identities,
            expected="supported",
            reason="In radial isotropic position all leverages are M_0/N. Networks where δ is short of rank are left out as above.",
            needs=where(NAME, inputs="forster"),
            quantities=("first_layer_forster",),
        ),
        Claim(
            id="kfac-narrow",
            statement="With N above the width of the hidden layers the K-FAC response is not isotropic.",
            source=f"the negative case of {PAPER}, section 3.2 (theory file, claim 4)",
            measured="‖M − ᾱI‖_F/‖ᾱI‖_F at width N/2.",
            rule=Inequality(0.1, "greater"),
            estimate=least_by_seed,
            expected="supported",
            reason="Neither factor has full rank on the samples.",
            needs=where(NAME, inputs="narrow"),
            quantities=("total_anisotropy",),
        ),
    ]


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda width: 0.05 + 0.3 * (width / 2048) ** 2)
