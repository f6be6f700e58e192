"""Adam-mini against AdamW at AdamW's rate, and with other partitions (claim 9)."""

from functools import partial

import torch
from torch import nn

from analyses.block_structure import partitions
from analyses.block_structure.config import Config
from analyses.block_structure.optimiser import AdamMini
from analyses.block_structure.points import MINI, page, quotient
from analyses.block_structure.setting import loss_in_testing, problem_of, train
from analyses.claims import claim
from curvlab.rows.parameters import ParameterSpace
from curvlab.spectrum import Partition, by_tensor
from curvlab.study import (
    Always,
    Cell,
    Context,
    Experiment,
    Inequality,
    Observations,
    Wins,
    difference_by_seed,
    generator,
    observed,
    supported,
    undecided,
)  # fmt: skip

ADAMW, ADAM_MINI, TENSOR, RANDOM = "adamw", "adam-mini", "tensor", "random"
METHODS = (ADAMW, ADAM_MINI, TENSOR, RANDOM)
"""Second moments: one an entry, a block of Adam-mini, a tensor, a block of Adam-mini's sizes at random."""


def partition_of(method: str, model: nn.Module, seed: int) -> Partition:
    """The blocks that have one second moment each."""
    space = ParameterSpace({name: p.shape for name, p in model.named_parameters() if p.requires_grad})
    own = partitions.adam_mini(model, space)
    return {
        ADAMW: lambda: Partition(tuple(map(str, range(space.size))), torch.arange(space.size, device="cpu")),
        ADAM_MINI: lambda: own,
        TENSOR: lambda: by_tensor(space),
        RANDOM: lambda: partitions.shuffled(own, generator(seed, "blocks")),
    }[method]()


def measure(cell: Cell, context: Context[Config]) -> Observations:
    """Return the test loss after training with a partition, and the share of Adam's state that it takes."""
    config, seed, method = context.config, int(cell["seed"]), str(cell["method"])
    problem = problem_of(config, str(cell["problem"]), seed)
    optimiser = AdamMini(problem.model, partition_of(method, problem.model, seed), config.rate)
    train(problem, optimiser, range(config.steps), config.batch, seed)
    state = optimiser.numbers / (2 * len(optimiser.labels))
    return [observed("test_loss", loss_in_testing(problem)), observed("state", state)]


CLAIMS = [
    claim("adam-mini-loss", page(MINI, 9), Inequality("test_loss", "less", 1.01, centre="geometric mean"),
          "At AdamW's rate Adam-mini reaches AdamW's test loss, up to a hundredth.",
          "Ratio of the test losses after as many steps.", supported("Published as equal or better."), group="paper",
          at={"method": (ADAMW, ADAM_MINI)}, estimate=quotient("method", ADAM_MINI, ADAMW)),
    claim("adam-mini-state", page(MINI, 9), Always("state", "less", 0.6),
          "Adam-mini's state has at most six tenths of the numbers of AdamW's.", "Numbers of the two moments over 2P.",
          supported("Published as a half at large widths; biases keep theirs."), group="paper", at={"method": ADAM_MINI},
          bound_from="a half, and what biases and rows of a small network add"),
    *(claim(f"partition-{other}", page(MINI, 9), Wins("test_loss", "less"),
            f"Adam-mini's blocks end with a lower test loss than {words}.", "Difference of the test losses at AdamW's rate.",
            expected, group="paper", at={"method": (ADAM_MINI, other)},
            estimate=partial(difference_by_seed, column="method", first=ADAM_MINI, second=other))
      for other, words, expected in (
          (TENSOR, "one block a tensor", supported("Published: default partitions of torch are unstable.")),
          (RANDOM, "blocks of the same sizes at random", undecided("Not published.")))),
]  # fmt: skip

ONE_RATE: Experiment[Config] = Experiment(
    name="one-rate",
    cells=lambda config: [{"problem": config.problem, "method": method} for method in METHODS],
    measure=measure,
    varies=("initialisation", "batches"),
    claims=CLAIMS,
    seconds=0.6,
)
