"""What processes that share a batch do together in a training step, beside adding up and gathering what they have.

All hold the same structure afterwards, so that all take the same step. (A sharded model's curvature is in parts:
`curvlab.optim.sharding`.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from curvlab.fisher.inverse import Inverse, from_dense
from curvlab.fisher.moment import Factor, inverses
from curvlab.rows.processes import Processes, spread


def inverses_by(processes: Processes, wanted: Sequence[tuple[Factor, Tensor]], uses: int) -> list[Inverse]:
    """Invert factors as `curvlab.fisher.moment.inverses`, each in one process and shared, costs spread evenly."""
    shapes = [factor.shape for factor, _ in wanted]
    owners = spread([shape[-1] ** (3 if len(shape) == 3 else 1) for shape in shapes], processes.size)
    own = [pair for pair, owner in zip(wanted, owners, strict=True) if owner == processes.rank]
    mine = iter(inverses(own, uses))
    found = []
    for (_, rho), shape, owner in zip(wanted, shapes, owners, strict=True):
        inverse = next(mine).dense().contiguous() if owner == processes.rank else rho.new_empty(shape)
        distributed.broadcast(inverse, owner, group=processes.group)
        found.append(from_dense(inverse))
    return found


def own_share(samples: int, device: torch.device) -> tuple[int, int]:
    """Return where this process' samples start in the batch of all processes, and how many that has."""
    processes = Processes.present()
    return (0, samples) if processes is None else processes.share(samples, device)
