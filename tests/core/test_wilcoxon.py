from __future__ import annotations

import itertools
import math
from functools import partial

import h5py
import numpy as np
import pytest
from anndata.io import sparse_dataset, write_elem
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np
from scipy import sparse, special, stats

from sae.core import columns, moments
from sae.core import differential as welch_module
from sae.core import wilcoxon as module
from sae.core.groups import active_groups
from sae.core.moments import scan
from sae.core.wilcoxon import MIN_EXPECTED, RankSum, Strata, log_normal_tail, rank_cells, wilcoxon

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


def batches(n=50, *, seed=2):
    """Batch of each cell (n,), of different sizes."""
    return np.random.default_rng(seed).choice(4, n, p=[0.1, 0.2, 0.3, 0.4])


CODES = {"plain": lambda n: None, "strata": batches}
each_codes = pytest.mark.parametrize("codes", CODES.values(), ids=CODES)


def compared(a, x, codes=None, *, min_cells=1, min_expected=MIN_EXPECTED) -> RankSum:
    """All blocks as one."""
    blocks = list(
        wilcoxon(active_groups(sparse.csr_matrix(a)), x, codes, min_cells=min_cells, min_expected=min_expected)
    )
    assert blocks
    return RankSum(**{name: np.concatenate([vars(block)[name] for block in blocks]) for name in vars(blocks[0])})


plain = partial(compared, min_expected=0)


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
    found = plain(a, layout(x))
    np.testing.assert_array_equal(found.features, np.arange(7))
    assert np.ptp(x, axis=0).all()
    assert_as_scipy(found, a, x)


@each_layout
@each_expression
@each_codes
@pytest.mark.parametrize("sizes", [(1, 1, 1), (36, 70, 30), (60, 200, 120)], ids=str)
def test_blocks_do_not_change_the_result(layout, expression, codes, sizes, monkeypatch):
    a, x = activity(), expression()
    at_once = compared(a, layout(x), codes(50))
    monkeypatch.setattr(module, "BLOCK_VALUES", sizes[0])
    monkeypatch.setattr(columns, "COLUMN_VALUES", sizes[1])
    monkeypatch.setattr(module, "SUM_VALUES", sizes[2])
    assert len(list(wilcoxon(active_groups(sparse.csr_matrix(a)), layout(x), min_cells=1))) > 1
    # Products with the strata are summed by BLAS in an order that depends on the block.
    assert_same(compared(a, layout(x), codes(50)), at_once, rtol=1e-13 if codes is batches else 0, atol=1e-14)


@each_layout
@each_codes
@pytest.mark.parametrize("n_threads", [2, 3, 8])
def test_threads_do_not_change_the_result(layout, codes, n_threads, monkeypatch):
    a, x = activity(), layout(signed())
    monkeypatch.setattr(module, "BLOCK_VALUES", 2 * 12)
    monkeypatch.setattr(columns, "COLUMN_VALUES", 200)
    monkeypatch.setattr(module, "available_threads", lambda: 1)
    alone = compared(a, x, codes(50))
    monkeypatch.setattr(module, "available_threads", lambda: n_threads)
    assert_same(compared(a, x, codes(50)), alone, rtol=0)


def on_disk(x, folder):
    file = h5py.File(folder / "x.h5ad", "w")
    write_elem(file, "x", sparse.csr_matrix(x))
    return sparse_dataset(file["x"])


def memory_map(x, folder):
    np.save(folder / "x.npy", x)
    return np.load(folder / "x.npy", mmap_mode="r")


@each_expression
@each_codes
@pytest.mark.parametrize("place", [on_disk, memory_map])
def test_matrix_on_disk_gives_what_it_gives_in_memory(place, expression, codes, tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "DISK_COLUMN_VALUES", 120)
    monkeypatch.setattr(moments, "CHUNK_ROWS", 7)
    a, x = activity(), expression()
    assert_same(compared(a, place(x, tmp_path), codes(50)), compared(a, x, codes(50)), rtol=0)


class Counted:
    """Rows on disk, and how often they were read."""

    def __init__(self, x):
        self._x, self.shape, self.dtype, self.n_read = x, x.shape, x.dtype, 0

    def __getitem__(self, rows):
        self.n_read += rows.stop - rows.start
        return self._x[rows]


