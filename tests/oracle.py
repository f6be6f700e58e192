"""The models and losses that tests share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization

from curvlab.nn import GaussianNLL, HalfSquaredError, NodesLast, Propagation, ntk_mlp

DOUBLE = torch.float64
CLASSES = 3


# --- models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """A model with inputs.

    Attributes:
        name: for test ids.
        build: `() -> model`, float64, in eval mode.
        inputs: `N -> inputs` of N samples.
        chain: whether BackPACK can treat it.
        output: what to pass as `output=`.
        pick: the same as a function, for references.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    chain: bool = True
    output: Any = None
    pick: Callable[[Any], Tensor] = field(default=lambda z: z)

    @property
    def engines(self) -> tuple[str, ...]:
        return ("backpack", "autograd") if self.chain else ("autograd",)

    def make(self, N: int = 4, seed: int = 0) -> tuple[nn.Module, Any]:
        """Return model and inputs, with all parameters and running statistics away from their special values."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.build().to(DOUBLE).eval()
            for parameter in model.parameters():
                parameter.data += 0.3 * torch.randn_like(parameter)
            for module in model.modules():
                if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 2.0)
            return model, self.inputs(N)


def vectors(*shape: int) -> Callable[[int], Tensor]:
    return lambda N: torch.randn(N, *shape, dtype=DOUBLE)


def indices(vocabulary: int, *shape: int) -> Callable[[int], Tensor]:
    return lambda N: torch.randint(vocabulary, (N, *shape))


def chain(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules)


class Exponential(nn.Module):
    """A parametrisation of positive weights."""

    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


def positive(layer: nn.Module) -> nn.Module:
    register_parametrization(layer, "weight", Exponential())
    return layer


def head(features: int) -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(features, CLASSES)]


def freeze(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def mlp() -> nn.Sequential:
    return chain(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, CLASSES))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.first(x))
        h = h + F.softplus(self.inner(h))
        return self.last(h)


class Bare(nn.Module):
    """Bare parameters: a scalar and a vector of the root, a matrix used functionally, one inside a list."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.shift = nn.Parameter(torch.randn(5))
        self.table = nn.ParameterList([torch.randn(5, 4)])
        self.last = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x, self.table[0]) + self.shift)
        return self.last(h) * self.temperature


class Tied(nn.Module):
    """An embedding whose table is also the output layer's weight, and two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.one, self.two = nn.Embedding(CLASSES, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.last = nn.Linear(4, CLASSES)
        self.two.weight, self.last.weight = self.one.weight, self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x).mean(1)
        return self.last(self.two(torch.tanh(self.one(h))))


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        for _ in range(3):
            h = torch.tanh(self.again(h))
        return self.last(h)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu_(self.norm(self.conv(x)))
        return self.last(h.flatten(1)).add_(1.0)


class Oddities(nn.Module):
    """Layers called by keyword, under `no_grad`, and not at all; a constant branch; a lazily stored attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocked, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(input=x))
        with torch.no_grad():
            gate = self.blocked(h)
        self.last_gate = gate
        return self.last(h * gate)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(4, 5), nn.Embedding(6, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor, index: Tensor, flag: bool = True, missing: None = None) -> Tensor:
        assert flag
        assert missing is None
        return self.last(torch.tanh(self.left(x) + self.right(index)))


class Answer(NamedTuple):
    hidden: Tensor
    logits: Tensor


class Structured(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.first, self.last, self.form = nn.Linear(4, 5), nn.Linear(5, CLASSES), form

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.first(x))
        z = self.last(h)
        return {"dict": {"hidden": h, "logits": z}, "named": Answer(h, z), "tuple": (h, z)}[self.form]


