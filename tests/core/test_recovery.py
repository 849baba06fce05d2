from __future__ import annotations

from itertools import permutations

import anndata as ad
import h5py
import numpy as np
import pytest
from scipy import sparse
from sklearn.linear_model import LinearRegression
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score
from sklearn.metrics.pairwise import cosine_similarity

from sae.core import recovery as module
from sae.core.recovery import correlations, edge_scores, graph_recovery, judged, recovery
from sae.core.rows import Rows


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


@each_layout
def test_activations_are_read_in_blocks(layout, monkeypatch):
    truth, a = made()
    monkeypatch.setattr(module, "BLOCK_VALUES", 7 * a.shape[1])
    np.testing.assert_allclose(correlations(truth, layout(a)), of_numpy(truth, a), rtol=1e-10, atol=1e-12)


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


@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csr_array, sparse.csc_matrix])
@pytest.mark.parametrize("disk", [False, True])
def test_sparse_activations_stay_sparse(kind, disk, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("densified")

    truth, a = made()
    a = kind(a)
    a = Rows(a.tocsr(), np.arange(len(truth))) if disk else a
    for name in ("toarray", "todense"):
        monkeypatch.setattr(sparse.csr_matrix, name, refuse, raising=False)
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


@each_layout
def test_without_centring_it_is_the_cosine(layout):
    truth, a = made(shift=2)
    a[:, 1] = 0
    expected = cosine_similarity(truth.T, a.T)
    np.testing.assert_allclose(correlations(truth, layout(a), centred=False), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", ["array", "csr"])
def test_activations_on_disk(kind, tmp_path, monkeypatch):
    truth, a = made()
    adata = ad.AnnData(a if kind == "array" else sparse.csr_matrix(a))
    adata.write_h5ad(tmp_path / "a.h5ad")
    monkeypatch.setattr(module, "BLOCK_VALUES", 33 * a.shape[1])
    with h5py.File(tmp_path / "a.h5ad") as file:
        stored = file["X"] if kind == "array" else ad.io.sparse_dataset(file["X"])
        found = correlations(truth, stored)
    np.testing.assert_allclose(found, of_numpy(truth, a), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(found, correlations(truth, adata.X))


def test_what_is_said_of_each_variable():
    r = np.array([[0.2, -0.9, 0.5], [0.96, -0.3, 0.92], [0.97, 0.1, 0.0]])
    found = judged(r, (0.1, 0.9))
    np.testing.assert_array_equal(found.feature, [1, 0, 0])
    np.testing.assert_array_equal(found.r, [-0.9, 0.96, 0.97])
    np.testing.assert_array_equal(found.best, [0.9, 0.96, 0.97])
    np.testing.assert_array_equal(found.highest, [0.5, 0.96, 0.97])
    np.testing.assert_array_equal(found.partner, [1, 2, 0])
    np.testing.assert_array_equal(found.matched, [0.9, 0.92, 0.97])
    np.testing.assert_array_equal(found.n_above, [[3, 3, 1], [0, 2, 1]])
    few = judged(r[:, :2])
    assert sorted(few.partner) == [-1, 0, 1] and few.n_above.shape == (0, 3)
    assert (few.matched[few.partner < 0] == 0).all()


# ---- Graphs


def test_slopes_are_those_of_linear_regression():
    truth, a = made(p=3, h=5, density=1.1)
    x = np.random.default_rng(1).normal(size=(len(a), 7)) + a @ np.random.default_rng(2).normal(size=(5, 7))
    expected = LinearRegression().fit(a, x).coef_ * a.std(axis=0) / x.std(axis=0)[:, None]
    np.testing.assert_allclose(edge_scores(a, x, "regression"), expected.T, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(edge_scores(a, x, "correlation"), of_numpy(a, x), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(edge_scores(a, x, "cosine"), cosine_similarity(a.T, x.T), rtol=1e-6, atol=1e-9)


def test_slopes_of_equal_and_silent_features():
    _, a = made(h=3, density=1.1)
    x = a[:, :1] * [2.0, 0.0] + a[:, 1:2] * [0.0, 1.0] + a[:, 2:] * 0.1
    scores = edge_scores(np.column_stack([a, a[:, 0], 0 * a[:, 0]]), x, "regression")
    np.testing.assert_allclose(scores[0], scores[3], atol=1e-6)
    np.testing.assert_array_equal(scores[4], 0)
    np.testing.assert_allclose(scores[0] + scores[3], edge_scores(a, x, "regression")[0], atol=1e-6)


@pytest.mark.parametrize("n_edges", [1, 20, 60])
def test_graphs_are_compared_as_by_scikit_learn(n_edges):
    rng = np.random.default_rng(0)
    truth = rng.random((6, 15)) < 0.3
    scores = np.round(rng.normal(size=truth.shape) + truth, 1) + rng.random(truth.shape) * 1e-6
    scores[2, :5] = 0.25
    drawn = scores >= np.sort(scores, axis=None)[-n_edges]
    found = graph_recovery(scores, truth, n_edges)
    for j in range(6):
        pair = truth[j], drawn[j]
        assert found.precision[j] == pytest.approx(precision_score(*pair, zero_division=0))
        assert found.recall[j] == pytest.approx(recall_score(*pair))
        assert found.f1[j] == pytest.approx(f1_score(*pair))
        assert found.average_precision[j] == pytest.approx(average_precision_score(truth[j], scores[j]))
        assert found.density[j] == pytest.approx(truth[j].mean())


def test_a_perfect_graph_and_none():
    truth = np.array([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]], dtype=bool)
    scores = np.where(truth, 2.0, -1.0)
    scores[3] = -np.inf
    found = graph_recovery(scores, truth, int(truth.sum()))
    # The last one has no feature: of 5 edges, 3 are found, and two others drawn.
    np.testing.assert_array_equal(found.recall, [1, 1, np.nan, 0])
    np.testing.assert_array_equal(found.precision[2:], [np.nan, 0])
    np.testing.assert_array_equal(np.isnan(found.average_precision), [False, False, True, False])
    np.testing.assert_allclose(found.average_precision[[0, 1, 3]], [1, 1, 0.5])
