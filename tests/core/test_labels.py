from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse, stats
from sklearn.metrics import f1_score, roc_auc_score

from sae.core import columns, label_scan, moments
from sae.core.labels import (
    cross_fit,
    differences,
    donor_halves,
    score_and_cross_fit,
    score_labels,
    stratified_halves,
    trend,
)
from sae.core.rows import Rows


def activations(n=60, h=5, *, density=0.4, tied=False, seed=0):
    """Dense (n, h); the last feature is never active."""
    rng = np.random.default_rng(seed)
    values = rng.integers(1, 4, size=(n, h)) / 2 if tied else rng.uniform(0.1, 2, size=(n, h))
    a = np.where(rng.random((n, h)) < density, values, 0)
    a[:, -1] = 0
    return a.astype(np.float32)


def labels(n=60, n_labels=3, *, seed=1):
    return np.random.default_rng(seed).permutation(np.arange(n) % n_labels)


ACTIVATIONS = {
    "sparse": {},
    "ties": {"tied": True},
    "always active": {"density": 1.1},
    "always active with ties": {"density": 1.1, "tied": True},
    "rare": {"density": 0.05},
    # The cube of the number of inactive cells does not fit 32 bits.
    "many cells": {"n": 3000, "density": 0.1},
}
each_activation = pytest.mark.parametrize("made", ACTIVATIONS.values(), ids=ACTIVATIONS)


def each_pair(a, n_labels=3):
    """Yield label, feature, inside the label (n,), activation (n,)."""
    codes = labels(len(a), n_labels)
    for label in range(n_labels):
        for feature in range(a.shape[1]):
            yield label, feature, codes == label, a[:, feature].astype(np.float64)


def scored(a, n_labels=3):
    return score_labels(sparse.csr_matrix(a), labels(len(a), n_labels), n_labels)


@each_activation
def test_auroc_is_that_of_sklearn(made):
    a = activations(**made)
    auroc = scored(a).auroc
    for label, feature, inside, values in each_pair(a):
        np.testing.assert_allclose(auroc[label, feature], roc_auc_score(inside, values), rtol=1e-12)


@each_activation
def test_p_value_is_that_of_the_mann_whitney_test(made):
    a = activations(**made)
    pval = scored(a).pval
    for label, feature, inside, values in each_pair(a):
        if values.any():
            expected = stats.mannwhitneyu(values[inside], values[~inside], method="asymptotic").pvalue
            np.testing.assert_allclose(pval[label, feature], expected, rtol=1e-10)


@each_activation
def test_f1_is_the_best_over_all_thresholds_above_zero(made):
    a = activations(**{**made, "n": 60})
    f1 = scored(a).f1
    for label, feature, inside, values in each_pair(a):
        thresholds = np.unique(values[values > 0])
        expected = max((f1_score(inside, values >= threshold) for threshold in thresholds), default=0)
        np.testing.assert_allclose(f1[label, feature], expected, rtol=1e-12)