@pytest.mark.parametrize(("codes", "rounds"), [(None, 2), (batches(), 4)], ids=CODES)
def test_genes_are_ranked_again_for_the_features_whose_sums_do_not_fit(codes, rounds, monkeypatch):
    a, x = activity(h=7), Counted(counts())
    monkeypatch.setattr(module, "BLOCK_VALUES", 12)
    monkeypatch.setattr(module, "SUM_VALUES", 4 * 12)
    assert_same(compared(a, x, codes), compared(a, counts(), codes), rtol=0)
    assert x.n_read == 50 * (1 + rounds)


@pytest.mark.parametrize("sums", [1, 50, 60, 80, 1000])
def test_blocks_are_those_of_the_t_test(sums, monkeypatch):
    a, x = sparse.csr_matrix(activity()), continuous()
    monkeypatch.setattr(welch_module, "BLOCK_VALUES", 2 * 12)
    monkeypatch.setattr(module, "BLOCK_VALUES", 2 * 12)
    monkeypatch.setattr(module, "SUM_VALUES", sums)
    others = welch_module.differential(active_groups(a), x, scan(x), log_base=None, pseudocount=1, min_cells=9)
    for block, other in zip(wilcoxon(active_groups(a), x, min_cells=9), others, strict=True):
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
    assert_as_scipy(plain(a, layout(x)), a, x)


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
def test_log_p_is_finite_and_in_the_order_of_the_scores(layout):
    rng = np.random.default_rng(0)
    a = (np.arange(6000)[:, None] < 3000).astype(np.float64)
    x = rng.normal(10, size=(6000, 200)) + a * np.linspace(0, 8, 200)
    found = compared(a, layout(x))
    score, log_pval = np.abs(found.score[0]), found.log_pval[0]
    assert (found.pval == 0).any()
    assert log_pval.min() < -1900
    order = np.argsort(score)
    assert (np.diff(log_pval[order])[np.diff(score[order]) > 0] < 0).all()


@each_layout
def test_gene_of_one_cell_among_very_many_keeps_the_digits(layout):
    n = 300_000
    a, x = np.zeros((n, 1)), np.zeros((n, 1))
    a[:3] = x[0] = 1
    # That cell is above all n − 3 others, and two cells are tied with them: U = 2 (n − 3). n³ − (n − 1)³ − 1 = 3 n (n − 1).
    above, variance = 2 * (n - 3) - 3 * (n - 3) / 2, 3 * (n - 3) * 3 / 12
    np.testing.assert_allclose(plain(a, layout(x)).score, [[(above - 0.5) / np.sqrt(variance)]], rtol=1e-14)


@pytest.mark.parametrize(
    ("min_cells", "features"),
    [(1, [1, 2, 3, 4, 5]), (2, [2, 3, 4]), (3, [3, 4]), (6, [])],
)
def test_features_need_enough_active_and_inactive_cells(min_cells, features):
    n_active = [0, 1, 2, 5, 15, 19, 20]
    a = sparse.csr_matrix((np.arange(20)[:, None] < n_active).astype(np.float32))
    blocks = list(wilcoxon(active_groups(a), counts(n=20), min_cells=min_cells))
    assert [feature for block in blocks for feature in block.features] == features


def test_no_cell_is_not_a_group():
    with pytest.raises(ValueError, match="min_cells=0 is below 1"):
        list(wilcoxon(active_groups(sparse.csr_matrix(activity())), counts(), min_cells=0))


@pytest.mark.parametrize("value", [0, -1])
def test_cell_with_a_stored_value_that_is_not_positive_is_inactive(value):
    a, x = activity(), counts()
    stored = sparse.csr_matrix(np.where(a > 0, a, 9))
    stored.data[stored.data == 9] = value
    assert stored.nnz == a.size
    assert_same(compared(stored, x), compared(a, x), rtol=0)


@each_codes
@pytest.mark.parametrize("expression", [signed, counts])
def test_stored_zeros_are_zeros(codes, expression):
    a, x = activity(), expression()
    stored = sparse.csr_matrix(np.ones_like(x))
    stored.data[:] = x.ravel()
    assert stored.nnz > np.count_nonzero(x)
    assert_same(compared(a, stored, codes(50)), compared(a, x, codes(50)), rtol=0)


