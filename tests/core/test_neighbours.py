import numpy as np
import pytest

from sae.core.neighbours import Reference

rng = np.random.default_rng(0)
Z, CODES = rng.normal(size=(60, 3)), rng.integers(4, size=60)


def by_hand(point, own, k):
    """Sort all cells but one by their distance."""
    distance = np.linalg.norm(Z - point, axis=1)
    if own >= 0:
        distance[own] = np.inf
    nearest = np.argsort(distance)[:k]
    return distance[nearest].mean(), np.bincount(CODES[nearest], minlength=5) / k


@pytest.mark.parametrize("k", [1, 7])
def test_against_sorting_all(k):
    reference = Reference(Z, CODES, 5, k)
    moved = Z + rng.normal(size=Z.shape)
    own = np.where(np.arange(60) % 3 == 0, -1, np.arange(60))
    found = reference.place(moved, own)
    for i in range(60):
        distance, shares = by_hand(moved[i], own[i], k)
        np.testing.assert_allclose(found.distance[i], distance)
        np.testing.assert_allclose(found.shares[i], shares)


def test_a_cell_is_not_its_own_neighbour():
    reference = Reference(Z, CODES, 5, 5)
    assert (reference.place(Z, np.arange(60)).distance > 0).all()
    apart = np.sort([by_hand(Z[i], i, 5)[0] for i in range(60)])
    np.testing.assert_allclose(reference.outlying, np.quantile(apart, 0.99))


def test_fewer_cells_than_neighbours():
    reference = Reference(Z[:3], CODES[:3], 5, 15)
    assert reference.k == 2
    np.testing.assert_allclose(reference.place(Z[10:12], np.array([-1, -1])).shares.sum(axis=1), 1)


def test_twins_count():
    """A cell with the same latent as another is its neighbour at distance 0."""
    twins = np.repeat(Z[:10], 2, axis=0)
    found = Reference(twins, np.arange(20), 20, 1).place(twins, np.arange(20))
    np.testing.assert_array_equal(found.shares.argmax(axis=1), np.arange(20) ^ 1)
    # Distances from a difference of squares: exact to half of the digits.
    np.testing.assert_allclose(found.distance, 0, atol=1e-6)
