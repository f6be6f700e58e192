"""What a random model is made of: a block maps `[N, T, D]` to `[N, T, D]`.

Blocks draw their options from `random.Random` and their numbers from torch's default generator. `between` is what a training
loop does to a block between two batches.
"""

from dataclasses import dataclass
from random import Random

from torch import Tensor, nn


@dataclass
class Side:
    """What a batch brings besides its samples.

    Attributes:
        missing: `[N]`, samples that are marked as missing.
        shared: `[D]` or `[T, D]`, seen by all samples.
        padding: `[N, T]`, positions that are padding.
    """

    missing: Tensor
    shared: Tensor
    padding: Tensor


class Block(nn.Module):
    """A piece of a random model."""

    def __init__(self, D: int, T: int, draw: Random) -> None:
        super().__init__()
        self.D, self.T = D, T
        self.build(draw)

    def build(self, draw: Random) -> None:
        """Make layers and draw options."""

    def between(self) -> None:
        """Change between the batches."""


BLOCKS: dict[str, type[Block]] = {}
"""All blocks by name."""


def block(kind: type[Block]) -> type[Block]:
    BLOCKS[kind.__name__] = kind
    return kind
