"""What an optimiser divides by, read from its state as a structure and a power: P = F^p + ε, with steps along P⁻¹ of its momentum.

| optimiser | F | p | ε |
|---|---|---|---|
| SGD | I | 1 | 0 |
| Adam, AdamW, NAdam | diag(v̂), v̂ without its bias | ½ | eps |
| RMSprop | diag(v), less the squared mean if centred | ½ | eps |
| Adagrad | diag of sums of squares | ½ | eps |
| Adamax | diag(u) | 1 | 0 |
| Adafactor | diag of row sums times column sums over their total, at least eps² | ½ | 0 |
| Muon | MMᵀ ⊗ I of the momentum M, on its range | ½ | 0 |

Whatever is in an optimiser can so be put beside a Fisher structure: its response, its cosine with the natural gradient, the
sharpness that it preconditions. Muon replaces the polar factor P⁻¹M = UVᵀ of M = UΣVᵀ by five steps of
Newton–Schulz, which leave singular values near 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlab.errors import UnsupportedModel
from curvlab.fisher.diagonal import Diagonal
from curvlab.fisher.partial_traces import OutputSide
from curvlab.fisher.power import Damps
from curvlab.fisher.structure import Structure
from curvlab.rows.factored import KroneckerRows
from curvlab.rows.layer import DenseRows, LayerRows
from curvlab.rows.owners import trainable
from curvlab.rows.parameters import Layout, ParameterSpace, Vector
from curvlab.rows.rows import Rows
from curvlab.tools.shown import line

Group = Mapping[str, Any]
State = Mapping[str, Any]


@dataclass(frozen=True, repr=False)
class OptimizerMatrix:
    """P of an optimiser.

    Attributes:
        structure: F.
        power: p.
        damping: ε.
        damps: what ε is added to, see `curvlab.fisher.power`.
    """

    structure: Structure
    power: float
    damping: float
    damps: Damps = "power"

    def __repr__(self) -> str:
        return line(self, self.structure.key, power=self.power, damping=self.damping, P=self.structure.space.size)

    def matvec(self, vector: Vector) -> Vector:
        """Return `P v`."""
        product = self.structure.matvec(vector, power=self.power)
        if not self.damping:
            return product
        named, restore = self.structure.space.unpack(vector)
        powers, _ = self.structure.space.unpack(product)
        return restore({name: powers[name] + self.damping * value for name, value in named.items()})

    def solve(self, vector: Vector) -> Vector:
        """Return `P⁻¹ v`, on the range of P where ε is 0."""
        found: Vector = self.structure.solve(vector, self.damping, power=self.power, damps=self.damps)
        return found

    def response(self, jacobian: Rows, test: Rows | None = None) -> Float[Tensor, "Q R"]:
        """Return `J' P⁻¹ Jᵀ / count`, see `Structure.response`."""
        return self.structure.response(jacobian, self.damping, test, power=self.power, damps=self.damps)


def from_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> OptimizerMatrix:
    """Return what an optimiser divides its momentum by in the step that it has just taken.

    Args:
        optimizer: of a class in `READERS` or derived from one, of all trainable parameters; one in `torch.optim`.
        model: whose parameters it moves.

    Raises:
        UnsupportedModel: for another optimiser, parameters that it does not move or has no state of, and groups whose eps differ.

    Cost: a copy of what is read; of Muon the squares of the shorter sides' matrices.

    Source: Gupta, Koren & Singer 2018 for the family; the papers of the optimisers; Bernstein & Newhouse 2024 for Muon.
    """
    for kind in type(optimizer).__mro__:
        if kind in READERS:
            return READERS[kind](parts_of(optimizer, model))
    known = ", ".join(kind.__name__ for kind in READERS)
    raise UnsupportedModel(
        f"It is not known what {type(optimizer).__name__} divides by, only for {known}. Add a function that returns its "
        "OptimizerMatrix to curvlab.fisher.reading.READERS."
    )


@dataclass(frozen=True)
class Part:
    """A parameter in an optimiser.

    Attributes:
        name: in the model.
        value: the parameter.
        state: what the optimiser keeps of it.
        group: the options of its group.
    """

    name: str
    value: Tensor
    state: State
    group: Group

    def kept(self, key: str) -> Tensor:
        """Return an entry of the state.

        Raises:
            UnsupportedModel: there is none.
        """
        if key not in self.state:
            raise UnsupportedModel(f"The optimiser has no {key} of {self.name!r}: take a step with it first.")
        found: Tensor = self.state[key]
        return found


def parts_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[Part]:
    """Return the trainable parameters of a model, as an optimiser has them.

    Raises:
        UnsupportedModel: for one that it does not move.
    """
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    parameters = trainable(model)
    missing = [name for name, p in parameters.items() if p not in groups]
    if missing:
        raise UnsupportedModel(
            f"{type(optimizer).__name__} does not move {', '.join(sorted(missing))}: freeze them, or give them to it."
        )
    return [Part(name, p.detach(), optimizer.state[p], groups[p]) for name, p in parameters.items()]


def _eps(parts: list[Part]) -> float:
    found = {float(part.group["eps"]) for part in parts}
    if len(found) > 1:
        raise UnsupportedModel(f"The parameter groups differ in eps ({found}), so there is no one P. Use the same.")
    return found.pop()


def diagonal(squares: Mapping[str, Tensor]) -> Diagonal:
    """Return the structure with a given diagonal ≥ 0, by parameter."""
    return Diagonal().update(row_of({name: square.clamp_min(0).sqrt() for name, square in squares.items()}))


def row_of(values: Mapping[str, Tensor]) -> Rows:
    """Return a single row with given entries by parameter, each of which is a layer by itself: a matrix, or a vector of units."""
    space = ParameterSpace({name: value.shape for name, value in values.items()})
    first = next(iter(values.values()))
    layers = tuple(_layer(name, value.detach()) for name, value in values.items())
    return Rows(layers, space, "empirical", 1.0, 1.0, "mean", first.new_ones(1), per="batch")


def _layer(name: str, value: Tensor) -> LayerRows:
    if value.ndim < 2:
        layout = Layout.of(value.numel(), {name: value.shape})
        return DenseRows(name, layout, value.reshape(1, 1, -1, 1))
    matrix = value.flatten(1)
    layout = Layout.of(len(matrix), {name: value.shape})
    positions = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return KroneckerRows(name, layout, matrix[None, :, None], positions[None, None, :, None])


def _sgd(parts: list[Part]) -> OptimizerMatrix:
    return OptimizerMatrix(diagonal({part.name: torch.ones_like(part.value) for part in parts}), 1.0, 0.0)


def second_moment(part: Part) -> Tensor:
    """Return v̂ of a parameter in an Adam, without its bias.

    Raises:
        UnsupportedModel: before the first step, and for an optimiser that has none.
    """
    moment = part.kept("max_exp_avg_sq" if part.group.get("amsgrad") else "exp_avg_sq")
    unbiased: float = 1 - part.group["betas"][1] ** float(part.state["step"])
    return moment / unbiased


def _adam(parts: list[Part]) -> OptimizerMatrix:
    return OptimizerMatrix(diagonal({part.name: second_moment(part) for part in parts}), 0.5, _eps(parts))


def _rmsprop(parts: list[Part]) -> OptimizerMatrix:
    def square(part: Part) -> Tensor:
        found = part.kept("square_avg")
        return found - part.kept("grad_avg").square() if part.group["centered"] else found

    return OptimizerMatrix(diagonal({part.name: square(part) for part in parts}), 0.5, _eps(parts))


def _adagrad(parts: list[Part]) -> OptimizerMatrix:
    return OptimizerMatrix(diagonal({part.name: part.kept("sum") for part in parts}), 0.5, _eps(parts))


def _adamax(parts: list[Part]) -> OptimizerMatrix:
    return OptimizerMatrix(diagonal({part.name: part.kept("exp_inf") for part in parts}), 1.0, 0.0)


def _adafactor(parts: list[Part]) -> OptimizerMatrix:
    def square(part: Part) -> Tensor:
        least = part.group["eps"][0] or torch.finfo(part.value.dtype).eps
        if part.value.ndim < 2:
            found = part.kept("variance")
        else:
            rows, columns = part.kept("row_var"), part.kept("col_var")
            found = rows @ columns / rows.mean(-2, keepdim=True).clamp_min(least)
        return torch.clamp_min(found, least**2)

    return OptimizerMatrix(diagonal({part.name: square(part) for part in parts}), 0.5, 0.0)


def _muon(parts: list[Part]) -> OptimizerMatrix:
    structure = OutputSide().update(row_of({part.name: part.kept("momentum_buffer") for part in parts}))
    return OptimizerMatrix(structure, 0.5, 0.0)


Read = Callable[[list[Part]], OptimizerMatrix]

READERS: dict[type[torch.optim.Optimizer], Read] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.NAdam: _adam,
    torch.optim.RMSprop: _rmsprop,
    torch.optim.Adagrad: _adagrad,
    torch.optim.Adamax: _adamax,
    torch.optim.Adafactor: _adafactor,
}
"""How an optimiser is read, by its class; add your own. Muon is there from the version of torch on that has it, 2.9."""
if hasattr(torch.optim, "Muon"):
    READERS[torch.optim.Muon] = _muon
