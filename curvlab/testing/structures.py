"""Whether a structure keeps what every structure promises: its verbs agree with its own dense matrix, and its state is whole."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlab.errors import StateError
from curvlab.fisher import STRUCTURES, Structure
from curvlab.rows import Rows, jacobian, sqrt_fisher
from curvlab.rows.loss import Kind
from curvlab.rows.parameters import Vector
from curvlab.testing.failing import that
from curvlab.testing.oracle import assert_close, dense_jacobian

DOUBLE = torch.float64
CLASSES = 3

Definition = Callable[[Float[Tensor, "P P"], Mapping[str, Tensor]], Float[Tensor, "P P"]]
"""The exact Fisher matrix, and by name the places of a parameter's entries in it, to the matrix that a structure stands for."""


class Vision(nn.Module):
    """Grouped and strided convolutions, a normalisation, a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(4, 1, 1))
        self.conv = nn.Conv2d(2, 4, 3, stride=2, groups=2)
        self.norm = nn.GroupNorm(2, 4)
        self.last = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `[N, C]` of images `[N, 2, 6, 6]`."""
        return self.last(torch.tanh(self.gain * self.norm(self.conv(x))).flatten(1))  # type: ignore[no-any-return]


class Language(nn.Module):
    """A table, dense layers on sequences, a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(6, 3), nn.LayerNorm(4)
        self.mix, self.last = nn.Linear(3, 4), nn.Linear(4, CLASSES, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits `[N, C, T]` of tokens `[N, T]`."""
        h = torch.tanh(self.norm(self.mix(self.table(tokens))))
        return self.last(h + h.mean(1, keepdim=True)).mT  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Case:
    """A network, a loss and a kind of rows on which a structure is tried."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    targets: Callable[[], Tensor]
    loss: nn.Module
    kind: Kind

    @cached_property
    def data(self) -> tuple[nn.Module, Tensor, Tensor]:
        """Model, inputs and targets, the same in every run."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model = self.build().double().eval()
            return model, self.inputs(), self.targets()

    def rows(self, some: slice = slice(None), dtype: torch.dtype = DOUBLE) -> Rows:
        """Rows of S of some samples."""
        model, x, y = self.data
        model, loss = (copy.deepcopy(module).to(dtype) for module in (model, self.loss))
        x, y = (part.to(dtype) if part.is_floating_point() else part for part in (x[some], y[some]))
        generator = torch.Generator().manual_seed(0) if self.kind == "mc" else None
        return sqrt_fisher(model, loss, x, y, self.kind, generator=generator)

    @cached_property
    def whole(self) -> Rows:
        """Rows of S of all samples."""
        return self.rows()

    @cached_property
    def exact(self) -> Float[Tensor, "P P"]:
        """The matrix SᵀS."""
        S = self.whole.dense()
        return S.T @ S


CASES = (
    Case(
        "a perceptron, cross-entropy, exact rows",
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES)),
        lambda: torch.randn(4, 4, dtype=DOUBLE),
        lambda: torch.randint(CLASSES, (4,)),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        "exact",
    ),
    Case(
        "a convolutional network, squared error, empirical rows",
        Vision,
        lambda: torch.randn(4, 2, 6, 6, dtype=DOUBLE),
        lambda: torch.randn(4, CLASSES, dtype=DOUBLE),
        nn.MSELoss(reduction="sum"),
        "empirical",
    ),
    Case(
        "a network on sequences, cross-entropy a position, drawn rows",
        Language,
        lambda: torch.randint(6, (4, 5)),
        lambda: torch.randint(CLASSES, (4, 5)),
        nn.CrossEntropyLoss(),
        "mc",
    ),
)


def check_structure(cls: type[Structure], *, definition: Definition | None = None, **options: Any) -> None:
    """Check a structure on three small networks, with rows of three kinds and two losses.

    Its verbs are held to its own dense matrix: `matvec`, `solve`, `lift`, `response`, `trace`, `eigvalsh`,
    `largest_eigenvalue`, `logdet`; its dense matrix to its definition. Its state is whole: it can be copied, pickled, stored
    and taken up, batches merge into the data set, what it is given is checked, and float32 does.

    Args:
        cls: The structure's class.
        definition: The matrix that it stands for, for structures that are made of the exact one: `definition(F, places)` with
            the exact F `[P, P]` and, by the name of a parameter, the places of its entries in it, in the parameter's shape.
        options: Of its constructor.

    Raises:
        AssertionError: something does not hold; the message says what, on which network.

    Cost: about a second.
    """
    logger = logging.getLogger("curvlab")
    level = logger.level
    logger.setLevel(logging.ERROR)  # what is said of networks applies to ours here
    try:
        _check(cls, definition, options)
    finally:
        logger.setLevel(level)


def _check(cls: type[Structure], definition: Definition | None, options: Mapping[str, Any]) -> None:
    name = cls.__name__
    with that("a structure has a key, under which it is registered, and a summary", name):
        assert STRUCTURES[cls.key] is cls, f"{cls.key!r} is {STRUCTURES[cls.key].__name__}"
        assert cls.summary, "the summary is empty"
    with that(
        "the property `options` returns the constructor's arguments, by name, so that they make the structure again",
        name,
    ):
        structure = cls(**options)
        wanted, found = set(signature(cls).parameters), set(structure.options)
        assert found == wanted, f"the constructor takes {sorted(wanted)}, options returns {sorted(found)}: override it"
        assert name in repr(cls(**structure.options)), repr(structure)
    with that("a structure without data says so", name), _raises(StateError):
        structure.matvec(torch.zeros(3))
    for case in CASES:
        of = f"{name} on {case.name}"
        structure = cls(**options)
        with that("update(rows) returns the structure itself", of):
            assert structure.update(case.whole) is structure, "it returned something else"
        dense = _check_matrix(structure, case, definition, of)
        _check_verbs(structure, dense, case, of)
        _check_state(cls, options, structure, dense, case, of)


