from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np
from scipy import sparse, stats

from sae.core import differential as module
from sae.core import moments
from sae.core.differential import MIN_EXPECTED, Differential, differential
from sae.core.groups import active_groups, percentile_groups
from sae.core.student import log_two_sided

ARRAYS = ("features", "score", "log2fc", "pval", "log_pval", "padj", "either_way")
LAYOUTS = {"dense": np.asarray, "csr": sparse.csr_matrix}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def expression(n=50, g=12, *, seed=0):
    """Log1p-like values (n, g) with zeros."""
    rng = np.random.default_rng(seed)
    return np.log1p(rng.poisson(2, size=(n, g)) * rng.uniform(0.5, 2, size=(n, 1)))


def activity(n=50, h=7, *, seed=1):
    """Activations (n, h) of features that are active in few to most cells."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random((n, h)) < np.linspace(0.15, 0.85, h), rng.uniform(0.1, 1, size=(n, h)), 0)


def compared(a, x, *, log_base=np.e, pseudocount=0.1, min_cells=2, min_expected=0) -> Differential:
    """All blocks as one."""
    options = {
        "log_base": log_base,
        "pseudocount": pseudocount,
        "min_cells": min_cells,
        "min_expected": min_expected,
    }
    blocks = list(differential(active_groups(sparse.csr_matrix(a)), x, moments.scan(x), **options))
    assert blocks
    return Differential(**{name: np.concatenate([vars(block)[name] for block in blocks]) for name in ARRAYS})


@pytest.fixture
def small_blocks(monkeypatch):
    """Three features at a time over chunks of eight cells."""
    monkeypatch.setattr(module, "BLOCK_VALUES", 3 * 12)
    monkeypatch.setattr(moments, "CHUNK_ROWS", 8)


def assert_as_scipy(found, a, x, rtol=1e-9):
    x = np.asarray(x.toarray() if sparse.issparse(x) else x, dtype=np.float64)
    for feature, score, pval, log_pval in zip(found.features, found.score, found.pval, found.log_pval, strict=True):
        active = a[:, feature] > 0
        expected = stats.ttest_ind(x[active], x[~active], equal_var=False)
        np.testing.assert_allclose(score, expected.statistic, rtol=rtol, atol=rtol)
        np.testing.assert_allclose(pval, expected.pvalue, rtol=rtol * 10)
        np.testing.assert_allclose(np.exp(log_pval), pval, rtol=1e-9)


@each_layout
def test_score_and_p_are_those_of_scipy_over_several_blocks(layout, small_blocks):
    a, x = activity(), expression()
    options = {"log_base": np.e, "pseudocount": 0.1, "min_cells": 2}
    blocks = list(differential(active_groups(sparse.csr_matrix(a)), layout(x), moments.scan(x), **options))
    assert [len(block.features) for block in blocks] == [3, 3, 1]
    found = compared(a, layout(x))
    np.testing.assert_array_equal(found.features, np.arange(7))
    assert_as_scipy(found, a, x)


@each_layout
def test_blocks_do_not_change_the_result(layout, monkeypatch):
    a, x = activity(), expression()
    at_once = compared(a, layout(x))
    monkeypatch.setattr(module, "BLOCK_VALUES", 1)
    monkeypatch.setattr(moments, "CHUNK_ROWS", 3)
    for name in ARRAYS:
        np.testing.assert_allclose(vars(compared(a, layout(x)))[name], vars(at_once)[name], rtol=1e-12, err_msg=name)


@each_layout
def test_p_values_are_adjusted_within_a_feature(layout):
    found = compared(activity(), layout(expression()))
    np.testing.assert_allclose(found.padj, stats.false_discovery_control(found.pval, axis=1), rtol=1e-12)


@each_layout
@pytest.mark.parametrize(
    ("log_base", "raw"),
    [
        pytest.param(np.e, np.expm1, id="natural"),
        pytest.param(2.0, lambda x: 2**x - 1, id="base 2"),
        pytest.param(None, lambda x: x, id="linear"),
    ],
)
def test_fold_change_is_of_the_group_means(layout, log_base, raw):
    a, x = activity(), expression()
    found = compared(a, layout(x), log_base=log_base, pseudocount=0.3)
    for feature, log2fc in zip(found.features, found.log2fc, strict=True):
        one, rest = (raw(x[group].mean(axis=0)) for group in (a[:, feature] > 0, a[:, feature] == 0))
        np.testing.assert_allclose(log2fc, np.log2((one + 0.3) / (rest + 0.3)), rtol=1e-9, atol=1e-12)


@each_layout
def test_there_is_no_fold_change_without_a_known_scale(layout):
    a, x = activity(), expression() - 1
    found = compared(a, layout(x), log_base=np.nan)
    assert np.isnan(found.log2fc).all()
    assert_as_scipy(found, a, x)


@each_layout
@pytest.mark.parametrize("value", [0.0, 0.1, 7.0])
def test_constant_gene_is_not_tested_and_not_counted(layout, value):
    a, x = activity(), expression()
    alone = compared(a, layout(x))
    with_constant = compared(a, layout(np.insert(x, 4, value, axis=1)))
    assert (with_constant.score[:, 4] == 0).all()
    for name in ("pval", "log_pval", "padj"):
        assert np.isnan(vars(with_constant)[name][:, 4]).all()
    np.testing.assert_allclose(with_constant.log2fc[:, 4], 0, atol=1e-9)
    np.testing.assert_allclose(np.delete(with_constant.padj, 4, axis=1), alone.padj, rtol=1e-9)


@each_layout
def test_gene_that_only_the_feature_explains_is_certain(layout):
    a = activity(h=1)
    on, off = np.where(a > 0, 0.1, 0), np.where(a > 0, 0.1, 0.3)
    found = compared(a, layout(np.hstack([on, off])))
    np.testing.assert_array_equal(found.score, [[np.inf, -np.inf]])
    np.testing.assert_array_equal(found.pval, [[0, 0]])


@each_layout
def test_gene_absent_from_one_group_is_tested(layout):
    a, x = activity(h=2), expression()
    x[a[:, 0] > 0, :3] = 0
    x[a[:, 0] == 0, 3:6] = 0
    assert_as_scipy(compared(a, layout(x)), a, x)


def rare(n=120, g=40, *, seed=2):
    """Counts (n, g) of genes from one cell to all, the last one without any cell."""
    rng = np.random.default_rng(seed)
    x = rng.poisson(np.geomspace(0.01, 8, g), size=(n, g)).astype(np.float64)
    x[:, 0], x[:, -1] = np.arange(n) == 5, 0
    return x


def expected_by_hand(mine, others):
    """Cells with a gene to expect among `mine`, if they were like the others."""
    if not others.any():
        return 0
    return np.inf if np.ptp(others) == 0 else len(mine) * others.mean() ** 2 / others.var(ddof=1)


@each_layout
@pytest.mark.parametrize("min_expected", [0, 3.1, 12.5])
def test_genes_that_are_too_rare_for_the_group_that_has_less_are_not_tested(layout, min_expected):
    a, x = activity(n=120), rare()
    everything, found = compared(a, layout(x)), compared(a, layout(x), min_expected=min_expected)
    tested, either_way = np.zeros(found.pval.shape, bool), np.zeros(found.pval.shape, bool)
    for (f, gene), _ in np.ndenumerate(tested):
        one, rest = x[a[:, f] > 0, gene], x[a[:, f] == 0, gene]
        in_one, in_rest = expected_by_hand(one, rest), expected_by_hand(rest, one)
        less = in_rest if one.mean() > rest.mean() else in_one
        tested[f, gene] = less >= min_expected and np.ptp(x[:, gene]) > 0
        either_way[f, gene] = min(in_one, in_rest) >= min_expected and np.ptp(x[:, gene]) > 0
    assert min_expected == 0 or 0.3 < tested.mean() < 0.9
    np.testing.assert_array_equal(found.either_way, either_way)
    for name in ("pval", "log_pval"):
        np.testing.assert_array_equal(vars(found)[name], np.where(tested, vars(everything)[name], np.nan))
    np.testing.assert_array_equal(found.score, np.where(tested, everything.score, 0))
    np.testing.assert_array_equal(found.log2fc, everything.log2fc)
    for padj, pval, some in zip(found.padj, found.pval, tested, strict=True):
        np.testing.assert_allclose(padj[some], stats.false_discovery_control(pval[some]), rtol=1e-12)
        assert np.isnan(padj[~some]).all()


@each_layout
def test_rare_gene_is_tested_where_it_is_raised_and_not_where_it_is_absent(layout):
    a = np.zeros((1000, 2))
    a[:10, 0], a[10:20, 1] = 1, 1
    x = np.zeros((1000, 2))
    x[3:30, 0], x[:, 1] = 1, 5 + np.arange(1000) % 3
    found = compared(a, layout(x), min_expected=MIN_EXPECTED)
    np.testing.assert_array_equal(np.isfinite(found.pval), [[True, True], [True, True]])
    np.testing.assert_array_equal(found.either_way, [[False, True], [False, True]])
    found = compared(a, layout(np.roll(x, 300, axis=0)), min_expected=MIN_EXPECTED)
    np.testing.assert_array_equal(np.isfinite(found.pval), [[False, True], [False, True]])


@each_layout
def test_genes_with_negative_values_have_no_lowest_level_and_are_tested(layout):
    a, x = activity(), expression()
    centred = x - x.mean(axis=0)
    assert_as_scipy(compared(a, layout(centred), log_base=None, min_expected=1e9), a, centred)
    assert np.isnan(compared(a, layout(x), min_expected=1e9).pval).all()


def test_gene_that_only_other_cells_have_is_not_tested():
    a = np.repeat([0, 0, 0, 0.2, 0.3, 0.9, 0.8, 0.7], 2)[:, None]
    x = np.where((a > 0) & (a < 0.5), 1.0, [[0, 3]])
    groups = percentile_groups(sparse.csr_matrix(a), 60)
    [block] = differential(groups, x, moments.scan(x), log_base=None, pseudocount=1, min_cells=2, min_expected=1)
    assert np.isnan(block.pval).all(), "the other gene has one value in all cells that are compared"


def test_permuted_cells_are_called_different_as_often_as_they_should():
    rng = np.random.default_rng(0)
    n = 1500
    a = np.arange(n)[:, None] < np.geomspace(10, 1400, 40)
    a = rng.permuted(a, axis=0).astype(np.float32)
    x = np.log1p(rng.poisson(np.geomspace(0.003, 3, 800) * rng.gamma(4, 0.25, size=(n, 1))))
    everything, found = (compared(a, x, **options).pval for options in ({}, {"min_expected": MIN_EXPECTED}))
    assert (everything < 0.05).mean() > 0.15
    tested = np.isfinite(found)
    assert tested.sum() > 10_000
    assert 0.02 < (found[tested] < 0.05).mean() < 0.055
    either_way = compared(a, x, min_expected=MIN_EXPECTED).either_way
    assert either_way.sum() > 5_000
    assert 0.045 < (found[either_way] < 0.05).mean() < 0.055


def test_rare_genes_are_left_out_unless_asked_for():
    groups = active_groups(sparse.csr_matrix(activity(n=120)))
    [block] = differential(groups, rare(), moments.scan(rare()), log_base=None, pseudocount=1, min_cells=2)
    expected = compared(activity(n=120), rare(), log_base=None, pseudocount=1, min_expected=MIN_EXPECTED)
    np.testing.assert_array_equal(block.pval, expected.pval)
    assert 0 < np.isnan(block.pval).mean() < 1


@pytest.mark.parametrize("min_expected", [-1, np.nan])
def test_min_expected_is_a_number_of_cells(min_expected):
    with pytest.raises(ValueError, match=f"min_expected={min_expected} is not a number of cells"):
        compared(activity(), expression(), min_expected=min_expected)


@pytest.mark.parametrize(
    ("min_cells", "features"),
    [(2, [2, 3, 4]), (3, [3, 4]), (5, [3, 4]), (6, [])],
)
def test_features_need_enough_active_and_inactive_cells(min_cells, features):
    n_active = [0, 1, 2, 5, 15, 19, 20]
    a, x = sparse.csr_matrix((np.arange(20)[:, None] < n_active).astype(np.float32)), expression(n=20)
    options = {"log_base": None, "pseudocount": 1, "min_cells": min_cells}
    blocks = list(differential(active_groups(a), x, moments.scan(x), **options))
    assert [feature for block in blocks for feature in block.features] == features


def test_one_cell_is_not_a_group():
    with pytest.raises(ValueError, match="min_cells=1 is below 2"):
        compared(activity(), expression(), min_cells=1)


@pytest.mark.parametrize("value", [0, -1])
def test_cell_with_a_stored_value_that_is_not_positive_is_inactive(value):
    a, x = activity(), expression()
    stored = sparse.csr_matrix(np.where(a > 0, a, 9))
    stored.data[stored.data == 9] = value
    assert stored.nnz == a.size
    for name, values in vars(compared(a, x)).items():
        np.testing.assert_array_equal(vars(compared(stored, x))[name], values, err_msg=name)


@each_layout
def test_mean_far_above_the_spread_keeps_the_digits(layout):
    a = activity(n=200)
    x = 1e4 + np.random.default_rng(2).normal(size=(200, 12))
    assert_as_scipy(compared(a, layout(x), log_base=None), a, x, rtol=1e-9 if layout is np.asarray else 1e-5)


@each_layout
@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint8])
def test_input_of_any_number_type_is_added_up_in_double_precision(layout, dtype):
    a, x = activity(), (30 * expression()).astype(dtype)
    assert_as_scipy(compared(a, layout(x), log_base=None), a, x)


@pytest.mark.parametrize("pseudocount", [0, -1.5])
def test_pseudocount_must_be_positive(pseudocount):
    with pytest.raises(ValueError, match=rf"pseudocount={pseudocount} must be positive"):
        compared(activity(), expression(), pseudocount=pseudocount)


def welch_of_scipy(one, rest):
    """t and p of each gene; certain or equal where neither group has any variance, of which SciPy has no opinion."""
    with warnings.catch_warnings():
        # Equal values are what is tested here.
        warnings.filterwarnings("ignore", category=RuntimeWarning)
        found = stats.ttest_ind(one, rest, equal_var=False)
    constant = (np.ptp(one, axis=0) == 0) & (np.ptp(rest, axis=0) == 0)
    difference = one[0] - rest[0]
    certain = np.where(difference == 0, 0, np.copysign(np.inf, difference))
    return np.where(constant, certain, found.statistic), np.where(constant, difference == 0, found.pvalue)


shapes = st.tuples(st.integers(4, 25), st.integers(1, 6))
tied = st_np.arrays(np.float64, shapes, elements=st.integers(0, 12).map(lambda i: i / 10))
spread = st_np.arrays(np.float64, shapes, elements=st.integers(-(2**20), 2**20).map(lambda i: i / 1000))


@st.composite
def degenerate(draw):
    """Expression with ties, beside genes that are constant, absent or constant among some of the cells; and those cells."""
    x = draw(st.one_of(tied, spread))
    members = np.array(draw(st.lists(st.booleans(), min_size=len(x), max_size=len(x))))
    value = draw(st.sampled_from([0, 0.1, 0.3, 7]))
    others = [
        np.zeros(len(x)),
        np.full(len(x), value),
        np.where(members, value, x[:, 0]),
        members * value,
        ~members * value,
    ]
    return members, np.column_stack([x, *others])


@each_layout
@given(cells=degenerate())
def test_any_values_are_tested_as_by_scipy(layout, cells):
    members, x = cells
    groups = active_groups(sparse.csr_matrix(members[:, None].astype(float)))
    blocks = list(
        differential(
            groups, layout(x), moments.scan(layout(x)), log_base=None, pseudocount=1, min_cells=2, min_expected=0
        )
    )
    assert len(blocks) == (2 <= members.sum() <= len(x) - 2)
    for block in blocks:
        t, p = welch_of_scipy(x[members], x[~members])
        varies = np.ptp(x, axis=0) > 0
        np.testing.assert_allclose(block.score[0], np.where(varies, t, 0), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(block.pval[0], np.where(varies, p, np.nan), rtol=1e-6)
        np.testing.assert_array_equal(np.exp(block.log_pval), block.pval)
        if varies.any():
            expected = stats.false_discovery_control(p[varies])
            np.testing.assert_allclose(block.padj[0, varies], expected, rtol=1e-6)
        assert np.isnan(block.padj[0, ~varies]).all()


@each_layout
@given(exponent=st.floats(0, 4), seed=st.integers(0, 99), difference=st.floats(0, 10))
def test_mean_above_the_spread_keeps_six_digits(layout, exponent, seed, difference):
    a, level = activity(), 10**exponent
    x = level + np.random.default_rng(seed).normal(size=(50, 3)) + difference * (a[:, [2]] > 0)
    found = compared(a, layout(x), log_base=None)
    for f, t, p in zip(found.features, found.score, found.pval, strict=True):
        expected = stats.ttest_ind(x[a[:, f] > 0], x[a[:, f] == 0], equal_var=False)
        np.testing.assert_allclose(t, expected.statistic, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(p, expected.pvalue, rtol=1e-6 * (1 + expected.statistic**2).max())


@each_layout
@pytest.mark.parametrize(("level", "imprecise"), [(1e4, 0), (1e6, 2 * 7 * 3)])
def test_mean_too_far_above_the_spread_is_counted(layout, level, imprecise):
    x = level + np.random.default_rng(0).normal(size=(50, 3))
    groups = active_groups(sparse.csr_matrix(activity()))
    [block] = differential(groups, layout(x), moments.scan(layout(x)), log_base=None, pseudocount=1, min_cells=2)
    assert block.imprecise == imprecise


@each_layout
def test_log_p_keeps_the_order_of_genes_where_p_is_zero(layout):
    a, rng = activity(n=3000, h=1), np.random.default_rng(0)
    a[::2] = 1
    x = rng.exponential(size=(3000, 1)) + (a > 0) * np.arange(1, 40)
    found = compared(a, layout(x), log_base=None)
    beyond = found.pval[0] == 0
    assert beyond.sum() > 20
    assert np.isfinite(found.log_pval).all()
    assert (np.diff(found.log_pval[0, beyond]) < 0).all()
    active = a[:, 0] > 0
    expected = stats.ttest_ind(x[active], x[~active], equal_var=False)
    np.testing.assert_allclose(found.log_pval[0], log_two_sided(expected.statistic, expected.df), rtol=1e-8)


@given(x=st_np.arrays(np.float64, shapes, elements=st.integers(0, 12).map(lambda i: i / 4)), data=st.data())
def test_dense_and_csr_give_equal_results(x, data):
    n_active = data.draw(st.integers(2, len(x) - 2))
    a = np.zeros((len(x), 1))
    a[data.draw(st.permutations(range(len(x))))[:n_active]] = 1
    dense, csr = compared(a, x), compared(a, sparse.csr_matrix(x))
    for name, values in vars(dense).items():
        np.testing.assert_allclose(vars(csr)[name], values, rtol=1e-9, atol=1e-9, err_msg=name)


@each_layout
@pytest.mark.parametrize("level", [1 / 3, -2e5 / 3])
def test_a_gene_with_one_value_in_both_groups_is_no_marker(layout, level):
    """It varies over the cells that belong to neither group, and what is subtracted before squaring depends on them."""
    a = np.concatenate([np.zeros(37), np.full(60, 1.0), np.full(11, 9.0)])[:, None]
    x = np.full((108, 2), level)
    x[40:90] += np.random.default_rng(0).normal(size=(50, 2))
    groups, matrix = percentile_groups(sparse.csr_matrix(a), 90), layout(x)
    options = {"log_base": None, "pseudocount": 1, "min_cells": 2, "min_expected": 0}
    [block] = differential(groups, matrix, moments.scan(matrix), **options)
    np.testing.assert_array_equal(block.score, 0)
    assert np.isnan(block.pval).all()
