from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from sae.core import moments
from sae.core.signatures import signatures


@pytest.mark.parametrize("layout", [np.asarray, sparse.csr_matrix, np.float32], ids=["dense", "csr", "float32"])
def test_signatures_are_correlations(layout, monkeypatch):
    monkeypatch.setattr(moments, "CHUNK_ROWS", 37)
    rng = np.random.default_rng(0)
    a = np.where(rng.random((150, 6)) < 0.3, rng.exponential(size=(150, 6)), 0)
    x = rng.poisson(1, size=(150, 9)).astype(float)
    a[:, 2], x[:, 4], x[:, 5] = 0, 3.3, 0
    r = signatures(sparse.csr_matrix(a), layout(x), moments.scan(layout(x)).shift)
    with np.errstate(invalid="ignore"):
        expected = np.nan_to_num(np.corrcoef(a.T, x.T)[:6, 6:])
    expected[:, 4] = 0
    np.testing.assert_allclose(r, expected, atol=1e-6)
    assert not r[2].any() and not r[:, 4].any() and not r[:, 5].any()
