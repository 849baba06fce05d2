from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np
from scipy import sparse

from sae.core import moments
from sae.core.groups import active_groups, pattern_of, percentile_groups
from sae.core.rows import Rows

PERCENTILES = [0, 12.5, 50, 90, 99, 100]


def activity(n=300, *, seed=0):
    """Activations (n, 7): dead, in one cell, in fewer than 1 %, in 3 %, in half, in all but one, in all."""
    rng = np.random.default_rng(seed)
    n_active = [0, 1, 2, 9, n // 2, n - 1, n]
    a = np.where(np.arange(n)[:, None] < n_active, rng.exponential(size=(n, 7)), 0).astype(np.float32)
    return rng.permuted(a, axis=0)


def assert_as_numpy(found, a, percentile):
    cutoff = np.percentile(a.astype(np.float64), percentile, axis=0)
    np.testing.assert_array_equal(found.positive().toarray(), (a > cutoff) & (a > 0))
    np.testing.assert_array_equal(found.active().toarray(), a > 0)
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
    np.testing.assert_array_equal(found.positive().toarray(), squared.positive().toarray())


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


def by_rows(a):
    """As what gives rows for a slice, and nothing else."""
    return Rows(sparse.csr_matrix(a), np.arange(len(a)))


@pytest.mark.parametrize("partition", [70, 2**18])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
@pytest.mark.parametrize("percentile", PERCENTILES)
def test_groups_on_disk_are_those_in_memory(percentile, dtype, partition, monkeypatch):
    monkeypatch.setattr(moments, "PARTITION_ROWS", partition)
    a = (100 * activity()).astype(dtype)
    assert_as_numpy(percentile_groups(by_rows(a), percentile), a, percentile)


def test_percentile_of_values_that_differ_in_the_last_bit():
    one = np.float32(0.3)
    levels = np.array([one, np.nextafter(one, np.float32(1)), np.nextafter(one, np.float32(0)), 1e-38, 3e38, 2e-45])
    a = np.random.default_rng(0).choice(levels, size=(200, 5)).astype(np.float32)
    for percentile in range(0, 101, 5):
        assert_as_numpy(percentile_groups(sparse.csr_matrix(a), percentile), a, percentile)


GROUPS = {"active": active_groups, "percentile": lambda a: percentile_groups(a, 60)}
each_group = pytest.mark.parametrize("made", GROUPS.values(), ids=GROUPS)


@each_group
def test_cells_of_each_stratum_are_counted(made, monkeypatch):
    monkeypatch.setattr(moments, "CHUNK_ROWS", 17)
    a, codes = activity(), np.random.default_rng(2).integers(4, size=300)
    groups = made(by_rows(a))
    found = groups.within(codes)
    for stratum in range(4):
        inside = codes == stratum
        assert found.n[stratum] == inside.sum()
        np.testing.assert_array_equal(found.active[stratum], (a[inside] > 0).sum(axis=0))
        np.testing.assert_array_equal(found.positive[stratum], groups.positive().toarray()[inside].sum(axis=0))


@each_group
@pytest.mark.parametrize(
    "stored",
    [sparse.csr_matrix, by_rows, lambda a: Rows(a, np.arange(len(a)))],
    ids=["memory", "by rows", "chosen rows"],
)
def test_groups_in_memory_and_reordered(made, stored, monkeypatch):
    monkeypatch.setattr(moments, "CHUNK_ROWS", 17)
    a = activity()
    groups, expected = made(stored(a)), made(sparse.csr_matrix(a))
    held = groups.in_memory()
    order, again = (np.random.default_rng(seed).permutation(300) for seed in (3, 4))
    for found, rows in (
        (held, np.arange(300)),
        (groups.reordered(order), order),
        (held.reordered(order).reordered(again), order[again]),
    ):
        for name in ("active", "positive"):
            np.testing.assert_array_equal(getattr(found, name)().toarray(), getattr(expected, name)().toarray()[rows])
            some = getattr(found, name)(slice(40, 90)).toarray()
            np.testing.assert_array_equal(some, getattr(expected, name)().toarray()[rows][40:90])
        for name in ("n_active", "n_positive", "n_reference"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        assert found.status(3).tolist() == expected.status(3).tolist()


@pytest.mark.parametrize(("h", "kind"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_a_pattern_takes_two_bytes_for_each_active_value_if_these_do(h, kind):
    a = sparse.csr_matrix(([1.0, 2.0], ([0, 1], [h - 1, 0])), shape=(3, h))
    pattern = pattern_of(active_groups(a), np.arange(h))
    assert pattern.features.dtype == kind and pattern.levels is None
    np.testing.assert_array_equal(pattern.features, [h - 1, 0])
    assert (pattern[0:3] != (a > 0)).nnz == 0


def test_a_pattern_of_some_features():
    a = activity()
    groups, some = active_groups(by_rows(a)), np.array([1, 3, 6])
    np.testing.assert_array_equal(pattern_of(groups, some)[0:300].toarray(), a[:, some] > 0)
