from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np
from scipy import sparse, stats

from sae.core import moments
from sae.core import regression as module
from sae.core.differential import Differential, differential
from sae.core.groups import active_groups
from sae.core.moments import scan
from sae.core.regression import orthonormal, regression

ARRAYS = ("features", "score", "log2fc", "pval", "log_pval", "padj", "either_way")
LAYOUTS = {"dense": np.asarray, "csr": sparse.csr_matrix}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
N = 80


def expression(n=N, g=12, *, seed=0):
    """Log1p-like values (n, g) with zeros; the last gene has none."""
    rng = np.random.default_rng(seed)
    x = np.log1p(rng.poisson(2, size=(n, g)) * rng.uniform(0.5, 2, size=(n, 1)))
    x[:, -1] += 1
    return x


def activity(n=N, h=7, *, seed=1):
    """Activations (n, h) of features that are active in few to all cells."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random((n, h)) < np.linspace(0.1, 1.01, h), rng.uniform(0.1, 1, size=(n, h)), 0)


def covariates(n=N, *, seed=2):
    """Two of three batches, and a size (n, 3)."""
    rng = np.random.default_rng(seed)
    batch = rng.integers(3, size=n)
    return np.column_stack([batch == 1, batch == 2, rng.normal(5000, 1000, n)]).astype(float)


def fitted(a, x, c=None, *, log_base=np.e, pseudocount=0.1, min_cells=3) -> Differential:
    """All blocks as one."""
    c = np.zeros((len(a), 0)) if c is None else c
    options = {"log_base": log_base, "pseudocount": pseudocount, "min_cells": min_cells}
    blocks = list(regression(active_groups(sparse.csr_matrix(a)), x, scan(x), c, **options))
    found = Differential(**{name: np.concatenate([vars(block)[name] for block in blocks]) for name in ARRAYS})
    return Differential(**{**vars(found), "imprecise": sum(block.imprecise for block in blocks)})


def least_squares(a, x, c):
    """Slope, t and p of one feature for each gene, by the textbook: β and s² (CᵀC)⁻¹ of the whole design."""
    design = np.column_stack([np.ones(len(a)), a, c])
    beta, _, rank, _ = np.linalg.lstsq(design, x, rcond=None)
    df = len(a) - rank
    residual = ((x - design @ beta) ** 2).sum(axis=0)
    t = beta[1] / np.sqrt(residual / df * np.linalg.pinv(design.T @ design)[1, 1])
    return beta[1], t, 2 * stats.t.sf(np.abs(t), df)


def assert_as_lstsq(found, a, x, c, rtol=1e-9):
    for feature, score, pval in zip(found.features, found.score, found.pval, strict=True):
        _, t, p = least_squares(a[:, feature], x, c)
        np.testing.assert_allclose(score, t, rtol=rtol, atol=rtol)
        np.testing.assert_allclose(pval, p, rtol=rtol * 100)
    np.testing.assert_allclose(np.exp(found.log_pval), found.pval, rtol=1e-12)
    assert found.either_way.all()


none = np.zeros((N, 0))
COVARIATES = {
    "no covariates": none,
    "batch and size": covariates(),
    "collinear": np.column_stack([covariates(), covariates() @ [1, -1, 0.5] + 3]),
    "all of the batches": np.column_stack([covariates(), 1 - covariates()[:, 0] - covariates()[:, 1]]),
    "constant": np.column_stack([np.full(N, 7.3), covariates()]),
    "far from zero": np.column_stack([1e6 + np.random.default_rng(5).normal(size=N)]),
}


@each_layout
@pytest.mark.parametrize("c", COVARIATES.values(), ids=COVARIATES)
def test_t_and_p_are_those_of_least_squares(layout, c):
    a, x = activity(), expression()
    found = fitted(a, layout(x), c)
    np.testing.assert_array_equal(found.features, np.arange(7))
    # Centred for the oracle alone, which inverts CᵀC.
    assert_as_lstsq(found, a, x, c - c.mean(axis=0))
    assert found.imprecise == 0


@each_layout
def test_agrees_with_scipy_without_covariates(layout):
    a, x = activity(), expression()
    found = fitted(a, layout(x))
    for row, feature in enumerate(found.features):
        for gene in range(x.shape[1]):
            expected = stats.linregress(a[:, feature], x[:, gene])
            np.testing.assert_allclose(found.score[row, gene], expected.slope / expected.stderr, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(found.pval[row, gene], expected.pvalue, rtol=1e-7)


@each_layout
@pytest.mark.parametrize(
    ("log_base", "raw"),
    [
        pytest.param(np.e, np.expm1, id="natural"),
        pytest.param(2.0, lambda x: 2**x - 1, id="base 2"),
        pytest.param(None, lambda x: x, id="linear"),
    ],
)
def test_fold_change_is_between_fitted_cells(layout, log_base, raw):
    """With the lowest and with the mean positive activation, at the mean of the covariates."""
    a, x, c = activity(), expression(), covariates()
    assert a[:, -1].min() > 0
    found = fitted(a, layout(x), c, log_base=log_base, pseudocount=0.3)
    for row, feature in enumerate(found.features):
        design = np.column_stack([np.ones(N), a[:, feature], c])
        beta = np.linalg.lstsq(design, x, rcond=None)[0]
        lowest, mean_active = a[:, feature].min(), a[a[:, feature] > 0, feature].mean()
        low, high = (np.r_[1, level, c.mean(axis=0)] @ beta for level in (lowest, mean_active))
        low, high = (np.clip(fit, 0, x.max(axis=0)) for fit in (low, high))
        np.testing.assert_allclose(
            found.log2fc[row], np.log2((raw(high) + 0.3) / (raw(low) + 0.3)), rtol=1e-8, atol=1e-10
        )


@each_layout
def test_fold_change_stays_within_the_values_of_the_gene(layout):
    """A feature that a batch all but explains has slopes that no cell follows."""
    rng = np.random.default_rng(0)
    a, x, c = activity(h=1), expression(), covariates()
    a[:, 0] = c[:, 0] * (1 + 1e-4 * rng.random(N))
    found = fitted(a, layout(x), c, pseudocount=0.1)
    slope, _, _ = least_squares(a[:, 0], x, c)
    assert np.abs(slope).max() > 500
    highest = np.log2((np.expm1(x.max(axis=0)) + 0.1) / 0.1)
    assert (np.abs(found.log2fc) <= highest + 1e-9).all()
    assert np.isclose(np.abs(found.log2fc[0]), highest).any()


@each_layout
def test_fold_change_of_a_feature_that_is_on_or_off_is_that_of_the_group_means(layout):
    a, x = (activity()[:, :6] > 0) * 0.7, layout(expression())
    options = {"log_base": np.e, "pseudocount": 0.1, "min_cells": 3}
    [expected] = differential(active_groups(sparse.csr_matrix(a)), x, scan(x), **options)
    np.testing.assert_allclose(fitted(a, x).log2fc, expected.log2fc, rtol=1e-9, atol=1e-12)


@each_layout
def test_p_values_are_adjusted_within_a_feature(layout):
    found = fitted(activity(), layout(expression()), covariates())
    np.testing.assert_allclose(found.padj, stats.false_discovery_control(found.pval, axis=1), rtol=1e-12)


@each_layout
def test_chunks_blocks_and_threads_do_not_matter(layout, monkeypatch):
    a, x, c = activity(), layout(expression(g=300)), covariates()
    at_once = fitted(a, x, c)
    monkeypatch.setattr(module, "available_threads", lambda: 3)
    for name in ARRAYS:
        np.testing.assert_array_equal(vars(fitted(a, x, c))[name], vars(at_once)[name], err_msg=name)
    monkeypatch.setattr(module, "BLOCK_VALUES", 2 * 300)
    monkeypatch.setattr(module, "SUM_VALUES", 4 * 300)
    monkeypatch.setattr(moments, "CHUNK_ROWS", 7)
    options = {"log_base": np.e, "pseudocount": 0.1, "min_cells": 3}
    blocks = list(regression(active_groups(sparse.csr_matrix(a)), x, scan(x), c, **options))
    assert [block.features.tolist() for block in blocks] == [[0, 1], [2, 3], [4, 5], [6]]
    for name in ARRAYS:
        found = np.concatenate([vars(block)[name] for block in blocks])
        np.testing.assert_allclose(found, vars(at_once)[name], rtol=1e-9, atol=1e-12, err_msg=name)


@each_layout
@pytest.mark.parametrize("value", [0.0, 0.1, 7.0])
def test_constant_gene_is_not_tested_and_not_counted(layout, value):
    a, x, c = activity(), expression(), covariates()
    alone = fitted(a, layout(x), c)
    found = fitted(a, layout(np.insert(x, 4, value, axis=1)), c)
    assert (found.score[:, 4] == 0).all()
    assert np.isnan(found.pval[:, 4]).all() and np.isnan(found.padj[:, 4]).all()
    np.testing.assert_array_equal(found.log2fc[:, 4], 0)
    np.testing.assert_allclose(np.delete(found.padj, 4, axis=1), alone.padj, rtol=1e-9)


@each_layout
def test_what_the_covariates_explain_is_not_tested(layout):
    a, x, c = activity(), expression(), covariates()
    x[:, 3] = 1 + 2 * c[:, 0] + c[:, 2] / 1000
    a[:, 2] = 0.5 + 0.3 * c[:, 1]
    a[:, 1] = c[:, 0] / 3
    found = fitted(a, layout(x), c)
    expected = np.zeros(found.pval.shape, dtype=bool)
    expected[:, 3] = expected[1:3] = True
    np.testing.assert_array_equal(np.isnan(found.pval), expected)
    np.testing.assert_array_equal(found.either_way, ~expected)
    assert (found.score[expected] == 0).all() and (found.log2fc[expected] == 0).all()
    assert np.isfinite(found.log2fc).all()


def test_feature_with_one_activation_in_all_cells_is_not_tested():
    a, x = activity(), expression()
    a[:, 3] = 0.3
    found = fitted(a, x)
    assert np.isnan(found.pval[3]).all()
    assert np.isfinite(np.delete(found.pval, 3, axis=0)).all()


@each_layout
def test_gene_that_follows_the_feature_exactly_is_certain(layout):
    a, c = activity(h=1), covariates()
    x = np.column_stack([0.5 * a[:, 0], 2 - a[:, 0] + c[:, 0]])
    found = fitted(a, layout(x), c)
    np.testing.assert_array_equal(found.score, [[np.inf, -np.inf]])
    np.testing.assert_array_equal(found.pval, [[0, 0]])
    assert found.imprecise == 0


@pytest.mark.parametrize(("min_cells", "features"), [(2, [2, 3, 4]), (3, [3, 4]), (21, [])])
def test_features_need_enough_active_cells(min_cells, features):
    rng = np.random.default_rng(0)
    a = np.where(np.arange(20)[:, None] < [0, 1, 2, 5, 20], rng.uniform(1, 2, size=(20, 5)), 0)
    a, x = sparse.csr_matrix(a), expression(n=20)
    options = {"log_base": None, "pseudocount": 1, "min_cells": min_cells}
    blocks = list(regression(active_groups(a), x, scan(x), np.zeros((20, 0)), **options))
    assert [feature for block in blocks for feature in block.features] == features


@pytest.mark.parametrize("value", [0, -1])
def test_stored_value_that_is_not_positive_is_zero(value):
    a, x = activity(), expression()
    stored = sparse.csr_matrix(np.where(a > 0, a, 9))
    stored.data[stored.data == 9] = value
    assert stored.nnz == a.size
    before, expected = stored.copy(), fitted(a, x)
    options = {"log_base": np.e, "pseudocount": 0.1, "min_cells": 3}
    [block] = regression(active_groups(stored), x, scan(x), none, **options)
    for name in ARRAYS:
        np.testing.assert_array_equal(vars(block)[name], vars(expected)[name], err_msg=name)
    for part in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(stored, part), getattr(before, part), err_msg=part)


@each_layout
@pytest.mark.parametrize(("of_genes", "of_features", "rtol"), [(1e4, 0, 1e-9), (0, 1e4, 1e-6), (1e4, 1e4, 1e-6)])
def test_means_far_above_the_spread_keep_the_digits(layout, of_genes, of_features, rtol):
    """Of genes without zeros, and of features that are active in all cells."""
    rng = np.random.default_rng(0)
    n = 500
    a, x, c = (rng.standard_normal((n, columns)) for columns in (3, 5, 2))
    found = fitted(a - a.min() + of_features, layout(x - x.min() + of_genes), c, log_base=None, min_cells=2)
    assert_as_lstsq(found, a, x, c, rtol=rtol)
    assert found.imprecise == 0


@each_layout
def test_rounding_over_many_cells_does_not_make_a_gene_vary(layout):
    n = 300_000
    a = np.random.default_rng(0).random((n, 1))
    assert np.isnan(fitted(a, layout(np.full((n, 1), 0.1))).pval).all()


@each_layout
def test_residuals_that_are_lost_are_counted(layout):
    """A gene that two batches set a million standard deviations apart."""
    a, x, c = activity(), expression(), covariates()
    x[:, 4] = 1e6 * c[:, 0] + np.random.default_rng(3).standard_normal(N)
    assert fitted(a, layout(x), c, log_base=None).imprecise == 7
    x[:, 4] = 1e3 * c[:, 0] + np.random.default_rng(3).standard_normal(N)
    assert fitted(a, layout(x), c, log_base=None).imprecise == 0


@each_layout
@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint8])
def test_input_of_any_number_type_is_added_up_in_double_precision(layout, dtype):
    a, x, c = activity().astype(np.float32), (30 * expression()).astype(dtype), covariates()
    assert_as_lstsq(fitted(a, layout(x), c, log_base=None), a.astype(np.float64), x.astype(np.float64), c)


def test_memory_map(tmp_path):
    a, x, c = activity(), expression(), covariates()
    np.save(tmp_path / "x.npy", x)
    found, expected = fitted(a, np.load(tmp_path / "x.npy", mmap_mode="r"), c), fitted(a, x, c)
    for name in ARRAYS:
        np.testing.assert_array_equal(vars(found)[name], vars(expected)[name], err_msg=name)


def test_no_degrees_of_freedom_left():
    a, x = activity(n=10), expression(n=10)
    with pytest.raises(ValueError, match=r"10 cells leave no degrees of freedom beside 8 independent covariates"):
        fitted(a, x, np.eye(10)[:, 2:])
    assert np.isfinite(fitted(a, x, np.eye(10)[:, 3:]).pval).any()


@pytest.mark.parametrize(
    ("limits", "message"),
    [({"pseudocount": 0}, "pseudocount=0 must be positive"), ({"min_cells": 1}, "min_cells=1 is below 2")],
)
def test_bad_limits(limits, message):
    with pytest.raises(ValueError, match=message):
        fitted(activity(), expression(), **limits)


@pytest.mark.parametrize("c", COVARIATES.values(), ids=COVARIATES)
def test_basis_is_orthonormal_and_spans_the_covariates(c):
    basis = orthonormal(c)
    assert basis.shape[1] == np.linalg.matrix_rank(np.column_stack([np.ones(N), c - c.mean(axis=0)]))
    np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-12)
    np.testing.assert_allclose(basis @ (basis.T @ c), c, rtol=1e-9, atol=1e-12)


shapes = st.tuples(st.integers(6, 25), st.integers(1, 5))


@given(x=st_np.arrays(np.float64, shapes, elements=st.integers(0, 12).map(lambda i: i / 4)), data=st.data())
def test_degenerate_input_agrees_with_least_squares(x, data):
    """Ties, constant genes and features, collinear covariates: tested where the residuals vary, and then right."""
    n = len(x)
    small = st.integers(0, 4).map(float)
    a = data.draw(st_np.arrays(np.float64, (n, 2), elements=small))
    c = data.draw(st_np.arrays(np.float64, (n, data.draw(st.integers(0, 3))), elements=small))
    for layout in LAYOUTS.values():
        found = fitted(np.column_stack([a, np.arange(1.0, n + 1)]), layout(x), c)
        for feature, score, pval in zip(found.features, found.score, found.pval, strict=True):
            values = a[:, feature] if feature < 2 else np.arange(1.0, n + 1)
            others = np.column_stack([np.ones(n), c])
            free_a, free_x = (v - others @ np.linalg.lstsq(others, v, rcond=None)[0] for v in (values, x))
            vary = (free_a**2).sum() > 1e-9
            testable = vary & ((free_x**2).sum(axis=0) > 1e-9)
            np.testing.assert_array_equal(np.isfinite(pval), testable)
            if not vary:
                continue
            slope = free_a @ free_x / (free_a**2).sum()
            left = ((free_x - free_a[:, None] * slope) ** 2).sum(axis=0)
            df = n - np.linalg.matrix_rank(others) - 1
            clear = testable & (left > 1e-9)
            t = slope[clear] * np.sqrt(df * (free_a**2).sum() / left[clear])
            np.testing.assert_allclose(score[clear], t, rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(pval[clear], 2 * stats.t.sf(np.abs(t), df), rtol=1e-6)
            certain = testable & ~clear
            assert np.isinf(score[certain]).all() and (pval[certain] == 0).all()
