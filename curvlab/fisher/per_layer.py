"""Different structures for different layers, chosen by patterns of names.

PerLayer({"*.ln_*": BlockDiagonal(), "*.lm_head": Diagonal(), "*": KFAC()})
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from curvlab.errors import PartitionError
from curvlab.fisher.block import Block
from curvlab.fisher.by_key import make
from curvlab.fisher.ekfac import decompose_factors
from curvlab.fisher.kronecker import stagger
from curvlab.fisher.structure import Structure
from curvlab.rows import Rows
from curvlab.rows.layer import LayerRows
from curvlab.rows.parameters import ParameterSpace
from curvlab.tools.shown import line, some


class PerLayer(Structure):
    """Each layer in the structure of the first pattern that fits its name.

    A layer is called as in `model.named_modules()`; a pattern fits as in a shell, with `*`, `?` and `[…]`, and `*.head` fits a
    layer `head` of the model itself, too. A parameter of the model itself belongs to the layer "". Tied parameters belong to
    their first layer. Layers that share a structure that couples them, as 'full', are coupled: the blocks are those that it
    makes of these layers alone. A fit holds the rows of one layer at a time if all structures do, as K-FAC and the diagonal,
    and exact blocks with `side="parameters"`.

    Args:
        choices: structures, not updated yet, or keys of `curvlab.fisher.STRUCTURES`, by pattern; one alone is for every layer.

    Raises:
        ValueError: if there are no choices, one has a state already, or they keep rows for different windows.
        PartitionError: on the first rows, if no pattern fits a layer, or no layer is left for a pattern.
    """

    key = "per-layer"
    summary = "another structure for each layer, by patterns of names"

    def __init__(
        self, choices: Mapping[str, Structure | type[Structure] | str] | Structure | type[Structure] | str
    ) -> None:
        super().__init__()
        by_pattern = choices if isinstance(choices, Mapping) else {"*": choices}
        self._choices = {pattern: make(structure) for pattern, structure in by_pattern.items()}
        structures = list(self._choices.values())
        if not structures:
            raise ValueError('choices has no pattern; {"*": "kfac"} takes K-FAC for every layer.')
        for pattern, structure in self._choices.items():
            if structure.updated:
                raise ValueError(f"The structure of {pattern!r} has a state already: choices takes new ones.")
        windows = {structure._window for structure in structures if not structure.averages}
        if len(windows) > 1:
            raise ValueError(f"Structures that keep rows keep those of equally many batches, got windows {windows}.")
        self.averages = all(structure.averages for structure in structures)
        self.by_layer = all(structure.by_layer for structure in structures)
        self.adds = all(structure.adds for structure in structures)
        self.joins_positions = all(structure.joins_positions for structure in structures)
        self.passes = max(structure.passes for structure in structures)

    @property
    def options(self) -> Mapping[str, object]:
        """The configuration."""
        return {"choices": self._choices}

    @property
    def _window(self) -> int | None:
        return next((s._window for s in self._choices.values() if not s.averages), None)

    def _make_blocks(self, rows: Rows) -> list[Block]:
        shared: dict[str, list[LayerRows]] = {}
        for layer in rows.layers:
            shared.setdefault(self._pattern(layer, rows.layers), []).append(layer)
        blocks: list[Block] = []
        for pattern, layers in shared.items():
            names = {name for layer in layers for name in layer.layout.names}
            space = ParameterSpace({name: shape for name, shape in rows.space.shapes.items() if name in names})
            blocks += self._choices[pattern]._make_blocks(replace(rows, layers=tuple(layers), space=space))
        return blocks

    def _pattern(self, layer: LayerRows, layers: Sequence[LayerRows]) -> str:
        found = next((pattern for pattern in self._choices if _fits(layer, pattern)), None)
        if found is None:
            left = [repr(other.name) for other in layers if not any(_fits(other, p) for p in self._choices)]
            raise PartitionError(
                f"No pattern fits {', '.join(left)}; there are {', '.join(map(repr, self._choices))}. Add one for these layers, "
                "or '*' as the last one, for all that are left."
            )
        return found

    def _begin(self, blocks: list[Block], rows: Rows) -> None:
        taken = {self._pattern(layer, rows.layers) for layer in rows.layers}
        unused = [repr(pattern) for pattern in self._choices if pattern not in taken]
        if unused:
            names = ", ".join(repr(layer.name) for layer in rows.layers)
            raise PartitionError(
                f"No layer is left for {', '.join(unused)}: the layers are {names}, tied parameters belong to their first one, "
                "and the first pattern that fits counts. Drop the pattern, or move it ahead."
            )
        stagger(blocks)

    def _prepare_refining(self, blocks: Iterable[Block]) -> None:
        decompose_factors(blocks)

    def _configured(self) -> dict[str, object]:
        return {}

    def _notes(self) -> list[str]:
        if not self.updated:
            return [some(f"{pattern!r}: {line(s, **s._configured())}" for pattern, s in self._choices.items())]
        fitting: dict[str, list[str]] = {}
        for layer in self._shapes.layers if self._shapes else ():
            fitting.setdefault(self._pattern(layer, ()), []).append(layer.name)
        return [f"{self._choices[pattern].key}: {some(names)}" for pattern, names in fitting.items()]


def _fits(layer: LayerRows, pattern: str) -> bool:
    return fnmatchcase(layer.name, pattern) or fnmatchcase(f".{layer.name}", pattern)
