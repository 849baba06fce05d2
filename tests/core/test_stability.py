from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest
from scipy import sparse
from scipy.optimize import linear_sum_assignment

from sae.core import stability
from sae.core.preprocess import fit_scaling
from sae.core.stability import Dictionary, compare, curve, nearest_other, pw_mcc, random_dictionaries


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def dictionary(seed: int, h: int = 7, m: int = 4, n: int = 60) -> Dictionary:
    rng = np.random.default_rng(seed)
    a = np.maximum(rng.normal(size=(n, h)) - 0.5, 0)
    return Dictionary(unit(rng.normal(size=(h, m))), sparse.csr_matrix(a.astype(np.float32)))


def matched(similarity: np.ndarray) -> np.ndarray:
    """What each row has with its partner; 0 where that is not above 0."""
    rows, columns = linear_sum_assignment(np.maximum(similarity, 0), maximize=True)
    found = np.zeros(len(similarity))
    found[rows] = np.maximum(similarity[rows, columns], 0)
    return found


def test_agrees_with_dense_arithmetic():
    reference, runs = dictionary(0), [dictionary(seed, h) for seed, h in ((1, 7), (2, 7), (3, 5))]
    result = compare(reference, iter(runs))
    r = np.corrcoef(reference.activations.toarray().T, runs[0].activations.toarray().T)[:7, 7:]
    for number, run in enumerate(runs):
        cosine = reference.directions @ run.directions.T
        np.testing.assert_allclose(result.cosine[number], matched(cosine))
        np.testing.assert_allclose(result.best_cosine[number], cosine.max(axis=1))
    np.testing.assert_allclose(result.correlation[0], matched(r), atol=1e-6)
    np.testing.assert_allclose(result.pw_mcc[0], brute_force_mcc(reference.directions, runs[0].directions))
    assert result.cosine.shape == (3, 7) and result.pw_mcc.shape == (6,)


def brute_force_mcc(a, b):
    similarity = np.abs(a @ b.T)
    return max(similarity[np.arange(len(a)), list(order)].mean() for order in permutations(range(len(b))))


def test_a_permuted_copy_is_the_same():
    reference = dictionary(0)
    order = np.random.default_rng(1).permutation(7)
    copy = Dictionary(reference.directions[order], reference.activations[:, order])
    result = compare(reference, [copy, reference])
    for values in (result.cosine, result.best_cosine, result.correlation, result.pw_mcc, result.found):
        np.testing.assert_allclose(values, 1, atol=1e-6)


def test_dead_features_have_no_part():
    """Neither as features in question nor as partners, except in PW-MCC."""
    reference = dictionary(0)
    a = reference.activations.toarray()
    a[:, 2] = 0
    dead = Dictionary(reference.directions, sparse.csr_matrix(a))
    result = compare(dead, [reference, dead])
    for values in (result.cosine, result.best_cosine, result.correlation, result.found):
        assert np.isnan(values[:, 2]).all() and np.isfinite(np.delete(values, 2, axis=1)).all()
    assert np.isnan(result.nearest_other[2])
    np.testing.assert_allclose(result.pw_mcc, 1)
    alone = compare(reference, [dead])
    assert alone.cosine[0, 2] < 1 and alone.best_cosine[0, 2] == pytest.approx(
        np.delete(reference.directions @ reference.directions[2], 2).max()
    )


def test_an_opposite_direction_is_another_feature():
    reference = dictionary(0, h=1)
    opposite = Dictionary(-reference.directions, reference.activations)
    result = compare(reference, [opposite])
    assert result.cosine[0, 0] == 0 and result.best_cosine[0, 0] == pytest.approx(-1)
    assert result.pw_mcc[0] == pytest.approx(1)


def test_found_again_is_at_most_half_as_far_as_the_nearest_other():
    """By angles, one at a time."""
    a, b = dictionary(0, h=30), dictionary(1, h=30)
    b = Dictionary(unit(a.directions + 0.3 * b.directions), b.activations)
    result = compare(a, [b])
    angles = np.arccos(np.clip(a.directions @ a.directions.T, -1, 1)) + 10 * np.eye(30)
    half = np.minimum(angles.min(axis=1), np.pi / 2) / 2
    np.testing.assert_array_equal(result.found[0], np.arccos(result.cosine[0]) <= half)
    assert 0.1 < result.found.mean() < 0.9


def test_found_again_needs_a_cosine_of_half_a_right_angle():
    orthogonal = Dictionary(np.eye(4)[:2], dictionary(0, h=2).activations)
    for angle, found in ((44, True), (46, False)):
        turn = np.deg2rad(angle)
        turned = Dictionary(np.cos(turn) * np.eye(4)[:2] + np.sin(turn) * np.eye(4)[2:], orthogonal.activations)
        assert (compare(orthogonal, [turned]).found == found).all()


