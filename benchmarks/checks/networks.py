"""The networks whose graphs are read: chains, branches, attention and recurrence."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.tasks import TASKS, Task

NetworkName = Literal["mlp", "lenet", "residual", "transformer", "lstm-cell", "lstm"]

CLASSES = 10


class Residual(nn.Module):
    """Convolutions with skip connections and batch normalisation."""

    def __init__(self, channels: int = 16, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(_block(channels) for _ in range(blocks))
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 10"]:
        """Return the outputs."""
        h = F.relu(self.stem(x))
        for block in self.blocks:
            h = F.relu(h + block(h))
        z: Tensor = self.head(h.mean((2, 3)))
        return z


def _block(channels: int) -> nn.Sequential:
    layers = [nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)) for _ in range(2)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])


class Encoder(nn.Module):
    """A transformer encoder and a mean over positions."""

    def __init__(self, features: int = 32, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.entrance = nn.Linear(features, width)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Float[Tensor, "N T D"]) -> Float[Tensor, "N 10"]:
        """Return the outputs."""
        z: Tensor = self.head(self.encoder(self.entrance(x)).mean(1))
        return z


class Unrolled(nn.Module):
    """An LSTM cell that is called at every step."""

    def __init__(self, features: int = 8, width: int = 32) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(features, width), nn.Linear(width, CLASSES)

    def forward(self, x: Float[Tensor, "N T D"]) -> Float[Tensor, "N 10"]:
        """Return the outputs."""
        state = None
        for x_t in x.unbind(1):
            state = self.cell(x_t, state)
        assert state is not None
        z: Tensor = self.head(state[0])
        return z


class Recurrent(nn.Module):
    """An LSTM, of which the last output is read."""

    def __init__(self, features: int = 8, width: int = 32) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(features, width, batch_first=True), nn.Linear(width, CLASSES)

    def forward(self, x: Float[Tensor, "N T D"]) -> Float[Tensor, "N 10"]:
        """Return the outputs."""
        z: Tensor = self.head(self.lstm(x)[0][:, -1])
        return z


NETWORKS: dict[NetworkName, Task[nn.Module]] = {
    "mlp": Task("784-1024-1024-10 ReLU MLP", TASKS["mlp"].network, (784,), 64),
    "lenet": Task("LeNet on 28×28 images", TASKS["lenet"].network, (1, 28, 28), 64),
    "residual": Task("residual network, 7 convolutions of 16 channels, on 16×16 images", Residual, (3, 16, 16), 64),
    "transformer": Task("transformer encoder, width 64, 2 layers, 16 positions", Encoder, (16, 32), 64),
    "lstm-cell": Task("LSTM cell, width 32, 20 steps", Unrolled, (20, 8), 64),
    "lstm": Task("LSTM, width 32, 20 steps", Recurrent, (20, 8), 64),
}
