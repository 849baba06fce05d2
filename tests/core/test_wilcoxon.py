from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np
from scipy import sparse, stats

from sae.core import differential as welch_module
from sae.core import wilcoxon as module
from sae.core.groups import active_groups
from sae.core.moments import scan
from sae.core.wilcoxon import RankSum, rank_cells, wilcoxon

LAYOUTS = {"dense": np.asarray, "csr": sparse.csr_matrix}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def continuous(n=50, g=12, *, seed=0):
    """Values (n, g) of which about half are zero and the others differ."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random((n, g)) < 0.5, rng.gamma(2, size=(n, g)), 0)


def counts(n=50, g=12, *, seed=0):
    """Integers (n, g) with ties at each value."""
    return np.random.default_rng(seed).poisson(np.linspace(0.1, 4, g), size=(n, g)).astype(np.float64)


def signed(n=50, g=12, *, seed=0):
    """Rounded values (n, g) of either sign, with ties and some zeros."""
    return np.random.default_rng(seed).normal(size=(n, g)).round(1)


def never_zero(n=50, g=12, *, seed=0):
    return np.random.default_rng(seed).normal(10, size=(n, g)).round(1)


EXPRESSION = {"continuous": continuous, "counts": counts, "signed": signed, "never zero": never_zero}
each_expression = pytest.mark.parametrize("expression", EXPRESSION.values(), ids=EXPRESSION)


def activity(n=50, h=7, *, seed=1):
    """Activations (n, h) of features that are active in few to most cells."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random((n, h)) < np.linspace(0.15, 0.85, h), rng.uniform(0.1, 1, size=(n, h)), 0)


def compared(a, x, *, min_cells=1) -> RankSum:
    """All blocks as one."""
    blocks = list(wilcoxon(sparse.csr_matrix(a), x, min_cells=min_cells))
    assert blocks
    return RankSum(**{name: np.concatenate([vars(block)[name] for block in blocks]) for name in vars(blocks[0])})


def assert_same(found, expected, **tolerance):
    for name, values in vars(expected).items():
        np.testing.assert_allclose(getattr(found, name), values, err_msg=name, **tolerance)


def assert_as_scipy(found, a, x, rtol=1e-9):
    for row, feature in enumerate(found.features):
        active = a[:, feature] > 0
        expected = stats.mannwhitneyu(x[active], x[~active], method="asymptotic", use_continuity=True)
        auroc = expected.statistic / (active.sum() * (~active).sum())
        np.testing.assert_allclose(found.auroc[row], auroc, rtol=1e-15)
        np.testing.assert_allclose(found.pval[row], expected.pvalue, rtol=rtol)
        np.testing.assert_allclose(2 * stats.norm.sf(np.abs(found.score[row])), expected.pvalue, rtol=rtol)
        np.testing.assert_allclose(found.log_pval[row], np.log(expected.pvalue), rtol=rtol, atol=1e-12)
        assert (found.score[row] * (auroc - 0.5) >= 0).all()


@each_layout
@each_expression
def test_statistics_are_those_of_scipy(layout, expression):
    a, x = activity(), expression()
    found = compared(a, layout(x))
    np.testing.assert_array_equal(found.features, np.arange(7))
    assert np.ptp(x, axis=0).all()
    assert_as_scipy(found, a, x)


@each_layout
@each_expression
@pytest.mark.parametrize("sizes", [(1, 1, 1), (36, 70, 30), (60, 200, 120)], ids=str)
def test_blocks_do_not_change_the_result(layout, expression, sizes, monkeypatch):
    a, x = activity(), expression()
    at_once = compared(a, layout(x))
    for name, size in zip(("BLOCK_VALUES", "RANKED_VALUES", "SUM_VALUES"), sizes, strict=True):
        monkeypatch.setattr(module, name, size)
    assert len(list(wilcoxon(sparse.csr_matrix(a), layout(x), min_cells=1))) > 1
    for name, values in vars(at_once).items():
        np.testing.assert_array_equal(vars(compared(a, layout(x)))[name], values, err_msg=name)


@pytest.mark.parametrize("sums", [1, 50, 60, 80, 1000])
def test_blocks_are_those_of_the_t_test(sums, monkeypatch):
    a, x = sparse.csr_matrix(activity()), continuous()
    monkeypatch.setattr(welch_module, "BLOCK_VALUES", 2 * 12)
    monkeypatch.setattr(module, "BLOCK_VALUES", 2 * 12)
    monkeypatch.setattr(module, "SUM_VALUES", sums)
    others = welch_module.differential(active_groups(a), x, scan(x), log_base=None, pseudocount=1, min_cells=9)
    for block, other in zip(wilcoxon(a, x, min_cells=9), others, strict=True):
        np.testing.assert_array_equal(block.features, other.features)


