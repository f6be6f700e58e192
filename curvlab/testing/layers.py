"""Whether rows of a layer are its derivatives, whatever is frozen, however many samples there are, and how it is called."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from curvlab.optim import Preconditioner
from curvlab.rows import jacobian, sqrt_fisher
from curvlab.rows.modules import OWN, composite_for, rule_for
from curvlab.testing.failing import that
from curvlab.testing.oracle import assert_close, dense_ggn, dense_jacobian, outputs

DOUBLE = torch.float64


class Between(nn.Module):
    """A layer between what comes before and a dense layer behind it, so that gradients of any size arrive at its output."""

    def __init__(self, layer: nn.Module, inputs: Tensor) -> None:
        super().__init__()
        self.layer = layer
        with torch.no_grad():
            features = layer(inputs)[0].numel()
        self.head = nn.Linear(features, 2).to(inputs.device, DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[N, 2]`."""
        return self.head(torch.tanh(self.layer(x)).flatten(1))  # type: ignore[no-any-return]


def check_layer(module: nn.Module, inputs: Tensor, *, factored: bool | None = None) -> None:
    """Check the rows of a layer against automatic differentiation, and what a training step collects against these.

    Args:
        module: The layer, which maps `[N, …]` to `[N, …]`.
        inputs: Of at least two samples, first axis N; floating-point ones are taken in float64.
        factored: Whether the layer must have a rule (True) or must not (False); None for either.

    Raises:
        AssertionError: something does not hold; the message says what.
    """
    name = type(module).__name__
    module, x = copy.deepcopy(module).double().eval(), inputs.double() if inputs.is_floating_point() else inputs
    with that("inputs are a batch of two samples at least, and outputs have their first axis", name):
        assert len(x) > 1, f"inputs are {list(x.shape)}"
        with torch.no_grad():
            assert len(module(x)) == len(x), f"outputs are {list(module(x).shape)} of inputs {list(x.shape)}"
    with that("the layer has trainable parameters", name):
        parameters = [own for own, p in module.named_parameters() if p.requires_grad]
        assert parameters, "it has none"
    has = rule_for(module) not in (None, OWN) or composite_for(module) is not None
    if factored is not None:
        with that(f"the layer has {'a' if factored else 'no'} rule", name):
            assert has == factored, f"{name} {'is' if has else 'is not'} in the table of `curvlab.rows.modules`"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = Between(module, x)
        targets = torch.randn(len(x), 2, dtype=DOUBLE)
    for some, what in ((x, "all samples"), (x[:1], "one sample")):
        with that(f"rows of J are the derivatives of the outputs, for {what}", name):
            assert_close(jacobian(model, some).dense(), dense_jacobian(model, some), 1e-9)
    for frozen in parameters if len(parameters) > 1 else ():
        part = copy.deepcopy(model)
        part.layer.get_parameter(frozen).requires_grad_(False)
        with that(f"rows are right with {frozen} frozen", name):
            assert_close(jacobian(part, x).dense(), dense_jacobian(part, x), 1e-9)
    loss = nn.MSELoss()
    with that("SᵀS is the Gauss–Newton matrix", name):
        S = sqrt_fisher(model, loss, x, targets).dense()
        ggn = dense_ggn(dense_jacobian(model, x), loss, outputs(model, x), targets)
        assert_close(S.T @ S, ggn, 1e-9)
    with that("a training step collects the same rows", name):
        _check_step(model, loss, x, targets, ggn)


def _check_step(model: nn.Module, loss: nn.Module, x: Tensor, targets: Tensor, ggn: Tensor) -> None:
    preconditioner = Preconditioner(model, loss, "full", kind="exact", damping=0.1, kl_clip=None)
    model.zero_grad()
    with preconditioner.collect():
        loss(model(x), targets).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    preconditioner.precondition()
    direction = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    identity = torch.eye(len(ggn), dtype=DOUBLE)
    assert_close(direction, torch.linalg.solve(ggn + 0.1 * identity, gradient), 1e-7)