@each_activation
def test_difference_and_standard_error_are_those_of_numpy(made):
    a = activations(**made)
    scores = scored(a)
    for label, feature, inside, values in each_pair(a):
        groups = values[inside], values[~inside]
        difference = groups[0].mean() - groups[1].mean()
        error = sum(group.std(ddof=1) / np.sqrt(len(group)) for group in groups)
        np.testing.assert_allclose(scores.difference[label, feature], difference, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(scores.standard_error[label, feature], error, rtol=1e-7, atol=1e-12)
        if values.any():
            interval = stats.ttest_ind(*groups, equal_var=False).confidence_interval()
            found = scores.ci_low[label, feature], scores.ci_high[label, feature]
            np.testing.assert_allclose(found, interval, rtol=1e-7, atol=1e-10)


def test_feature_that_is_never_active_tells_nothing():
    scores = scored(np.zeros((30, 2)))
    assert (scores.auroc == 0.5).all()
    assert (scores.pval == 1).all()
    for values in (scores.f1, scores.difference, scores.standard_error):
        assert (values == 0).all()


def test_label_of_one_cell_has_scores_but_no_standard_error():
    a = np.array([[3.0], [1.0], [0.0], [2.0]])
    scores = score_labels(sparse.csr_matrix(a), np.array([0, 1, 1, 1]), 2)
    assert scores.auroc[0, 0] == scores.f1[0, 0] == 1
    assert scores.difference[0, 0] == 2
    for values in (scores.standard_error, scores.ci_low, scores.ci_high):
        assert np.isnan(values).all()


def reversed_within_rows(a):
    shuffled = a.copy()
    for start, stop in zip(a.indptr[:-1], a.indptr[1:], strict=True):
        shuffled.indices[start:stop] = a.indices[start:stop][::-1]
        shuffled.data[start:stop] = a.data[start:stop][::-1]
    shuffled.has_sorted_indices = False
    return shuffled


def with_stored_zeros(a):
    stored = sparse.csr_matrix(np.where(np.arange(a.shape[1]) % 2, a.toarray(), a.toarray() + 1))
    for column in range(0, a.shape[1], 2):
        stored.data[stored.indices == column] -= 1
    assert stored.nnz > a.nnz
    return stored


@pytest.mark.parametrize(
    "stored",
    [
        pytest.param(reversed_within_rows, id="unsorted"),
        pytest.param(with_stored_zeros, id="zeros"),
        pytest.param(sparse.csc_matrix, id="csc"),
        pytest.param(lambda a: with_stored_zeros(a).tocsc(), id="csc with zeros"),
    ],
)
def test_scores_do_not_depend_on_how_the_matrix_is_stored(stored):
    a = sparse.csr_matrix(activations(tied=True))
    other = stored(a)
    np.testing.assert_array_equal(other.toarray(), a.toarray())
    before = other.copy()
    expected, found = (score_labels(matrix, labels(), 3) for matrix in (a, other))
    for name, values in vars(expected).items():
        np.testing.assert_allclose(getattr(found, name), values, rtol=1e-12, err_msg=name)
    np.testing.assert_array_equal(other.data, before.data)
    np.testing.assert_array_equal(other.indices, before.indices)


@pytest.mark.parametrize("exponent", [-125, -100, 100])
@pytest.mark.parametrize("lowest", [0, -0.7], ids=["positive", "some negative"])
def test_ranks_have_no_unit(exponent, lowest):
    """A power of 2 changes no order, even where the product of two float32 values would be zero or infinite."""
    a, codes = activations(tied=True) + np.float32(lowest), labels()
    halves = stratified_halves(codes, 2, np.random.default_rng(0))
    scaled = np.ldexp(a, exponent)
    assert scaled.dtype == np.float32
    expected, found = (cross_fit(matrix, codes, 3, halves) for matrix in (a, scaled))
    for name, values in vars(expected).items():
        np.testing.assert_array_equal(getattr(found, name), values, err_msg=name)
    for kind in (np.float32, np.float64):
        assert_same(
            score_labels(sparse.csr_matrix(a, dtype=kind), codes, 3), score_labels(sparse.csr_matrix(a), codes, 3)
        )


def in_small_blocks(monkeypatch):
    """A column or two are gathered, and scored, at a time; from disk, 13 cells are read at a time."""
    monkeypatch.setattr(moments, "CHUNK_ROWS", 13)
    monkeypatch.setattr(columns, "COLUMN_VALUES", 70)
    monkeypatch.setattr(columns, "DISK_COLUMN_VALUES", 70)
    monkeypatch.setattr(label_scan, "RESULT_VALUES", 6)


def assert_same(found, expected):
    for name, values in vars(expected).items():
        np.testing.assert_array_equal(getattr(found, name), values, err_msg=name)


STORED = {
    "csr": sparse.csr_matrix,
    "dense": np.asarray,
    "csr on disk": lambda a: Rows(sparse.csr_matrix(a), np.arange(len(a))),
    "dense on disk": lambda a: Rows(a, np.arange(len(a))),
}
each_storage = pytest.mark.parametrize("stored", STORED.values(), ids=STORED)


@each_storage
@pytest.mark.parametrize("lowest", [0, -0.7], ids=["positive", "some negative"])
@pytest.mark.parametrize("both_signs", [False, True], ids=["one sign", "both signs"])
def test_cross_fits_do_not_depend_on_where_and_in_what_blocks_columns_are_read(monkeypatch, stored, lowest, both_signs):
    a, codes = activations(tied=True), labels()
    a[a > 0] += lowest
    halves = stratified_halves(codes, 2, np.random.default_rng(0))
    expected = cross_fit(sparse.csr_matrix(np.hstack([a, -a]) if both_signs else a), codes, 3, halves)
    in_small_blocks(monkeypatch)
    done = []
    found = cross_fit(stored(a), codes, 3, halves, both_signs=both_signs, on_block=done.append)
    assert sum(done) == a.shape[1] * (1 + both_signs) and len(done) > 2
    assert_same(found, expected)


@each_storage
def test_scores_and_trends_do_not_depend_on_where_and_in_what_blocks_columns_are_read(monkeypatch, stored):
    a, codes = activations(tied=True), labels()
    halves = stratified_halves(codes, 2, np.random.default_rng(0))
    expected = score_labels(sparse.csr_matrix(a), codes, 3), trend(sparse.csr_matrix(a), codes, 3)
    fit = cross_fit(sparse.csr_matrix(a), codes, 3, halves)
    best = fit.chosen[0, 0]
    apart = differences(a, best, codes, signs=np.ones(3))
    in_small_blocks(monkeypatch)
    assert_same(score_labels(stored(a), codes, 3), expected[0])
    assert_same(trend(stored(a), codes, 3), expected[1])
    together = score_and_cross_fit(stored(a), codes, 3, halves)
    assert_same(together[0], expected[0])
    assert_same(together[1], fit)
    np.testing.assert_array_equal(differences(stored(a), best, codes, signs=np.ones(3)), apart)


def test_of_equal_columns_the_first_is_chosen(monkeypatch):
    """Also where −x of one block is scored before x of the next."""
    x = np.random.default_rng(0).normal(size=(60, 1))
    halves = stratified_halves(labels(), 3, np.random.default_rng(0))
    expected = cross_fit(np.hstack([x, -x, -x, x]), labels(), 3, halves)
    assert set(expected.chosen.ravel()) == {0, 1}
    in_small_blocks(monkeypatch)
    assert_same(cross_fit(np.hstack([x, -x]), labels(), 3, halves, both_signs=True), expected)


def test_where_values_are_negative_zero_is_a_threshold_like_others():
    """Label 1 is told by the three zeros that are above what is negative."""
    x = np.array([[0.0, 0, 0, -1, -2, -3, -4, 0, 0, 0, -1, -2, -3, -4]]).T
    codes, half = (x[:, 0] == 0).astype(int), np.repeat([[0, 1]], 7, axis=1)
    for stored in (x, sparse.csr_matrix(x)):
        assert cross_fit(stored, codes, 2, half).f1[1, 0] == 1
    assert cross_fit(-x, codes, 2, half).f1[1, 0] == 0, "no cell above zero is of the label"


def best_threshold(inside, values):
    """The highest of the thresholds above zero with the best F1, or none where none finds anything."""
    f1 = {t: f1_score(inside, values >= t) for t in np.unique(values[values > 0])[::-1]}
    return max(f1, key=f1.get) if f1 and max(f1.values()) > 0 else np.inf


@pytest.mark.parametrize("made", [made for name, made in ACTIVATIONS.items() if name != "many cells"])
@pytest.mark.parametrize("stored", [sparse.csr_matrix, sparse.csc_matrix, np.asarray], ids=["csr", "csc", "dense"])
def test_cross_fitted_scores_are_those_of_a_loop_over_halves(made, stored):
    a = activations(**made)
    halves = stratified_halves(labels(), 2, np.random.default_rng(0))
    found = cross_fit(stored(a), labels(), 3, halves)
    for label, feature, inside, values in each_pair(a):
        auroc, f1 = [], []
        for half in halves:
            for choosing in (half == 0, half == 1):
                # scikit-learn's sum of trapezoids can fall short of one half by rounding.
                direction = 1 if roc_auc_score(inside[choosing], values[choosing]) > 0.5 - 1e-12 else -1
                auroc.append(roc_auc_score(inside[~choosing], direction * values[~choosing]))
                threshold = best_threshold(inside[choosing], values[choosing])
                f1.append(f1_score(inside[~choosing], values[~choosing] >= threshold))
        np.testing.assert_allclose(found.auroc[label, feature], np.mean(auroc), rtol=1e-12)
        np.testing.assert_allclose(found.f1[label, feature], np.mean(f1), rtol=1e-12)


def test_the_chosen_column_is_the_best_of_the_half_that_chose():
    x = np.random.default_rng(3).exponential(size=(60, 7))
    codes = labels()
    x[codes == 1, 4] += 3
    halves = stratified_halves(codes, 3, np.random.default_rng(0))
    found = cross_fit(sparse.csr_matrix(x), codes, 3, halves)
    for split, half in enumerate(halves):
        for p in range(2):
            for label in range(3):
                choosing, inside = half == p, codes == label
                aurocs = np.array([roc_auc_score(inside[choosing], column) for column in x[choosing].T])
                best = found.chosen[split, p, label]
                expected = roc_auc_score(inside[~choosing], x[~choosing, best])
                threshold = best_threshold(inside[choosing], x[choosing, best])
                f1 = f1_score(inside[~choosing], x[~choosing, best] >= threshold)
                np.testing.assert_allclose(aurocs[best], aurocs.max(), rtol=1e-12)
                np.testing.assert_allclose(found.selection_auroc[split, p, label], aurocs[best], rtol=1e-12)
                np.testing.assert_allclose(found.held_out_auroc[split, p, label], expected, rtol=1e-12)
                np.testing.assert_allclose(found.held_out_f1[split, p, label], f1, rtol=1e-12)
    assert (found.chosen[:, :, 1] == 4).all()


def test_with_random_labels_the_best_column_scores_one_half_on_the_other_cells():
    """The mean over 40 draws of labels, within 4 of its standard errors; on the choosing half it is far above."""
    a = activations(n=120, h=40, density=0.5)
    held_out, selection = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        codes = rng.permutation(np.arange(120) % 3)
        fit = cross_fit(sparse.csr_matrix(a), codes, 3, stratified_halves(codes, 5, rng))
        held_out.append(fit.held_out_auroc.mean())
        selection.append(fit.selection_auroc.mean())
    error = np.std(held_out, ddof=1) / np.sqrt(len(held_out))
    assert error < 0.01
    assert abs(np.mean(held_out) - 0.5) < 4 * error
    assert np.mean(selection) > 0.6


def test_differences_of_means_and_their_intervals_are_those_of_scipy():
    x = np.random.default_rng(0).normal(1e6, size=(50, 3))
    codes = np.repeat([0, 1, 2], [12, 37, 1])
    found = differences(x, np.array([2, 0, 1]), codes, signs=np.array([1.0, -1.0, 1.0]))
    for label, values in enumerate([x[:, 2], -x[:, 0]]):
        inside = codes == label
        expected = stats.ttest_ind(values[inside], values[~inside], equal_var=False).confidence_interval()
        difference = values[inside].mean() - values[~inside].mean()
        np.testing.assert_allclose([part[label] for part in found], [difference, *expected], rtol=1e-8)
    assert np.isnan([part[2] for part in found[1:]]).all(), "one cell has no spread"


def test_feature_active_in_one_half_only():
    codes = np.array([0, 0, 0, 1, 1, 1, 1, 0])
    half = np.array([[0, 0, 1, 0, 0, 1, 1, 1]])
    a = sparse.csr_matrix(np.array([[2.0, 3, 0, 0, 0, 0, 0, 0]]).T)
    found = cross_fit(a, codes, 2, half)
    # The active half has a threshold that finds nothing in the silent one, which has no threshold.
    assert found.f1[0, 0] == 0
    # One half on the silent half; a silent half turns nothing round, and the other has an AUROC of 1.
    assert found.auroc[0, 0] == (0.5 + 1) / 2


def test_label_in_one_half_only_is_not_scored():
    codes = np.array([0, 1, 1, 2, 2, 1, 1, 2])
    a = sparse.csr_matrix(np.arange(8.0)[:, None])
    found = cross_fit(a, codes, 3, stratified_halves(codes, 4, np.random.default_rng(0)))
    for values in (found.auroc.T, found.f1.T, found.held_out_auroc, found.selection_auroc):
        assert np.isnan(values[..., 0]).all() and np.isfinite(values[..., 1:]).all()
    assert (found.chosen[..., 0] == -1).all() and (found.chosen[..., 1:] == 0).all()


def test_splits_without_the_label_in_both_halves_do_not_count():
    a, codes = sparse.csr_matrix(activations()), np.repeat([0, 1], [10, 50])
    halves = np.stack([np.arange(60) % 2, codes])
    both, first = (cross_fit(a, codes, 2, some) for some in (halves, halves[:1]))
    np.testing.assert_array_equal(both.auroc, first.auroc)
    np.testing.assert_array_equal(both.f1, first.f1)
    assert np.isnan(both.held_out_auroc[1]).all() and (both.chosen[1] == -1).all()


def test_halves_hold_half_of_every_label():
    codes = np.repeat([0, 1, 2], [1, 40, 21])
    halves = stratified_halves(codes, 50, np.random.default_rng(0))
    counts = np.stack([[np.bincount(codes[half == p], minlength=3) for p in range(2)] for half in halves])
    np.testing.assert_array_equal(np.abs(counts[:, 0] - counts[:, 1]), np.tile([1, 0, 1], (50, 1)))
    assert set(counts[:, 0, 2]) == {10, 11}, "either half may get the odd cell"
    assert len(np.unique(halves, axis=0)) == 50
    # Every cell is as often in one half as in the other.
    assert np.abs(halves[:, 1:].mean(axis=0) - 0.5).max() < 0.3


def test_donors_stay_together_and_labels_are_in_both_halves_where_they_can_be():
    donors = np.repeat(np.arange(6), 10)
    # Label 1 is in donors 0 and 1 only, label 2 in donor 5 only.
    codes = np.where(
        (donors < 2) & (np.arange(60) % 2 == 0), 1, np.where((donors == 5) & (np.arange(60) % 2 == 0), 2, 0)
    )
    halves = donor_halves(codes, donors, 10, np.random.default_rng(0))
    of_donor = halves.reshape(10, 6, 10)
    assert (of_donor == of_donor[:, :, :1]).all()
    assert (of_donor[:, :, 0].sum(axis=1) == 3).all()
    assert (of_donor[:, 0, 0] != of_donor[:, 1, 0]).all()
    found = cross_fit(np.random.default_rng(0).normal(size=(60, 2)), codes, 3, halves)
    assert np.isfinite(found.auroc[:2]).all() and np.isnan(found.auroc[2]).all()


def jonckheere(values, codes):
    """J by brute force over pairs of cells."""
    later = codes[:, None] < codes[None]
    higher = (values[:, None] < values[None]) + 0.5 * (values[:, None] == values[None])
    return (later * higher).sum()


@each_activation
def test_trend_is_that_of_jonckheere_and_kendall(made):
    a = activations(**{**made, "n": 60})
    codes = labels(n_labels=4)
    a[:, 0] += np.where(a[:, 0] > 0, codes, 0)
    found = trend(sparse.csr_matrix(a), codes, 4)
    size = np.bincount(codes)
    for feature, values in enumerate(a.T.astype(np.float64)):
        if not values.any():
            assert (found.score[feature], found.pval[feature], found.direction[feature]) == (0, 1, 0)
            continue
        j = jonckheere(values, codes) - (60**2 - (size**2).sum()) / 4
        assert np.sign(found.score[feature]) == np.sign(j)
        assert found.pval[feature] == pytest.approx(
            stats.kendalltau(codes, values, method="asymptotic").pvalue, rel=1e-9
        )
        steps = np.diff([values[codes == label].mean() for label in range(4)])
        assert found.direction[feature] == (steps > 0).all() * 1 - (steps < 0).all() * 1


def test_trend_score_is_j_in_standard_deviations_over_permutations():
    a = activations(tied=True)[:, :1]
    codes = labels(n_labels=4)
    rng = np.random.default_rng(0)
    null = [jonckheere(a[:, 0], rng.permutation(codes)) for _ in range(4000)]
    expected = (jonckheere(a[:, 0], codes) - np.mean(null)) / np.std(null)
    assert trend(sparse.csr_matrix(a), codes, 4).score[0] == pytest.approx(expected, abs=0.1)


def test_trend_has_a_direction():
    codes = np.repeat([0, 1, 2], 20)
    noise = np.random.default_rng(0).uniform(0.1, 0.3, size=60)
    constant = np.full(60, 0.3)
    a = np.stack([codes + noise, 2 - codes + noise, (codes == 1) + noise, constant], axis=1)
    found = trend(sparse.csr_matrix(a), codes, 3)
    assert found.direction.tolist() == [1, -1, 0, 0]
    assert found.score[0] > 5 and found.score[1] < -5 and abs(found.score[2]) < 2
    for feature in range(3):
        rank = stats.spearmanr(codes, a[:, feature])
        assert np.sign(found.score[feature]) == np.sign(rank.statistic)
    assert (found.score[3], found.pval[3]) == (0, 1)
