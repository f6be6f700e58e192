"""Text, character by character: the manual that ships with Python, and a small transformer."""

from importlib import import_module

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from curvlab.problems.problem import Problem
from curvlab.problems.vision import Residual, seeded
from curvlab.tools.errors import DataUnavailable

ALPHABET = "\n" + "".join(chr(code) for code in range(32, 127))
"""Characters that are told apart; any other counts as a blank."""


class Attention(nn.Module):
    """Causal self-attention with several heads, made of linear layers that have rows of their own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "N T D"]) -> Float[Tensor, "N T D"]:
        """Attend to the present and to earlier positions."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.project(x).chunk(3, -1)
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        result: Tensor = self.merge(attended.transpose(1, 2).flatten(-2))
        return result


class CharacterTransformer(nn.Module):
    """A causal transformer over characters, normalised before every block.

    Source: Vaswani et al. 2017; normalisation as in Radford et al. 2019.
    """

    def __init__(self, characters: int, length: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Embedding(length, width)
        blocks: list[nn.Module] = []
        for _ in range(depth):
            perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            blocks += [Attention(width, heads), perceptron]
        normalised = [Residual(nn.Sequential(nn.LayerNorm(width), block)) for block in blocks]
        self.blocks = nn.Sequential(*normalised, nn.LayerNorm(width))
        self.read = nn.Linear(width, characters)

    def forward(self, x: Int64[Tensor, "N T"]) -> Float[Tensor, "N C T"]:
        """Logits of the character that follows each position."""
        places = torch.arange(x.shape[1], device=x.device).expand_as(x)
        result: Tensor = self.read(self.blocks(self.characters(x) + self.positions(places))).transpose(1, 2)
        return result


def character_problem(
    *,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    length: int = 64,
    samples: int = 2000,
    test_samples: int = 250,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Return the prediction of the next character in Python's manual with a transformer.

    A sample is a stretch of the text, its target at each position the character that follows; the test samples come
    after the training samples. The text differs between versions of Python.

    Args:
        width: Features D of a position.
        depth: Pairs of attention and perceptron.
        heads: Attention heads, a divisor of the width.
        length: Characters T of a sample.
        samples: Training samples.
        test_samples: Test samples.
        seed: Of the network's initialisation.
        dtype: Of the model.

    Raises:
        ValueError: The width is no multiple of the heads, or the text is too short.
        DataUnavailable: This Python comes without its manual.
    """
    if width % heads:
        raise ValueError(f"width must be a multiple of heads, got {width} and {heads}.")
    inputs, targets = stretches(encoded(manual()), samples + test_samples, length)
    return Problem(
        name="characters",
        model=seeded(lambda: CharacterTransformer(len(ALPHABET), length, width, depth, heads), seed, dtype),
        loss=nn.CrossEntropyLoss(),
        train=(inputs[:samples], targets[:samples]),
        test=(inputs[samples:], targets[samples:]),
    )


def manual() -> str:
    """Return the text behind Python's `help()`.

    Raises:
        DataUnavailable: It is not installed.
    """
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DataUnavailable("This Python comes without pydoc_data, whose text the problem needs.") from error
    return "\n".join(topics[name] for name in sorted(topics))


def encoded(text: str, alphabet: str = ALPHABET) -> Int64[Tensor, " T"]:
    """Return the positions of characters in an alphabet that has the blank, which stands for all that it has not."""
    place = {character: index for index, character in enumerate(alphabet)}
    return torch.tensor([place.get(character, place[" "]) for character in text], device="cpu")


def stretches(
    codes: Int64[Tensor, " S"], samples: int, length: int
) -> tuple[Int64[Tensor, "N T"], Int64[Tensor, "N T"]]:
    """Cut a text into samples, and into the characters that follow each of theirs.

    Raises:
        ValueError: The text is too short.
    """
    wanted = samples * length
    if len(codes) <= wanted:
        raise ValueError(
            f"The text has {len(codes)} characters, and {wanted + 1} were asked for: take fewer or shorter samples."
        )
    return codes[:wanted].view(-1, length), codes[1 : wanted + 1].view(-1, length)