@pytest.mark.parametrize("block", [1, 20, 10**6])
def test_nearest_other(block, monkeypatch):
    directions = dictionary(0).directions
    cosine = directions @ directions.T
    expected = [np.delete(row, i).max() for i, row in enumerate(cosine)]
    monkeypatch.setattr(stability, "BLOCK_VALUES", block)
    np.testing.assert_allclose(nearest_other(directions), expected)
    assert nearest_other(directions[:1]) == [-1]


def test_pw_mcc_of_wide_dictionaries_is_close(monkeypatch):
    """Above the limit it is that of the sparse matching, by signed cosines."""
    rng = np.random.default_rng(0)
    a = unit(rng.normal(size=(40, 8)))
    b = unit(a[rng.permutation(40)] + 0.1 * rng.normal(size=(40, 8)))
    exact = pw_mcc(a, b)
    monkeypatch.setattr(stability, "FULL_PAIRS", 10)
    assert pw_mcc(a, b) == pytest.approx(exact, abs=1e-3)


@pytest.mark.parametrize(("h", "m"), [(64, 10), (30, 200)])
def test_random_directions_are_as_alike_as_simulated_ones(h, m):
    """The cosines of uniform directions with a fixed one are 2 B − 1, B ~ Beta((m − 1)/2, (m − 1)/2)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, m)).astype(np.float32)
    first, *others = random_dictionaries(x, fit_scaling(x, "center"), h, 3.0, [0, 1, 2, 3], of_cells=False)
    result = compare(first, others)
    best = (2 * rng.beta((m - 1) / 2, (m - 1) / 2, size=(20_000, h)) - 1).max(axis=1)
    error = best.std() / np.sqrt(h * 3)
    assert result.best_cosine.mean() == pytest.approx(best.mean(), abs=5 * error)
    simulated = []
    for _ in range(20):
        a, b = (unit(rng.standard_normal((h, m))) for _ in range(2))
        simulated.append(matched(a @ b.T).mean())
    assert result.cosine.mean() == pytest.approx(np.mean(simulated), abs=5 * np.std(simulated) / np.sqrt(3))


@pytest.mark.parametrize("of_cells", [True, False])
@pytest.mark.parametrize("kind", ["center", "whiten", "standardize"])
def test_random_dictionaries_have_the_l0_and_the_coordinates(of_cells, kind):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(500, 6)) * [5, 4, 3, 2, 1, 1] + 3).astype(np.float32)
    scaling = fit_scaling(x, kind)
    y = scaling.transform(x)
    a, b = random_dictionaries(x, scaling, 20, 3.0, [0, 1], of_cells=of_cells)
    assert not np.array_equal(a.directions, b.directions)
    for one in (a, b):
        assert one.activations.nnz / 500 == pytest.approx(3, abs=0.02)
        np.testing.assert_allclose(np.linalg.norm(one.directions, axis=1), 1, rtol=1e-5)
        along = y @ one.directions.T
        active = one.activations.toarray()
        np.testing.assert_allclose(active[active > 0], along[active > 0], rtol=1e-3, atol=1e-3)
        assert along[active == 0].max() <= active[active > 0].min() + 1e-3
        on_a_cell = np.isclose(one.directions @ unit(y).T, 1, atol=1e-5).any(axis=1)
        assert on_a_cell.all() if of_cells else not on_a_cell.any()


def test_more_features_than_cells_and_dense_codes():
    x = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    (one,) = random_dictionaries(x, fit_scaling(x, "center"), 30, 29.5, [0], of_cells=True)
    assert one.activations.shape == (12, 30) and one.activations.data.min() > 0


def test_curve():
    values, thresholds = np.array([0.2, np.nan, 0.5, 0.9]), np.array([0, 0.2, 0.21, 0.5, 0.9, 1])
    expected = [np.mean([v >= t for v in (0.2, 0.5, 0.9)]) for t in thresholds]
    np.testing.assert_allclose(curve(values, thresholds), expected)
    assert np.isnan(curve(np.full(2, np.nan), thresholds)).all()


def test_every_pair_of_runs_counts_once():
    dictionaries = [dictionary(seed) for seed in range(4)]
    result = compare(dictionaries[0], dictionaries[1:])
    pairs = [brute_force_mcc(a.directions, b.directions) for a, b in combinations(dictionaries, 2)]
    np.testing.assert_allclose(result.pw_mcc, pairs)
