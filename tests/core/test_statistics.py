from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np
from scipy import stats

from sae.core.statistics import benjamini_hochberg, log2_fold_change, welch, welch_interval

P_VALUES = {
    "distinct": [0.01, 0.04, 0.03, 0.2, 0.9],
    "ties": [0.02, 0.02, 0.5, 0.02, 0.5, 1.0],
    "all equal": [0.3, 0.3, 0.3],
    "zeros and ones": [0.0, 1.0, 0.0, 1.0],
    "one": [0.2],
    "nearly equal": [0.5 + 5e-14, 0.5 + 2e-14, 0.5 + 1e-14, 0.5 + 4e-14],
    "minus zero": [0.5, -0.0, 0.1],
    "too small for all digits": [5e-324, 1e-310, 1.0],
    "two-dimensional": [[0.01, 0.5, 0.03], [0.9, 0.2, 0.2]],
    "three-dimensional": [[[0.01, 0.5]], [[0.9, 0.2]]],
}


@pytest.mark.parametrize("p", P_VALUES.values(), ids=P_VALUES)
def test_benjamini_hochberg_is_that_of_scipy_along_the_last_axis(p):
    np.testing.assert_allclose(benjamini_hochberg(np.array(p)), stats.false_discovery_control(p, axis=-1), rtol=1e-14)


@given(p=st_np.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 60)), elements=st.floats(0, 1)))
def test_benjamini_hochberg_of_any_p_values(p):
    np.testing.assert_allclose(benjamini_hochberg(p), stats.false_discovery_control(p, axis=-1), rtol=1e-14)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)], ids=str)
def test_benjamini_hochberg_of_nothing(shape):
    assert benjamini_hochberg(np.empty(shape)).shape == shape


def test_benjamini_hochberg_takes_any_memory_layout():
    p = np.random.default_rng(0).uniform(size=(30, 8)).astype(np.float32)
    np.testing.assert_array_equal(benjamini_hochberg(p.T), benjamini_hochberg(p.T.copy()))
    np.testing.assert_array_equal(benjamini_hochberg(p[::2]), benjamini_hochberg(p)[::2])


def test_benjamini_hochberg_counts_only_the_tests_that_were_made():
    p = np.random.default_rng(0).uniform(size=(4, 30)) ** 3
    p[0, ::3] = p[1, 7] = p[2] = np.nan
    adjusted = benjamini_hochberg(p)
    np.testing.assert_array_equal(np.isnan(adjusted), np.isnan(p))
    for row, expected in zip(adjusted, p, strict=True):
        tested = np.isfinite(expected)
        if tested.any():
            np.testing.assert_allclose(row[tested], stats.false_discovery_control(expected[tested]), rtol=1e-14)


def moments(one, rest):
    return [np.array(moment) for group in (one, rest) for moment in (np.mean(group), np.var(group, ddof=1), len(group))]


def welch_of(one, rest):
    return welch(*moments(one, rest))


def assert_as_scipy(one, rest):
    t, pval, log_pval = welch_of(one, rest)
    expected = stats.ttest_ind(one, rest, equal_var=False)
    np.testing.assert_allclose(t, expected.statistic, rtol=1e-10)
    np.testing.assert_allclose(pval, expected.pvalue, rtol=1e-9)
    np.testing.assert_allclose(log_pval, np.log(expected.pvalue), rtol=1e-9)


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
    assert_as_scipy(one, rest)
    for level in (0.95, 0.5):
        found = welch_interval(*moments(one, rest), level=level)
        np.testing.assert_allclose(found, expected.confidence_interval(level), rtol=1e-9)


def test_welch_takes_one_group_without_variance():
    one, rest = [0.0, 0.0, 0.0], [1.0, 3.0, 4.0, 5.0]
    assert_as_scipy(one, rest)
    assert_as_scipy(rest, one)


@pytest.mark.parametrize(
    ("one", "rest", "t", "p"),
    [
        pytest.param([2, 2, 2], [1, 1], np.inf, 0, id="higher"),
        pytest.param([1, 1, 1], [2, 2], -np.inf, 0, id="lower"),
        pytest.param([0, 0, 0], [0, 0], 0, 1, id="equal"),
    ],
)
def test_welch_without_any_variance_is_certain(one, rest, t, p):
    assert welch_of(one, rest) == (t, p, np.log(p) if p else -np.inf)


def test_welch_of_equal_means_is_zero_with_p_one():
    assert welch_of([1.0, 2.0, 3.0], [0.0, 2.0, 4.0]) == (0, 1, 0)


def test_order_of_genes_is_kept_where_p_is_zero():
    n = np.array(5000.0)
    mean = np.linspace(1, 9, 30)
    _, pval, log_pval = welch(mean, np.ones(30), n, np.zeros(30), np.ones(30), n)
    assert (pval[mean > 2] == 0).all()
    assert np.isfinite(log_pval).all()
    assert (np.diff(log_pval) < 0).all()


def test_welch_interval_without_any_variance_is_a_point():
    assert welch_interval(*moments([2, 2, 2], [1, 1])) == (1, 1)


def test_welch_interval_of_one_value_is_unknown():
    assert np.isnan(welch_interval(*(np.array(value) for value in (2, np.nan, 1, 1, 0.5, 9)))).all()


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
