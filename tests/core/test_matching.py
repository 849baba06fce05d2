from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from scipy.stats import pearsonr
from sklearn.metrics import jaccard_score

from sae.core import matching, similarity
from sae.core.matching import match_activations, match_sets, match_vectors, mirrored, paired_correlations
from sae.core.similarity import Vectors


@pytest.fixture(params=["all pairs", "nearest"])
def way(request, monkeypatch):
    """Both ways to the matching, whatever the number of features."""
    monkeypatch.setattr(matching, "FULL_PAIRS", 10**9 if request.param == "all pairs" else 0)
    # More than one block of rows.
    monkeypatch.setattr(similarity, "BLOCK_VALUES", 700)
    return request.param


def draw(h: int, m: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(h, m))


def activations(n: int, h: int, density: float, seed: int = 0) -> sparse.csr_matrix:
    rng = np.random.default_rng(seed)
    return sparse.csr_matrix(np.where(rng.random((n, h)) < density, rng.exponential(size=(n, h)), 0))


def cosines(a, b):
    return (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T


def correlations(a, b):
    return np.array([[pearsonr(x, y).statistic for y in b.toarray().T] for x in a.toarray().T])


def jaccard(a, b):
    return np.array([[jaccard_score(x, y) for y in b.toarray() > 0] for x in a.toarray() > 0])


def assert_is_of(found, similarity):
    """Check all fields against the full matrix of similarities."""
    paired = np.flatnonzero(found.partner >= 0)
    assert len(set(found.partner[paired])) == len(paired), "one to one"
    np.testing.assert_allclose(found.similarity[paired], similarity[paired, found.partner[paired]], atol=1e-12)
    assert (found.similarity[paired] > 0).all()
    assert np.isnan(found.similarity[found.partner < 0]).all()
    for best, nearest, matrix in (
        (found.best, found.nearest, similarity),
        (found.best_b, found.nearest_b, similarity.T),
    ):
        np.testing.assert_allclose(best, matrix.max(axis=1), atol=1e-12)
        np.testing.assert_allclose(matrix[np.arange(len(matrix)), nearest], best, atol=1e-12)
    rows, columns = linear_sum_assignment(np.maximum(similarity, 0), maximize=True)
    assert np.nansum(found.similarity) == pytest.approx(np.maximum(similarity, 0)[rows, columns].sum())
    mutual = [
        partner >= 0 and similarity[i].argmax() == partner and similarity[:, partner].argmax() == i
        for i, partner in enumerate(found.partner)
    ]
    np.testing.assert_array_equal(found.reciprocal, mutual)


@pytest.mark.parametrize(("h_a", "h_b"), [(40, 40), (40, 25), (25, 40), (40, 1), (1, 40)])
def test_vectors(way, h_a, h_b):
    a, b = draw(h_a, 12), draw(h_b, 12, seed=1)
    assert_is_of(match_vectors(a, b), cosines(a, b))


@pytest.mark.parametrize("density", [0.06, 0.5], ids=["sparse", "dense"])
def test_activations(way, density):
    a, b = activations(150, 30, density), activations(150, 20, density, seed=1)
    assert_is_of(match_activations(a, b), correlations(a, b))
    dense = match_activations(a.toarray(), b.astype(np.float32))
    np.testing.assert_allclose(dense.best, match_activations(a, b).best, atol=1e-6)


def test_sets(way):
    a, b = activations(30, 25, 0.4), activations(20, 25, 0.4, seed=1)
    assert_is_of(match_sets(a, b), jaccard(a, b))


def test_the_best_of_all_permutations():
    a, b = draw(6, 4), draw(6, 4, seed=1)
    similarity = np.maximum(cosines(a, b), 0)
    best = max(similarity[np.arange(6), list(order)].sum() for order in permutations(range(6)))
    assert np.nansum(match_vectors(a, b).similarity) == pytest.approx(best)


@pytest.mark.parametrize("h", [60, 3_000], ids=["all pairs", "nearest"])
def test_permuted_features_are_all_found(h):
    rng = np.random.default_rng(0)
    order = rng.permutation(h)
    vectors, a = draw(h, 20), sparse.random(600, h, 0.02, "csr", random_state=0)
    assert (h * h > matching.FULL_PAIRS) == (h == 3_000)
    for found in (match_vectors(vectors, vectors[order]), match_activations(a, a[:, order])):
        alive = found.partner >= 0
        assert alive.mean() > 0.99
        np.testing.assert_array_equal(order[found.partner[alive]], np.flatnonzero(alive))
        np.testing.assert_allclose(found.similarity[alive], 1)
        assert found.reciprocal[alive].all()


def test_the_nearest_are_as_good_as_all_when_thousands_are_unrelated(monkeypatch):
    a, b = draw(1_500, 20), draw(1_200, 20, seed=1)
    full = match_vectors(a, b)
    monkeypatch.setattr(matching, "FULL_PAIRS", 0)
    nearest = match_vectors(a, b)
    assert np.nansum(nearest.similarity) == pytest.approx(np.nansum(full.similarity), rel=1e-4)
    np.testing.assert_array_equal(nearest.nearest, full.nearest)


def test_those_left_over_are_matched_among_themselves(monkeypatch):
    """200 features that all have the same 32 nearest."""
    a, b = np.ones((200, 2)), np.ones((200, 2))
    b[32:, 0] = np.linspace(0.5, 0.9, 168)
    monkeypatch.setattr(matching, "FULL_PAIRS", 0)
    found = match_vectors(a, b)
    assert sorted(found.partner) == list(range(200))
    assert np.nansum(found.similarity) == pytest.approx(cosines(a, b)[0].sum())


def test_ties_do_not_add_to_the_nearest():
    same, _ = Vectors.alive(np.ones((200, 2)))
    (rows, _, similarity), _ = matching._nearest(same, same)
    np.testing.assert_array_equal(np.bincount(rows), matching.N_NEAREST)
    np.testing.assert_allclose(similarity, 1)


def test_dead_features_have_no_partner(way):
    a, b = draw(5, 8), draw(6, 8, seed=1)
    a[2], b[3] = 0, 0
    found = match_vectors(a, b)
    assert (found.partner[2], found.nearest[2], found.nearest_b[3]) == (-1, -1, -1)
    assert np.isnan([found.similarity[2], found.best[2], found.best_b[3]]).all()
    assert 3 not in found.partner and 3 not in found.nearest and 2 not in found.nearest_b
    rest = match_vectors(np.delete(a, 2, axis=0), np.delete(b, 3, axis=0))
    assert np.nansum(found.similarity) == pytest.approx(np.nansum(rest.similarity))

    silent = activations(50, 4, 0.5).toarray()
    silent[:, 1], silent[:, 2] = 0, 0.7
    found = match_activations(silent, silent)
    assert found.partner.tolist() == [0, -1, -1, 3]


@pytest.mark.parametrize("h_a", [0, 4])
def test_nothing_to_match(h_a):
    found = match_vectors(np.zeros((h_a, 3)), draw(3, 3))
    assert (found.partner == -1).all() and (found.nearest_b == -1).all() and not found.reciprocal.any()
    assert len(found.partner) == h_a and np.isnan(found.best_b).all()
    empty = match_vectors(draw(h_a, 3), draw(0, 3))
    assert (empty.partner == -1).all() and not empty.reciprocal.any()


def test_opposite_directions_are_no_pair(way):
    a = np.eye(3)
    found = match_vectors(a, np.stack([-a[0], a[1], -a[2]]))
    assert found.partner.tolist() == [-1, 1, -1]
    assert found.best.tolist() == [0, 1, 0]


def test_correlations_far_from_zero_are_as_exact(way):
    """A feature that is on everywhere, at 1,000 ± 1."""
    values = activations(200, 5, 0.6).toarray()
    values[:, 0] = 1000 + np.random.default_rng(2).normal(size=200)
    a, b = sparse.csr_matrix(values), sparse.csr_matrix(values[:, ::-1])
    assert_is_of(match_activations(a, b), correlations(a, b))


def test_paired_correlations():
    a, b = activations(80, 6, 0.4), activations(80, 5, 0.4, seed=1)
    b.data[b.indices == 3] = 0
    left, right = np.array([0, 5, 2, 2]), np.array([4, 0, 3, 1])
    r = paired_correlations(a, b, left, right)
    expected = [
        np.nan if j == 3 else pearsonr(a.toarray()[:, i], b.toarray()[:, j]).statistic
        for i, j in zip(left, right, strict=True)
    ]
    np.testing.assert_allclose(r, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("function", "a", "b", "message"),
    [
        (match_vectors, np.ones((3, 4)), np.ones((3, 5)), "expected matrices with the same number of columns"),
        (match_vectors, np.ones(3), np.ones((3, 5)), "expected matrices"),
        (match_vectors, np.array([[1, np.nan]]), np.ones((3, 2)), "1 values of the vectors are not finite"),
        (match_activations, np.ones((3, 4)), np.ones((5, 4)), "3 and 5 cells; expected the same cells"),
        (match_activations, np.array([[np.inf], [1]]), np.ones((2, 2)), "1 activations are not finite"),
        (match_sets, sparse.eye(3, 4, format="csr"), sparse.eye(3, format="csr"), "same number of possible members"),
    ],
    ids=["widths", "one row", "nan", "cells", "infinite", "members"],
)
def test_bad_input(function, a, b, message):
    with pytest.raises(ValueError, match=message):
        function(a, b)


def unrelated(h: int, d: int, steepness: float, rng: np.random.Generator) -> np.ndarray:
    """Sparse directions in a space of which the first axes hold most, as a decoder of expression or of components has them."""
    rows = rng.exponential(size=(h, d)) * rng.choice([-1, 1], (h, d)) * np.arange(1.0, d + 1) ** -steepness
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("steepness", [0, 1, 2])
def test_mirrored_vectors_are_as_alike_as_unrelated_ones(steepness):
    """Also where few axes have most of the variance. Uniform directions are much less alike there."""
    rng = np.random.default_rng(1)
    turned = np.linalg.qr(rng.normal(size=(20, 20)))[0]
    a, b = (unrelated(300, 20, steepness, rng) @ turned for _ in range(2))
    by_chance = np.concatenate([match_vectors(a, mirrored(b, rng)).similarity for _ in range(4)])
    assert 0.02 < np.mean(match_vectors(a, b).similarity > np.nanquantile(by_chance, 0.95)) < 0.12
    if steepness == 2:
        uniform = match_vectors(a, draw(300, 20)).similarity
        assert np.mean(match_vectors(a, b).similarity > np.nanquantile(uniform, 0.95)) > 0.5


def test_mirrored_vectors_lie_along_the_same_axes():
    rng = np.random.default_rng(0)
    b = unrelated(4_000, 5, 1, rng)
    b[7] = 0
    other = mirrored(b, rng)
    np.testing.assert_allclose(np.linalg.norm(other, axis=1), np.linalg.norm(b, axis=1))
    np.testing.assert_allclose(other.T @ other, b.T @ b, atol=60)
    assert abs((other * b).sum(axis=1).mean()) < 0.05
    # None is left as it was where all axes are as long: the rows themselves are not what is mirrored at.
    assert np.abs(mirrored(np.eye(40), rng)).max() < 0.9
    assert mirrored(np.empty((0, 3)), rng).shape == (0, 3)
    few = draw(3, 20)
    np.testing.assert_allclose(np.linalg.norm(mirrored(few, rng), axis=1), np.linalg.norm(few, axis=1))
