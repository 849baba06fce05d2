from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from sae.core import moments as module
from sae.core import partitions
from sae.core.groups import active_groups, percentile_groups
from sae.core.moments import chunks, group_moments, scan
from sae.core.rows import Rows


def by_rows(layout):
    """As what gives rows for a slice, and nothing else."""
    return lambda x: Rows(layout(x), np.arange(len(x)))


LAYOUTS = {
    "dense": np.asarray,
    "columns first": np.asfortranarray,
    "csr": sparse.csr_matrix,
    "dense by rows": by_rows(np.asarray),
    "csr by rows": by_rows(sparse.csr_matrix),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def expression(n=60, g=300, *, seed=0):
    """Sparse values (n, g); column 0 is everywhere zero, 1 everywhere 2, 2 has no zeros."""
    rng = np.random.default_rng(seed)
    x = np.where(rng.random((n, g)) < 0.3, rng.exponential(size=(n, g)), 0)
    x[:, 0], x[:, 1], x[:, 2] = 0, 2, rng.uniform(5, 6, n)
    return x


def activity(n=60, h=9, *, seed=1):
    """Activations (n, h) of features that are active in few to nearly all cells."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random((n, h)) < np.linspace(0.1, 0.95, h), rng.uniform(0.1, 1, size=(n, h)), 0)


def measured(a, x, groups=active_groups, *, block=4):
    made = groups(sparse.csr_matrix(a))
    blocks = [part.moments() for part in group_moments(made, np.arange(a.shape[1]), x, scan(x), block=block)]
    return [
        {name: np.concatenate([vars(part)[name] for part in parts]) for name in ("n", "mean", "variance")}
        for parts in zip(*blocks, strict=True)
    ]


def assert_moments(found, x, cells, rtol=1e-10):
    """Against NumPy, feature by feature."""
    for feature, inside in enumerate(cells.T):
        part = np.asarray(x, dtype=np.float64)[inside]
        assert found["n"][feature] == len(part)
        np.testing.assert_allclose(found["mean"][feature], part.mean(axis=0), rtol=rtol, atol=1e-14)
        np.testing.assert_allclose(found["variance"][feature], part.var(axis=0, ddof=1), rtol=rtol, atol=1e-14)


@each_layout
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32])
def test_moments_of_both_groups(layout, dtype):
    a, x = activity(), (10 * expression()).astype(dtype)
    positive, reference = measured(a, layout(x))
    assert_moments(positive, x, a > 0)
    assert_moments(reference, x, a == 0)


@each_layout
def test_moments_of_percentile_groups(layout):
    a, x = activity(n=120), expression(n=120)
    positive, reference = measured(a, layout(x), lambda found: percentile_groups(found, 80))
    assert_moments(positive, x, a > np.percentile(a, 80, axis=0))
    assert_moments(reference, x, a == 0)


@each_layout
def test_constant_in_a_group_has_no_variance(layout):
    a, x = activity(), expression()
    x[:, 3] = np.where(a[:, 4] > 0, 0.1, x[:, 3])
    positive, reference = measured(a, layout(x))
    for group in (positive, reference):
        np.testing.assert_array_equal(group["variance"][:, :2], 0)
    assert positive["variance"][4, 3] == 0
    assert reference["variance"][4, 3] > 0


@each_layout
def test_constant_beside_a_few_large_values_has_no_variance(layout):
    """The sums of the larger group are the total less those of the smaller one, and rounded as the total is."""
    a, x = activity(n=500, h=20), expression(n=500)
    rng = np.random.default_rng(0)
    for feature in range(5):
        active = a[:, feature] > 0
        large = 100 * rng.random(500)
        x[:, feature] = np.where(active, large - large[active].mean(), -0.001)
    _, reference = measured(a, layout(x))
    np.testing.assert_array_equal(reference["variance"][range(5), range(5)], 0)


@each_layout
def test_one_cell_has_a_mean_only(layout):
    a, x = activity(), expression()
    a[:, 0] = 0
    a[7, 0] = 1
    positive, _ = measured(a, layout(x))
    np.testing.assert_allclose(positive["mean"][0], x[7])
    assert np.isnan(positive["variance"][0]).all()


@each_layout
@pytest.mark.parametrize("ratio", [1e2, 1e4])
def test_means_far_above_the_spread(layout, ratio):
    rng = np.random.default_rng(0)
    a, x = activity(n=500), ratio + rng.standard_normal((500, 20))
    positive, reference = measured(a, layout(x))
    assert_moments(positive, x, a > 0, rtol=1e-6)
    assert_moments(reference, x, a == 0, rtol=1e-6)


@pytest.mark.parametrize("few", ["positive", "reference"])
def test_a_small_group_is_not_what_rounding_leaves_of_all_cells(few):
    """A gene with values around 1 in a tenth of the cells and around a million in the others."""
    rng = np.random.default_rng(0)
    inside = np.arange(500) % 10 == 0
    x = np.where(inside, 1.0, 1e6)[:, None] * rng.uniform(0.5, 1.5, size=(500, 3))
    # A zero, so that the mean is not subtracted.
    x[0] = 0
    a = inside if few == "positive" else ~inside
    positive, reference = measured(a[:, None].astype(float), sparse.csr_matrix(x))
    found = positive if few == "positive" else reference
    assert_moments(found, x, inside[:, None], rtol=1e-12)


def test_spread_within_a_group_that_is_lost_is_counted():
    rng = np.random.default_rng(0)
    a, x = activity(n=500), expression(n=500)
    x[:, 5] = np.where(a[:, 4] > 0, 1e6 + rng.standard_normal(500), 0)
    x = sparse.csr_matrix(x)
    made, genes = active_groups(sparse.csr_matrix(a)), scan(x)
    [block] = group_moments(made, np.array([4]), x, genes, block=4)
    positive, reference = block.moments()
    assert positive.imprecise() == 1
    assert reference.imprecise() == 0


@each_layout
def test_chunks_blocks_and_threads_do_not_matter(layout, monkeypatch):
    a, x = activity(), layout(expression())
    at_once = measured(a, x)
    monkeypatch.setattr(module, "CHUNK_ROWS", 7)
    monkeypatch.setattr(module, "SUM_VALUES", 300)
    for one, other in zip(measured(a, x, block=2), at_once, strict=True):
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-12, atol=1e-15, err_msg=name)
    monkeypatch.undo()
    monkeypatch.setattr(partitions, "available_threads", lambda: 1)
    for one, other in zip(measured(a, x), at_once, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def assert_scanned(genes, x):
    """Against NumPy, over the finite values."""
    finite = np.where(np.isfinite(x), x, np.nan)
    np.testing.assert_allclose(genes.mean, np.nanmean(finite, axis=0), rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(genes.lowest, np.nanmin(finite, axis=0))
    np.testing.assert_array_equal(genes.highest, np.nanmax(finite, axis=0))
    np.testing.assert_array_equal(genes.varies, np.nanmin(finite, axis=0) < np.nanmax(finite, axis=0))
    np.testing.assert_array_equal(genes.whole, (np.isnan(finite) | (finite % 1 == 0)).all(axis=0))
    np.testing.assert_array_equal(genes.n_bad, np.isnan(finite).sum(axis=0))


@each_layout
@pytest.mark.parametrize("rows", [7, 8192])
def test_scan(layout, rows, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ROWS", rows)
    x = expression()
    x[:, 4] = -1
    x[0, 5], x[1:, 5] = 3, 0
    x[:, 6:9] = np.rint(x[:, 6:9]) - 2
    x[:, 9:11], x[59, 9], x[0, 10] = 4, 4.5, 4.5
    genes = scan(layout(x))
    assert_scanned(genes, x)
    assert genes.shift[2] == pytest.approx(x[:, 2].mean())
    assert genes.whole[[0, 1, 4, 5, 6, 7, 8]].all() and not genes.whole[[2, 9, 10]].any()


@each_layout
@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint8, bool])
def test_scan_of_any_number_type(layout, dtype):
    x = (10 * expression()).astype(dtype)
    assert_scanned(scan(layout(x)), x.astype(np.float64))


@each_layout
def test_scan_counts_what_is_not_finite_and_passes_over_it(layout):
    x = expression()
    x[3, 1], x[5:9, 2], x[0, 2], x[59, 3] = np.nan, np.inf, -np.inf, -np.inf
    x[:59, 3] = 3
    genes = scan(layout(x))
    assert_scanned(genes, x)
    assert genes.n_bad[[0, 1, 2, 3]].tolist() == [0, 1, 5, 1]
    assert genes.whole[3] and not genes.varies[3]
    x[:, 4] = np.nan
    assert scan(layout(x)).n_bad[4] == len(x)


@each_layout
def test_scan_of_no_cells(layout):
    genes = scan(layout(np.zeros((0, 3))))
    np.testing.assert_array_equal(genes.mean, 0)
    assert not genes.varies.any()
    assert genes.whole.all()
    assert genes.n_bad.tolist() == [0, 0, 0]


def test_genes_of_a_scan_can_be_selected():
    x, columns = expression(), np.array([7, 2, 0])
    selected = scan(x).of(columns)
    assert_scanned(selected, x[:, columns])
    np.testing.assert_array_equal(selected.shift, scan(x).shift[columns])


@each_layout
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_chunks_cover_all_rows(layout, dtype, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ROWS", 13)
    x = expression().astype(dtype)
    rows, parts = zip(*chunks(layout(x)), strict=True)
    assert [(part.start, part.stop) for part in rows] == [(0, 13), (13, 26), (26, 39), (39, 52), (52, 60)]
    for some, part in zip(rows, parts, strict=True):
        if sparse.issparse(part):
            part = part.toarray()
        else:
            assert part.dtype == np.float64 and part.flags.c_contiguous
        np.testing.assert_array_equal(part, x[some])


def test_explicit_zeros_are_zeros():
    x = sparse.csr_matrix(expression())
    with_zeros = x.copy()
    with_zeros.data[::3] = 0
    without = with_zeros.copy()
    without.eliminate_zeros()
    for one, other in zip(measured(activity(), with_zeros), measured(activity(), without), strict=True):
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-12, atol=1e-15)
