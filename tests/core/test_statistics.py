from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse, stats
from sklearn.metrics import f1_score, roc_auc_score

from sae.core.statistics import benjamini_hochberg, log2_fold_change, score_labels, welch

P_VALUES = {
    "distinct": [0.01, 0.04, 0.03, 0.2, 0.9],
    "ties": [0.02, 0.02, 0.5, 0.02, 0.5, 1.0],
    "all equal": [0.3, 0.3, 0.3],
    "zeros and ones": [0.0, 1.0, 0.0, 1.0],
    "one": [0.2],
    "two-dimensional": [[0.01, 0.5, 0.03], [0.9, 0.2, 0.2]],
}


@pytest.mark.parametrize("p", P_VALUES.values(), ids=P_VALUES)
def test_benjamini_hochberg_is_that_of_scipy_along_the_last_axis(p):
    np.testing.assert_allclose(benjamini_hochberg(np.array(p)), stats.false_discovery_control(p, axis=-1), rtol=1e-14)


def test_benjamini_hochberg_counts_only_the_tests_that_were_made():
    p = np.random.default_rng(0).uniform(size=(4, 30)) ** 3
    p[0, ::3] = p[1, 7] = p[2] = np.nan
    adjusted = benjamini_hochberg(p)
    np.testing.assert_array_equal(np.isnan(adjusted), np.isnan(p))
    for row, expected in zip(adjusted, p, strict=True):
        tested = np.isfinite(expected)
        if tested.any():
            np.testing.assert_allclose(row[tested], stats.false_discovery_control(expected[tested]), rtol=1e-14)


def welch_of(one, rest):
    moments = [
        np.array(moment) for group in (one, rest) for moment in (np.mean(group), np.var(group, ddof=1), len(group))
    ]
    return welch(*moments)


@pytest.mark.parametrize(
    ("one", "rest"),
    [
        pytest.param((0, 1, 12), (0, 1, 30), id="no difference"),
        pytest.param((3, 1, 12), (0, 5, 30), id="unequal variances"),
        pytest.param((1e4, 1, 40), (1e4 + 0.5, 1, 25), id="mean far above sd"),
        pytest.param((50, 1e-3, 40), (0, 1e-3, 25), id="far apart"),
        pytest.param((0, 1, 2), (1, 1, 2), id="two cells each"),
        pytest.param((0, 1, 2), (1, 1, 3000), id="two cells against many"),
    ],
)
def test_welch_is_that_of_scipy(one, rest):
    rng = np.random.default_rng(0)
    one, rest = (rng.normal(mean, sd, n) for mean, sd, n in (one, rest))
    expected = stats.ttest_ind(one, rest, equal_var=False)
    np.testing.assert_allclose(welch_of(one, rest), expected, rtol=1e-10)


def test_welch_takes_one_group_without_variance():
    one, rest = [0.0, 0.0, 0.0], [1.0, 3.0, 4.0, 5.0]
    np.testing.assert_allclose(welch_of(one, rest), stats.ttest_ind(one, rest, equal_var=False), rtol=1e-14)
    np.testing.assert_allclose(welch_of(rest, one), stats.ttest_ind(rest, one, equal_var=False), rtol=1e-14)


@pytest.mark.parametrize(
    ("one", "rest", "t", "p"),
    [
        pytest.param([2, 2, 2], [1, 1], np.inf, 0, id="higher"),
        pytest.param([1, 1, 1], [2, 2], -np.inf, 0, id="lower"),
        pytest.param([0, 0, 0], [0, 0], 0, 1, id="equal"),
    ],
)
def test_welch_without_any_variance_is_certain(one, rest, t, p):
    assert welch_of(one, rest) == (t, p)


def test_welch_of_equal_means_is_zero_with_p_one():
    assert welch_of([1.0, 2.0, 3.0], [0.0, 2.0, 4.0]) == (0, 1)


@pytest.mark.parametrize(
    ("log_base", "raw"),
    [
        pytest.param(np.e, np.expm1, id="natural"),
        pytest.param(2.0, lambda x: 2**x - 1, id="base 2"),
        pytest.param(10.0, lambda x: 10**x - 1, id="base 10"),
        pytest.param(None, lambda x: x, id="linear"),
    ],
)
def test_fold_change_is_of_means_before_the_logarithm(log_base, raw):
    one, rest = np.array([0.0, 0.5, 3.0, 0.0]), np.array([0.0, 1.5, 0.0, 2.0])
    expected = np.log2((raw(one) + 0.1) / (raw(rest) + 0.1))
    np.testing.assert_allclose(log2_fold_change(one, rest, log_base=log_base, pseudocount=0.1), expected, rtol=1e-13)


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
    assert np.isnan(scores.standard_error).all()


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
