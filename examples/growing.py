"""A network that grows while it is trained, and a preconditioner that goes on with it.

python examples/growing.py
"""

import torch
from torch import nn

from curvlab.fisher import KFAC
from curvlab.optim import Preconditioner
from curvlab.problems import resolve


def widened(model: nn.Sequential, units: int) -> nn.Sequential:
    """Return a network with more units in its last hidden layer, which computes the same: what leaves the new ones is zero."""
    *kept, hidden, activation, last = model
    dtype = last.weight.dtype
    wider, head = (
        nn.Linear(hidden.in_features, units, dtype=dtype),
        nn.Linear(units, last.out_features, dtype=dtype),
    )
    with torch.no_grad():
        wider.weight[: hidden.out_features] = hidden.weight
        wider.bias[: hidden.out_features] = hidden.bias
        head.weight.zero_()
        head.weight[:, : last.in_features] = last.weight
        head.bias.copy_(last.bias)
    return nn.Sequential(*kept, wider, activation, head)


def main() -> None:
    """Train, widen after 20 steps, and go on."""
    torch.manual_seed(0)
    problem = resolve("digits-mlp", seed=0)
    x, y, loss = problem.train[0].flatten(1), problem.train[1], problem.loss
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 10)).to(x.dtype)
    natural = Preconditioner(model, loss, KFAC(), kind="mc", damping=1e-2, kl_clip=None)
    for step in range(40):
        if step == 20:
            before = loss(model(x), y).detach()
            model = widened(model, 16)
            assert torch.allclose(loss(model(x), y), before)
            natural.rebind(model)  # layers that kept their shape keep their curvature, the others start anew
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        batch = torch.randperm(len(x))[:128]
        sgd.zero_grad()
        with natural.collect():
            value = loss(model(x[batch]), y[batch])
            value.backward()
        natural.precondition()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        sgd.step()
        if step % 5 == 0:
            print(f"{step:3d}  {sum(p.numel() for p in model.parameters()):5d} parameters  {float(value.detach()):.3f}")


if __name__ == "__main__":
    main()
