from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np
from scipy import sparse

from sae.core.groups import active_groups, percentile_groups

PERCENTILES = [0, 12.5, 50, 90, 99, 100]


def activity(n=300, *, seed=0):
    """Activations (n, 7): dead, in one cell, in fewer than 1 %, in 3 %, in half, in all but one, in all."""
    rng = np.random.default_rng(seed)
    n_active = [0, 1, 2, 9, n // 2, n - 1, n]
    a = np.where(np.arange(n)[:, None] < n_active, rng.exponential(size=(n, 7)), 0).astype(np.float32)
    return rng.permuted(a, axis=0)


def assert_as_numpy(found, a, percentile):
    cutoff = np.percentile(a.astype(np.float64), percentile, axis=0)
    np.testing.assert_array_equal(found.positive.toarray().T, (a > cutoff) & (a > 0))
    np.testing.assert_array_equal(found.active.toarray().T, a > 0)
    np.testing.assert_array_equal(found.n_positive, ((a > cutoff) & (a > 0)).sum(axis=0))
    np.testing.assert_array_equal(found.n_reference, (a == 0).sum(axis=0))


@pytest.mark.parametrize("percentile", PERCENTILES)
def test_positive_cells_are_above_the_percentile_over_all_cells(percentile):
    a = activity()
    assert_as_numpy(percentile_groups(sparse.csr_matrix(a), percentile), a, percentile)


@given(
    a=st_np.arrays(np.float64, st.tuples(st.integers(1, 30), st.integers(1, 4)), elements=st.integers(0, 3)),
    percentile=st.sampled_from(PERCENTILES),
)
def test_ties_are_cut_where_numpy_cuts_them(a, percentile):
    assert_as_numpy(percentile_groups(sparse.csr_matrix(a), percentile), a, percentile)


@pytest.mark.parametrize(
    ("n_active", "n_positive"),
    [
        pytest.param(1, 1, id="one active"),
        pytest.param(4, 4, id="just under 1 %"),
        pytest.param(5, 5, id="exactly 1 %"),
        pytest.param(6, 5, id="just over 1 %"),
        pytest.param(500, 5, id="all"),
    ],
)
def test_all_active_cells_are_positive_below_one_percent(n_active, n_positive):
    a = sparse.csr_matrix(np.arange(500.0)[::-1, None] - (500 - n_active) + 1).maximum(0)
    assert percentile_groups(a).n_positive == n_positive


def test_feature_with_one_level_in_most_cells_has_no_positive_cells():
    found = percentile_groups(sparse.csr_matrix(np.r_[np.ones(90), np.zeros(10)][:, None]))
    assert found.n_positive == 0
    assert found.n_reference == 10


def test_order_of_activations_is_all_that_matters():
    a = activity()
    found, squared = (percentile_groups(sparse.csr_matrix(values)) for values in (a, 7 * a.astype(np.float64) ** 2))
    np.testing.assert_array_equal(found.positive.toarray(), squared.positive.toarray())


@pytest.mark.parametrize("value", [0, -1])
def test_cell_with_a_stored_value_that_is_not_positive_is_in_the_reference(value):
    a = activity()
    stored = sparse.csr_matrix(np.where(a > 0, a, 99))
    stored.data[stored.data == 99] = value
    before = stored.copy()
    assert stored.nnz == a.size
    assert_as_numpy(percentile_groups(stored), a, 99)
    np.testing.assert_array_equal(stored.data, before.data)


@pytest.mark.parametrize("percentile", [-1, 100.5])
def test_percentile_must_be_one(percentile):
    with pytest.raises(ValueError, match=f"percentile={percentile} is not between 0 and 100"):
        percentile_groups(sparse.csr_matrix(activity()), percentile)


def test_status_says_what_is_missing():
    found = active_groups(sparse.csr_matrix(activity(n=300)))
    few, many = "fewer than 3 active cells", "fewer than 3 inactive cells"
    assert found.status(3).tolist() == [few, few, few, "tested", "tested", many, many]
