"""A structure of one's own: one number a layer, the mean of the diagonal of the layer's block.

    python examples/structure.py

Once it is defined, it works wherever ours do: `curvlab.compare`, `Preconditioner`, options such as `--structures` (as
`structure:LayerScalar`, or in a package by an entry point of the group `curvlab.structures`), and figures, where it brings
its own look.
"""

import torch
from torch import nn

import curvlab
from curvlab.fisher import Diagonal
from curvlab.fisher.block import Batch, Block
from curvlab.fisher.diagonal import DiagonalBlock
from curvlab.rows import Rows
from curvlab.testing import check_structure
from curvlab.tools.looks import Look


class ScalarBlock(DiagonalBlock):
    """A multiple of the identity."""

    def update(self, batch: Batch) -> None:
        """Average the mean of a batch's diagonal."""
        diagonal = batch.layers[0].diagonal()
        batch.average(self.average, diagonal.mean().expand_as(diagonal).clone())


class LayerScalar(Diagonal, key="scalar", summary="a number a layer", look=Look("#332288", "<", "scalar")):
    """The Fisher matrix as a multiple of the identity in every layer: layer-wise learning rates."""

    def _make_blocks(self, rows: Rows) -> list[Block]:
        return [ScalarBlock(layer.name, layer.layout, None) for layer in rows.layers]


def main() -> None:
    """Check the structure, and compare it with others on a network."""
    check_structure(LayerScalar)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3)).double()
    x, y = torch.randn(32, 20).double(), torch.randint(3, (32,))
    structures = ("full", "diagonal", "scalar")
    print(curvlab.compare(model, nn.CrossEntropyLoss(), (x, y), damping="rel:1e-3", structures=structures))


if __name__ == "__main__":
    main()
