r"""Training speed of linear graph networks: bounds, the terms of the speed, and what a skip connection adds.

Notation of Xu, Zhang, Jegelka & Kawaguchi (2021, arXiv 2105.04550). **Columns are nodes**: features X `[F, N]`, the
propagated features at the n training nodes G_l = (X S^l)_{:,I} `[F, n]`, targets Y `[C, n]`. With layers B_1, …, B_H and
their products B^(1:l) = B_l ⋯ B_1, B^(1:0) = I, the outputs at the training nodes are

    f = Σ_{l ∈ scales} W_l B^(1:l) G_l,        scales {H}: single-scale,  {0, …, H}: multiscale,

so that a model is its heads (scale to W_l) and its layers (B_1 first). The loss is L = ‖f − Y‖_F², **a sum, without ½**,
V = ∂L/∂f = 2(f − Y), and training is gradient flow on all heads and layers, dL/dt = −‖∇L‖².

**Why the bounds hold.** ∂L/∂W_l = V G_lᵀ B^(1:l)ᵀ, thus −dL/dt ≥ Σ_l λ^(l) ‖V G_lᵀ‖² with λ^(l) = λ_min(B^(1:l)ᵀ B^(1:l)).
Let P be the projection onto the row space of G. V Gᵀ = 2(f − Y)P Gᵀ, so ‖V Gᵀ‖² ≥ 4σ²‖(f − Y)P‖² with σ the least
singular value of G that is not zero. With L⋆ = ‖Y(I − P)‖²,

    L − L⋆ = ‖(f − Y)P‖² + ‖(f − Y)(I − P)‖² − ‖Y(I − P)‖²,

and the last two terms cancel if f lies in the row space of G: always for the one scale of a single-scale model and for the
stacked features of a multiscale one, for a single scale l of a multiscale one only if G_l has full column rank. The rest
is Grönwall's inequality (`loss_bound`).

**A floor for λ that holds at all times** (derived, not the paper's). The flow conserves

    C_i = B_i B_iᵀ − B_{i+1}ᵀ B_{i+1} − W_iᵀ W_i        (without a term that the model does not have),

so for square layers λ_min(B_iᵀB_i) = λ_min(B_iB_iᵀ) ≥ λ_min(B_{i+1}ᵀB_{i+1}) + λ_min(C_i): `floor_of_products`. With
orthogonal layers and heads of spectral norm w the floor of a single-scale model is (1 − w²)^l.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from curvlab.theory._checks import array, length, non_negative

Heads = Mapping[int, Float[np.ndarray, "C _"]]
Layers = Sequence[Float[np.ndarray, "_ _"]]
Features = Sequence[Float[np.ndarray, "F n"]]


def layer_products(layers: Layers, features: int) -> list[Float[np.ndarray, "_ F"]]:
    """B^(1:0), …, B^(1:H).

    Args:
        layers: B_1, …, B_H.
        features: F, the size of B^(1:0) = I.

    Raises:
        ValueError: for layers that do not fit one another.
    """
    products = [np.eye(features)]
    for i, layer in enumerate(layers, 1):
        layer = array(f"layer {i}", layer, 2)
        length(f"layer {i}", layer, len(products[-1]), "the width before it", axis=1)
        products.append(layer @ products[-1])
    return products


def linear_outputs(heads: Heads, layers: Layers, features: Features) -> Float[np.ndarray, "C n"]:
    """Outputs at the training nodes, f = Σ_l W_l B^(1:l) G_l.

    Args:
        heads: scale l to W_l.
        layers: B_1, …, B_H.
        features: G_0, …, G_H.

    Raises:
        ValueError: for shapes that do not fit, or a scale without features.
    """
    products = _products(heads, layers, features)
    return np.asarray(sum(head @ products[scale] @ features[scale] for scale, head in heads.items()))


def least_singular_value(features: Float[np.ndarray, "F n"]) -> float:
    """σ_min(G), the min(F, n)-th singular value; 0 below round-off of the largest, as for the rank."""
    values = np.linalg.svd(array("features", features, 2), compute_uv=False)
    return float(values[-1]) if values[-1] > _round_off(values, features.shape) else 0.0


def dependent_nodes(features: Float[np.ndarray, "F n"]) -> Int[np.ndarray, "_"]:
    """The nodes, as columns of G, in which a linear relation between columns has a part; none at full column rank.

    Leaving out as many of them as the rank lacks makes the columns independent.

    Raises:
        ValueError: for a wrong shape or entries that are not finite. Cost O(F n min(F, n) + n³).
    """
    features = array("features", features, 2)
    rows = _row_space(features)
    share = np.linalg.norm(np.eye(features.shape[1]) - rows.T @ rows, axis=0)
    return np.asarray(np.flatnonzero(share > 1e-8))


def optimal_loss(features: Float[np.ndarray, "F n"], targets: Float[np.ndarray, "C n"]) -> float:
    """L⋆ = min_C ‖C G − Y‖², by the projection onto the row space of G.

    Raises:
        ValueError: for wrong shapes or entries that are not finite.
    """
    features, targets = array("features", features, 2), array("targets", targets, 2)
    length("targets", targets, features.shape[1], "one column per training node", axis=1)
    rows = _row_space(features)
    return float(np.square(targets - targets @ rows.T @ rows).sum())


def loss_bound(
    excess: float, floors: Float[np.ndarray, "T"], sigma: float, times: Float[np.ndarray, "T"]
) -> Float[np.ndarray, "T"]:
    """(L(0) − L⋆) exp(−4 λ_T σ_min² T), λ_T the least λ up to T (theorems 1 and 2).

    Args:
        excess: L(0) − L⋆.
        floors: λ_min(B^(1:l)ᵀ B^(1:l)) at the times; for theorem 2 the least over the scales.
        sigma: σ_min of G_H, or of the stacked features.
        times: T, ascending.

    Raises:
        ValueError: for wrong shapes, times that descend, or a negative excess, floor or σ.
    """
    floors, times = array("floors", floors, 1), array("times", times, 1)
    length("times", times, len(floors), "one per floor")
    non_negative("excess", excess)
    non_negative("sigma", sigma)
    non_negative("floors", float(floors.min()))
    if times[0] < 0 or (np.diff(times) < 0).any():
        raise ValueError("times: must ascend from 0 or above, because λ_T is the least λ so far.")
    return np.asarray(excess * np.exp(-4 * np.minimum.accumulate(floors) * sigma**2 * times))


def head_metric(layers: Layers, scale: int, features: int, outputs: int) -> Float[np.ndarray, "_ _"]:
    """F_l = [B^(1:l)ᵀ B^(1:l)] ⊗ I, in which a head's part of the speed is ‖vec[V G_lᵀ]‖².

    Cost O((F C)²); vec is column-major.
    """
    product = layer_products(layers[:scale], features)[-1]
    return np.asarray(np.kron(product.T @ product, np.eye(outputs)))


def layer_jacobian(
    head: Float[np.ndarray, "C _"], layers: Layers, i: int, scale: int, features: int
) -> Float[np.ndarray, "_ _"]:
    """J_{i,l} = B^(1:i−1) ⊗ (W_l B_l ⋯ B_{i+1})ᵀ, 1 ≤ i ≤ l, the derivative of scale l by layer i, transposed.

    Raises:
        ValueError: for i outside 1 … l, or l above the number of layers. Cost that of its entries.
    """
    if not 1 <= i <= scale <= len(layers):
        raise ValueError(f"layer {i} does not lie below scale {scale} of a model with {len(layers)} layers.")
    above = array("head", head, 2)
    for layer in reversed(layers[i:scale]):
        above = above @ layer
    return np.asarray(np.kron(layer_products(layers[: i - 1], features)[-1], above.T))


def speed_terms(
    heads: Heads, layers: Layers, features: Features, V: Float[np.ndarray, "C n"]
) -> tuple[dict[int, float], list[float]]:
    """The terms of −dL/dt: ‖vec[V G_lᵀ]‖²_{F_l} of every head, and ‖Σ_l J_{i,l} vec[V G_lᵀ]‖² of every layer.

    They hold for any loss that is differentiable in f. The Kronecker products are formed, as the paper writes them, for
    models of some tens of weights a layer.

    Args:
        heads: scale l to W_l.
        layers: B_1, …, B_H.
        features: G_0, …, G_H.
        V: ∂L/∂f.

    Raises:
        ValueError: for shapes that do not fit.
    """
    _products(heads, layers, features)
    parts = _layer_parts(heads, layers, features, V)
    F = len(features[0])
    of_heads = {}
    for scale in heads:
        vector = _vec(V, features[scale])
        of_heads[scale] = float(vector @ head_metric(layers, scale, F, len(V)) @ vector)
    return of_heads, [float(np.square(sum(part.values())).sum()) for part in parts]


def speed_gain(
    heads: Heads, layers: Layers, features: Features, V: Float[np.ndarray, "C n"], reference: Collection[int]
) -> tuple[float, float]:
    """What the scales outside `reference` add to −dL/dt at the same V: the part of their heads, and that of the layers.

    The first is Σ_l ‖vec[V G_lᵀ]‖²_{F_l} ≥ 0; the second Σ_i (‖a_i‖² + 2 b_iᵀa_i) has either sign, b_i being layer i's term
    from the reference and a_i that from the other scales. Skip connections: reference {H}; one more layer: {0, …, H − 1}.
    The layers that only new scales use count as new.

    Raises:
        ValueError: for shapes that do not fit.
    """
    of_heads, _ = speed_terms(heads, layers, features, V)
    of_layers = 0.0
    for part in _layer_parts(heads, layers, features, V):
        old = np.zeros(1) + sum(vector for scale, vector in part.items() if scale in reference)
        new = np.zeros(1) + sum(vector for scale, vector in part.items() if scale not in reference)
        of_layers += float(np.square(new).sum() + 2 * (old * new).sum())
    return sum(value for scale, value in of_heads.items() if scale not in reference), of_layers


def conserved(heads: Heads, layers: Layers) -> list[Float[np.ndarray, "_ _"]]:
    """C_i = B_i B_iᵀ − B_{i+1}ᵀ B_{i+1} − W_iᵀ W_i for i = 1, …, H, which gradient flow leaves as they are."""
    constants = []
    for i, layer in enumerate(layers, 1):
        constant = layer @ layer.T
        if i < len(layers):
            constant = constant - layers[i].T @ layers[i]
        if i in heads:
            constant = constant - heads[i].T @ heads[i]
        constants.append(constant)
    return constants


def floor_of_products(heads: Heads, layers: Layers) -> list[float]:
    """Lower bounds on λ_min(B^(1:l)ᵀ B^(1:l)), l = 0, …, H, at all times of a gradient flow that starts here; 0 says nothing.

    Raises:
        ValueError: for layers that are not square, of which the argument knows nothing.
    """
    for i, layer in enumerate(layers, 1):
        if layer.shape[0] != layer.shape[1]:
            raise ValueError(f"layer {i}: has the shape {layer.shape}, but the floor is for square layers.")
    floor, single = 0.0, []
    for constant in reversed(conserved(heads, layers)):
        floor = max(0.0, floor + float(np.linalg.eigvalsh(constant)[0]))
        single.append(floor)
    return [float(value) for value in np.cumprod([1.0, *reversed(single)])]


def initial_speed(
    scales: Collection[int], c: float, features: Features, targets: Float[np.ndarray, "C n"]
) -> dict[int, float]:
    """−dL/dt of every scale at zero heads and layers with BᵀB = cI: 4 c^l ‖Y G_lᵀ‖².

    Args:
        scales: l of the heads.
        c: of each layer, 0 or above; scale l sees c^l.
        features: G_0, …, G_H.
        targets: Y.
    """
    non_negative("c", c)
    return {scale: 4 * c**scale * float(np.square(targets @ features[scale].T).sum()) for scale in scales}


def _products(heads: Heads, layers: Layers, features: Features) -> list[Float[np.ndarray, "_ F"]]:
    """Products of the layers of a model whose parts fit."""
    if not heads or not set(heads) <= set(range(min(len(layers) + 1, len(features)))):
        raise ValueError(
            f"heads: have the scales {sorted(heads)}, but there are {len(layers)} layers and features of "
            f"{len(features)} scales."
        )
    products = layer_products(layers, len(features[0]))
    for scale, head in heads.items():
        name = f"head {scale}"
        length(name, array(name, head, 2), len(products[scale]), "the width that it reads", axis=1)
    return products


def _layer_parts(
    heads: Heads, layers: Layers, features: Features, V: ArrayLike
) -> list[dict[int, Float[np.ndarray, "_"]]]:
    """J_{i,l} vec[V G_lᵀ] of every layer i, by the scales l above it."""
    V, F = array("V", V, 2), len(features[0])
    return [
        {
            scale: layer_jacobian(head, layers, i, scale, F) @ _vec(V, features[scale])
            for scale, head in heads.items()
            if scale >= i
        }
        for i in range(1, len(layers) + 1)
    ]


def _vec(V: Float[np.ndarray, "C n"], features: Float[np.ndarray, "F n"]) -> Float[np.ndarray, "_"]:
    """vec[V Gᵀ], column-major."""
    return np.asarray((V @ features.T).ravel(order="F"))


def _row_space(features: Float[np.ndarray, "F n"]) -> Float[np.ndarray, "_ n"]:
    """Orthonormal rows that span the row space."""
    _, values, right = np.linalg.svd(features, full_matrices=False)
    return np.asarray(right[values > _round_off(values, features.shape)])


def _round_off(values: Float[np.ndarray, "_"], shape: tuple[int, ...]) -> float:
    """Singular values up to this are zero to round-off."""
    return float(values[0] * max(shape) * np.finfo(np.float64).eps)
