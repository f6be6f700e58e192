"""Options of the edge-of-stability analysis."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from analyses.specs import check_structures, members
from curvlab.problems.full_batch import LOSSES, NETWORKS
from curvlab.problems.images import IMAGE_SETS
from curvlab.study import CommonOptions, check_bounds, check_names, check_positive, check_some


def middle(etas: Collection[float]) -> float:
    """The step size of gradient descent that other things are compared at; the lower one of two."""
    return sorted(etas)[(len(etas) - 1) // 2]


@dataclass(frozen=True, kw_only=True)
class Config(CommonOptions):
    """Options of the edge-of-stability analysis."""

    problem: str = "digits"
    """An image set, such as cifar10-5k, with the network of --network; or module:function that returns a Problem."""
    network: str = "fc-tanh"
    """Network on an image set: fc, cnn or cnn-avgpool, and its activation."""
    width: int = 64
    """Hidden units or channels of a layer; the paper has 200 and 32."""
    depth: int = 3
    """Weight layers of a fully connected network."""
    samples: int = 128
    """Number of training samples N (unit: samples)."""
    scaling: Literal["unit", "standardised"] = "unit"
    """Inputs of norm 1, or pixels standardised one by one as in the paper."""
    loss: Literal["half-squared", "cross-entropy"] = "half-squared"
    """Loss of all runs but those that compare the losses."""
    etas: tuple[float, ...] = (0.2, 0.3, 0.5)
    """Step sizes of gradient descent; the middle one is the run that flow and approximations are compared with."""
    heavy_ball: tuple[float, ...] = (0.2,)
    """Step sizes of Polyak's momentum."""
    nesterov: tuple[float, ...] = (0.1,)
    """Step sizes of Nesterov's momentum."""
    adam: tuple[float, ...] = ()
    """Step sizes of Adam, live and with the preconditioner frozen after a tenth of the run."""
    beta: float = 0.9
    """Momentum β of heavy ball and Nesterov."""
    batch_size: tuple[int, ...] = ()
    """Batch sizes of SGD at the middle step size, besides the full batch (unit: samples)."""
    sweep_depths: tuple[int, ...] = ()
    """Depths at which the flow's sharpening is measured, besides --depth."""
    sweep_widths: tuple[int, ...] = ()
    """Widths at which the flow's sharpening is measured, besides --width."""
    sweep_samples: tuple[int, ...] = ()
    """Sample counts at which the flow's sharpening is measured, besides --samples."""
    structures: tuple[str, ...] = field(default_factory=members)
    """Approximations whose largest eigenvalue is followed along gradient descent: keys, or module:Class."""
    preconditioners: tuple[str, ...] = ("full", "block-diagonal", "kfac")
    """Structures that precondition training, renewed at every step and frozen."""
    steps: int = 1200
    """Steps of a run (unit: steps)."""
    every: int = 35
    """Steps between measurements; an odd number sees both phases of an oscillation of period 2 (unit: steps)."""
    top: int = 2
    """Hessian eigenvalues that are followed."""
    published: bool = False
    """Repeat the run that the published code's README shows (cifar10-5k, 3072-200-200-10 tanh, η = 0.01, float32), about an
    hour on a CPU, and compare its milestones."""
    published_seeds: int = 1
    """At how many of the seeds; from two on the milestones have a prediction interval (unit: seeds)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_structures((*self.structures, *self.preconditioners), families=False)
        check_names("network", (self.network,) if self.problem in IMAGE_SETS else (), NETWORKS)
        check_names("loss", (self.loss,), LOSSES)
        check_some(self, "etas")
        check_positive(self, "etas", "heavy_ball", "nesterov", "adam")
        check_bounds(self, width=1, depth=1, samples=1, every=1, top=1, published_seeds=1)
        check_bounds(self, batch_size=1, sweep_depths=1, sweep_widths=1, sweep_samples=1)
        if self.steps < 4 * self.every:
            raise ValueError(f"--steps must be at least 4 times --every, got {self.steps} and {self.every}.")
        if not 0.0 <= self.beta < 1.0:
            raise ValueError(f"--beta must lie in [0, 1), got {self.beta}.")

    @property
    def middle(self) -> float:
        """The middle one of the step sizes of gradient descent."""
        return middle(self.etas)

    def measured(self, steps: int | None = None) -> range:
        """The steps before which a run of a length, the configured one if None, is measured."""
        return range(0, (self.steps if steps is None else steps) + 1, self.every)
