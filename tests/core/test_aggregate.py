from __future__ import annotations

import h5py
import numpy as np
import pytest
from scipy import sparse

from sae.core.aggregate import Aggregated, aggregate
from sae.core.moments import scan

MEMBERS = sparse.csr_matrix(np.array([[1, 0], [1, 0], [0, 1], [1, 1], [0, 0]], dtype=np.float64))


@pytest.fixture
def counts():
    return np.random.default_rng(0).poisson(0.8, size=(50, 5)).astype(np.float32)


def on_disk(x, path):
    return h5py.File(path / "x.h5", "w").create_dataset("x", data=x)


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix, on_disk], ids=["dense", "CSR", "on disk"])
@pytest.mark.parametrize("base", [None, np.e, 2.0], ids=["counts", "log1p", "log1p to base 2"])
def test_sums_of_what_was_logged(counts, kind, base, tmp_path):
    """Log1p values give the log1p of summed counts, in their own base."""
    x = counts if base is None else (np.log1p(counts) / np.log(base)).astype(np.float32)
    before = x.copy()
    given = kind(x, tmp_path) if kind is on_disk else kind(x)
    found = aggregate(given, MEMBERS, base)
    expected = np.column_stack([counts[:, [0, 1, 3]].sum(axis=1), counts[:, [2, 3]].sum(axis=1)])
    if base is not None:
        expected = np.log(expected + 1) / np.log(base)
    if kind is on_disk:
        assert isinstance(found, Aggregated) and found.shape == (50, 2)
        np.testing.assert_allclose(scan(found).mean, expected.mean(axis=0), rtol=1e-6)
        found = found[0:50]
    assert sparse.issparse(found) == (kind is sparse.csr_matrix)
    np.testing.assert_allclose(found.toarray() if sparse.issparse(found) else found, expected, rtol=1e-6)
    np.testing.assert_array_equal(x, before)


def test_in_chunks_of_rows(monkeypatch, counts):
    monkeypatch.setattr("sae.core.moments.CHUNK_ROWS", 7)
    for x in (counts, sparse.csr_matrix(counts)):
        found = aggregate(x, MEMBERS, None)
        assert found.shape == (50, 2)
        np.testing.assert_array_equal(found.toarray() if sparse.issparse(found) else found, counts @ MEMBERS)
