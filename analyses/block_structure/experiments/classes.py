"""Classes as blocks: softmax regression, and a perceptron with more and more classes on the same inputs (claim 11)."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from analyses.block_structure.config import HESSIAN, Config
from analyses.block_structure.points import DERIVED, DONG, page
from analyses.block_structure.setting import Point
from analyses.claims import claim
from curvlab.problems.vision import seeded
from curvlab.rows.parameters import ParameterSpace
from curvlab.spectrum import DenseOperator, Partition, by_layer, by_unit
from curvlab.spectrum.blocks import dense_block_map
from curvlab.study import (
    Cell,
    Context,
    Equivalence,
    Experiment,
    Identity,
    Inequality,
    Observations,
    among,
    generator,
    needs_several,
    observed,
    round_off,
    slope_by_seed,
    supported,
    undecided,
)  # fmt: skip
from curvlab.theory import block_structure as theory

SAMPLES, INPUTS, HIDDEN = 256, 16, 8
SLOPE = -0.1
"""A share that falls falls at least like C^SLOPE."""


def measure(cell: Cell, context: Context[Config]) -> Observations:
    """Return off-block shares of the Hessian: by class in the output, by hidden neuron in the hidden layer, and by layer."""
    config, seed, classes = context.config, int(cell["seed"]), int(cell["classes"])
    dtype = getattr(torch, config.dtype)
    x = torch.randn(SAMPLES, INPUTS, generator=generator(seed, "inputs"), dtype=dtype)
    y = torch.randint(classes, (SAMPLES,), generator=generator(seed, "labels"))

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, classes))

    network = _hessian(seeded(build, seed, dtype), x, y, config)
    linear = nn.Linear(INPUTS, classes, bias=False).to(dtype)
    nn.init.zeros_(linear.weight)
    error = _share(_hessian(linear, x, y, config), by_unit) - theory.softmax_share(classes)
    return [
        observed("softmax_error", error, tolerance=round_off(SAMPLES, dtype=dtype)),
        observed("share", _share(network, by_unit, "2."), blocks="classes"),
        observed("share", _share(network, by_unit, "0."), blocks="hidden"),
        observed("share", _share(network, by_layer), blocks="layers"),
    ]


def _hessian(model: nn.Module, x: torch.Tensor, y: torch.Tensor, config: Config) -> DenseOperator:
    point = Point(model.to(config.device), nn.CrossEntropyLoss(), x.to(config.device), y.to(config.device))
    return point.dense(HESSIAN)


def _share(operator: DenseOperator, make: Callable[[ParameterSpace], Partition], begins: str = "") -> float:
    """The off-block share within the parameters whose names begin in some way."""
    inside = {name: torch.full(shape, float(name.startswith(begins))) for name, shape in operator.space.shapes.items()}
    at = operator.space.flatten(inside).nonzero()[:, 0]
    partition = make(operator.space)
    at_device = at.to(operator.device)
    inner = operator.matrix[at_device[:, None], at_device]
    return dense_block_map(inner, Partition(partition.names, partition.labels[at])).share


CLAIMS = [
    claim("classes-softmax", page(DERIVED, 11), Identity("softmax_error"),
          "Softmax regression at uniform probabilities has the off-block share 1/C with a block a class.",
          "Difference to the share of the Hessian at zero weights, random inputs.",
          supported("Blocks are (1/C)(1 − 1/C) E[xxᵀ] and −(1/C²) E[xxᵀ]."), group="self-check"),
    claim("classes-output", page(DONG, 11), Equivalence("share", -1.0, 0.25, centre="mean"),
          "The off-block share of classes within the output layer of a perceptron at initialisation falls like 1/C.",
          "Slope of log ω against log C, random inputs and labels.",
          supported("Probabilities are nearly uniform at initialisation."), group="paper",
          estimate=among(partial(slope_by_seed, against="classes"), blocks="classes"),
          assumptions=needs_several("classes", "numbers of classes (--classes)"),
          bound_from="the exponent of 1/C, up to a quarter"),
    *(claim(f"classes-{blocks}", page(DONG, 11), Inequality("share", "less", SLOPE, centre="mean"), statement,
            "Slope of log ω against log C at initialisation, random inputs and labels.", expected, group=group,
            estimate=among(partial(slope_by_seed, against="classes"), blocks=blocks),
            assumptions=needs_several("classes", "numbers of classes (--classes)"))
      for blocks, statement, expected, group in (
          ("hidden", "The off-block share of hidden neurons within the hidden layer falls with the number of classes.",
           supported("Published: rows of many output weights become orthogonal."), "paper"),
          ("layers", "The off-block share of layers falls with the number of classes.",
           undecided("The paper speaks of blocks within layers."), "exploration"),
      )),
]  # fmt: skip

CLASSES: Experiment[Config] = Experiment(
    name="classes",
    cells=lambda config: [{"classes": classes} for classes in config.classes],
    measure=measure,
    varies=("initialisation", "data"),
    claims=CLAIMS,
    seconds=0.5,
)
