"""Maps by blocks, products, steps and spectra of one network at several times of its training."""

import numpy as np
import torch

from analyses.block_structure import partitions, spectra
from analyses.block_structure.config import EMPIRICAL, GGN, HESSIAN, MATRICES, Config
from analyses.block_structure.points import END, MIDDLE, START, nothing
from analyses.block_structure.setting import Point, problem_of, times
from analyses.block_structure.steps import Blocks, best, cosine, full_solver
from curvlab import spectrum
from curvlab.spectrum import (
    DenseOperator,
    Operator,
    Partition,
    block_map,
    by_layer,
    by_tensor,
    by_unit,
    diagonal_part,
)  # fmt: skip
from curvlab.spectrum.blocks import dense_block_map
from curvlab.study import Cell, Context, Observations, generator, observed

PARTITIONS = {"layer": by_layer, "tensor": by_tensor, "unit": by_unit}
TOP = 3
"""Eigenvectors of the largest eigenvalues."""
PROBES = 16
"""Random signs a block, where matrices are not formed."""
SCALED = 16.0
"""‖W_Q‖/‖W_K‖ of the rescaled queries and keys: each by four."""
QUERIES = {"balanced": 1.0, "rescaled": SCALED}
NO_HEADS = "the network has no queries and keys"
"""Why something is outside the assumptions."""


def measure(cell: Cell, context: Context[Config]) -> Observations:
    """Return what is measured of a problem's network at every time; of one that is too large, maps and products alone."""
    config, seed, name = context.config, int(cell["seed"]), str(cell["problem"])
    wanted = {key: int(cell[key]) for key in ("width", "depth") if cell[key]}
    problem = problem_of(config, name, seed, **wanted)
    rows: list[dict[str, object]] = []
    for time, point in times(config, problem, seed):
        for matrix in MATRICES:
            operator: Operator = point.dense(matrix) if cell["dense"] else point.operator(matrix)
            found = _maps(operator, store=time == END and bool(cell["first"]), seed=seed)
            found += _products(operator, point, found[0]["value"], config.directions, seed)
            if isinstance(operator, DenseOperator):
                found += _of_dense(operator, matrix, time, point, config, seed)
            rows += [{**row, "matrix": matrix, "time": time} for row in found]
    return rows


def _maps(operator: Operator, store: bool, seed: int) -> list[dict[str, object]]:
    """Off-block shares, that of layers first, and the map of layers if asked for."""
    dense = isinstance(operator, DenseOperator)
    rows = []
    for name, make in PARTITIONS.items() if dense else [("layer", by_layer)]:
        found = block_map(operator, make(operator.space), probes=PROBES, generator=generator(seed, "signs"))
        rows.append(observed("share", found.share, partition=name, blocks=len(found.names)))
        if store and name == "layer":
            relative = found.relative.numpy(force=True)
            rows += [
                observed("mass", float(value), row=row, column=column, layer=found.names[row])
                for (row, column), value in np.ndenumerate(relative)
            ]
    return rows


def _products(operator: Operator, point: Point, share: object, count: int, seed: int) -> list[dict[str, object]]:
    """Relative errors and cosines of products with the layers' diagonal blocks.

    Of random directions the error is the root of the ratio of mean squares, the cosine the mean.
    """
    blocks = diagonal_part(operator, by_layer(operator.space))
    drawn = torch.randn(
        count if isinstance(operator, DenseOperator) else PROBES, operator.size, dtype=operator.dtype,
        generator=generator(seed, "directions"),
    )  # fmt: skip
    top = spectrum.eigenpairs(operator, min(TOP, operator.size), tolerance=1e-3).vectors
    vectors = {
        "random": drawn.to(operator.device),
        "gradient": point.gradient[None],
        "top": top.reshape(-1, operator.size),
    }
    rows = []
    for name, block in vectors.items():
        exact, kept = operator.matmat(block), blocks.matmat(block)
        norms, errors = exact.square().sum(1), (exact - kept).square().sum(1)
        cosines = torch.nn.functional.cosine_similarity(exact, kept, dim=1).clamp(-1, 1)
        error, alignment = float((errors.sum() / norms.sum()).sqrt()), float(cosines.mean())
        rows += [observed("product_error", error, vectors=name), observed("alignment", alignment, vectors=name)]
        if name == "random" and isinstance(share, float) and 0 < share < 1:
            rows.append(observed("error_ratio", error**2 / share))
            rows.append(observed("alignment_ratio", alignment / (1 - share) ** 0.5))
    return rows


def _of_dense(
    operator: DenseOperator, matrix: str, time: str, point: Point, config: Config, seed: int
) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    if matrix == GGN:
        rows += _steps(operator, point)
    if matrix != EMPIRICAL and time != MIDDLE:
        rows += _spectra(operator, point, densities=time == START and matrix == HESSIAN)
    if matrix == HESSIAN and time == END:
        rows += _within(operator, point, config.permutations, seed)
    if matrix == HESSIAN and time == START:
        rows += _queries(operator, point)
    return rows


