from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from sae.core import feature_statistics as module
from sae.core.feature_statistics import FeatureStatistics

N, H = 1000, 7


@pytest.fixture
def a():
    """Activations of very different size; the last feature is dead, the first always active."""
    rng = np.random.default_rng(0)
    dense = np.where(rng.random((N, H)) < 0.3, 10 ** rng.uniform(-6, 6, (N, H)), 0).astype(np.float32)
    dense[:, 0], dense[:, -1] = 10 ** rng.uniform(-6, 6, N), 0
    return sparse.csr_matrix(dense)


def test_statistics_are_those_of_a_loop(a):
    found, dense = FeatureStatistics.of(a), a.toarray()
    assert found.n == N
    for feature in range(H):
        total = 0.0
        for value in dense[:, feature]:
            total += float(value)
        assert found.total[feature] == total
        assert found.n_cells[feature] == np.count_nonzero(dense[:, feature])
        assert found.highest[feature] == dense[:, feature].max()


@pytest.mark.parametrize("rows", [1, 13, 999, 1000, 5000])
def test_sums_do_not_depend_on_how_cells_are_divided(monkeypatch, a, rows):
    expected = FeatureStatistics.of(a)
    monkeypatch.setattr(module, "PIECE_ROWS", rows)
    found = FeatureStatistics.of(a)
    for name in ("n", "n_cells", "total", "highest"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_on_disk_as_in_memory(a):
    da = pytest.importorskip("dask.array")
    for x in (da.from_array(a.toarray(), chunks=(64, 3)), da.from_array(a.toarray(), chunks=(300, H))):
        for stored in (x, x.map_blocks(sparse.csr_matrix)):
            np.testing.assert_array_equal(FeatureStatistics.of(stored).total, FeatureStatistics.of(a).total)


def test_no_cells():
    found = FeatureStatistics.of(sparse.csr_matrix((0, H), dtype=np.float32))
    assert (found.n, found.n_cells.sum(), found.total.sum(), found.highest.sum()) == (0, 0, 0, 0)
