"""The Forster transform: what it promises, on points where it exists and where it does not."""

from inspect import unwrap

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from curvlab import theory


def published_iteration(points, iterations):
    """Z ← Z(ZᵀZ + 10⁻⁷I)^{-½}, rows scaled to length one, as in the published code."""
    Z = points / np.linalg.norm(points, axis=1, keepdims=True)
    for _ in range(iterations):
        values, vectors = np.linalg.eigh(Z.T @ Z + 1e-7 * np.eye(Z.shape[1]))
        Z = Z @ (vectors / np.sqrt(values) @ vectors.T)
        Z /= np.linalg.norm(Z, axis=1, keepdims=True)
    return Z


@example(dimension=2, surplus=2.0, decay=3.0, seed=31803)  # of two close directions, after thousands of iterations
@given(dimension=st.integers(1, 8), surplus=st.floats(1.3, 6), decay=st.floats(0, 3), seed=st.integers(0, 10**6))
@settings(max_examples=40)
def test_transformed_points_are_isotropic_unit_vectors(dimension, surplus, decay, seed):
    rng = np.random.default_rng(seed)
    count = int(np.ceil(dimension * surplus))
    points = rng.normal(size=(count, dimension)) * 10 ** (-decay * np.arange(dimension) / dimension)
    transform = theory.forster_transform(points, tolerance=1e-9, max_iterations=20_000)
    Z = transform.apply(points)
    np.testing.assert_allclose(np.linalg.norm(Z, axis=1), 1, atol=1e-12)
    gram = Z.T @ Z
    target = count / dimension * np.eye(dimension)
    assert np.linalg.norm(gram - target) / np.linalg.norm(target) < 1.01e-9
    bound = 1e-9 * np.sqrt(dimension)
    np.testing.assert_allclose(theory.leverages(Z), dimension / count, rtol=2 * bound + 1e-11)


def test_agrees_with_the_published_iteration():
    points = np.random.default_rng(0).normal(size=(30, 6)) + 0.5
    Z = theory.forster_transform(points, tolerance=1e-10).apply(points)
    reference = published_iteration(points, 200)
    np.testing.assert_allclose(Z @ Z.T, reference @ reference.T, atol=1e-6)


def test_unique_up_to_a_rotation_and_independent_of_linear_maps_and_scales():
    rng = np.random.default_rng(1)
    points = rng.normal(size=(25, 4))
    moved = rng.uniform(0.1, 10, size=(25, 1)) * points @ rng.normal(size=(4, 4))
    Z = theory.forster_transform(points, tolerance=1e-11).apply(points)
    Z_moved = theory.forster_transform(moved, tolerance=1e-11).apply(moved)
    np.testing.assert_allclose(np.abs(Z @ Z.T), np.abs(Z_moved @ Z_moved.T), atol=1e-8)


def test_test_points_go_through_the_same_map():
    rng = np.random.default_rng(2)
    points, other = rng.normal(size=(20, 3)), rng.normal(size=(5, 3))
    transform = theory.forster_transform(points)
    image = other @ transform.matrix
    np.testing.assert_allclose(transform.apply(other), image / np.linalg.norm(image, axis=1, keepdims=True), atol=1e-14)
    assert transform.apply(other).shape == (5, 3)
    assert transform.deviation < 1e-8
    assert np.linalg.norm(transform.matrix, 2) == pytest.approx(1)
    separately = theory.forster_transform(other).apply(other)
    assert np.abs(separately @ separately.T - transform.apply(other) @ transform.apply(other).T).max() > 1e-2


def test_as_many_points_as_dimensions_become_orthonormal():
    points = np.random.default_rng(3).normal(size=(6, 6))
    Z = theory.forster_transform(points).apply(points)
    np.testing.assert_allclose(Z @ Z.T, np.eye(6), atol=1e-8)


def test_isotropic_points_stay():
    angles = np.arange(5) * np.pi / 5
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    transform = theory.forster_transform(points)
    assert transform.iterations == 0
    np.testing.assert_allclose(transform.apply(points), points, atol=1e-12)


def test_stops_at_the_published_tolerance():
    points = np.random.default_rng(4).normal(size=(50, 10))
    loose = theory.forster_transform(points, tolerance=1e-3, max_iterations=100)
    assert 1e-8 < loose.deviation < 1e-3
    assert loose.iterations < theory.forster_transform(points).iterations


def test_a_crowded_subspace_is_named():
    """Seven of ten points in a plane of three dimensions, which may hold fewer than 20/3."""
    rng = np.random.default_rng(5)
    points = rng.normal(size=(10, 3))
    points[:7, 2] = 0
    with pytest.raises(ValueError, match="about 7 of 10 points lie close to a subspace of dimension 2 of 3"):
        theory.forster_transform(points @ rng.normal(size=(3, 3)))


def test_forster_errors():
    rng = np.random.default_rng(6)
    points = rng.normal(size=(8, 3))
    transform = theory.forster_transform(points)
    with pytest.raises(ValueError, match="points: row 2 is zero and has no direction"):
        theory.forster_transform(np.where(np.arange(8)[:, None] == 2, 0, points))
    with pytest.raises(ValueError, match="2 points cannot be isotropic in 3 dimensions"):
        theory.forster_transform(points[:2])
    with pytest.raises(ValueError, match="they span only 2 of 3 dimensions"):
        theory.forster_transform(points * [1, 1, 0])
    with pytest.raises(ValueError, match="no radial isotropic position after 1 iterations"):
        theory.forster_transform(points, max_iterations=1)
    with pytest.raises(ValueError, match="tolerance"):
        theory.forster_transform(points, tolerance=0.0)
    with pytest.raises(ValueError, match="max_iterations"):
        theory.forster_transform(points, max_iterations=0)
    with pytest.raises(ValueError, match="points: axis 1 has 2 entries but must have 3"):
        transform.apply(points[:, :2])
    with pytest.raises(ValueError, match="points: row 0 is zero"):
        transform.apply(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="expected a non-empty array with 2 axes"):
        unwrap(theory.forster_transform)(points[0])
