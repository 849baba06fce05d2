from __future__ import annotations

import numpy as np
import pytest

from sae.core.bootstrap import resamples
from sae.core.fidelity import components, kept_neighbors, nearest_cosine, right_votes, unexplained
from sae.core.mixing import neighbors, vote_accuracy


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("block", [8_000_000, 35], ids=["one block", "blocks"])
def test_unexplained_is_that_of_repeated_cells(rng, monkeypatch, block):
    monkeypatch.setattr("sae.core.fidelity.BLOCK_VALUES", block)
    x = rng.normal(size=(40, 5)) + 10
    x_hat = x + rng.normal(size=x.shape) / 3
    weights = resamples(np.zeros(40, int), 4, rng)
    for found, weight in zip(unexplained(x, x_hat, weights), weights, strict=True):
        rows = np.repeat(np.arange(40), weight.astype(int))
        error = ((x[rows] - x_hat[rows]) ** 2).sum()
        assert found == pytest.approx(error / ((x[rows] - x[rows].mean(axis=0)) ** 2).sum())


def test_components_are_those_of_the_singular_value_decomposition(rng):
    x = rng.normal(size=(30, 6)) @ rng.normal(size=(6, 6)) + 5
    seen = x[:20]
    scores, x_hat = components(seen, x, 2, 0)
    right = np.linalg.svd(seen - seen.mean(axis=0))[2][:2]
    expected = (x - seen.mean(axis=0)) @ right.T
    np.testing.assert_allclose(np.abs(scores), np.abs(expected), atol=1e-9)
    np.testing.assert_allclose(x_hat, seen.mean(axis=0) + expected @ right, atol=1e-9)


def test_neighbours_against_brute_force(rng):
    x, y, codes, k = rng.normal(size=(40, 4)), rng.normal(size=(40, 4)), rng.integers(3, size=40), 5
    near, other = neighbors(x, k), neighbors(y, k)
    right, kept = right_votes(near, codes), kept_neighbors(near, other)
    for cell in range(40):
        lists = []
        for space in (x, y):
            distance = np.linalg.norm(space - space[cell], axis=1)
            distance[cell] = np.inf
            lists.append(set(np.argsort(distance)[:k]))
        assert kept[cell] == len(lists[0] & lists[1]) / k
        votes = np.bincount(codes[list(lists[0])], minlength=3)
        assert right[cell] == (votes.argmax() == codes[cell])
    assert right.mean() == vote_accuracy(near, codes)
    assert (kept_neighbors(near, near[:, ::-1]) == 1).all()


@pytest.mark.parametrize("block", [8_000_000, 7], ids=["one block", "blocks"])
def test_nearest_cosine_against_all_pairs(rng, monkeypatch, block):
    monkeypatch.setattr("sae.core.fidelity.BLOCK_VALUES", block)
    rows = rng.normal(size=(12, 5)) * rng.uniform(0.1, 10, size=(12, 1))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -2)
    np.testing.assert_allclose(nearest_cosine(rows), cosines.max(axis=1), atol=1e-6)


def test_nearest_cosine_of_few():
    assert np.isnan(nearest_cosine(np.ones((1, 3)))).all()
    assert nearest_cosine(np.ones((0, 3))).shape == (0,)
    np.testing.assert_allclose(nearest_cosine(np.array([[1.0, 0], [0, 0], [2, 0]])), [1, 0, 1])