def _steps(operator: DenseOperator, point: Point) -> list[dict[str, object]]:
    """The best full step against the best step with layers' blocks, and the anisotropy of the response of these."""
    largest = float(spectrum.eigenpairs(operator, 1).values[0])
    full = best(point, full_solver(operator, point.gradient), largest)
    blocks = Blocks.of(operator, by_layer(operator.space))
    kept = best(point, blocks.solver(point.gradient), largest)
    return [
        observed("step_cosine", cosine(full.step, kept.step)),
        observed("step_gain", kept.gain / full.gain),
        observed("anisotropy", blocks.anisotropy(kept.damping, point.rows.R)),
        observed("matrix_share", block_map(operator, by_layer(operator.space)).share),
    ]


def _spectra(operator: DenseOperator, point: Point, *, densities: bool) -> list[dict[str, object]]:
    """Distances between the spectra of tensors, and their densities if asked for."""
    partition = by_tensor(operator.space)
    found = spectra.spectra_of(operator.matrix, partition)
    kinds = partitions.kinds(point.model)
    matrices = [one for one, name in zip(found, partition.names, strict=True) if kinds[name][0] in partitions.BLOCKS]
    traces = np.array([np.abs(one).sum() for one in found])
    rows = [
        observed("distance", spectra.linear_distance(found), scale="linear", normalised="raw"),
        observed("distance_of_matrices", spectra.linear_distance(matrices)),
        observed("trace_spread", float(np.log10(traces[traces > spectra.NOTHING * traces.max()]).std())),
    ]
    for normalised in spectra.NORMALISATIONS:
        for width in spectra.WIDTHS:
            at = {"scale": "log", "normalised": normalised, "smoothing": width}
            rows.append(observed("distance", spectra.logarithmic_distance(found, normalised, width), **at))
    if densities:
        grid, shown = spectra.log_densities(found)
        rows += [
            observed("density", float(value), tensor=block, kind=kinds[partition.names[block]][0], log10=float(place))
            for block, density in shown.items()
            for place, value in zip(grid, density, strict=True)
        ]
    return rows


def _within(operator: DenseOperator, point: Point, permutations: int, seed: int) -> list[dict[str, object]]:
    """Off-block shares within matrices, cut as Adam-mini does, over those of permuted cuts and of cuts along inputs.

    By kind of cut, the geometric mean over its matrices.
    """
    logs: dict[tuple[str, str], list[float]] = {}
    where = operator.space.unflatten(torch.arange(operator.size, dtype=torch.float64, device="cpu"))
    draws = generator(seed, "permutations")
    for name, (kind, parts) in partitions.kinds(point.model).items():
        if kind not in partitions.BLOCKS or parts < 2:
            continue
        at = where[name].flatten().long().to(operator.device)
        inner = operator.matrix[at[:, None], at]
        if not bool(inner.any()):
            continue
        shape = operator.space.shapes[name]

        def share(labels: torch.Tensor, inner: torch.Tensor = inner) -> float:
            names = tuple(map(str, range(int(labels.max()) + 1)))
            return dense_block_map(inner, Partition(names, labels)).share

        own = partitions.rows_of(shape, parts)
        permuted = [share(own[torch.randperm(len(own), generator=draws)]) for _ in range(permutations)]
        right = max(share(own), 1e-12)
        logs.setdefault(("permuted", kind), []).append(np.log(right / np.mean(permuted)))
        across = partitions.columns_of(shape, parts)
        if int(across.max()) > 0:
            logs.setdefault(("transposed", kind), []).append(np.log(right / share(across)))
        logs.setdefault(("share", kind), []).append(np.log(right))
    rows = [observed(f"within_{what}", float(np.exp(np.mean(v))), kind=kind) for (what, kind), v in logs.items()]
    found = {kind for _, kind in logs}
    rows += [
        {"quantity": f"within_{what}", "kind": kind, **nothing(f"no matrix is cut by {kind}")}
        for kind in partitions.BLOCKS if kind not in found for what in ("permuted", "transposed")
    ]  # fmt: skip
    return rows


def _queries(operator: DenseOperator, point: Point) -> list[dict[str, object]]:
    """Share and distance after queries and keys are balanced or rescaled, over those as they are; the function stays."""
    rows: list[dict[str, object]] = []
    layers, tensors = by_layer(operator.space), by_tensor(operator.space)

    def of(matrix: torch.Tensor) -> dict[str, float]:
        found = spectra.spectra_of(matrix, tensors)
        distance = spectra.logarithmic_distance(found, "raw", spectra.WIDTH)
        return {"share": dense_block_map(matrix, layers).share, "distance": distance}

    own = of(operator.matrix)
    for name, norms in QUERIES.items():
        factors = partitions.balanced_queries(point.model, point.space, norms)
        if factors is None:
            rows += [{"quantity": f"{q}_after", "queries": name, **nothing(NO_HEADS)} for q in own]
            continue
        by = 1 / factors.to(operator.matrix)
        changed = of(by[:, None] * operator.matrix * by)
        rows += [observed(f"{q}_after", changed[q] / own[q], queries=name) for q in own]
    return rows
