from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from sklearn.metrics import roc_auc_score

from sae.core.bootstrap import (
    donor_resamples,
    held_out_auroc,
    interval,
    mean_of_known,
    of_chosen,
    resamples,
    weighted_mean,
)
from sae.core.labels import cross_fit, stratified_halves


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_resamples_keep_the_size_of_every_group(rng):
    groups = rng.integers(4, size=50)
    weights = resamples(groups, 30, rng)
    assert weights.shape == (31, 50)
    assert (weights[0] == 1).all()
    for group in range(4):
        assert (weights[:, groups == group].sum(axis=1) == (groups == group).sum()).all()
    # Var of a multinomial count is 1 − 1/m.
    assert 0.7 < weights[1:].var() < 1.1


def test_donors_are_drawn_whole(rng):
    donors = rng.integers(5, size=60)
    weights = donor_resamples(donors, 20, rng)
    per_donor = np.stack([[weights[b, donors == donor][0] for donor in range(5)] for b in range(21)])
    np.testing.assert_array_equal(weights, per_donor[:, donors])
    assert (per_donor.sum(axis=1) == 5).all()
    assert (per_donor[0] == 1).all()


def test_weighted_mean_is_that_of_repeated_cells(rng):
    values, weights = rng.normal(size=20), resamples(np.zeros(20, int), 3, rng)
    expected = [np.repeat(values, weight.astype(int)).mean() for weight in weights]
    np.testing.assert_allclose(weighted_mean(values, weights), expected)


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_auroc_is_that_of_repeated_cells(rng, ties):
    n, n_labels, n_splits = 60, 3, 2
    codes = rng.integers(n_labels, size=n)
    halves = stratified_halves(codes, n_splits, rng)
    scores = rng.normal(size=(n_splits, n_labels, n))
    scores = np.round(scores) if ties else scores
    weights = resamples(codes, 5, rng)
    found = held_out_auroc(scores, codes, halves, weights)
    for b, weight in enumerate(weights):
        for label in range(n_labels):
            each = []
            for split in range(n_splits):
                for p in range(2):
                    rows = np.repeat(np.arange(n), (weight * (halves[split] == p)).astype(int))
                    each.append(roc_auc_score(codes[rows] == label, scores[split, label, rows]))
            assert found[b, label] == pytest.approx(np.mean(each))


def test_the_estimate_is_that_of_cross_fit(rng):
    codes = rng.integers(3, size=80)
    x = np.maximum(rng.normal(size=(80, 12)) + (codes[:, None] == np.arange(12) % 3), 0)
    halves = stratified_halves(codes, 3, rng)
    for columns in (x, sparse.csr_matrix(x)):
        fit = cross_fit(columns, codes, 3, halves)
        scores = of_chosen(columns, fit.chosen, halves)
        found = held_out_auroc(scores, codes, halves, np.ones((1, 80)))
        np.testing.assert_allclose(found[0], fit.held_out_auroc.mean(axis=(0, 1)))


def test_each_cell_is_scored_by_the_choice_of_the_other_half():
    x = np.arange(12.0).reshape(4, 3)
    halves = np.array([[0, 0, 1, 1]])
    chosen = np.array([[[2], [0]]])
    np.testing.assert_array_equal(of_chosen(x, chosen, halves)[0, 0], [x[0, 0], x[1, 0], x[2, 2], x[3, 2]])


def test_a_label_in_one_half_only_is_not_scored():
    codes, halves = np.array([0, 0, 0, 1]), np.array([[0, 1, 0, 1]])
    fit = cross_fit(np.eye(4), codes, 2, halves)
    scores = of_chosen(np.eye(4), fit.chosen, halves)
    assert np.isnan(scores).all()
    assert np.isnan(held_out_auroc(scores, codes, halves, np.ones((3, 4)))).all()


def test_intervals_cover(rng):
    """The mean of 40 normal values lies in its interval in 19 of 20 experiments."""
    covered = 0
    for _ in range(300):
        values = rng.normal(size=40)
        value, low, high = interval(weighted_mean(values, resamples(np.zeros(40, int), 200, rng)))
        assert low < value < high
        covered += low < 0 < high
    assert 0.88 < covered / 300 < 0.98


def test_interval_leaves_out_what_is_not_known():
    samples = np.array([0.5, *np.linspace(0, 1, 101), np.nan])
    assert interval(samples) == pytest.approx((0.5, 0.025, 0.975))
    assert np.isnan(interval(np.array([0.5]))[1:]).all()
    assert np.isnan(interval(np.array([np.nan, 1, 2])))[0]
    np.testing.assert_array_equal(mean_of_known(np.array([[1, np.nan], [3, np.nan]]), 0), [2, np.nan])
