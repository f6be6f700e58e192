"""How the response of a structure is measured.

It is not computed from the identity under test: directions of the outputs go back to the parameters (`Jᵀ`), through the
structure's undamped solve, and forward again (`J`); or a finite parameter step goes through the real forward pass.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.descent import flat, length
from analyses.ntk_isotropy.setting import Setting
from curvlab.fisher import Structure
from curvlab.nn.functional import called_with
from curvlab.study import generator

PROBES = 2
"""Random directions of the outputs that are sent through the parameters."""

AT_ONCE = 8
"""Directions that are sent through the parameters at a time, each of which is a vector of these."""


def pull(structure: Structure, setting: Setting, u: Float[Tensor, "K R"]) -> dict[str, Tensor]:
    """Return `F⁺Jᵀu/N`: output directions taken back to the parameters and through the undamped solve."""
    if structure.rows.kind == "exact":
        return structure.lift(structure.rows.dual(u / setting.samples), 0.0)
    back = setting.jacobian.rmatvec(u / setting.samples)
    solved = structure.solve(back, 0.0)
    assert isinstance(solved, dict)
    return solved


def probes(setting: Setting, seed: int) -> Float[Tensor, "K R"]:
    """Return orthonormal random directions of the outputs."""
    J = setting.jacobian
    drawn = torch.randn(J.R, min(PROBES, J.R), generator=generator(seed, "probes"), dtype=torch.float64)
    orthonormal: Tensor = torch.linalg.qr(drawn).Q
    return orthonormal.T.to(J.dtype).to(J.device)


def measured_response(
    structure: Structure, setting: Setting, directions: Float[Tensor, "K R"]
) -> tuple[Float[Tensor, "L K R"], Float[Tensor, "K T"]]:
    """Send directions of the outputs through `Jᵀ → solve → J`, a few at a time.

    Returns:
        The share of every layer in the response of the training outputs, and the response of the test outputs.
    """
    shares, tested = [], []
    for some in directions.split(AT_ONCE):
        step = pull(structure, setting, some)
        shares.append(torch.stack([layer.matvec(layer.layout.join(step)) for layer in setting.jacobian.layers]))
        tested.append(setting.test_jacobian.matvec(step))
    return torch.cat(shares, dim=1), torch.cat(tested)


def finite_step(structure: Structure, setting: Setting, response: Float[Tensor, "R R"]) -> float:
    """Relative distance between the response and a central difference through the real forward pass."""
    residual = setting.residual
    direction = pull(structure, setting, residual[None])
    parameters = {name: p.detach() for name, p in setting.problem.model.named_parameters()}
    epsilon = 1e-5 * length(parameters) / length(direction)

    def outputs(sign: float) -> Tensor:
        moved = {name: p + sign * epsilon * direction[name][0] for name, p in parameters.items()}
        return flat(called_with(setting.problem.model, moved, (setting.inputs,)))

    with torch.no_grad():
        measured = (outputs(1.0) - outputs(-1.0)) / (2 * epsilon)
    return distance(measured, response @ residual)


def anisotropy(response: Float[Tensor, "R R"], alpha: float) -> float:
    """‖M − αI‖_F / ‖αI‖_F."""
    identity = torch.eye(len(response), dtype=response.dtype, device=response.device)
    return distance(response, alpha * identity)


def distance(measured: Tensor, expected: Tensor) -> float:
    """‖measured − expected‖_F / ‖expected‖_F."""
    return float((measured - expected).norm() / expected.norm())