@each_layout
def test_order_of_the_cells_does_not_matter(layout):
    a, x = activity(), counts()
    order = np.random.default_rng(5).permutation(len(x))
    for name, values in vars(compared(a, layout(x))).items():
        np.testing.assert_array_equal(vars(compared(a[order], layout(x[order])))[name], values, err_msg=name)


@each_layout
@pytest.mark.parametrize("value", [0.0, 0.1, 7.0, -2.0])
def test_constant_gene_is_not_tested_and_not_counted(layout, value):
    a, x = activity(), continuous()
    alone, found = compared(a, layout(x)), compared(a, layout(np.insert(x, 4, value, axis=1)))
    assert (found.score[:, 4] == 0).all()
    assert (found.auroc[:, 4] == 0.5).all()
    for name in ("pval", "log_pval", "padj"):
        assert np.isnan(vars(found)[name][:, 4]).all()
        np.testing.assert_array_equal(np.delete(vars(found)[name], 4, axis=1), vars(alone)[name])


@each_layout
def test_p_values_are_adjusted_within_a_feature(layout):
    found = compared(activity(), layout(continuous()))
    np.testing.assert_allclose(found.padj, stats.false_discovery_control(found.pval, axis=1), rtol=1e-12)


@each_layout
@pytest.mark.parametrize("n_active", [1, 2, 48, 49])
def test_one_or_two_cells_against_the_others(layout, n_active):
    a, x = (np.arange(50)[:, None] < n_active).astype(np.float64), counts()
    assert_as_scipy(compared(a, layout(x)), a, x)


@each_layout
def test_equal_groups_have_score_zero_and_p_one(layout):
    a, x = np.array([[1], [0], [1], [0]]), np.array([[0, 3], [0, 1], [2, 1], [2, 3]])
    found = compared(a, layout(x))
    assert (found.score == 0).all()
    assert (found.auroc == 0.5).all()
    assert (found.pval == 1).all()
    assert (found.log_pval == 0).all()


def log_tail(z):
    """log(2 (1 − Φ(z))) for z above 5 by Laplace's continued fraction φ(z) / (z + 1/(z + 2/(z + ...)))."""
    below = z
    for k in range(200, 0, -1):
        below = z + k / below
    return np.log(2) - z**2 / 2 - np.log(2 * np.pi) / 2 - np.log(below)


@each_layout
@pytest.mark.parametrize(("n", "underflows"), [(400, False), (1550, False), (3000, True)])
def test_log_p_goes_on_where_p_ends(layout, n, underflows):
    a = (np.arange(n)[:, None] < n / 2).astype(np.float64)
    x = np.where(a > 0, 1 + np.arange(n)[:, None], 0)
    found = compared(a, layout(x))
    np.testing.assert_allclose(found.log_pval, log_tail(found.score), rtol=1e-13)
    expected = stats.mannwhitneyu(x[a > 0], x[a == 0], method="asymptotic").pvalue
    np.testing.assert_allclose(found.pval, [[expected]], rtol=1e-9)
    assert (found.pval[0, 0] == 0) == underflows


@each_layout
def test_gene_of_one_cell_among_very_many_keeps_the_digits(layout):
    n = 300_000
    a, x = np.zeros((n, 1)), np.zeros((n, 1))
    a[:3] = x[0] = 1
    # That cell is above all n − 3 others, and two cells are tied with them: U = 2 (n − 3). n³ − (n − 1)³ − 1 = 3 n (n − 1).
    above, variance = 2 * (n - 3) - 3 * (n - 3) / 2, 3 * (n - 3) * 3 / 12
    np.testing.assert_allclose(compared(a, layout(x)).score, [[(above - 0.5) / np.sqrt(variance)]], rtol=1e-14)


@pytest.mark.parametrize(
    ("min_cells", "features"),
    [(1, [1, 2, 3, 4, 5]), (2, [2, 3, 4]), (3, [3, 4]), (6, [])],
)
def test_features_need_enough_active_and_inactive_cells(min_cells, features):
    n_active = [0, 1, 2, 5, 15, 19, 20]
    a = sparse.csr_matrix((np.arange(20)[:, None] < n_active).astype(np.float32))
    blocks = list(wilcoxon(a, counts(n=20), min_cells=min_cells))
    assert [feature for block in blocks for feature in block.features] == features


def test_no_cell_is_not_a_group():
    with pytest.raises(ValueError, match="min_cells=0 is below 1"):
        list(wilcoxon(sparse.csr_matrix(activity()), counts(), min_cells=0))


@pytest.mark.parametrize("value", [0, -1])
def test_cell_with_a_stored_value_that_is_not_positive_is_inactive(value):
    a, x = activity(), counts()
    stored = sparse.csr_matrix(np.where(a > 0, a, 9))
    stored.data[stored.data == 9] = value
    assert stored.nnz == a.size
    assert_same(compared(stored, x), compared(a, x), rtol=0)