@each_layout
@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint8, np.bool_])
def test_expression_of_any_number_type_is_ranked(layout, dtype):
    a, x = activity(), counts()[:, :6].astype(dtype)
    assert_as_scipy(plain(a, layout(x)), a, x.astype(np.float64))


def stored(column):
    cells = np.flatnonzero(column).astype(np.int32)
    return cells, column[cells]


def strata(codes):
    return Strata(codes.astype(np.int32), np.bincount(codes))


@each_expression
def test_ranks_and_ties_are_those_of_scipy_in_each_stratum(expression):
    codes = batches()
    for column in expression().T:
        cells, values = stored(column)
        ranks, centre, spread = rank_cells(cells, values, strata(codes))
        for b in range(4):
            expected, n = stats.rankdata(column[codes == b]), (codes == b).sum()
            # Twice the rank less its mean (n + 1)/2; cells that are not stored have that of zero.
            found = np.full(50, centre[b])
            found[cells] += ranks
            np.testing.assert_array_equal(found[codes == b], 2 * expected - n - 1)
            np.testing.assert_allclose(spread[b], stats.tiecorrect(expected) * (n**3 - n), rtol=1e-14)


def test_ties_of_millions_of_cells_do_not_overflow():
    n, n_ones = 4_000_000, 2_000_000
    ones = np.arange(n_ones, dtype=np.int32)
    _, centre, spread = rank_cells(ones, np.ones(n_ones), strata(np.zeros(n, np.int64)))
    assert centre == -n_ones
    assert spread == n**3 - n_ones**3 - (n - n_ones) ** 3


@each_layout
def test_nan_in_a_gene_stays_there(layout):
    a, x = activity(), signed()
    spoilt = x.copy()
    spoilt[3:5, 4] = np.nan
    found, expected = compared(a, layout(spoilt)), compared(a, x)
    for name in ("score", "auroc", "pval"):
        np.testing.assert_array_equal(np.delete(vars(found)[name], 4, 1), np.delete(vars(expected)[name], 4, 1))


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


@given(x=st_np.arrays(np.float64, shapes, elements=st.integers(-3, 9).map(lambda i: i / 4)), data=st.data())
def test_any_ties_are_those_of_scipy_in_every_layout(x, data):
    n_active = data.draw(st.integers(1, len(x) - 1))
    a = np.zeros((len(x), 1))
    a[data.draw(st.permutations(range(len(x))))[:n_active]] = 1
    dense, csr = plain(a, x), plain(a, sparse.csr_matrix(x))
    assert_same(csr, dense, rtol=0)
    varies = np.ptp(x, axis=0) > 0
    np.testing.assert_array_equal(np.isnan(dense.pval[0]), ~varies)
    of_varying = [values[:, varies] for name, values in vars(dense).items() if name != "features"]
    assert_as_scipy(RankSum(dense.features, *of_varying), a, x[:, varies])


def log_p_of_rare_cells(active, values):
    """Log p of one gene by a loop over the cells with the gene in the smaller group; −∞ where that has less of it."""
    small = active if 2 * active.sum() <= len(active) else ~active
    n, m, with_gene = len(values), small.sum(), values > 0
    ranks = stats.rankdata(values)
    above = ranks - ((~with_gene).sum() + 1) / 2
    t, n_with = above[small].sum(), with_gene.sum()
    if t <= m * n_with / 2:
        return -np.inf
    log_terms = []
    for k in range(max(0, m + n_with - n), min(m, n_with) + 1):
        variance = k * (n_with - k) / n_with * above[with_gene].var(ddof=1) if n_with > 1 else 0
        z = (t - 0.5 - k * n / 2) / np.sqrt(variance) if variance > 1e-9 else np.copysign(np.inf, t - 0.5 - k * n / 2)
        log_terms.append(stats.hypergeom.logpmf(k, n, n_with, m) + stats.norm.logsf(z))
    return min(np.log(2) + special.logsumexp(log_terms), 0)


