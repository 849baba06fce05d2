import numpy as np
import pytest

from sae.core.arrows import averaged, shifts

rng = np.random.default_rng(0)
Z, PLACES = rng.normal(size=(60, 3)), rng.normal(size=(60, 2))
OWN = np.where(np.arange(60) % 3 == 0, -1, np.arange(60))


def nearest(point, own, k):
    """Sort all cells but one by their distance."""
    distance = np.linalg.norm(Z - point, axis=1)
    if own >= 0:
        distance[own] = np.inf
    found = np.argsort(distance)[:k]
    return distance[found].mean(), PLACES[found].mean(axis=0)


@pytest.mark.parametrize("k", [1, 7])
def test_against_sorting_all(k):
    after = Z + 0.7 * rng.normal(size=Z.shape)
    found, outlying = shifts(Z, PLACES, Z, after, OWN, k)
    limit = np.quantile([nearest(Z[i], i, k)[0] for i in range(60)], 0.99)
    for i in range(60):
        (distance, there), (_, here) = nearest(after[i], OWN[i], k), nearest(Z[i], OWN[i], k)
        np.testing.assert_allclose(found[i], there - here)
        assert outlying[i] == (distance > limit)
    assert 0 < outlying.sum() < 60


def test_cells_that_stay_are_not_shifted():
    found, outlying = shifts(Z, PLACES, Z, Z, np.arange(60), 5)
    assert not found.any() and outlying.sum() == 1


def test_fewer_cells_than_neighbours():
    found, _ = shifts(Z[:3], PLACES[:3], Z[:1], Z[1:2] + 1e-6, np.array([0]), 15)
    np.testing.assert_allclose(found, [[0, 0]])


def test_averages_by_hand():
    places = np.array([[0.0, 0.0], [0.2, 0.4], [9.9, 0.1], [10.0, 0.3], [5.0, 0.0]])
    shift = np.array([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.0, -2.0], [7.0, 7.0]])
    found = averaged(places, shift, np.array([True, False, True, True, False]), places, n_grid=5, min_cells=2)
    np.testing.assert_allclose(found.place, [[0.1, 0.2], [9.95, 0.2]])
    np.testing.assert_allclose(found.shift, [[2, 0], [0, 0]])
    np.testing.assert_allclose(found.agreement, [1, 0])
    np.testing.assert_allclose(found.outlying, [0.5, 1])
    assert found.n_cells.tolist() == [2, 2]


def test_squares_are_square():
    """Along the shorter side there are fewer of them."""
    x, y = np.meshgrid(np.linspace(0, 10, 101), np.linspace(0, 5, 51))
    places = np.column_stack([x.ravel(), y.ravel()])
    found = averaged(places, np.ones_like(places), np.zeros(len(places), bool), places, 4, 1)
    assert found.n_cells.sum() == len(places)
    np.testing.assert_allclose(np.unique(found.place[:, 0].round(0)).size, 4)
    assert np.unique(found.place[:, 1] // 2.5).size == 2 + (found.place[:, 1] == 5).any()


def test_one_place():
    found = averaged(np.zeros((4, 2)), np.ones((4, 2)), np.ones(4, bool), np.zeros((4, 2)), 20, 1)
    assert found.n_cells.tolist() == [4] and found.agreement[0] == pytest.approx(1)


def test_squares_are_those_of_the_whole_picture():
    """However few cells of it are moved."""
    picture = np.array([[-5.0, 0.0], [5.0, 10.0]])
    places = np.array([[0.1, 0.2], [0.9, 0.8], [1.2, 0.1]])
    found = averaged(places, np.ones((3, 2)), np.zeros(3, bool), picture, 10, 1)
    np.testing.assert_allclose(found.place, [[0.5, 0.5], [1.2, 0.1]])
