from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from scipy import sparse

from sae.core import recovery as module
from sae.core.recovery import correlations, recovery


def made(n=200, p=4, h=6, *, density=0.4, shift=0.0, seed=0):
    """Truth (n, p), and activations (n, h) that depend on it."""
    rng = np.random.default_rng(seed)
    truth = rng.poisson(2, size=(n, p)).astype(np.float32)
    a = truth @ rng.normal(size=(p, h)) + rng.normal(size=(n, h))
    return truth, (np.where(rng.random((n, h)) < density, np.abs(a), 0) + shift).astype(np.float32)


def of_numpy(truth, a):
    both = np.corrcoef(np.hstack([truth, a]).astype(np.float64), rowvar=False)
    return both[: truth.shape[1], truth.shape[1] :]


def best_matching(strength):
    """The highest sum over all ways to give each row a column of its own."""
    p, h = strength.shape
    assert p <= h
    return max(permutations(range(h), p), key=lambda columns: strength[range(p), columns].sum())


LAYOUTS = {
    "dense": lambda a: a,
    "fortran": np.asfortranarray,
    "csr": sparse.csr_matrix,
    "csr array": sparse.csr_array,
    "csc": sparse.csc_matrix,
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@each_layout
@pytest.mark.parametrize(
    "case",
    [
        pytest.param({}, id="sparse"),
        pytest.param({"density": 1.1}, id="always active"),
        pytest.param({"density": 1.1, "shift": 1e4}, id="mean far above sd"),
        pytest.param({"n": 3, "density": 1.1}, id="three cells"),
        pytest.param({"p": 1, "h": 1}, id="one and one"),
    ],
)
def test_correlations_are_those_of_numpy(layout, case):
    truth, a = made(**case)
    r = correlations(truth, layout(a))
    assert r.dtype == np.float64
    np.testing.assert_allclose(r, of_numpy(truth, a), rtol=1e-9, atol=1e-12)


def test_dense_activations_are_read_in_blocks(monkeypatch):
    truth, a = made()
    monkeypatch.setattr(module, "BLOCK_VALUES", 7 * a.shape[1])
    np.testing.assert_allclose(correlations(truth, a), of_numpy(truth, a), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.float32])
def test_truth_may_be_of_any_kind_of_number(dtype):
    truth, a = made()
    truth = (truth > 1).astype(dtype)
    np.testing.assert_allclose(correlations(truth, a), of_numpy(truth, a), rtol=1e-10, atol=1e-12)


def test_stored_zeros_change_nothing():
    truth, a = made()
    stored = sparse.csr_matrix(a + 1)
    stored.data -= 1
    assert stored.nnz > (a != 0).sum()
    np.testing.assert_allclose(correlations(truth, stored), of_numpy(truth, (a + 1) - 1), rtol=1e-10, atol=1e-12)


@each_layout
def test_what_is_constant_correlates_with_nothing(layout):
    truth, a = made()
    truth[:, 1], a[:, 2], a[:, 4] = 0.1, 0, 0.1
    r = correlations(truth, layout(a))
    assert (r[1] == 0).all()
    assert (r[:, [2, 4]] == 0).all()
    rest = np.ix_([0, 2, 3], [0, 1, 3, 5])
    np.testing.assert_allclose(r[rest], of_numpy(truth[:, rest[0].ravel()], a[:, rest[1].ravel()]), rtol=1e-10)


@each_layout
def test_sparse_activations_stay_sparse(layout, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("densified")

    truth, a = made()
    a = layout(a)
    if sparse.issparse(a):
        monkeypatch.setattr(module, "_dense_sums", refuse)
        monkeypatch.setattr(module, "dense_rows", refuse)
    assert correlations(truth, a).shape == (4, 6)


@pytest.mark.parametrize("seed", range(5))
def test_matching_is_the_best_of_all(seed):
    truth, a = made(n=60, seed=seed)
    # A feature that several variables want.
    a[:, 0] = truth.sum(axis=1)
    strength = np.abs(of_numpy(truth, a))
    found = recovery(truth, sparse.csr_matrix(a))
    np.testing.assert_allclose(found.best, strength.max(axis=1), rtol=1e-9)
    np.testing.assert_array_equal(found.feature, strength.argmax(axis=1))
    assert len(set(found.feature)) < truth.shape[1]
    np.testing.assert_allclose(found.matched, strength[range(4), best_matching(strength)], rtol=1e-9)


def test_more_variables_than_features_leave_some_unmatched():
    truth, a = made(p=6, h=4)
    found = recovery(truth, a)
    strength = np.abs(of_numpy(truth, a))
    columns = best_matching(strength.T)
    expected = np.zeros(6)
    expected[list(columns)] = strength[columns, range(4)]
    np.testing.assert_allclose(found.matched, expected, rtol=1e-9)


def test_a_negative_correlation_counts_as_much():
    truth, a = made(p=1, h=2)
    a[:, 1] = 20 - truth[:, 0]
    found = recovery(truth, a)
    assert found.feature[0] == 1
    np.testing.assert_allclose(found.best, 1, rtol=1e-12)
    np.testing.assert_allclose(correlations(truth, a)[0, 1], -1, rtol=1e-12)


def test_dead_features_find_nothing():
    found = recovery(made()[0], sparse.csr_matrix((200, 5)))
    assert (found.best == 0).all()
    assert (found.matched == 0).all()


@pytest.mark.parametrize(
    ("truth", "h", "message"),
    [
        pytest.param(np.zeros((9, 2)), 3, r"\(9, 2\); expected one row for each of 10 cells", id="other cells"),
        pytest.param(np.zeros(10), 3, r"\(10,\); expected one row for each", id="one-dimensional"),
        pytest.param(np.full((10, 2), np.nan), 3, "20 values of the truth are not finite", id="nan"),
        pytest.param(np.zeros((10, 2)), 0, "no features", id="no features"),
    ],
)
def test_bad_input(truth, h, message):
    with pytest.raises(ValueError, match=message):
        recovery(truth, np.zeros((10, h)))
