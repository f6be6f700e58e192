"""Natural-gradient steps of a network, and runs of which both outputs are seen."""

from collections.abc import Mapping
from functools import partial

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from analyses.descent import Descent, Direction, outputs
from analyses.ntk_isotropy.setting import Setting
from curvlab.fisher import Structure
from curvlab.study import Diverged, follow
from curvlab.study.loop import Seen


def frozen(structure: Structure, setting: Setting) -> Direction:
    """Return the undamped natural gradient with the rows that the structure holds."""

    def direction(model: nn.Module) -> Mapping[str, Tensor]:
        residual = outputs(model, setting.inputs) - setting.targets
        return structure.lift(structure.rows.dual(residual / setting.samples), 0.0)

    return direction


def finite(seen: Seen) -> Seen:
    """Return what was seen.

    Raises:
        Diverged: something of it is not finite.
    """
    if not all(np.isfinite(value).all() for value in seen.values()):
        raise Diverged
    return seen


def both_outputs(model: nn.Module, setting: Setting) -> Seen:
    """Outputs on the training and on the test inputs; the run has diverged where they are not finite."""
    inputs = {"train": setting.inputs, "test": setting.problem.test[0]}
    return finite({name: outputs(model, x).numpy(force=True) for name, x in inputs.items()})


def train(
    model: nn.Module, setting: Setting, eta: float, steps: int, direction: Direction
) -> tuple[Float[np.ndarray, "S R"], Float[np.ndarray, "S T"], dict[str, str]]:
    """Take steps with the network.

    Returns:
        Training outputs and test outputs after each step, NaN from where they diverge, and the status if they do.
    """
    trace = follow(Descent(model, direction, eta, partial(both_outputs, setting=setting)), steps)
    return trace.series("train", steps + 1)[1:], trace.series("test", steps + 1)[1:], trace.ended