def with_stored_zeros(x):
    stored = sparse.csr_matrix(np.ones_like(x))
    stored.data[:] = x.ravel()
    assert stored.nnz == x.size > np.count_nonzero(x)
    return stored


def reversed_within_rows(x):
    rows = sparse.csr_matrix(x)
    for start, stop in zip(rows.indptr[:-1], rows.indptr[1:], strict=True):
        rows.indices[start:stop] = rows.indices[start:stop][::-1].copy()
        rows.data[start:stop] = rows.data[start:stop][::-1].copy()
    return sparse.csr_matrix((rows.data, rows.indices, rows.indptr), shape=x.shape)


def changed_after_a_look(x):
    rows = sparse.csr_matrix(x)
    assert rows.has_canonical_format
    other = reversed_within_rows(x)
    rows.indices[:], rows.data[:] = other.indices, other.data
    assert rows.has_canonical_format
    return rows


def with_repeated_entries(x):
    rows = sparse.csr_matrix(x)
    halves = np.repeat(rows.data / 2, 2), np.repeat(rows.indices, 2), rows.indptr * 2
    return sparse.csr_matrix(halves, shape=x.shape)


def with_long_indices(x):
    rows = sparse.csr_matrix(x)
    rows.indices, rows.indptr = rows.indices.astype(np.int64), rows.indptr.astype(np.int64)
    return rows


STORED = {
    "zeros": with_stored_zeros,
    "unsorted": reversed_within_rows,
    "unsorted and does not know": changed_after_a_look,
    "repeated": with_repeated_entries,
    "long indices": with_long_indices,
    "sparse array": sparse.csr_array,
    "column order": np.asfortranarray,
}


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
@each_expression
def test_result_does_not_depend_on_how_expression_is_stored(stored, expression, monkeypatch):
    monkeypatch.setattr(module, "RANKED_VALUES", 150)
    a, x = activity(), expression(seed=3)
    x[0] = 0
    other = stored(x)
    np.testing.assert_array_equal(other.toarray() if sparse.issparse(other) else other, x)
    before = other.copy()
    assert_same(compared(a, other), compared(a, x), rtol=0)
    if sparse.issparse(other):
        for part in ("data", "indices", "indptr"):
            np.testing.assert_array_equal(getattr(other, part), getattr(before, part))


@each_layout
@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint8, np.bool_])
def test_expression_of_any_number_type_is_ranked(layout, dtype):
    a, x = activity(), counts()[:, :6].astype(dtype)
    assert_as_scipy(compared(a, layout(x)), a, x.astype(np.float64))


@each_expression
def test_ranks_and_ties_are_those_of_scipy(expression):
    x = expression()
    ranks = rank_cells(sparse.csc_matrix(x))
    np.testing.assert_array_equal((ranks.twice.toarray() + ranks.zero) / 2, stats.rankdata(x, axis=0))
    n = len(x)
    np.testing.assert_allclose(ranks.spread / (n**3 - n), [stats.tiecorrect(column) for column in x.T], rtol=1e-14)


def test_ties_of_millions_of_cells_do_not_overflow():
    n, n_ones = 4_000_000, 2_000_000
    ones = sparse.csc_matrix((np.ones(n_ones), np.arange(n_ones), [0, n_ones]), shape=(n, 1))
    assert rank_cells(ones).spread == n**3 - n_ones**3 - (n - n_ones) ** 3


@pytest.mark.parametrize("n_active", [5, 100])
def test_p_values_are_uniform_where_there_is_no_difference(n_active):
    rng = np.random.default_rng(0)
    a = (np.arange(200)[:, None] < n_active).astype(np.float64)
    found = compared(a, rng.normal(size=(200, 2000)))
    for threshold in (0.5, 0.1, 0.01):
        below = stats.binomtest(int((found.pval < threshold).sum()), 2000, threshold)
        assert below.pvalue > 1e-3, threshold
    np.testing.assert_allclose([found.score.mean(), found.score.std()], [0, 1], atol=0.06)


shapes = st.tuples(st.integers(2, 25), st.integers(1, 6))


@settings(deadline=None)
@given(x=st_np.arrays(np.float64, shapes, elements=st.integers(-3, 9).map(lambda i: i / 4)), data=st.data())
def test_any_ties_are_those_of_scipy_in_every_layout(x, data):
    n_active = data.draw(st.integers(1, len(x) - 1))
    a = np.zeros((len(x), 1))
    a[data.draw(st.permutations(range(len(x))))[:n_active]] = 1
    dense, csr = compared(a, x), compared(a, sparse.csr_matrix(x))
    assert_same(csr, dense, rtol=0)
    varies = np.ptp(x, axis=0) > 0
    np.testing.assert_array_equal(np.isnan(dense.pval[0]), ~varies)
    of_varying = [values[:, varies] for name, values in vars(dense).items() if name != "features"]
    assert_as_scipy(RankSum(dense.features, *of_varying), a, x[:, varies])
