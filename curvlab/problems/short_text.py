"""Small networks of four kinds on the same short stretches of text, of like size, so that their dense curvature can be compared.

Transformer and convolutions predict the character after every position, perceptron and mixer the one after the stretch.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from curvlab.errors import unknown_name
from curvlab.problems.problem import Problem
from curvlab.problems.text import encoded, manual, stretches
from curvlab.problems.vision import Residual, seeded

LETTERS = " etaoinsrhldcumfpgwybvkxjqz_"
"""Characters that are told apart, the first ones of these; capital letters count as small ones, any other as a blank."""
HEADS = 2
"""Heads of the transformer's attention."""
TEST = 250
"""Test samples, which come after the training samples."""


class HeadedAttention(nn.Module):
    """Causal self-attention whose queries, keys and values have a matrix each, with the rows of one head after the other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.merge = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Float[Tensor, "N T D"]) -> Float[Tensor, "N T D"]:
        """Attend to the present and to earlier positions."""
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        attended = scores.masked_fill(later, -torch.inf).softmax(-1) @ value
        result: Tensor = self.merge(attended.transpose(1, 2).flatten(-2))
        return result


class Tokens(nn.Module):
    """Vectors of characters, plus those of their places if there are any."""

    def __init__(self, characters: int, width: int, places: int = 0) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.places = nn.Embedding(places, width) if places else None

    def forward(self, x: Int64[Tensor, "N T"]) -> Float[Tensor, "N T D"]:
        """Look both up."""
        found: Tensor = self.characters(x)
        if self.places is not None:
            found = found + self.places(torch.arange(x.shape[1], device=x.device).expand_as(x))
        return found


class Swap(nn.Module):
    """Exchanges the axes of positions and features."""

    def forward(self, x: Float[Tensor, "N S T"]) -> Float[Tensor, "N T S"]:
        """Exchange them."""
        return x.transpose(1, 2)


class Mean(nn.Module):
    """The mean over positions."""

    def forward(self, x: Float[Tensor, "N T D"]) -> Float[Tensor, "N D"]:
        """Take it."""
        return x.mean(1)


class CausalConvolution(nn.Conv1d):
    """A convolution that sees no later position."""

    def forward(self, input: Float[Tensor, "N D T"]) -> Float[Tensor, "N E T"]:  # noqa: A002
        """Convolve the present and earlier positions."""
        return super().forward(nn.functional.pad(input, (self.kernel_size[0] - 1, 0)))


def _perceptron(inputs: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, inputs))


def _normalised(width: int, *branch: nn.Module) -> nn.Module:
    return Residual(nn.Sequential(nn.LayerNorm(width), *branch))


def _transformer(characters: int, length: int, width: int, depth: int) -> nn.Module:
    if width % HEADS:
        raise ValueError(f"width must be a multiple of the {HEADS} heads, got {width}.")
    branches = [
        branch for _ in range(depth) for branch in (HeadedAttention(width, HEADS), _perceptron(width, 2 * width))
    ]
    blocks = [_normalised(width, branch) for branch in branches]
    read = nn.Linear(width, characters)
    return nn.Sequential(Tokens(characters, width, length), *blocks, nn.LayerNorm(width), read, Swap())


def _convolutions(characters: int, length: int, width: int, depth: int) -> nn.Module:  # noqa: ARG001
    first = [CausalConvolution(width, 2 * width, 3), nn.GELU()]
    hidden = [layer for _ in range(depth - 1) for layer in (CausalConvolution(2 * width, 2 * width, 3), nn.GELU())]
    return nn.Sequential(Tokens(characters, width), Swap(), *first, *hidden, nn.Conv1d(2 * width, characters, 1))


def _dense(characters: int, length: int, width: int, depth: int) -> nn.Module:
    hidden = [layer for _ in range(depth - 1) for layer in (nn.Linear(2 * width, 2 * width), nn.GELU())]
    first = [nn.Flatten(), nn.Linear(length * width, 2 * width), nn.GELU()]
    return nn.Sequential(Tokens(characters, width), *first, *hidden, nn.Linear(2 * width, characters))


def _mixer(characters: int, length: int, width: int, depth: int) -> nn.Module:
    blocks = []
    for _ in range(depth):
        blocks += [_normalised(width, Swap(), _perceptron(length, 2 * length), Swap())]
        blocks += [_normalised(width, _perceptron(width, 2 * width))]
    read = nn.Linear(width, characters)
    return nn.Sequential(Tokens(characters, width), *blocks, nn.LayerNorm(width), Mean(), read)


def short_text_problem(
    network: str = "transformer",
    *,
    width: int = 8,
    depth: int = 2,
    length: int = 8,
    characters: int = len(LETTERS),
    samples: int = 4000,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Return the prediction of the next character in Python's manual from short stretches of it.

    The networks: a transformer, normalised before every block; causal convolutions over three positions; a perceptron on the
    whole stretch; a mixer of perceptrons over positions and over features, with the mean over positions at its end. With
    the defaults they have 1756, 1884, 2012 and 1676 parameters. The text differs between versions of Python.

    Args:
        network: A key of `NETWORKS`.
        width: Features of a position; hidden layers have twice as many.
        depth: Blocks, or hidden layers.
        length: Characters of a stretch.
        characters: Characters that are told apart, at most 28, the frequent ones first.
        samples: Training samples.
        seed: Of the network's initialisation.
        dtype: Of the model.

    Raises:
        ValueError: The network is unknown, a number is below 1 or too large, or the width is no multiple of the
            transformer's two heads.
        DataUnavailable: This Python comes without its manual.

    Source: Vaswani et al. 2017; Tolstikhin et al. 2021 (the mixer).
    """
    if network not in NETWORKS:
        raise unknown_name("network", network, NETWORKS)
    if min(width, depth, length, samples) < 1 or not 2 <= characters <= len(LETTERS):
        raise ValueError(
            f"width, depth, length and samples must be at least 1, and characters from 2 to {len(LETTERS)}; got {width}, "
            f"{depth}, {length}, {samples} and {characters}."
        )
    build, every = NETWORKS[network]
    inputs, targets = stretches(encoded(manual().lower(), LETTERS[:characters]), samples + TEST, length)
    targets = targets if every else targets[:, -1].contiguous()
    return Problem(
        name=_name(network),
        model=seeded(lambda: build(characters, length, width, depth), seed, dtype),
        loss=nn.CrossEntropyLoss(),
        train=(inputs[:samples], targets[:samples]),
        test=(inputs[samples:], targets[samples:]),
    )


NETWORKS: dict[str, tuple[Callable[[int, int, int, int], nn.Module], bool]] = {
    "transformer": (_transformer, True),
    "cnn": (_convolutions, True),
    "mlp": (_dense, False),
    "mixer": (_mixer, False),
}
"""How each is built from characters, length, width and depth, and whether it predicts at every position."""


def _name(network: str) -> str:
    return "short-text" if network == "transformer" else f"short-text-{network}"


SHORT_TEXT: dict[str, Callable[..., Problem]] = {
    _name(network): partial(short_text_problem, network) for network in NETWORKS
}
"""The four problems by name."""
