"""K-FAC where a factor is short of rank: inputs of low dimension, the Forster transform, narrow layers (claims 4, 5)."""

import torch

from analyses.claims import claim
from analyses.ntk_isotropy.config import Config
from analyses.ntk_isotropy.points import LEFT, LEFT_FROM, PAPER, experiment, page, seconds
from analyses.ntk_isotropy.responses import anisotropy, distance, measured_response
from analyses.ntk_isotropy.setting import SHORT_OF_RANK, Setting, factors, independent, on_inputs
from analyses.specs import classifies_nodes
from curvlab import study, theory
from curvlab.fisher import KFAC


def _points(config: Config) -> list[study.Point]:
    if "kfac" not in config.structures or "width" not in config.takes or classifies_nodes(config.problem):
        return []
    return [{"inputs": inputs} for inputs in ("raw", "forster", "narrow")]


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    """Build the network on inputs reduced to N/2 principal coordinates, or with hidden layers of N/2 units."""
    whole = Setting.of(cell, context.config)
    inputs, width = str(cell["inputs"]), int(cell["width"])
    x, N = whole.inputs.flatten(1), whole.samples
    deviation = 0.0
    low = N // 2
    if inputs == "narrow":
        width = low
    else:
        _, _, axes = torch.linalg.svd(x, full_matrices=False)
        coordinates = (x @ axes[:low].T).numpy(force=True)
        if inputs == "forster":
            transform = theory.forster_transform(coordinates)
            coordinates, deviation = transform.apply(coordinates), transform.deviation
        x = torch.nn.functional.normalize(torch.as_tensor(coordinates, dtype=x.dtype, device=x.device), dim=1)
    network = on_inputs(whole, x, width, int(cell["seed"]))
    structure = KFAC().update(network.rows)
    identity = torch.eye(network.jacobian.R, dtype=x.dtype, device=x.device)
    shares = measured_response(structure, network, identity)[0].mT
    total = shares.sum(0)
    rows = [study.observed("total_anisotropy", anisotropy(total, float(total.diagonal().mean())))]
    if inputs == "narrow":
        return rows
    alpha = network.alpha("kfac")
    assert alpha is not None
    leverages = torch.as_tensor(theory.leverages(x.numpy(force=True)), dtype=x.dtype, device=x.device)
    scales = torch.full_like(leverages, low) if inputs == "forster" else N * leverages
    expected = scales.repeat(whole.problem.train[1].shape[1]).diag()
    tolerance = network.tolerance(structure.condition_number()) + deviation * low**0.5
    delta, _ = factors(network.jacobian.layers[0])
    status = {} if independent(delta) else study.outside(SHORT_OF_RANK)
    error = distance(shares[0], expected)
    ranks = not status and all(network.full_rank(index) for index in range(1, network.depth))
    tells = {"tolerance": tolerance, **({} if ranks else study.outside(SHORT_OF_RANK))}
    rows += [
        study.observed(f"first_layer_{inputs}", error, tolerance=tolerance, **status),
        study.observed("total_alpha", float(total.diagonal().mean()) / alpha - 1, **tells),
    ]
    pairs = zip(shares[0].diagonal()[:N], N * leverages, strict=True)
    return rows + [study.observed("leverage_response", v, sample=n, predicted=h) for n, (v, h) in enumerate(pairs)]


CLAIMS = [
    claim("kfac-leverage", page(f"derived from {PAPER}, section 3.2", "claim 5"), study.Identity("first_layer_raw"),
          "With fewer inputs than samples, K-FAC's first layer responds by diag(N × leverage).",
          "Relative distance of the first layer's response from diag(N h_n), inputs reduced to N/2 dimensions.",
          study.supported("The h-part is N xᵀ(XᵀX)⁻¹x', the δ-part is N·I, and the product is element-wise. Networks where "
                          "δ is short of rank on the samples are outside the assumptions and left out."),
          group="derived", at={"inputs": "raw"}),
    claim("kfac-forster", page(f"{PAPER}, section 3.2 and published code", "claim 5"), study.Identity("first_layer_forster"),
          "After a Forster transform of the inputs K-FAC's first layer responds by M_0 I.",
          "Relative distance of the first layer's response from M_0 I.",
          study.supported("In radial isotropic position all leverages are M_0/N. Networks where δ is short of rank are left "
                          "out as above."),
          group="paper", at={"inputs": "forster"}),
    claim("kfac-low-rank-alpha", page("derived", "claim 5"), study.Identity("total_alpha"),
          "With fewer inputs than samples the scale of the whole K-FAC response is α = M_0 + N(L−2) + 1.",
          "tr M/(R α) − 1, inputs reduced to N/2 dimensions, raw and after a Forster transform.",
          study.supported("The leverages sum to M_0, so that the first layer has the mean M_0 instead of N."), group="derived",
          at={"inputs": ("raw", "forster")}),
    claim("kfac-narrow", page(f"the negative case of {PAPER}, section 3.2", "claim 4"),
          study.Inequality("total_anisotropy", "greater", LEFT, centre="geometric mean"),
          "With N above the width of the hidden layers the K-FAC response is not isotropic.",
          "‖M − ᾱI‖_F/‖ᾱI‖_F at width N/2.",
          study.supported("Neither factor has full rank on the samples."), group="derived", at={"inputs": "narrow"},
          bound_from=LEFT_FROM),
]  # fmt: skip

INPUTS = experiment(_points, name="inputs", measure=_measure, claims=CLAIMS, seconds=seconds(0.05, 0.3))
