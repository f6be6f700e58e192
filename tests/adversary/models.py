"""Random models of blocks."""

from random import Random

from torch import Tensor, nn

from adversary.block import Block, Side
from adversary.blocks import BLOCKS


class Model(nn.Module):
    """Blocks between an entrance, of numbers or of tokens, and a head `[N, C]` or `[N, C, T]`."""

    def __init__(self, blocks: list[Block], entrance: nn.Module, head: nn.Linear, way: str) -> None:
        super().__init__()
        self.entrance, self.blocks, self.head, self.way = entrance, nn.ModuleList(blocks), head, way

    def forward(self, x: Tensor, missing: Tensor, shared: Tensor, padding: Tensor) -> Tensor:
        side = Side(missing, shared, padding)
        h = self.entrance(x)
        for one in self.blocks:
            h = one(h, side)
        match self.way:
            case "mean":
                return self.head(h.mean(1))
            case "flatten":
                return self.head(h.flatten(1))
            case "last":
                return self.head(h[:, -1])
            case _:
                return self.head(h).transpose(1, 2)

    def between(self) -> None:
        for one in self.blocks:
            one.between()

    @property
    def description(self) -> str:
        """The model in one line."""

        def options(one: nn.Module) -> str:
            kept = {
                k: v for k, v in vars(one).items() if not k.startswith("_") and k not in ("D", "T", "training", "kept")
            }
            shown = [f"{k}={v}" for k, v in kept.items() if isinstance(v, bool | int | float | str)]
            return f"{type(one).__name__}({', '.join(shown)})"

        return " > ".join([type(self.entrance).__name__, *map(options, self.blocks), f"head:{self.way}"])


def random_model(draw: Random, D: int, T: int, C: int, names: list[str] | None = None) -> Model:
    """Draw a model, of named blocks if given."""
    names = names or draw.choices(list(BLOCKS), k=draw.randint(1, 4))
    way = draw.choices(["mean", "flatten", "last", "positions"], [4, 3, 2, 1])[0]
    entrance = nn.Embedding(6, D) if draw.random() < 0.4 else nn.Linear(D, D)
    blocks = [BLOCKS[name](D, T, draw) for name in names]
    head = nn.Linear(T * D if way == "flatten" else D, C)
    if draw.random() < 0.15:
        nn.init.zeros_(head.weight)
    if draw.random() < 0.1 and len(blocks) > 1:
        blocks.append(blocks[0])
    return Model(blocks, entrance, head, way)
