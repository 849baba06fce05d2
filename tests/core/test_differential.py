from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np
from scipy import sparse, stats

from sae.core import differential as module
from sae.core import moments
from sae.core.differential import Differential, differential
from sae.core.groups import active_groups

ARRAYS = ("features", "score", "log2fc", "pval", "log_pval", "padj")
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


def compared(a, x, *, log_base=np.e, pseudocount=0.1, min_cells=2) -> Differential:
    """All blocks as one."""
    options = {"log_base": log_base, "pseudocount": pseudocount, "min_cells": min_cells}
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


shapes = st.tuples(st.integers(4, 25), st.integers(1, 6))


@settings(deadline=None)
@given(x=st_np.arrays(np.float64, shapes, elements=st.integers(0, 12).map(lambda i: i / 4)), data=st.data())
def test_dense_and_csr_give_equal_results(x, data):
    n_active = data.draw(st.integers(2, len(x) - 2))
    a = np.zeros((len(x), 1))
    a[data.draw(st.permutations(range(len(x))))[:n_active]] = 1
    dense, csr = compared(a, x), compared(a, sparse.csr_matrix(x))
    for name, values in vars(dense).items():
        np.testing.assert_allclose(vars(csr)[name], values, rtol=1e-9, atol=1e-9, err_msg=name)
