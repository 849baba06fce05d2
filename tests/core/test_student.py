from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, special, stats

from sae.core import student as module
from sae.core.student import log_two_sided

T = np.concatenate([[1e-6, 1e-3], np.linspace(0.02, 60, 300), np.geomspace(60, 1e6, 60)])
DF = [1, 1.5, 2.7, 5, 9.3, 11.99, 12, 12.01, 14.6, 20, 47.3, 300, 5e3, 1e5, 1e7]
SCALES = np.concatenate([[0], np.geomspace(1e-3, 300, 40)])


def beta_tail(t, df):
    """Two-sided p by SciPy's incomplete beta function, of whichever side of its peak is small."""
    inside = special.betainc(0.5, df / 2, t**2 / (df + t**2))
    return np.where(inside < 0.5, 1 - inside, special.betainc(df / 2, 0.5, df / (df + t**2)))


def log_by_integration(t, df):
    """Log of the two-sided p for t of 3 or more, from the density over its value at t."""
    share = t / (df + t * t) * t

    def density(w):
        return np.exp(w - (df + 1) / 2 * np.log1p(share * np.expm1(2 * w)))

    edges = SCALES / ((df + 1) * share)
    pieces = [
        integrate.quad(density, low, high, epsabs=0, epsrel=1e-10)[0]
        for low, high in zip(edges[:-1], edges[1:], strict=True)
    ]
    constant = np.log(2) + special.gammaln((df + 1) / 2) - special.gammaln(df / 2) - np.log(df * np.pi) / 2
    return constant + np.log(t) - (df + 1) / 2 * np.log1p(t * (t / df)) + np.log(sum(pieces))


@pytest.mark.parametrize("df", DF)
def test_p_is_that_of_the_incomplete_beta_function(df):
    expected = beta_tail(T, df)
    shown = expected > 1e-290
    assert shown.sum() > 100
    np.testing.assert_allclose(np.exp(log_two_sided(T, df))[shown], expected[shown], rtol=1e-9)


def test_p_is_that_of_scipy_for_every_pair_of_t_and_df():
    t, df = np.random.default_rng(0).normal(0, 5, size=(40, 500)), np.geomspace(1, 1e6, 500)
    np.testing.assert_allclose(np.exp(log_two_sided(t, df)), 2 * special.stdtr(df, -np.abs(t)), rtol=1e-8)


@pytest.mark.parametrize("df", [1, 3.3, 12, 13.7, 60, 800.5, 1e5])
@pytest.mark.parametrize("t", [3, 25, 60, 1e3, 1e6])
def test_log_p_is_that_of_the_integrated_density_however_small(t, df):
    np.testing.assert_allclose(log_two_sided(t, df), log_by_integration(t, df), rtol=1e-8)


@pytest.mark.parametrize("t", [1e-3, 0.7, 5, 1e4, 1e80, 1e200, 1e300])
def test_one_and_two_degrees_of_freedom_have_formulas(t):
    np.testing.assert_allclose(log_two_sided(t, 1), np.log(np.arctan2(1, t) * 2 / np.pi), rtol=1e-10)
    hypotenuse = np.hypot(t, np.sqrt(2))
    two = np.log(2) - np.log(hypotenuse) - np.log(hypotenuse + t)
    np.testing.assert_allclose(log_two_sided(t, 2), two, rtol=1e-10)


def test_infinite_degrees_of_freedom_are_the_normal_distribution():
    t = np.concatenate([T, [1e100]])
    np.testing.assert_allclose(log_two_sided(t, np.inf), np.log(2) + stats.norm.logsf(t), rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(log_two_sided(T[T < 40], 1e14), log_two_sided(T[T < 40], np.inf), rtol=1e-7)


@given(
    df=st.floats(1, 1e7),
    t=st.floats(1e-3, 1e6),
    step=st.floats(1e-5, 10),
)
def test_log_p_is_finite_and_falls_with_t(df, t, step):
    near, far = log_two_sided([t, t * (1 + step)], df)
    assert -np.inf < far < near < 0
    assert log_two_sided(-t, df) == near


@given(df=st.floats(1, 1e7), t=st.floats(1e-6, 1e6))
def test_any_t_and_df(df, t):
    expected, log_p = beta_tail(t, df), log_two_sided(t, df)
    if expected > 1e-290:
        np.testing.assert_allclose(np.exp(log_p), expected, rtol=1e-8)
    else:
        np.testing.assert_allclose(log_p, log_by_integration(t, df), rtol=1e-7)


@pytest.mark.parametrize("df", [4, 11.9, 12, 12.1, 15, 30, 1000])
def test_methods_meet_where_one_takes_over(df):
    for border in (df, 3 * df):
        below, above = log_two_sided(np.sqrt(border) * np.array([1 - 1e-9, 1 + 1e-9]), df)
        assert below > above
        np.testing.assert_allclose(below, above, rtol=1e-6)


@pytest.mark.parametrize("df", DF)
def test_p_of_next_to_nothing_is_at_most_one(df):
    log_p = log_two_sided(np.geomspace(1e-300, 1e-7, 600), df)
    assert (log_p <= 0).all()
    np.testing.assert_allclose(log_p, 0, atol=1e-7)


def test_series_of_the_hyperbolic_sine():
    s = np.array([0.1, 0.8, 1.2])[:, None]
    series = 1 + (module.SINH_SERIES * s ** (2 * np.arange(1, 9))).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(series, (2 * np.sinh(s / 2) / s) ** -0.5, rtol=5e-14)


@pytest.mark.parametrize(
    ("t", "df", "log_p"),
    [
        pytest.param(0, 5, 0, id="zero"),
        pytest.param(-0.0, 50, 0, id="minus zero"),
        pytest.param(0, np.inf, 0, id="zero, normal"),
        pytest.param(np.inf, 5, -np.inf, id="infinite"),
        pytest.param(-np.inf, 500, -np.inf, id="minus infinite"),
        pytest.param(np.inf, np.inf, -np.inf, id="infinite, normal"),
        pytest.param(np.nan, 5, np.nan, id="no t"),
        pytest.param(2, np.nan, np.nan, id="no df"),
        pytest.param(2, 0, np.nan, id="df of 0"),
        pytest.param(0, -1, np.nan, id="negative df"),
    ],
)
def test_limits(t, df, log_p):
    np.testing.assert_array_equal(log_two_sided(t, df), log_p)


def test_shapes_broadcast_and_blocks_do_not_matter(monkeypatch):
    t, df = np.random.default_rng(0).normal(0, 9, size=(7, 11)), np.geomspace(1, 1000, 7)[:, None]
    at_once = log_two_sided(t, df)
    assert at_once.shape == (7, 11)
    assert log_two_sided(np.zeros((0, 3)), np.ones((0, 1))).shape == (0, 3)
    monkeypatch.setattr(module, "BLOCK", 5)
    np.testing.assert_array_equal(log_two_sided(t, df), at_once)
    np.testing.assert_array_equal(log_two_sided(t.T, df.T), at_once.T)