def assert_as_rare(found, usual, a, x):
    """At least the p of the rare cells, a score that has it, and the rest of the plain test. Returns which p are raised."""
    of_rare = [[log_p_of_rare_cells(a[:, feature] > 0, column) for column in x.T] for feature in found.features]
    np.testing.assert_allclose(found.log_pval, np.maximum(of_rare, usual.log_pval), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(found.pval, np.exp(found.log_pval), rtol=1e-13)
    score = np.abs(found.score)
    np.testing.assert_allclose(
        np.minimum(np.log(2) + special.log_ndtr(-score), 0), found.log_pval, rtol=1e-9, atol=1e-11
    )
    assert (found.score * usual.score >= 0).all()
    np.testing.assert_array_equal(found.auroc, usual.auroc)
    return found.log_pval > usual.log_pval + 1e-9


@each_layout
@pytest.mark.parametrize("expression", [continuous, counts])
@pytest.mark.parametrize("h", [7, 40])
def test_rare_cells_are_those_of_a_loop(layout, expression, h):
    a, x = activity(h=h), expression()
    assert assert_as_rare(compared(a, layout(x)), plain(a, x), a, x).mean() > 0.1


@given(x=st_np.arrays(np.float64, shapes, elements=st.integers(-9, 9).map(lambda i: max(i, 0) / 4)), data=st.data())
def test_any_rare_cells_are_those_of_a_loop(x, data):
    x = x[:, np.ptp(x, axis=0) > 0]
    n_active = data.draw(st.integers(1, len(x) - 1))
    a = np.zeros((len(x), 1))
    a[data.draw(st.permutations(range(len(x))))[:n_active]] = 1
    assert_as_rare(compared(a, x), plain(a, x), a, x)


@pytest.mark.parametrize("n_active", [3, 20, 180, 197])
def test_gene_that_is_on_or_off_has_at_least_twice_the_p_of_fishers_exact_test(n_active):
    rng = np.random.default_rng(0)
    a = (np.arange(200)[:, None] < n_active).astype(float)
    likelier = (a > 0) if n_active < 100 else (a == 0)
    x = (rng.random((200, 300)) < np.linspace(0.01, 0.2, 300) * np.where(likelier, 3, 1)).astype(float)
    x = x[:, np.ptp(x, axis=0) > 0]
    found, usual, n_raised = compared(a, x), plain(a, x), 0
    for gene, column in enumerate(x.T):
        has, inside = column > 0, likelier[:, 0]
        table = [[(has & inside).sum(), (has & ~inside).sum()], [(~has & inside).sum(), (~has & ~inside).sum()]]
        exact = min(1, 2 * stats.fisher_exact(table, alternative="greater").pvalue)
        more = has[inside].mean() > has.mean()
        np.testing.assert_allclose(found.pval[0, gene], max(usual.pval[0, gene], exact if more else 0), rtol=1e-9)
        n_raised += found.pval[0, gene] > 1.01 * usual.pval[0, gene]
    assert n_raised > 50


def test_only_genes_with_few_expected_cells_change():
    a, x = activity(), counts()
    n1, n_with = (a > 0).sum(axis=0), (x > 0).sum(axis=0)
    expected = np.minimum(n1, 50 - n1)[:, None] * n_with / 50
    everywhere, usual = compared(a, x, min_expected=np.inf), plain(a, x)
    for least in (3, 6):
        assert (everywhere.pval > usual.pval)[expected >= least].any()
        found = compared(a, x, min_expected=least)
        for name in ("pval", "log_pval", "score"):
            chosen = np.where(expected < least, vars(everywhere)[name], vars(usual)[name])
            np.testing.assert_array_equal(vars(found)[name], chosen, err_msg=name)


@each_layout
def test_negative_values_and_strata_keep_the_plain_p(layout):
    a, x = activity(), counts()
    assert (compared(a, layout(x)).pval[:, 0] > plain(a, layout(x)).pval[:, 0]).any()
    for codes in (batches(), np.arange(50) // 40):
        assert_same(compared(a, layout(x), codes), plain(a, layout(x), codes), rtol=0)
    x[np.argmin(x[:, 0]), 0] = -1
    for name in ("pval", "score"):
        kept, usual = vars(compared(a, layout(x)))[name], vars(plain(a, layout(x)))[name]
        np.testing.assert_array_equal(kept[:, 0], usual[:, 0])


@pytest.mark.parametrize("rare", ["active", "inactive"])
def test_rare_genes_are_rarely_found_where_there_is_no_difference(rare):
    rng = np.random.default_rng(0)
    n, g, n_small = 1000, 10_000, 10
    x = np.where(rng.random((n, g)) < rng.uniform(0.001, 0.5, g), rng.gamma(2, size=(n, g)), 0)
    x = sparse.csr_matrix(x[:, x.any(axis=0)])
    a = np.zeros((n, 1))
    a[:n_small] = 1
    found, usual = (f(a if rare == "active" else 1 - a, x) for f in (compared, plain))
    for threshold in (0.05, 1e-2, 1e-3, 1e-4):
        n_found = int((found.pval < threshold).sum())
        assert stats.binomtest(n_found, x.shape[1], threshold, alternative="greater").pvalue > 1e-3, threshold
    assert (usual.pval < 1e-4).mean() > 5e-4
    assert (found.padj < 0.05).sum() == 0 < (usual.padj < 0.05).sum()


def test_perfect_marker_of_a_rare_feature_keeps_a_tiny_p():
    a = (np.arange(5000)[:, None] < 20).astype(float)
    found = compared(a, a * np.column_stack([np.ones(5000), 1 + np.arange(5000)]))
    exact = np.log(2) - np.log(float(math.comb(5000, 20)))
    np.testing.assert_allclose(found.log_pval, [[exact, exact]], rtol=1e-10)
    assert (found.pval < 1e-54).all()


def test_log_p_of_rare_cells_goes_on_where_p_ends():
    n, m = 60_000, 1000
    a = (np.arange(n)[:, None] < m).astype(float)
    found = compared(a, a)
    assert found.pval == 0
    exact = np.log(2) - (special.gammaln(n + 1) - special.gammaln(m + 1) - special.gammaln(n - m + 1))
    np.testing.assert_allclose(found.log_pval, exact, rtol=1e-11)
    np.testing.assert_allclose(np.log(2) + special.log_ndtr(-found.score), exact, rtol=1e-9)


def test_level_of_a_common_gene_tells_a_rare_feature():
    """12 cells with the highest values of a gene that four cells in five have: the number that have it says little."""
    rng = np.random.default_rng(0)
    x = np.where(rng.random(2000) < 0.8, rng.gamma(2, size=2000), 0)
    a = np.zeros(2000)
    a[np.argsort(-x)[:12]] = 1
    assert 2 * stats.hypergeom.sf(11, 2000, (x > 0).sum(), 12) > 0.1
    assert compared(a[:, None], x[:, None]).pval < 1e-8


def test_normal_tail_is_that_of_scipy():
    z = np.concatenate([np.linspace(-40, 60, 2001), [1e3, 1e5, np.inf, -np.inf]])
    np.testing.assert_allclose([log_normal_tail(value) for value in z], special.log_ndtr(-z), rtol=3e-8, atol=1e-16)


def van_elteren(active, values, codes):
    """z, AUROC and p of one gene by a loop: the variance is that of a sum of n₁ of the n ranks drawn without replacement."""
    w = variance = u = pairs = 0
    for b in np.unique(codes):
        inside, on = codes == b, active[codes == b]
        n, n1, n0 = inside.sum(), on.sum(), (~on).sum()
        if n1 and n0:
            ranks = stats.rankdata(values[inside])
            w += (ranks[on].sum() - n1 * (n + 1) / 2) / (n + 1)
            variance += n1 * n0 / n * ranks.var(ddof=1) / (n + 1) ** 2
            u += (np.sign(values[inside][on][:, None] - values[inside][~on]) / 2 + 0.5).sum()
            pairs += n1 * n0
    if variance < 1e-12:
        return 0, u / pairs if pairs else 0.5, np.nan
    z = w / np.sqrt(variance)
    return z, u / pairs, 2 * stats.norm.sf(abs(z))


def assert_as_loop(found, a, x, codes):
    for row, feature in enumerate(found.features):
        columns = [van_elteren(a[:, feature] > 0, column, codes) for column in x.T]
        score, auroc, pval = np.array(columns).T
        np.testing.assert_allclose(found.score[row], score, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(found.auroc[row], auroc, rtol=1e-13)
        np.testing.assert_allclose(found.pval[row], pval, rtol=1e-8)
        np.testing.assert_allclose(found.log_pval[row], np.log(pval), rtol=1e-8, atol=1e-8)


@each_layout
@each_expression
def test_strata_are_combined_as_in_a_loop(layout, expression):
    a, x = activity(), expression()
    assert_as_loop(compared(a, layout(x), batches()), a, x, batches())


@each_expression
def test_scores_of_all_assignments_within_strata_have_variance_one(expression):
    x = expression(n=9)
    choices = itertools.product(itertools.combinations(range(4), 2), itertools.combinations(range(4, 9), 2))
    a = np.array([np.isin(np.arange(9), np.concatenate(chosen)) for chosen in choices], float).T
    assert a.shape == (9, 60)
    found = compared(a, x, np.repeat([0, 1], [4, 5]))
    tested = ~np.isnan(found.pval[0])
    assert tested.sum() > 5
    np.testing.assert_allclose(found.score.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose((found.score**2).mean(axis=0)[tested], 1, rtol=1e-12)


@each_layout
@each_expression
@pytest.mark.parametrize("code", [0, 7])
def test_lone_stratum_is_the_plain_test(layout, expression, code):
    a, x = activity(), expression()
    assert_same(compared(a, layout(x), np.full(50, code)), compared(a, layout(x)), rtol=0)


def test_names_of_strata_do_not_matter():
    a, x, codes = activity(), signed(), batches()
    named = np.array(["d", "b", "a", "c"])[codes]
    assert_same(compared(a, x, named), compared(a, x, codes), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [0, 1])
def test_stratum_with_cells_of_one_kind_adds_nothing(value):
    a, x, codes = activity(n=80), signed(n=80), batches(n=80)
    a[codes == 3] = value
    kept = codes < 3
    assert_same(compared(a, x, codes), compared(a[kept], x[kept], codes[kept]), rtol=1e-10, atol=1e-12)


def test_what_differs_only_between_strata_is_not_tested():
    a, codes = activity(h=2), batches()
    x = np.column_stack([codes, -codes / 7, signed(g=1)[:, 0]])
    a[:, 1] = codes > 1
    found = compared(a, x, codes)
    untested = np.array([[True, True, False], [True, True, True]])
    for name in ("pval", "log_pval", "padj"):
        np.testing.assert_array_equal(np.isnan(vars(found)[name]), untested)
    assert (found.score[untested] == 0).all()
    assert (found.auroc[untested] == 0.5).all()


def test_batch_that_a_feature_prefers_does_not_make_the_p_value():
    rng = np.random.default_rng(0)
    n, g = 600, 1000
    codes = np.repeat([0, 1, 2], n // 3)
    a = (rng.random((n, 1)) < np.array([0.1, 0.3, 0.6])[codes, None]).astype(float)
    x = rng.normal(size=(n, g)) + codes[:, None]
    assert (compared(a, x).pval < 1e-5).mean() > 0.99
    found = compared(a, x, codes)
    for threshold in (0.5, 0.1, 0.01):
        assert stats.binomtest(int((found.pval < threshold).sum()), g, threshold).pvalue > 1e-3, threshold
    np.testing.assert_allclose([found.score.mean(), found.score.std()], [0, 1], atol=0.08)
    raised = compared(a, x + 0.8 * a, codes)
    assert (raised.score > 3).mean() > 0.99
    assert (raised.auroc > 0.6).all()


def test_codes_are_of_all_cells():
    with pytest.raises(ValueError, match=r"codes has shape \(49,\), but there are 50 cells"):
        list(wilcoxon(active_groups(sparse.csr_matrix(activity())), counts(), np.zeros(49), min_cells=1))


@given(x=st_np.arrays(np.float64, shapes, elements=st.integers(-3, 9).map(lambda i: i / 4)), data=st.data())
def test_any_ties_in_any_strata_are_those_of_a_loop(x, data):
    n = len(x)
    a = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), float)[:, None]
    a[0], a[-1] = 1, 0
    codes = np.array(data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n)))
    if len(np.unique(codes)) == 1:
        codes[0] += 1
    found = compared(a, x, codes)
    assert_as_loop(found, a, x, codes)
    assert_same(compared(a, sparse.csr_matrix(x), codes), found, rtol=0)