def _check_matrix(structure: Structure, case: Case, definition: Definition | None, of: str) -> Float[Tensor, "P P"]:
    with that("to_dense() is a symmetric [P, P] in the rows' type", of):
        dense = structure.to_dense()
        P = case.whole.space.size
        assert dense.shape == (P, P), f"it is {list(dense.shape)} with P = {P}"
        assert_close(dense, dense.T, 1e-12)
        assert dense.dtype == DOUBLE, f"it is {dense.dtype}"
    if definition is not None:
        with that("to_dense() is the matrix of the definition", of):
            places = case.whole.space.unflatten(torch.arange(P, dtype=DOUBLE))
            assert_close(dense, definition(case.exact, {name: at.long() for name, at in places.items()}))
    return dense


def _check_verbs(structure: Structure, dense: Float[Tensor, "P P"], case: Case, of: str) -> None:
    P, space = len(dense), structure.space
    v, c = _draw(2, P), _draw(3, case.whole.R)
    values = torch.linalg.eigvalsh(dense)
    rho = float(0.01 * values.max() + 1.5 * values.min().clamp_max(0).abs())
    damped = dense + rho * torch.eye(P, dtype=DOUBLE)
    with that("matvec(v) = F v, for blocks of vectors and vectors by name", of):
        assert_close(_flat(structure, structure.matvec(v)), v @ dense)
        assert_close(_flat(structure, structure.matvec(v[0])), v[0] @ dense)
        assert_close(_flat(structure, structure.matvec(space.unflatten(v))), v @ dense)
    with that("trace(), eigvalsh() and largest_eigenvalue() are those of F", of):
        assert_close(torch.tensor(structure.trace(), dtype=DOUBLE), dense.trace())
        assert_close(structure.eigvalsh(), values, 1e-8)
        assert_close(torch.tensor(structure.largest_eigenvalue(), dtype=DOUBLE), values.max().clamp_min(0), 1e-8)
    with that("solve(v, ρ) = (F + ρI)⁻¹v, absolute and relative ρ", of):
        solved = torch.linalg.solve(damped, v.T).T
        assert_close(_flat(structure, structure.solve(v, rho)), solved, 1e-8)
        relative = f"rel:{rho / structure.largest_eigenvalue()!r}"
        assert_close(_flat(structure, structure.solve(space.unflatten(v), relative)), solved, 1e-6)
    with that("logdet(ρ) = log det(F + ρI)", of):
        assert_close(torch.tensor(structure.logdet(rho), dtype=DOUBLE), torch.linalg.slogdet(damped).logabsdet, 1e-8)
    with that("lift(c, ρ) = (F + ρI)⁻¹Sᵀc", of):
        lifted = torch.linalg.solve(damped, case.whole.dense().T @ c.T).T
        assert_close(space.flatten(structure.lift(c, rho)), lifted, 1e-8)
    with that("response(J, ρ) = J (F + ρI)⁻¹ Jᵀ / count", of):
        model, x, _ = case.data
        J, inverse = dense_jacobian(model, x), torch.linalg.inv(damped)
        assert_close(structure.response(jacobian(model, x), rho), J @ inverse @ J.T / case.whole.count, 1e-8)
        assert_close(
            structure.response(jacobian(model, x), rho, test=jacobian(model, x[:2])),
            dense_jacobian(model, x[:2]) @ inverse @ J.T / case.whole.count,
            1e-8,
        )


def _check_state(
    cls: type[Structure],
    options: Mapping[str, Any],
    structure: Structure,
    dense: Float[Tensor, "P P"],
    case: Case,
    of: str,
) -> None:
    v = _draw(1, len(dense))
    with that("copies, pickles and stored states are the structure", of):
        stored = cls(**options)
        stored.load_state_dict(structure.state_dict())
        again: Structure
        for again in (copy.deepcopy(structure), pickle.loads(pickle.dumps(structure)), stored):
            assert_close(_flat(again, again.matvec(v)), _flat(structure, structure.matvec(v)), 1e-12)
    with that("update(rows, decay=0) replaces the state", of):
        assert_close(cls(**options).update(case.rows(slice(2))).update(case.whole).to_dense(), dense)
    if case.kind != "mc" and cls.passes == 1:
        with that("update(rows, decay=1) adds batches to what one whole batch gives", of):
            parts = cls(**options)
            for some in (slice(0, 1), slice(1, 4)):
                parts.update(case.rows(some), 1.0)
            assert_close(parts.to_dense(), dense, 1e-8)
    with that("a vector of other parameters, an unknown option and a negative decay are refused", of):
        with _raises(ValueError):
            structure.matvec(v[:, :-1])
        with _raises(TypeError, ValueError):
            cls(**{**options, "no_such_option": 1})
        with _raises(ValueError):
            structure.update(case.whole, -0.5)
    with that("float32 rows make a float32 structure, near the float64 one", of):
        single = cls(**options).update(case.rows(dtype=torch.float32))
        assert single.to_dense().dtype == torch.float32, f"it is {single.to_dense().dtype}"
        if case.kind != "mc":
            assert_close(single.to_dense().double(), dense, 1e-3)


@contextmanager
def _raises(*kinds: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kinds:
        return
    raise AssertionError(f"no {' or '.join(kind.__name__ for kind in kinds)} was raised")


def _flat(structure: Structure, vector: Vector) -> Tensor:
    return vector if isinstance(vector, Tensor) else structure.space.flatten(vector)


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