class Attention(nn.Module):
    """One attention layer: Linear on leading axes, LayerNorm, a positional table, in a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, padding_idx=0)
        self.position = nn.Parameter(torch.randn(5, 4))
        self.norm, self.mix, self.project = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4, bias=False)
        self.last = nn.Linear(4, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens) + self.position
        q, k, v = self.mix(self.norm(h)).chunk(3, dim=-1)
        h = h + self.project(torch.softmax(q @ k.mT / 2, dim=-1) @ v)
        return self.last(h).mT


def conv2d(side: int, **options: Any) -> Callable[[], nn.Module]:
    return lambda: chain(nn.Conv2d(2, 4, 3, **options), nn.Tanh(), nn.Conv2d(4, 2, 2), *head(2 * (side - 1) ** 2))


def conv1d(length: int, **options: Any) -> Callable[[], nn.Module]:
    return lambda: chain(nn.Conv1d(2, 4, 3, **options), nn.Sigmoid(), nn.Conv1d(4, 2, 2), *head(2 * (length - 1)))


def image(side: int = 6) -> Callable[[int], Tensor]:
    return vectors(2, side, side)


def uneven_conv() -> nn.Module:
    options: dict[str, Any] = {"stride": (2, 1), "padding": (2, 0), "dilation": (2, 1)}
    return chain(nn.Conv2d(2, 4, 3, bias=False, **options), nn.Tanh(), nn.Conv2d(4, 2, (1, 2)), *head(32))


def propagation() -> Propagation:
    """Return message passing on a directed graph of 5 nodes with a self loop, a double edge and an isolated node."""
    return Propagation(torch.tensor([[0, 1, 2, 2, 3, 1], [1, 2, 0, 2, 1, 2]]), 5, dtype=DOUBLE)


def graph_chain() -> nn.Sequential:
    layers = [propagation(), nn.Linear(3, 4), nn.Tanh(), propagation(), nn.Linear(4, CLASSES)]
    return chain(*layers, NodesLast())


ACTIVATIONS = (nn.ReLU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.LogSigmoid, nn.ELU, nn.SELU, nn.Identity, nn.Dropout)

ARCHITECTURES: list[Architecture] = [
    Architecture("linear", lambda: chain(nn.Linear(4, CLASSES)), vectors(4)),
    Architecture("linear-alone", lambda: nn.Linear(4, CLASSES), vectors(4)),
    Architecture("mlp", mlp, vectors(4)),
    Architecture("mlp-nested", lambda: chain(chain(nn.Linear(4, 5, bias=False), nn.Tanh()), *head(5)), vectors(4)),
    Architecture("one-output", lambda: chain(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), vectors(4)),
    Architecture(
        "leading-axes", lambda: chain(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), *head(12)), vectors(2, 3, 3)
    ),
    Architecture("grid-vectors", lambda: chain(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), vectors(CLASSES, 3)),
    Architecture("graph", graph_chain, vectors(5, 3)),
    Architecture("activations", lambda: chain(*(m for a in ACTIVATIONS for m in (nn.Linear(3, 3), a()))), vectors(3)),
    Architecture("ntk", lambda: ntk_mlp((4, 6, 5, CLASSES), activation="tanh", bias_std=0.4), vectors(4)),
    Architecture("ntk-erf", lambda: ntk_mlp((4, 6, CLASSES), activation="erf"), vectors(4), chain=False),
    Architecture("conv2d", conv2d(4), image()),
    Architecture("conv2d-stride", conv2d(3, stride=2, padding=1), image()),
    Architecture("conv2d-uneven", uneven_conv, image(7)),
    Architecture("conv2d-groups", conv2d(4, groups=2), image()),
    Architecture("conv2d-same", conv2d(6, padding="same", dilation=2), image(), chain=False),
    Architecture("conv2d-valid", conv2d(4, padding="valid"), image(), chain=False),
    Architecture("conv2d-circular", conv2d(6, padding=1, padding_mode="circular"), image(), chain=False),
    Architecture("conv2d-reflect", conv2d(3, padding=1, stride=2, padding_mode="reflect"), image(), chain=False),
    Architecture("conv2d-grid", lambda: chain(nn.Conv2d(2, 4, 2), nn.ReLU(), nn.Conv2d(4, CLASSES, 2)), image(4)),
    Architecture("conv1d", conv1d(5), vectors(2, 7)),
    Architecture("conv1d-stride", conv1d(3, stride=2, padding=1, dilation=2, groups=2), vectors(2, 7)),
    Architecture("conv1d-same", conv1d(7, padding="same", padding_mode="replicate"), vectors(2, 7), chain=False),
    Architecture("conv1d-grid", lambda: chain(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Conv1d(3, CLASSES, 2)), vectors(2, 5)),
    Architecture(
        "pooling",
        lambda: chain(nn.ZeroPad2d((1, 0, 2, 0)), nn.Conv2d(2, 3, 2), nn.MaxPool2d(2, padding=1, stride=1), *head(126)),
        image(5),
    ),
    Architecture(
        "average", lambda: chain(nn.Conv2d(2, 3, 2), nn.AvgPool2d(2, ceil_mode=True), *head(27)), image(), chain=False
    ),
    Architecture("batchnorm1d", lambda: chain(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), *head(5)), vectors(4)),
    Architecture(
        "batchnorm1d-long", lambda: chain(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.Tanh(), *head(12)), vectors(2, 5)
    ),
    Architecture(
        "batchnorm2d", lambda: chain(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), *head(48)), image()
    ),
    Architecture(
        "batchnorm-plain",
        lambda: chain(nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False), nn.Tanh(), *head(5)),
        vectors(4),
        chain=False,
    ),
    Architecture(
        "layernorm", lambda: chain(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), *head(5)), vectors(4), chain=False
    ),
    Architecture(
        "layernorm-long",
        lambda: chain(nn.LayerNorm((3, 4), bias=False), nn.Linear(4, 2), nn.LayerNorm(2), *head(12)),
        vectors(2, 3, 4),
        chain=False,
    ),
    Architecture("embedding", lambda: chain(nn.Embedding(7, 3), nn.Tanh(), *head(12)), indices(7, 4)),
    Architecture(
        "embedding-padding", lambda: chain(nn.Embedding(5, 3, padding_idx=1), nn.Tanh(), *head(12)), indices(5, 4)
    ),
    Architecture("bare", Bare, vectors(4), chain=False),
    Architecture("residual", Residual, vectors(4), chain=False),
    Architecture("attention", Attention, indices(7, 5), chain=False),
    Architecture("frozen-weight", lambda: freeze(mlp(), "0.weight"), vectors(4)),
    Architecture("frozen-bias", lambda: freeze(mlp(), "2.bias", "0.bias"), vectors(4)),
    Architecture("frozen-first", lambda: freeze(mlp(), "0.weight", "0.bias"), vectors(4)),
    Architecture("frozen-last", lambda: freeze(mlp(), "2.weight", "2.bias"), vectors(4)),
    Architecture(
        "frozen-norm",
        lambda: freeze(chain(nn.Linear(4, 5), nn.BatchNorm1d(5), *head(5)), "1.weight", "0.weight"),
        vectors(4),
    ),
    Architecture(
        "frozen-filters", lambda: freeze(chain(nn.Conv2d(2, 3, 3), nn.Tanh(), *head(48)), "0.weight"), image()
    ),
    Architecture("tied", Tied, indices(CLASSES, 4), chain=False),
    Architecture("reused", Reused, vectors(4), chain=False),
    Architecture("in-place", InPlace, image(4), chain=False),
    Architecture(
        "in-place-chain",
        lambda: chain(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, CLASSES)),
        vectors(4),
        chain=False,
    ),
    Architecture("oddities", Oddities, vectors(4), chain=False),
    Architecture(
        "parametrised", lambda: chain(positive(nn.Linear(4, 5)), nn.Tanh(), *head(5)), vectors(4), chain=False
    ),
    Architecture(
        "tuple",
        TwoInputs,
        lambda N: (vectors(4)(N), indices(6)(N)),
        chain=False,
    ),
    Architecture(
        "dict",
        TwoInputs,
        lambda N: {"index": indices(6)(N), "x": vectors(4)(N), "flag": True, "missing": None},
        chain=False,
    ),
    Architecture(
        "dict-output",
        lambda: Structured("dict"),
        vectors(4),
        chain=False,
        output="logits",
        pick=lambda r: r["logits"],
    ),
    Architecture(
        "named-output", lambda: Structured("named"), vectors(4), chain=False, output="logits", pick=lambda r: r.logits
    ),
    Architecture("tuple-output", lambda: Structured("tuple"), vectors(4), chain=False, output=1, pick=lambda r: r[1]),
    Architecture(
        "function-output",
        lambda: chain(nn.Linear(4, CLASSES)),
        vectors(4),
        output=lambda z: z.log_softmax(1),
        pick=lambda z: z.log_softmax(1),
        chain=False,
    ),
]
"""All supported layers, and all ways in which models are written."""


def architecture(name: str) -> Architecture:
    """Return an architecture by name."""
    return next(a for a in ARCHITECTURES if a.name == name)


# --- losses -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossCase:
    """A loss that fits outputs of any shape `[N, C, *]`.

    Attributes:
        name: for test ids.
        kind: class of the loss.
        targets: `outputs -> targets`, drawn from torch's default generator.
        weights: options that take a weight per class.
        options: further options.
    """

    name: str
    kind: type[nn.Module]
    targets: Callable[[Tensor], Tensor]
    weights: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, z: Tensor, reduction: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
        """Return the loss and targets for outputs `z`."""
        extra = 0 if self.kind is nn.CrossEntropyLoss else z.ndim - 2
        weights = {name: ramp(z.shape[1], extra).roll(k, 0) for k, name in enumerate(self.weights)}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.kind(**weights, **self.options, reduction=reduction), self.targets(z)


def real_targets(z: Tensor) -> Tensor:
    return torch.randn_like(z)


def labels(z: Tensor) -> Tensor:
    return torch.randint(z.shape[1], (z.shape[0], *z.shape[2:]))


def labels_with_ignored(z: Tensor) -> Tensor:
    y = labels(z)
    y.view(-1)[1::3] = -1
    return y


def binary(z: Tensor) -> Tensor:
    return torch.randint(2, z.shape).to(z.dtype)


def fractions(z: Tensor) -> Tensor:
    return torch.rand_like(z)


def distributions(z: Tensor) -> Tensor:
    return torch.randn_like(z).softmax(1)


def counts(z: Tensor) -> Tensor:
    return torch.randint(5, z.shape).to(z.dtype)


def ramp(C: int, extra: int = 0) -> Tensor:
    """Return weights 0.5, 1.0, 1.5, … over the classes, with trailing axes to broadcast."""
    return (0.5 * torch.arange(1, C + 1, dtype=DOUBLE)).view(C, *(1,) * extra)


LOSSES: list[LossCase] = [
    LossCase("mse", nn.MSELoss, real_targets),
    LossCase("half", HalfSquaredError, real_targets),
    LossCase("ce", nn.CrossEntropyLoss, labels),
    LossCase("ce-weights", nn.CrossEntropyLoss, labels, ("weight",)),
    LossCase("ce-ignore", nn.CrossEntropyLoss, labels_with_ignored, options={"ignore_index": -1}),
    LossCase("ce-smooth", nn.CrossEntropyLoss, labels, options={"label_smoothing": 0.2}),
    LossCase(
        "ce-all", nn.CrossEntropyLoss, labels_with_ignored, ("weight",), {"ignore_index": -1, "label_smoothing": 0.1}
    ),
    LossCase("ce-soft", nn.CrossEntropyLoss, distributions, ("weight",), {"label_smoothing": 0.1}),
    LossCase("gaussian", GaussianNLL, real_targets, ("variance",)),
    LossCase("poisson", nn.PoissonNLLLoss, counts, options={"full": True}),
    LossCase("bce", nn.BCEWithLogitsLoss, binary),
    LossCase("bce-soft", nn.BCEWithLogitsLoss, fractions),
    LossCase("bce-weight", nn.BCEWithLogitsLoss, binary, ("weight",)),
    LossCase("bce-pos", nn.BCEWithLogitsLoss, binary, ("pos_weight",)),
    LossCase("bce-all", nn.BCEWithLogitsLoss, fractions, ("weight", "pos_weight")),
]
"""All losses whose Hessian is the Fisher matrix, with their options."""


def loss_case(name: str) -> LossCase:
    """Return a loss by name."""
    return next(case for case in LOSSES if case.name == name)
